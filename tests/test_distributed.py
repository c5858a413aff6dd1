"""More processes change only the speed: same traces, losses, parameters, after kills as well."""

import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from conftest import needs_proc
from sharded_model import TOKENIZER, question
from tiny import WALL_CLOCK, lines_of
from torch.distributed.fsdp._fully_shard import _fsdp_param_group

from support import distributed
from support.args import Args, check_args
from support.weights import load_model
from train import train_question

ROOT = Path(__file__).parents[1]
BRIEF = "--steps=5 --questions=4 --traces=4 --max-trace=12 --device=cpu".split()
BRIEF += "--eval-questions=5 --eval-every=3 --save-every=1".split()
PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": PATH}


@pytest.fixture(autouse=True)
def no_process_group() -> None:
    """An earlier test of this process may have left one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def start(
    out: Path, *flags: str, torchrun: list[str] | None = None, script: str = "train.py", **env: str
) -> subprocess.Popen:
    launcher = [] if torchrun is None else ["-m", "torch.distributed.run", *torchrun]
    flags = [*BRIEF, f"--out={out}", *flags] if script == "train.py" else [str(out)]
    return subprocess.Popen(
        [sys.executable, *launcher, script, *flags],
        cwd=ROOT,
        env=ENV | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def output_of(process: subprocess.Popen) -> str:
    """All it prints until it ends. A process that hangs fails the test and is killed."""
    try:
        return process.communicate(timeout=240)[0]
    except subprocess.TimeoutExpired:
        for pid in [process.pid, *workers(process.pid)]:
            os.kill(pid, signal.SIGKILL)
        pytest.fail(f"it hangs: {process.communicate()[0]}")


def workers(agent: int) -> list[int]:
    """The processes torchrun has started, its children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == agent:
            found.append(int(stat.parent.name))
    return found


def read_until_a_step_is_done(process: subprocess.Popen) -> None:
    for line in process.stdout:
        if re.match(r"step +[1-9]\d*/", line):
            return


def finish(process: subprocess.Popen) -> str:
    output = output_of(process)
    assert process.returncode == 0, output
    return output


def processes(count: int, *flags: str) -> list[str]:
    return ["--standalone", f"--nproc-per-node={count}", *flags]


# ---- one is two
def assert_same_run(a: Path, b: Path) -> None:
    """Logs and parameters within 1e-5 of each other (absolute or relative), equal traces."""
    ours, theirs = lines_of(a / "log.jsonl"), lines_of(b / "log.jsonl")
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine.keys() - WALL_CLOCK:
            same = other[name]
            if name != "warnings":
                same = pytest.approx(same, rel=1e-5, abs=1e-5)
            assert mine[name] == same, (mine["step"], name)
    assert traces(a) == traces(b)
    # The last checkpoint: with --dtype=bfloat16 final/ is rounded.
    last = [max(out.glob("checkpoint-*")) for out in (a, b)]
    ours, theirs = (dict(load_model(folder).named_parameters()) for folder in last)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


def traces(out: Path) -> list:
    return [
        (sample["question"], [trace["trace"] for trace in sample["traces"]])
        for sample in lines_of(out / "samples.jsonl")
    ]


@pytest.mark.parametrize(
    ("count", "flags"),
    [
        (2, ["--steps=3", "--micro-traces=2", "--updates=2", "--filter-std=1"]),
        pytest.param(2, ["--steps=3", "--dtype=bfloat16", "--recompute"], marks=pytest.mark.slow),
        # 3 divides neither rows nor vocabulary, which grows by the marker. After a new marker
        # all rewards are nearly equal: dividing by their std, and a high learning rate, would
        # magnify the rounding of sums in another order.
        (
            3,
            "--steps=3 --questions=6 --marker=<|think|> --null=frozen --scale=none "
            "--lr=1e-4".split(),
        ),
    ],
    ids=str,
)
def test_more_processes_train_the_same_model_on_the_same_traces(count, flags, tmp_path):
    alone = start(tmp_path / "alone", *flags)
    together = start(tmp_path / "together", *flags, torchrun=processes(count))
    finish(alone)
    finish(together)
    assert_same_run(tmp_path / "together", tmp_path / "alone")


def test_the_sharded_model_has_the_gradients_and_the_traces_of_a_plain_one(tmp_path):
    """Micro-batches, recomputation, dtype, tied or not; ranks with very different traces."""
    finish(start(tmp_path, torchrun=processes(2), script="tests/sharded_model.py"))


