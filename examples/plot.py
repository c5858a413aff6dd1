"""Draws held-out figures over the steps of training: median and range of several seeds.

RUNS is a folder with runs of train.py named <method>-<seed>, or a CSV file with a row for each
method, seed and step. Methods are names in STYLES, KEYs those of PANELS.

    python examples/plot.py RUNS OUT.svg [KEY ...]        needs matplotlib
"""

import csv
import json
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "hops"  # the same runs give the same file
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

STYLES = {  # Okabe and Ito's colours: colour-blind readers can tell them apart
    "NRT": {"label": "NRT", "color": "#009E73", "marker": "o", "linewidth": 2.2},
    "LaTRO": {"label": "LaTRO", "color": "#CC79A7", "marker": "v", "linestyle": "-."},
    "log_prob": {"label": "log_prob", "color": "#CC79A7", "marker": "v", "linestyle": "-."},
    "VeriFree": {"label": "VeriFree", "color": "#E69F00", "marker": "^", "linestyle": ":"},
    "RLPR": {"label": "RLPR", "color": "#0072B2", "marker": "s", "linestyle": "--"},
    "RLVR": {"label": "RLVR", "color": "#D55E00", "marker": "d", "linestyle": ":"},
    "SFT after traces": {"label": "SFT after traces", "color": "#56B4E9", "marker": "+"},
    "SFT": {"label": "plain SFT", "color": "#444444", "marker": "x"},
}
PANELS = {
    "eval_accuracy": {"title": "held-out accuracy", "ylim": (0, 1.02)},
    "eval_number": {"title": "right number after thinking", "ylim": (0, 1.02)},
    "eval_accuracy_null": {"title": "right answer without thinking", "ylim": (0, 1.02)},
    "trace_len_mean": {"title": "length of the sampled traces, tokens", "ylim": (0, None)},
}


def read_lines(runs: Path) -> Iterator[dict]:
    """What was logged: method, step, and figures."""
    if runs.is_file():
        with open(runs, newline="") as lines:
            yield from csv.DictReader(lines)
        return
    for file in sorted(runs.glob("*/log.jsonl")):
        method = {"method": file.parent.name.rsplit("-", 1)[0]}
        for text in file.read_text().splitlines():
            yield method | json.loads(text)


def draw(axes: Axes, lines: list[dict], key: str) -> None:
    for method, style in STYLES.items():
        values: dict[int, list[float]] = {}  # by step, one for each seed
        for line in lines:
            if line["method"] == method and line.get(key, "") != "":
                values.setdefault(int(line["step"]), []).append(float(line[key]))
        if not values or (method, key) == ("SFT", "trace_len_mean"):  # it samples no trace
            continue
        steps = sorted(values)
        median = [statistics.median(values[step]) for step in steps]
        low = [min(values[step]) for step in steps]
        high = [max(values[step]) for step in steps]
        axes.plot(steps, median, markevery=(0, 1 if len(median) < 20 else 5), ms=4, **style)
        axes.fill_between(steps, low, high, color=style["color"], alpha=0.15, linewidth=0)
    axes.set(xlabel="step", **PANELS[key])
    axes.spines[["top", "right"]].set_visible(False)


def main(runs: str, out: str, *keys: str) -> None:
    keys, lines = keys or ("eval_accuracy", "trace_len_mean"), list(read_lines(Path(runs)))
    size = {"figsize": (1 + 4 * len(keys), 3.2), "layout": "constrained"}
    figure, panels = plt.subplots(1, len(keys), squeeze=False, **size)
    for axes, key in zip(panels[0], keys, strict=True):
        draw(axes, lines, key)
    fullest = max(panels[0], key=lambda axes: len(axes.lines))
    shown = fullest.get_legend_handles_labels()
    figure.legend(*shown, loc="outside right center", frameon=False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(*sys.argv[1:])
