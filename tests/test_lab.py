"""examples/lab.py: the grids are what the flags allow, runs are resumed, and what it measures is
right on cases that can be worked out by hand."""

import json
import math
import random
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

import preflight
from support.tokenizer import Tokenizer
from examples import lab
from examples import lab_measure as measure
from examples import lab_report as report
from examples.hops import make
from data import Trace
from support.args import parse_args


# ---- grids
@pytest.mark.parametrize("method", lab.METHODS)
def test_train_accepts_the_flags_of_every_method(method):
    parse_args(lab.METHODS[method].split(), "")


@pytest.mark.parametrize("name", lab.GRIDS)
def test_every_cell_of_a_grid_has_a_method_and_a_folder_of_its_own(name):
    runs = lab.cells(lab.GRIDS[name])
    assert {run.method for run in runs} <= set(lab.METHODS)
    assert len({lab.run_folder(Path(), run) for run in runs}) == len(runs)


def test_the_map_has_twelve_settings_three_seeds_and_every_aggregator():
    grid = lab.GRIDS["map"]
    assert len(set(grid.tasks)) >= 12 and grid.seeds == 3
    assert {*lab.AGGREGATORS, *lab.BASELINES} == set(grid.methods)


def test_seeds_come_last_so_that_a_stopped_grid_has_every_cell_once():
    grid = lab.GRIDS["map"]
    half = lab.cells(grid)[: len(grid.tasks) * len(grid.methods)]
    assert {(run.task, run.method) for run in half} == {
        (task, method) for task in grid.tasks for method in grid.methods
    }


@pytest.mark.parametrize("task", [make.Task(), make.Task(easy=0, noise=4), make.Task(hard=3)])
def test_a_setting_has_the_axes_in_its_name_that_tell_it_apart(task):
    others = [make.Task(easy=8), make.Task(sloppy=0.1), make.Task(noise=16), make.Task(worked=0.03)]
    assert lab.setting_name(task) not in [lab.setting_name(other) for other in others]


