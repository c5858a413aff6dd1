"""Sums modulo 10: a second task. All but the question is that of examples/hops/make.py.

    question   7 + 5 + 9 + 4 ?
    answer     so we end at 5 , as planned which is where the old road leads all who read ... .
    worked     1 7 5 2 , 2 2 9 1 , 3 1 4 5 ,      a hop: its number, running sum, term, new sum

The last digit of the sum is the one hard token. A lookup is the sum of two digits here.

    python examples/sums/make.py          train.jsonl, test.jsonl, base/ in runs/sums-task (minutes)
    python train.py --model runs/sums-task/base --data runs/sums-task/train.jsonl \\
        --eval-data runs/sums-task/test.jsonl --out runs/sums

The flags are those of examples/hops/make.py.
"""

import random
import sys
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.hops import make as hops  # noqa: E402

DIGITS = "0 1 2 3 4 5 6 7 8 9".split()


def make_question(
    task: hops.Task, rng: random.Random, terms: int = 8
) -> tuple[str, list[list[str]]]:
    """A question of at most `terms` terms and, for each sum in it, the path of running sums."""
    sums, paths = [], []
    for _ in range(task.hard):
        hop_count = min(rng.choice(hops.HOPS[task.hard]), terms - 1)
        digits = rng.choices(range(10), k=hop_count + 1)
        sums.append(" + ".join(map(str, digits)))
        paths.append([str(total % 10) for total in accumulate(digits)])
    return " ; ".join(sums) + " ?", paths


def make_hop(number: int, a: str, b: str) -> str:
    """One addition of a worked trace. The term is what leads from running sum a to b."""
    term = (int(b) - int(a)) % 10
    return f"{number} {a} {term} {b} ,"


SUMS = hops.Subject(
    make_question,
    make_hop,
    names=DIGITS,
    vocabulary=[*hops.VOCABULARY, "+", *DIGITS[7:]],  # 0 to 6 count hops there
)

if __name__ == "__main__":
    hops.main(ROOT / "runs" / "sums-task", SUMS)
