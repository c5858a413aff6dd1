"""Tables, rank correlations and the figure of examples/lab.py, from the CSV files that it wrote.

    python examples/lab_report.py examples/hops/map   reads map.csv and map-before.csv there,
                                                      writes map.md and map.svg

A cell of the table: hard tokens right (mean +- std over seeds), tokens of a trace, and how many of
the seeds think at the end. What is known before training is from lab_measure.what_is_paid.
"""

import csv
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preflight import verdict

AXES = ("easy", "sloppy", "noise", "worked", "hard")


def setting_of(row: dict) -> tuple:
    return tuple(row[axis] for axis in AXES)


def label(setting: tuple) -> str:
    easy, sloppy, noise, worked, hard = setting
    text = f"{easy} easy" if easy == 0 else f"{easy} easy, sloppy {sloppy}"
    text += f", {noise} noise" if noise else ""
    text += f", {worked} worked" if worked != 0.15 else ""
    return text + (f", {hard} hard" if hard > 1 else "")


def write_report(path: Path) -> None:
    """path.csv, path-before.csv -> path.md, printed too, and path.svg if matplotlib is there."""
    rows = read_csv(path.with_suffix(".csv"))
    before = read_csv(path.with_name(path.name + "-before.csv"))
    if not rows:
        print("no finished runs")
        return
    text = report(rows, before)
    path.with_suffix(".md").write_text(text + "\n")
    print(text)
    if find_spec("matplotlib"):
        draw_map(path.with_suffix(".svg"), rows)


def report(rows: list[dict], before: list[dict]) -> str:
    parts = [
        f"{len(rows)} runs: hard tokens right (mean ± std over seeds), trace tokens, "
        "seeds that think at the end",
        table(rows, run_cell),
        "Before training: mean advantage of rightly worked traces - that of the empty one; "
        "share of the reward's variance from hard / easy / unpredictable tokens",
        table(before, before_cell),
        correlations(rows, before),
        "Preflight's verdicts. Its margin was placed on the settings with one hard token and no "
        "unpredictable ones; the other settings are held out",
        verdicts(rows, before),
    ]
    return "\n\n".join(parts)


def write_csv(file: Path, rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with open(file, "w", newline="") as out:
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        for row in rows:
            rounded = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(rounded)


def read_csv(file: Path) -> list[dict]:
    with open(file, newline="") as lines:
        return [{k: number(text) for k, text in row.items()} for row in csv.DictReader(lines)]


def number(text: str) -> bool | int | float | str | None:
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


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


# ---- what predicts the outcome
QUANTITIES = {
    "advantage of rightly worked traces - that of the empty one": lambda row: row["predictor"],
    "its mean / its std over the rightly worked traces": lambda row: row["signal_to_noise"],
    "share of the reward's variance from hard tokens": lambda row: row["share_hard"],
    "correlation of trace length and reward": lambda row: row["len_reward_corr"],
    "preflight: helpful - empty": lambda row: row["helpful"] - row["empty"],
}


def correlations(rows: list[dict], before: list[dict]) -> str:
    """Spearman's rank correlation of quantities known before training with the outcomes.

    Over all cells (setting, aggregator) that both were measured in.
    """
    measured = {cell: found[0] for cell, found in group(before).items()}
    cells = [
        (measured[cell], found)
        for cell, found in group(rows).items()
        if cell in measured and measured[cell].get("helpful") is not None
    ]
    outcomes = {
        "seeds that think at the end": [mean_of(found, "survives") for _, found in cells],
        "hard tokens right at the end": [mean_of(found, "hard_right") for _, found in cells],
        # A run that never thinks counts as one that would after its last step.
        "step at which thinking appears": [
            statistics.mean(row["thinks_from"] or row["steps"] + 1 for row in found)
            for _, found in cells
        ],
    }
    lines = [
        f"Rank correlation (Spearman) with the outcome, over {len(cells)} settings x aggregators:",
        "",
        "| before training | " + " | ".join(outcomes) + " |",
        "|---" * (len(outcomes) + 1) + "|",
    ]
    for name, quantity in QUANTITIES.items():
        known = [quantity(line) for line, _ in cells]
        at = [i for i, value in enumerate(known) if value is not None]
        values = [
            f"{spearman([known[i] for i in at], [outcome[i] for i in at]):+.2f}"
            for outcome in outcomes.values()
        ]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def mean_of(rows: list[dict], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def verdicts(rows: list[dict], before: list[dict]) -> str:
    """Preflight's verdicts against the outcomes, per group of settings."""
    outcome = {cell: mean_of(found, "survives") > 0.5 for cell, found in group(rows).items()}
    counts = {}
    for cell, (line,) in group(before).items():
        if cell in outcome and line.get("helpful") is not None:
            placed = "placed on" if placed_on(line) else "held out"
            said = verdict(line["helpful"], line["empty"], line["dead"])
            key = (placed, said)
            counts.setdefault(key, [0, 0])[outcome[cell]] += 1
    lines = ["| settings | verdict | most seeds think | most seeds do not |", "|---|---|---|---|"]
    for (placed, said), (no, yes) in sorted(counts.items()):
        lines.append(f"| {placed} | {said} | {yes} | {no} |")
    return "\n".join(lines)


def placed_on(row: dict) -> bool:
    """Whether preflight.MARGIN was placed on this setting; it was not on the other axes."""
    return row["noise"] == 0 and row["hard"] == 1


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
    """A row per method, a column per setting. Colour: share of seeds that think at the end; text:
    hard tokens right. Both are ordered by how many cells think."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lab"  # the same rows give the same file
    import matplotlib.pyplot as plt

    cells = group(rows)
    share = {cell: mean_of(found, "survives") for cell, found in cells.items()}
    settings = list(dict.fromkeys(setting for setting, _ in cells))
    methods = list(dict.fromkeys(method for _, method in cells))
    settings.sort(key=lambda setting: -sum(share.get((setting, m), 0) for m in methods))
    methods.sort(key=lambda method: -sum(share.get((s, method), 0) for s in settings))
    figure, axes = plt.subplots(figsize=(10.5, 4.6), layout="constrained")
    picture = [[share.get((s, m), float("nan")) for s in settings] for m in methods]
    image = axes.imshow(picture, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for y, method in enumerate(methods):
        for x, setting in enumerate(settings):
            if (setting, method) in cells:
                text = f"{mean_of(cells[setting, method], 'hard_right'):.2f}"
                dark = share[setting, method] < 0.5
                axes.text(
                    x, y, text, ha="center", va="center", fontsize=7, color="w" if dark else "k"
                )
    names = [label(setting).replace(", ", "\n") for setting in settings]
    axes.set_xticks(range(len(settings)), names, fontsize=7)
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    axes.xaxis.tick_top()
    figure.colorbar(image, ax=axes, label="share of seeds that think", shrink=0.8)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    write_report(Path(sys.argv[1]))
