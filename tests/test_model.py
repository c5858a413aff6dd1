"""model.py: equal to transformers on the golden models, however a text is cut up; directories read, written and refused."""

import json
import shutil
from dataclasses import fields
from pathlib import Path

import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from model import Config, Prefix, Transformer, rope_table
from sample import DecodeBatch, trace_starts
from support.errors import InputError
from support.weights import copy_token_rows, load_model, read_config, save_model

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(folder.parent.name for folder in GOLDEN.glob("*/expected.safetensors"))

every_model = pytest.mark.parametrize("name", MODELS)
both_dtypes = pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)


def golden_tokens(name: str) -> Tensor:
    return load_file(GOLDEN / name / "expected.safetensors")["tokens"]  # [2, 24]


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Relative to the largest element, so that elements near zero are not held to more digits than the sums they come from."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tolerance * b.abs().max()


# ---------------------------------------------------------------------------------------------------------------- the computation
def test_there_is_a_golden_model_of_every_kind():
    assert len(MODELS) == 8


@every_model
@torch.no_grad()
def test_logits_equal_those_of_transformers(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    model = load_model(GOLDEN / name)
    assert_close(model(expected["tokens"]) @ model.lm_head.weight.T, expected["logits"], 1e-4)


class BarePast:
    """The least a past can be: one method."""

    def __init__(self) -> None:
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.kv:
            k, v = (
                torch.cat([old, new], dim=2)
                for old, new in zip(self.kv[layer], (k, v), strict=True)
            )
        self.kv[layer] = (k, v)
        return k, v


@every_model
@both_dtypes
@pytest.mark.parametrize(
    "sizes", [[1] * 24, [5, 1, 10, 8]], ids=["token by token", "piece by piece"]
)
@torch.no_grad()
def test_a_text_read_in_pieces_equals_the_text_read_at_once(name, dtype, tolerance, sizes):
    model, tokens, past = load_model(GOLDEN / name, dtype), golden_tokens(name), BarePast()
    pieces = [model(piece, past) for piece in tokens.split(sizes, dim=1)]
    assert_close(torch.cat(pieces, dim=1), model(tokens), tolerance)


@every_model
@both_dtypes
@torch.no_grad()
def test_the_decoding_batch_token_by_token_equals_the_text_read_at_once(name, dtype, tolerance):
    model, tokens = load_model(GOLDEN / name, dtype), golden_tokens(name)
    whole = model(tokens)
    batch = DecodeBatch(model.config, 2, capacity=30, max_new=24, like=whole)
    batch.live.fill_(True)
    batch.kv.fill_(float("nan"))  # where no token has been written, nothing must be read
    steps = []
    for t in range(24):
        batch.feed(model, tokens[:, t])
        steps.append(batch.hidden)
    assert_close(torch.stack(steps, dim=1), whole, tolerance)


@every_model
@both_dtypes
@torch.no_grad()
def test_rows_of_different_length_decode_as_if_each_were_alone(name, dtype, tolerance):
    model, tokens = load_model(GOLDEN / name, dtype), golden_tokens(name)
    whole = model(tokens)  # [2, 24, H]
    prompts = [tokens[0, :3].tolist(), tokens[1, :14].tolist()]
    batch = DecodeBatch(model.config, 4, capacity=24, max_new=10, like=whole)
    batch.kv.fill_(7.0)  # left over from earlier traces
    batch.admit(trace_starts(model, prompts, 2, seeds=[0, 0], max_new_tokens=10))
    steps = [batch.hidden]
    for t in range(10):
        batch.feed(model, torch.stack([tokens[0, 3 + t], tokens[1, 14 + t]]).repeat_interleave(2))
        steps.append(batch.hidden)
    expected = torch.stack([whole[0, 2:13], whole[1, 13:]])  # [2, 11, H]
    assert_close(torch.stack(steps, dim=1), expected.repeat_interleave(2, dim=0), tolerance)


@every_model
@both_dtypes
@torch.no_grad()
def test_a_prompt_read_once_then_branches_equals_whole_rows(name, dtype, tolerance):
    model, tokens = load_model(GOLDEN / name, dtype), golden_tokens(name)
    prompt = tokens[:1, :11]
    branches = torch.stack([tokens[0, 11:], tokens[1, 11:], tokens[1, :13]])  # [3, 13]
    prefix = Prefix()
    assert_close(model(prompt, prefix), model(tokens[:1])[:, :11], tolerance)
    whole = model(torch.cat([prompt.expand(3, -1), branches], dim=1))[:, 11:]
    assert_close(model(branches, prefix), whole, tolerance)
    assert_close(
        model(branches[2:, :4], prefix), whole[2:, :4], tolerance
    )  # the branches before have left the prefix as it was
    assert prefix.length == 11


def test_gradients_through_a_prefix_equal_those_of_whole_rows():
    model = tiny.model(sliding_window=6)
    tokens = torch.randint(11, (3, 12), generator=torch.Generator().manual_seed(1))
    tokens[:, :5] = tokens[0, :5]
    goal = torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    (model(tokens)[:, 5:] * goal).sum().backward()
    whole = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad()
    prefix = Prefix()
    model(tokens[:1, :5], prefix)
    kept = [tensor for kv in prefix.kv for tensor in kv]
    for tensor in kept:
        tensor.retain_grad()
    (model(tokens[:, 5:], prefix) * goal).sum().backward()

    assert all(tensor.grad.abs().max() > 0 for tensor in kept)
    assert whole.keys() == {
        name for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    for name, grad in whole.items():
        assert_close(model.get_parameter(name).grad, grad, 1e-12)


@pytest.mark.parametrize("window", [None, 4])
@torch.no_grad()
def test_right_padding_never_changes_real_rows(window):
    model = tiny.model(sliding_window=window)
    tokens = torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(3))
    padded = [torch.cat([tokens, torch.full((2, 5), pad)], dim=1) for pad in (0, 7)]
    for past in (lambda: None, BarePast):
        alone = model(tokens, past())
        for rows in padded:
            assert_close(model(rows, past())[:, :9], alone, 1e-13)
    prefix = Prefix()
    model(tokens[:1], prefix)
    alone = model(tokens, prefix)
    for rows in padded:
        assert_close(model(rows, prefix)[:, :9], alone, 1e-13)


@torch.no_grad()
def test_no_token_sees_a_later_one_or_one_beyond_its_window():
    model = tiny.model(num_hidden_layers=1, sliding_window=4)
    tokens = torch.randint(11, (1, 10), generator=torch.Generator().manual_seed(4))
    other = tokens.clone()
    other[0, 3] = (tokens[0, 3] + 1) % 11
    changed = (model(tokens) != model(other)).any(dim=-1)[0]
    assert changed.nonzero()[:, 0].tolist() == [
        3,
        4,
        5,
        6,
    ]  # itself and the next three: a window of 4 includes the token itself


def test_positions_are_not_rounded_in_a_bf16_model():
    config = Config(**tiny.SIZES, head_dim=8)
    positions = torch.tensor([0, 255, 257, 1001, 4095])
    cos, sin = rope_table(positions, config, torch.bfloat16)
    angle = positions.double()[:, None] * 10000.0 ** -(torch.arange(0, 8, 2).double() / 8)
    for got, exact in ((cos, angle.cos()), (sin, angle.sin())):
        assert got.dtype == torch.bfloat16 and got.shape == (1, 1, 5, 4)
        assert (
            got[0, 0].double() - exact
        ).abs().max() < 2**-8  # the rounding of the result, not of the angle


# ---------------------------------------------------------------------------------------------------------------- config.json
def config_of(tmp_path: Path, kind: str, drop: tuple = (), **changes) -> Config:
    """What is read from the golden llama2's config.json as a `kind`, without the keys `drop` and with `changes`."""
    source = (
        json.loads((GOLDEN / "llama2" / "config.json").read_text()) | {"model_type": kind} | changes
    )
    (tmp_path / "config.json").write_text(
        json.dumps({key: value for key, value in source.items() if key not in drop})
    )
    return read_config(tmp_path)


def test_keys_that_llama_leaves_out_mean_what_they_mean_to_transformers(tmp_path):
    absent = (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
        "hidden_act",
    )
    config = config_of(tmp_path, "llama", absent)
    assert (config.num_key_value_heads, config.head_dim, config.sliding_window) == (4, 8, None)
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    assert config.tie_word_embeddings is False
    assert config_of(tmp_path, "llama", num_key_value_heads=None).num_key_value_heads == 4


def test_keys_that_mistral_leaves_out_mean_what_they_mean_to_transformers(tmp_path):
    absent = (
        "num_key_value_heads",
        "head_dim",
        "rms_norm_eps",
        "rope_theta",
        "rope_scaling",
        "tie_word_embeddings",
        "hidden_act",
    )
    config = config_of(tmp_path, "mistral", absent, num_attention_heads=16)
    assert (config.num_key_value_heads, config.head_dim, config.sliding_window) == (
        8,
        2,
        4096,
    )  # Mistral 7B's own
    assert (config.rms_norm_eps, config.rope_theta, config.rope_scaling) == (1e-6, 10000.0, None)
    assert config.tie_word_embeddings is False


def test_null_is_not_absent(tmp_path):
    config = config_of(tmp_path, "mistral", sliding_window=None, num_key_value_heads=None)
    assert (config.sliding_window, config.num_key_value_heads) == (None, 4)


def test_llama_has_no_sliding_window(tmp_path):
    assert config_of(tmp_path, "llama", sliding_window=8).sliding_window is None


def test_rope_parameters_go_before_the_older_keys(tmp_path):
    new = {"rope_theta": 500.0, "rope_type": "default"}
    config = config_of(
        tmp_path,
        "llama",
        rope_parameters=new,
        rope_theta=7.0,
        rope_scaling={"rope_type": "linear", "factor": 2.0},
    )
    assert (config.rope_theta, config.rope_scaling) == (500.0, None)


# ---------------------------------------------------------------------------------------------------------------- directories
def assert_same_weights(a: Transformer, b: Transformer) -> None:
    a, b = dict(a.named_parameters()), dict(b.named_parameters())
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]), name


