"""The golden data is what its makers (tests/golden/make_*.py) describe: other tests rely on it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

import support.tokenizer
from data import parse_row
from sample import sample_traces
from support.weights import load_model, save_model

GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(folder.parent.name for folder in GOLDEN.glob("*/expected.safetensors"))

every_kind = pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])


def config(name: str) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text())


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_the_golden_files_stay_small():
    files = [file for file in GOLDEN.rglob("*.*") if file.suffix != ".pyc"]
    assert sum(file.stat().st_size for file in files if file.is_file()) < 1_350_000


# ---- models
@pytest.mark.parametrize("name", MODELS)
def test_every_model_has_tokens_and_finite_logits(name):
    expected = load_file(GOLDEN / name / "expected.safetensors")
    tokens = expected["tokens"]
    logits = expected["logits"]
    vocab = config(name)["vocab_size"]
    assert tokens.dtype == torch.int64 and tokens.max() < vocab
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    assert logits.shape == (*tokens.shape, vocab)


@pytest.mark.parametrize(
    "name, source",
    [
        ("llama31_rope_parameters", "llama31_rope_scaling"),
        ("qwen25_rope_parameters", "qwen25_tied"),
        ("qwen3_rope_parameters", "qwen3"),
    ],
)
def test_both_generations_of_a_config_hold_the_same_model(name, source):
    old, new = config(source), config(name)
    assert "rope_parameters" not in old and not {"rope_theta", "rope_scaling"} & new.keys()
    scaling = old.get("rope_scaling") or {"rope_type": "default"}
    assert new["rope_parameters"] == {**scaling, "rope_theta": old["rope_theta"]}
    for file in ("model.safetensors", "expected.safetensors"):
        assert_same_tensors(load_file(GOLDEN / name / file), load_file(GOLDEN / source / file))


def test_the_shards_hold_the_same_model_as_one_file():
    folder = GOLDEN / "sharded"
    single = GOLDEN / "mistral_v03"
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) >= 2 and not (folder / "model.safetensors").exists()
    shards = {name: load_file(folder / file)[name] for name, file in index.items()}
    assert_same_tensors(shards, load_file(single / "model.safetensors"))
    assert_same_tensors(
        load_file(folder / "expected.safetensors"), load_file(single / "expected.safetensors")
    )


# ---- tokenizers
def tokenizer(kind: str) -> tuple[Tokenizer, str, str]:
    """A golden tokenizer, its bos, its eos."""
    folder = GOLDEN / "tokenizers" / kind
    named = json.loads((folder / "tokenizer_config.json").read_text())
    bos, eos = named["bos_token"], named["eos_token"]
    if kind == "sentencepiece":  # written as objects
        bos, eos = bos["content"], eos["content"]
    return Tokenizer.from_file(str(folder / "tokenizer.json")), bos, eos


@every_kind
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


@every_kind
def test_special_tokens_in_a_text_become_one_id_each(kind):
    tok, bos, eos = tokenizer(kind)
    ids = tok.encode(f"{bos}{eos}", add_special_tokens=False).ids
    assert ids == [tok.token_to_id(bos), tok.token_to_id(eos)]
    assert tok.decode(ids) == ""


def test_a_sentencepiece_token_decoded_alone_loses_its_space():
    tok, _, _ = tokenizer("sentencepiece")
    ids = tok.encode("and the end").ids
    assert tok.decode(ids) == "and the end"
    assert " " not in "".join(tok.decode([token]) for token in ids)


# ---- the export
def test_transformers_reads_and_continues_an_export_as_we_do(tmp_path):
    """expected.json was written by transformers: ids of its chat template, greedy generation."""
    export = GOLDEN / "export"
    tokenizer = support.tokenizer.Tokenizer(export)
    model = load_model(export)
    save_model(model, tmp_path)
    tokenizer.save(tmp_path)
    written = {file.name for file in tmp_path.iterdir()}
    committed = {file.name for file in export.iterdir()} - {"expected.json"}
    assert written == committed
    for name in written:
        assert (tmp_path / name).read_bytes() == (export / name).read_bytes()
    for case in json.loads((export / "expected.json").read_text()):
        row = {"messages": [*case["messages"], {"role": "assistant", "content": "gold"}]}
        turns, _ = parse_row(json.dumps(row).encode(), "row")
        assert tokenizer.prompt_ids(turns) == case["prompt"]
        ((trace,),) = sample_traces(model, [case["prompt"]], 1, len(case["greedy"]), temperature=0)
        assert trace.ids == case["greedy"]
