"""Everything that is to be measured on one GPU, in one command of at most nine minutes.

    TMPDIR=/dev/shm python bench/gpu.py --out DIR
    python bench/gpu.py --dry-run               the same list on a CPU, with tiny sizes

SECTIONS is in order of value. Each section is a process with a time limit of its own; one that
fails or takes too long stops no other, and when the nine minutes are over the rest is not started.
DIR/gpu.json has what every section printed and its JSON object, DIR/gpu.log all of their output;
both are complete after every section. One table is printed last. Nothing is downloaded: models have
random weights. TMPDIR: 3 GB for one of them, where writing is fast.

What a figure decides, written down before it is measured:

    contact      FlashAttention as model.py calls it equals fp64, and a CUDA graph draws the same
                 traces. If not: sample.CUDA_GRAPH stays off, and model.flash_takes returns False
                 until the failing case is mended.
    train,       FSDP2 and NCCL in one process in bf16, a checkpoint and its resume. If not: README
    resume       promises no GPU.
    head tests   the Triton kernels equal float64 on the device. If not: backend "auto" of
                 kernels/logprob.py becomes the plain version.
    head         "ours" below "ours, plain" in ms of fwd and total: "auto" stays Triton. Targets at
                 16384 x 4096 x 128256 in bf16 (H200): fwd 28 ms, total 110 ms.
    decode 1B    with the graph, tokens/s at 64 rows 1.1 times those without or more, and at 256
                 rows not fewer than 0.98 times: sample.CUDA_GRAPH becomes True.
    step 1B      total_s and peak_mb, transformers / ours, go into README as they are. Below 1:
                 profile the slower part before anything else is built.
    decode 8B    bandwidth_share at 64 rows below 0.5: profile a decode step.
    variants     the configuration of least total ms becomes HOPPER of kernels/logprob_triton.py if
                 it is 3 % faster than HOPPER, no slower in fwd, and its error is no larger.
    hops         eval_accuracy at step 30 within 0.03 of README's: the laptop's task is the GPU's.
    device tests commands on a GPU and on a CPU agree: tests/emulated_gpu.py goes.
"""

import json
import os
import shlex
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
from support.errors import OneLineParser, exit_on_bad_input, require

TOTAL = 540  # seconds

# Name, limit in seconds, lines in the table, python's arguments.
Section = tuple[str, int, int, str]
SECTIONS: list[Section] = [
    (
        "contact",
        50,
        4,
        "{pytest} tests/test_device.py tests/test_sample.py -k 'flash or cuda_graph'",
    ),
    ("train", 40, 4, "train.py --device {device} --dtype bfloat16 {few} --steps 3 --out {work}/r"),
    ("resume", 20, 4, "train.py --resume --steps 4 --out {work}/r"),
    ("head tests", 110, 4, "{pytest} tests/test_logprob.py {parallel}"),
    ("head 8B", 50, 30, "bench/logprob.py --json {head}"),
    ("head 1B", 30, 30, "bench/logprob.py --json {head_1b}"),
    ("decode 1B", 60, 8, "bench/sample.py --json --model {1b} {graph} {rows}"),
    ("make 1B", 30, 1, "bench/make_model.py --shape {1b} --out {work}/1b"),
    ("step 1B", 110, 6, "bench/step.py --json --model {work}/1b --peer {peer} {step}"),
    ("decode 8B", 90, 8, "bench/sample.py --json --model {8b} {rows}"),
    ("variants", 60, 10, "bench/logprob.py --json {variants}"),
    ("hops", 45, 3, "train.py --device {device} {few} --steps {steps} --out {work}/hops"),
    ("device tests", 200, 4, "{pytest} tests/test_device.py"),
]
HEAD_ON_CPU = "--shape 8 64 512 --rounds 1"
# The words in a command: on a GPU, in a dry run.
WORDS = {
    "device": ("cuda", "cpu"),
    "pytest": ("-m pytest", "-m pytest --collect-only"),
    "parallel": ("-n 8", ""),
    "few": ("", "--questions 2 --traces 2 --eval-questions 2 --max-trace 4"),
    "steps": ("30", "2"),
    "1b": ("llama-3.2-1b", "tiny"),
    "8b": ("llama-3.1-8b", "tiny"),
    "graph": ("--cuda-graph", ""),
    "rows": (
        "--rows 64 256 --new 256 --rounds 2",
        "--rows 1 2 --new 4 --rounds 1 --dtype float32",
    ),
    "head": ("--shape 16384 4096 128256 --rounds 5", HEAD_ON_CPU),
    "head_1b": ("--shape 16384 2048 128256 --rounds 5", HEAD_ON_CPU),
    "variants": ("--variants --shape 16384 4096 128256 --rounds 5", HEAD_ON_CPU),
    "step": (
        "--prompt 512 --new 128 --rounds 2",
        "--questions 1 --traces 2 --prompt 8 --new 4 --answer 4 --rounds 1",
    ),
    "peer": ("transformers" if find_spec("transformers") else "dense", "dense"),
}


def run(section: Section, limit: float, words: dict[str, str], log: Path) -> dict:
    """One section -> its name, command, outcome, seconds, and the last lines it printed."""
    name, _, lines, command = section
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as printed, log.open("a") as errors:
        print(f"\n==== {name}: python {command}", file=errors, flush=True)
        process = subprocess.Popen(
            [sys.executable, *shlex.split(command.format(**words))],
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
        text = printed.read()
        shown = text.splitlines()
        if outcome != "ok":
            stderr = log.read_text().rpartition("\n==== ")[2]
            shown += stderr.splitlines()[1:][-3:]
        errors.write(text)
    row = {"name": name, "outcome": outcome}
    row["command"] = command.format(**words | {"work": "WORK"})
    row["seconds"] = round(time.monotonic() - began, 1)
    if outcome == "ok" and shown and shown[-1].startswith("{"):
        row["result"] = json.loads(shown.pop())
    return row | {"printed": [line[:200] for line in shown[-lines:]]}


def run_all(sections: list[Section], total: float, words: dict[str, str], out: Path) -> bool:
    """Runs the sections, writes gpu.json and gpu.log -> whether all were ok."""
    began = time.monotonic()
    result = machine.circumstances(words["device"], "triton", "transformers") | {"sections": []}
    rows = result["sections"]
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    with tempfile.TemporaryDirectory() as work:
        for section in sections:
            left = total - (time.monotonic() - began)
            print(f"{section[0]}, {left:.0f} s left", file=sys.stderr, flush=True)
            if left > 1:
                rows.append(run(section, min(section[1], left), words | {"work": work}, log))
            else:
                rows.append({"name": section[0], "outcome": "no time left"})
            (out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{machine.headline(result)}; {time.monotonic() - began:.0f} s")
    for row in rows:
        print(f"---- {row['name']}: {row['outcome']}, {row.get('seconds', 0)} s")
        print("\n".join(row.get("printed", [])))
    return all(row["outcome"] == "ok" for row in rows)


def main() -> None:
    parser = OneLineParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on a CPU")
    flags = parser.parse_args()
    here = torch.cuda.is_available() or flags.dry_run
    require(here, "there is no GPU here; --dry-run takes tiny sizes and a CPU")
    if flags.dry_run:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of the sections
    patience = 10 if flags.dry_run else 1  # a busy CPU is no failure
    sections = [(name, patience * limit, *rest) for name, limit, *rest in SECTIONS]
    words = {word: values[flags.dry_run] for word, values in WORDS.items()}
    sys.exit(not run_all(sections, patience * TOTAL, words, flags.out))


if __name__ == "__main__":
    exit_on_bad_input(main)()
