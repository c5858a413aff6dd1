"""Everything that is to be measured on a GPU, in three calls of at most eight minutes.

    python bench/gpu_day.py 1 --out DIR      probes: limits, attention kernels, tests, variants
    python bench/gpu_day.py 2 --out DIR      speed: sampling and training of 1B and 8B shapes
    python bench/gpu_day.py 3 --out DIR      record: whole runs, a kill and resume, the head's table
    python bench/gpu_day.py --dry-run        all three on a CPU, with toy sizes

A section is a process of its own with a time limit; one that fails or runs out of time does not
stop the others. When the eight minutes are over, the remaining ones are not started. Results so
far are in DIR after every section:

    day-1.json    sections: command, outcome, seconds, the JSON object that the section printed last
    day-1.log     all that the sections printed

A table of the figures that matter is printed last. No network: the models have random weights.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import machine
from support.errors import InputError, OneLineParser, exit_on_bad_input

TOTAL = 470  # seconds of a day, so that the end is within eight minutes
TABLE_LINES = 40  # of a section, at most: the table of a day stays below 12,000 characters
GRACE = 5  # seconds from SIGTERM to SIGKILL: torchrun and the laboratory stop their processes

Section = tuple[str, int, str]  # name, limit in seconds, arguments of python
TRAIN = "train.py --device {device} {batch} --out {work}"
RANK = "-m torch.distributed.run --standalone --nproc-per-node 1"
DAYS: dict[int, list[Section]] = {
    1: [  # probes
        ("limits", 40, "bench/probes.py limits"),
        ("make", 60, "bench/make_model.py {1b} --layers 2 --out {work}/1b-2"),
        ("train", 60, TRAIN + "/plain --steps 3"),
        ("nccl", 60, f"{RANK} {TRAIN}/nccl --steps 3 --dtype bfloat16"),
        ("attention", 60, "bench/probes.py attention --model {work}/1b-2 {question}"),
        ("first call", 90, "bench/probes.py first --model {work}/1b-2 {question}"),
        ("logprob tests", 150, "-m pytest tests/test_logprob.py {logprob_tests}"),
        ("cuda tests", 90, "-m pytest {cuda_tests}"),
        ("variants", 120, "bench/logprob.py --json {variants}"),
    ],
    2: [  # speed; at 8B the parameters, gradients and moments of four layers fit on a GPU
        ("make 1B", 60, "bench/make_model.py {1b} --out {work}/1b"),
        ("sample 1B", 90, "bench/sample.py --json --model {work}/1b {rows}"),
        ("step 1B", 150, "bench/step.py --json --model {work}/1b {lengths} --peer {peer}"),
        ("profile 1B", 60, "bench/probes.py profile --model {work}/1b {question}"),
        ("make 8B", 90, "bench/make_model.py {8b} --out {work}/8b"),
        ("sample 8B", 100, "bench/sample.py --json --model {work}/8b {rows}"),
        ("make 8B, 4", 60, "bench/make_model.py {8b} --layers 4 --out {work}/8b-4"),
        ("step 8B, 4", 90, "bench/step.py --json --model {work}/8b-4 {lengths} --only ours"),
        ("peer 8B, 4", 90, "bench/step.py --json --model {work}/8b-4 {lengths} --only {peer}"),
    ],
    3: [  # record
        ("hops", 60, TRAIN + "/hops --steps {steps}"),
        ("resume", 90, "bench/probes.py resume --device {device} {resumed}"),
        ("head", 130, "bench/logprob.py --json {head}"),
        ("head, few rows", 80, "bench/logprob.py --json {small_head}"),
        ("laboratory", 220, "examples/lab.py {lab} --out {work}"),
        ("head, others", 120, "bench/logprob.py --json {other_head}"),
    ],
}
KEPT = ("quick.md", "quick.csv")  # copied from {work} to --out

# The words in a command: on a GPU, in a dry run.
STEP = "--questions 1 --traces 2 --prompt 8 --new 4 --answer 4"
HEAD = "--shape 8 64 512 --rounds 1"
HEAD_ONCE = "--memory-of ours total 8 64 512"  # a CPU takes a process for each figure of memory
SIZES = {
    "device": ("cuda", "cpu"),
    "batch": ("", "--questions 2 --traces 2 --eval-questions 2"),
    "steps": ("30", "2"),
    "1b": ("--shape llama-3.2-1b", "--shape tiny"),
    "8b": ("--shape llama-3.1-8b", "--shape tiny"),
    "question": ("--questions 1 --prompt 500 --new 128", STEP),
    "resumed": ("--questions 4 --traces 4 --new 16", STEP),
    "lengths": ("--prompt 512 --new 128 --rounds 2", f"{STEP} --rounds 1"),
    "rows": (
        "--cuda-graph --rows 1 64 256 --new 256 --rounds 2",
        "--rows 1 2 --new 4 --rounds 1 --dtype float32",
    ),
    "logprob_tests": ("", "-k gpu"),
    "cuda_tests": ("tests -k 'cuda or gpu' --ignore tests/test_logprob.py", "tests/test_house.py"),
    "variants": ("--variants", HEAD_ONCE),
    "head": ("--shape 16384 4096 128256 --shape 4096 4096 128256 --rounds 5", HEAD),
    "small_head": ("--shape 1024 4096 128256 --shape 64 4096 128256 --rounds 10", HEAD_ONCE),
    "other_head": ("--shape 16384 2048 128256 --shape 1937 4096 152064 --rounds 3", HEAD_ONCE),
    "lab": ("--quick", "--report"),  # of no runs: an empty table
}

# What the table shows of a command's JSON object: its keys, or "rows" and a line per row with its
# keys.
SHOWN = {
    "bench/probes.py limits": "bandwidth_gb_s matmul_tflop_s memory_gb capability",
    "bench/probes.py attention": "rows cudnn part kernel calls shapes q k",
    "bench/probes.py first": "rows cudnn prompt warm_up sample_first_s sample_second_s "
    "train_first_s train_second_s",
    "bench/probes.py profile": "rows part calls ms kernel",
    "bench/probes.py resume": "steps bit_equal first largest bound",
    "bench/sample.py": "rows rows cuda_graph tokens_per_s step_ms bandwidth_share matmul_share",
    "bench/step.py": "total_s sample_s score_update_s peak_mb ratios transformers dense",
    "bench/logprob.py": "rows n v name mode ms of_mm peak_mb logp_error note",
}


# ---- one section
def run(name: str, command: str, limit: float, work: Path, log: Path) -> dict:
    """Runs `python command` for at most `limit` seconds -> its row; appends its output to `log`."""
    row = {"name": name, "command": f"python {command}".replace(str(work), "WORK")}
    began = time.monotonic()
    output = work / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)],
            cwd=machine.ROOT,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a group of its own, to end it with all of its children
        )
        try:
            code = process.wait(limit)
            row["outcome"] = f"failed: {code}" if code else "ok"
        except subprocess.TimeoutExpired:
            row["outcome"] = f"over {limit:.0f} s"
        finally:
            end_group(process)
    row["seconds"] = time.monotonic() - began
    text = output.read_text(errors="replace")
    with log.open("a") as file:
        file.write(f"==== {name}: {row['command']}\n{text}\n")
    return row | found_in(text)


def end_group(process: subprocess.Popen) -> None:
    """Ends what is left of a section: SIGTERM, then SIGKILL to all processes of its group."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass  # all have ended
    process.wait()


