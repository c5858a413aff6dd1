"""Long runs and faults of several ranks, slow: `make check`. Kills are in test_run_folder.py, at
every write of a run, and in test_distributed.py, at random moments."""

import os
import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import BRIEF, needs_proc
from test_distributed import output_of, processes, start, workers
from tiny import lines_of, without_clock

import train
from support import metrics
from support.args import parse_args

pytestmark = pytest.mark.slow


def log_of(out: Path) -> list[dict]:
    return without_clock(lines_of(out / "log.jsonl"))


def checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-??????"))


def resident() -> float:
    """MB of this process's memory that are in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


@needs_proc
def test_over_hundreds_of_steps_memory_and_open_files_stay_and_the_log_is_valid(world, monkeypatch):
    """With an evaluation and a checkpoint every tenth step."""
    steps, figures = 500, []
    real = metrics.Log.write

    def write(log: metrics.Log, record: dict) -> None:
        real(log, record)
        figures.append((resident(), len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(metrics.Log, "write", write)
    # pytest keeps every line of torch's log: 0.2 MB a checkpoint
    monkeypatch.setattr("torch.distributed.checkpoint.logger._dcp_logger.disabled", True)
    argv = ["--model=model", "--data=rows.jsonl", "--eval-data=rows.jsonl", "--out=new", *BRIEF]
    argv += [f"--steps={steps}", "--eval-every=10", "--save-every=10"]
    train.train(parse_args(argv, ""))
    assert [line["step"] for line in log_of(Path("new"))] == list(range(steps + 1))
    memory, files = np.array(figures[100:], dtype=float).T
    slope = np.polyfit(np.arange(len(memory)), memory, 1)[0] * 100  # least squares
    print(f"{slope:+.3f} MB per 100 steps from {memory[0]:.0f} MB, {files.max():.0f} open files")
    assert slope < 1 and files.max() == files.min()
    assert len(checkpoints(Path("new"))) == 2


# ---- several ranks
def read_until_step(process, step: int) -> None:
    """Its output until the step is logged."""
    for line in process.stdout:
        if re.match(rf"step +{step}/", line):
            return


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_ended_by_a_signal_saves_the_step_and_says_how_to_go_on(number, tmp_path):
    out = tmp_path / "run"
    process = start(out, "--steps=50", "--save-every=99", torchrun=processes(2))
    read_until_step(process, 2)
    process.send_signal(number)
    output = output_of(process)
    (saved,) = checkpoints(out)
    step = int(saved.name[-6:])
    assert output.count("stopped: step ") == 1, output
    assert f"stopped: step {step} is saved; " in output and f"--resume --out {out}" in output
    again = start(out, "--resume", f"--steps={step + 1}", "--save-every=99", torchrun=processes(2))
    assert f"step {step + 1}/" in output_of(again) and again.returncode == 0


@needs_proc
def test_workers_that_outlive_a_killed_torchrun_still_hold_the_folder(tmp_path):
    """The line that says so needs no letters beyond ASCII."""
    out = tmp_path / "rün"
    process = start(out, "--steps=99", torchrun=processes(2))
    read_until_step(process, 1)
    ranks = workers(process.pid)
    for rank in ranks:  # so that they are there as long as this test needs them
        os.kill(rank, signal.SIGSTOP)
    process.kill()
    process.wait()
    second = start(out, "--resume", "--steps=99", LC_ALL="C", PYTHONUTF8="0")
    output = output_of(second)
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)
    assert second.returncode == 2 and output.isascii() and "run.lock" in output, output
    assert output.startswith("error: ") and output.count("\n") == 1, output
