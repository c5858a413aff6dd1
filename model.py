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

import json
import shutil
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from errors import InputError

MAX_SHARD_BYTES = 5 * 10**9  # transformers' own limit per file, so that our directories look like everybody's


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
    source: dict = field(default_factory=dict, repr=False)  # config.json as read: fields we have no use for go back out unchanged

    def __post_init__(self) -> None:
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads


# Settings that change the computation and that this file does not implement: their absence, or this value, is all we accept.
REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "quantization_config": None,
}

# What a key that config.json leaves out means to transformers, where it is not Config's default. A null stands for itself.
ABSENT = {"llama": {}, "mistral": {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072}}


def read_config(path: str | Path) -> Config:
    """Config from `path`/config.json, of both generations: rope_theta + rope_scaling, and rope_parameters. InputError if refused."""
    file = Path(path) / "config.json"
    try:
        source = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; --model takes a Hugging Face directory") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(source, dict) or source.get("model_type") not in ("llama", "mistral"):
        kind = source.get("model_type") if isinstance(source, dict) else source
        raise InputError(f"{file}: model_type {kind!r} is not implemented; llama and mistral are")
    for name, accepted in REQUIRED.items():
        if source.get(name, accepted) != accepted:
            raise InputError(f"{file}: {name} = {source[name]!r} is not implemented; only {accepted!r} is")
    if any(kind != source["layer_types"][0] for kind in source.get("layer_types") or []):
        raise InputError(f"{file}: layer_types that differ from layer to layer are not implemented")

    known = {f.name for f in fields(Config)} - {"source", "rope_scaling"}
    stated = ABSENT[source["model_type"]] | source
    values = {name: stated[name] for name in known if stated.get(name) is not None}
    if source["model_type"] == "llama":
        values.pop("sliding_window", None)  # Llama ignores the field
    sizes = [f.name for f in fields(Config)[:7] if f.name in values or f.default is MISSING]
    for name in [*sizes, *({"sliding_window"} & values.keys())]:
        if not isinstance(values.get(name), int) or values[name] < 1:
            raise InputError(f"{file}: {name} is {source.get(name, 'missing')!r}, it should be a positive integer")
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"{file}: rope_scaling (or rope_parameters) is {rope!r}, it should be an object")
    rope = dict(rope)  # a copy: `source` goes back out as it came
    values["rope_theta"] = rope.pop("rope_theta", None) or source.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise InputError(f"{file}: rope type {kind!r} is not implemented; default and llama3 are")
    numbers = {name: values[name] for name in ("rms_norm_eps", "rope_theta") if name in values}
    if kind == "llama3":
        numbers |= {name: rope.get(name, "missing") for name in LLAMA3_ROPE}
    for name, value in numbers.items():
        if not isinstance(value, (int, float)) or value <= 0:
            raise InputError(f"{file}: {name} is {value!r}, it should be a positive number")
    config = Config(**values, rope_scaling=rope if kind == "llama3" else None, source=source)
    if config.num_attention_heads % config.num_key_value_heads or config.head_dim % 2:
        raise InputError(
            f"{file}: {config.num_attention_heads} query heads do not divide into {config.num_key_value_heads} key/value heads, "
            f"or head_dim {config.head_dim} is odd"
        )
    return config


# ---------------------------------------------------------------------------------------------------------------- transformer
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
        rows = (k.shape[0], -1, -1, -1)  # a view: the prefix is stored once, whatever the number of branches
        return torch.cat([prefix_k.expand(rows), k], dim=2), torch.cat([prefix_v.expand(rows), v], dim=2)


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
        positions = start[:, None] + steps if isinstance(start, Tensor) else start + steps  # [B, L] or [L]
        hidden = self.embed_tokens(tokens)  # [B, L, H]
        rope = rope_table(positions, self.config, hidden.dtype)
        mask = lru_cache(lambda slots: visible(positions, slots, self.config.sliding_window))  # all layers share one mask
        run = KEEP[self.activation_checkpointing if torch.is_grad_enabled() else "none"]
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, rope, mask, past, index, run)
        return self.norm(hidden)

    def held(self, past: Past, batch: int) -> int | Tensor:
        """Tokens `past` holds: its `length`, or, for an object that has append alone, what it returns when nothing is appended."""
        if hasattr(past, "length"):
            return past.length
        nothing = self.norm.weight.new_empty(batch, self.config.num_key_value_heads, 0, self.config.head_dim)
        return past.append(0, nothing, nothing)[0].shape[2]


