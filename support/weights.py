"""Hugging Face model directories: config.json and safetensors, in and out.

    model = load_model(path, dtype, device)     build without storage, read, assign
    save_model(model, path)                     any Hugging Face reader opens the result

What is not implemented, missing, misshapen or unreadable is refused with one line that names the
file and the field or tensor: a silent default would train a different model.

Nothing here knows of processes. A rank that holds a part of the rows of every tensor passes `rows`
(which rows to read) and `whole` (how to gather a tensor that is written); support/distributed.py
has both.
"""

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import LLAMA3_ROPE, Config, Transformer
from support.errors import InputError, read_json, require, write_json
from support.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5 * 10**9  # per file, the default of transformers
# Types of tensors that are read, as safetensors names them. No others: integers and booleans are no
# parameters, and 8-bit numbers need a scale that is stored elsewhere.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}

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

# The other fields that are used: type, least and most value. The limits lie far beyond any model,
# and keep a wrong number from filling the memory.
FIELDS = {
    "vocab_size": (int, 1, 10**8),
    "hidden_size": (int, 1, 10**6),
    "intermediate_size": (int, 1, 10**7),
    "num_hidden_layers": (int, 1, 1000),
    "num_attention_heads": (int, 1, 10**5),
    "num_key_value_heads": (int, 1, 10**5),
    "head_dim": (int, 1, 10**5),
    "sliding_window": (int, 1, 10**9),
    "max_position_embeddings": (int, 1, 10**9),
    "rms_norm_eps": (float, 1e-30, 1),
    "rope_theta": (float, 1, 1e15),
    "tie_word_embeddings": (bool, None, None),
    "layer_types": (list, None, None),
    "rope_parameters": (dict, None, None),
    "rope_scaling": (dict, None, None),
}
REQUIRED = list(FIELDS)[:5]
ROPE_FIELDS = {name: (float, 1e-6, 1e15) for name in (*LLAMA3_ROPE, "rope_theta")}


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
    values["rope_theta"], rope_scaling = read_rope(source, file)
    config = Config(**values, **IMPLIED[family], rope_scaling=rope_scaling, source=source)
    require(
        config.num_attention_heads % config.num_key_value_heads == 0,
        f"{file}: {config.num_attention_heads} query heads do not divide into "
        f"{config.num_key_value_heads} key/value heads",
    )
    even = config.head_dim > 0 and config.head_dim % 2 == 0
    require(even, f"{file}: head_dim is {config.head_dim}, it should be even")
    return config


def read_source(file: Path) -> dict:
    """config.json as it stands, once its fields are checked and what is not implemented refused."""
    source = read_json(file)
    exists = bool(source) or is_file(file)
    require(exists, f"{file}: no such file; --model takes a Hugging Face directory")
    family = source.get("model_type")
    known = ", ".join(IMPLIED)
    require(
        family in list(IMPLIED), f"{file}: model_type {family!r} is not implemented; {known} are"
    )
    for name, accepted in ACCEPTED.items():
        value = source.get(name, accepted)
        text = f"{file}: {name} = {value!r} is not implemented; only {accepted!r} is"
        require(value == accepted, text)
    check_fields(source, FIELDS, file)
    for name in REQUIRED:
        require(source.get(name) is not None, f"{file}: {name} is 'missing'")
    kinds = source.get("layer_types") or []
    same = all(kind == kinds[0] for kind in kinds)
    require(same, f"{file}: layer_types that differ from layer to layer are not implemented")
    return source


def read_rope(source: dict, file: Path) -> tuple[float, dict | None]:
    """(rope_theta, rope_scaling).

    transformers 5 writes both into rope_parameters; older files have the fields rope_theta and
    rope_scaling.
    """
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    check_fields(rope, ROPE_FIELDS, f"{file}: rope_scaling (or rope_parameters)")
    theta = rope.get("rope_theta") or source.get("rope_theta") or 10000.0
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    require(
        kind == "llama3", f"{file}: rope type {kind!r} is not implemented; default and llama3 are"
    )
    for name in LLAMA3_ROPE:
        require(rope.get(name) is not None, f"{file}: {name} of the rope is 'missing'")
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    require(low < high, f"{file}: low_freq_factor {low} should be below high_freq_factor {high}")
    return theta, {name: value for name, value in rope.items() if name != "rope_theta"}


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

    rows: number of rows of a tensor -> the rows to read; the others stay on disk. None reads all.
    The result is a copy: a memory map would change with the file, or end the process with it.
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
                    stored = tensors.get_slice(name)
                    check_tensor(name, stored, expected, file)
                    if rows is None:
                        tensor = tensors.get_tensor(name)
                    else:
                        tensor = stored[rows(expected[name][0])]
                    found[name] = tensor.to(device=device, dtype=dtype, copy=True)
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


