"""support/metrics.py: each sign of collapse is named once; the console, trackers."""

import sys
from pathlib import Path

import pytest
from conftest import BRIEF
from tiny import lines_of

import train
from support.args import parse_args
from support.distributed import Progress
from support.metrics import SIGNS, Log, signs_of_collapse

# A run that learns to think: nothing to warn of.
HEALTHY = {
    "trace_len_mean": 12.0,
    "trace_len_max": 20,
    "rep_frac": 0.1,
    "finished_frac": 0.9,
    "cut_frac": 0.0,
    "limit_frac": 0.1,
    "zero_std_frac": 0.95,  # all K traces are right
    "gain": 2.0,
    "gold_logp_null": -3.0,
    "eval_gain": 2.0,
    "eval_gain_shuffled": -1.0,
    "eval_trace_len": 12.0,
}
SFT = dict.fromkeys(HEALTHY, 0.0) | {"zero_std_frac": 1.0, "eval_trace_len": 1.0}
BAD = {
    "vanishing_trace": {"trace_len_mean": 1.2},
    "repeated_trace": {"rep_frac": 0.8},
    "unfinished_trace": {"finished_frac": 0.1, "cut_frac": 0.6, "limit_frac": 0.3},
    "dead_groups": {"gain": 0.0, "zero_std_frac": 1.0},
    "trace_ignored": {"eval_gain": 0.5, "eval_gain_shuffled": 0.49},
    "null_drift": {"gold_logp_null": -11.0},
}
QUIET = {name: value for name, value in HEALTHY.items() if "eval" not in name}  # not evaluated


def warned(lines: list[dict]) -> list[int]:
    """The numbers of warnings that the lines of a log bring, from step 0 on."""
    history = []
    for step, figures in enumerate(lines):
        record = {"step": step} | figures
        texts = signs_of_collapse(history, record)
        history.append(record | ({"warnings": texts} if texts else {}))
    return [len(line.get("warnings", [])) for line in history]


@pytest.mark.parametrize(("name", "figure"), [(name, figure) for name, figure, _, _ in SIGNS])
def test_a_sign_is_named_in_the_third_bad_line_in_a_row_and_never_again(name, figure):
    bad = HEALTHY | BAD[name]
    assert warned([{}, HEALTHY, *[bad] * 6, HEALTHY, *[bad] * 6]) == [0] * 4 + [1] + [0] * 10
    assert not any(warned([{}, *[HEALTHY, bad, bad] * 4]))
    history = [{"step": 1} | HEALTHY, {"step": 2} | bad, {"step": 3} | bad]
    (text,) = signs_of_collapse(history, {"step": 4} | bad)
    assert text.startswith(f"{name}: {figure} {bad[figure]:+.3g} at step 4; try ")


def test_a_healthy_run_and_plain_sft_get_no_warning_and_lines_without_evaluation_are_passed_over():
    before = {"eval_gain": 0.0, "eval_gain_shuffled": 0.0, "eval_trace_len": 9.0}
    assert not any(warned([before, *[HEALTHY] * 20]) + warned([{}, *[SFT] * 9]))
    assert warned([{}, *[QUIET, HEALTHY | BAD["trace_ignored"]] * 3]) == [0] * 6 + [1]


def test_warnings_are_written_printed_and_not_repeated_after_a_resume(tmp_path, capsys):
    for first, printed in ((1, 1), (4, 0)):
        log = Log(tmp_path, steps=9, last_step=first - 1)
        for step in range(first, first + 3):
            log.write({"step": step} | HEALTHY | BAD["repeated_trace"])
        text = "repeated_trace: rep_frac +0.8 at step 3"
        assert capsys.readouterr().out.count(text) == printed
    lines = lines_of(tmp_path / "log.jsonl")
    assert [len(line.get("warnings", [])) for line in lines] == [0, 0, 1, 0, 0, 0]


def test_steps_that_train_no_trace_do_not_count_as_signs_of_collapse(tmp_path):
    (tmp_path / "args.json").write_text('{"answers_first": 4}')
    log = Log(tmp_path, steps=9, last_step=0)
    for step in range(1, 8):
        log.write({"step": step} | HEALTHY | BAD["dead_groups"])
    assert [len(line.get("warnings", [])) for line in log.history] == [0] * 6 + [1]


# ---- the console
def test_the_console_names_how_traces_ended_and_says_nothing_of_it_in_plain_sft(tmp_path):
    log = Log(tmp_path, steps=9, last_step=0)
    held_out = {"eval_accuracy": 0.5, "eval_accuracy_null": 0.1}
    ended = {"finished_frac": 0.08, "cut_frac": 0.9, "limit_frac": 0.02}
    line = log.console_line({"step": 1} | HEALTHY | ended | held_out)
    assert "trace_len 12.0  finished 8%  cut 90%  at limit 2%  " in line
    assert "  gain +2.00  " in line and "  eval_gain +2.00  " in line
    line = log.console_line({"step": 1} | HEALTHY | {"finished_frac": 1.0, "limit_frac": 0.0})
    assert "finished 100%" in line and "cut" not in line and "limit" not in line
    line = log.console_line({"step": 1} | SFT)
    assert not any(word in line for word in ("finished", "cut", "limit"))


def test_progress_is_one_line_on_a_terminal_and_seldom_one_in_a_file(monkeypatch, capsys):
    monkeypatch.setattr("support.distributed.ERASE", "\r\x1b[K")
    shown = Progress("evaluating", 2, "questions")
    for done in (1, 1, 2):  # the second time there is nothing new
        shown.update(done)
    lines = capsys.readouterr().err.split("\r\x1b[K")
    assert lines == ["", "evaluating 0/2 questions", "evaluating 1/2 questions", ""]
    monkeypatch.setattr("support.distributed.ERASE", "")
    for seconds, said in ((30, []), (-1, lines[1:3])):
        monkeypatch.setattr("support.distributed.EVERY", seconds)
        Progress("evaluating", 2, "questions").update(1)
        assert capsys.readouterr().err.splitlines() == said


# ---- trackers
@pytest.mark.parametrize("fails", ["", "init", "log", "finish"])
def test_a_tracker_gets_flags_and_figures_and_one_that_fails_does_not_end_a_run(
    fails, world, monkeypatch, capsys
):
    stand_in = f"""calls = []
def call(name, given):
    calls.append((name, given))
    if name == {fails!r}:
        raise RuntimeError("no network")
def init(**given): call("init", given)
def log(figures, step): call("log", figures | {{"step": step}})
def finish(): call("finish", {{}})
"""
    Path("trackio.py").write_text(stand_in)
    monkeypatch.syspath_prepend(Path.cwd())
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    argv = ["--model=model", "--data=rows.jsonl", "--out=new", "--tracker=trackio", *BRIEF]
    train.train(parse_args(argv, ""))
    calls = sys.modules.pop("trackio").calls
    names = ["init", "log", "log", "finish"]
    called = names[: names.index(fails) + 1] if fails else names
    assert [name for name, _ in calls] == called
    assert calls[0][1]["config"]["traces"] == 2 and calls[0][1]["name"] == "new"
    lines = lines_of("new/log.jsonl")
    assert [line["step"] for line in lines] == [1, 2]
    for (_, figures), line in zip(calls[1:3], lines, strict=False):
        assert figures == {name: x for name, x in line.items() if not isinstance(x, list | None)}
    notes = capsys.readouterr().out.count("nothing is tracked: no network")
    assert notes == (fails != "")
