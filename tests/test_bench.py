"""The benchmarks run, print their figures and refuse bad input; their contenders do equal work."""

import argparse
import fcntl
import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import tiny
import torch

import train
from bench import gpu_day, probes, recipes
from bench import logprob as bench_logprob
from bench import make_model as bench_make_model
from bench import memory as bench_memory
from bench import sample as bench_sample
from bench import step as bench_step
from model import Config
from support import distributed
from support.distributed import whole
from support.errors import exit_on_bad_input
from support.weights import empty_model, load_model, read_config, save_model

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


def work_of(directory: str, *flags: str) -> tuple[argparse.Namespace, recipes.Work]:
    parsed = bench_step.parse(["--model", directory, *SMALL, *flags])
    return parsed, recipes.make_work(parsed, tiny.SIZES["vocab_size"])


# ---- step.py: the same work
@pytest.mark.parametrize("seed", range(4))
def test_the_dense_recipe_has_our_gradient(directory, seed):
    _, work = work_of(directory, f"--seed={seed}")
    model = recipes.load_native(work.args).model
    groups = recipes.unfinished(recipes.sample_ours(model, work), work.args)
    ours = recipes.gradients("ours", model, work, groups)
    dense = recipes.gradients("dense", model, work, groups)
    assert recipes.difference(dense, ours) < 1e-5
    others = recipes.unfinished(recipes.sample_dense(model, work), work.args)
    of_other_traces = recipes.gradients("dense", model, work, others)
    assert recipes.difference(of_other_traces, ours) > 1e-2  # the measure sees a difference


@pytest.mark.parametrize("kept", ["selective", "full"])
def test_activation_checkpointing_changes_nothing_in_our_gradient(directory, kept):
    _, work = work_of(directory)
    _, checkpointed = work_of(directory, f"--activation-checkpointing={kept}")
    model = recipes.load_native(work.args).model
    groups = recipes.unfinished(recipes.sample_ours(model, work), work.args)
    plain = recipes.gradients("ours", model, work, groups)
    assert recipes.difference(recipes.gradients("ours", model, checkpointed, groups), plain) == 0
    assert model.activation_checkpointing == "none"  # dense computes with the same model


