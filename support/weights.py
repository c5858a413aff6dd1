"""Hugging Face model directories: config.json and safetensors, in and out.

    model = load_model(path, dtype, device)     build without storage, read, assign
    save_model(model, path)                     any Hugging Face reader opens the result

What is not implemented, missing, misshapen or unreadable is refused with one line that names the
file and the field or tensor: a silent default would train a different model.

Nothing here knows of processes. A rank that holds a part of the rows of every tensor passes `rows`
(which rows to read) and `whole` (how to gather a tensor that is written); support/distributed.py
has both.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from model import LLAMA3_ROPE, Config, Transformer
from support.errors import InputError

MAX_SHARD_BYTES = 5 * 10**9  # per file, the default of transformers

# ---- config.json
# Fields that change the computation in ways that are not implemented: only this value is accepted.
ACCEPTED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,  # Qwen: some layers would have a window, others none
    "quantization_config": None,
}

# What transformers assumes for an absent field, where it is not the default of Config. A field
# that is null is not absent: a Mistral with "sliding_window": null has no sliding window.
ABSENT = {
    "llama": {},
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}

# Fields of Config that config.json does not state: they follow from the model_type.
IMPLIED = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}

# Fields that must be positive: their type, and whether config.json must have them.
POSITIVE = {
    "vocab_size": (int, True),
    "hidden_size": (int, True),
    "intermediate_size": (int, True),
    "num_hidden_layers": (int, True),
    "num_attention_heads": (int, True),
    "num_key_value_heads": (int, False),
    "head_dim": (int, False),
    "sliding_window": (int, False),
    "rms_norm_eps": (float, False),
    "rope_theta": (float, False),
}


def read_config(path: str | Path) -> Config:
    """Config from `path`/config.json; InputError if the model is not implemented or not valid."""
    file = Path(path) / "config.json"
    source = read_source(file)
    family = source["model_type"]
    stated = ABSENT[family] | source
    elsewhere = ("source", "rope_scaling", "qkv_bias", "qk_norm")
    names = [f.name for f in fields(Config) if f.name not in elsewhere]
    values = {name: stated[name] for name in names if stated.get(name) is not None}
    if family != "mistral":
        values.pop("sliding_window", None)  # transformers ignores it elsewhere
    rope_theta, rope_scaling = read_rope(source, file)
    values["rope_theta"] = rope_theta
    for name, (kind, required) in POSITIVE.items():
        if required or name in values:
            check_positive(values.get(name, source.get(name, "missing")), kind, name, file)
    config = Config(**values, **IMPLIED[family], rope_scaling=rope_scaling, source=source)
    if config.num_attention_heads % config.num_key_value_heads:
        raise InputError(
            f"{file}: {config.num_attention_heads} query heads do not divide into "
            f"{config.num_key_value_heads} key/value heads"
        )
    if config.head_dim % 2:
        raise InputError(f"{file}: head_dim is {config.head_dim}, it should be even")
    return config


def read_source(file: Path) -> dict:
    """config.json as it stands, once its model_type and the fields ACCEPTED are checked."""
    try:
        source = json.loads(file.read_text())
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; --model takes a Hugging Face directory") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(source, dict):
        raise InputError(f"{file}: holds {source!r}, it should be an object")
    family = source.get("model_type")
    if family not in IMPLIED:
        known = ", ".join(IMPLIED)
        raise InputError(f"{file}: model_type {family!r} is not implemented; {known} are")
    for name, accepted in ACCEPTED.items():
        value = source.get(name, accepted)
        if value != accepted:
            raise InputError(f"{file}: {name} = {value!r} is not implemented; only {accepted!r} is")
    kinds = source.get("layer_types") or []
    if any(kind != kinds[0] for kind in kinds):
        raise InputError(f"{file}: layer_types that differ from layer to layer are not implemented")
    return source


def read_rope(source: dict, file: Path) -> tuple[float, dict | None]:
    """(rope_theta, rope_scaling).

    transformers 5 writes both into rope_parameters; older files have the fields rope_theta and
    rope_scaling.
    """
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(
            f"{file}: rope_scaling (or rope_parameters) is {rope!r}, it should be an object"
        )
    theta = rope.get("rope_theta") or source.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise InputError(f"{file}: rope type {kind!r} is not implemented; default and llama3 are")
    for name in LLAMA3_ROPE:
        check_positive(rope.get(name, "missing"), float, name, file)
    return theta, {name: value for name, value in rope.items() if name != "rope_theta"}


def check_positive(value: object, kind: type, name: str, file: Path) -> None:
    types = int if kind is int else (int, float)
    if not isinstance(value, types) or value <= 0:
        noun = "integer" if kind is int else "number"
        raise InputError(f"{file}: {name} is {value!r}, it should be a positive {noun}")


def config_json(config: Config, dtype: torch.dtype) -> dict:
    """config.json as it was read, vocab_size and dtype brought up to date; new if none was read."""
    source = config.source
    if not source:
        family = "llama" if config.sliding_window is None else "mistral"
        family = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else family
        source = {
            "architectures": [family.capitalize() + "ForCausalLM"],
            "model_type": family,
            "hidden_act": "silu",
        }
        for f in fields(Config):
            if f.name not in ("source", "qkv_bias", "qk_norm"):
                source[f.name] = getattr(config, f.name)
    dtype_key = "dtype" if "dtype" in source else "torch_dtype"
    changed = {"vocab_size": config.vocab_size, dtype_key: str(dtype).removeprefix("torch.")}
    return source | changed


# ---- reading
def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Transformer:
    """The model in the Hugging Face directory `path`. InputError if it cannot be read."""
    model = empty_model(read_config(path))
    return assign(model, read_tensors(path, model, dtype, device))


def empty_model(config: Config) -> Transformer:
    """A model without storage (meta device): shapes alone, until `assign` gives it tensors."""
    with torch.device("meta"):
        return Transformer(config)


def read_tensors(
    path: str | Path,
    model: Transformer,
    dtype: torch.dtype,
    device: str | torch.device,
    rows: Callable[[int], slice] | None = None,
) -> dict[str, Tensor]:
    """The tensors of a directory by the parameter names of `model`, which may be an empty model.

    rows: number of rows of a tensor -> the rows to read; the others stay on disk. None reads all:
    where dtype and device are the file's, the result is its memory map, without a copy.
    InputError names the tensor that is missing, misshapen, unreadable or unknown.
    """
    expected = {file_name(name): p.shape for name, p in model.named_parameters()}
    found = {}
    for file in weight_files(Path(path)):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if is_redundant(name, model.config):
                        continue
                    check_tensor(name, tensors.get_slice(name).get_shape(), expected, file)
                    if rows is None:
                        tensor = tensors.get_tensor(name)
                    else:
                        tensor = tensors.get_slice(name)[rows(expected[name][0])]
                    found[name] = tensor.to(device=device, dtype=dtype)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: not a readable safetensors file (truncated download?): {error}"
            ) from None
    missing = [name for name in expected if name not in found]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise InputError(f"{path}: tensor {missing[0]} is missing{more}")
    return {name: found[file_name(name)] for name, _ in model.named_parameters()}


def is_redundant(name: str, config: Config) -> bool:
    """Old Llama exports hold RoPE frequencies, and a copy of a tied head."""
    tied_head = name == "lm_head.weight" and config.tie_word_embeddings
    return tied_head or name.endswith("rotary_emb.inv_freq")


def check_tensor(name: str, shape: list[int], expected: dict[str, torch.Size], file: Path) -> None:
    if name not in expected:
        raise InputError(f"{file}: tensor {name} is not a parameter of the model in config.json")
    if list(shape) != list(expected[name]):
        raise InputError(
            f"{file}: tensor {name} has shape {list(shape)}, "
            f"config.json says {list(expected[name])}"
        )


def assign(model: Transformer, state: dict[str, Tensor]) -> Transformer:
    """Replaces the model's parameters by the tensors of `state`, without a copy."""
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # assigning tensors has untied them
    return model


