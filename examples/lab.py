"""The laboratory: where does thinking survive? A grid of short runs on variants of examples/hops.

A cell of a grid is a setting of examples/hops/make.py, a method (flags of train.py) and a seed.
Every cell is a run of its own, `python train.py ...` in a child process:

    runs/lab/bases/SETTING/                  data and base, made on demand; base.json, before.json
    runs/lab/SETTING/METHOD-sSEED-N-steps/   log.jsonl, final/; result.json is written last
    runs/lab/GRID.csv                        one row per run, from the last line of its log
    runs/lab/GRID-before.csv                 before training: one row per setting and method
    runs/lab/GRID.md, GRID.svg               the table and the figure (lab_report.py)

A run that has its result.json is not run again: a lab that was stopped goes on where it was, and
two grids share their common runs. A half-finished run starts again from its beginning.

    python examples/lab.py --quick           minutes: arithmetic_mean (RLPR) stops thinking where
                                             the answer has an easy part, and only there
    python examples/lab.py --grid map        9 aggregators and the baselines over 12 settings
    python examples/lab.py --grid long       300 steps of the methods that stop thinking
    python examples/lab.py --grid remedies   the flags that could keep them thinking

Exact match of the whole answer is 0 for every method where the answer holds unpredictable tokens,
so the lab scores the hard tokens by themselves. All seeds of a setting share its base and data.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from aggregate import AGGREGATORS  # noqa: E402
from examples import lab_measure as measure  # noqa: E402
from examples.hops.make import Task  # noqa: E402
from examples.lab_report import AXES, write_csv, write_report  # noqa: E402

# ---- methods
METHODS = {name: f"--aggregator {name}" for name in AGGREGATORS}  # name -> flags of train.py
# RLVR as its authors run it: the reward trains the trace alone.
METHODS["exact_match"] += " --answer-weight none"
METHODS["sft"] = "--traces 0"
# SFT on answers that follow traces of the initial model: the data is in_context.jsonl.
METHODS["sft_in_context"] = "--traces 0"

COLLAPSING = ("log_prob", "prob", "geometric_mean", "arithmetic_mean", "info_gain", "jlb_multi")
# The null think matters to these methods only where the reward is clipped at it.
REMEDIES = (
    "--answer-weight exact",
    "--answer-weight none",
    "--null-loss 0.1",
    "--scale none",
    "--center loo",
    "--clip-null",
    "--clip-null --null frozen",
)
REMEDIED = ("arithmetic_mean", "log_prob", "prob")
METHODS |= {
    f"{aggregator} {remedy}": f"--aggregator {aggregator} {remedy}"
    for aggregator in REMEDIED
    for remedy in REMEDIES
}
BASELINES = ("exact_match", "sft", "sft_in_context")
VERIFREE = "prob --scale none"  # as its authors run it


# ---- grids
@dataclass(frozen=True)
class Grid:
    tasks: tuple[Task, ...]
    methods: tuple[str, ...]
    seeds: int
    steps: int


@dataclass(frozen=True)
class Run:
    task: Task
    method: str
    seed: int
    steps: int


CONTROL = Task(easy=0)  # without an easy part no trace costs anything
COSTLY = Task(easy=32, sloppy=0.3)
GRIDS = {
    "quick": Grid(
        tasks=(CONTROL, COSTLY),
        methods=("weighted_sum_log_prob", "arithmetic_mean", "sft"),
        seeds=2,
        steps=40,
    ),
    "map": Grid(
        tasks=(
            CONTROL,
            *(Task(easy=8, sloppy=sloppy) for sloppy in (0.0, 0.3)),
            *(Task(easy=32, sloppy=sloppy) for sloppy in (0.0, 0.1, 0.3)),
            *(Task(easy=easy, noise=noise) for easy in (0, 32) for noise in (4, 16)),
            replace(COSTLY, hard=3),
            Task(easy=128, sloppy=0.3),
        ),
        methods=(*AGGREGATORS, "sft", "sft_in_context"),
        seeds=3,
        steps=60,
    ),
    "long": Grid(
        tasks=(COSTLY,),
        methods=(*COLLAPSING, VERIFREE),
        seeds=5,
        steps=300,
    ),
    "remedies": Grid(
        tasks=(COSTLY,),
        methods=(*(name for name in METHODS if name.startswith(REMEDIED)), *BASELINES),
        seeds=3,
        steps=60,
    ),
}


def cells(grid: Grid) -> list[Run]:
    """All runs, seed by seed: a grid that is stopped early has all settings and methods."""
    return [
        Run(task, method, seed, grid.steps)
        for seed in range(grid.seeds)
        for task in grid.tasks
        for method in grid.methods
    ]


def setting_name(task: Task) -> str:
    """The axes that differ from Task(), after the two that always count."""
    changed = asdict(task).items() - asdict(Task()).items() - {("easy", task.easy)}
    named = [f"{name}{value}" for name, value in sorted(changed) if name != "sloppy"]
    return "-".join([f"easy{task.easy}", f"sloppy{task.sloppy}", *named])


def base_folder(out: Path, task: Task) -> Path:
    return out / "bases" / setting_name(task)


def run_folder(out: Path, run: Run) -> Path:
    method = run.method.replace(" --", "--").replace(" ", "-")
    name = f"{method}-s{run.seed}-{run.steps}-steps"
    return out / setting_name(run.task) / name


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


def run_all(jobs: int, work: dict[str, Callable[[], str]]) -> int:
    """Runs all of `work` (name -> function that returns a line to print), `jobs` at a time.

    -> how many failed. Ctrl-C ends the child processes.
    """
    began, failed = time.monotonic(), 0
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(function): name for name, function in work.items()}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                if future.exception() is None:
                    text = future.result()
                else:
                    failed += 1
                    text = f"FAILED: {future.exception()}"
                left = len(work) - done
                minutes = (time.monotonic() - began) / done * left / 60
                running = min(jobs, left)
                count = f"{done} done, {running} running, {left - running} waiting"
                print(f"[{count}, {minutes:.0f} min left]  {futures[future]}  {text}", flush=True)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(CHILDREN):
                child.terminate()
            raise
    return failed


# ---- data and bases
BASE_SEEDS = 3
QUESTIONS_BEFORE = 96  # whose traces are compared before training
LOOKUPS_RIGHT = 0.9  # of a base that keeps lookups: 1.0, of one that lost them: 0.24


def make_base(out: Path, task: Task, methods: tuple[str, ...]) -> str:
    """Data, base and what is measured before training of the methods, in out/bases/SETTING.

    Some bases unlearn lookups on the mix of documents. Such a one cannot work a question out, so
    no reward could make it think; another seed takes its place.
    """
    folder = base_folder(out, task)
    for seed in range(task.seed, task.seed + BASE_SEEDS):
        if folder.exists():
            break
        unfinished = folder.with_name(folder.name + ".tmp")
        shutil.rmtree(unfinished, ignore_errors=True)
        if replace(task, seed=seed) == Task():
            shutil.copytree(ROOT / "examples" / "hops", unfinished)  # the committed files
        else:
            flags = [f"--{name}={value}" for name, value in asdict(task).items()]
            run_child(["examples/hops/make.py", *flags, f"--seed={seed}", "--out", unfinished])
        lookups = measure.lookups_right(unfinished)
        if lookups > LOOKUPS_RIGHT:
            described = {"base_seed": seed, "lookups_right": lookups}
            write_whole(unfinished / "base.json", json.dumps(described))
            unfinished.rename(folder)
    if not folder.exists():
        raise RuntimeError(f"{BASE_SEEDS} bases did not learn lookups; take more steps")
    if "sft_in_context" in methods and not (folder / "in_context.jsonl").exists():
        write_whole(folder / "in_context.jsonl", measure.in_context_rows(folder))
    known = read_before(out, task)
    measured = [line["method"] for line in known]
    new = {name: METHODS[name] for name in methods if name not in measured and samples(name)}
    if new:
        data = folder / "test.jsonl"
        lines = measure.what_is_paid(folder / "base", data, task, new, QUESTIONS_BEFORE)
        write_whole(folder / "before.json", json.dumps(known + lines))
    return (folder / "base.json").read_text()


def samples(method: str) -> bool:
    return "--traces 0" not in METHODS[method]


def read_before(out: Path, task: Task) -> list[dict]:
    file = base_folder(out, task) / "before.json"
    return json.loads(file.read_text()) if file.exists() else []


def write_whole(file: Path, text: str) -> None:
    """A file that exists is complete: a kill leaves only the temporary one."""
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(text)
    temporary.replace(file)


# ---- a run
EVAL_FIGURES = ("accuracy", "accuracy_null", "gain", "gain_shuffled", "trace_len")
EVAL_QUESTIONS = 32
QUESTIONS_AFTER = 16  # whose traces are compared after training
FIGURES_AFTER = ("predictor", "signal_to_noise", "len_reward_corr")
QUESTIONS = 8  # per step, half of train.py's default: half the time, the same order of methods
WARMUP_STEPS = 3  # train.py takes a share of the steps; a long run shall begin as a short one does


def do_run(out: Path, run: Run) -> str:
    """Trains, scores the hard tokens, writes result.json -> the outcome in words."""
    folder, base = run_folder(out, run), base_folder(out, run.task)
    data = "in_context.jsonl" if run.method == "sft_in_context" else "train.jsonl"
    command = ["train.py", "--model", base / "base", "--data", base / data]
    command += ["--eval-data", base / "test.jsonl", "--eval-questions", EVAL_QUESTIONS]
    command += ["--steps", run.steps, "--eval-every", run.steps, "--save-every", run.steps]
    command += ["--questions", QUESTIONS]
    command += ["--warmup", min(1, WARMUP_STEPS / run.steps), "--seed", run.seed]
    command += ["--device", "cpu", "--out", folder, "--overwrite"]
    began = time.monotonic()
    run_child([*command, *METHODS[run.method].split()])
    log = measure.read_rows(folder / "log.jsonl")
    row = {axis: getattr(run.task, axis) for axis in AXES}
    row |= {"method": run.method, "seed": run.seed, "steps": run.steps}
    row |= {f"eval_{name}": log[-1][f"eval_{name}"] for name in EVAL_FIGURES}
    row |= measure.hard_tokens(folder / "final", base / "test.jsonl")
    row["survives"] = measure.survives(row)
    row |= after(out, run)
    row["thinks_from"] = measure.first_thinking_step(log)
    signs = [text.split(":")[0] for line in log for text in line.get("warnings", [])]
    row["warnings"] = " ".join(signs)
    row["seconds"] = round(time.monotonic() - began)
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    write_whole(folder / "result.json", json.dumps(row))
    outcome = "thinks" if row["survives"] else "does not think"
    return f"{outcome}, hard tokens {row['hard_right']:.2f} right, {row['seconds']} s"


def after(out: Path, run: Run) -> dict[str, float | None]:
    """What the reward pays for after training: the figures of before.json, as after_NAME."""
    names = [*FIGURES_AFTER, *(f"share_{kind}" for kind in ("hard", "easy", "noise"))]
    if not samples(run.method):
        return {f"after_{name}": None for name in names}
    (line,) = measure.what_is_paid(
        run_folder(out, run) / "final",
        base_folder(out, run.task) / "test.jsonl",
        run.task,
        {run.method: METHODS[run.method]},
        QUESTIONS_AFTER,
    )
    return {f"after_{name}": line[name] for name in names}


# ---- results
def collect(out: Path, grid: Grid) -> tuple[list[dict], list[dict]]:
    """Rows of the finished runs, and of before training for each setting and method."""
    results = [run_folder(out, run) / "result.json" for run in cells(grid)]
    runs = [json.loads(file.read_text()) for file in results if file.exists()]
    before = []
    for task in grid.tasks:
        file = base_folder(out, task) / "base.json"
        described = {axis: getattr(task, axis) for axis in AXES}
        described |= json.loads(file.read_text()) if file.exists() else {}
        for line in read_before(out, task):
            if line["method"] in grid.methods:
                before.append(described | line)
    return runs, before


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--grid", choices=list(GRIDS), default="quick")
    parser.add_argument("--quick", action="store_true", help="the same as --grid quick")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "lab")
    parser.add_argument("--report", action="store_true", help="no new runs: the tables so far")
    args = parser.parse_args()
    name = "quick" if args.quick else args.grid
    grid, out = GRIDS[name], args.out.resolve()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the child processes as well
    torch.set_num_threads(1)

    failed = 0
    if not args.report:
        out.mkdir(parents=True, exist_ok=True)
        bases = {
            f"base {setting_name(task)}": partial(make_base, out, task, grid.methods)
            for task in grid.tasks
        }
        failed += run_all(args.jobs, bases)
        runs = {
            str(run_folder(out, run).relative_to(out)): partial(do_run, out, run)
            for run in cells(grid)
            if (base_folder(out, run.task) / "base.json").exists()
            and not (run_folder(out, run) / "result.json").exists()
        }
        failed += run_all(args.jobs, runs)
    rows, before = collect(out, grid)
    write_csv(out / f"{name}.csv", rows)
    write_csv(out / f"{name}-before.csv", before)
    write_report(out / name)
    if failed:
        sys.exit(f"{failed} failed; the same command runs them again")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
