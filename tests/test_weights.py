"""support/weights.py: Hugging Face directories are read, written, or refused by name."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import support.weights as weights_module
from model import Config, Transformer
from support.distributed import copy_token_rows
from support.errors import InputError
from support.weights import empty_model, load_model, read_config, read_tensors, save_model

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(folder.parent.name for folder in GOLDEN.glob("*/expected.safetensors"))
INDEX = "model.safetensors.index.json"

every_model = pytest.mark.parametrize("name", MODELS)


# ---- config.json
def config_of(tmp_path: Path, family: str, absent: tuple[str, ...] = (), **changes) -> Config:
    """The config of golden llama2 read as a `family`, without `absent` fields, with `changes`."""
    source = json.loads((GOLDEN / "llama2" / "config.json").read_text())
    source |= {"model_type": family, **changes}
    for name in absent:
        del source[name]
    (tmp_path / "config.json").write_text(json.dumps(source))
    return read_config(tmp_path)


# All fields but the required ones. llama2's config.json has no others.
OPTIONAL = ("num_key_value_heads", "rms_norm_eps", "rope_scaling", "tie_word_embeddings")
OPTIONAL += ("hidden_act",)


def test_fields_absent_from_a_llama_mean_what_they_mean_to_transformers(tmp_path):
    config = config_of(tmp_path, "llama", OPTIONAL)
    assert (config.num_key_value_heads, config.head_dim, config.sliding_window) == (4, 8, None)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    assert config.tie_word_embeddings is False
    assert config_of(tmp_path, "llama", num_key_value_heads=None).num_key_value_heads == 4


def test_fields_absent_from_a_mistral_mean_what_they_mean_to_transformers(tmp_path):
    config = config_of(tmp_path, "mistral", OPTIONAL, num_attention_heads=16)
    # Mistral 7B's own values.
    assert (config.num_key_value_heads, config.head_dim, config.sliding_window) == (8, 2, 4096)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    assert config.tie_word_embeddings is False


def test_fields_absent_from_a_qwen_mean_what_they_mean_to_transformers(tmp_path):
    config = config_of(tmp_path, "qwen2", OPTIONAL, num_attention_heads=32, hidden_size=64)
    assert (config.num_key_value_heads, config.head_dim) == (32, 2)
    assert (config.qkv_bias, config.qk_norm, config.sliding_window) == (True, False, None)
    config = config_of(tmp_path, "qwen3", OPTIONAL, num_attention_heads=32)
    assert (config.num_key_value_heads, config.head_dim) == (32, 128)
    assert (config.qkv_bias, config.qk_norm, config.sliding_window) == (False, True, None)


def test_null_is_not_absent(tmp_path):
    config = config_of(tmp_path, "mistral", sliding_window=None, num_key_value_heads=None)
    assert (config.sliding_window, config.num_key_value_heads) == (None, 4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_only_a_mistral_has_a_sliding_window(family, tmp_path):
    assert config_of(tmp_path, family, sliding_window=8).sliding_window is None


def test_rope_parameters_override_the_older_fields(tmp_path):
    config = config_of(
        tmp_path,
        "llama",
        rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
        rope_theta=7.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    )
    assert (config.rope_theta, config.rope_scaling) == (500.0, None)


@pytest.mark.parametrize(
    "old, new",
    [
        ("llama31_rope_scaling", "llama31_rope_parameters"),
        ("qwen25_tied", "qwen25_rope_parameters"),
        ("qwen3", "qwen3_rope_parameters"),
    ],
)
def test_both_generations_of_a_config_read_the_same(old, new):
    old = read_config(GOLDEN / old)
    new = read_config(GOLDEN / new)
    assert replace(new, source=old.source) == old


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


def read_json(file: Path) -> dict:
    return json.loads(file.read_text())


@every_model
@pytest.mark.parametrize("limit", [10**9, 20_000], ids=["one file", "shards"])
def test_a_saved_model_loads_bit_for_bit(name, limit, tmp_path):
    model = load_model(GOLDEN / name)
    save_model(model, tmp_path, max_shard_bytes=limit)
    assert_same_weights(load_model(tmp_path), model)
    assert asdict(read_config(tmp_path)) == asdict(model.config)
    assert read_json(tmp_path / "config.json") == read_json(GOLDEN / name / "config.json")
    originals = tensors_in(GOLDEN / name)
    written = tensors_in(tmp_path)
    assert written.keys() == originals.keys()
    assert all(torch.equal(written[tensor], originals[tensor]) for tensor in written)


@pytest.mark.parametrize("limit", [10**9, 20_000], ids=["one file", "shards"])
def test_other_readers_can_open_a_saved_model(limit, tmp_path):
    save_model(load_model(GOLDEN / "llama2"), tmp_path, max_shard_bytes=limit)
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1  # weights are as readable as config.json
    for file in tmp_path.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}  # transformers requires it


def test_shards_keep_to_their_size_and_the_index_names_every_tensor(tmp_path):
    model = load_model(GOLDEN / "llama31_rope_scaling")
    save_model(model, tmp_path, max_shard_bytes=20_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)
    ]
    weight_map = {}
    total = 0
    for file in files:
        tensors = load_file(file)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 20_000
        weight_map |= dict.fromkeys(tensors, file.name)
        total += size
    assert total == sum(parameter.nbytes for parameter in model.parameters())
    index = read_json(tmp_path / INDEX)
    assert index == {"metadata": {"total_size": total}, "weight_map": weight_map}


def test_a_tensor_larger_than_a_shard_has_its_own(tmp_path):
    model = load_model(GOLDEN / "llama2")
    save_model(model, tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(list(model.parameters()))
    assert_same_weights(load_model(tmp_path), model)


@pytest.mark.parametrize(
    "first_limit, second_limit",
    [(20_000, 10**9), (10**9, 20_000), (1, 20_000)],
    ids=["fewer files", "more files", "other shards"],
)
def test_a_directory_saved_to_twice_holds_the_second_model_alone(
    first_limit, second_limit, tmp_path
):
    first = tiny.model(1, torch.float32, hidden_size=64)
    second = tiny.model(2, torch.float32, hidden_size=64)
    save_model(first, tmp_path, max_shard_bytes=first_limit)
    save_model(second, tmp_path, max_shard_bytes=second_limit)
    assert_same_weights(load_model(tmp_path), second)
    assert (tmp_path / "model.safetensors").exists() != (tmp_path / INDEX).exists()
    assert len(tensors_in(tmp_path)) == len(list(second.parameters()))


@pytest.mark.parametrize("limit", [20_000, 10**9])
def test_a_model_can_be_saved_over_the_files_it_was_loaded_from(limit, tmp_path):
    shutil.copytree(GOLDEN / "llama2", tmp_path, dirs_exist_ok=True)
    model = load_model(tmp_path)  # its tensors are the file's memory map
    save_model(model, tmp_path, max_shard_bytes=limit)
    assert_same_weights(model, load_model(GOLDEN / "llama2"))
    assert_same_weights(load_model(tmp_path), model)


def test_a_tied_head_is_tied_after_loading_and_written_once(tmp_path):
    model = load_model(GOLDEN / "llama32")
    assert model.lm_head.weight is model.embed_tokens.weight
    save_model(model, tmp_path)
    written = tensors_in(tmp_path)
    assert "model.embed_tokens.weight" in written and "lm_head.weight" not in written
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight


def test_a_copy_of_a_tied_head_in_the_file_is_ignored(tmp_path):
    rewritten("llama32", tmp_path, **{"lm_head.weight": torch.zeros(96, 32)})
    assert_same_weights(load_model(tmp_path), load_model(GOLDEN / "llama32"))


def test_config_fields_without_a_use_here_survive(tmp_path):
    model = load_model(GOLDEN / "llama31_rope_parameters")
    model.config.source["some_field_of_the_future"] = {"kept": [1, None]}
    save_model(model, tmp_path)
    saved = read_json(tmp_path / "config.json")
    assert saved["some_field_of_the_future"] == {"kept": [1, None]}
    assert saved["pretraining_tp"] == 1


@pytest.mark.parametrize("name, key", [("llama2", "torch_dtype"), ("sharded", "dtype")])
def test_the_dtype_asked_for_is_written_and_named(name, key, tmp_path):
    model = load_model(GOLDEN / name)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert read_json(tmp_path / "config.json")[key] == "bfloat16"
    half = load_model(tmp_path, torch.bfloat16)
    for parameter_name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(half.get_parameter(parameter_name), parameter.bfloat16())
    assert all(parameter.dtype == torch.float32 for parameter in load_model(tmp_path).parameters())


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SCALED_LLAMA = {
    "rope_scaling": SCALING,
    "tie_word_embeddings": True,
    "rope_theta": 500.0,
    "eos_token_id": [1, 2],
}


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", SCALED_LLAMA),
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


# ---- a part of the rows
def part(rank: int, ranks: int, rows: int) -> slice:
    """The rows of one of `ranks`, which need not divide them."""
    return slice(rank * rows // ranks, (rank + 1) * rows // ranks)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["llama32", "sharded"])
def test_only_the_rows_asked_for_are_read(name, ranks, monkeypatch):
    class OnlySlices:
        """safe_open without get_tensor."""

        def __init__(self, file: Path, framework: str) -> None:
            self.file = safe_open(file, framework)

        def __enter__(self):
            tensors = self.file.__enter__()
            self.keys = tensors.keys
            self.get_slice = tensors.get_slice
            return self

        def __exit__(self, *failure) -> None:
            self.file.__exit__(*failure)

    expected = dict(load_model(GOLDEN / name).named_parameters())
    monkeypatch.setattr(weights_module, "safe_open", OnlySlices)
    model = empty_model(read_config(GOLDEN / name))
    parts = [
        read_tensors(
            GOLDEN / name,
            model,
            torch.float32,
            "cpu",
            rows=lambda rows, rank=rank: part(rank, ranks, rows),
        )
        for rank in range(ranks)
    ]
    for parameter, tensor in expected.items():
        pieces = [state[parameter] for state in parts]
        assert all(len(piece) < len(tensor) for piece in pieces)
        assert torch.equal(torch.cat(pieces), tensor)
    assert all(state.keys() == expected.keys() for state in parts)


def test_every_rank_gathers_every_tensor_and_one_writes(tmp_path):
    """Gathering a parameter of a split model needs a call of every rank, in the same order."""
    model = load_model(GOLDEN / "llama2")
    calls = {True: [], False: []}

    for writes in (True, False):

        def whole(tensor: Tensor, gathered: list = calls[writes]) -> Tensor:
            gathered.append(tensor)
            return 2 * tensor

        folder = tmp_path / str(writes)
        save_model(model, folder, torch.bfloat16, 20_000, whole=whole, writes=writes)
    parameters = list(model.parameters())
    for gathered in calls.values():
        assert len(gathered) == len(parameters)
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


def test_a_new_token_does_not_change_the_file_the_model_came_from(tmp_path):
    save_model(tiny.model(dtype=torch.float32), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    copy_token_rows(load_model(tmp_path), 7, source=2)
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---- refusals
def assert_refused(path: Path, *names: str) -> None:
    """load_model refuses with one line that contains every one of `names`."""
    with pytest.raises(InputError) as refusal:
        load_model(path)
    assert "\n" not in str(refusal.value)
    for name in names:
        assert name in str(refusal.value)


def rewritten(name: str, tmp_path: Path, drop: str = "", **tensors: Tensor) -> Path:
    """Copies a golden model, with `tensors` added or replaced -> its safetensors file."""
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    kept = load_file(file)
    kept.pop(drop, None)
    save_file({**kept, **tensors}, file)
    return file


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"model_type": "gpt2"}, ["model_type", "gpt2"]),
        ({"model_type": None}, ["model_type"]),
        ({"model_type": "qwen2_moe"}, ["model_type", "qwen2_moe", "qwen3 are"]),
        ({"model_type": "qwen2_5_vl"}, ["model_type", "qwen2_5_vl"]),
        ({"model_type": "qwen3_moe"}, ["model_type", "qwen3_moe"]),
        ({"model_type": "qwen3", "use_sliding_window": True}, ["use_sliding_window"]),
        ({"model_type": "qwen3", "attention_bias": True}, ["attention_bias"]),
        ({"attention_bias": True}, ["attention_bias"]),
        ({"mlp_bias": True}, ["mlp_bias"]),
        ({"hidden_act": "gelu"}, ["hidden_act", "gelu", "silu"]),
        ({"attention_dropout": 0.1}, ["attention_dropout"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["quantization_config", "gptq"]),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope type", "linear"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, ["rope type", "yarn"]),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4}},
            ["rope type", "dynamic"],
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor", "missing"]),
        ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window", "0"]),
        ({"model_type": "mistral", "sliding_window": "8"}, ["sliding_window", "8"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ({"num_key_value_heads": 3}, ["4", "3", "heads"]),
        ({"head_dim": 7}, ["head_dim", "7"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_is_not_implemented_is_refused_by_name(changes, names, tmp_path):
    shutil.copytree(GOLDEN / "llama2", tmp_path, dirs_exist_ok=True)
    source = read_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(source | changes))
    assert_refused(tmp_path, str(tmp_path / "config.json"), *names)


@pytest.mark.parametrize(
    "keep", [0, 7, 500, -1], ids=["empty", "in the length", "in the header", "in the last tensor"]
)
def test_a_truncated_file_is_refused_by_name(keep, tmp_path):
    file = rewritten("llama2", tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(tmp_path, str(file))