def check_tensor(name: str, stored: object, expected: dict[str, torch.Size], file: Path) -> None:
    """stored: a slice of safetensors, whose shape and type are known without reading it."""
    known = name in expected
    require(known, f"{file}: tensor {name} is not a parameter of the model in config.json")
    shape, right = list(stored.get_shape()), list(expected[name])
    require(shape == right, f"{file}: tensor {name} has shape {shape}, config.json says {right}")
    kind = stored.get_dtype()
    types = ", ".join(DTYPES)
    require(kind in DTYPES, f"{file}: tensor {name} has type {kind}, it should be of {types}")


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
    if not is_file(index):
        require(is_file(single), f"{path}: neither {single.name} nor {index.name} is there")
        return [single]
    weight_map = read_json(index, {"weight_map": (dict, None, None)}).get("weight_map") or {}
    require(bool(weight_map), f"{index}: no weight_map, which names the safetensors files")
    for name in weight_map.values():
        inside = isinstance(name, str) and name == Path(name).name and name not in ("", "..")
        require(inside, f"{index}: weight_map holds {name!r}, it should hold names of files here")
    files = [path / name for name in sorted(set(weight_map.values()))]
    for file in files:
        require(is_file(file), f"{file}: no such file, though {index.name} names it")
    return files


def stored_dtypes(path: str | Path) -> dict[str, torch.dtype]:
    """The type of every tensor on disk, by its name. config.json's own claim is not always true."""
    found = {}
    for file in weight_files(Path(path)):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                kind = tensors.get_slice(name).get_dtype()
                if kind in DTYPES:
                    found[name] = DTYPES[kind]
    return found


def load_with_marker(
    path: str | Path, tokenizer: Tokenizer, dtype: torch.dtype, device: str
) -> Transformer:
    """The model, with a row for the marker of `tokenizer` in embedding and head.

    One that was never trained starts as a copy of eos (paper, section 4).
    """
    model = load_model(path, dtype, device)
    if tokenizer.marker_is_new or tokenizer.marker_is_reserved:
        copy_token_rows(model, tokenizer.marker_id, tokenizer.eos_ids[0])
    return model


def copy_token_rows(model: Transformer, token: int, source: int) -> None:
    """Gives `token` the embedding and output row of `source`; the vocabulary grows if it must."""
    tied = model.config.tie_word_embeddings
    for table in [model.embed_tokens] if tied else [model.embed_tokens, model.lm_head]:
        rows = table.weight.detach()  # [V, H]
        missing = max(0, token + 1 - len(rows))
        grown = torch.cat([rows, rows[source].expand(missing, -1)])
        grown[token] = grown[source].clone()
        table.weight = nn.Parameter(grown)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    model.config.vocab_size = len(model.embed_tokens.weight)


# ---- writing
def save_model(
    model: Transformer,
    path: str | Path,
    dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    writes: bool = True,
) -> None:
    """Writes config.json and safetensors, several files and their index above `max_shard_bytes`.

    dtype: one for all, or by the tensors' names in the file; None keeps that of each parameter. A
    tied head is written once, as the embedding.
    whole: gathers a parameter that is split over ranks. Every rank must call then, with `writes`
    True on one of them. The tensors of one file at a time are whole in its memory.
    """
    path = Path(path)
    parameters = {file_name(name): p.detach() for name, p in model.named_parameters()}
    dtypes = {name: p.dtype for name, p in parameters.items()}
    if isinstance(dtype, dict):
        dtypes |= {name: kind for name, kind in dtype.items() if name in dtypes}
    elif dtype:
        dtypes = dict.fromkeys(parameters, dtype)
    sizes = {name: p.numel() * dtypes[name].itemsize for name, p in parameters.items()}
    shards = split_into_shards(sizes, max_shard_bytes)
    if writes:
        path.mkdir(parents=True, exist_ok=True)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            tensor = whole(parameters[name].to(dtypes[name]))  # cast first: less to gather
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
    first = next(iter(dtypes.values()))
    write_json(path / "config.json", config_json(model.config, first))
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
