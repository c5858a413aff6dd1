"""examples/words: rows are what they say; the checker tells traces that compute from others."""

import json

import pytest
import tiny
import torch

from examples.words import check
from examples.words.check import check_trace
from examples.words.make import MARKER, PROMPT_FORMAT, make_rows
from examples.words.model import hub_order
from support.weights import save_model


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


def test_the_check_has_the_same_figures_of_empty_greedy_and_sampled_traces(
    tmp_path, monkeypatch, capsys
):
    tiny.tokenizer_dir(tmp_path)
    save_model(tiny.model(dtype=torch.float32), tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "a b", "answer": "c"}\n' * 2)
    flags = f"--model {tmp_path} --data {tmp_path}/rows.jsonl --max-trace 3 --device cpu"
    monkeypatch.setattr("sys.argv", ["check.py", *flags.split()])
    check.main()
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["empty", "greedy", "sampled"]
    assert found["empty"]["trace_len"] == 0 < found["greedy"]["trace_len"] <= 3
    assert found["empty"].keys() == found["greedy"].keys() == found["sampled"].keys()


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
