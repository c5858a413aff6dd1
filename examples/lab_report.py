"""Tables, rank correlations and the figure of examples/lab.py, from its rows.

A cell of the table: hard tokens right (mean +- std over seeds), tokens of a trace, and how many of
the seeds think at the end. The predictor is measured before training (lab_measure.what_is_paid):
the mean advantage of rightly worked traces minus that of the empty one.
"""

import statistics
from importlib.util import find_spec
from pathlib import Path

AXES = ("easy", "sloppy", "noise", "worked", "hard")


def setting_of(row: dict) -> tuple:
    return tuple(row[axis] for axis in AXES)


def label(setting: tuple) -> str:
    easy, sloppy, noise, worked, hard = setting
    text = f"{easy} easy" if easy == 0 else f"{easy} easy, sloppy {sloppy}"
    text += f", {noise} noise" if noise else ""
    text += f", {worked} worked" if worked != 0.15 else ""
    return text + (f", {hard} hard" if hard > 1 else "")


def write_report(path: Path, rows: list[dict], before: list[dict]) -> None:
    """Prints the tables, writes them to path.md, and path.svg where matplotlib is installed."""
    if not rows:
        print("no finished runs")
        return
    text = "\n\n".join(
        [
            f"{len(rows)} runs: hard tokens right (mean ± std over seeds), trace tokens, "
            "seeds that think at the end",
            table(rows, run_cell),
            "Before training: mean advantage of rightly worked traces - that of the empty one; "
            "share of the reward's variance from hard / easy / unpredictable tokens",
            table(before, before_cell),
            correlations(rows, before),
        ]
    )
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
    if find_spec("matplotlib"):
        draw_map(path.with_suffix(".svg"), rows)


# ---- table
def group(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(setting, method) -> its rows, one per seed."""
    cells = {}
    for row in rows:
        cells.setdefault((setting_of(row), row["method"]), []).append(row)
    return cells


def table(rows: list[dict], cell) -> str:
    """Markdown: a row per method, a column per setting. cell(rows of the seeds) -> text."""
    cells = group(rows)
    settings = list(dict.fromkeys(setting for setting, _ in cells))
    methods = list(dict.fromkeys(method for _, method in cells))
    lines = [["method", *map(label, settings)], ["---"] * (len(settings) + 1)]
    for method in methods:
        line = [f"`{method}`"]
        for setting in settings:
            line.append(cell(cells[setting, method]) if (setting, method) in cells else "")
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run_cell(rows: list[dict]) -> str:
    right = [row["hard_right"] for row in rows]
    length = statistics.mean(row["eval_trace_len"] for row in rows)
    think = sum(row["survives"] for row in rows)
    spread = statistics.pstdev(right)
    return f"{statistics.mean(right):.2f} ± {spread:.2f}, {length:.0f}, {think}/{len(rows)}"


def before_cell(rows: list[dict]) -> str:
    (row,) = rows
    predictor = "-" if row["predictor"] is None else f"{row['predictor']:+.2f}"
    shares = [f"{row[f'share_{kind}']:.2f}" for kind in ("hard", "easy", "noise")]
    return f"{predictor}; {' / '.join(shares)}"


# ---- correlations
def correlations(rows: list[dict], before: list[dict]) -> str:
    """What the predictor says about the outcomes, over all (setting, method) with both."""
    predictors = {cell: found[0]["predictor"] for cell, found in group(before).items()}
    predicted, survival, right, thinks_from = [], [], [], []
    for cell, found in group(rows).items():
        if predictors.get(cell) is None:
            continue
        predicted.append(predictors[cell])
        survival.append(statistics.mean(row["survives"] for row in found))
        right.append(statistics.mean(row["hard_right"] for row in found))
        # A run that never thinks counts as one that would after its last step.
        steps = [row["thinks_from"] or row["steps"] + 1 for row in found]
        thinks_from.append(statistics.mean(steps))
    lines = [f"Spearman's rank correlation of the predictor, {len(predicted)} cells:"]
    outcomes = {
        "share of seeds that think at the end": survival,
        "hard tokens right at the end": right,
        "step at which thinking appears": thinks_from,
    }
    for name, values in outcomes.items():
        lines.append(f"* with the {name}: {spearman(predicted, values):+.2f}")
    agree = sum((p > 0) == (s > 0.5) for p, s in zip(predicted, survival, strict=True))
    lines.append(f"* predictor > 0 where most seeds think, else <= 0: {agree} of {len(predicted)}")
    return "\n".join(lines)


def spearman(x: list[float], y: list[float]) -> float:
    """Pearson's correlation of the ranks; nan where one side is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return float("nan")
    return statistics.correlation(ranks(x), ranks(y))


def ranks(values: list[float]) -> list[float]:
    """1 for the smallest; equal values share the mean of their ranks."""
    ordered = sorted(values)
    first = {value: ordered.index(value) + 1 for value in set(values)}
    return [first[value] + (values.count(value) - 1) / 2 for value in values]


# ---- figure
def draw_map(file: Path, rows: list[dict]) -> None:
    """One panel per method: share of seeds that think, length x (sloppiness, noise)."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lab"  # the same rows give the same file
    import matplotlib.pyplot as plt

    cells = {
        (method, easy, sloppy, noise): statistics.mean(row["survives"] for row in found)
        for ((easy, sloppy, noise, _, _), method), found in group(rows).items()
    }
    methods = list(dict.fromkeys(method for method, *_ in cells))
    lengths = sorted({easy for _, easy, _, _ in cells})
    columns = sorted({(noise, sloppy) for _, _, sloppy, noise in cells})
    across = min(5, len(methods))
    down = -(-len(methods) // across)
    figure, panels = plt.subplots(
        down, across, figsize=(2.6 * across, 2.2 * down), layout="constrained", squeeze=False
    )
    for panel in panels.flat[len(methods) :]:
        panel.set_visible(False)
    for method, panel in zip(methods, panels.flat, strict=False):
        picture = []
        for easy in lengths:
            line = []
            for noise, sloppy in columns:
                at = [v for (m, e, s, n), v in cells.items() if (m, e, n) == (method, easy, noise)]
                known = cells.get((method, easy, sloppy, noise))
                if easy == 0 and at:  # without an easy part there is no sloppiness
                    known = at[0]
                line.append(float("nan") if known is None else known)
            picture.append(line)
        image = panel.imshow(picture, vmin=0, vmax=1, cmap="viridis", aspect="auto", origin="lower")
        panel.set_title(method, fontsize=8)
        names = [f"{sloppy}" + (f"\n{noise} noise" if noise else "") for noise, sloppy in columns]
        panel.set_xticks(range(len(columns)), names, fontsize=6)
        panel.set_yticks(range(len(lengths)), lengths, fontsize=7)
    figure.supxlabel("sloppiness of the easy part after a trace, unpredictable tokens", fontsize=8)
    figure.supylabel("easy tokens in the answer", fontsize=8)
    figure.colorbar(image, ax=panels, label="share of seeds that think", shrink=0.7)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
