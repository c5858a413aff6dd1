"""On a GPU: whole commands have the results of a CPU; FlashAttention as the model calls it."""

import json
import math
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_sample import letters
from torch import Tensor

from model import Config, OwnKeys, attend, visible
from support.weights import save_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parents[1]
RUN = (
    f"{ROOT}/train.py --model=model --data=rows.jsonl --eval-data=rows.jsonl --device=DEVICE "
    "--steps=1 --questions=2 --traces=3 --max-trace=6 --eval-questions=2 --save-every=1"
)
ON_ROWS = "--model=model --data=rows.jsonl --device=DEVICE --max-trace=20"
COMMANDS = [
    f"{RUN} --out=run",
    f"{ROOT}/train.py --resume --out=run --steps=2",
    f"{RUN} --out=everything --micro-traces=1 --updates=2 --null=frozen --aggregator=exact_match",
    f"{RUN} --out=sharded --dtype=bfloat16 --null=frozen --marker=new --recompute",
    f"{ROOT}/train.py --resume --out=sharded --steps=2",
    f"{ROOT}/sample.py --model=run/final --question=a --device=DEVICE",
    f"{ROOT}/evaluate.py {ON_ROWS} --limit=2 --predictions=predictions.jsonl",
    f"{ROOT}/preflight.py {ON_ROWS}",
    "figures.py DEVICE",
]
FIGURES = """
import json
import sys

import torch

from aggregate import AGGREGATORS, advantages, aggregate

device = sys.argv[1]
logp = torch.tensor([[-1.0, -0.2], [-0.3, -2.0], [-0.5, -0.5]], device=device)
torch.manual_seed(0)  # exact_match draws
methods = {}
for name in AGGREGATORS:
    reward, weight = aggregate(name, logp, logp.amin(dim=0))
    methods[name] = torch.cat([advantages(reward, weight=weight), weight.flatten()]).tolist()
open("figures.json", "w").write(json.dumps(methods))
"""


def run_commands(commands: list[str]) -> None:
    for command in commands:
        sys.argv = shlex.split(command)
        runpy.run_path(sys.argv[0], run_name="__main__")


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> list[Path]:
    """Two folders in which COMMANDS ran, on the CPU and on the GPU; what they print is out.txt."""
    cpu, gpu = folders = [tmp_path_factory.mktemp(name) for name in ("cpu", "gpu")]
    rows = [{"question": letter, "answer": f"{letter} b"} for letter in "abcdef"]
    for folder in folders:
        save_model(tiny.model(9, torch.float32, head_dim=8, num_hidden_layers=1), folder / "model")
        letters(folder / "words").save(folder / "model")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "figures.py").write_text(FIGURES)
    commands = [command.replace("DEVICE", "cuda") for command in COMMANDS]
    with open(gpu / "out.txt", "w") as out:
        process = subprocess.Popen(
            [sys.executable, __file__, *commands],
            cwd=gpu,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    with pytest.MonkeyPatch.context() as patch, open(cpu / "out.txt", "w") as out:
        patch.chdir(cpu)
        patch.setattr(sys, "argv", [])
        patch.setattr(sys, "stdout", out)
        run_commands([command.replace("DEVICE", "cpu") for command in COMMANDS])
    assert process.wait() == 0, (gpu / "out.txt").read_text()
    return folders


def lines(file: Path) -> list[dict]:
    """The objects of a JSONL file without what a clock or the memory says."""
    parsed = [json.loads(line) for line in file.read_text().splitlines()]
    measured = re.compile("sec_|tokens_per_s|mem_gb")
    return [{k: v for k, v in row.items() if not measured.match(k)} for row in parsed]


def assert_close(a: object, b: object) -> None:
    """Floats within 1e-5 of each other, all else equal."""
    if isinstance(a, dict):
        a, b = sorted(a.items()), sorted(b.items())
    if isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_close(one, other)
    elif isinstance(a, float):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-5, nan_ok=True)
    else:
        assert a == b


@pytest.mark.parametrize("run", ["run", "everything"])
@pytest.mark.parametrize("file", ["log.jsonl", "samples.jsonl"])
def test_a_gpu_samples_the_same_traces_and_trains_alike(file, run, ran):
    cpu, gpu = (lines(folder / run / file) for folder in ran)
    assert len(cpu) >= 1
    assert_close(gpu, cpu)


