"""support/collapse.py: each sign of collapse is named once; correlation of length and reward."""

import json

import pytest

from support.metrics import SIGNS, Log, mean_correlation
from support.metrics import collapse_warnings as warnings

# A run that learns to think: nothing to warn of.
HEALTHY = {
    "trace_len_mean": 12.0,
    "trace_len_max": 20,
    "rep_frac": 0.1,
    "zero_std_frac": 0.95,  # all K traces are right
    "gain": 2.0,
    "gold_logp_null": -3.0,
    "eval_gain": 2.0,
    "eval_gain_shuffled": -1.0,
    "eval_trace_len": 12.0,
}
BAD = {
    "vanishing_trace": {"trace_len_mean": 1.2},
    "repeated_trace": {"rep_frac": 0.8},
    "dead_groups": {"gain": 0.0, "zero_std_frac": 1.0},
    "trace_ignored": {"eval_gain": 0.5, "eval_gain_shuffled": 0.49},
    "null_drift": {"gold_logp_null": -11.0},
}


def run(lines: list[dict]) -> list[list[str]]:
    """The warnings that each line of a log brings."""
    history, found = [], []
    for step, figures in enumerate(lines):
        record = {"step": step} | figures
        texts = warnings(history, record)
        history.append(record | ({"warnings": texts} if texts else {}))
        found.append(texts)
    return found


def test_every_sign_is_tested():
    assert list(BAD) == [sign.__name__ for sign, _, _ in SIGNS]


def test_a_run_that_learns_to_think_gets_no_warning():
    before = {"eval_gain": 0.0, "eval_gain_shuffled": 0.0, "eval_trace_len": 9.0}
    assert run([before] + 20 * [HEALTHY]) == 21 * [[]]


def test_plain_sft_gets_no_warning():
    sft = {"trace_len_mean": 0.0, "trace_len_max": 0, "rep_frac": 0.0, "zero_std_frac": 1.0}
    sft |= {"gain": 0.0, "gold_logp_null": -2.0, "eval_gain": 0.0, "eval_gain_shuffled": 0.0}
    assert run([{}] + 9 * [sft | {"eval_trace_len": 1.0}]) == 10 * [[]]


@pytest.mark.parametrize("name", BAD)
def test_a_sign_is_named_once_with_step_metric_value_and_remedy(name):
    found = run([{}] + 4 * [HEALTHY] + 6 * [HEALTHY | BAD[name]])
    assert found[:7] + found[8:] == 10 * [[]]  # in the third line in a row, and never again
    (text,) = found[7]
    assert text.startswith(f"{name}: ") and "at step 7; try " in text
    metric = next(metric for sign, metric, _ in SIGNS if sign.__name__ == name)
    assert f"{metric} " in text


@pytest.mark.parametrize("name", BAD)
def test_two_bad_lines_are_no_sign(name):
    assert run([{}] + 5 * [HEALTHY, HEALTHY | BAD[name], HEALTHY | BAD[name]]) == 16 * [[]]


def test_lines_without_an_evaluation_do_not_interrupt_it():
    quiet = {name: value for name, value in HEALTHY.items() if "eval" not in name}
    found = run([{}] + 3 * [quiet, HEALTHY | BAD["trace_ignored"]])
    assert [len(texts) for texts in found] == [0, 0, 0, 0, 0, 0, 1]


def test_warnings_are_written_printed_and_not_repeated_after_a_resume(tmp_path, capsys):
    bad = HEALTHY | BAD["repeated_trace"]
    log = Log(tmp_path, steps=9, last_step=0)
    for step in range(1, 4):
        log.write({"step": step} | bad)
    assert "repeated_trace: rep_frac +0.8 at step 3" in capsys.readouterr().out
    log = Log(tmp_path, steps=9, last_step=3)
    for step in range(4, 8):
        log.write({"step": step} | bad)
    assert "repeated_trace" not in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [len(line.get("warnings", [])) for line in lines] == [0, 0, 1, 0, 0, 0, 0]


def test_the_correlation_of_length_and_reward_is_taken_within_a_question():
    """Questions with longer traces and higher rewards throughout say nothing about a trace."""
    lengths = [[1, 2, 3], [11, 12, 13], [5, 5, 5]]
    rewards = [[0.3, 0.2, 0.1], [9.0, 8.0, 7.5], [0.1, 0.2, 0.3]]  # the last: no correlation
    assert mean_correlation(lengths, rewards) == pytest.approx((-1 - 0.98198050606) / 2)
    assert mean_correlation([[2, 2]], [[0.1, 0.2]]) == 0
