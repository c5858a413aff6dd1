"""Prints runs on the embedded task side by side: accuracy, sampled trace length, eval_gain.

    python examples/hops/compare.py runs/hops runs/hops-rlpr runs/hops-sft

Accuracy is that of every evaluation, the gain that of the last one.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from examples.report import parse, read_log
from support.errors import exit_on_bad_input, refusing

# By aggregator, --clip-null and --null: as published (README).
NAMES = {
    ("weighted_sum_log_prob", False, "policy"): "NRT",
    ("arithmetic_mean", True, "frozen"): "RLPR",
}


@exit_on_bad_input
def main() -> None:
    for run in map(Path, sys.argv[1:]):
        with refusing(run):
            args = parse((run / "args.json").read_bytes(), run / "args.json")
            lines = read_log(run / "log.jsonl")
            print(line_of(args, lines))


def line_of(args: dict, lines: list[dict]) -> str:
    method = args["aggregator"], args["clip_null"], args["null"]
    name = "plain SFT" if args["traces"] == 0 else NAMES.get(method, args["aggregator"])
    evaluated = [line for line in lines if "eval_accuracy" in line]
    accuracy, gain = "not evaluated", ""
    if evaluated:
        accuracy = " ".join(f"{line['eval_accuracy']:.2f}" for line in evaluated)
        gain = f"   gain {evaluated[-1]['eval_gain']:+.2f} nats"
    trace = lines[-1].get("trace_len_mean")  # only evaluated so far: there is none
    length = "" if trace is None else f"   trace {trace:4.1f} tokens"
    return f"{name:10} held-out accuracy {accuracy}{length}{gain}"


if __name__ == "__main__":
    main()
