"""Prints runs on the embedded task side by side: held-out accuracy, sampled trace length, gain.

python examples/hops/compare.py runs/hops runs/hops-rlpr runs/hops-sft
"""

import json
import sys
from pathlib import Path

NAMES = {"weighted_sum_log_prob": "NRT", "arithmetic_mean": "RLPR", "prob": "VeriFree"}


def main() -> None:
    for run in map(Path, sys.argv[1:]):
        args = json.loads((run / "args.json").read_text())
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        name = "plain SFT" if args["traces"] == 0 else args["aggregator"]
        evaluated = [line for line in lines if "eval_accuracy" in line]
        accuracy = " ".join(f"{line['eval_accuracy']:.2f}" for line in evaluated)
        last = lines[-1]
        print(
            f"{NAMES.get(name, name):10} held-out accuracy {accuracy}   "
            f"trace {last['trace_len_mean']:4.1f} tokens   gain {last['eval_gain']:+.2f} nats"
        )


if __name__ == "__main__":
    main()
