"""One HTML page of one or several runs of train.py: curves, settings that differ, and traces.

    python examples/report.py RUN [RUN ...]               writes report.html into the first folder
    python examples/report.py RUN [RUN ...] -o page.html

The page is one file without network or server; it opens from disk. Its heart are the K traces of a
question at several steps, the gold answer's tokens coloured by what each trace changes in their
log-probs. A chooser of the aggregator recomputes rewards, advantages and the weight of each token.

The page's parts are in examples/report/: page.html (structure and style), aggregate.js (the
aggregators, as in aggregate.py) and page.js (what is drawn). They are put into one file together
with the runs' figures as JSON. Text of a run reaches the page as text only: it cannot run anything.

A long run is thinned: a curve has at most POINTS points, each the mean of the steps it stands for,
with their smallest and largest value; samples are taken evenly over the steps.
"""

import json
import math
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from support.errors import OneLineParser, exit_on_bad_input, refusing, require  # noqa: E402

PARTS = Path(__file__).with_suffix("")
POINTS = 200  # of a curve
SAMPLES = 40  # steps of a run with traces, of each kind (training, held-out)
SAMPLE_BYTES = 2_000_000  # of all samples of a page

CURVES = ("eval_accuracy", "eval_gain", "eval_gain_shuffled")
# Figures of sampled traces. Plain SFT samples none.
TRACE_CURVES = ("trace_len_mean", "entropy", "dup_frac", "reward_mean")
NO_SETTINGS = ("out", "resume", "overwrite", "command", "tracker")
# The settings that the page computes advantages with.
OF_REWARD = ("aggregator", "center", "scale", "clip_null", "traces")

SAMPLE_START = re.compile(rb'\{"step": \d+, "held_out": (true|false), ')


# ---- reading a run
def read_run(folder: Path, sample_bytes: int) -> dict:
    """What the page shows of a run, the --out folder of train.py. sample_bytes: most bytes of its
    samples. InputError where a file is missing, half-written or not of a run."""
    with refusing(folder):
        settings = parse((folder / "args.json").read_bytes(), folder / "args.json")
        log = read_log(folder / "log.jsonl")
        curves = CURVES + TRACE_CURVES if settings["traces"] > 0 else CURVES
        return {
            "name": folder.resolve().name,
            "settings": settings,
            "curves": {name: thin(log, name) for name in curves},
            "warnings": [[line["step"], text] for line in log for text in line.get("warnings", [])],
            "samples": read_samples(folder / "samples.jsonl", sample_bytes),
        }


def read_log(file: Path) -> list[dict]:
    with open(file, "rb") as lines:
        log = [parse(line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]
    require(log, f"{file}: holds no lines; nothing was logged yet")
    return log


def parse(line: bytes, where: str | Path) -> dict:
    """The object of a line of JSON. A figure that is no number (NaN, inf) becomes None."""
    require(line.endswith(b"\n"), f"{where}: half-written; train.py --resume continues such a run")
    with refusing(where):
        return json.loads(line, parse_constant=lambda name: None)


def read_samples(file: Path, most_bytes: int) -> list[dict]:
    """Lines of samples.jsonl, evenly over the steps. Only those that are taken are parsed."""
    lines_of = {b"true": [], b"false": []}  # held out or not -> (line number, offset in bytes)
    offset = 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            start = SAMPLE_START.match(line)
            require(start, f"{file}:{number}: not a line that train.py wrote")
            lines_of[start[1]].append((number, offset))
            offset += len(line)
        total = len(lines_of[b"true"]) + len(lines_of[b"false"])
        count = min(SAMPLES, most_bytes * total // max(1, 2 * offset))  # by the mean size of a line
        taken = []
        for number, offset in evenly(lines_of[b"true"], count) + evenly(lines_of[b"false"], count):
            lines.seek(offset)
            taken.append(parse(lines.readline(), f"{file}:{number}"))
    return taken


def evenly(items: list, count: int) -> list:
    """At most `count` items, the first and the last among them; at least 2."""
    count = max(2, count)
    if len(items) <= count:
        return items
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def thin(log: list[dict], name: str) -> list[list[float]]:
    """A curve as points [step, mean, smallest, largest], at most POINTS."""
    lines = [line for line in log if isinstance(line.get(name), int | float)]
    size = max(1, math.ceil(len(lines) / POINTS))
    curve = []
    for start in range(0, len(lines), size):
        part = lines[start : start + size]
        values = [line[name] for line in part]
        figures = (sum(values) / len(values), min(values), max(values))
        curve.append([part[-1]["step"], *(float(f"{value:.5g}") for value in figures)])
    return curve


# ---- the page
def make_page(runs: list[dict]) -> str:
    """The HTML text. Of the settings, those that differ between runs are shown."""
    settings = [run["settings"] for run in runs]
    differ = []
    for name in settings[0]:
        values = {json.dumps(of_run.get(name)) for of_run in settings}
        if len(values) > 1 and name not in NO_SETTINGS:
            differ.append(name)
    for run in runs:
        run["settings"] = {name: run["settings"].get(name) for name in [*OF_REWARD, *differ]}
    # "<" as an escape: no text of a run can end the script element that holds it.
    data = json.dumps({"runs": runs, "differ": differ}).replace("<", "\\u003c")
    page = (PARTS / "page.html").read_text("utf-8")
    for script in ("aggregate.js", "page.js"):
        page = page.replace(f"/* {script} */", (PARTS / script).read_text("utf-8"))
    return page.replace("/* data */", data)


@exit_on_bad_input
def main() -> None:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="--out of train.py")
    text = "the HTML file to write; default: report.html in the first RUN"
    parser.add_argument("-o", "--out", type=Path, help=text)
    args = parser.parse_args()
    page = make_page([read_run(run, SAMPLE_BYTES // len(args.runs)) for run in args.runs])
    out = args.out or args.runs[0] / "report.html"
    out.write_text(page, encoding="utf-8")
    print(f"wrote {out}, {len(page) / 1e6:.2f} MB; it opens in any browser")


if __name__ == "__main__":
    main()
