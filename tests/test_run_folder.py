"""A run's folder: nothing of the user's is touched, what was saved stays whole, one run in it."""

import fcntl
import json
import math
import os
import resource
import shlex
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import needs_proc
from test_refusals import COMMANDS, assert_refused, merge, put, run, tensors, tree
from tiny import lines_of

import sample
import train
from support.args import Args
from support.metrics import Log
from support.weights import load_model

ROOT = Path(__file__).parents[1]
NORM = "model.norm.weight"


def saved(out: str) -> list[str]:
    """Its checkpoints, oldest first."""
    return sorted(path.name for path in Path(out).glob("checkpoint-??????"))


def contents(folder: str, pattern: str) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path(folder).rglob(pattern) if path.is_file()}


# ---- whose files
THEIRS = "final-thesis.txt checkpoint-best/a checkpoint-1/a notes.tmp log.jsonl.gz".split()


@pytest.mark.parametrize(
    ("command", "flags"),
    [("train", []), ("train", ["--out=run", "--overwrite"]), ("resume", ["--steps=5"])],
    ids=str,
)
def test_files_of_other_names_stay(command, flags, world, monkeypatch):
    out = "run" if flags else "new"
    theirs = {Path(out) / name: name for name in THEIRS}
    for path, text in theirs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert run(command, flags, monkeypatch) == 0
    assert {path: path.read_text() for path in theirs} == theirs
    last = 5 if command == "resume" else 2
    assert saved(out) == [f"checkpoint-{last - 1:06}", f"checkpoint-{last:06}"]  # the newest two


@pytest.mark.parametrize("names", ["args.json", "final", "final.tmp", "log.jsonl.tmp run.lock"])
@pytest.mark.parametrize("flags", [[], ["--overwrite"], ["--resume"]], ids=str)
def test_a_folder_of_somebody_else_is_refused_whatever_is_asked(
    names, flags, world, monkeypatch, capfd
):
    """`final` and the like mean nothing without the args.json of a run."""
    Path("new").mkdir()
    for name in names.split():
        (Path("new") / name).write_text("{}")
    assert_refused("train", flags, ["new", names.split()[0]], monkeypatch, capfd)


