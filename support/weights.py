"""Hugging Face model directories: config.json and safetensors, in and out.

    model = load_model(path, dtype, device)     build without storage, read, assign
    save_model(model, path)                     any Hugging Face reader opens the result

What is not implemented, missing or misshapen is refused in one line that names the file and the
field or tensor: a silent default would train a different model.

Nothing here knows of processes: a rank that holds some rows of every tensor passes `whole`, how to
gather a tensor that is written (support/distributed.py).
"""

import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from model import LLAMA3_ROPE, Config, Transformer
from support.errors import read_json, refusing, require, write_json
from support.tokenizer import Tokenizer

# Types of tensors that are read, as safetensors names them. No others: integers and booleans are no
# parameters, and 8-bit numbers need a scale that is stored elsewhere.
TYPES = ("F64", "F32", "BF16", "F16")

INDEX = "model.safetensors.index.json"  # names the files of a model in several
HEAD = "lm_head.weight"

# ---- config.json
# Fields that change the computation in ways that are not implemented: only this value is accepted.
ACCEPTED = {
    "hidden_act": "silu",
    "is_causal": True,
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,  # Qwen: some layers would have a window, others none
    "quantization_config": None,
    "transformers_weights": None,  # another file's name
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

# What RoPE is computed from. transformers 5 writes these fields into rope_parameters; older files
# have rope_theta beside rope_scaling.
ROPE = ("rope_theta", "rope_type", "partial_rotary_factor", *LLAMA3_ROPE)

# Fields of Config that config.json does not state: they follow from the model_type.
IMPLIED = {"llama": {}, "mistral": {}, "qwen2": {"qkv_bias": True}, "qwen3": {"qk_norm": True}}


def read_config(path: str | Path) -> Config:
    """Config from `path`/config.json; InputError if the model is not implemented."""
    file = Path(path) / "config.json"
    require(file.is_file(), f"{file}: no such file; --model takes a Hugging Face directory")
    source = read_json(file)
    family = source.get("model_type")
    text = f"{file}: model_type {family!r} is not implemented; {', '.join(IMPLIED)} are"
    require(family in list(IMPLIED), text)
    for name, accepted in ACCEPTED.items():
        value = source.get(name, accepted)
        text = f"{file}: {name} = {value!r} is not implemented; only {accepted!r} is"
        require(value == accepted, text)
    with refusing(file):
        kinds = set(source.get("layer_types") or [])
        full = family in ("llama", "mistral") or kinds <= {"full_attention"}
        require(full and len(kinds) <= 1, f"{file}: layer_types {kinds} are not implemented")
        stated = ABSENT[family] | source
        elsewhere = ("source", "rope_scaling", "qkv_bias", "qk_norm")
        names = [f.name for f in fields(Config) if f.name not in elsewhere]
        values = {name: stated[name] for name in names if stated.get(name) is not None}
        if family != "mistral":
            values.pop("sliding_window", None)  # transformers ignores it elsewhere
        values["rope_theta"], rope_scaling = read_rope(source, file)
        return Config(**values, **IMPLIED[family], rope_scaling=rope_scaling, source=source)


def read_rope(source: dict, file: Path) -> tuple[float, dict | None]:
    """(rope_theta, rope_scaling). InputError where two places state different values of a field."""
    stated = {}  # name: (value, place)
    for place in ("rope_scaling", "rope_parameters", "config.json"):
        rope = source if place == "config.json" else source.get(place) or {}
        if rope and rope is not source:
            rope = rope | {"rope_type": rope.get("rope_type") or rope.get("type") or "default"}
            nested = any(isinstance(value, dict) for value in rope.values())
            require(not nested, f"{file}: {place} by layer_types is not implemented")
        for name in ROPE:
            if rope.get(name) is not None:
                value, other = stated.setdefault(name, (rope[name], place))
                text = f"{file}: {name} is {value!r} in {other} and {rope[name]!r} in {place}"
                require(value == rope[name], text)
    rope = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1}
    rope |= {name: value for name, (value, _) in stated.items()}
    theta, kind, part = rope["rope_theta"], rope["rope_type"], rope["partial_rotary_factor"]
    text = f"{file}: rope type {kind!r} (partial_rotary_factor {part}) is not implemented"
    require(kind in ("default", "llama3") and part == 1, f"{text}; default and llama3 are")
    names = LLAMA3_ROPE if kind == "llama3" else ()
    return theta, {"rope_type": kind} | {name: rope[name] for name in names} if names else None


