"""More processes change only the speed: same traces, losses, weights, after kills as well."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import support.weights as weights_module
from support import distributed
from support.args import parse_args
from support.distributed import all_shares, own_rows, own_share
from support.weights import empty_model, load_model, read_config, read_tensors
from train import equal_parts

ROOT = Path(__file__).parents[1]
WALL_CLOCK = {"tokens_per_s", "sec_sample", "sec_score", "sec_update", "mem_gb"}
BRIEF = [
    "--steps=5",
    "--questions=4",
    "--traces=4",
    "--max-trace=12",
    "--eval-questions=5",
    "--eval-every=3",
    "--save-every=1",
]
# eps: with 1e-15 AdamW moves a weight by lr however small its gradient is, also where the gradient
# is only the rounding of a sum in another order.
BRIEF += ["--device=cpu", "--eps=1e-8"]
ENV = os.environ | {"OMP_NUM_THREADS": "1"}


def start(
    out: Path, *flags: str, torchrun: list[str] | None = None, **env: str
) -> subprocess.Popen:
    launcher = [] if torchrun is None else ["-m", "torch.distributed.run", *torchrun]
    command = [sys.executable, *launcher, "train.py", *BRIEF, f"--out={out}", *flags]
    return subprocess.Popen(
        command,
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


def finish(process: subprocess.Popen) -> str:
    output = output_of(process)
    assert process.returncode == 0, output
    return output


def processes(count: int, *flags: str) -> list[str]:
    return ["--standalone", f"--nproc-per-node={count}", *flags]


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def assert_same_run(a: Path, b: Path) -> None:
    """Logs and weights within 1e-5 of each other (absolute or relative), equal traces."""
    ours, theirs = read_log(a), read_log(b)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        for name in mine.keys() - WALL_CLOCK:
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (
                mine["step"],
                name,
            )
    for mine, other in zip(traces(a), traces(b), strict=True):
        assert mine == other
    # The last checkpoint: final/ is rounded to the bf16 that the initial model is stored in.
    last = [max(out.glob("checkpoint-*")) for out in (a, b)]
    ours, theirs = (dict(load_model(folder).named_parameters()) for folder in last)
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5


def traces(out: Path) -> list:
    samples = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return [
        (sample["question"], [trace["trace"] for trace in sample["traces"]]) for sample in samples
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"
    finish(start(out))
    return out


SMOOTH = ["--scale=none", "--lr=1e-4"]


# ---- one is two
@pytest.mark.parametrize(
    ("count", "flags"),
    [
        # 2 without flags: test_two_nodes_train_the_same_model
        (2, ["--steps=3", "--micro-traces=2", "--updates=2"]),
        (2, ["--steps=3", "--traces=0"]),
        (4, ["--steps=3", "--dtype=bfloat16", "--activation-checkpointing=selective"]),
        # 3 divides neither rows nor vocabulary, which grows by the marker. After a new marker
        # all rewards are nearly equal: dividing by their std, and a high learning rate, would
        # magnify the rounding of sums in another order.
        (3, ["--steps=3", "--questions=6", "--marker=<|think|>", "--null=frozen", *SMOOTH]),
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
    """Any loss path, checkpointing, dtype, tied or not; ranks with very different traces."""
    launcher = [sys.executable, "-m", "torch.distributed.run", *processes(2)]
    path = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    checks = subprocess.Popen(
        [*launcher, str(ROOT / "tests/sharded_model.py"), str(tmp_path)],
        env=ENV | path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    finish(checks)


def two_nodes(out: Path, *flags: str, **env: str) -> list[subprocess.Popen]:
    """Two torchrun agents, each with one rank, that meet on loopback."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    meeting = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-id=test",
        "--local-addr=localhost",
    ]
    return [start(out, torchrun=[*meeting, *flags], **env) for _ in range(2)]


def test_two_nodes_train_the_same_model(alone, tmp_path):
    for node in two_nodes(tmp_path / "together"):
        finish(node)
    assert_same_run(tmp_path / "together", alone)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_every_row_belongs_to_one_rank_where_torch_expects_it(rows, ranks, monkeypatch):
    tensor = torch.arange(rows)
    chunks = [chunk.tolist() for chunk in tensor.chunk(ranks)]
    ours = []
    for rank in range(ranks):
        pretend(monkeypatch, rank, ranks)
        ours.append(tensor[own_rows(rows)].tolist())
    assert ours == chunks + [[]] * (ranks - len(chunks))


def pretend(monkeypatch, rank: int, ranks: int) -> None:
    """As if this process were one of several."""
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(distributed, "world_size", lambda: ranks)


# ---- interruption
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


def kill_at_random(
    out: Path, rng: random.Random, everything: bool, *flags: str, torchrun: list[str]
) -> subprocess.Popen:
    """Starts a run and SIGKILLs one rank, or the agent and all ranks, after its first step."""
    process = start(out, *flags, torchrun=torchrun)
    for line in process.stdout:
        if line.startswith("step") and not line.startswith("step 0"):
            break
    for _ in range(rng.randrange(2_000_000)):  # up to about a step and its checkpoint
        pass
    ranks = workers(process.pid)
    for pid in [process.pid, *ranks] if everything else rng.sample(ranks, 1):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:  # it was done before we were
            pass
    return process


