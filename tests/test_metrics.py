"""support/metrics.py: each sign of collapse is named once; correlation of length and reward."""

import json

import pytest

from support.metrics import SIGNS, Log, mean_correlation, signs_of_collapse

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
SFT = dict.fromkeys(HEALTHY, 0.0) | {"zero_std_frac": 1.0, "eval_trace_len": 1.0}
BAD = {
    "vanishing_trace": {"trace_len_mean": 1.2},
    "repeated_trace": {"rep_frac": 0.8},
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
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [len(line.get("warnings", [])) for line in lines] == [0, 0, 1, 0, 0, 0]


def test_the_correlation_of_length_and_reward_is_taken_within_a_question():
    """Questions with longer traces and higher rewards throughout say nothing about a trace."""
    lengths = [[1, 2, 3], [11, 12, 13], [5, 5, 5]]
    rewards = [[0.3, 0.2, 0.1], [9.0, 8.0, 7.5], [0.1, 0.2, 0.3]]  # the last: no correlation
    assert mean_correlation(lengths, rewards) == pytest.approx((-1 - 0.98198050606) / 2)
    assert mean_correlation([[2, 2]], [[0.1, 0.2]]) == 0
