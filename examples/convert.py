"""Other files into pairs.jsonl, the one form that train.py and evaluate.py read.

    python examples/convert.py --out pairs.jsonl gsm8k.parquet            question and answer
    python examples/convert.py --out pairs.jsonl tulu-3.parquet           messages
    python examples/convert.py --out pairs.jsonl --question-key prompt --answer-key completion \\
        a.csv b.jsonl                                                     other names, several files

.parquet needs pyarrow. A row with messages keeps them, any other its question and answer. All bad
rows are listed (the first 20, and their number) and nothing is written; --skip-bad-rows goes on
without them.
"""

import csv
import json
import sys
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import parse_row
from support.errors import InputError, OneLineParser, exit_on_bad_input, printable, refusing

SHOWN = 20  # bad rows
csv.field_size_limit(2**31 - 1)  # characters; its default refuses an answer of 131,073


def rows_of(file: Path, keys: list[str]) -> Iterator[tuple[str, object]]:
    """(where it stands, row) of a file. A row of JSONL is its line, of parquet a batch of one."""
    with refusing(file):
        if file.suffix == ".parquet":
            from pyarrow import parquet

            source = parquet.ParquetFile(file)
            columns = [column.path for column in source.schema if is_read(column.path, keys)]
            batches = source.iter_batches(columns=columns)
            rows = (batch.slice(i, 1) for batch in batches for i in range(batch.num_rows))
            yield from numbered(file, rows)
        elif file.suffix == ".csv":
            with open(file, newline="", encoding="utf-8-sig") as lines:
                yield from numbered(file, csv.DictReader(lines))
        else:
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield f"{file}:{number}", line


def is_read(column: str, keys: list[str]) -> bool:
    """Whether a parquet column is needed. Those within messages have names like messages.x.role."""
    name, _, inner = column.partition(".")
    return column in keys or (name == "messages" and inner.endswith(("role", "content")))


def numbered(file: Path, rows: Iterator[object]) -> Iterator[tuple[str, object]]:
    for number in count(1):
        where = f"{file}, row {number}"
        with refusing(where):  # a row that cannot be read
            row = next(rows, None)
        if row is None:
            return
        yield where, row


def convert(row: object, where: str, question_key: str, answer_key: str) -> str:
    """A row -> its line of pairs.jsonl. InputError as train.py would refuse it."""
    with refusing(where):
        if isinstance(row, bytes):
            row = json.loads(row)
        elif not isinstance(row, dict):
            (row,) = row.to_pylist()
        if row.get("messages") is not None:
            turns = [{name: turn[name] for name in ("role", "content")} for turn in row["messages"]]
            row = {"messages": turns}
        else:
            row = {"question": row[question_key], "answer": row[answer_key]}
        line = json.dumps(row)
    parse_row(line.encode(), where)
    return line


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help=".jsonl, .csv or .parquet")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--question-key", default="question")
    parser.add_argument("--answer-key", default="answer")
    parser.add_argument("--skip-bad-rows", action="store_true")
    args = parser.parse_args()
    temporary = args.out.with_name(args.out.name + ".tmp")
    good, bad = 0, []
    try:
        with open(temporary, "w") as out:
            keys = [args.question_key, args.answer_key]
            for where, row in chain.from_iterable(rows_of(file, keys) for file in args.files):
                try:
                    out.write(convert(row, where, *keys) + "\n")
                    good += 1
                except InputError as error:
                    bad.append(str(error))
        for text in bad[:SHOWN]:
            print(printable(text), file=sys.stderr)
        if good == 0 or (bad and not args.skip_bad_rows):
            advice = "; --skip-bad-rows goes on without them" if good else ""
            raise InputError(f"{len(bad)} bad rows, {good} good ones{advice}")
        temporary.replace(args.out)
    finally:
        temporary.unlink(missing_ok=True)
    print(f"{good} rows in {args.out}, {len(bad)} left out")


if __name__ == "__main__":
    exit_on_bad_input(main)()
