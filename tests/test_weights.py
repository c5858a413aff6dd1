"""support/weights.py: Hugging Face directories are read, written, or refused by name."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import Config, Transformer
from support.errors import InputError, read_json
from support.weights import copy_token_rows, load_model, read_config, save_model

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(folder.parent.name for folder in GOLDEN.glob("*/expected.safetensors"))
INDEX = "model.safetensors.index.json"


# ---- config.json
def config_of(tmp_path: Path, family: str, absent: tuple[str, ...] = (), **changes) -> Config:
    """The config of golden llama2 read as a `family`, without `absent` fields, with `changes`."""
    source = read_json(GOLDEN / "llama2/config.json")
    source |= {"model_type": family, **changes}
    for name in absent:
        del source[name]
    (tmp_path / "config.json").write_text(json.dumps(source))
    return read_config(tmp_path)


# All fields but the required ones. llama2's config.json has no others.
OPTIONAL = ("num_key_value_heads", "rms_norm_eps", "rope_scaling", "tie_word_embeddings")
OPTIONAL += ("hidden_act",)
WIDE = {"num_attention_heads": 32, "hidden_size": 64}


@pytest.mark.parametrize(
    "family, changes, expected",  # the last: key/value heads, head_dim, window, qkv_bias, qk_norm
    [
        ("llama", {}, (4, 8, None, False, False)),
        ("mistral", {"num_attention_heads": 16}, (8, 2, 4096, False, False)),  # Mistral 7B's own
        ("qwen2", WIDE, (32, 2, None, True, False)),
        ("qwen3", WIDE, (32, 128, None, False, True)),
    ],
)
def test_absent_fields_mean_what_they_mean_to_transformers(family, changes, expected, tmp_path):
    config = config_of(tmp_path, family, OPTIONAL, **changes)
    names = ("num_key_value_heads", "head_dim", "sliding_window", "qkv_bias", "qk_norm")
    assert tuple(getattr(config, name) for name in names) == expected
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    assert config.tie_word_embeddings is False


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_null_is_not_absent_and_only_a_mistral_has_a_sliding_window(family, tmp_path):
    config = config_of(tmp_path, family, sliding_window=None, num_key_value_heads=None)
    assert (config.sliding_window, config.num_key_value_heads) == (None, 4)
    window = config_of(tmp_path, family, sliding_window=8).sliding_window
    assert window == (8 if family == "mistral" else None)


DEFAULT = {"rope_theta": 500.0, "rope_type": "default"}


def test_rope_may_be_stated_twice_the_same(tmp_path):
    twice = {"rope_theta": 500.0, "rope_scaling": {"type": "default"}}
    config = config_of(tmp_path, "llama", rope_parameters=DEFAULT, **twice)
    assert (config.rope_theta, config.rope_scaling) == (500.0, None)


# ---- reading and writing
def assert_same_weights(a: Transformer, b: Transformer) -> None:
    a = dict(a.named_parameters())
    b = dict(b.named_parameters())
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """The tensors of all files, each once, RoPE frequencies left out."""
    found = {}
    for file in sorted(folder.glob("model*.safetensors")):
        for name, tensor in load_file(file).items():
            assert name not in found
            if not name.endswith("inv_freq"):
                found[name] = tensor
    return found


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_model_loads_bit_for_bit(name, tmp_path):
    model = load_model(GOLDEN / name)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert_same_weights(loaded, model)
    tied = loaded.lm_head.weight is loaded.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
    assert asdict(read_config(tmp_path)) == asdict(model.config)
    # Fields without a use here survive.
    assert read_json(tmp_path / "config.json") == read_json(GOLDEN / name / "config.json")
    originals = tensors_in(GOLDEN / name)
    written = tensors_in(tmp_path)
    assert written.keys() == originals.keys()  # a tied head once, as the embedding
    assert all(torch.equal(written[tensor], originals[tensor]) for tensor in written)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers requires it
    assert len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1  # that of config.json


@pytest.mark.parametrize("name", ["llama2", "sharded"])
def test_a_model_can_be_saved_over_the_files_it_was_loaded_from(name, tmp_path):
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    model = load_model(tmp_path)
    with torch.no_grad():
        model.norm.weight += 1
    save_model(model, tmp_path)
    assert_same_weights(load_model(tmp_path), model)


def test_a_model_in_memory_does_not_change_with_its_file(tmp_path):
    """Nor does the process end when the file is cut, as with a memory map."""
    shutil.copytree(GOLDEN / "llama2", tmp_path, dirs_exist_ok=True)
    model = load_model(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(8)
    assert_same_weights(model, load_model(GOLDEN / "llama2"))


def test_a_copy_of_a_tied_head_in_the_file_is_ignored(tmp_path):
    head = load_model(GOLDEN / "llama32").lm_head.weight.detach().clone()
    rewritten("llama32", tmp_path, **{"lm_head.weight": head})
    assert_same_weights(load_model(tmp_path), load_model(GOLDEN / "llama32"))
    head[-1, -1] += 1e-3
    rewritten("llama32", tmp_path, **{"lm_head.weight": head})
    assert_refused(tmp_path, "tie_word_embeddings", "lm_head.weight")


@pytest.mark.parametrize("name, key", [("llama2", "torch_dtype"), ("sharded", "dtype")])
def test_the_dtype_asked_for_is_written_and_named(name, key, tmp_path):
    model = load_model(GOLDEN / name)
    save_model(model, tmp_path, torch.bfloat16)
    assert read_json(tmp_path / "config.json")[key] == "bfloat16"
    assert {stored.dtype for stored in tensors_in(tmp_path).values()} == {torch.bfloat16}
    half = load_model(tmp_path, torch.bfloat16)
    for parameter_name, parameter in model.named_parameters():
        assert torch.equal(half.get_parameter(parameter_name), parameter.bfloat16())
    assert all(parameter.dtype == torch.float32 for parameter in load_model(tmp_path).parameters())


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALED_LLAMA = {"rope_scaling": SCALING, "tie_word_embeddings": True, "eos_token_id": [1, 2]}


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", SCALED_LLAMA | {"rope_theta": 500.0}),
        ("mistral", {"sliding_window": 5, "head_dim": 6}),
        ("qwen2", {"qkv_bias": True, "tie_word_embeddings": True}),
        ("qwen3", {"qk_norm": True, "head_dim": 6}),
    ],
)
def test_a_model_made_here_gets_a_config_that_reads_back_as_it_was(family, changes, tmp_path):
    model = tiny.model(**changes)
    save_model(model, tmp_path)
    source = read_json(tmp_path / "config.json")
    assert source["model_type"] == family
    assert source["architectures"] == [family.capitalize() + "ForCausalLM"]
    assert asdict(read_config(tmp_path)) | {"source": {}} == asdict(model.config)
    assert_same_weights(load_model(tmp_path, torch.float64), model)


# ---- a model in parts
def test_every_rank_gathers_every_tensor_and_one_writes(tmp_path):
    """Gathering a parameter of a split model needs a call of every rank, in the same order."""
    model = load_model(GOLDEN / "llama2")
    parameters = list(model.parameters())
    for writes in (True, False):
        gathered = []

        def whole(tensor: Tensor, gathered: list = gathered) -> Tensor:
            gathered.append(tensor)
            return 2 * tensor

        save_model(model, tmp_path / str(writes), torch.bfloat16, whole, writes)
        for tensor, parameter in zip(gathered, parameters, strict=True):
            assert torch.equal(tensor, parameter.bfloat16())  # cast before it is sent
    assert not (tmp_path / "False").exists()
    saved = load_model(tmp_path / "True", torch.bfloat16)
    for tensor, parameter in zip(saved.parameters(), parameters, strict=True):
        assert torch.equal(tensor, 2 * parameter.bfloat16())


# ---- a new token
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("token", [7, 11, 14], ids=["unused row", "next row", "beyond the table"])
@torch.no_grad()
def test_a_new_token_starts_as_a_copy_of_another(tied, token, tmp_path):
    model = tiny.model(tie_word_embeddings=tied)
    before = {name: getattr(model, name).weight.clone() for name in ("embed_tokens", "lm_head")}
    copy_token_rows(model, token, source=2)
    vocab = max(11, token + 1)
    assert model.config.vocab_size == vocab
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    for name, old in before.items():
        table = getattr(model, name).weight
        assert table.shape == (vocab, 16) and table.requires_grad
        assert torch.equal(table[token], old[2])
        kept = [row for row in range(11) if row != token]
        assert torch.equal(table[kept], old[kept])
    hidden = model(torch.tensor([[1, 2], [1, token]]))  # [2, 2, H]
    assert (hidden[1] - hidden[0]).abs().max() <= 1e-13 * hidden.abs().max()
    save_model(model, tmp_path)
    assert read_json(tmp_path / "config.json")["vocab_size"] == vocab
    assert_same_weights(load_model(tmp_path, torch.float64), model)


# ---- refusals
def assert_refused(path: Path, *names: object) -> None:
    """load_model refuses, naming every one of `names`."""
    with pytest.raises(InputError) as refusal:
        load_model(path)
    for name in names:
        assert str(name) in str(refusal.value)


def rewritten(name: str, tmp_path: Path, drop: str = "", **tensors: Tensor) -> Path:
    """Copies a golden model, with `tensors` added or replaced -> its safetensors file."""
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    kept = load_file(file)
    kept.pop(drop, None)
    save_file({**kept, **tensors}, file)
    return file


LLAMA3 = {"rope_type": "llama3", "factor": 8.0}
YARN = {"type": "yarn", "factor": 2.0}


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"model_type": None}, ["model_type"]),
        ({"model_type": "qwen2_moe"}, ["model_type", "qwen2_moe", "qwen3 are"]),
        ({"model_type": "qwen3", "use_sliding_window": True}, ["use_sliding_window"]),
        ({"model_type": "qwen3", "attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"attention_dropout": 0.1}, ["attention_dropout"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope type", "linear"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["rope type", "yarn"]),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ["rope type", "dynamic"]),
        ({"rope_scaling": LLAMA3}, ["lacks", "low_freq_factor"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"]}, ["layer_types"]),
        ({"is_causal": False}, ["is_causal"]),
        ({"transformers_weights": "other.safetensors"}, ["transformers_weights"]),
        # Two places that say different things: both are named.
        (
            {"rope_parameters": DEFAULT, "rope_scaling": YARN},
            ["'yarn' in rope_scaling", "'default'"],
        ),
        ({"rope_parameters": YARN, "rope_scaling": DEFAULT}, ["'yarn' in rope_parameters"]),
        ({"rope_parameters": DEFAULT, "rope_theta": 7.0}, ["500.0 in rope_parameters", "7.0 in"]),
        ({"rope_parameters": {"full_attention": DEFAULT}}, ["rope_parameters", "layer_types"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        (
            {"rope_scaling": SCALING, "original_max_position_embeddings": 64},
            ["original_max_position_embeddings", "32 in rope_scaling", "64 in"],
        ),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"vocab_size": "96"}, []),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_is_not_implemented_is_refused_by_name(changes, names, tmp_path):
    shutil.copytree(GOLDEN / "llama2", tmp_path, dirs_exist_ok=True)
    source = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(source | changes))
    assert_refused(tmp_path, "config.json", *names)


NORM = "model.norm.weight"


@pytest.mark.parametrize(
    "name, tensor, says",
    [
        (NORM, None, "is missing"),
        ("lm_head.weight", None, "is missing"),  # this model's head is not tied
        (NORM, torch.ones(33), "has shape [33], config.json says [32]"),
        (NORM, torch.ones(32).to(torch.float8_e4m3fn), "is F8_E4M3"),
        (NORM, torch.ones(32, dtype=torch.int64), "is I64"),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(32), "is not a parameter"),
    ],
)
def test_a_tensor_that_is_not_the_models_is_refused_by_name(name, tensor, says, tmp_path):
    changed = {} if tensor is None else {name: tensor}
    rewritten("llama2", tmp_path, drop=name, **changed)
    assert_refused(tmp_path, f"tensor {name} {says}")


def test_two_models_in_one_directory_are_refused_by_both_names(tmp_path):
    shutil.copytree(GOLDEN / "sharded", tmp_path, dirs_exist_ok=True)
    shutil.copy(GOLDEN / "mistral_v03/model.safetensors", tmp_path)
    assert_refused(tmp_path, tmp_path / INDEX, tmp_path / "model.safetensors")
    index = {"weight_map": {NORM: "model.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    load_model(tmp_path)  # an index of this file
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors").rename(tmp_path / "b.safetensors")
    index = {"weight_map": {NORM: "a.safetensors", "lm_head.weight": "b.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert_refused(tmp_path, tmp_path / "b.safetensors", "in another file, too")