def config_json(config: Config, dtype: torch.dtype) -> dict:
    """config.json as it was read, vocab_size and dtype brought up to date; new if none was read."""
    source = config.source
    if not source:
        family = "llama" if config.sliding_window is None else "mistral"
        family = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else family
        source = {"architectures": [family.capitalize() + "ForCausalLM"], "model_type": family}
        source |= {"hidden_act": "silu"} | vars(config)
        for name in ("source", "qkv_bias", "qk_norm"):
            source.pop(name)
    dtype_key = "dtype" if "dtype" in source else "torch_dtype"
    changed = {"vocab_size": config.vocab_size, dtype_key: str(dtype).removeprefix("torch.")}
    if config.eos_token_id is not None:
        changed["eos_token_id"] = config.eos_token_id
    return source | changed


# ---- reading
def load_model(
    path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Transformer:
    """The model in the Hugging Face directory `path`.

    Its tensors are copies: a memory map would change with the file, or end the process with it.
    InputError names the tensor that is missing, misshapen or unknown, or the unreadable file.
    """
    model = empty_model(read_config(path))
    tied = model.config.tie_word_embeddings  # a file may hold the head all the same
    shapes = {file_name(name): list(t.shape) for name, t in model.state_dict().items()}
    found = {}
    for file in weight_files(Path(path)):
        with refusing(file), safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                if name.endswith("rotary_emb.inv_freq"):  # of old Llama exports
                    continue
                tensor = f"{file}: tensor {name}"
                known = name in shapes
                require(known, f"{tensor} is not a parameter of the model in config.json")
                require(name not in found, f"{tensor} is in another file, too")
                stored = tensors.get_slice(name)
                shape, kind = stored.get_shape(), stored.get_dtype()
                right = shapes[name]
                require(shape == right, f"{tensor} has shape {shape}, config.json says {right}")
                require(kind in TYPES, f"{tensor} is {kind}, it should be of {', '.join(TYPES)}")
                found[name] = tensors.get_tensor(name).to(device=device, dtype=dtype, copy=True)
    for name in shapes:
        require(name in found or (tied and name == HEAD), f"{path}: tensor {name} is missing")
    if tied and HEAD in found:
        same = torch.equal(found.pop(HEAD), found["model.embed_tokens.weight"])
        text = f"config.json says tie_word_embeddings, {HEAD} is not model.embed_tokens.weight"
        require(same, f"{path}: {text}")
    return assign(model, {name.removeprefix("model."): found[name] for name in found})


def empty_model(config: Config) -> Transformer:
    """A model without storage (meta device): shapes alone, until `assign` gives it tensors."""
    with refusing("config.json"), torch.device("meta"):
        return Transformer(config)


def assign(model: Transformer, state: dict[str, Tensor]) -> Transformer:
    """Replaces the model's parameters by the tensors of `state`, without a copy."""
    model.load_state_dict(state, strict=False, assign=True)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # assigning tensors has untied them
    return model


def file_name(name: str) -> str:
    """Parameter name -> the tensor's name in a Hugging Face file."""
    return name if name == HEAD else "model." + name


def weight_files(path: Path) -> list[Path]:
    """The directory's safetensors files: those its index names, or the only one."""
    whole, index = path / "model.safetensors", path / INDEX
    if not index.is_file():
        return [whole]
    with refusing(index):
        files = [path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    one = files == [whole] or not whole.exists()
    require(one, f"{index} names other files than {whole}: which one is the model? Remove one")
    return files


def load_with_marker(
    path: str | Path, tokenizer: Tokenizer, dtype: torch.dtype, device: str
) -> Transformer:
    """The model, with a row for the marker of `tokenizer` in embedding and head.

    One that was never trained starts as a copy of eos (paper, section 4).
    """
    model = load_model(path, dtype, device)
    model.config.eos_token_id = tokenizer.eos_ids  # every reader should stop where we do
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
def tensors_of(model: Transformer) -> dict[str, Tensor]:
    """By parameter name: what is saved, and what the gathered view samples with."""
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def save_model(
    model: Transformer,
    path: str | Path,
    dtype: torch.dtype | None = None,
    whole: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    writes: bool = True,
) -> None:
    """Writes config.json and model.safetensors.

    dtype: of all tensors; without it, that of the parameters. A tied head is written once, as the
    embedding.
    whole: gathers a parameter that is split over ranks. Every rank must call then, with `writes`
    True on one of them, whose memory holds the model.
    """
    path, tensors = Path(path), {}
    for name, tensor in tensors_of(model).items():
        name = file_name(name)
        tensor = whole(tensor.to(dtype or tensor.dtype))  # cast first: less to gather
        if writes:
            tensors[name] = tensor.cpu().contiguous()
    if not writes:
        return
    path.mkdir(parents=True, exist_ok=True)
    (path / INDEX).unlink(missing_ok=True)  # of another model: it would be read in place of ours
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    write_json(path / "config.json", config_json(model.config, next(iter(tensors.values())).dtype))
    # safetensors makes files that only their owner may read
    shutil.copymode(path / "config.json", path / "model.safetensors")
