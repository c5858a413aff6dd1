"""Word problems of two steps: train.jsonl, test.jsonl in runs/words-task.

    question   Ann has 9 coins, gets 6 more and gives 7 away. How many coins are left?
    answer     Ann has 8 coins left.

Nothing is worked out in the data. `SHOTS` is the prompt's head: three worked examples, one for each
form of question, the only ones there are. They show the base what a trace is; model.py writes them
into the model's directory.

    python examples/words/make.py                 numbers from 3 to 12: a step that the base can do
    python examples/words/make.py --most 40       harder single steps
    python examples/words/make.py --steps 3       harder problems
"""

import argparse
import json
import random
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = "Tom Ann Sam Eva Ben Mia Leo Kim".split()
THINGS = "apples books coins cards shells pens stamps eggs".split()
MARKER = "####"  # an ordinary token of the model, which solutions of GSM8K end with, too
# Two changes of a number: gain and loss, loss and gain, gain and gain; one more with --steps 3.
FORMS = (
    ("{n} has {a} {o}, gets {b} more and gives {c} away{d}. How many {o} are left?", (1, -1)),
    ("A bus has {a} people. At a stop {b} get off and {c} get on{d}. How many are on it?", (-1, 1)),
    ("There are {a} red, {b} blue and {c} green {o} in a box{d}. How many {o} are there?", (1, 1)),
)
ANSWERS = (
    "{n} has {total} {o} left.",
    "The bus has {total} people on it.",
    "There are {total} {o} in the box.",
)
THIRD = (", then finds {d}", ", then {d} get on", ", and {d} more under it")


def make_row(rng: random.Random, form: int, most: int, steps: int) -> dict[str, str]:
    """-> question, answer, and the worked trace, which no row of the files has."""
    question, signs = FORMS[form]
    signs = [*signs, 1][:steps]
    while True:
        numbers = [rng.randint(3, most), *(rng.randint(2, min(9, most)) for _ in signs)]
        totals = [numbers[0]]
        for sign, number in zip(signs, numbers[1:], strict=True):
            totals.append(totals[-1] + sign * number)
        if min(totals) > 0:
            break
    words = {"n": rng.choice(NAMES), "o": rng.choice(THINGS), "total": totals[-1]}
    words |= dict(zip("abcd", numbers, strict=False))
    words["d"] = THIRD[form].format(d=numbers[3]) if steps == 3 else ""
    hops = []
    for before, sign, number, after in zip(totals, signs, numbers[1:], totals[1:], strict=False):
        hops.append(f"{before} {'+' if sign > 0 else '-'} {number} = {after}")
    return {
        "question": question.format(**words),
        "answer": ANSWERS[form].format(**words),
        "worked": "; ".join(hops),
    }


def make_rows(seed: int, count: int, most: int, steps: int) -> list[dict[str, str]]:
    rng = random.Random(seed)
    return [make_row(rng, i % len(FORMS), most, steps) for i in range(count)]


SHOTS = "".join(
    f"Question: {row['question']}\nThink: {row['worked']}{MARKER}{row['answer']}\n\n"
    for row in make_rows(seed=4, count=len(FORMS), most=12, steps=2)
)
PROMPT_FORMAT = SHOTS + "Question: {question}\nThink:"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=12, help="largest first number of a question")
    parser.add_argument("--steps", type=int, default=2, choices=(2, 3), help="of a problem")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "words-task")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows = make_rows(0, 4000, args.most, args.steps)
    unique = list({row["question"]: row for row in rows}.values())
    for name, part in (("test", unique[:200]), ("train", unique[200:2200])):
        lines = [json.dumps({key: row[key] for key in ("question", "answer")}) for row in part]
        (args.out / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        print(f"wrote {args.out / name}.jsonl, {len(lines)} rows")


if __name__ == "__main__":
    main()
