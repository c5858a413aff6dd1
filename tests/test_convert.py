"""examples/convert.py: other files become the pairs that train.py reads."""

import datetime
import decimal
import json
import sys
from pathlib import Path

import pytest

from support.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import convert

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PAIRS = [{"question": f"q{i}, or\n{i}?", "answer": f"a{i}"} for i in range(3)]


@pytest.fixture
def command(monkeypatch, capsys):
    """-> the rows written, and what was printed on stderr"""

    def run(*words: object) -> tuple[list[dict], str]:
        monkeypatch.setattr("sys.argv", ["convert.py", *map(str, words)])
        convert.main()
        out = Path(words[words.index("--out") + 1])
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        return rows, capsys.readouterr().err

    return run


def test_csv_and_jsonl_with_other_keys_and_messages_become_one_file(tmp_path, command):
    rows = [{"prompt": p["question"], "gold": p["answer"], "id": 1} for p in PAIRS[:2]]
    rows.append({"messages": [turn | {"timestamp": 3} for turn in TURNS]})
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)))
    (tmp_path / "b.csv").write_text('id,prompt,gold\n7,"q2, or\n2?",a2\n')
    flags = ["--question-key", "prompt", "--answer-key", "gold", "--out", tmp_path / "out.jsonl"]
    files = [tmp_path / "a.jsonl", tmp_path / "b.csv"]
    assert command(*flags, *files) == ([*PAIRS[:2], {"messages": TURNS}, PAIRS[2]], "")


def test_parquet_in_the_form_of_gsm8k_and_of_tulu_3(tmp_path, command):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    when = pyarrow.scalar(1, pyarrow.timestamp("ns"))  # which Python's datetime cannot hold
    tulu = [{"id": "1", "messages": [turn | {"when": when} for turn in TURNS], "when": when}]
    for name, rows in (("gsm8k", PAIRS), ("tulu", tulu)):
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    files = [tmp_path / "gsm8k.parquet", tmp_path / "tulu.parquet"]
    rows, _ = command("--out", tmp_path / "out.jsonl", *files)
    assert rows == [*PAIRS, {"messages": TURNS}]


def test_a_row_that_is_no_text_is_named_whatever_its_type(tmp_path, command, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for value in (datetime.date(2020, 1, 1), decimal.Decimal("1.5"), b"a", 3, None, ["a"]):
        rows = pyarrow.Table.from_pylist([{"question": "q", "answer": value}])
        parquet.write_table(rows, tmp_path / "rows.parquet")
        flags = ["--out", tmp_path / "out.jsonl", "--skip-bad-rows", tmp_path / "rows.parquet"]
        with pytest.raises(InputError, match="1 bad rows, 0 good ones"):
            command(*flags)
        assert capsys.readouterr().err.startswith(f"{tmp_path / 'rows.parquet'}, row 1: ")


def test_a_long_csv_field_is_read_and_a_broken_row_named(tmp_path, command):
    (tmp_path / "a.csv").write_text("question,answer\nq," + "a" * 200_000)
    flags = ["--out", tmp_path / "out.jsonl", tmp_path / "a.csv"]
    rows, _ = command(*flags)
    assert rows == [{"question": "q", "answer": "a" * 200_000}]
    (tmp_path / "a.csv").write_bytes(b"question,answer\nq,a\nq," + b"a" * 9000 + b"\xff")
    with pytest.raises(InputError, match=r"a.csv, row \d: .*utf-8"):
        command(*flags)


def test_all_bad_rows_are_listed_and_nothing_is_written(tmp_path, command, capsys):
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    bad = ["{", '{"question": "q"}', '{"question": "q", "answer": " "}'] * 8
    file.write_text("\n".join([json.dumps(PAIRS[0]), *bad]))
    with pytest.raises(InputError, match="24 bad rows, 1 good ones; --skip-bad-rows"):
        command("--out", out, file)
    listed = capsys.readouterr().err.splitlines()
    assert len(listed) == 20 and list(tmp_path.iterdir()) == [file]
    says = ["property name", "lacks 'answer'", "answer is empty"]
    for number, (line, text) in enumerate(zip(listed[:3], says, strict=True), start=2):
        assert line.startswith(f"{file}:{number}: ") and text in line
    rows, _ = command("--out", out, file, "--skip-bad-rows")
    assert rows == PAIRS[:1]
