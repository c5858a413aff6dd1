"""Hugging Face model directories in and out: config.json and safetensors."""

import json
import shutil
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from model import LLAMA3_ROPE, Config, Transformer
from support.errors import InputError

MAX_SHARD_BYTES = (
    5 * 10**9
)  # transformers' own limit per file, so that our directories look like everybody's

# Settings that change the computation and that this file does not implement: their absence, or this value, is all we accept.
REQUIRED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "quantization_config": None,
}

# What a key that config.json leaves out means to transformers, where it is not Config's default. A null stands for itself.
ABSENT = {
    "llama": {},
    "mistral": {
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
}


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
            raise InputError(
                f"{file}: {name} = {source[name]!r} is not implemented; only {accepted!r} is"
            )
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
            raise InputError(
                f"{file}: {name} is {source.get(name, 'missing')!r}, it should be a positive integer"
            )
    rope = source.get("rope_parameters") or source.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(
            f"{file}: rope_scaling (or rope_parameters) is {rope!r}, it should be an object"
        )
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


def load_model(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    mesh: DeviceMesh | None = None,
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
                    if name.endswith("rotary_emb.inv_freq") or (
                        name == "lm_head.weight" and config.tie_word_embeddings
                    ):
                        continue  # old Llama exports carry both; neither holds anything of its own
                    if name not in expected:
                        raise InputError(
                            f"{file}: tensor {name} has no place in a {config.source['model_type']} model"
                        )
                    shape, wanted = (
                        tuple(tensors.get_slice(name).get_shape()),
                        tuple(expected[name].shape),
                    )
                    if shape != wanted:
                        raise InputError(
                            f"{file}: tensor {name} has shape {list(shape)}, config.json says {list(wanted)}"
                        )
                    own = (
                        tensors.get_tensor(name)
                        if mesh is None
                        else tensors.get_slice(name)[own_rows(shape[0], mesh)]
                    )
                    state[name] = as_rows(own.to(device=device, dtype=dtype), expected[name], mesh)
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{file}: not a readable safetensors file (truncated download?): {error}"
            ) from None
    missing = [name for name in expected if name not in state]
    if missing:
        raise InputError(
            f"{path}: tensor {missing[0]} is missing"
            + f" (and {len(missing) - 1} more)" * (len(missing) > 1)
        )
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
    return DTensor.from_local(
        own, mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """The tensor, gathered from all ranks if it is split over them (then every rank must call)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def empty_model(config):
    with torch.device("meta"):
        return Transformer(config)


def read_tensors(path, model, dtype, device, rows=None):
    state = dict(load_model(path, dtype, device).named_parameters())
    return {
        n: (p.detach()[rows(p.shape[0])].clone() if rows else p.detach()) for n, p in state.items()
    }


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
            raise InputError(
                f"{path}: neither model.safetensors nor model.safetensors.index.json is there"
            )
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


def save_model(
    model: Transformer,
    path: str | Path,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    whole=lambda t: t,
    writes=True,
) -> None:
    """Writes config.json and safetensors (sharded with an index above `max_shard_bytes`) that any Hugging Face reader opens as they are.

    dtype: None keeps each tensor's own. A tied head is not written twice. Of a model that is split over ranks, every rank must call and
    the first one writes, a file at a time: no more than one file's tensors are whole in its memory.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    parameters = {
        file_name(name): parameter.detach() for name, parameter in model.named_parameters()
    }
    sizes = {
        name: p.numel() * (dtype or p.dtype).itemsize for name, p in parameters.items()
    }  # bytes
    shards: list[list[str]] = [[]]
    for name, size in sizes.items():
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > max_shard_bytes:
            shards.append([])
        shards[-1].append(name)
    files = (
        [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
        if len(shards) > 1
        else ["model.safetensors"]
    )
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
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        write_json(
            path / "model.safetensors.index.json",
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map},
        )
    write_json(
        path / "config.json",
        config_json(model.config, dtype or next(iter(parameters.values())).dtype),
    )
    for file in files:
        shutil.copymode(
            path / "config.json", path / file
        )  # safetensors writes what only its owner may read


def config_json(config: Config, dtype: torch.dtype) -> dict:
    """config.json as it was read, with what training can change brought up to date; written anew for a model made here."""
    source = dict(config.source)
    if not source:
        kind = "llama" if config.sliding_window is None else "mistral"
        source = {
            "architectures": [kind.capitalize() + "ForCausalLM"],
            "model_type": kind,
            "hidden_act": "silu",
        }
        source |= {f.name: getattr(config, f.name) for f in fields(Config) if f.name != "source"}
    dtype_key = "dtype" if "dtype" in source else "torch_dtype"
    return source | {"vocab_size": config.vocab_size, dtype_key: str(dtype).removeprefix("torch.")}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def copy_token_rows(model: Transformer, token: int, source: int) -> None:
    """Gives `token` the embedding and output row of `source`, growing the vocabulary if `token` lies beyond it.

    How a new marker token starts (paper, section 4: as a copy of eos). Works on tied and untied heads, whole or split over ranks.
    """
    tables = (
        [model.embed_tokens]
        if model.config.tie_word_embeddings
        else [model.embed_tokens, model.lm_head]
    )
    for table in tables:
        rows = whole(table.weight.detach())
        grown = torch.cat([rows, rows[source].expand(max(0, token + 1 - len(rows)), -1)])
        grown[token] = grown[source].clone()
        if isinstance(table.weight, DTensor):
            grown = distribute_tensor(
                grown, table.weight.device_mesh, [Shard(0)], src_data_rank=None
            )  # None: nothing to send, all have it
        table.weight = nn.Parameter(grown)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    model.config.vocab_size = len(model.embed_tokens.weight)
