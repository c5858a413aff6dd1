"""The benchmarks run and print their figures; their recipes do equal work."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny
import torch

from bench import gpu, make_model, step
from bench import sample as bench_sample
from support.weights import empty_model, file_name, save_model

ROOT = Path(__file__).parents[1]
SMALL = "--questions=2 --traces=3 --prompt=5 --new=4 --answer=3 --dtype=float32 --device=cpu"
SMALL = [*SMALL.split(), "--rounds=1"]


@pytest.fixture
def directory(tmp_path: Path) -> str:
    save_model(tiny.model(dtype=torch.float32), tmp_path / "tiny")
    return str(tmp_path / "tiny")


def last_line(script: str, *flags: str) -> dict:
    """What `bench/script --json` prints, from a process like a user's."""
    command = [sys.executable, str(ROOT / "bench" / script), *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return json.loads(done.stdout.splitlines()[-1])


# ---- step.py
def gradient(name: str, directory: str, *flags: str) -> torch.Tensor:
    """Of one question's given traces, all parameters in one vector, by their names in the file."""
    flags = step.parse(["--model", directory, *SMALL, *flags])
    examples, traces, args = step.make_work(flags)
    model, policy = step.RECIPES[name].load(args)
    step.RECIPES[name].gradient(policy, examples[:1], [traces], args)
    found = {}
    for key, parameter in model.named_parameters():
        found[key if key.startswith("model.") else file_name(key)] = parameter.grad.flatten()
    return torch.cat([found[key] for key in sorted(found)])


@pytest.mark.parametrize("peer", ["dense", "transformers"])
def test_a_peer_has_our_gradient_on_the_same_traces(peer, directory):
    if not find_spec(peer) and peer != "dense":
        pytest.skip(f"{peer} is not installed")
    ours = gradient("ours", directory)
    other = gradient("ours", directory, "--seed=3")
    theirs = gradient(peer, directory)
    assert (theirs - ours).norm() < 1e-5 * ours.norm()
    assert (other - ours).norm() > 1e-2 * ours.norm()  # the measure sees a difference


def test_ours_gathers_once_per_update_as_train_step_does(directory, monkeypatch):
    last_ones = []
    monkeypatch.setattr(step, "gather_once", lambda model, last: last_ones.append(last))
    examples, traces, args = step.make_work(step.parse(["--model", directory, *SMALL]))
    _, policy = step.RECIPES["ours"].load(args)
    step.RECIPES["ours"].gradient(policy, examples, [traces, traces], args)
    assert last_ones == [False, True]


def test_step_prints_its_figures_and_no_path_of_the_machine(directory):
    result = last_line("step.py", "--model", directory, *SMALL, "--dtype=bfloat16")
    assert {"device", "date", "versions", "threads", "model", *step.SETTINGS} <= result.keys()
    dense = result["dense"]
    for figures in (result, dense):
        assert all(figures[key] > 0 for key in step.FIGURES) and len(figures["rows"]) == 1
        parts = figures["sample_s"] + figures["score_update_s"]
        assert figures["total_s"] == pytest.approx(parts)
    assert dense["gradient_norm"] == pytest.approx(result["gradient_norm"], rel=1e-2)
    ratio = dense["total_s"] / result["total_s"]
    assert result["ratios"]["dense"]["total_s"] == pytest.approx(ratio)
    assert directory not in json.dumps(result) and result["model"] == "tiny"


# ---- sample.py
def test_sample_prints_its_figures():
    flags = "--model tiny --rows 1 3 --prompt 5 --new 4 --rounds 1 --dtype float32 --device cpu"
    result = last_line("sample.py", *flags.split())
    assert {"device", "versions", "bandwidth_gb_s", "matmul_tflop_s"} <= result.keys()
    assert [row["rows"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert list(row) == bench_sample.COLUMNS
        assert all(value > 0 for value in row.values())


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_decode_step_needs(tied):
    model = tiny.model(dtype=torch.bfloat16, tie_word_embeddings=tied, sliding_window=6)
    attention = 16 * 16 + 2 * 16 * 8 + 16 * 16  # q; k and v; o
    block = attention + 3 * 16 * 24 + 2 * 16  # gate, up, down; two norms
    weights = 2 * block + 16 + 11 * 16  # norm, head: the embedding is looked up, not read
    held = 6  # of 10 tokens the window sees 6
    needed_bytes, flops = bench_sample.needs(model, rows=3, tokens=10)
    # 2 bytes; keys and values, 2 layers, 2 heads of size 4; 4 query heads
    assert needed_bytes == 2 * (weights + 3 * held * 2 * 2 * 2 * 4)
    assert flops == 2 * 3 * weights + 3 * held * 4 * 2 * 4 * 4


# ---- models of known shapes
def test_a_model_of_a_shape_has_the_parameters_of_the_published_one():
    published = {
        "smollm2-135m": 134_515_008,
        "llama-3.2-1b": 1_235_814_400,
        "llama-3.1-8b": 8_030_261_248,
    }
    for shape, count in published.items():
        model = empty_model(make_model.config_of(shape))
        assert sum(parameter.numel() for parameter in model.parameters()) == count


# ---- gpu.py
def test_a_section_that_fails_or_takes_too_long_stops_no_other(tmp_path, capsys):
    scripts = {
        "fails": "raise SystemExit('no memory')",
        "waits": "import signal; signal.pause()",
        "measures": "print('n   ms')\nprint('64  12')\nprint('{\"rows\": [64]}')",
    }
    for name, code in scripts.items():
        (tmp_path / f"{name}.py").write_text(code)
    limits = {"fails": 60, "waits": 1, "measures": 60}
    sections = [(name, limits[name], 1, [f"{tmp_path}/{name}.py"]) for name in scripts]
    assert not gpu.run_all([sections[:2], sections[2:]], 99, {"device": "cpu"}, tmp_path / "out")
    rows = json.loads((tmp_path / "out/gpu.json").read_text())["sections"]
    outcomes = {row["name"]: row["outcome"] for row in rows}
    assert outcomes == {"fails": "failed: 1", "waits": "over 1 s", "measures": "ok"}
    assert rows[2]["result"] == {"rows": [64]}
    assert "n   ms" in (tmp_path / "out/gpu.log").read_text()
    shown = capsys.readouterr().out.splitlines()
    assert "no memory" in shown and shown[-1] == "64  12"


@pytest.mark.slow
def test_every_section_ends_well_in_a_dry_run(tmp_path):
    command = [sys.executable, str(ROOT / "bench/gpu.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    rows = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert {row["name"] for row in rows} == {one[0] for one in gpu.CHECKS + gpu.TIMINGS}
