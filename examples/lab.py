"""The laboratory: where does thinking survive? A grid of short runs on variants of examples/hops.

A cell of a grid is a setting of examples/hops/make.py, a method (flags of train.py) and a seed.
Every cell is a run of its own, `python train.py ...` in a child process:

    runs/lab/GRID.csv                        one row per finished run; such a run is not run again
    runs/lab/GRID.md, GRID.svg               its table and figure (matplotlib)
    runs/lab/SETTING/base/, *.jsonl          base and data, made on demand, shared by all seeds
    runs/lab/SETTING/METHOD-sSEED-N-steps/   a run: log.jsonl, final/

    python examples/lab.py --quick           minutes: arithmetic_mean stops thinking where
                                             the answer has an easy part, and only there
    python examples/lab.py --grid map        9 aggregators and the baselines over 12 settings
    python examples/lab.py --grid long       300 steps of the methods that stop thinking
    python examples/lab.py --grid remedies   the flags that could keep them thinking
    python examples/lab.py --grid published  methods with all choices of their authors; and
    python examples/lab.py --grid published-long  over 300 steps
    python examples/lab.py --grid fresh      settings whose outcomes preflight.py predicted before
    python examples/lab.py --grid fresh-long  those it does not see thinking in 60, for 300 steps
    python examples/lab.py --grid untried    flags that it says help, beside runs without them
    python examples/lab.py --grid map --report --out examples/hops
                                             table and figure of the CSV file there, no new runs

A stopped laboratory goes on with the same command; a half-finished run starts again. Exact match of
the whole answer is 0 for every method where the answer holds unpredictable tokens, so the hard
tokens are scored by themselves.
"""

import csv
import io
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, product
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aggregate import AGGREGATORS  # noqa: E402
from data import Example, Pairs  # noqa: E402
from examples.hops.make import POINTERS, Task, make_trace  # noqa: E402
from examples.sums.make import SUMS  # noqa: E402
from model import Transformer  # noqa: E402
from sample import sample_to_marker, trace_ids  # noqa: E402
from support.args import Args  # noqa: E402
from support.errors import OneLineParser, exit_on_bad_input, read_json, write_text  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
from support.weights import load_model  # noqa: E402

# ---- grids. A method is an aggregator, with further flags of train.py, or "sft"
COLLAPSING = ("log_prob", "prob", "geometric_mean", "arithmetic_mean", "info_gain", "jlb_multi")
VERIFREE = "prob --scale none"  # without a std, as its authors do
REMEDIED = [
    f"{aggregator} {remedy}".strip()
    for aggregator in ("arithmetic_mean", "log_prob", "prob")
    for remedy in (
        "",
        "--answer-weight exact",
        "--answer-weight none",
        "--scale none",
        "--clip-null",
        "--clip-null --null frozen",  # the null think matters only where the reward is clipped
    )
]

# Methods as their authors run them: the flags that come closest. README has the table of what
# still differs, examples/README.md where it was read.
PUBLISHED = {
    "NRT": "weighted_sum_log_prob",
    "RLPR": "arithmetic_mean --clip-null --null frozen --answer-weight none --filter-std 0.5",
    "VeriFree": "prob --scale none --answer-weight exact",
    "JEPO": "jlb_multi --scale none --answer-weight exact",
    "LaTRO": "log_prob --scale none",
    "RLP": "info_gain --scale none --answer-weight none",
    "NOVER": "examples/rewards.py:nover --answer-weight none",
    "VR-CLI": "examples/rewards.py:vr_cli --answer-weight none",
    "mixture": "examples/rewards.py:mixture",
    "RLVR": "exact_match --answer-weight none",
    "SFT": "sft",
}
# Remedies that none of these papers has.
PROPOSED = {
    "mean, clipped": "arithmetic_mean --clip-null",
    "mean, filtered": "arithmetic_mean --filter-std 0.5",
    "mean + mixture": "examples/rewards.py:mean_and_mixture",
}


@dataclass(frozen=True)
class Sums(Task):
    """A setting of examples/sums."""

    subject: str = "sums"