def found_in(output: str) -> dict:
    """{"result": the JSON object printed last}, or {"last_line": ...} where there is none."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("{"):
            try:
                return {"result": json.loads(line)}
            except ValueError:
                break  # cut off
    return {"last_line": lines[-1][:200] if lines else ""}


# ---- the table
def table(rows: list[dict]) -> str:
    """A line per section, and below it its figures."""
    lines = []
    for row in rows:
        lines.append(f"{row['name']:15s} {row['outcome']:12s} {row.get('seconds', 0):4.0f} s")
        if "result" not in row:
            lines[-1] += f"  {row.get('last_line', '')[:80]}".rstrip()
            continue
        result = row["result"]
        shown = [keys for script, keys in SHOWN.items() if script in row["command"]]
        first, *others = shown[0].split() if shown else result
        if first != "rows":
            figures = [f"{key} {short(result.get(key))}" for key in (first, *others)]
            lines[-1] += "  " + ", ".join(figures)
            continue
        lines.append("  " + " ".join(others))
        for line in result.get("rows", [])[:TABLE_LINES]:
            lines.append("  " + " ".join(short(line.get(key)) for key in others).rstrip())
    return "\n".join(lines)


def short(value: object) -> str:
    """Three digits of a number, without spaces."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    if isinstance(value, dict):
        inner = ",".join(f"{key}={short(item)}" for key, item in value.items())
        return "{" + inner + "}"
    return "-" if value is None else str(value).replace(" ", "")[:32]


# ---- a day
def words(dry: bool, work: Path) -> dict[str, str]:
    """What the {words} of a command stand for."""
    peer = "transformers" if find_spec("transformers") else "dense"
    sizes = {word: values[dry] for word, values in SIZES.items()}
    return sizes | {"work": str(work), "peer": peer}


def run_day(day: int, dry: bool, out: Path, sections: list[Section], total: float = TOTAL) -> int:
    """Runs the sections, writes day-N.json and day-N.log -> how many were not ok."""
    began = time.monotonic()
    device = "cpu" if dry else "cuda"
    result = machine.circumstances(device, "triton", "transformers") | {"day": day, "dry_run": dry}
    log = out / f"day-{day}.log"
    log.write_text("")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name, limit, command in sections:
            left = total - (time.monotonic() - began)
            machine.say(f"{name}, {left:.0f} s left")
            if left > 1:
                command = command.format(**words(dry, work))
                rows.append(run(name, command, min(limit, left), work, log))
            else:
                rows.append({"name": name, "outcome": "no time left"})
            text = json.dumps(result | {"sections": rows}, indent=1)
            (out / f"day-{day}.json").write_text(text + "\n")
        for file in map(work.joinpath, KEPT):
            if file.exists():
                shutil.copyfile(file, out / file.name)
    print(f"\nday {day}: {machine.headline(result)}, {time.monotonic() - began:.0f} s")
    print(table(rows), flush=True)
    return sum(row["outcome"] != "ok" for row in rows)


def parse(argv: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("day", type=int, choices=list(DAYS), nargs="?", help="default: all three")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu-day"), help="folder of results")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on a CPU")
    flags = parser.parse_args(argv)
    if not flags.dry_run:
        if flags.day is None:
            raise InputError("which day: 1, 2 or 3? Only --dry-run runs all three")
        if not torch.cuda.is_available():
            raise InputError("there is no GPU here; --dry-run takes toy sizes and a CPU")
    return flags


def main() -> None:
    flags = parse(sys.argv[1:])
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the sections: a dry run takes no GPU
    patience = 10 if flags.dry_run else 1  # a busy CPU is no failure
    failed = 0
    for day in [flags.day] if flags.day else DAYS:
        sections = [(name, patience * limit, command) for name, limit, command in DAYS[day]]
        failed += run_day(day, flags.dry_run, flags.out, sections, patience * TOTAL)
    sys.exit(failed > 0)


if __name__ == "__main__":
    exit_on_bad_input(main)()
