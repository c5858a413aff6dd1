"""The export that transformers has read: its files to the byte, its prompts, its continuations."""

import json
from pathlib import Path

import support.tokenizer
from data import parse_row
from sample import sample_traces
from support.weights import load_model, save_model

GOLDEN = Path(__file__).parent / "golden"


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