RACE = ROOT / "examples" / "hops" / "race_settings.json"


def predicted(grid: str) -> list[tuple[Task, dict]]:
    """Settings, each with its line of the file: flags of train.py, and what was said of rewards."""
    found = []
    for line in read_json(RACE)[grid]:
        script, *axes = line["make"].replace("--", "").split()
        values = {name: json.loads(value) for name, value in (axis.split("=") for axis in axes)}
        found.append(((Sums if "sums" in script else Task)(**values), line))
    return found


@dataclass(frozen=True)
class Grid:
    cells: list[tuple[Task, str]]  # setting, method
    seeds: int
    steps: int


CONTROL = Task(easy=0)  # without an easy part no trace costs anything
COSTLY = Task(easy=32, sloppy=0.3)
MAP = [
    CONTROL,
    *(Task(easy=8, sloppy=sloppy) for sloppy in (0.0, 0.3)),
    *(Task(easy=32, sloppy=sloppy) for sloppy in (0.0, 0.1, 0.3)),
    *(Task(easy=easy, noise=noise) for easy in (0, 32) for noise in (4, 16)),
    replace(COSTLY, hard=3),
    Task(easy=128, sloppy=0.3),
]
QUICK = ["weighted_sum_log_prob", "arithmetic_mean", "sft"]


def predicted_cells(grid: str) -> list[tuple[Task, str]]:
    return [
        (task, f"{reward} {line['train']}".strip())
        for task, line in predicted(grid)
        for reward in line["race"]
    ]


GRIDS = {
    "quick": Grid([*product([CONTROL, COSTLY], QUICK)], seeds=2, steps=40),
    "map": Grid([*product(MAP, [*AGGREGATORS, "sft"])], seeds=3, steps=60),
    "long": Grid([*product([COSTLY], [*COLLAPSING, VERIFREE])], seeds=5, steps=300),
    "published": Grid(
        [*product(MAP[:6], PUBLISHED | PROPOSED), *product(MAP[6:], ["RLPR", "VeriFree"])],
        seeds=3,
        steps=60,
    ),
    "published-long": Grid([*product([COSTLY], PUBLISHED | PROPOSED)], seeds=3, steps=300),
    "remedies": Grid([*product([COSTLY], [*REMEDIED, "exact_match", "sft"])], seeds=3, steps=60),
    "fresh": Grid(predicted_cells("fresh"), seeds=5, steps=60),
    "fresh-long": Grid(predicted_cells("fresh-long"), seeds=1, steps=300),
    "untried": Grid(predicted_cells("untried"), seeds=3, steps=100),
}


def flags_of(method: str) -> list[str]:
    method = (PUBLISHED | PROPOSED).get(method, method)
    if method == "sft":
        return ["--traces", "0"]
    if method == "exact_match":  # RLVR as its authors run it: the reward trains the trace alone
        method += " --answer-weight none"
    return ["--aggregator", *method.split()]


def label(row: dict) -> str:
    """A setting's name: the axes that differ from Task(), after the two that always count."""
    text = f"{row['easy']:g} easy"
    text += f", sloppy {row['sloppy']:g}" if row["easy"] else ""
    text += f", {row['noise']:g} noise" if row["noise"] else ""
    text += f", {row['worked']:g} worked" if row["worked"] != Task.worked else ""
    text += f", {row['hard']:g} hard" if row["hard"] > 1 else ""
    return text + (f", {row['subject']}" if row.get("subject") else "")


def folder_of(out: Path, task: Task) -> Path:
    return out / label(vars(task)).replace(", ", "-").replace(" ", "")


# ---- child processes
CHILDREN: set[subprocess.Popen] = set()


def run_child(command: list[object]) -> None:
    """Runs `python command` in the project's folder, on one thread. RuntimeError if it fails."""
    child = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    CHILDREN.add(child)
    output, _ = child.communicate()
    CHILDREN.discard(child)
    if child.returncode != 0:
        raise RuntimeError(f"exit code {child.returncode}: {output[-500:]}")