def assert_checkpoints_whole(out: Path) -> None:
    for checkpoint in out.glob("checkpoint-??????"):
        assert (checkpoint / "progress.json").exists() and len(
            list((checkpoint / "optimizer").iterdir())
        ) in (1, 2)
        load_model(checkpoint)


@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc to find torchrun's children")
def test_killed_with_sigkill_and_resumed_by_two_or_by_one_process_the_run_is_the_same(
    alone, tmp_path
):
    seed = random.SystemRandom().randrange(10**6)
    print("kill seed", seed)  # pytest shows it if the test fails
    rng, out = random.Random(seed), tmp_path / "killed"
    for everything in (False, True):
        process = kill_at_random(out, rng, everything, "--resume", torchrun=processes(2))
        output_of(process)
        assert_checkpoints_whole(out)
    finish(start(out, "--resume", "--steps=4", torchrun=processes(2)))  # two processes go on ...
    finish(start(out, "--resume"))  # ... and one does the rest
    log = read_log(alone)
    assert [line["step"] for line in read_log(out)] == [line["step"] for line in log]
    for ours, theirs in zip(read_log(out), log, strict=True):
        for name in (ours.keys() & theirs.keys()) - WALL_CLOCK - {"lr"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), (
                ours["step"],
                name,
            )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc to find torchrun's children")
def test_torchrun_restarts_a_run_that_lost_a_rank_and_it_picks_up_by_itself(alone, tmp_path):
    out = tmp_path / "killed"
    finish(
        kill_at_random(
            out, random.Random(0), False, "--overwrite", torchrun=processes(2, "--max-restarts=1")
        )
    )
    assert_same_run(out, alone)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc to find torchrun's children")
def test_two_nodes_that_lost_a_rank_restart_together_and_pick_up_by_themselves(alone, tmp_path):
    nodes = two_nodes(
        tmp_path / "killed", "--max-restarts=1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"
    )
    while not (tmp_path / "killed/checkpoint-000001").exists() and all(
        node.poll() is None for node in nodes
    ):
        pass
    for pid in workers(nodes[0].pid):
        os.kill(pid, signal.SIGKILL)
    for node in nodes:
        finish(node)
    assert_same_run(tmp_path / "killed", alone)


# ---- refusals
@pytest.mark.slow
def test_restarts_of_several_nodes_are_refused_where_they_would_wait_for_processes_that_are_gone(
    tmp_path,
):
    nodes = two_nodes(tmp_path / "never", "--max-restarts=1")
    output = output_of(nodes[0]) + output_of(nodes[1])
    assert (
        "error: --max-restarts on several machines: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
        in output
    )
    assert all(node.returncode != 0 for node in nodes) and not (tmp_path / "never").exists()


def test_questions_that_do_not_divide_among_the_processes_are_refused_by_name(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"--questions 6 --updates 2: .* 2 processes"):
        parse_args(["--questions", "6", "--updates", "2"], "")


@pytest.mark.parametrize(("ranks", "updates"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 2)])
def test_the_ranks_questions_are_the_batch_and_come_back_in_its_order(ranks, updates, monkeypatch):
    batch = list(range(24))
    own = []
    for rank in range(ranks):
        pretend(monkeypatch, rank, ranks)
        own.append(own_share(batch))
        for first, part in enumerate(equal_parts(own[-1], updates)):  # each update trains its own
            assert set(part) <= set(equal_parts(batch, updates)[first])
    monkeypatch.setattr(distributed, "gather_objects", lambda value: own)
    assert all_shares(own[0]) == batch


def test_several_processes_refuse_with_one_line_between_them(alone):
    process = start(
        alone, torchrun=processes(2)
    )  # holds a run: only the first rank looks, and all must end
    output = output_of(process)
    lines = [line for line in output.splitlines() if line.startswith("error")]
    assert process.returncode != 0 and len(lines) == 1 and "already holds a run" in lines[0]
    assert 'train.py", line' not in output


# ---- the sharded model
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_rank_reads_its_own_rows_of_the_file_and_no_others(ranks, monkeypatch):
    """The rows of all ranks together are the tensors; no whole tensor is ever read."""

    class OnlySlices:
        def __init__(self, file: Path, framework: str) -> None:
            self.real = safe_open(file, framework)

        def __enter__(self):
            self.tensors = self.real.__enter__()
            self.keys, self.get_slice = self.tensors.keys, self.tensors.get_slice
            return self

        def __exit__(self, *failure) -> None:
            self.real.__exit__(*failure)

    base = ROOT / "examples/hops/base"
    expected = dict(load_model(base).named_parameters())
    monkeypatch.setattr(weights_module, "safe_open", OnlySlices)
    model, parts = empty_model(read_config(base)), []
    for rank in range(ranks):
        pretend(monkeypatch, rank, ranks)
        parts.append(read_tensors(base, model, torch.float32, "cpu", own_rows))
    for name, tensor in expected.items():
        assert torch.equal(torch.cat([part[name] for part in parts]), tensor)
        assert all(len(part[name]) < len(tensor) for part in parts)
