"""Draws what thinking comes to be worth to a real model: gain on held-out questions, and in each step's batch, from a run's log.

python examples/everyday/plot.py examples/everyday/smollm2.jsonl examples/everyday/figure.svg        needs matplotlib
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "everyday"  # the same log gives the same file
import matplotlib.pyplot as plt  # noqa: E402


def main(log: str, out: str) -> None:
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    batches, evaluated = (
        [line for line in lines if "gain" in line],
        [line for line in lines if "eval_gain" in line],
    )
    figure, (gain, logp) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    gain.plot(
        [line["step"] for line in batches],
        [line["gain"] for line in batches],
        color="0.75",
        label="each step's batch",
    )
    gain.plot(
        [line["step"] for line in evaluated],
        [line["eval_gain"] for line in evaluated],
        color="#0b6e4f",
        marker="o",
        label="held out",
    )
    gain.axhline(0, color="0.7", linewidth=0.8)
    gain.set(
        title="what thinking adds to the gold answer",
        xlabel="step (8 questions)",
        ylabel="gain, nats per answer",
    )
    for name, colour, label in (
        ("gold_logp_think", "#0b6e4f", "after a trace"),
        ("gold_logp_null", "#b23a48", "without"),
    ):
        logp.plot(
            [line["step"] for line in batches],
            [line[name] for line in batches],
            color=colour,
            label=label,
        )
    logp.set(
        title="log-prob of the gold answer, each step's batch",
        xlabel="step (8 questions)",
        ylabel="nats per answer",
    )
    for axes in (gain, logp):
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