# ---- runs
TINY = make.Task(easy=0, noise=1, steps=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A grid of two methods on a base that was trained for one step."""
    out = tmp_path_factory.mktemp("lab")
    grid = lab.Grid((TINY,), ("arithmetic_mean", "sft_in_context"), 1, steps=1)
    small = pytest.MonkeyPatch()
    small.setattr(lab, "LOOKUPS_RIGHT", -1.0)  # one step of pretraining teaches nothing
    small.setattr(lab, "EVAL_QUESTIONS", 2)
    small.setattr(measure, "HARD_ROWS", 2)
    small.setattr(lab, "QUESTIONS_BEFORE", 2)
    small.setattr(lab, "QUESTIONS_AFTER", 2)
    lab.make_base(out, TINY, methods=())
    data = out / "bases" / lab.setting_name(TINY) / "train.jsonl"
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:20]))
    lab.make_base(out, TINY, grid.methods)
    failed = lab.run_all(
        2, {run.method: lambda r=run: lab.do_run(out, r) for run in lab.cells(grid)}
    )
    assert failed == 0
    small.undo()
    return out, grid


def test_a_finished_run_has_all_columns_and_no_checkpoint(finished):
    rows, before = lab.collect(*finished)
    assert [row["method"] for row in rows] == ["arithmetic_mean", "sft_in_context"]
    columns = {
        *lab.AXES,
        "method",
        "seed",
        "eval_gain_shuffled",
        "hard_logp",
        "survives",
        "warnings",
    }
    assert all(columns <= set(row) for row in rows)
    assert [line["method"] for line in before] == ["arithmetic_mean"]
    assert not list(finished[0].rglob("checkpoint-*"))


def test_a_finished_run_is_not_run_again_and_a_half_finished_one_is(finished, monkeypatch, capsys):
    out, grid = finished
    half = lab.run_folder(out, lab.cells(grid)[0]) / "result.json"
    before = json.loads(half.read_text())
    half.unlink()
    again = []
    monkeypatch.setattr(lab, "do_run", lambda out, run: again.append(run.method) or "")
    monkeypatch.setattr(lab, "GRIDS", {"quick": grid})
    monkeypatch.setattr(sys, "argv", ["lab.py", "--quick", "--jobs", "1", "--out", str(out)])
    lab.main()
    assert again == ["arithmetic_mean"]
    half.write_text(json.dumps(before))
    assert (out / "quick.csv").exists()
    assert "`sft_in_context`" in (out / "quick.md").read_text()


def test_the_data_of_sft_in_context_is_the_training_data_with_traces_behind_the_questions(finished):
    folder = finished[0] / "bases" / lab.setting_name(TINY)
    plain = measure.read_rows(folder / "train.jsonl")
    with_traces = measure.read_rows(folder / "in_context.jsonl")
    assert len(plain) == len(with_traces)
    assert any(
        row["question"] != old["question"] for row, old in zip(with_traces, plain, strict=True)
    )
    for row, old in zip(with_traces, plain, strict=True):
        assert row["question"].startswith(old["question"]) and row["answer"] == old["answer"]
        assert make.MARKER not in row["question"] and make.END not in row["question"]


def test_a_base_that_cannot_look_up_is_made_again_from_another_seed(monkeypatch, tmp_path):
    def make_folder(command):
        folder = Path(command[-1])
        folder.mkdir(parents=True)
        (folder / "seed").write_text(command[-3])

    def lookups_right(folder):
        return 1.0 if (folder / "seed").read_text() == "--seed=2" else 0.2

    monkeypatch.setattr(lab, "run_child", make_folder)
    monkeypatch.setattr(measure, "lookups_right", lookups_right)
    assert json.loads(lab.make_base(tmp_path, TINY, ("sft",)))["base_seed"] == 2
    monkeypatch.setattr(lab, "BASE_SEEDS", 2)
    other = make.Task(easy=1)
    with pytest.raises(RuntimeError, match="did not learn lookups"):
        lab.make_base(tmp_path, other, ("sft",))
    assert not lab.base_folder(tmp_path, other).exists()


def test_the_committed_base_can_look_up():
    assert measure.lookups_right(lab.ROOT / "examples" / "hops") > lab.LOOKUPS_RIGHT


def test_a_run_that_fails_is_counted_and_the_others_go_on(capsys):
    work = {"bad": lambda: lab.run_child(["-c", "print('why'); 1 / 0"]), "good": lambda: "fine"}
    assert lab.run_all(1, work) == 1
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in printed and "fine" in printed


def test_an_interrupted_lab_ends_its_child_processes(monkeypatch):
    forever = [sys.executable, "-c", "import signal; signal.pause()"]
    child = subprocess.Popen(forever)
    monkeypatch.setattr(lab, "CHILDREN", {child})

    def interrupted(futures):
        raise KeyboardInterrupt

    monkeypatch.setattr(lab, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lab.run_all(1, {"child": lambda: str(child.wait())})
    assert child.wait() != 0


# ---- before training
def group(logp: torch.Tensor) -> preflight.Group:
    return preflight.Group([[] for _ in logp], logp.double(), logp[-1].double())


@pytest.mark.parametrize("hard", [1, 3])
def test_traces_are_told_apart_by_the_formats_of_make(hard):
    rng = random.Random(0)
    task = make.Task(hard=hard)
    for _ in range(20):
        question, paths = make.make_question(task, rng)
        worked, _ = make.make_trace("worked", paths, rng)
        rambling, _ = make.make_trace("rambling", paths, rng)
        wrong, astray = make.make_trace("wrong", paths, rng)
        assert measure.kind_of_trace(question, worked) == "worked right"
        assert measure.kind_of_trace(question, rambling) == "rambling"
        assert measure.kind_of_trace(question, "") == "empty"
        if astray != paths:
            assert measure.kind_of_trace(question, wrong) == "worked wrong"


@pytest.mark.parametrize("task", [make.Task(easy=2, noise=3), make.Task(easy=0, hard=3)])
def test_token_kinds_are_a_partition_of_the_answer(task):
    rng = random.Random(0)
    _, paths = make.make_question(task, rng)
    answer, hard = make.make_answer(task, paths, rng)
    kinds = measure.token_kinds(task, {"answer": answer, "hard": hard})
    words = answer.split()
    assert sorted(chain(*kinds.values())) == list(range(len(words) + 1))
    assert [words[i] for i in kinds["hard"]] == [path[-1] for path in paths]
    assert len(kinds["noise"]) == task.noise
    assert all(words[i] in make.NOISE for i in kinds["noise"])


def test_variance_shares_of_independent_tokens_are_their_variances():
    # Four traces: the hard token varies by +-2 nats, the easy one by +-1, independently.
    logp = torch.tensor([[-2.0, -1.0], [-2.0, -3.0], [-6.0, -1.0], [-6.0, -3.0]])
    positions = {"hard": [0], "easy": [1], "noise": []}
    shares = measure.variance_shares("log_prob", [group(logp)], [positions])
    assert shares == pytest.approx({"hard": 0.8, "easy": 0.2, "noise": 0.0})


def test_tokens_that_are_worse_after_well_paid_traces_have_a_share_below_zero():
    logp = torch.tensor([[-1.0, -4.0], [-2.0, -1.0]])  # the hard token falls where the other rises
    positions = {"hard": [0], "easy": [1], "noise": []}
    shares = measure.variance_shares("log_prob", [group(logp)], [positions])
    assert shares == pytest.approx({"hard": -0.5, "easy": 1.5, "noise": 0.0})


def test_the_trace_that_the_reward_prefers_is_paid_for(monkeypatch):
    """Groups of two traces, a rightly worked and the empty one: advantages +-1 / sqrt(2).

    In the committed base a trace costs easy tokens and gains the hard one.
    """
    folder = lab.ROOT / "examples" / "hops"
    tokenizer = Tokenizer(folder / "base")

    def worked_traces(model, prompts, k, *limits, **settings):
        groups = []
        for prompt in prompts:
            text = measure.worked_trace(tokenizer.decode(prompt))
            ids = tokenizer.encode_prompt(f"{text} {make.MARKER}")
            groups.append([Trace(ids, [0.0] * len(ids), finished=True)])
        return groups

    monkeypatch.setattr(preflight, "sample_traces", worked_traces)
    methods = {
        name: f"--aggregator {name}" for name in ("arithmetic_mean", "weighted_sum_log_prob")
    }
    methods["unscaled"] = "--aggregator arithmetic_mean --scale none"
    mean, weighted, unscaled = measure.what_is_paid(
        folder / "base", folder / "test.jsonl", make.Task(), methods, questions=4
    )
    assert mean["signal_to_noise"] is None  # all four are the same: there is no noise
    assert mean["predictor"] == pytest.approx(-math.sqrt(2))
    assert weighted["predictor"] == pytest.approx(math.sqrt(2))
    assert unscaled["predictor"] < 0
    assert mean["worked_right"] == 4
    assert mean["share_easy"] > mean["share_hard"]
    assert weighted["share_easy"] < weighted["share_hard"]


# ---- after training
def outcome(**changes) -> dict:
    thinks = {
        "eval_trace_len": 18.0,
        "hard_logp": -0.1,
        "hard_logp_null": -2,
        "hard_logp_shuffled": -3,
    }
    return thinks | changes


def test_thinking_survives_only_with_long_traces_that_help_and_answer_this_question():
    assert measure.survives(outcome())
    assert not measure.survives(outcome(eval_trace_len=1.0))
    assert not measure.survives(outcome(hard_logp=-2.1))
    # The null think has drifted away, and another question's trace does as well as the own one.
    assert not measure.survives(outcome(hard_logp=-2, hard_logp_null=-23, hard_logp_shuffled=-2))


def test_thinking_appears_at_the_first_of_three_steps_with_gain_and_traces():
    thinks = {"gain": 0.3, "trace_len_mean": 5.0}
    too_short = {"gain": 2.0, "trace_len_mean": 2.9}
    too_little = {"gain": 0.1, "trace_len_mean": 9.0}
    steps = [thinks, thinks, too_short, too_little, thinks, thinks, thinks]
    log = [{"step": i} | line for i, line in enumerate(steps, start=1)]
    log.insert(0, {"step": 0, "eval_gain": 3.0, "eval_trace_len": 9.0})  # not a step of training
    assert measure.first_thinking_step(log) == 5
    assert measure.first_thinking_step(log[:-1]) is None


# ---- report
def test_ranks_of_equal_values_are_shared():
    assert report.ranks([3.0, 1.0, 3.0, 2.0]) == [3.5, 1.0, 3.5, 2.0]


def test_spearman_sees_order_alone():
    assert report.spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert report.spearman([1, 2, 3], [9, 4, 1]) == pytest.approx(-1.0)
    # 1 - 6 sum d^2 / (n (n^2 - 1)) without equal values
    assert report.spearman([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]) == pytest.approx(1 - 6 * 4 / 120)
    assert math.isnan(report.spearman([1, 2], [1, 1]))


def test_a_csv_file_gives_back_what_was_written_in_it(tmp_path):
    rows = [{"method": "r3", "seed": 0, "right": 0.25, "survives": True, "thinks_from": None}]
    report.write_csv(tmp_path / "a.csv", rows)
    assert report.read_csv(tmp_path / "a.csv") == rows


AXES = {"easy": 8, "sloppy": 0.3, "noise": 0, "worked": 0.15, "hard": 1}


def test_verdicts_are_counted_against_what_most_seeds_do():
    thinks = {"helpful": 1.0, "empty": 0.0, "dead": 0.0}
    removes = {"helpful": -2.0, "empty": 1.0, "dead": 0.0}
    before = [AXES | {"method": "a"} | thinks, AXES | {"method": "b"} | removes]
    before.append(AXES | {"noise": 4, "method": "a"} | removes)
    outcomes = {"a": [True, True, False], "b": [False, True, False]}
    rows = [
        AXES | {"noise": noise, "method": method, "survives": survives}
        for noise in (0, 4)
        for method, found in outcomes.items()
        for survives in found
    ]
    assert report.verdicts(rows, before).splitlines()[2:] == [
        "| held out | removes thinking | 1 | 0 |",
        "| placed on | keeps thinking | 1 | 0 |",
        "| placed on | removes thinking | 0 | 1 |",
    ]


def test_the_committed_table_is_made_of_the_committed_runs():
    hops = lab.ROOT / "examples" / "hops"
    rows, before = report.read_csv(hops / "map.csv"), report.read_csv(hops / "map-before.csv")
    assert (hops / "map.md").read_text() == report.report(rows, before) + "\n"