def tensors_in(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}  # transformers insists
            for name in tensors.keys():
                assert name not in found
                found[name] = tensors.get_tensor(name)
    return found


@every_model
@pytest.mark.parametrize("limit", [None, 20_000], ids=["one file", "shards"])
def test_a_saved_model_loads_bit_for_bit(name, limit, tmp_path):
    model = load_model(GOLDEN / name)
    save_model(model, tmp_path, **({} if limit is None else {"max_shard_bytes": limit}))
    assert_same_weights(load_model(tmp_path), model)
    assert (
        len({file.stat().st_mode for file in tmp_path.iterdir()}) == 1
    )  # weights are as readable as config.json
    config, back = model.config, read_config(tmp_path)
    assert {f.name: getattr(back, f.name) for f in fields(Config) if f.name != "source"} == {
        f.name: getattr(config, f.name) for f in fields(Config) if f.name != "source"
    }
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(
        (GOLDEN / name / "config.json").read_text()
    )
    originals = {
        tensor: value
        for file in GOLDEN.joinpath(name).glob("model*.safetensors")
        for tensor, value in load_file(file).items()
        if not tensor.endswith("inv_freq")
    }
    written = tensors_in(tmp_path)
    assert written.keys() == originals.keys() and all(
        torch.equal(written[tensor], originals[tensor]) for tensor in written
    )


