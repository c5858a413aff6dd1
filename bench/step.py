"""Cost of one training step: ours beside the usual recipe, which repeats the prompt K times.

    python bench/step.py --model DIR                              ours and dense
    python bench/step.py --model DIR --peer dense transformers    the transformers library as well
    python bench/step.py --model DIR --only dense                 one contender alone
    python bench/step.py --sweep                                  ours as K, prompt, trace grow
    --json: one JSON object as the last line;  --save: writes it to bench/results/

bench/recipes.py holds the contenders and counts the tokens that each feeds to its model.

    peak_mb, loaded_mb    measured first, in a process per contender; loaded_mb is held before the
                          step: parameters, moments and, on a CPU, Python and its libraries
    gradient_difference   |peer - ours| / |ours|, fp32 parameters, equal traces of one question
    *_s                   seconds: medians over rounds in which the contenders take turns, after
                          one step each to warm up; score_update_s is total_s without sample_s
    --sweep               factors by which the figures grow from one end of an axis to the other;
                          tokens_prompt_once is P + K (n + T), tokens_prompt_repeated K (P + n + T)
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import machine
from bench.recipes import (
    CONTENDERS,
    Learner,
    Work,
    gradient_differences,
    load_native,
    make_work,
    unfinished,
)
from model import KEEP
from support.errors import InputError, OneLineParser, TrainingError, exit_on_bad_input
from support.weights import read_config
from train import update

COUNTS = {  # flag: default, least value, meaning
    "questions": (4, 1, "B, questions a step"),
    "traces": (8, 2, "K, traces a question; an advantage compares at least two"),
    "prompt": (96, 1, "P, tokens of a prompt"),
    "new": (64, 1, "n, tokens of a trace"),
    "answer": (48, 1, "T, tokens of an answer"),
    "rounds": (3, 1, "timed steps of each contender"),
    "seed": (0, 0, "of the random tokens"),
}
LENGTHS = ("questions", "traces", "prompt", "new", "answer")
COLUMNS = (
    *("sample_s", "old_logp_s", "null_s", "score_s", "update_s", "score_update_s", "total_s"),
    *("tokens_per_s", "peak_mb", "loaded_mb", "gradient_difference"),
)
RATIOS = ("sample_s", "score_update_s", "total_s", "peak_mb")
SWEEP = {"traces": (2, 32), "prompt": (64, 2048), "new": (32, 512)}
GROWTH = ("sample_s", "score_update_s", "total_s", "tokens_prompt_once", "tokens_prompt_repeated")


# ---- one measurement ----
def step(name: str, learner: Learner, work: Work) -> dict[str, float]:
    """One training step of a contender -> seconds of its parts."""
    contender = CONTENDERS[name]
    args = work.args
    laps = machine.Laps()
    groups = contender.sample(learner.policy, work)
    laps.lap("sample")
    contender.gradient(learner.policy, work, unfinished(groups, args), laps)
    norm = update(learner.model, learner.optimizer, args.lr, args.grad_clip)
    laps.lap("update")
    if not math.isfinite(norm):
        raise TrainingError(f"{name}: the gradient norm is {norm}, so no update was timed")
    total = sum(laps.seconds.values())
    parts = {f"{part}_s": seconds for part, seconds in laps.seconds.items()}
    return parts | {"score_update_s": total - parts["sample_s"], "total_s": total}


def memory(name: str, work: Work) -> dict[str, float]:
    """MB of one step, for a process that has done nothing else before."""
    learner = CONTENDERS[name].load(work.args)
    loaded = machine.held_mb(work.args.device)
    step(name, learner, work)
    return {"loaded_mb": loaded, "peak_mb": machine.peak_mb(work.args.device)}


# ---- rounds ----
def interleaved(jobs: list[tuple[str, Learner, Work]], rounds: int) -> list[list[dict]]:
    """`rounds` timed steps of every job, the jobs in turns, after one step each to warm up."""
    times: list[list[dict]] = [[] for _ in jobs]
    for index in range(rounds + 1):
        machine.say(f"round {index} of {rounds}" if index else "warm-up")
        for timed, job in zip(times, jobs, strict=True):
            timed.append(step(*job))
    return [timed[1:] for timed in times]


def medians(timed: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(parts[key] for parts in timed) for key in timed[0]}


def measure(names: list[str], work: Work, rounds: int) -> tuple[dict, dict, list[dict]]:
    """-> figures by contender, peers' figures divided by ours, seconds of every timed step."""
    figures: dict[str, dict] = {}
    spawn = multiprocessing.get_context("spawn")
    for name in names:
        machine.say(f"memory: {name}")
        try:
            with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as process:
                figures[name] = process.submit(memory, name, work).result()
        except RuntimeError as error:  # no memory, or no finite gradient: the others go on
            figures[name] = {"note": " ".join(str(error).split())[:100]}

    loaded: dict[Callable, Learner] = {}
    learners: dict[str, Learner] = {}
    for name in names:
        load = CONTENDERS[name].load
        if "note" not in figures[name]:
            loaded[load] = loaded.get(load) or load(work.args)
            learners[name] = loaded[load]
    if "ours" in learners:
        for name, value in gradient_differences(learners, work).items():
            figures[name]["gradient_difference"] = value

    rows = []
    ratios = {}
    tokens = work.args.questions * work.args.traces * work.args.max_trace
    jobs = [(name, learner, work) for name, learner in learners.items()]
    for name, timed in zip(learners, interleaved(jobs, rounds), strict=True):
        figures[name] |= medians(timed)
        figures[name]["tokens_per_s"] = tokens / figures[name]["total_s"]
        rows += [{"name": name, "round": i + 1} | parts for i, parts in enumerate(timed)]
        if name != "ours" and "ours" in learners:
            ratios[name] = {key: figures[name][key] / figures["ours"][key] for key in RATIOS}
    return figures, ratios, rows


