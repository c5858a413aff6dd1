"""examples/words: rows are what they say; the checker tells traces that compute from others."""

import json

import pytest
import torch

from examples.words.check import check_trace
from examples.words.make import MARKER, PROMPT_FORMAT, make_rows
from examples.words.model import hub_order


def test_a_worked_trace_computes_the_answer():
    for row in make_rows(seed=0, count=60):
        assert check_trace(row["worked"], row["answer"]) == (True, True), row
        number = row["worked"].rsplit(" ", 1)[1]
        assert number in row["answer"].replace(".", "").split()


@pytest.mark.parametrize(
    ("trace", "steps_right", "worked"),
    [
        ("9 + 8 = 17; 17 - 2 = 15", True, True),
        ("9 + 8 = 17; 17 - 2 = 14", False, False),
        ("9 + 8 = 16; 17 - 2 = 15", False, False),
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
    assert MARKER + " " not in PROMPT_FORMAT  # no gold answer begins with a space


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
    assert hub_order(weight, head_dim=4)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
