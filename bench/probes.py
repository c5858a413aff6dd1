"""What a device does with our code: limits, attention kernels, first calls, profiles, a resume.

    python bench/probes.py limits                   bandwidth, matrix products, memory, versions
    python bench/probes.py attention --model DIR    which attention kernel every shape gets
    python bench/probes.py first --model DIR        the first against the second call on a new shape
    python bench/probes.py profile --model DIR      kernels of a decode step, of training a question
    python bench/probes.py resume                   a run killed and resumed: are its losses equal?

The flags are those of bench/step.py (--questions, --traces, --prompt, --new, --answer, --dtype,
--device). The last line is one JSON object. `attention` and `first` measure with cuDNN's attention
and without: PyTorch prefers it on Hopper, and it builds a plan for every new shape.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import machine, step
from bench.recipes import (
    Learner,
    Work,
    gradient_ours,
    load_native,
    make_work,
    sample_ours,
    unfinished,
)
from bench.sample import bandwidth, products
from support.errors import InputError, TrainingError, exit_on_bad_input
from support.weights import read_config

PACKAGES = ("numpy", "triton", "transformers", "liger-kernel", "quack-kernels", "pytest")
SHOWN = 12  # kernels of a profile
DECODE = (16, 48)  # tokens of two runs: multiples of the steps between two looks for ended rows
NEW_LENGTHS = 2  # prompts of a length that was not seen before
# The forward passes of attention, under the names that the profiler has for them.
ATTENTION = ("_flash_attention_forward", "_efficient_attention_forward", "_cudnn_attention")
ATTENTION += ("_attention_math", "_flash_attention_for_cpu", "_attention_overrideable")


# ---- limits
def limits(flags: argparse.Namespace) -> dict:
    device = flags.device
    found = {
        "bandwidth_gb_s": bandwidth(device) / 1e9,
        "matmul_tflop_s": products(device, torch.bfloat16) / 1e12,
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gb": properties.total_memory / 1e9,
            "multiprocessors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


# ---- what our code runs: the parts of bench/step.py
def load(flags: argparse.Namespace) -> tuple[Learner, Work]:
    work = make_work(flags, read_config(flags.model).vocab_size)
    return load_native(work.args), work


def train_question(learner: Learner, work: Work, groups: list) -> None:
    gradient_ours(learner.policy, work, groups, machine.Laps())
    learner.optimizer.zero_grad()


def profiled(run: Callable[[], object], device: str, shapes: bool = False) -> profile:
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device == "cuda" else []
    with profile(activities=activities, record_shapes=shapes) as record:
        run()
        machine.now()
    return record


# ---- which attention kernel
def attention(flags: argparse.Namespace) -> dict:
    """A row per kernel: its calls, the number of shapes, and of one of them those of q and k."""
    learner, work = load(flags)
    rows = []
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        groups = unfinished(sample_ours(learner.policy, work), work.args)
        parts = {
            "sampling": lambda: sample_ours(learner.policy, work),
            "training": lambda groups=groups: train_question(learner, work, groups),
        }
        for part, run in parts.items():
            kernels = attention_kernels(profiled(run, flags.device, shapes=True))
            rows += [{"cudnn": cudnn, "part": part} | row for row in kernels]
    return {"rows": rows}


def attention_kernels(record: profile) -> list[dict]:
    found: dict[str, dict] = {}
    for event in record.key_averages(group_by_input_shape=True):
        if event.key.endswith(ATTENTION):
            row = found.setdefault(
                event.key, {"kernel": event.key.removeprefix("aten::"), "calls": 0, "shapes": 0}
            )
            row["calls"] += event.count
            row["shapes"] += 1
            row["q"], row["k"] = event.input_shapes[:2]
    return list(found.values())


# ---- the first call on a new shape
def first(flags: argparse.Namespace) -> dict:
    """Seconds of the first and the second call, for prompts of lengths that were not seen yet."""
    learner, work = load(flags)
    rows = []
    for cudnn in (True, False):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        for i in range(NEW_LENGTHS + 1):
            longer = argparse.Namespace(**vars(flags) | {"prompt": flags.prompt + 17 * len(rows)})
            work = make_work(longer, read_config(flags.model).vocab_size)
            row = {"cudnn": cudnn, "prompt": longer.prompt, "warm_up": i == 0}
            for call in ("first", "second"):
                laps = machine.Laps()
                groups = unfinished(sample_ours(learner.policy, work), work.args)
                laps.lap("sample")
                train_question(learner, work, groups)
                laps.lap("train")
                row |= {f"{part}_{call}_s": seconds for part, seconds in laps.seconds.items()}
            rows.append(row)
    return {"rows": rows}


# ---- profiles
def profile_ours(flags: argparse.Namespace) -> dict:
    """The kernels that take most of a decode step, and of training one question.

    A decode step is the difference of two runs, by the number of tokens: the prefill drops out.
    On a CPU the operations of PyTorch stand for kernels.
    """
    learner, work = load(flags)
    rows = []
    counted = []
    for tokens in DECODE:
        work.args.max_trace = tokens
        sample_ours(learner.policy, work)  # compiles, records graphs
        run = profiled(lambda: sample_ours(learner.policy, work), flags.device)
        counted.append(kernels(run, flags.device))
    less, more = counted
    decode = {}
    for name, (calls, ms) in more.items():
        calls_before, ms_before = less.get(name, (0, 0.0))
        steps = DECODE[1] - DECODE[0]
        decode[name] = ((calls - calls_before) / steps, (ms - ms_before) / steps)
    rows += longest("decode step", decode)

    work.args.max_trace = flags.new
    work.examples = work.examples[:1]
    groups = unfinished(sample_ours(learner.policy, work), work.args)
    train_question(learner, work, groups)
    run = profiled(lambda: train_question(learner, work, groups), flags.device)
    rows += longest("train a question", kernels(run, flags.device))
    return {"rows": rows}


def kernels(record: profile, device: str) -> dict[str, tuple[float, float]]:
    """Name -> calls, milliseconds."""
    found = {}
    for event in record.key_averages():
        if device == "cuda" and event.device_type == DeviceType.CUDA:
            found[event.key] = (event.count, event.self_device_time_total / 1e3)
        elif device == "cpu":
            found[event.key] = (event.count, event.self_cpu_time_total / 1e3)
    return found


def longest(part: str, found: dict[str, tuple[float, float]]) -> list[dict]:
    """A row for the sum, and one for each of the kernels that take longest."""
    calls = sum(calls for calls, _ in found.values())
    ms = sum(ms for _, ms in found.values())
    rows = [{"part": part, "kernel": "all", "calls": calls, "ms": ms}]
    names = sorted(found, key=lambda name: found[name][1], reverse=True)
    for name in names[:SHOWN]:
        calls, ms = found[name]
        rows.append({"part": part, "kernel": name[:48], "calls": calls, "ms": ms})
    return rows


# ---- a run that is killed and resumed
STEPS, SAVED, KILLED = 20, 10, 14  # the last step, the checkpoint, the log line that is waited for
BOUND = 1e-5  # relative, of the first step after the checkpoint: same parameters, same traces


def resume(flags: argparse.Namespace) -> dict:
    """Losses of the steps between a checkpoint and a kill, before and after the resume.

    Later steps differ where a backward pass sums in another order than the last time: then a
    sampled token may differ, and with it the rest. So the bound is that of the first step.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "run/log.jsonl"
        run = f"train.py --steps {STEPS} --save-every {SAVED} --eval-data= --out {log.parent} "
        run += f"--questions {flags.questions} --traces {flags.traces} --max-trace {flags.new} "
        run += f"--device {flags.device}"
        command = [sys.executable, *run.split()]
        killed = subprocess.Popen(command, cwd=machine.ROOT, stdout=sys.stderr)
        while killed.poll() is None and len(losses(log)) < KILLED:
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        before = losses(log)
        subprocess.run([*command, "--resume"], cwd=machine.ROOT, stdout=sys.stderr, check=True)
        after = losses(log)
    repeated = [number for number in before if number > SAVED]
    if not repeated or len(before) == STEPS or len(after) != STEPS:
        raise TrainingError(f"killed after step {len(before)}, ended at {len(after)}")
    apart = [difference(before[number], after[number]) for number in repeated]
    if apart[0] > BOUND:
        raise TrainingError(f"step {repeated[0]} differs by {apart[0]:.1e} after the resume")
    equal = sum(value == 0 for value in apart)
    found = {"steps": len(repeated), "bit_equal": equal, "first": apart[0], "largest": max(apart)}
    return found | {"bound": BOUND}


def losses(log: Path) -> dict[int, float]:
    """Step -> loss; a line that a kill cut off does not count."""
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return {record["step"]: record["loss"] for record in records}


def difference(a: float, b: float) -> float:
    return 0.0 if a == b else abs(a - b) / max(abs(a), abs(b))


# ---- the command
PROBES = {
    "limits": limits,
    "attention": attention,
    "first": first,
    "profile": profile_ours,
    "resume": resume,
}


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("", "-h", "--help"):
        return print(__doc__)
    if name not in PROBES:
        raise InputError(f"{name}: no such probe; {', '.join(PROBES)} are")
    flags = step.parse(sys.argv[2:])
    result = machine.circumstances(flags.device, *PACKAGES)
    result |= PROBES[name](flags)
    print(json.dumps(result))


if __name__ == "__main__":
    exit_on_bad_input(main)()
