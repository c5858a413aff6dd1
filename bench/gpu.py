"""Everything that is to be measured on one GPU, in one command of at most nine minutes.

    TMPDIR=/dev/shm python bench/gpu.py --out DIR
    ... --only "decode 1B" "decode 8B"          these sections alone
    python bench/gpu.py --dry-run               the same list on a CPU, with tiny sizes

CHECKS run side by side, then TIMINGS one after the other, in order of value. Each section is a
process with a time limit of its own; one that fails or takes too long stops no other, and when the
nine minutes are over the rest is not started. DIR/gpu.json has what every section printed and its
JSON object, DIR/gpu.log all of their output; both are complete after every section. One table is
printed last. Nothing is downloaded: models have random weights. TMPDIR: 3 GB for two of them, where
writing is fast.

What was measured so far, and what it decided: EXPERIMENTS.md.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import machine
from support.errors import OneLineParser, exit_on_bad_input, require

TOTAL = 540  # seconds

# Name, limit in seconds, lines in the table, arguments of python: one command, or several in turn.
Section = tuple[str, int, int, list[str]]
TRAIN = "train.py --device {device} {few}"
RESUMED = [
    TRAIN + " --dtype bfloat16 --steps 3 --out {work}/r",
    "train.py --resume --out {work}/r --steps 4",
]
MODELS = [
    "bench/make_model.py --shape {1b} --out {work}/1b",
    "bench/make_model.py --shape {135m} --out {work}/135m",
]
CHECKS: list[Section] = [
    ("tests", 150, 4, ["{pytest} tests/test_device.py tests/test_sample.py tests/test_logprob.py"]),
    ("train, resume", 100, 4, RESUMED),
    ("models", 60, 2, MODELS),
]
TIMINGS: list[Section] = [
    ("step 1B", 80, 6, ["bench/step.py --json --model {work}/1b --peer {peer} {step}"]),
    ("decode 1B", 40, 8, ["bench/sample.py --json --model {1b} {rows}"]),
    ("decode 8B", 60, 8, ["bench/sample.py --json --model {8b} {rows}"]),
    ("head 8B", 80, 30, ["bench/logprob.py --json {head}"]),
    ("step 135M", 120, 6, ["bench/step.py --json --model {work}/135m --peer {peer} {step_135m}"]),
    ("hops", 80, 3, [TRAIN + " --steps {steps} --out {work}/hops"]),
    ("head 1B", 60, 30, ["bench/logprob.py --json {head_1b}"]),
]
HEAD_ON_CPU = "--shape 8 64 512 --rounds 1"
ROWS_ON_CPU = "--rows 1 2 --new 4 --rounds 1 --dtype float32"
STEP_ON_CPU = "--questions 1 --traces 2 --prompt 8 --new 4 --answer 4 --rounds 1"
# The words in a command: on a GPU, in a dry run.
WORDS = {
    "device": ("cuda", "cpu"),
    "pytest": ("-m pytest" + " -n 8" * bool(find_spec("xdist")), "-m pytest --collect-only"),
    "few": ("", "--questions 2 --traces 2 --eval-questions 2 --max-trace 4"),
    "steps": ("30", "2"),
    "1b": ("llama-3.2-1b", "tiny"),
    "8b": ("llama-3.1-8b", "tiny"),
    "135m": ("smollm2-135m", "tiny"),
    "rows": ("--rows 64 256 --new 256 --rounds 2", ROWS_ON_CPU),
    "head": ("--shape 16384 4096 128256 --rounds 5", HEAD_ON_CPU),
    "head_1b": ("--shape 16384 2048 128256 --rounds 5", HEAD_ON_CPU),
    "step": ("--prompt 512 --new 128 --rounds 2", STEP_ON_CPU),
    "step_135m": ("--prompt 96 --new 64 --rounds 3", STEP_ON_CPU),
    "peer": ("transformers" if find_spec("transformers") else "dense", "dense"),
}


def run(section: Section, limit: float, words: dict[str, str]) -> tuple[dict, str]:
    """One section -> its row: name, commands, outcome, seconds, last lines; all that it printed."""
    name, _, lines, commands = section
    began = time.monotonic()
    row = {"name": name, "commands": [each.format(**words | {"work": "WORK"}) for each in commands]}
    printed, output = "", ""
    for command in commands:
        left = limit - (time.monotonic() - began)
        row["outcome"], out, errors = run_command(command.format(**words), left)
        printed += out
        output += f"\n==== {name}: python {command}\n{errors}{out}"
        if row["outcome"] != "ok":
            printed += "\n".join(errors.splitlines()[-3:])
            break
    row["seconds"] = round(time.monotonic() - began, 1)
    shown = printed.splitlines()
    if row["outcome"] == "ok" and shown and shown[-1].startswith("{"):
        row["result"] = json.loads(shown.pop())
    return row | {"printed": [line[:200] for line in shown[-lines:]]}, output


def run_command(command: str, limit: float) -> tuple[str, str, str]:
    """-> outcome, what it printed to stdout and to stderr."""
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command)],
            cwd=machine.ROOT,
            stdout=printed,
            stderr=errors,
            start_new_session=True,  # a group of its own, to end it with all of its children
        )
        try:
            code = process.wait(limit)
            outcome = f"failed: {code}" if code else "ok"
        except subprocess.TimeoutExpired:
            outcome = f"over {limit:.0f} s"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass  # all have ended
            process.wait()
        printed.seek(0)
        errors.seek(0)
        return outcome, printed.read(), errors.read()


def run_all(groups: list[list[Section]], total: float, words: dict[str, str], out: Path) -> bool:
    """Runs the sections, those of a group side by side; writes gpu.json and gpu.log -> all ok?"""
    began = time.monotonic()
    result = machine.circumstances(words["device"], "triton", "transformers") | {"sections": []}
    rows = result["sections"]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    with tempfile.TemporaryDirectory() as work, ThreadPoolExecutor() as pool:
        words = words | {"work": work}
        for group in groups:
            left = total - (time.monotonic() - began)
            print(f"{', '.join(row[0] for row in group)}: {left:.0f} s left", file=sys.stderr)
            if left < 1:
                rows += [{"name": section[0], "outcome": "no time left"} for section in group]
                continue
            futures = [pool.submit(run, one, min(one[1], left), words) for one in group]
            for future in as_completed(futures):
                row, output = future.result()
                rows.append(row)
                with log.open("a") as file:
                    file.write(output)
                (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{machine.headline(result)}; {time.monotonic() - began:.0f} s")
    for row in rows:
        print(f"---- {row['name']}: {row['outcome']}, {row.get('seconds', 0)} s")
        print("\n".join(row.get("printed", [])))
    return all(row["outcome"] == "ok" for row in rows)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of results")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="not all, but these")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    flags = parser.parse_args()
    here = torch.cuda.is_available() or flags.dry_run
    require(here, "there is no GPU here; --dry-run takes tiny sizes and a CPU")
    names = [section[0] for section in CHECKS + TIMINGS]
    for name in flags.only or []:
        require(name in names, f"--only {name}: should be one of {names}")
    if flags.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the sections
    patience = 10 if flags.dry_run else 1  # a busy CPU is no failure
    groups = []
    for group in (CHECKS, *([section] for section in TIMINGS)):
        chosen = [one for one in group if not flags.only or one[0] in flags.only]
        groups.append([(name, patience * limit, *rest) for name, limit, *rest in chosen])
    words = {word: values[flags.dry_run] for word, values in WORDS.items()}
    sys.exit(not run_all([group for group in groups if group], patience * TOTAL, words, flags.out))


if __name__ == "__main__":
    exit_on_bad_input(main)()