def test_nothing_is_deleted_where_something_cannot_be(world, monkeypatch, capfd):
    real = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path.name == "final":
            raise PermissionError(1, "Operation not permitted")
        return real(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    before = contents("run", "*.safetensors")
    assert run("train", ["--out=run", "--overwrite"], monkeypatch) == 2
    assert "Operation not permitted" in capfd.readouterr().err
    after = contents("run", "*.safetensors")
    assert sorted(after.values()) == sorted(before.values())


# ---- resume
def test_a_resume_takes_the_runs_flags_and_not_todays_defaults(world, monkeypatch):
    assert run("resume", ["--lr=1e-3"], monkeypatch) == 0
    assert [line["step"] for line in lines_of("run/log.jsonl")] == [1, 2, 3]
    now = json.loads(Path("run/args.json").read_text())
    assert (now["model"], now["data"], now["eval_data"]) == ("model", "rows.jsonl", "")
    assert (now["steps"], now["lr"]) == (3, 1e-3)


def test_a_finished_run_says_so_and_stays_as_it_is(world, monkeypatch, capfd):
    before = tree(Path.cwd())
    assert run("resume", ["--steps=2"], monkeypatch) == 0
    assert "finished: a --steps of more than 2" in capfd.readouterr().out
    assert tree(Path.cwd()) == before


def test_code_named_in_args_json_runs_only_if_the_command_names_it_too(world, monkeypatch, capfd):
    put("mine.py", "open('ran', 'w')\ndef f(logp, null_logp):\n    return logp.sum(1)\n")()
    merge("run/args.json", aggregator="mine.py:f")()
    assert_refused("resume", [], ["--aggregator", "mine.py:f"], monkeypatch, capfd)
    assert not Path("ran").exists()
    assert run("resume", ["--aggregator=mine.py:f"], monkeypatch) == 0


def test_every_command_that_a_run_prints_runs_as_it_is(world, monkeypatch, capfd):
    """After Ctrl-C, with a reward of one's own: the resume. At the end: the question."""
    put("my own.py", "def f(logp, null_logp):\n    return logp.sum(1)\n")()
    real = train.sample_groups

    def interrupted(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*given)

    with monkeypatch.context() as patched:
        patched.setattr(train, "sample_groups", interrupted)
        run("train", ["--aggregator=my own.py:f"], patched)
    stopped = capfd.readouterr().err.splitlines()[-1]
    for script, line in (("train.py", stopped.split("; ")[1]), ("sample.py", "")):
        line = line or capfd.readouterr().out.splitlines()[-1]
        words = shlex.split(line.removesuffix(" continues after it"))
        assert Path(words[0]).name == Path(sys.executable).name or words[0] == sys.executable
        assert Path(words[1]).resolve() == ROOT / script
        monkeypatch.setattr("sys.argv", words[1:])
        {"train.py": train, "sample.py": sample}[script].main()
        assert json.loads(Path("new/args.json").read_text())["command"].endswith(
            shlex.join(words[1:]) if script == "train.py" else ":f'"
        )
    assert "answer" in capfd.readouterr().out
    assert saved("new")[-1] == "checkpoint-000002"


# ---- one run at a time
def test_a_second_run_in_the_folder_is_refused_while_the_first_lives(world, monkeypatch, capfd):
    """Somebody else's process holds the lock; then a run of this process that ended in an error."""
    with open("run/run.lock") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for flags in (["--resume", "--steps=9"], ["--overwrite"], []):
            command = "resume" if "--resume" in flags else "train"
            assert_refused(command, ["--out=run", *flags], ["run/run.lock"], monkeypatch, capfd)
    with pytest.raises(ValueError, match="already holds a run"):  # keeps the traceback
        train.train(Args(out="run"))
    assert run("resume", [], monkeypatch) == 0


# ---- not finite
def test_a_parameter_that_is_nan_is_logged_and_ends_the_run_before_a_checkpoint(
    world, monkeypatch, capfd
):
    tensors(**{NORM: torch.full((16,), math.nan)})()
    assert run("train", ["--steps=9", "--save-every=2"], monkeypatch) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: step 2") and error.count("\n") == 1
    assert [line["bad_updates"] for line in lines_of("new/log.jsonl")] == [1, 1]
    assert lines_of("new/samples.jsonl")[0]["traces"][0]["reward"] is None
    assert saved("new") == []


def test_updates_that_are_not_finite_are_not_applied_and_three_in_a_row_end_the_run(
    world, monkeypatch, capfd
):
    own = """calls = []
def f(logp, null_logp):
    calls.append(1)
    spoilt = float("nan") if len(calls) // 2 in (2, 4, 5, 6) else 0.0  # two a step, one before
    return logp.sum(1) + logp.new_tensor([0.0, spoilt])
"""
    put("spoilt.py", own)()
    monkeypatch.setattr("support.run.KEEP", 9)
    assert run("train", ["--aggregator=spoilt.py:f", "--steps=9"], monkeypatch) == 1
    error = capfd.readouterr().err
    assert error.startswith("error: step 6") and error.count("\n") == 1
    assert [line["bad_updates"] for line in lines_of("new/log.jsonl")] == [0, 1, 0, 1, 1, 1]
    after = [load_model(f"new/{name}").state_dict() for name in saved("new")]
    assert len(after) == 5
    for name, tensor in after[0].items():
        assert torch.equal(after[1][name], tensor) and not torch.equal(after[2][name], tensor)
        assert torch.equal(after[4][name], after[2][name])


# ---- a full disk, a kill
@pytest.mark.parametrize("file", ["log.jsonl", "checkpoint-000003"])
def test_a_disk_that_is_full_is_one_line_and_what_was_saved_is_whole(
    file, world, monkeypatch, capfd
):
    """Files of this process cannot grow beyond a size: the write fails as on a full disk."""
    before = contents("run", "checkpoint-*/**/*")
    size = 20_000 if file.startswith("checkpoint") else Path("run", file).stat().st_size + 1
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        assert run("resume", [], monkeypatch) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capfd.readouterr().err
    assert error.startswith(f"error: run/{file}: cannot be written: ")
    assert error.count("\n") == 1 and "large" in error
    assert contents("run", "checkpoint-*/**/*") == before
    assert not list(Path("run").glob("*.tmp"))


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("every", [9, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("command", "flags"), [("resume", []), ("train", ["--out=run", "--overwrite"])], ids=str
)
def test_a_kill_within_any_write_leaves_a_run_that_goes_on_to_the_same_end(
    command, flags, every, world, monkeypatch
):
    """At every file that the run opens for writing, renames or deletes, in turn."""
    writes, died = 0, 0

    def deadly(real):
        def call(*given, **named):
            nonlocal writes
            mode = given[1] if len(given) > 1 else named.get("mode", "")
            if real is not open or (isinstance(mode, str) and set(mode) & set("wa")):
                writes += 1
                if writes > died:
                    raise Killed
            return real(*given, **named)

        return call

    shutil.copytree("run", "kept")
    assert run(command, flags, monkeypatch) == 0
    expected = contents("run", "final/*")
    while True:
        shutil.rmtree("run")
        shutil.copytree("kept", "run")
        writes = 0
        with monkeypatch.context() as patched:
            patched.setattr("builtins.open", deadly(open))
            for name in ("rename", "replace", "unlink"):
                patched.setattr(Path, name, deadly(getattr(Path, name)))
            try:
                assert run(command, flags, patched) == 0
                break
            except Killed:
                pass
        assert json.loads(Path("run/args.json").read_text())["model"] == "model"
        for name in saved("run"):
            load_model(f"run/{name}")
            assert Path(f"run/{name}/progress.json").exists()
        assert command == "train" or len(saved("run")) >= 2
        assert run(command, flags, monkeypatch) == 0
        assert contents("run", "final/*") == expected
        died += every
    assert died > 20


# ---- a long run
@pytest.mark.slow
@needs_proc
def test_over_hundreds_of_steps_memory_and_open_files_stay(world, monkeypatch):
    """With an evaluation and a checkpoint every tenth step."""
    figures, real = [], Log.write

    def write(log: Log, record: dict) -> None:
        real(log, record)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        figures.append((pages * resource.getpagesize() / 1e6, len(os.listdir("/proc/self/fd"))))

    monkeypatch.setattr(Log, "write", write)
    # pytest keeps every line of torch's log: 0.2 MB a checkpoint
    monkeypatch.setattr("torch.distributed.checkpoint.logger._dcp_logger.disabled", True)
    flags = "--eval-data=rows.jsonl --steps=500 --eval-every=10 --save-every=10"
    assert run("train", flags.split(), monkeypatch) == 0
    assert [line["step"] for line in lines_of("new/log.jsonl")] == list(range(501))
    megabytes, files = np.array(figures[100:], dtype=float).T
    slope = np.polyfit(np.arange(len(files)), megabytes, 1)[0] * 100  # per 100 steps
    assert slope < 1 and files.max() == files.min(), slope


# ---- signals
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint_and_it_goes_on_from_there(
    number, world, monkeypatch, capfd
):
    # --filter-std: a moving average goes on as well
    flags = ["--steps=4", "--save-every=9", "--overwrite", "--filter-std=10"]
    assert run("train", flags, monkeypatch) == 0
    lines = lines_of("new/log.jsonl")
    uninterrupted = [line["grad_norm"] for line in lines]
    # The first step has no average yet; no group of the second reaches ten times the first's.
    assert lines[0]["zero_std_frac"] < lines[1]["zero_std_frac"] == 1
    real = train.sample_groups

    def interrupted(policy, tokenizer, questions, step, args):
        if step == 2:
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) is signal.SIG_DFL  # a second one ends the process
        return real(policy, tokenizer, questions, step, args)

    before = signal.getsignal(number)
    monkeypatch.setattr(train, "sample_groups", interrupted)
    assert run("train", flags, monkeypatch) == 128 + number
    assert signal.getsignal(number) == before
    said, error = capfd.readouterr().err.splitlines()
    assert said == "finishing step 2; again to stop now"
    assert error.startswith("stopped: step 2 is saved; ") and "--resume --out new " in error
    assert saved("new") == ["checkpoint-000002"]
    monkeypatch.setattr(train, "sample_groups", real)
    monkeypatch.setitem(COMMANDS, "resume", (train.main, ["--out=new", "--resume"]))
    assert run("resume", [], monkeypatch) == 0
    assert [line["grad_norm"] for line in lines_of("new/log.jsonl")] == uninterrupted
