"""The Llama / Mistral transformer, written by hand, and its Hugging Face directory on disk.

    tokens [B, L] -> embedding -> N x (h + attention(norm(h));  h + mlp(norm(h))) -> norm -> hidden [B, L, H]

The model stops at the hidden state: logits are never formed here. Whoever needs log-probs multiplies by `model.lm_head.weight`
[V, H] on the rows that matter (kernels/logprob.py), whoever samples does so on one row per trace (sample.py).

`model(tokens, past)` continues a prefix. `past` is any object with one method, `append(layer, k, v) -> (k_all, v_all)`; the rule that
makes one mask serve training, prompt-then-branches and ragged sampling alike is that SLOT j OF k_all HOLDS THE TOKEN AT POSITION j. A
query at position p sees slots p - sliding_window < j <= p, so slots a row has not written yet are never read. Where k_all has room
to spare or rows differ in length, `past.length` says how many tokens each row already holds.

What it loads: Llama 2/3/3.1/3.2, SmolLM2, Mistral 7B v0.1-v0.3, Nemo-style head_dim; anything else is refused by name.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts


# ---------------------------------------------------------------------------------------------------------------- configuration
@dataclass
class Config:
    """A model's shape, in Hugging Face's names. Sizes in elements; `rope_scaling` is None or the "llama3" dict."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None  # None: as many as there are query heads (no grouping)
    head_dim: int | None = None  # None: hidden_size / num_attention_heads (Nemo says otherwise)
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    source: dict = field(
        default_factory=dict, repr=False
    )  # config.json as read: fields we have no use for go back out unchanged

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


# ---- transformer
class Past(Protocol):
    """What `model(tokens, past)` continues: Prefix below (differentiable), or the Slots of sample.py (static memory).

    Optional attribute `length`: tokens held before this call, one int, or a tensor [B] where rows differ.
    """

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Adds k, v [B, Hkv, L, D] of this call's tokens; returns all of them, [B, Hkv, S, D], slot j holding position j."""


class Prefix:
    """Keys and values of a common prefix, [1, Hkv, P, D] per layer: the first call records them, every later call continues them.

    A continuation leaves the prefix as it is, so branches of any number and order share one, and gradients flow back into it.
    """

    def __init__(self) -> None:
        self.kv: list[tuple[Tensor, Tensor]] = []

    @property
    def length(self) -> int:
        return self.kv[0][0].shape[2] if self.kv else 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self.kv):  # the first call reaches each layer once, in order
            self.kv.append((k, v))
            return k, v
        prefix_k, prefix_v = self.kv[layer]
        rows = (
            k.shape[0],
            -1,
            -1,
            -1,
        )  # a view: the prefix is stored once, whatever the number of branches
        return torch.cat([prefix_k.expand(rows), k], dim=2), torch.cat(
            [prefix_v.expand(rows), v], dim=2
        )


