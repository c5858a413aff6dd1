"""Whole commands on a GPU, an emulated one if there is none: same results, no mixed devices."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from emulated_gpu import run_commands
from test_distributed import ENV, ROOT, assert_same_run, read_log, traces
from test_sample import letters

from support.weights import save_model

RUN = (
    f"{ROOT}/train.py --model=model --data=rows.jsonl --eval-data=rows.jsonl "
    "--steps=1 --questions=2 --traces=3 --max-trace=6 --eval-questions=2 --save-every=1 --eps=1e-8"
)
EVERYTHING = "--micro-traces=1 --updates=2 --null=frozen --null-loss=0.1 --aggregator=exact_match"
COMMANDS = [
    f"{RUN} --out=run --device=DEVICE",
    f"{ROOT}/train.py --resume --out=run --steps=2",
    f"{RUN} --out=everything --device=DEVICE {EVERYTHING}",
    f"{RUN} --out=sharded --device=DEVICE --dtype=bfloat16 --null=frozen --marker=new "
    "--activation-checkpointing=selective",
    f"{ROOT}/train.py --resume --out=sharded --steps=2",
    f"{ROOT}/sample.py --model=run/final --question=a --device=DEVICE",
    f"{ROOT}/evaluate.py --model=model --data=rows.jsonl --device=DEVICE --max-trace=20 "
    "--limit=2 --samples=2 --predictions=predictions.jsonl",
    f"{ROOT}/evaluate.py --model=model --data=rows.jsonl --device=DEVICE --max-trace=20 "
    "--limit=2 --preflight",
    "methods.py DEVICE",
]
METHODS = """
import json
import sys

import torch

from aggregate import AGGREGATORS, advantages, aggregate

logp = torch.tensor([[-1.0, -0.2], [-0.3, -2.0], [-0.5, -0.5]], device=sys.argv[1])
torch.manual_seed(0)  # exact_match draws
figures = {}
for name in AGGREGATORS:
    reward, weight = aggregate(name, logp, logp.amin(dim=0))
    figures[name] = torch.cat([advantages(reward, weight=weight), weight.flatten()]).tolist()
open("methods.json", "w").write(json.dumps(figures))
"""
MIXES = """
import torch

on_gpu, on_cpu = torch.zeros(2, device="cuda:0"), torch.ones(2)
for mixed in ("on_gpu + on_cpu", "on_cpu + on_gpu", "on_gpu.add_(on_cpu)", "on_gpu[on_cpu.long()]"):
    try:
        eval(mixed)
        print("computed:", mixed)
    except RuntimeError:
        print("refused:", mixed)
print((on_gpu + torch.tensor(1.0)).device, on_cpu.to("cuda:0").device, on_gpu.cpu().device)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> dict[str, Path]:
    """Two folders in which COMMANDS ran, on the CPU and on the GPU; what they print is out.txt."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("cpu", "gpu")}
    rows = [{"question": letter, "answer": f"{letter} b"} for letter in "abcdef"]
    for folder in folders.values():
        save_model(tiny.model(9, torch.float32, head_dim=8, num_hidden_layers=1), folder / "model")
        letters(folder / "words").save(folder / "model")
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / "methods.py").write_text(METHODS)
        (folder / "mixes.py").write_text(MIXES)
    gpu = [command.replace("DEVICE", "cuda") for command in COMMANDS]
    with open(folders["gpu"] / "out.txt", "w") as out:
        process = subprocess.Popen(
            [sys.executable, f"{ROOT}/tests/emulated_gpu.py", *gpu, "mixes.py"],
            cwd=folders["gpu"],
            env=ENV,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    with pytest.MonkeyPatch.context() as patch, open(folders["cpu"] / "out.txt", "w") as out:
        patch.chdir(folders["cpu"])
        patch.setattr(sys, "argv", [])
        patch.setattr(sys, "stdout", out)
        run_commands([command.replace("DEVICE", "cpu") for command in COMMANDS])
    assert process.wait() == 0, (folders["gpu"] / "out.txt").read_text()
    return folders


@pytest.mark.parametrize("run", ["run", "everything"])
def test_a_gpu_trains_the_same_model_on_the_same_traces(run, ran):
    assert_same_run(ran["cpu"] / run, ran["gpu"] / run)


def test_a_gpu_answers_and_evaluates_as_a_cpu_does(ran):
    shown, rows = [], []
    for folder in ran.values():
        text = (folder / "out.txt").read_text()
        *_, figures = text.partition("\ntrace   ")  # from the output of sample.py on
        shown.append(re.findall("[a-z_]+", figures.partition("refused")[0]))
        lines = (folder / "predictions.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
    assert shown[0] == shown[1] and {"answer", "eval_sampled", "thinking"} <= set(shown[0])
    for one, other in zip(*rows, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            number = isinstance(value, float)
            assert one[name] == (pytest.approx(value, rel=1e-5, abs=1e-5) if number else value)


def test_in_bf16_a_gpu_trains_like_a_cpu_up_to_rounding(ran):
    """With FSDP2, in one process."""
    cpu, gpu = (folder / "sharded" for folder in ran.values())
    assert traces(cpu) == traces(gpu)
    for ours, theirs in zip(read_log(cpu), read_log(gpu), strict=True):
        for name in {"loss", "grad_norm", "reward_mean", "gold_logp_null"} & ours.keys():
            assert ours[name] == pytest.approx(theirs[name], rel=2**-6), (ours["step"], name)


def test_every_method_has_the_same_advantages_and_answer_weights_on_a_gpu(ran):
    cpu, gpu = (json.loads((folder / "methods.json").read_text()) for folder in ran.values())
    assert cpu.keys() == gpu.keys()
    for name in cpu:
        torch.testing.assert_close(torch.tensor(gpu[name]), torch.tensor(cpu[name]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: nothing is emulated")
def test_the_emulated_gpu_refuses_tensors_of_both_devices(ran):
    _, *lines = (ran["gpu"] / "out.txt").read_text().partition("refused")
    text = "".join(lines)
    assert text.count("refused") == 4 and "computed" not in text
    assert text.splitlines()[-1] == "cuda:0 cuda:0 cpu"
