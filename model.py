"""The Llama / Mistral / Qwen transformer in plain PyTorch.

    tokens [B, L] -> embedding -> N blocks -> norm -> hidden [B, L, H]
    block:  h = h + attention(norm(h))
            h = h + mlp(norm(h))

The forward pass ends at the hidden states. Logits [B, L, V] would be the largest tensor of a
training step, so they are not computed here: training turns hidden states into log-probs without
storing logits (kernels/logprob.py), sampling computes the logits of one position per row
(sample.py). Both read `model.lm_head.weight` [V, H].

`model(tokens, past)` continues a KV cache, any object like `Past` below. One rule lets the same
mask serve training, branches that share a prompt, and decoding of rows of different lengths: KEY j
OF ITS S KEYS BELONGS TO THE TOKEN AT POSITION j. A query at position p attends to the keys
p - sliding_window < j <= p. A shorter row never attends to the keys beyond its own length,
whatever they hold.

Shapes: B rows, L tokens of this forward, S keys (past and new), P tokens of a prompt, H hidden
size, V vocabulary, D head_dim, Hq query heads, Hkv key/value heads.

Implemented: Llama 2 / 3 / 3.1 / 3.2, SmolLM2, Mistral 7B v0.1 to v0.3, Mistral Nemo, and the dense
text models of Qwen2 / 2.5 / 3. support/weights.py reads their Hugging Face directories and refuses
all others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

Rope = tuple[Tensor, Tensor]  # cos and sin, as rope_table makes them


@dataclass
class Config:
    """A model's shape, under Hugging Face's names; the two without one follow from model_type."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: num_attention_heads, no grouping
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # None, or the fields LLAMA3_ROPE
    sliding_window: int | None = None  # tokens a query attends to, itself included; None: all
    qkv_bias: bool = False  # Qwen2: q, k and v have a bias, the output projection has none
    qk_norm: bool = False  # Qwen3: each head of q and k is normalised before RoPE
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048  # tokens of a sequence; the commands skip longer rows
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    # config.json as it was read: fields that mean nothing to us are written back unchanged.
    source: dict = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


# ---- KV cache
class Past(Protocol):
    """A KV cache: Prefix below (differentiable), or the static one of sample.py."""

    length: int | Tensor  # tokens before this forward; [B] where rows differ

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [B, Hkv, L, D] of the new tokens -> those of all tokens, [B, Hkv, S, D]."""


class Prefix:
    """A prompt's keys and values: the first forward records them, later forwards continue them.

    Later forwards do not change it. So any number of branches continue the same prompt, in one
    batch or one after another, and the gradients of all of them reach the prompt.
    """

    def __init__(self) -> None:
        # Per layer [1, Hkv, P, D]. With more than one row it can only be recorded: the sampler
        # prefills several prompts at once and copies their keys and values into its own cache.
        self.kv: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        return self.kv[0][0].shape[2] if self.kv else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.kv):  # first forward: it comes to each layer once, in order
            self.kv.append((k, v))
            return k, v
        prefix_k, prefix_v = self.kv[layer]
        prefix_k = prefix_k.expand(len(k), -1, -1, -1)  # a view: branches share one prompt
        prefix_v = prefix_v.expand(len(v), -1, -1, -1)
        return torch.cat([prefix_k, k], dim=2), torch.cat([prefix_v, v], dim=2)


# ---- transformer
class Transformer(nn.Module):
    """A decoder-only transformer. Parameter names: Hugging Face's without the prefix "model.".

    A new one has torch's default weights: training starts from a checkpoint, not from here.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        layers = [Block(config, index) for index in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        # True: for the backward pass a layer keeps its inputs alone, and is computed again there.
        self.recompute = False

    def forward(self, tokens: Tensor, past: Past | None = None) -> Tensor:
        """tokens [B, L] -> hidden states after the final norm, [B, L, H].

        Rows of different length are padded on the right, where no earlier token attends to the
        padding.
        """
        start = 0 if past is None else past.length
        offsets = torch.arange(tokens.shape[1], device=tokens.device)  # [L]
        if isinstance(start, Tensor):
            positions = start[:, None] + offsets  # [B, L]
        else:
            positions = start + offsets  # [L], the same in every row

        @cache  # All layers share the mask. The first one learns S from `past`, and has it made.
        def mask(keys: int) -> Mask:
            return visible(start, positions, keys, self.config, hidden)

        recompute = self.recompute and torch.is_grad_enabled()
        hidden = self.embed_tokens(tokens)  # [B, L, H]
        rope = rope_table(positions, self.config, hidden.dtype)
        for layer in self.layers:
            hidden = layer(hidden, rope, mask, past, recompute)
        return self.norm(hidden)