def test_shards_keep_to_their_size_and_the_index_tells_all(tmp_path):
    model = load_model(GOLDEN / "llama31_rope_scaling")
    save_model(model, tmp_path, max_shard_bytes=20_000)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) == 5 and files == [f"model-{i + 1:05}-of-00005.safetensors" for i in range(5)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = {
        file: {name: tensor.nbytes for name, tensor in load_file(tmp_path / file).items()}
        for file in files
    }
    assert all(sum(shard.values()) <= 20_000 for shard in sizes.values())
    assert index["weight_map"] == {name: file for file in files for name in sizes[file]}
    assert index["metadata"]["total_size"] == sum(sum(shard.values()) for shard in sizes.values())
    assert index["metadata"]["total_size"] == sum(
        parameter.nbytes for parameter in model.parameters()
    )


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(tmp_path):
    model = load_model(GOLDEN / "llama2")
    save_model(model, tmp_path, max_shard_bytes=1)
    assert len(list(tmp_path.glob("*.safetensors"))) == len(list(model.parameters()))
    assert_same_weights(load_model(tmp_path), model)


@pytest.mark.parametrize(
    "limits",
    [(20_000, 10**9), (10**9, 20_000), (1, 20_000)],
    ids=["fewer files", "more files", "other shards"],
)
def test_a_directory_saved_to_twice_holds_the_second_model_alone(limits, tmp_path):
    first, second = (
        tiny.model(1, torch.float32, hidden_size=64),
        tiny.model(2, torch.float32, hidden_size=64),
    )
    for model, limit in zip((first, second), limits, strict=True):
        save_model(model, tmp_path, max_shard_bytes=limit)
    assert_same_weights(load_model(tmp_path), second)
    assert (tmp_path / "model.safetensors").exists() != (
        tmp_path / "model.safetensors.index.json"
    ).exists()
    assert len(tensors_in(tmp_path)) == len(list(second.parameters()))


@pytest.mark.parametrize("limit", [20_000, 10**9])
def test_a_model_can_be_saved_over_the_files_it_was_loaded_from(limit, tmp_path):
    shutil.copytree(GOLDEN / "llama2", tmp_path, dirs_exist_ok=True)
    model = load_model(tmp_path)  # its tensors are the file's pages
    save_model(model, tmp_path, max_shard_bytes=limit)
    assert_same_weights(model, load_model(GOLDEN / "llama2"))
    assert_same_weights(load_model(tmp_path), model)


def test_a_tied_head_is_tied_after_loading_and_not_written(tmp_path):
    model = load_model(GOLDEN / "llama32")
    assert model.lm_head.weight is model.embed_tokens.weight
    save_model(model, tmp_path)
    assert "model.embed_tokens.weight" in tensors_in(
        tmp_path
    ) and "lm_head.weight" not in tensors_in(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.lm_head.weight is loaded.embed_tokens.weight


def test_a_copy_of_a_tied_head_in_the_file_is_ignored(tmp_path):
    shutil.copytree(GOLDEN / "llama32", tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "lm_head.weight": torch.zeros(96, 32)}, tmp_path / "model.safetensors")
    assert_same_weights(load_model(tmp_path), load_model(GOLDEN / "llama32"))


def test_config_fields_we_have_no_use_for_survive(tmp_path):
    model = load_model(GOLDEN / "llama31_rope_parameters")
    model.config.source["some_field_of_the_future"] = {"kept": [1, None]}
    save_model(model, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["some_field_of_the_future"] == {"kept": [1, None]} and saved["pretraining_tp"] == 1


@pytest.mark.parametrize("name, key", [("llama2", "torch_dtype"), ("sharded", "dtype")])
def test_the_dtype_asked_for_is_the_dtype_written_and_named(name, key, tmp_path):
    model = load_model(GOLDEN / name)
    save_model(model, tmp_path, dtype=torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())[key] == "bfloat16"
    half = load_model(tmp_path, torch.bfloat16)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(
            half.get_parameter(name), parameter.bfloat16()
        )
    assert all(parameter.dtype == torch.float32 for parameter in load_model(tmp_path).parameters())


SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "kind, changes",
    [
        (
            "llama",
            {
                "rope_scaling": SCALING,
                "tie_word_embeddings": True,
                "rope_theta": 500.0,
                "eos_token_id": [1, 2],
            },
        ),
        ("mistral", {"sliding_window": 5, "head_dim": 6}),
    ],
)
def test_a_model_made_here_gets_a_config_that_reads_back_as_it_was(kind, changes, tmp_path):
    model = tiny.model(**changes)
    save_model(model, tmp_path)
    source = json.loads((tmp_path / "config.json").read_text())
    assert source["model_type"] == kind and source["architectures"] == [
        kind.capitalize() + "ForCausalLM"
    ]
    back = read_config(tmp_path)
    assert {**vars(back), "source": {}} == vars(model.config)
    assert_same_weights(load_model(tmp_path, torch.float64), model)


# ---------------------------------------------------------------------------------------------------------------- a new token
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "token", [7, 11, 14], ids=["a free row", "the next row", "beyond the table"]
)
@torch.no_grad()
def test_a_new_token_starts_as_a_copy_of_another(tied, token, tmp_path):
    model = tiny.model(tie_word_embeddings=tied)
    before = {name: getattr(model, name).weight.clone() for name in ("embed_tokens", "lm_head")}
    assert tied == torch.equal(*before.values())
    copy_token_rows(model, token, source=2)
    vocab = max(11, token + 1)
    assert (
        model.config.vocab_size == vocab
        and (model.lm_head.weight is model.embed_tokens.weight) == tied
    )
    for name, old in before.items():
        table = getattr(model, name).weight
        assert table.shape == (vocab, 16) and table.requires_grad
        assert torch.equal(table[token], old[2])
        kept = [row for row in range(11) if row != token]
        assert torch.equal(table[kept], old[kept])
    hidden = model(torch.tensor([[1, 2], [1, token]]))  # [2, 2, H]
    assert_close(hidden[1], hidden[0], 1e-13)
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == vocab
    assert_same_weights(load_model(tmp_path, torch.float64), model)