def run_all(jobs: int, work: dict[str, Callable[[], dict]], keep: Callable[[dict], str]) -> int:
    """Calls all of `work` (name -> function), `jobs` at a time, and keep(what it returned), which
    says in a line what came out. -> how many failed. Ctrl-C ends the child processes."""
    began, failed = time.monotonic(), 0
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(function): name for name, function in work.items()}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                error = future.exception()
                failed += error is not None
                text = f"FAILED: {error}" if error else keep(future.result())
                minutes = (time.monotonic() - began) / done * (len(work) - done) / 60
                count = f"{done} of {len(work)}, {minutes:.0f} min left"
                print(f"[{count}]  {futures[future]}  {text}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(CHILDREN):
                child.terminate()
            raise
    return failed


# ---- data and bases
BASE_SEEDS = 3
LOOKUPS_RIGHT = 0.9  # of a base that keeps lookups: 1.0, of one that lost them: 0.24


def make_base(out: Path, task: Task) -> dict:
    """A setting's data and base, in its folder.

    Some bases unlearn lookups on the mix of documents. Such a one cannot work a question out, so
    no reward could make it think; another seed takes its place.
    """
    folder = folder_of(out, task)
    unfinished = folder.with_name(folder.name + ".tmp")
    script = ROOT / "examples" / getattr(task, "subject", "hops") / "make.py"
    for seed in range(task.seed, task.seed + BASE_SEEDS):
        shutil.rmtree(unfinished, ignore_errors=True)
        if replace(task, seed=seed) == Task():
            shutil.copytree(ROOT / "examples" / "hops", unfinished)  # the committed files
        else:
            axes = {axis.name: getattr(task, axis.name) for axis in fields(Task)} | {"seed": seed}
            flags = [f"--{name}={value}" for name, value in axes.items()]
            run_child([script, *flags, "--out", unfinished])
        model, tokenizer = load_model(unfinished / "base"), Tokenizer(unfinished / "base")
        lookups = lookups_right(model, tokenizer, read_examples(unfinished / "test.jsonl", 32))
        if lookups > LOOKUPS_RIGHT:
            break
    else:
        raise RuntimeError(f"{BASE_SEEDS} bases did not learn lookups; take more steps")
    unfinished.rename(folder)
    return {"seed": seed, "lookups_right": lookups}


@torch.no_grad()
def lookups_right(model: Transformer, tokenizer: Tokenizer, examples: list[Example]) -> float:
    """Share of hops whose last name the base predicts, given a rightly worked trace up to it."""
    right = []
    (comma,) = tokenizer.encode_prompt(",")  # ends a hop
    for example in examples:
        trace = tokenizer.encode_prompt(worked_trace(example.question))  # 1 ann bob , 2 bob kim ,
        hidden = model(torch.tensor([example.prompt + trace]))[0]  # [L, H]
        predicted = model.lm_head(hidden[len(example.prompt) - 1 : -1]).argmax(dim=-1).tolist()
        ends = [at for at in range(len(trace) - 1) if trace[at + 1] == comma]
        right += [predicted[at] == trace[at] for at in ends]
    return sum(right) / len(right)


def worked_trace(question: str) -> str:
    """The trace that make.py writes where it works this question out."""
    paths, subject = [], POINTERS
    if "+" in question:
        subject = SUMS
        for terms in question.removesuffix(" ?").split(" ; "):
            sums = accumulate(map(int, terms.split(" + ")))
            paths.append([str(total % 10) for total in sums])
    else:
        told, asked = question.split("from")
        follows = dict(fact.split() for fact in told.split(";")[:-1])
        *starts, _, hops, _ = asked.split()  # a b c go 3 ?
        for start in starts:
            path = [start]
            for _ in range(int(hops)):
                path.append(follows[path[-1]])
            paths.append(path)
    return make_trace("worked", paths, random.Random(), subject)[0]


# ---- a run
EVAL_QUESTIONS = 32
QUESTIONS = 8  # per step, half of train.py's default: half the time, the same order of methods
WARMUP_STEPS = 3  # train.py takes a share of the steps; a long run shall begin as a short one does


def do_run(out: Path, task: Task, method: str, seed: int, steps: int) -> dict:
    """Trains and scores the hard tokens -> the run's row."""
    setting = folder_of(out, task)
    folder = setting / f"{method.replace(' ', '')}-s{seed}-{steps}-steps"
    command = ["train.py", "--model", setting / "base", "--data", setting / "train.jsonl"]
    command += ["--eval-data", setting / "test.jsonl", "--eval-questions", EVAL_QUESTIONS]
    command += ["--steps", steps, "--eval-every", steps, "--save-every", steps]
    command += ["--questions", QUESTIONS]
    command += ["--warmup", min(1, WARMUP_STEPS / steps), "--seed", seed]
    command += ["--device", "cpu", "--out", folder, "--overwrite"]
    began = time.monotonic()
    run_child([*command, *flags_of(method)])
    log = read_rows(folder / "log.jsonl")
    row = vars(task) | {"method": method, "seed": seed, "steps": steps}
    row |= {name: value for name, value in log[-1].items() if name.startswith("eval_")}
    row |= hard_tokens(folder / "final", setting / "test.jsonl")
    row["survives"] = survives(row)
    row["thinks_from"] = first_thinking_step(log)
    row["seconds"] = round(time.monotonic() - began)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    return row


HARD_ROWS = 100  # test rows on which the hard tokens are scored


@torch.no_grad()
def hard_tokens(final: Path, data: Path) -> dict[str, float]:
    """Means over the hard tokens of the first rows of `data`, each after the gold tokens before it.

    hard_right: the greedy choice is the gold token, hard_logp: its log-prob in nats; after the
    model's own greedy trace, after the empty one (_null) and after the next row's (_shuffled).
    """
    model, tokenizer = load_model(final), Tokenizer(final)
    marker = tokenizer.marker_id
    examples = read_examples(data, HARD_ROWS)
    hard = [row["hard"] for row in read_rows(data)[:HARD_ROWS]]
    prompts = [example.prompt for example in examples]
    groups = sample_to_marker(model, tokenizer, prompts, 1, Args.max_trace, temperature=0.0)
    own = [trace_ids(trace, marker) for (trace,) in groups]
    contexts = {"": own, "_null": [[marker]] * len(own), "_shuffled": own[1:] + own[:1]}
    figures = {}
    for name, traces in contexts.items():
        right, logps = [], []
        for example, trace, positions in zip(examples, traces, hard, strict=True):
            before = [*example.prompt, *trace]
            hidden = model(torch.tensor([before + example.answer]))[0]  # [L, H]
            predicts = [len(before) + position - 1 for position in positions]
            logp = model.lm_head(hidden[predicts]).float().log_softmax(dim=-1)  # [N, V]
            gold = torch.tensor([example.answer[position] for position in positions])
            right += (logp.argmax(dim=-1) == gold).tolist()
            logps += logp.gather(1, gold[:, None])[:, 0].tolist()
        figures[f"hard_right{name}"] = statistics.mean(right)
        figures[f"hard_logp{name}"] = statistics.mean(logps)
    return figures


def survives(row: dict) -> bool:
    """Whether a trained model thinks: it writes traces, and they help it with the hard tokens.

    The gain must hold over the null think and over another question's trace. The null think alone
    would not do: nothing trains it, so it can drift until any trace gains over it. 0.2 nats are
    a fifth more probability on the gold token, well above what 100 rows scatter; no trace of 3
    tokens, marker included, can hold a hop.
    """
    without = max(row["hard_logp_null"], row["hard_logp_shuffled"])
    return row["eval_trace_len"] > 3 and row["hard_logp"] - without > 0.2


HOLDS = 3  # steps in a row


def first_thinking_step(log: list[dict]) -> int | None:
    """The first of HOLDS steps whose sampled traces help with the answer; None if there is none."""
    lines = [line for line in log if "trace_len_mean" in line]
    helps = [line["gain"] > 0.2 and line["trace_len_mean"] > 3 for line in lines]
    for i in range(len(helps) - HOLDS + 1):
        if all(helps[i : i + HOLDS]):
            return lines[i]["step"]
    return None


# ---- files
def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def read_examples(file: Path, count: int) -> list[Example]:
    """The first rows of a setting's data, with the tokens of its base."""
    pairs = Pairs(file, Tokenizer(file.parent / "base"))
    return [pairs[i] for i in range(len(pairs))[:count]]


def write_csv(file: Path, rows: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)))
    writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    write_text(file, text.getvalue())