class Transformer(nn.Module):
    """A decoder-only transformer. Module names are Hugging Face's without the leading "model."."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.activation_checkpointing = "none"  # one of KEEP

    def forward(self, tokens: Tensor, past: Past | None = None) -> Tensor:
        """Hidden states after the final norm.

        tokens [B, L] -> hidden [B, L, H]. Rows are left-aligned; padding, if any, is on the right, where no real token can see it.
        """
        start = 0 if past is None else self.held(past, tokens.shape[0])
        steps = torch.arange(tokens.shape[1], device=tokens.device)
        positions = (
            start[:, None] + steps if isinstance(start, Tensor) else start + steps
        )  # [B, L] or [L]
        hidden = self.embed_tokens(tokens)  # [B, L, H]
        rope = rope_table(positions, self.config, hidden.dtype)
        mask = lru_cache(
            lambda slots: visible(positions, slots, self.config.sliding_window)
        )  # all layers share one mask
        run = KEEP[self.activation_checkpointing if torch.is_grad_enabled() else "none"]
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, rope, mask, past, index, run)
        return self.norm(hidden)

    def held(self, past: Past, batch: int) -> int | Tensor:
        """Tokens `past` holds: its `length`, or, for an object that has append alone, what it returns when nothing is appended."""
        if hasattr(past, "length"):
            return past.length
        nothing = self.norm.weight.new_empty(
            batch, self.config.num_key_value_heads, 0, self.config.head_dim
        )
        return past.append(0, nothing, nothing)[0].shape[2]


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Callable,
        past: Past | None,
        index: int,
        run: Callable,
    ) -> Tensor:
        q, k, v = run(self.begin, hidden, rope)
        if past is not None:
            k, v = past.append(
                index, k, v
            )  # [B, Hkv, S, D]; between the two, as the backward pass must not append again
        return run(self.finish, hidden, q, k, v, mask(k.shape[2]))

    def begin(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(hidden), rope)

    def finish(
        self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        hidden = hidden + self.self_attn(q, k, v, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


# What the backward pass finds ready, by the name of --activation-checkpointing; the rest it computes again. "selective" keeps what is
# expensive to compute, the products of matrices (they are half of the memory), "full" no more than a layer's input and q, k, v.
PRODUCTS = {
    "mm",
    "bmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
}
PRODUCTS |= {"_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"}
SELECTED = partial(
    create_selective_checkpoint_contexts,
    [getattr(torch.ops.aten, name).default for name in PRODUCTS],
)
KEEP: dict[str, Callable] = {
    "none": lambda function, *inputs: function(*inputs),
    "selective": partial(checkpoint, use_reentrant=False, context_fn=SELECTED),
    "full": partial(checkpoint, use_reentrant=False),
}


class Attention(nn.Module):
    """Grouped-query attention: Hq query heads read Hkv <= Hq key/value heads, Hq / Hkv of them each."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(
            config.hidden_size, config.num_attention_heads * config.head_dim, bias=False
        )
        self.k_proj = nn.Linear(
            config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False
        )
        self.v_proj = nn.Linear(
            config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False
        )
        self.o_proj = nn.Linear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=False
        )

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, H] -> queries [B, Hq, L, D], keys and values [B, Hkv, L, D] of these tokens."""
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return rotate(q, *rope), rotate(k, *rope), v

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q [B, Hq, L, D], k and v [B, Hkv, S, D], those of the past included -> [B, L, H]"""
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
    """x / rms(x) * weight; torch computes the mean square in fp32 for half-precision inputs, as the published models expect."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


# ---------------------------------------------------------------------------------------------------------------- attention, positions
def visible(positions: Tensor, slots: int, window: int | None) -> Tensor | None:
    """Which of `slots` key slots each query may see: bool [B or 1, 1, L, S], or None for the plain causal square.

    positions [L] or [B, L] are the queries'. None lets SDPA use its is_causal path (the fastest on every device).
    """
    if positions.dim() == 1 and slots == positions.shape[0] and (window is None or slots <= window):
        return None
    at = positions.view(-1, 1, positions.shape[-1], 1)  # [B or 1, 1, L, 1]
    slot = torch.arange(slots, device=positions.device)  # [S]
    seen = slot <= at
    return seen if window is None else seen & (slot > at - window)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(D)) v.  q [B, Hq, L, D], k and v [B, Hkv, S, D], mask [B or 1, 1, L, S] or None = causal -> [B, Hq, L, D]"""
    if mask is None:
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1]
        )
    # The query heads of a group are stacked along the length: every SDPA backend then handles grouping, and K, V are never copied.
    # Measured on 2 CPU cores (SmolLM2's heads, 32 rows, 1 query on 200 slots): 0.8 ms against 11.5 ms with K, V repeated.
    batch, kv_heads, group = q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    stacked = q.reshape(batch, kv_heads, group * q.shape[2], -1)
    mask = (
        mask if q.shape[2] == 1 else mask.repeat(1, 1, group, 1)
    )  # one query: the mask spreads by itself
    return F.scaled_dot_product_attention(stacked, k, v, attn_mask=mask).view(q.shape)


LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_table(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position times every frequency, [B or 1, 1, L, D/2], computed in fp32 (positions exceed bf16's 8 bits).

    "llama3" scaling (Llama 3.1): wavelengths beyond original / low_freq_factor are stretched by `factor`, those below
    original / high_freq_factor stay, the band between is interpolated.
    """
    exponents = (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device)
        / config.head_dim
    )
    frequency = config.rope_theta**-exponents  # [D/2] radians per token
    if config.rope_scaling is not None:
        factor, low, high, original = (config.rope_scaling[name] for name in LLAMA3_ROPE)
        turns = original * frequency / (2 * torch.pi)  # full turns within the original context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (keep + (1 - keep) / factor)
    angle = positions.view(-1, 1, positions.shape[-1], 1).float() * frequency
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the rotate-half layout of Hugging Face weights: element i turns with element i + D/2.  x [B, heads, L, D]"""
    a, b = x.chunk(2, dim=-1)  # [B, heads, L, D/2] each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
