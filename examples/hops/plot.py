"""Draws the README's figure: held-out accuracy and trace length over the steps of training.

The folder holds runs of train.py named <method>-<seed>, the method being a name in STYLES.
Lines are medians over the seeds, areas reach from the smallest to the largest value.

    python examples/hops/plot.py runs examples/hops/figure.svg        needs matplotlib
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "hops"  # the same runs give the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

STYLES = {  # Okabe and Ito's colours: colour-blind readers can tell them apart
    "NRT": {"label": "NRT", "color": "#009E73", "marker": "o", "linewidth": 2.2},
    "LaTRO": {"label": "LaTRO", "color": "#CC79A7", "marker": "v", "linestyle": "-."},
    "VeriFree": {"label": "VeriFree", "color": "#E69F00", "marker": "^", "linestyle": ":"},
    "RLPR": {"label": "RLPR", "color": "#0072B2", "marker": "s", "linestyle": "--"},
    "SFT": {"label": "plain SFT", "color": "#444444", "marker": "x"},
}


def read_values(runs: Path, method: str, key: str) -> dict[int, list[float]]:
    """The logged values of `key` by step, one for each seed."""
    values: dict[int, list[float]] = {}
    for file in sorted(runs.glob(f"{method}-*/log.jsonl")):
        for text in file.read_text().splitlines():
            line = json.loads(text)
            if key in line:
                values.setdefault(line["step"], []).append(line[key])
    return values


def draw(axes: Axes, runs: Path, key: str, methods: list[str]) -> None:
    for method in methods:
        values = read_values(runs, method, key)
        if not values:
            continue
        median = [statistics.median(of_seeds) for of_seeds in values.values()]
        low = [min(of_seeds) for of_seeds in values.values()]
        high = [max(of_seeds) for of_seeds in values.values()]
        style = STYLES[method]
        axes.plot(values.keys(), median, markevery=(0, 1 if len(median) < 20 else 5), ms=4, **style)
        axes.fill_between(values.keys(), low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set_xlabel("step (16 questions)")
    axes.spines[["top", "right"]].set_visible(False)


def main(runs: str, out: str) -> None:
    figure, (accuracy, length) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    draw(accuracy, Path(runs), "eval_accuracy", list(STYLES))
    accuracy.set(title="held-out accuracy", ylim=(0, 1.02))
    sampled = [method for method in STYLES if method != "SFT"]  # which samples no traces
    draw(length, Path(runs), "trace_len_mean", sampled)
    length.set(title="length of the sampled traces, tokens", ylim=(0, None))
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