def test_a_new_token_does_not_reach_the_file_the_model_came_from(tmp_path):
    save_model(tiny.model(dtype=torch.float32), tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    copy_token_rows(load_model(tmp_path), 7, source=2)
    assert (tmp_path / "model.safetensors").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------- refusals
def assert_refused(path: Path, *names: str) -> None:
    """load_model refuses with one line that holds every one of `names`."""
    with pytest.raises(InputError) as refusal:
        load_model(path)
    assert "\n" not in str(refusal.value)
    for name in names:
        assert name in str(refusal.value)


@pytest.mark.parametrize(
    "changes, names",
    [
        ({"model_type": "gpt2"}, ["model_type", "gpt2"]),
        ({"model_type": None}, ["model_type"]),
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
        ({"rope_scaling": "linear"}, ["rope_scaling", "linear"]),
        ({"rope_scaling": {**SCALING, "factor": "8"}}, ["factor", "8"]),
        ({"rope_theta": "many"}, ["rope_theta", "many"]),
        ({"rms_norm_eps": "1e-5"}, ["rms_norm_eps", "1e-5"]),
        ({"model_type": "mistral", "sliding_window": 0}, ["sliding_window", "0"]),
        ({"model_type": "mistral", "sliding_window": "8"}, ["sliding_window", "8"]),
        ({"layer_types": ["full_attention", "sliding_attention"]}, ["layer_types"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"vocab_size": "96"}, ["vocab_size", "96"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_attention_heads": 2.0}, ["num_attention_heads", "2.0"]),
        ({"num_key_value_heads": 3}, ["4", "3", "heads"]),
        ({"head_dim": 7}, ["head_dim", "7"]),
    ],
    ids=lambda value: json.dumps(value) if isinstance(value, dict) else "",
)
def test_what_is_not_implemented_is_refused_by_name(changes, names, tmp_path):
    shutil.copytree(GOLDEN / "llama2", tmp_path, dirs_exist_ok=True)
    source = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(source | changes))
    assert_refused(tmp_path, str(tmp_path / "config.json"), *names)


@pytest.mark.parametrize(
    "name",
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"],
)
def test_a_config_without_its_sizes_is_refused(name, tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path}/config.json: {name} is 'missing'"):
        config_of(tmp_path, "llama", (name,))


@pytest.mark.parametrize(
    "text",
    ["{", "", "[1, 2]", '"llama"', "\udcff"],
    ids=["cut off", "empty", "a list", "a string", "not UTF-8"],
)
def test_a_config_that_is_no_json_object_is_refused(text, tmp_path):
    (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    assert_refused(tmp_path, str(tmp_path / "config.json"))


def test_a_path_that_is_no_model_directory_is_refused(tmp_path):
    assert_refused(tmp_path / "nowhere", str(tmp_path / "nowhere"), "no such file")
    shutil.copy(GOLDEN / "llama2" / "config.json", tmp_path)
    assert_refused(tmp_path, str(tmp_path), "model.safetensors")


def rewritten(name: str, tmp_path: Path, drop: str = "", **tensors) -> Path:
    """A copy of the golden model with `tensors` added or replaced and `drop` left out -> its safetensors file."""
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    kept = {tensor: value for tensor, value in load_file(file).items() if tensor != drop}
    save_file({**kept, **tensors}, file)
    return file


def test_a_missing_tensor_is_refused_by_name(tmp_path):
    rewritten("llama2", tmp_path, drop="model.layers.1.mlp.up_proj.weight")
    assert_refused(tmp_path, str(tmp_path), "model.layers.1.mlp.up_proj.weight", "missing")


def test_an_untied_model_without_lm_head_is_refused(tmp_path):
    rewritten("llama2", tmp_path, drop="lm_head.weight")
    assert_refused(tmp_path, str(tmp_path), "lm_head.weight", "missing")


def test_a_tensor_of_the_wrong_shape_is_refused_with_both_shapes(tmp_path):
    file = rewritten("llama2", tmp_path, **{"model.norm.weight": torch.ones(31)})
    assert_refused(tmp_path, str(file), "model.norm.weight", "[31]", "[32]")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.2.mlp.up_proj.weight",
        "transformer.wte.weight",
    ],
)
def test_a_tensor_that_has_no_place_is_refused_by_name(name, tmp_path):
    file = rewritten("llama2", tmp_path, **{name: torch.ones(32)})
    assert_refused(tmp_path, str(file), name)


@pytest.mark.parametrize(
    "keep", [0, 7, 500, -1], ids=["empty", "in the length", "in the header", "in the last tensor"]
)
def test_a_truncated_file_is_refused_by_name(keep, tmp_path):
    file = rewritten("llama2", tmp_path)
    file.write_bytes(file.read_bytes()[:keep])
    assert_refused(tmp_path, str(file))


def test_a_missing_shard_is_refused_by_name(tmp_path):
    shutil.copytree(GOLDEN / "sharded", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    assert_refused(tmp_path, str(tmp_path / "model-00002-of-00003.safetensors"), "no such file")


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"metadata": {}}', '{"weight_map": 3}', '{"weight_map": {"lm_head.weight": 3}}'],
)
def test_an_index_that_is_none_is_refused_by_name(text, tmp_path):
    shutil.copytree(GOLDEN / "sharded", tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert_refused(tmp_path, str(tmp_path), "model.safetensors.index.json")