def read_csv(file: Path) -> list[dict]:
    """The rows of a CSV file; none if there is no file."""
    if not file.exists():
        return []
    with open(file, newline="") as lines:
        return [{k: value_of(text) for k, text in row.items()} for row in csv.DictReader(lines)]


def value_of(text: str) -> bool | float | str | None:
    if text in ("True", "False"):
        return text == "True"
    try:
        return float(text)
    except ValueError:
        return text or None


# ---- tables
def group(rows: list[dict]) -> dict[tuple[str, str], list[dict]]:
    """(setting, method) -> its rows, one per seed."""
    found = {}
    for row in rows:
        found.setdefault((label(row), row["method"]), []).append(row)
    return found


def mean_of(rows: list[dict], name: str) -> float:
    return statistics.mean(row[name] for row in rows)


def report(rows: list[dict]) -> str:
    """Markdown: a row per method, a column per setting."""
    found = group(rows)
    settings = list(dict.fromkeys(setting for setting, _ in found))
    lines = []
    for method in dict.fromkeys(method for _, method in found):
        texts = [run_cell(found[s, method]) if (s, method) in found else "" for s in settings]
        lines.append([f"`{method}`", *texts])
    text = f"{len(rows)} runs: hard tokens right (mean ± std over seeds), trace tokens, "
    return f"{text}seeds that think at the end\n\n" + markdown(["method", *settings], lines)


