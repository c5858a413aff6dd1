"""examples/convert.py: other files become the pairs that train.py reads."""

import json
import sys
from pathlib import Path

import pytest

from support.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import convert

PAIRS = [{"question": f"q{i}, or\n{i}?", "answer": f"a{i}"} for i in range(3)]


def command(monkeypatch, capsys, *words: object) -> tuple[list[dict], str]:
    """-> the rows written, and what was printed on stderr"""
    monkeypatch.setattr("sys.argv", ["convert.py", *map(str, words)])
    convert.main()
    out = Path(words[words.index("--out") + 1])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    return rows, capsys.readouterr().err


def test_csv_and_jsonl_with_other_keys_become_one_file(tmp_path, monkeypatch, capsys):
    lines = [json.dumps({"prompt": p["question"], "gold": p["answer"], "id": 1}) for p in PAIRS]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines[:2]))
    (tmp_path / "b.csv").write_text('id,prompt,gold\n7,"q2, or\n2?",a2\n')
    flags = ["--question-key", "prompt", "--answer-key", "gold", "--out", tmp_path / "out.jsonl"]
    files = [tmp_path / "a.jsonl", tmp_path / "b.csv"]
    assert command(monkeypatch, capsys, *flags, *files) == (PAIRS, "")


def test_parquet_in_the_form_of_gsm8k_and_of_tulu_3(tmp_path, monkeypatch, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    tulu = [{"id": "1", "messages": turns, "source": "x"}]
    for name, rows in (("gsm8k", PAIRS), ("tulu", tulu)):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    files = [tmp_path / "gsm8k.parquet", tmp_path / "tulu.parquet"]
    rows, _ = command(monkeypatch, capsys, "--out", tmp_path / "out.jsonl", *files)
    assert rows == [*PAIRS, {"messages": turns}]


def test_all_bad_rows_are_listed_and_nothing_is_written_unless_they_are_skipped(
    tmp_path, monkeypatch, capsys
):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    bad = ["{", '{"question": "q"}', '{"question": "q", "answer": " "}'] * 8
    file.write_text("\n".join([json.dumps(PAIRS[0]), *bad]))
    with pytest.raises(InputError, match="24 bad rows, 1 good ones; --skip-bad-rows"):
        command(monkeypatch, capsys, "--out", out, file)
    listed = capsys.readouterr().err.splitlines()
    assert len(listed) == 20 and list(tmp_path.iterdir()) == [file]
    says = ["property name", "lacks 'answer'", "answer is empty"]
    for number, (line, text) in enumerate(zip(listed[:3], says, strict=True), start=2):
        assert line.startswith(f"{file}:{number}: ") and text in line
    rows, _ = command(monkeypatch, capsys, "--out", out, file, "--skip-bad-rows")
    assert rows == PAIRS[:1]


def test_a_file_that_is_not_there_is_refused(tmp_path, monkeypatch, capsys):
    with pytest.raises(InputError, match=r"none.csv: .*No such file"):
        command(monkeypatch, capsys, "--out", tmp_path / "out.jsonl", tmp_path / "none.csv")
    assert not list(tmp_path.iterdir())
