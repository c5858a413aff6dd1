"""The benchmarks: they run, they say what they promise, they refuse what they cannot use, and their contenders do the same work."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch

from bench import sample as bench_sample
from bench import step as bench_step
from support.errors import exit_on_bad_input
from support.weights import save_model

ROOT = Path(__file__).parents[1]
SMALL = [
    "--questions=2",
    "--traces=3",
    "--prompt=5",
    "--new=4",
    "--answer=3",
    "--dtype=float32",
    "--device=cpu",
    "--rounds=1",
]


@pytest.fixture
def directory(tmp_path: Path) -> str:
    save_model(tiny.model(dtype=torch.float32), tmp_path / "tiny")
    return str(tmp_path / "tiny")


def last_line(script: str, *flags: str) -> dict:
    """What `bench/script --json` prints, from a process like a user's."""
    command = [sys.executable, str(ROOT / "bench" / script), *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return json.loads(done.stdout.splitlines()[-1])


def work_of(directory: str, *flags: str) -> tuple[argparse.Namespace, bench_step.Work]:
    parsed = bench_step.parse(["--model", directory, *SMALL, *flags])
    return parsed, bench_step.make_work(parsed, tiny.SIZES["vocab_size"])


# ---------------------------------------------------------------------------------------------------------------- the same work
@pytest.mark.parametrize("seed", range(4))
def test_the_dense_recipe_has_our_gradient(directory, seed):
    _, work = work_of(directory, f"--seed={seed}")
    model = bench_step.load_native(work.args).model
    groups = bench_step.unfinished(bench_step.sample_ours(model, work), work)
    ours, dense = (bench_step.gradients(name, model, work, groups) for name in ("ours", "dense"))
    assert bench_step.difference(dense, ours) < 1e-5
    for name in ("selective", "full"):
        assert bench_step.difference(bench_step.gradients(name, model, work, groups), ours) == 0
    assert model.activation_checkpointing == "none"  # or the contenders after it would pay for it
    others = bench_step.unfinished(bench_step.sample_dense(model, work), work)
    assert (
        bench_step.difference(bench_step.gradients("dense", model, work, others), ours) > 1e-2
    )  # the measure does see a difference


@pytest.mark.parametrize("name", ["ours", "selective", "full", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_trains(directory, name, dtype):
    _, work = work_of(directory, f"--dtype={dtype}")
    learner = bench_step.CONTENDERS[name].load(work.args)
    before = [parameter.detach().clone() for parameter in learner.model.parameters()]
    seconds = bench_step.step(name, learner, work)
    assert seconds["total_s"] == pytest.approx(seconds["sample_s"] + seconds["score_update_s"])
    assert any(
        not torch.equal(a, b) for a, b in zip(before, learner.model.parameters(), strict=True)
    )
    assert all(parameter.grad is None for parameter in learner.model.parameters())


def test_making_the_optimizer_ready_changes_no_weight(directory):
    _, work = work_of(directory)
    learner = bench_step.load_native(work.args)
    fresh = bench_step.load_model(directory)
    assert all(
        torch.equal(a, b)
        for a, b in zip(learner.model.parameters(), fresh.parameters(), strict=True)
    )
    assert all(
        torch.count_nonzero(state["exp_avg"]) == 0 for state in learner.optimizer.state.values()
    )


def test_no_trace_ends_with_the_marker(directory):
    _, work = work_of(directory)
    groups = [[bench_step.Trace([work.marker] * 4, [0.0] * 4, finished=False)]]
    ((trace,),) = bench_step.unfinished(groups, work)
    assert trace.ids[:3] == [work.marker] * 3 and trace.ids[3] != work.marker


# ---------------------------------------------------------------------------------------------------------------- what is printed
def test_step_prints_its_figures(directory):
    result = last_line("step.py", "--model", directory, *SMALL)
    keys = {"sample_s", "score_update_s", "total_s", "peak_mb", "loaded_mb", "tokens_per_s"}
    assert (
        keys
        | {
            "score_s",
            "update_s",
            "dense",
            "ratios",
            "rows",
            "device",
            "date",
            "versions",
            "threads",
        }
        <= result.keys()
    )
    assert (
        keys | {"old_logp_s", "null_s", "update_s", "gradient_difference"} <= result["dense"].keys()
    )
    assert result["dense"]["gradient_difference"] < 1e-5
    assert result["ratios"]["dense"]["total_s"] == pytest.approx(
        result["dense"]["total_s"] / result["total_s"]
    )
    assert [row["name"] for row in result["rows"]] == ["ours", "dense"]
    assert 0 < result["loaded_mb"] <= result["peak_mb"]
    assert (
        directory not in json.dumps(result) and "--model tiny" in result["command"]
    )  # a result tells nothing of somebody's disk


def test_step_sweeps(directory):
    flags, _ = work_of(directory)
    rows = bench_step.sweep(flags, tiny.SIZES["vocab_size"], {"traces": (2, 4), "prompt": (5, 10)})
    assert [(row["traces"], row["prompt"]) for row in rows] == [(2, 5), (4, 5), (3, 5), (3, 10)]
    assert [row["tokens_prompt_once"] for row in rows] == [
        2 * (5 + 2 * 7),
        2 * (5 + 4 * 7),
        2 * (5 + 3 * 7),
        2 * (10 + 3 * 7),
    ]
    assert [row["tokens_prompt_repeated"] for row in rows] == [
        2 * 2 * 12,
        2 * 4 * 12,
        2 * 3 * 12,
        2 * 3 * 17,
    ]
    assert all(
        row["s_per_1000_once"] == pytest.approx(1000 * row["total_s"] / row["tokens_prompt_once"])
        for row in rows
    )
    assert (
        len(bench_step.sweep_table(rows)) == 1 + 4 + 1 + 1 + 2
    )  # a title, the rows, a gap between axes and one before the two growths


def test_sample_prints_its_figures(directory):
    flags = ["--model", directory, "--rows", "1", "3", "--prompt=5", "--new=4", "--rounds=1"]
    result = last_line("sample.py", *flags, "--dtype=float32")
    head = {"bandwidth_gb_s", "matmul_tflop_s", "device", "date", "versions", "threads", "command"}
    assert head <= result.keys()
    assert [row["rows"] for row in result["rows"]] == [1, 3]
    figures = {"rows", *bench_sample.COLUMNS}
    for row in result["rows"]:
        assert row.keys() == figures and all(value > 0 for value in row.values())


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_decode_step_needs(tied):
    model = tiny.model(dtype=torch.bfloat16, tie_word_embeddings=tied, sliding_window=6)
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16  # q; k and v; o
    block = attention + 3 * 16 * 24 + 2 * 16  # gate, up, down; two norms
    weights = 2 * block + 16 + 11 * 16  # norm, head: the embedding is looked up, not read
    held = 6  # of 10 tokens the window sees 6
    bytes_, flops = bench_sample.needs(model, rows=3, tokens=10)
    # 2 bytes; keys and values, 2 layers, 2 heads of size 4; 4 query heads
    assert bytes_ == 2 * (weights + 3 * held * 2 * 2 * 2 * 4)
    assert flops == 2 * 3 * weights + 3 * held * 4 * 2 * 4 * 4


# ---------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("script", "flags", "says"),
    [
        (bench_step, ["--model", "nowhere"], "nowhere/config.json"),
        (bench_step, ["--dtype", "float8"], "--dtype"),
        (bench_step, ["--questions", "0"], "--questions 0"),
        (bench_step, ["--traces", "1"], "--traces 1"),
        (bench_step, ["--new", "many"], "--new"),
        (bench_step, ["--peer", "none", "dense"], "none goes alone"),
        (bench_step, ["--peer", "verl"], "--peer"),
        (bench_step, ["--memory"], "--only"),
        (bench_step, ["--sweep", "--only", "dense"], "--sweep"),
        (bench_sample, ["--model", "nowhere"], "nowhere/config.json"),
        (bench_sample, ["--dtype", "float8"], "--dtype"),
        (bench_sample, ["--rows", "8", "0"], "--rows 0"),
        (bench_sample, ["--rows", "8", "8"], "--rows 8 8"),
        (bench_sample, ["--new", "1"], "--new 1"),
    ],
)
def test_bad_input_is_one_line(script, flags, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    with pytest.raises(SystemExit) as stopped:
        exit_on_bad_input(script.main)()
    out, err = capsys.readouterr()
    assert (
        stopped.value.code == 2
        and out == ""
        and err.count("\n") == 1
        and err.startswith("error: ")
        and says in err
    )


def test_a_peer_that_is_not_installed_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(bench_step, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench", "--peer", "transformers"])
    with pytest.raises(SystemExit):
        exit_on_bad_input(bench_step.main)()
    assert "transformers library, which is not installed here" in capsys.readouterr().err


def test_broken_weights_found_by_a_measuring_process_are_refused_like_any_input(
    directory, monkeypatch, capsys
):
    (Path(directory) / "model.safetensors").write_bytes(b"not weights")
    monkeypatch.setattr(sys, "argv", ["bench", "--model", directory, *SMALL])
    with pytest.raises(SystemExit) as stopped:
        exit_on_bad_input(bench_step.main)()
    assert stopped.value.code == 2 and "not a readable safetensors file" in capsys.readouterr().err