class Block(nn.Module):
    """One layer: h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: Config, index: int) -> None:
        super().__init__()
        self.index = index
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        rope: Rope,
        mask: Callable[[int], "Mask"],
        past: Past | None,
        recompute: bool,
    ) -> Tensor:
        """hidden [B, L, H] -> [B, L, H].  mask: number of keys S -> attention mask

        It runs in two parts, and the append stands between them: inside one, it would be repeated
        when the backward pass computes that part again.
        """

        def run(part: Callable, *inputs: object) -> object:
            return checkpoint(part, *inputs, use_reentrant=False) if recompute else part(*inputs)

        q, k, v = run(self.before_attention, hidden, rope)
        if past is not None:
            k, v = past.append(self.index, k, v)  # [B, Hkv, S, D]
        return run(self.from_attention_on, hidden, q, k, v, mask(k.shape[2]))

    def before_attention(self, hidden: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(hidden), rope)

    def from_attention_on(
        self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: "Mask"
    ) -> Tensor:
        hidden = hidden + self.self_attn(q, k, v, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


# ---- the parts of a block
class Attention(nn.Module):
    """Grouped-query attention (GQA): groups of Hq / Hkv query heads share a key/value head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim  # need not equal hidden_size
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.q_norm = self.k_norm = nn.Identity()
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, H] -> q [B, Hq, L, D], k and v [B, Hkv, L, D] of these tokens."""
        q = self.q_norm(self.split_heads(self.q_proj(x)))
        k = self.k_norm(self.split_heads(self.k_proj(x)))
        v = self.split_heads(self.v_proj(x))
        turned = rotate(torch.cat([q, k], dim=1), *rope)  # five kernels, not eight
        q, k = turned.split([q.shape[1], k.shape[1]], dim=1)
        return q, k, v

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, L, heads * D] -> [B, heads, L, D]"""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: "Mask") -> Tensor:
        """q [B, Hq, L, D], k and v [B, Hkv, S, D] of past and new tokens -> [B, L, H]"""
        return self.o_proj(attend(q, k, v, mask).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    """x / rms(x) * weight. For bf16 inputs, torch computes the mean square in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# ---- attention
# cuDNN's attention, torch's first choice on an H100, builds a plan for every new shape in 0.1 to
# 0.5 s; each decode step and each batch of branches is a new shape. All commands import this file.
torch.backends.cuda.enable_cudnn_sdp(False)


class OwnKeys(NamedTuple):
    """The mask of a decode step in FlashAttention: a query per row, which reads its row alone.

    int32, as the kernel takes them. Keys of all rows stand behind each other, S to a row.
    """

    query_at: Tensor  # [B + 1] 0, 1, 2, ... where the queries of a row begin, and end
    keys_at: Tensor  # [B + 1] 0, S, 2 S, ...
    count: Tensor  # [B] keys the row holds


Mask = Tensor | OwnKeys | None  # as `visible` makes it


def flash_takes(like: Tensor, config: Config, keys: int) -> bool:
    """Whether FlashAttention computes over this many keys: on a GPU, in fp16 or bf16, no window."""
    query = like.new_empty(1, 1, 1, config.head_dim)
    flash = can_use_flash_attention(SDPAParams(query, query, query, None, 0.0, False, False))
    window = config.sliding_window
    return flash and config.head_dim % 8 == 0 and (window is None or keys <= window)


def visible(
    start: int | Tensor, positions: Tensor, keys: int, config: Config, like: Tensor
) -> Mask:
    """The mask: which of `keys` keys each query attends to.

    positions [L] or [B, L] of the queries, from `start` on. like: gives dtype and device.
    -> bool [B or 1, 1, L, S], S = keys. Where no window is in effect, one of these instead, which
    hold no L x S numbers and whose hidden keys are not read:
        None         a prompt: the causal triangle
        CausalBias   branches of a prompt: the triangle ends at the last key      } where Flash-
        OwnKeys      a decode step, every row at its own position                 } Attention runs
    """
    window, length = config.sliding_window, positions.shape[-1]
    up_to_last = isinstance(start, int) and start + length == keys
    if up_to_last and length == keys and (window is None or keys <= window):
        return None
    flash = flash_takes(like, config, keys)
    if flash and up_to_last:
        # Here, as it imports torch's compiler and Triton: a second, and not before it is used.
        # A CausalBias cannot be made within a TorchDispatchMode, a FLOP counter say: it raises.
        from torch.nn.attention.bias import causal_lower_right

        return causal_lower_right(length, keys)
    if flash and isinstance(start, Tensor) and length == 1 and not torch.is_grad_enabled():
        row = torch.arange(len(start) + 1, dtype=torch.int32, device=start.device)
        return OwnKeys(row, row * keys, (start + 1).int())
    query = positions.view(-1, 1, length, 1)  # [B or 1, 1, L, 1]
    key = torch.arange(keys, device=positions.device)  # [S]
    seen = key <= query
    return seen if window is None else seen & (key > query - window)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.

    q [B, Hq, L, D], k and v [B, Hkv, S, D] -> [B, Hq, L, D]
    """
    batch, heads, length, _ = q.shape
    kv_heads, keys = k.shape[1:3]
    if isinstance(mask, OwnKeys):
        # Its public form, torch.nn.attention.varlen, takes no seqused_k in torch 2.11.
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B, Hq, D], [B S, Hkv, D]
        out = torch.ops.aten._flash_attention_forward(
            q, k, v, mask.query_at, mask.keys_at, 1, keys, 0.0, False, False, seqused_k=mask.count
        )
        return out[0][:, :, None]
    if mask is None or mask.dtype != torch.bool:  # CausalBias
        triangle = mask is None and length > 1
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=triangle, enable_gqa=heads != kv_heads
        )
    # The query heads of a group are stacked along the length: each key/value head then has one,
    # longer, query head, and k and v are not copied for every query head. With SmolLM2's heads, 32
    # rows, 1 query and 200 keys that takes 0.8 ms on 2 CPU cores; with copies, 11.5.
    group = heads // kv_heads
    stacked = q.reshape(batch, kv_heads, group * length, -1)
    if length > 1:  # the mask of a single query broadcasts over the group
        mask = mask.repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(stacked, k, v, attn_mask=mask)
    return out.reshape(q.shape)  # not view: CUDA's memory-efficient attention returns a transpose