def test_a_gpu_answers_and_evaluates_as_a_cpu_does(ran):
    texts = [(folder / "out.txt").read_text().partition("\ntrace   ")[2] for folder in ran]
    # All words from sample.py's output on, sorted: lines of equal figures may change places.
    cpu, gpu = (sorted(re.findall("[a-z_]+", text)) for text in texts)
    assert cpu == gpu and {"answer", "eval_gain", "thinking"} <= set(cpu)
    assert_close(*(lines(folder / "predictions.jsonl") for folder in ran))


def test_in_bf16_a_gpu_trains_in_fsdp2_from_the_same_null_think(ran):
    """Its traces may be others: a rounding moves a draw."""
    logs = [lines(folder / "sharded/log.jsonl") for folder in ran]
    cpu, gpu = ([line for line in log if "loss" in line] for log in logs)
    assert [line["step"] for line in gpu] == [1, 2]
    assert all(math.isfinite(line["grad_norm"]) for line in gpu)
    assert gpu[0]["gold_logp_null"] == pytest.approx(cpu[0]["gold_logp_null"], rel=2**-6)


def test_a_gpu_computes_the_same_advantages_and_weights(ran):
    cpu, gpu = (json.loads((folder / "figures.json").read_text()) for folder in ran)
    assert_close(gpu, cpu)


# ---- FlashAttention beside fp64
def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(shape[0])
    return torch.randn(shape, generator=generator).bfloat16().cuda()


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], dim=-3) for x in (k, v))
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)


def assert_rounded(a: Tensor, exact: Tensor) -> None:
    assert a.isfinite().all() and (a - exact).abs().max() <= 2**-6 * exact.abs().max()


def on_every_shape(test):
    for name, values in (("rows", [1, 6, 64]), ("heads", [(32, 8), (4, 4)]), ("size", [64, 128])):
        test = pytest.mark.parametrize(name, values)(test)
    return test


def config(heads: tuple[int, int], size: int) -> Config:
    return Config(11, 16, 24, 1, *heads, head_dim=size)


@on_every_shape
@torch.no_grad()
def test_a_decode_step_in_flash_attention_reads_each_rows_own_keys(rows, heads, size):
    q, k, v = normal(rows, heads[0], 1, size), *normal(2, rows, heads[1], 200, size)
    count = torch.arange(rows, device=q.device) * 37 % 200 + 1
    for x in (k, v):  # what lies beyond must not be read
        x.transpose(1, 2)[torch.arange(200, device=q.device) >= count[:, None]] = float("nan")
    mask = visible(count - 1, count[:, None] - 1, 200, config(heads, size), like=q)
    assert isinstance(mask, OwnKeys)
    # In memory [rows, S, Hkv, D], as in the decoding batch.
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    out = attend(q, k, v, mask)
    for row, keys in enumerate(count.tolist()):
        assert_rounded(out[row], exact(q[row], k[row, :, :keys], v[row, :, :keys]))


@on_every_shape
def test_branches_in_flash_attention_see_a_triangle_that_ends_at_the_last_key(rows, heads, size):
    q, goal = normal(rows, heads[0], 20, size), normal(rows, heads[0], 20, size)
    inputs = [q, *normal(2, rows, heads[1], 57, size)]  # a prompt of 37 tokens, branches of 20
    positions = torch.arange(37, 57, device=q.device)
    mask = visible(37, positions, 57, config(heads, size), like=q)
    assert type(mask).__name__ == "CausalBias"
    ours, theirs = ([x.detach().clone().requires_grad_() for x in inputs] for _ in range(2))
    out = attend(*ours, mask)
    reference = exact(*theirs, torch.ones(20, 57, device=q.device).tril(37).bool())
    assert_rounded(out, reference)
    out.backward(goal)
    reference.backward(goal.double())
    for x, other in zip(ours, theirs, strict=True):
        assert_rounded(x.grad, other.grad)


if __name__ == "__main__":  # the process of `ran` that has the GPU
    run_commands(sys.argv[1:])
