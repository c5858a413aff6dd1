"""examples/words: rows are what they say; the checker tells traces that compute from others."""

import json

import pytest
import torch

from examples.words.check import check_trace
from examples.words.make import MARKER, PROMPT_FORMAT, make_rows
from examples.words.model import hub_name, hub_order


@pytest.mark.parametrize("steps", [2, 3])
def test_a_worked_trace_computes_the_answer(steps):
    for row in make_rows(seed=0, count=60, most=12, steps=steps):
        assert check_trace(row["worked"], row["answer"]) == (True, True), row
        number = row["worked"].rsplit(" ", 1)[1]
        assert number in row["answer"].replace(".", "").split()


@pytest.mark.parametrize(
    ("trace", "steps_right", "worked"),
    [
        ("9 + 8 = 17; 17 - 2 = 15", True, True),
        ("9 + 8 = 17; 17 - 2 = 14", False, False),
        ("9 + 6 = 15", True, True),
        ("9 + 8 = 17", True, False),
        ("15", False, False),
        ("9 - 12 = 3", False, False),
        ("", False, False),
    ],
)
def test_checker(trace, steps_right, worked):
    assert check_trace(trace, "Ben has 15 eggs left.") == (steps_right, worked)


def test_the_prompt_ends_where_a_trace_begins_and_shows_three():
    assert PROMPT_FORMAT.endswith("Question: {question}\nThink:")
    assert PROMPT_FORMAT.count(MARKER) == 3


def test_the_files_share_no_question(tmp_path, monkeypatch):
    from examples.words import make

    monkeypatch.setattr("sys.argv", ["make.py", "--out", str(tmp_path)])
    make.main()
    lines = {
        name: (tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("train", "test")
    }
    asked = {name: {json.loads(line)["question"] for line in part} for name, part in lines.items()}
    assert len(asked["test"]) == 200
    assert not asked["train"] & asked["test"]


def test_rows_of_q_go_from_pairs_to_halves():
    """GGUF turns rows 0 and 1, 2 and 3, ... together; Hugging Face row i and row i + D / 2."""
    weight = torch.arange(8.0)[:, None]  # two heads of four rows
    assert hub_order(weight, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert hub_name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