# ---- rotary position embedding (RoPE)
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_table(positions: Tensor, config: Config, dtype: torch.dtype) -> Rope:
    """positions [L] or [B, L] -> cos and sin of position * frequency, [B or 1, 1, L, D] each.

    Both halves of D hold the D/2 frequencies; sin is negative in the first, as `rotate` needs it.
    Computed in fp32, then rounded to `dtype`: bf16 itself counts no further than 256.

    Llama 3.1 scaling (config.rope_scaling): frequencies of fewer than `low` turns within the
    original context are divided by `factor`, those of more than `high` stay, those between are
    interpolated.
    """
    index = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
    frequency = config.rope_theta ** -(index / config.head_dim)  # [D/2] radians per token
    if config.rope_scaling is not None:
        factor, low, high, original = [config.rope_scaling[name] for name in LLAMA3_ROPE]
        turns = original * frequency / (2 * torch.pi)
        unscaled = ((turns - low) / (high - low)).clamp(0, 1)  # 1: stays, 0: divided
        frequency = frequency * (unscaled + (1 - unscaled) / factor)
    angle = positions.view(-1, 1, positions.shape[-1], 1).float() * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies RoPE to x [B, heads, L, D].

    Elements i and i + D/2 form a pair (a, b) that turns to (a cos - b sin, b cos + a sin): the
    layout of Hugging Face weights, where the RoPE paper pairs neighbours. Four kernels; with the
    halves computed one by one they were seven.
    """
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin


# ---- prefill
@dataclass
class Prefill:
    """B prompts that the model has read: all that their continuations need."""

    past: Prefix  # KV cache, [B, Hkv, P, D] per layer
    hidden: Tensor  # [B, H] the state at each prompt's last token, which predicts the next one


def prefill(model: Transformer, prompts: Sequence[Sequence[int]]) -> Prefill:
    """One forward pass over B prompts, differentiable when grad is enabled.

    Prompts are padded on the right to the longest, P tokens. Causal attention keeps the padding out
    of `hidden`; its keys and values lie beyond a prompt's length, where nothing is read.
    """
    tokens = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    past = Prefix()
    hidden = model(tokens.to(model.lm_head.weight.device), past)  # [B, P, H]
    last = [row[len(prompt) - 1] for row, prompt in zip(hidden, prompts, strict=True)]
    return Prefill(past, torch.stack(last))
