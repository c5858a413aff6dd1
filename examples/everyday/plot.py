"""Draws the gain of a run: held out and in each step's batch, with the log-probs behind it.

    python examples/everyday/plot.py examples/everyday/smollm2.jsonl examples/everyday/figure.svg

The first file is a run's log.jsonl. Needs matplotlib.
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "everyday"  # the same log gives the same file
import matplotlib.pyplot as plt  # noqa: E402


def draw(axes: plt.Axes, lines: list[dict], key: str, label: str, **style) -> None:
    """One curve: a log key over the steps."""
    steps = [line["step"] for line in lines]
    axes.plot(steps, [line[key] for line in lines], label=label, **style)


def main(log: str, out: str) -> None:
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    batches = [line for line in lines if "gain" in line]
    evaluated = [line for line in lines if "eval_gain" in line]
    figure, (gain, logp) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    draw(gain, batches, "gain", "each step's batch", color="0.75")
    draw(gain, evaluated, "eval_gain", "held out", color="#0b6e4f", marker="o")
    gain.axhline(0, color="0.7", linewidth=0.8)
    gain.set(title="what thinking adds to the gold answer", ylabel="gain, nats per answer")
    draw(logp, batches, "gold_logp_think", "after a trace", color="#0b6e4f")
    draw(logp, batches, "gold_logp_null", "without", color="#b23a48")
    logp.set(title="log-prob of the gold answer, each step's batch", ylabel="nats per answer")
    for axes in (gain, logp):
        axes.set_xlabel("step (8 questions)")
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
