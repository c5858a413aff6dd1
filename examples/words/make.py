"""Word problems of two steps: train.jsonl, test.jsonl in runs/words-task.

    question   Ann has 9 coins, gets 6 more and gives 7 away. How many coins are left?
    answer     Ann has 8 coins left.

Nothing is worked out in the data. `PROMPT_FORMAT` begins with three worked examples, one for each
form of question, the only ones there are. They show the base what a trace is; model.py writes them
into the model's directory.

    python examples/words/make.py
"""

import argparse
import json
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = "Tom Ann Sam Eva Ben Mia Leo Kim".split()
THINGS = "apples books coins cards shells pens stamps eggs".split()
MARKER = "####"  # an ordinary token of the model, which solutions of GSM8K end with, too
# Question, signs of its two changes, answer. The numbers are small: a step that the base can do.
FORMS = (
    (
        "{name} has {a} {things}, gets {b} more and gives {c} away. How many {things} are left?",
        (1, -1),
        "{name} has {total} {things} left.",
    ),
    (
        "A bus has {a} people. At a stop {b} get off and {c} get on. How many are on it?",
        (-1, 1),
        "The bus has {total} people on it.",
    ),
    (
        "There are {a} red, {b} blue and {c} green {things} in a box. How many {things} are there?",
        (1, 1),
        "There are {total} {things} in the box.",
    ),
)


def make_row(rng: random.Random, form: int) -> dict[str, str]:
    """-> question, answer, and the worked trace, which no row of the files has."""
    question, signs, answer = FORMS[form]
    between = total = 0
    while min(between, total) <= 0:
        a, b, c = rng.randint(3, 12), rng.randint(2, 9), rng.randint(2, 9)
        between = a + signs[0] * b
        total = between + signs[1] * c
    words = {"name": rng.choice(NAMES), "things": rng.choice(THINGS)}
    words |= {"a": a, "b": b, "c": c, "total": total}
    first, second = ("+" if sign > 0 else "-" for sign in signs)
    return {
        "question": question.format(**words),
        "answer": answer.format(**words),
        "worked": f"{a} {first} {b} = {between}; {between} {second} {c} = {total}",
    }


def make_rows(seed: int, count: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [make_row(rng, i % len(FORMS)) for i in range(count)]


SHOTS = "".join(
    f"Question: {row['question']}\nThink: {row['worked']}{MARKER}{row['answer']}\n\n"
    for row in make_rows(seed=4, count=len(FORMS))
)
PROMPT_FORMAT = SHOTS + "Question: {question}\nThink:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "words-task")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    unique = list({row["question"]: row for row in make_rows(0, 4000)}.values())
    for name, part in (("test", unique[:200]), ("train", unique[200:2200])):
        lines = [json.dumps({key: row[key] for key in ("question", "answer")}) for row in part]
        (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"wrote {args.out / name}.jsonl, {len(lines)} rows")


if __name__ == "__main__":
    main()
