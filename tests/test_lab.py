"""examples/lab.py: the grids are what the flags allow, runs are resumed, and what it measures is
right on cases that can be worked out by hand. examples/sums: its answers are right."""

import json
import math
import random
import re
import sys

import pytest

from data import Trace
from examples import lab
from examples.hops import make
from examples.sums import make as sums
from support.args import check_args, parse_args
from support.tokenizer import Tokenizer

HOPS = lab.ROOT / "examples" / "hops"


# ---- grids
@pytest.mark.parametrize("grid", lab.GRIDS.values(), ids=lab.GRIDS)
def test_train_accepts_every_method_of_a_grid_and_every_setting_has_a_name_of_its_own(grid):
    for _, method in grid.cells:
        check_args(parse_args(lab.flags_of(method), ""))
    assert len(set(grid.cells)) == len(grid.cells)
    tasks = {task for task, _ in grid.cells}
    assert len({lab.label(vars(task)) for task in tasks}) == len(tasks)


# ---- runs
TINY = make.Task(easy=0, noise=1, steps=1)
GRID = lab.Grid([(TINY, "arithmetic_mean"), (TINY, "sft")], seeds=1, steps=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A grid of two methods on a base that was trained for one step."""
    out = tmp_path_factory.mktemp("lab")
    with pytest.MonkeyPatch.context() as small:
        small.setattr(lab, "LOOKUPS_RIGHT", -1.0)  # one step of pretraining teaches nothing
        for size in ("EVAL_QUESTIONS", "HARD_ROWS"):
            small.setattr(lab, size, 2)
        small.setitem(lab.GRIDS, "quick", GRID)
        assert lab.run_grid("quick", out, jobs=2) == 0
    return out


def test_a_finished_run_has_all_columns_and_no_checkpoint(finished):
    rows = lab.read_csv(finished / "quick.csv")
    assert {row["method"] for row in rows} == {"arithmetic_mean", "sft"}
    columns = "easy sloppy noise hard seed steps eval_trace_len hard_right survives thinks_from"
    assert all(set(columns.split()) <= set(row) for row in rows)
    assert not list(finished.rglob("checkpoint-*"))


def test_a_finished_run_is_not_run_again_and_a_half_finished_one_is(finished, monkeypatch):
    def again(out, task, method, seed, steps):
        ran.append(method)
        return lost

    file, ran = finished / "quick.csv", []
    rows = lab.read_csv(file)
    (lost,) = [row for row in rows if row["method"] == "sft"]
    lab.write_csv(file, [row for row in rows if row != lost])
    monkeypatch.setattr(lab, "do_run", again)
    monkeypatch.setitem(lab.GRIDS, "quick", GRID)
    monkeypatch.setattr(sys, "argv", ["lab.py", "--quick", "--out", str(finished)])
    lab.main()
    assert ran == ["sft"]
    assert len(lab.read_csv(file)) == 2
    assert "`sft`" in (finished / "quick.md").read_text()


def test_a_run_that_fails_is_counted_and_the_others_go_on(capsys):
    work = {"bad": lambda: lab.run_child(["-c", "print('why'); 1 / 0"]), "good": lambda: "fine"}
    assert lab.run_all(1, work, str) == 1
    printed = capsys.readouterr().out
    assert "ZeroDivisionError" in printed and "fine" in printed


# ---- what is measured
@pytest.mark.parametrize("hard", [1, 3])
def test_a_rightly_worked_trace_is_what_make_writes_for_the_question(hard):
    rng = random.Random(0)
    for _ in range(20):
        question, paths = make.make_question(make.Task(hard=hard), rng)
        assert lab.worked_trace(question) == make.make_trace("worked", paths, rng)[0]
        question, paths = sums.make_question(make.Task(hard=hard), rng)
        assert lab.worked_trace(question) == make.make_trace("worked", paths, rng, sums.SUMS)[0]


@pytest.fixture
def worked_traces(monkeypatch):
    """Every greedy trace is the rightly worked one of its question."""

    def sample(model, tokenizer, prompts, k, *limits, **settings):
        texts = [lab.worked_trace(tokenizer.decode(prompt)) for prompt in prompts]
        ids = [tokenizer.encode_prompt(f"{text} {make.MARKER}") for text in texts]
        return [[Trace(row, [0.0] * len(row), finished=True)] for row in ids]

    monkeypatch.setattr(lab, "sample_to_marker", sample)


def test_the_committed_base_looks_up_and_is_right_after_its_own_worked_trace_alone(worked_traces):
    model, tokenizer = lab.load_model(HOPS / "base"), Tokenizer(HOPS / "base")
    examples = lab.read_examples(HOPS / "test.jsonl", 32)
    assert lab.lookups_right(model, tokenizer, examples) > lab.LOOKUPS_RIGHT
    figures = lab.hard_tokens(HOPS / "base", HOPS / "test.jsonl")
    assert figures["hard_right"] > 0.95 and figures["hard_logp"] > math.log(0.8)
    assert figures["hard_right_null"] < 0.3 and figures["hard_right_shuffled"] < 0.3


def test_thinking_survives_only_with_long_traces_that_help_and_answer_this_question():
    thinks = {"eval_trace_len": 18.0, "hard_logp": -0.1}
    thinks |= {"hard_logp_null": -2.0, "hard_logp_shuffled": -3.0}
    assert lab.survives(thinks)
    assert not lab.survives(thinks | {"eval_trace_len": 1.0})
    assert not lab.survives(thinks | {"hard_logp": -2.1})
    # The null think has drifted away, and another question's trace does as well as the own one.
    drifted = {"hard_logp": -2.0, "hard_logp_null": -23.0, "hard_logp_shuffled": -2.0}
    assert not lab.survives(thinks | drifted)


def test_thinking_appears_at_the_first_of_three_steps_with_gain_and_traces():
    thinks = {"gain": 0.3, "trace_len_mean": 5.0}
    too_short = {"gain": 2.0, "trace_len_mean": 2.9}
    too_little = {"gain": 0.1, "trace_len_mean": 9.0}
    steps = [thinks, thinks, too_short, too_little, thinks, thinks, thinks]
    log = [{"step": i} | line for i, line in enumerate(steps, start=1)]
    log.insert(0, {"step": 0, "eval_gain": 3.0, "eval_trace_len": 9.0})  # not a step of training
    assert lab.first_thinking_step(log) == 5
    assert lab.first_thinking_step(log[:-1]) is None


# ---- examples/sums
@pytest.mark.parametrize("hard", [1, 3])
def test_the_hard_tokens_are_the_last_digits_of_the_sums(hard):
    task = make.Task(hard=hard)
    for seed in range(20):
        rng = random.Random(seed)
        question, paths = sums.make_question(task, rng)
        answer, positions = make.make_answer(task, paths, rng)
        terms = question.removesuffix(" ?").split(" ; ")
        totals = [sum(map(int, text.split(" + "))) % 10 for text in terms]
        assert [int(answer.split()[position]) for position in positions] == totals


def test_the_tokenizer_has_every_word_of_the_documents(tmp_path):
    make.write_tokenizer(tmp_path, sums.SUMS.vocabulary)
    (tmp_path / "config.json").write_text("{}")
    tokenizer, rng = Tokenizer(tmp_path), random.Random(0)
    unknown = tokenizer.model.token_to_id("<unk>")
    for document in [make.make_document, make.make_lookup_document] * 50:
        for text in document(make.Task(), rng, sums.SUMS):
            assert unknown not in tokenizer.encode_prompt(text)


# ---- tables
@pytest.mark.parametrize("name", ["map", "fresh", "untried"])
def test_a_committed_table_and_its_figure_are_made_of_the_committed_runs(name, tmp_path, capsys):
    (tmp_path / f"{name}.csv").write_bytes((HOPS / f"{name}.csv").read_bytes())
    lab.write_report(tmp_path / name)
    for file in tmp_path.iterdir():  # without matplotlib map.svg is not made
        assert file.read_text() == (HOPS / file.name).read_text()


def test_predictions_are_compared_with_the_runs_there_are(tmp_path, monkeypatch, capsys):
    """Half of the seeds are not most; a reward that has not been run does not count."""
    race = {"prob": 20, "r3": 9, "log_prob": None, "geometric_mean": 5}
    line = {"make": "examples/hops/make.py --easy=8", "train": "--traces=4", "race": race}
    (tmp_path / "settings.json").write_text(json.dumps({"fresh": [line]}))
    monkeypatch.setattr(lab, "RACE", tmp_path / "settings.json")
    measured = {"prob": [18, 24, None], "r3": [12, None], "log_prob": [None, None]}
    rows = [
        vars(make.Task(easy=8))
        | {"method": f"{reward} --traces=4", "seed": seed, "steps": 60}
        | {"survives": step is not None, "thinks_from": step}
        for reward, steps in measured.items()
        for seed, step in enumerate(steps)
    ]
    lab.write_csv(tmp_path / "fresh.csv", rows)
    lab.write_report(tmp_path / "fresh")
    text = (tmp_path / "fresh.md").read_text()
    assert text.startswith("7 runs in 3 of ") and " cells, 1 settings; " in text
    assert "latest: 0.50" in text  # ranks 2 1 3 and 1 2 3
    assert "| the race | 2 of 3 | 67% to 67% | 5 of 7 | 71% to 71% | 1 of 2 |" in text
    assert "| always lost | 2 of 3 | 67% to 67% | 4 of 7 | 57% to 57% | 0 of 0 |" in text
    assert "| 8 easy, sloppy 0.3 | r3 --traces=4 | 9 | 12 - | 1/2 | no |" in text
    dots = re.findall(r'<circle cx="(\S+)" cy="(\S+)"', (tmp_path / "fresh.svg").read_text())
    assert dots == [("20", "24"), ("9", "36.5"), ("61", "61")]


def test_the_interval_is_of_settings_and_equal_values_share_a_rank():
    assert lab.bootstrap([8, 8, 4], [8, 8, 8]) == pytest.approx([0.5, 1.0])
    assert lab.bootstrap([3] * 5, [4] * 5) == [0.75, 0.75]
    # Ranks 1 2 3.5 3.5 and 1 3 2 4: products of deviations sum to 3, squares to 4.5 and 5.
    assert lab.spearman([1, 2, 9, 9], [10, 30, 20, 70]) == f"{3 / math.sqrt(4.5 * 5):.2f}"
    assert lab.spearman([1, 1], [1, 2]) == "-"