@pytest.mark.slow
@needs_proc
def test_killed_with_sigkill_and_resumed_by_two_or_by_one_process_the_run_is_the_same(tmp_path):
    finish(start(tmp_path / "alone"))
    seed = random.SystemRandom().randrange(10**6)
    print("kill seed", seed)  # pytest shows it if the test fails
    rng, out = random.Random(seed), tmp_path / "killed"
    for everything in (False, True):  # one rank, or all of them and torchrun
        process = start(out, *["--resume"] * out.exists(), torchrun=processes(2))
        read_until_a_step_is_done(process)
        for _ in range(rng.randrange(2_000_000)):  # up to about a step and its checkpoint
            pass
        ranks = workers(process.pid)
        for pid in [process.pid, *ranks] if everything else ranks[-1:]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:  # it was done before we were
                pass
        output_of(process)
        for checkpoint in out.glob("checkpoint-??????"):
            load_model(checkpoint)
    finish(start(out, "--resume", "--steps=3", torchrun=processes(2)))  # two processes go on ...
    finish(start(out, "--resume"))  # ... and one does the rest
    assert_same_run(out, tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_ended_by_a_signal_saves_the_step_and_says_how_to_go_on(number, tmp_path):
    out = tmp_path / "run"
    process = start(out, "--steps=50", "--save-every=99", torchrun=processes(2))
    read_until_a_step_is_done(process)
    process.send_signal(number)
    output = output_of(process)
    (checkpoint,) = out.glob("checkpoint-*")
    step = int(checkpoint.name[-6:])
    assert output.count("stopped: step ") == 1, output
    assert f"stopped: step {step} is saved; " in output and f"--resume --out {out}" in output
    again = start(out, "--resume", f"--steps={step + 1}", torchrun=processes(2))
    assert f"step {step + 1}/" in finish(again)


# ---- the process group
def launched(monkeypatch, **env: str) -> None:
    """As if torchrun had started this process as one of two."""
    env = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"} | env
    for name, value in ({"TORCHELASTIC_MAX_RESTARTS": "0"} | env).items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize(("device", "backend"), [("cpu", "gloo"), ("cuda", "cpu:gloo,cuda:nccl")])
def test_the_backend_is_named(device, backend, several, monkeypatch):
    """Without a name torch takes the machine's accelerator, even for tensors on the CPU."""
    asked = []
    monkeypatch.setattr(dist, "init_process_group", lambda name, **_: asked.append(name))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda local: None)
    if several:
        launched(monkeypatch)
    distributed.start(device, torch.bfloat16)
    assert asked == [backend]


def test_one_process_in_fp32_needs_no_process_group():
    distributed.start("cpu", torch.float32)
    assert not dist.is_initialized()


@pytest.mark.parametrize("micro_traces", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_process_reduces_gradients_once_per_update(dtype, micro_traces, monkeypatch):
    """Bit for bit those of reducing them for every question."""
    reduced = []
    reduce = _fsdp_param_group.foreach_reduce

    def counted(*arguments: object, **named: object) -> object:
        reduced[-1] += 1
        return reduce(*arguments, **named)

    monkeypatch.setattr(_fsdp_param_group, "foreach_reduce", counted)
    args = Args(questions=3, traces=4, micro_traces=micro_traces)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    gradients = []
    for last in ([True, True, True], [False, False, True]):
        reduced.append(0)
        model = distributed.shard(tiny.model(0, torch.float32, num_hidden_layers=3), dtype)
        for index in range(3):
            distributed.gather_once(model, last[index])
            train_question(model, TOKENIZER, *question(index), args)
        gradients.append([distributed.whole(p.grad) for p in model.parameters()])
    dist.destroy_process_group()
    assert all(map(torch.equal, *gradients))
    assert 3 * reduced[1] == reduced[0]  # those of one question of three


# ---- refusals
def test_questions_that_do_not_divide_among_the_processes_are_refused_by_name(monkeypatch):
    launched(monkeypatch)
    with pytest.raises(ValueError, match=r"--questions 6 --updates 2: .* 4 equal shares"):
        check_args(Args(questions=6, updates=2))


def test_a_restart_by_torchrun_is_refused_by_its_flag(monkeypatch):
    launched(monkeypatch, TORCHELASTIC_MAX_RESTARTS="1")
    with pytest.raises(ValueError, match=r"--max-restarts 1: .* --resume"):
        distributed.start("cpu", torch.float32)


# A file of tmp_path; its text; a flag; part of the line.
ENDS = [
    # The folder is somebody else's: only the first rank looks, and all must end.
    ("args.json", "{}", "--seed=0", "args.json"),
    # The others: every rank finds the same. Its gradient is not finite,
    ("f.py", "def f(logp, null): return logp[:, 0] / 0 * 0", "--aggregator={}:f", "in a row"),
    # the model is not there,
    ("other.txt", "", "--model=nowhere", "nowhere"),
    # one of them would have no held-out question.
    ("one.jsonl", '{"question": "a", "answer": "b"}', "--eval-data={}", "--eval-questions 5: 1"),
]


@pytest.mark.parametrize(("file", "text", "flag", "says"), ENDS, ids=str)
def test_several_processes_end_with_one_line_between_them(file, text, flag, says, tmp_path):
    (tmp_path / file).write_text(text)
    process = start(tmp_path, flag.format(tmp_path / file), torchrun=processes(2))
    output = output_of(process)
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert process.returncode != 0 and len(lines) == 1 and says in lines[0], output
    assert 'train.py", line' not in output
