"""Draws the README's figure from two runs: held-out accuracy, and what thinking adds to the gold answer's log-prob.

python examples/hops/plot.py runs/hops runs/hops-sft examples/hops/figure.svg        needs matplotlib; `make figure` brings it
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "hops"  # the same runs give the same file
import matplotlib.pyplot as plt  # noqa: E402

RUNS = {"NRT": "#0b6e4f", "plain SFT": "#b23a48"}


def read_log(run: str) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def curve(log: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(line["step"], line[name]) for line in log if line.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]


def main(nrt: str, sft: str, out: str) -> None:
    figure, (accuracy, gain) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for (label, colour), run in zip(RUNS.items(), (nrt, sft), strict=True):
        log = read_log(run)
        accuracy.plot(*curve(log, "eval_accuracy"), color=colour, marker="o", label=label)
        gain.plot(*curve(log, "eval_gain"), color=colour, marker="o", label=label)
    accuracy.set(title="held-out exact match", xlabel="step (16 questions)", ylim=(0, 1.02))
    gain.set(title="what thinking adds to the gold answer", xlabel="step (16 questions)", ylabel="gain, nats per answer")
    gain.axhline(0, color="0.7", linewidth=0.8)
    accuracy.legend(frameon=False)
    for axes in (accuracy, gain):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
