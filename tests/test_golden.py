"""The golden data is what its makers (tests/golden/make_*.py) say it is, so that what other tests rely on does not drift."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer

import data
from sample import sample_traces
from support.weights import load_model, save_model

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(folder.parent.name for folder in GOLDEN.glob("*/expected.safetensors"))
KINDS = ["byte_level", "sentencepiece"]


def config(name: str) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text())


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_the_golden_files_stay_small():
    assert (
        sum(
            file.stat().st_size
            for file in GOLDEN.rglob("*")
            if file.is_file() and "__pycache__" not in file.parts
        )
        < 1_000_000
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_tokens_and_finite_logits(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    vocab = config(name)["vocab_size"]
    assert expected["tokens"].dtype == torch.int64 and expected["tokens"].max() < vocab
    assert expected["logits"].dtype == torch.float32 and expected["logits"].isfinite().all()
    assert expected["logits"].shape == (*expected["tokens"].shape, vocab)


def test_both_generations_of_llama31_hold_the_same_model():
    old, new = config("llama31_rope_scaling"), config("llama31_rope_parameters")
    assert "rope_parameters" not in old and not {"rope_theta", "rope_scaling"} & new.keys()
    assert new["rope_parameters"] == {**old["rope_scaling"], "rope_theta": old["rope_theta"]}
    for file in (
        "model.safetensors",
        "expected.safetensors",
    ):  # expected: to the bit, the logits are identical
        assert_same_tensors(
            load_file(GOLDEN / "llama31_rope_scaling" / file),
            load_file(GOLDEN / "llama31_rope_parameters" / file),
        )


def test_the_shards_hold_the_same_model_as_one_file():
    folder, whole = GOLDEN / "sharded", GOLDEN / "mistral_v03"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) >= 2 and not (folder / "model.safetensors").exists()
    shards = {}
    for name, file in index.items():
        with safe_open(folder / file, framework="pt") as shard:
            shards[name] = shard.get_tensor(name)
    assert_same_tensors(shards, load_file(whole / "model.safetensors"))
    assert_same_tensors(
        load_file(folder / "expected.safetensors"), load_file(whole / "expected.safetensors")
    )


def tokenizer(kind: str) -> tuple[Tokenizer, str, str]:
    """The tokenizer, and the text of its bos and eos, which stand in tokenizer_config.json as a string or as an object."""
    folder = GOLDEN / "tokenizers" / kind
    named = json.loads((folder / "tokenizer_config.json").read_text())
    bos, eos = (
        token["content"] if isinstance(token, dict) else token
        for token in (named["bos_token"], named["eos_token"])
    )
    return Tokenizer.from_file(str(folder / "tokenizer.json")), bos, eos


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text",
    [
        "The answer is 42.",
        "two\nlines,  two spaces",
        "<|user|>\nWhat is 7 * 7?\n<|assistant|>\n",
        "naïve 日本 🙂",
    ],
)
def test_tokenizers_give_back_any_text(kind, text):
    tok, bos, _ = tokenizer(kind)
    ids = tok.encode(text).ids
    assert ids[0] == tok.token_to_id(bos)
    assert tok.encode(text, add_special_tokens=False).ids == ids[1:]
    assert tok.decode(ids) == text


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_a_text_become_one_id_each(kind):
    tok, bos, eos = tokenizer(kind)
    ids = tok.encode(f"{bos}{eos}", add_special_tokens=False).ids
    assert ids == [tok.token_to_id(bos), tok.token_to_id(eos)] and tok.decode(ids) == ""


def test_a_sentencepiece_token_decoded_alone_loses_its_space():
    tok, _, _ = tokenizer("sentencepiece")
    ids = tok.encode("and the end").ids
    assert tok.decode(ids) == "and the end" and " " not in "".join(tok.decode([i]) for i in ids)


def test_an_export_is_what_transformers_has_read_and_continued(tmp_path):
    """expected.json is transformers' reading of the directory: chat template to ids, greedy generation. Ours are the same."""
    export = GOLDEN / "export"
    tokenizer, model = data.Tokenizer(export), load_model(export)
    save_model(model, tmp_path)
    data.Tokenizer(export).save(tmp_path)
    files = {file.name for file in tmp_path.iterdir()}
    assert files == {
        "config.json",
        "model.safetensors",
        "nrt.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all((tmp_path / name).read_bytes() == (export / name).read_bytes() for name in files)
    for case in json.loads((export / "expected.json").read_text()):
        row = {"messages": [*case["messages"], {"role": "assistant", "content": "gold"}]}
        turns, _ = data.parse_row(json.dumps(row).encode(), "row")
        assert (
            tokenizer.encode_prompt(data.render(turns, tokenizer.prompt_format, tokenizer.eos))
            == case["prompt"]
        )
        ((trace,),) = sample_traces(model, [case["prompt"]], 1, len(case["greedy"]), temperature=0)
        assert trace.ids == case["greedy"]