@pytest.mark.parametrize("kept", ["none", "selective", "full"])
@pytest.mark.parametrize("name", ["ours", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_trains(directory, name, dtype, kept):
    _, work = work_of(directory, f"--dtype={dtype}", f"--activation-checkpointing={kept}")
    learner = recipes.CONTENDERS[name].load(work.args)
    before = [whole(parameter.detach()).clone() for parameter in learner.model.parameters()]
    seconds = bench_step.step(name, learner, work)
    assert seconds["total_s"] == pytest.approx(seconds["sample_s"] + seconds["score_update_s"])
    after = list(learner.model.parameters())
    assert any(not torch.equal(a, whole(b)) for a, b in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in after)
    distributed.stop()


def test_making_the_optimizer_ready_changes_no_parameter(directory):
    _, work = work_of(directory)
    learner = recipes.load_native(work.args)
    fresh = recipes.load_model(directory)
    for a, b in zip(learner.model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.count_nonzero(learner.optimizer.state[a]["exp_avg"]) == 0


def test_no_trace_ends_with_the_marker(directory):
    _, work = work_of(directory)
    marker = recipes.MARKER
    groups = [[recipes.Trace([marker] * 4, [0.0] * 4, finished=False)]]
    ((trace,),) = recipes.unfinished(groups, work.args)
    assert trace.ids[:3] == [marker] * 3 and trace.ids[3] != marker


# ---- models of known shapes
def test_a_model_of_a_shape_has_the_parameters_of_the_published_one():
    published = {"llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248}
    for shape, count in published.items():
        model = empty_model(Config(**bench_make_model.SHAPES[shape]))
        assert sum(parameter.numel() for parameter in model.parameters()) == count


def test_a_made_model_keeps_its_vocabulary_trains_and_is_the_same_again(tmp_path):
    count = bench_make_model.make_model("tiny", tmp_path / "made", layers=1)
    again = bench_make_model.make_model("tiny", tmp_path / "again", layers=1)
    assert read_config(tmp_path / "made").num_hidden_layers == 1
    made = load_model(tmp_path / "made")
    assert made.embed_tokens.weight.shape == (512, 64)  # the tokenizer has 83 words
    assert sum(parameter.numel() for parameter in made.parameters()) == count == again
    for a, b in zip(made.parameters(), load_model(tmp_path / "again").parameters(), strict=True):
        assert torch.equal(a, b)
    assert made.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert torch.all(made.norm.weight == 1)
    flags = ["--questions=2", "--traces=2", "--steps=1", "--max-trace=4", "--eval-data="]
    argv = ["--model", str(tmp_path / "made"), "--out", str(tmp_path / "run"), *flags]
    train.train(train.parse_args([*argv, "--device=cpu"], ""))
    (line,) = (tmp_path / "run/log.jsonl").read_text().splitlines()
    assert json.loads(line)["trace_len_mean"] > 3  # no trace ends early


# ---- what is printed
def test_step_prints_its_figures_and_no_path_of_the_machine(directory):
    result = last_line("step.py", "--model", directory, *SMALL)
    figures = {"sample_s", "score_update_s", "total_s", "peak_mb", "loaded_mb", "tokens_per_s"}
    ours = {"score_s", "update_s", "dense", "ratios", "rows"}
    head = {"device", "date", "versions", "threads"}
    assert figures | ours | head <= result.keys()
    dense = result["dense"]
    assert figures | {"old_logp_s", "null_s", "update_s", "gradient_difference"} <= dense.keys()
    assert dense["gradient_difference"] < 1e-5
    ratio = dense["total_s"] / result["total_s"]
    assert result["ratios"]["dense"]["total_s"] == pytest.approx(ratio)
    assert [row["name"] for row in result["rows"]] == ["ours", "dense"]
    assert 0 < result["loaded_mb"] <= result["peak_mb"]
    # and no path of the machine:
    assert directory not in json.dumps(result) and "--model tiny" in result["command"]


def test_a_contender_that_fails_has_a_note_and_the_others_are_timed(directory, monkeypatch):
    class Pool(ThreadPoolExecutor):
        def __init__(self, **_) -> None:
            super().__init__(max_workers=1)

        def submit(self, function, name, work):
            def run():
                if name == "dense":
                    raise torch.OutOfMemoryError("no memory\nleft")
                return function(name, work)

            return super().submit(run)

    monkeypatch.setattr(bench_step, "ProcessPoolExecutor", Pool)
    _, work = work_of(directory)
    figures, ratios, rows = bench_step.measure(["ours", "dense"], work, rounds=1)
    assert figures["dense"] == {"note": "no memory left"}
    assert figures["ours"]["total_s"] > 0 and ratios == {}
    assert [row["name"] for row in rows] == ["ours"]
    assert bench_step.table(bench_step.COLUMNS, figures)[2].endswith("no memory left")


def test_the_sweep_has_both_ends_of_every_axis_and_their_growth(directory):
    flags, _ = work_of(directory)
    rows = bench_step.sweep(flags, tiny.SIZES["vocab_size"], {"traces": (2, 4), "prompt": (5, 10)})
    assert [(row["traces"], row["prompt"]) for row in rows] == [(2, 5), (4, 5), (3, 5), (3, 10)]
    once = [2 * (5 + 2 * 7), 2 * (5 + 4 * 7), 2 * (5 + 3 * 7), 2 * (10 + 3 * 7)]
    repeated = [2 * 2 * 12, 2 * 4 * 12, 2 * 3 * 12, 2 * 3 * 17]
    assert [row["tokens_prompt_once"] for row in rows] == once
    assert [row["tokens_prompt_repeated"] for row in rows] == repeated
    grown = bench_step.growth(rows)
    assert list(grown) == ["traces 2 to 4", "prompt 5 to 10"]
    assert grown["prompt 5 to 10"]["tokens_prompt_repeated"] == 17 / 12
    assert grown["traces 2 to 4"]["total_s"] == rows[1]["total_s"] / rows[0]["total_s"]
    assert len(bench_step.table(bench_step.GROWTH, grown)) == 1 + 2  # a title, a line per axis


def test_sample_prints_its_figures(directory):
    flags = ["--model", directory, "--rows", "1", "3", "--prompt=5", "--new=4", "--rounds=1"]
    result = last_line("sample.py", *flags, "--dtype=float32")
    head = {"bandwidth_gb_s", "matmul_tflop_s", "device", "date", "versions", "threads", "command"}
    assert head <= result.keys()
    assert [row["rows"] for row in result["rows"]] == [1, 3]
    for row in result["rows"]:
        assert row.keys() == {"rows", "cuda_graph", *bench_sample.COLUMNS}
        assert not row["cuda_graph"] and all(row[key] > 0 for key in bench_sample.COLUMNS)


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


# ---- a day on a GPU
@pytest.mark.parametrize("dry", [False, True])
def test_every_command_of_the_days_is_one_that_its_script_takes(dry):
    parsers = {
        "bench/logprob.py": bench_logprob.parse,
        "bench/make_model.py": bench_make_model.parse,
        "bench/sample.py": bench_sample.parse,
        "bench/step.py": bench_step.parse,
        "train.py": lambda flags: train.parse_args(flags, ""),
    }
    words = gpu_day.words(dry, Path("work")) | {"device": "cpu", "peer": "dense"}
    for _, _, command in [section for day in gpu_day.DAYS.values() for section in day]:
        script, *flags = shlex.split(command.format(**words))
        if script == "bench/probes.py":
            assert flags[0] in probes.PROBES
            bench_step.parse(flags[1:])
        elif script in parsers:
            parsers[script](flags)
        else:
            assert script in ("-m", "examples/lab.py")


def test_a_section_that_fails_or_takes_too_long_stops_no_other(tmp_path, monkeypatch, capsys):
    scripts = {
        "fails": "raise SystemExit('no memory')",
        # Its child would wait for ever, with the lock that it inherits.
        "waits": "import fcntl, signal, subprocess, sys\n"
        f"lock = open({str(tmp_path / 'lock')!r}, 'w')\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "child = [sys.executable, '-c', 'import signal; signal.pause()']\n"
        "subprocess.Popen(child, pass_fds=[lock.fileno()])\n"
        "print('waits', flush=True)\n"
        "signal.pause()",
        "measures": "import json\n"
        "print(json.dumps({'rows': [{'n': 64, 'ms': 12.345}, {'n': 256, 'ms': None}]}))\n"
        "print('a warning of a library')",
    }
    for name, code in scripts.items():
        (tmp_path / f"{name}.py").write_text(code)
    sections = [(name, 60, str(tmp_path / f"{name}.py")) for name in scripts]
    sections[1] = ("waits", 1, sections[1][2])
    monkeypatch.setattr(gpu_day, "SHOWN", {"measures.py": "rows n ms"})
    assert gpu_day.run_day(1, True, tmp_path, sections) == 2
    rows = json.loads((tmp_path / "day-1.json").read_text())["sections"]
    assert [row["outcome"] for row in rows] == ["failed: 1", "over 1 s", "ok"]
    assert rows[2]["result"]["rows"][0] == {"n": 64, "ms": 12.345}
    assert "==== fails" in (tmp_path / "day-1.log").read_text()
    *_, fails, waits, measures, keys, first, second = capsys.readouterr().out.splitlines()
    assert fails.endswith("no memory") and waits.startswith("waits")
    assert measures.split()[:2] == ["measures", "ok"] and keys == "  n ms"
    assert first == "  64 12.3" and second == "  256 -"
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the child has ended


def test_no_section_begins_after_the_end_of_the_day(tmp_path, capsys):
    assert gpu_day.run_day(2, True, tmp_path, [("late", 60, "-c pass")], total=0) == 1
    assert "no time left" in capsys.readouterr().out


@pytest.mark.parametrize("day", gpu_day.DAYS)
def test_the_table_of_a_day_fits_in_12000_characters(day):
    line = {"name": "F.linear_cross_entropy", "kernel": "k" * 90, "note": "OutOfMemoryError " * 9}
    line |= {"n": 16384, "v": 128256, "mode": "total", "q": [8, 32, 512, 64], "k": [8, 32, 640, 64]}
    words = gpu_day.words(False, Path("work"))
    rows = []
    for name, _, command in gpu_day.DAYS[day]:
        row = {"name": name, "outcome": "ok", "seconds": 99.0, "command": command.format(**words)}
        shown = [keys for script, keys in gpu_day.SHOWN.items() if script in row["command"]]
        if shown:
            numbers = dict.fromkeys(shown[0].split(), 123.456) | line
            row["result"] = {"rows": 99 * [numbers]}
        rows.append(row)
    assert len(gpu_day.table(rows)) < 12000


def test_without_a_gpu_only_a_dry_run_is_possible(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for flags, says in ((["1"], "there is no GPU here"), ([], "which day")):
        monkeypatch.setattr(sys, "argv", ["bench/gpu_day.py", *flags])
        with pytest.raises(SystemExit):
            exit_on_bad_input(gpu_day.main)()
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_the_dry_run_of_all_days_leaves_no_section_out(tmp_path):
    command = [sys.executable, str(ROOT / "bench/gpu_day.py"), "--dry-run", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout
    assert len(list(tmp_path.iterdir())) <= 8
    for day, sections in gpu_day.DAYS.items():
        rows = json.loads((tmp_path / f"day-{day}.json").read_text())["sections"]
        assert [row["name"] for row in rows] == [name for name, _, _ in sections]


# ---- bad input
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
        (bench_step, ["--sweep", "--only", "dense"], "--sweep"),
        (bench_sample, ["--model", "nowhere"], "nowhere/config.json"),
        (bench_sample, ["--dtype", "float8"], "--dtype"),
        (bench_sample, ["--rows", "8", "0"], "--rows 0"),
        (bench_sample, ["--rows", "8", "8"], "--rows 8 8"),
        (bench_sample, ["--new", "1"], "--new 1"),
        (bench_sample, ["--device", "cpu", "--cuda-graph"], "--cuda-graph"),
        (bench_make_model, ["--out", "made"], "--shape"),
        (bench_make_model, ["--shape", "tiny", "--out", "made", "--layers", "-1"], "--layers -1"),
        (bench_memory, ["--ranks", "2", "0"], "--ranks 0"),
        (bench_memory, ["--beside", "nowhere"], "--beside nowhere"),
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
    assert "transformers is not installed here" in capsys.readouterr().err


def test_broken_weights_found_in_a_contenders_process_are_refused_in_one_line(
    directory, monkeypatch, capsys
):
    (Path(directory) / "model.safetensors").write_bytes(b"not weights")
    monkeypatch.setattr(sys, "argv", ["bench", "--model", directory, *SMALL])
    with pytest.raises(SystemExit) as stopped:
        exit_on_bad_input(bench_step.main)()
    line = capsys.readouterr().err.splitlines()[-1]
    assert stopped.value.code == 2
    assert line.startswith("error: ") and "not a readable safetensors file" in line