def markdown(head: list[str], lines: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def run_cell(rows: list[dict]) -> str:
    right = [row["hard_right"] for row in rows]
    length = mean_of(rows, "eval_trace_len")
    think = sum(row["survives"] for row in rows)
    spread = statistics.pstdev(right)
    return f"{statistics.mean(right):.2f} ± {spread:.2f}, {length:.0f}, {think}/{len(rows)}"


# ---- the race and what came of it
OTHER_RULES = ("with listening", "earlier rule", "two features")


def compare(grid: str, rows: list[dict]) -> tuple[str, list[tuple[float, float]]]:
    """Predictions of race_settings.json against the runs there are -> text, and for each cell
    (setting, reward and flags) the step of the race and the measured one, median over seeds.

    A run thinks if it does so at its end, a cell if most of its seeds do. A race without a step
    says that it does not, undecided or not.
    """
    runs = group(rows)
    never = GRIDS[grid].steps + 1
    settings, lines, pairs = [], [], []
    for task, line in predicted(grid):
        cells = []
        for reward, step in line["race"].items():
            name = label(vars(task)), f"{reward} {line['train']}".strip()
            if name not in runs:
                continue
            thinks = [row["survives"] for row in runs[name]]
            steps = [row["thinks_from"] for row in runs[name]]
            keeps = {"the race": step is not None, "always keeps": True, "always lost": False}
            keeps |= {rule: reward in line[rule] for rule in OTHER_RULES if rule in line}
            cells.append((keeps, thinks))
            computed = never if step is None else step
            pairs.append((computed, statistics.median(s or never for s in steps)))
            shown = " ".join(f"{s:.0f}" if s else "-" for s in steps)
            right = "yes" if keeps["the race"] == most(thinks) else "no"
            share = f"{sum(thinks)}/{len(thinks)}"
            lines.append([*name, "-" if step is None else f"{step}", shown, share, right])
        settings += [cells] if cells else []
    rules = [score_of(rule, settings) for rule in settings[0][0][0]]
    parts = [
        f"{len(rows)} runs in {len(lines)} of {len(GRIDS[grid].cells)} cells, "
        f"{len(settings)} settings; intervals by bootstrap over settings; "
        "the rules: race_settings.json",
        markdown(["", "cells right", "95 %", "runs right", "95 %", "right where it keeps"], rules),
        "Spearman's correlation of the race's step and the measured one, median over seeds, never "
        f"being the latest: {spearman(*zip(*pairs, strict=True))}",
        markdown(["setting", "method", "race", "measured", "think", "race right"], lines),
    ]
    return "\n\n".join(parts), pairs


def draw_race(grid: str, pairs: list[tuple[float, float]]) -> str:
    """SVG: the race's step and the measured one, a dot per cell, larger where cells coincide."""
    steps = GRIDS[grid].steps
    left, scale = 60, 4  # pixels, a step has `scale` of them
    bottom = scale * (steps + 1) + 20
    parts = ['<rect width="100%" height="100%" fill="white"/>']
    for step in (*range(0, steps, 20), steps + 1):
        text = "never" if step > steps else step
        parts.append(f'<text x="{left + scale * step - 8}" y="{bottom + 20}">{text}</text>')
        parts.append(f'<text x="15" y="{bottom - scale * step + 4}">{text}</text>')
    parts.append(
        f'<text x="{left}" y="{bottom + 40}">right: thinking from step, by the race</text>'
    )
    parts.append(f'<text x="{left}" y="12">up: thinking from step, measured</text>')
    parts.append(f'<g transform="translate({left} {bottom}) scale({scale} -{scale})">')
    lines = f"M0 {steps + 1}V0H{steps + 1}M0 0L{steps} {steps}"
    parts.append(f'<path d="{lines}" fill="none" stroke="grey" stroke-width=".3"/>')
    for (race, measured), count in Counter(pairs).items():
        parts.append(f'<circle cx="{race}" cy="{measured:g}" r="{count**0.5:.2f}" opacity=".5"/>')
    size = f'width="{bottom + 80}" height="{bottom + 50}" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</g></svg>\n'


def most(seeds: list[bool]) -> bool:
    return 2 * sum(seeds) > len(seeds)


def score_of(rule: str, settings: list[list[tuple[dict, list[bool]]]]) -> list[str]:
    """A rule's line. settings: its cells, each what the rules said and whether the seeds think."""
    of_cells = [[said[rule] == most(seeds) for said, seeds in cells] for cells in settings]
    of_runs = [[said[rule] == s for said, seeds in cells for s in seeds] for cells in settings]
    keeps = [most(seeds) for cells in settings for said, seeds in cells if said[rule]]
    texts = [rule]
    for right in (of_cells, of_runs):
        hits, counts = ([f(setting) for setting in right] for f in (sum, len))
        low, high = bootstrap(hits, counts)
        texts += [f"{sum(hits)} of {sum(counts)}", f"{low:.0%} to {high:.0%}"]
    return [*texts, f"{sum(keeps)} of {len(keeps)}"]


def bootstrap(hits: list[int], counts: list[int], draws: int = 10_000) -> list[float]:
    """95 % interval of sum(hits) / sum(counts), drawing settings with replacement."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(hits), (draws, len(hits)), generator=generator)
    shares = torch.tensor(hits)[drawn].sum(dim=1) / torch.tensor(counts)[drawn].sum(dim=1)
    return shares.quantile(torch.tensor([0.025, 0.975])).tolist()


def spearman(a: Sequence[float], b: Sequence[float]) -> str:
    """Equal values share a rank. Without two different ones there is no correlation."""
    if min(len(set(a)), len(set(b))) < 2:
        return "-"
    ranks = [[sum((y < x) + (y <= x) for y in values) for x in values] for values in (a, b)]
    return f"{statistics.correlation(*ranks):.2f}"


# ---- figure
def draw_map(file: Path, rows: list[dict]) -> None:
    """A row per method, a column per setting. Colour: share of seeds that think at the end; text:
    hard tokens right. Both are ordered by how many cells think."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lab"  # the same rows give the same file
    import matplotlib.pyplot as plt

    found = group(rows)
    share = {cell: mean_of(seeds, "survives") for cell, seeds in found.items()}
    settings = list(dict.fromkeys(setting for setting, _ in found))
    methods = list(dict.fromkeys(method for _, method in found))
    settings.sort(key=lambda setting: -sum(share.get((setting, m), 0) for m in methods))
    methods.sort(key=lambda method: -sum(share.get((s, method), 0) for s in settings))
    figure, axes = plt.subplots(figsize=(10.5, 4.6), layout="constrained")
    picture = [[share.get((s, m), float("nan")) for s in settings] for m in methods]
    image = axes.imshow(picture, vmin=0, vmax=1, cmap="cividis", aspect="auto")
    for (y, method), (x, setting) in product(enumerate(methods), enumerate(settings)):
        if (setting, method) in found:
            text = f"{mean_of(found[setting, method], 'hard_right'):.2f}"
            color = "w" if share[setting, method] < 0.5 else "k"
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=color)
    names = [setting.replace(", ", "\n") for setting in settings]
    axes.set_xticks(range(len(settings)), names, fontsize=7)
    axes.set_yticks(range(len(methods)), methods, fontsize=8)
    axes.xaxis.tick_top()
    figure.colorbar(image, ax=axes, label="share of seeds that think", shrink=0.8)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