# ---- the sweep ----
def sweep(flags: argparse.Namespace, vocab: int, axes: dict[str, tuple[int, int]]) -> list[dict]:
    """Ours at both ends of every axis, the other counts as the flags say -> a row each."""
    learner = load_native(make_work(flags, vocab).args)
    rows = []
    jobs = []
    for axis, ends in axes.items():
        for value in ends:
            point = argparse.Namespace(**vars(flags) | {axis: value})
            jobs.append(("ours", learner, make_work(point, vocab)))
            row = {"axis": axis} | {key: getattr(point, key) for key in LENGTHS}
            after = row["new"] + row["answer"]  # tokens of a trace and its answer
            once = row["prompt"] + row["traces"] * after
            repeated = row["traces"] * (row["prompt"] + after)
            row["tokens_prompt_once"] = row["questions"] * once
            row["tokens_prompt_repeated"] = row["questions"] * repeated
            rows.append(row)
    times = interleaved(jobs, flags.rounds)
    return [row | medians(timed) for row, timed in zip(rows, times, strict=True)]


def growth(rows: list[dict]) -> dict[str, dict]:
    """Times and token counts at an axis' second end, divided by those at its first."""
    grown = {}
    for first, last in zip(rows[::2], rows[1::2], strict=True):
        axis = first["axis"]
        label = f"{axis} {first[axis]} to {last[axis]}"
        grown[label] = {key: last[key] / first[key] for key in GROWTH}
    return grown


# ---- the command ----
def table(columns: tuple[str, ...], rows: dict[str, dict]) -> list[str]:
    lines = [" " * 20 + "".join(f"  {key:>8s}" for key in columns)]
    for name, row in rows.items():
        cells = [f"{name:20s}"]
        for key in columns:
            value = row.get(key)
            digits = ".0f" if value and value >= 100 else ".3g"
            text = "-" if value is None else format(value, digits)
            cells.append(f"  {text:>{max(8, len(key))}s}")
        lines.append("".join(cells) + f"  {row.get('note', '')}".rstrip())
    return lines


def parse(argv: list[str]) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=raw)
    base = str(machine.ROOT / "examples/hops/base")
    parser.add_argument("--model", default=base, help="Hugging Face directory")
    for name, (default, _, text) in COUNTS.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} ({default})")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    peers = ["none", "dense", "transformers"]
    parser.add_argument("--peer", nargs="+", choices=peers, default=["dense"], help="beside ours")
    parser.add_argument("--only", choices=list(CONTENDERS), help="this contender alone")
    parser.add_argument("--sweep", action="store_true", help="ours alone, growing")
    text = "of ours, as in train.py"
    parser.add_argument("--activation-checkpointing", choices=list(KEEP), default="none", help=text)
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    parser.add_argument("--save", action="store_true", help="write it to bench/results/")
    flags = parser.parse_args(argv)
    for name, (_, least, _) in COUNTS.items():
        machine.check_least(f"--{name}", getattr(flags, name), least)
    if "none" in flags.peer and len(flags.peer) > 1:
        raise InputError(f"--peer {' '.join(flags.peer)}: none goes alone")
    if flags.sweep and flags.only not in (None, "ours"):
        raise InputError(f"--sweep --only {flags.only}: the sweep measures ours alone")
    if "transformers" in (flags.only, *flags.peer) and not find_spec("transformers"):
        raise InputError("transformers is not installed here; --peer dense needs no library")
    flags.device = machine.check_device(flags.device)
    return flags


def main() -> None:
    flags = parse(sys.argv[1:])
    vocab = read_config(flags.model).vocab_size
    model_name = Path(flags.model).resolve().name
    names = ["ours", *dict.fromkeys(peer for peer in flags.peer if peer != "none")]
    names = [flags.only] if flags.only else names
    result = machine.circumstances(flags.device, *names)  # the version of "transformers", if any
    result |= {"command": machine.recorded_command("step.py", flags.model), "model": model_name}
    for key in (*LENGTHS, "dtype", "rounds"):
        result[key] = getattr(flags, key)
    if flags.sweep:
        result["rows"] = sweep(flags, vocab, SWEEP)
        lines = table(GROWTH, growth(result["rows"]))
    else:
        try:
            figures, ratios, rows = measure(names, make_work(flags, vocab), flags.rounds)
        except torch.OutOfMemoryError:
            text = "the contenders do not fit in memory together; measure each with --only"
            raise TrainingError(text) from None
        shown = figures | {f"{name} / ours": ratios[name] for name in ratios}
        lines = table(COLUMNS, shown)
        result |= figures.pop("ours", {})  # ours stands at the top level
        result |= figures | {"ratios": ratios, "rows": rows}
    print(machine.headline(result))
    lengths = f"prompt {flags.prompt}, trace {flags.new}, answer {flags.answer}"
    print(f"{model_name}, {flags.dtype}: {flags.questions} questions x {flags.traces}, {lengths}")
    print("\n".join(lines))
    if flags.save:
        tag = "sweep" if flags.sweep else f"prompt-{flags.prompt}"
        path = machine.save("step", result, model_name, flags.dtype, tag)
        print(f"wrote {path.relative_to(machine.ROOT)}")
    if flags.json:
        print(json.dumps(result))


if __name__ == "__main__":
    exit_on_bad_input(main)()