class Block(nn.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, hidden: Tensor, rope: tuple[Tensor, Tensor], mask: Callable, past: Past | None, index: int, run: Callable) -> Tensor:
        q, k, v = run(self.begin, hidden, rope)
        if past is not None:
            k, v = past.append(index, k, v)  # [B, Hkv, S, D]; between the two, as the backward pass must not append again
        return run(self.finish, hidden, q, k, v, mask(k.shape[2]))

    def begin(self, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        return self.self_attn.project(self.input_layernorm(hidden), rope)

    def finish(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        hidden = hidden + self.self_attn(q, k, v, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


# What the backward pass finds ready, by the name of --activation-checkpointing; the rest it computes again. "selective" keeps what is
# expensive to compute, the products of matrices (they are half of the memory), "full" no more than a layer's input and q, k, v.
PRODUCTS = {"mm", "bmm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"}
PRODUCTS |= {"_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention"}
SELECTED = partial(create_selective_checkpoint_contexts, [getattr(torch.ops.aten, name).default for name in PRODUCTS])
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
        self.q_proj = nn.Linear(config.hidden_size, config.num_attention_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, config.num_key_value_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * config.head_dim, config.hidden_size, bias=False)

    def project(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, H] -> queries [B, Hq, L, D], keys and values [B, Hkv, L, D] of these tokens."""
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj))
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
        return F.scaled_dot_product_attention(q, k, v, is_causal=q.shape[2] > 1, enable_gqa=q.shape[1] != k.shape[1])
    # The query heads of a group are stacked along the length: every SDPA backend then handles grouping, and K, V are never copied.
    # Measured on 2 CPU cores (SmolLM2's heads, 32 rows, 1 query on 200 slots): 0.8 ms against 11.5 ms with K, V repeated.
    batch, kv_heads, group = q.shape[0], k.shape[1], q.shape[1] // k.shape[1]
    stacked = q.reshape(batch, kv_heads, group * q.shape[2], -1)
    mask = mask if q.shape[2] == 1 else mask.repeat(1, 1, group, 1)  # one query: the mask spreads by itself
    return F.scaled_dot_product_attention(stacked, k, v, attn_mask=mask).view(q.shape)


LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def rope_table(positions: Tensor, config: Config, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every position times every frequency, [B or 1, 1, L, D/2], computed in fp32 (positions exceed bf16's 8 bits).

    "llama3" scaling (Llama 3.1): wavelengths beyond original / low_freq_factor are stretched by `factor`, those below
    original / high_freq_factor stay, the band between is interpolated.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
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


# ---------------------------------------------------------------------------------------------------------------- directories
def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu", mesh: DeviceMesh | None = None
) -> Transformer:
    """The model in the Hugging Face directory `path`, from one safetensors file or from index.json shards.

    Memory: the model is built without storage and takes the file's memory-mapped tensors as they are where dtype and device match.
    mesh: split over its ranks, rows of every tensor (DTensor, Shard(0)); each rank reads its own rows and no others.
    InputError names the file and tensor that is missing, misshapen, unreadable or unknown.
    """
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
    expected = {file_name(name): parameter for name, parameter in model.named_parameters()}
    state = {}
    for file in weight_files(Path(path)):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
                        continue  # old Llama exports carry both; neither holds anything of its own
                    if name not in expected:
                        raise InputError(f"{file}: tensor {name} has no place in a {config.source['model_type']} model")
                    shape, wanted = tuple(tensors.get_slice(name).get_shape()), tuple(expected[name].shape)
                    if shape != wanted:
                        raise InputError(f"{file}: tensor {name} has shape {list(shape)}, config.json says {list(wanted)}")
                    own = tensors.get_tensor(name) if mesh is None else tensors.get_slice(name)[own_rows(shape[0], mesh)]
                    state[name] = as_rows(own.to(device=device, dtype=dtype), expected[name], mesh)
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: not a readable safetensors file (truncated download?): {error}") from None
    missing = [name for name in expected if name not in state]
    if missing:
        raise InputError(f"{path}: tensor {missing[0]} is missing" + f" (and {len(missing) - 1} more)" * (len(missing) > 1))
    return assign(model, {name: state[file_name(name)] for name, _ in model.named_parameters()})


def own_rows(rows: int, mesh: DeviceMesh) -> slice:
    """The rows of a tensor this rank holds: as torch.chunk splits it, the last ranks perhaps less or nothing."""
    chunk = -(-rows // mesh.size())
    start = min(rows, chunk * mesh.get_local_rank())
    return slice(start, min(rows, start + chunk))


def as_rows(own: Tensor, like: Tensor, mesh: DeviceMesh | None) -> Tensor:
    """This rank's rows as part of a tensor shaped like `like` that is split over the ranks; `own` itself if there is no mesh."""
    if mesh is None:
        return own
    return DTensor.from_local(own, mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride())


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks if it is split over them (then every rank must call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def assign(model: Transformer, state: dict[str, Tensor]) -> Transformer:
    """Gives a model built on the meta device its tensors, uncopied."""
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # assigning tensors has untied them
    return model


def file_name(name: str) -> str:
    """Our parameter name -> the tensor's name in a Hugging Face file."""
    return name if name.startswith("lm_head.") else "model." + name


def weight_files(path: Path) -> list[Path]:
    """The directory's safetensors files: those its index names, or the single one."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        if not (path / "model.safetensors").exists():
            raise InputError(f"{path}: neither model.safetensors nor model.safetensors.index.json is there")
        return [path / "model.safetensors"]
    try:
        names = sorted({str(name) for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: not an index of safetensors files: {error!r}") from None
    absent = [name for name in names if not (path / name).exists()]
    if absent:
        raise InputError(f"{path / absent[0]}: no such file, though {index.name} names it")
    return [path / name for name in names]


def stored_dtype(path: str | Path) -> torch.dtype:
    """The precision a directory's weights are stored in (what config.json claims is not always true)."""
    with safe_open(weight_files(Path(path))[0], framework="pt") as tensors:
        return tensors.get_tensor(next(iter(tensors.keys()))).dtype


def save_model(model: Transformer, path: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes config.json and safetensors (sharded with an index above `max_shard_bytes`) that any Hugging Face reader opens as they are.

    dtype: None keeps each tensor's own. A tied head is not written twice. Of a model that is split over ranks, every rank must call and
    the first one writes, a file at a time: no more than one file's tensors are whole in its memory.
    """
    path, writes = Path(path), not dist.is_initialized() or dist.get_rank() == 0
    path.mkdir(parents=True, exist_ok=True)
    parameters = {file_name(name): parameter.detach() for name, parameter in model.named_parameters()}
    sizes = {name: p.numel() * (dtype or p.dtype).itemsize for name, p in parameters.items()}  # bytes
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))] if len(shards) > 1 else ["model.safetensors"]
    for file, names in zip(files, shards, strict=True):
        tensors = {}
        for name in names:
            tensor = whole(parameters[name].to(dtype or parameters[name].dtype))
            if writes:
                tensors[name] = tensor.cpu().contiguous()
        if writes:
            save_file(tensors, path / file, metadata={"format": "pt"})
    if not writes:
        return
    for stale in set(path.glob("model*.safetensors*")) - {path / file for file in files}:
        stale.unlink()  # a model saved here before: its index would be read in place of ours, its shards beside ours
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        write_json(path / "model.safetensors.index.json", {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map})
    write_json(path / "config.json", config_json(model.config, dtype or next(iter(parameters.values())).dtype))
    for file in files:
        shutil.copymode(path / "config.json", path / file)  # safetensors writes what only its owner may read


def config_json(config: Config, dtype: torch.dtype) -> dict:
    """config.json as it was read, with what training can change brought up to date; written anew for a model made here."""
    source = dict(config.source)
    if not source:
        kind = "llama" if config.sliding_window is None else "mistral"
        source = {"architectures": [kind.capitalize() + "ForCausalLM"], "model_type": kind, "hidden_act": "silu"}
        source |= {f.name: getattr(config, f.name) for f in fields(Config) if f.name != "source"}
    dtype_key = "dtype" if "dtype" in source else "torch_dtype"
    return source | {"vocab_size": config.vocab_size, dtype_key: str(dtype).removeprefix("torch.")}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def copy_token_rows(model: Transformer, token: int, source: int) -> None:
    """Gives `token` the embedding and output row of `source`, growing the vocabulary if `token` lies beyond it.

    How a new marker token starts (paper, section 4: as a copy of eos). Works on tied and untied heads, whole or split over ranks.
    """
    tables = [model.embed_tokens] if model.config.tie_word_embeddings else [model.embed_tokens, model.lm_head]
    for table in tables:
        rows = whole(table.weight.detach())
        grown = torch.cat([rows, rows[source].expand(max(0, token + 1 - len(rows)), -1)])
        grown[token] = grown[source].clone()
        if isinstance(table.weight, DTensor):
            grown = distribute_tensor(grown, table.weight.device_mesh, [Shard(0)], src_data_rank=None)  # None: nothing to send, all have it
        table.weight = nn.Parameter(grown)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.config.vocab_size = len(model.embed_tokens.weight)