# ---- command
def run_grid(name: str, out: Path, jobs: int) -> int:
    """Makes the bases and the runs that are missing -> how many failed."""
    grid, file = GRIDS[name], out / f"{name}.csv"
    out.mkdir(parents=True, exist_ok=True)
    tasks = list(dict.fromkeys(task for task, _ in grid.cells))
    bases = {
        f"base {label(vars(task))}": partial(make_base, out, task)
        for task in tasks
        if not folder_of(out, task).exists()
    }
    failed = run_all(jobs, bases, "seed {seed}, lookups right {lookups_right:.2f}".format_map)
    made = [task for task in tasks if folder_of(out, task).exists()]
    rows = read_csv(file)
    finished = {(label(row), row["method"], row["seed"], row["steps"]) for row in rows}
    runs = {}  # seed by seed: a grid that is stopped early has all settings and methods
    for seed, (task, method) in product(range(grid.seeds), grid.cells):
        setting = label(vars(task))
        if task in made and (setting, method, seed, grid.steps) not in finished:
            job = partial(do_run, out, task, method, seed, grid.steps)
            runs[f"{setting}: {method}, seed {seed}"] = job

    def keep(row: dict) -> str:
        rows.append(row)
        write_csv(file, rows)
        thinks = "thinks" if row["survives"] else "does not think"
        return f"{thinks}, hard tokens {row['hard_right']:.2f} right, {row['seconds']} s"

    return failed + run_all(jobs, runs, keep)


def write_report(path: Path) -> None:
    """path.csv -> path.md, printed too, and path.svg (without predictions: by matplotlib)."""
    rows = read_csv(path.with_suffix(".csv"))
    if not rows:
        print("no finished runs")
        return
    if path.name in read_json(RACE):
        text, pairs = compare(path.name, rows)
        path.with_suffix(".svg").write_text(draw_race(path.name, pairs))
    else:
        text = report(rows)
        if find_spec("matplotlib"):
            draw_map(path.with_suffix(".svg"), rows)
    path.with_suffix(".md").write_text(text + "\n")
    print(text)


@exit_on_bad_input
def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--grid", choices=list(GRIDS), default="quick")
    parser.add_argument("--quick", action="store_true", help="the same as --grid quick")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "lab")
    parser.add_argument("--report", action="store_true", help="no new runs: the tables so far")
    args = parser.parse_args()
    name, out = "quick" if args.quick else args.grid, args.out.resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the child processes as well
    torch.set_num_threads(1)
    failed = 0 if args.report else run_grid(name, out, args.jobs)
    write_report(out / name)
    if failed:
        sys.exit(f"{failed} failed; the same command runs them again")


if __name__ == "__main__":
    main()