def file_name(name: str) -> str:
    """Parameter name -> the tensor's name in a Hugging Face file."""
    return name if name.startswith("lm_head.") else "model." + name


def weight_files(path: Path) -> list[Path]:
    """The directory's safetensors files: those its index names, or the only one."""
    single = path / "model.safetensors"
    index = path / "model.safetensors.index.json"
    if not index.exists():
        if not single.exists():
            raise InputError(f"{path}: neither {single.name} nor {index.name} is there")
        return [single]
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        names = sorted({str(name) for name in weight_map.values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index}: not an index of safetensors files: {error!r}") from None
    for name in names:
        if not (path / name).exists():
            raise InputError(f"{path / name}: no such file, though {index.name} names it")
    return [path / name for name in names]


def stored_dtype(path: str | Path) -> torch.dtype:
    """The dtype of the weights on disk. config.json's own claim is not always true."""
    with safe_open(weight_files(Path(path))[0], framework="pt") as tensors:
        return tensors.get_tensor(next(iter(tensors.keys()))).dtype


# ---- writing
def save_model(
    model: Transformer,
    path: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    writes: bool = True,
) -> None:
    """Writes config.json and safetensors, several files and their index above `max_shard_bytes`.

    dtype: None keeps that of each parameter. A tied head is written once, as the embedding.
    whole: gathers a parameter that is split over ranks. Every rank must call then, with `writes`
    True on one of them. The tensors of one file at a time are whole in its memory.
    """
    path = Path(path)
    parameters = {file_name(name): p.detach() for name, p in model.named_parameters()}
    sizes = {name: p.numel() * (dtype or p.dtype).itemsize for name, p in parameters.items()}
    shards = split_into_shards(sizes, max_shard_bytes)
    if writes:
        path.mkdir(parents=True, exist_ok=True)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            parameter = parameters[name]
            tensor = whole(parameter.to(dtype or parameter.dtype))  # cast first: less to gather
            if writes:
                tensors[name] = tensor.cpu().contiguous()
        if writes:
            save_file(tensors, path / file, metadata={"format": "pt"})
    if not writes:
        return
    # A model saved here before may have other files. Its index would be read in place of ours.
    for old in set(path.glob("model*.safetensors*")) - {path / file for file in shards}:
        old.unlink()
    if len(shards) > 1:
        weight_map = {name: file for file, names in shards.items() for name in names}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(path / "model.safetensors.index.json", index)
    first = next(iter(parameters.values()))
    write_json(path / "config.json", config_json(model.config, dtype or first.dtype))
    for file in shards:  # safetensors makes files that only their owner may read
        shutil.copymode(path / "config.json", path / file)


def split_into_shards(sizes: dict[str, int], limit: int) -> dict[str, list[str]]:
    """Tensor sizes in bytes -> the tensors of each file, in order. A larger tensor has its own."""
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    count = len(shards)
    return {f"model-{i:05}-of-{count:05}.safetensors": names for i, names in enumerate(shards, 1)}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
