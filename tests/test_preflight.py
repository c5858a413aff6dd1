"""preflight.py: what each reward pays for, on groups worked by hand."""

import pytest
import tiny
import torch
from test_sample import letters

from aggregate import AGGREGATORS, advantages, aggregate
from data import Example
from preflight import MARGIN, Group, main, preflight, sample_group_scores, verdict
from support.weights import save_model

EASY, HARD = 9, 1  # answer tokens


def group(rows: list[tuple[int, float, float]]) -> Group:
    """Traces as (length, probability of each easy token, of the hard one), the empty one last."""
    probabilities = [[easy] * EASY + [hard] * HARD for _, easy, hard in rows]
    logp = torch.tensor(probabilities, dtype=torch.float64).log()
    return Group([[0] * length for length, _, _ in rows], logp, logp[-1])


# A worked trace costs the easy tokens some probability and makes the hard one likely.
WORKED, RAMBLING, EMPTY = (12, 0.45, 0.90), (8, 0.50, 0.12), (0, 0.99, 0.12)
TAXED = group([WORKED, RAMBLING, RAMBLING, EMPTY, EMPTY])
FREE = group([(12, 0.99, 0.90), (8, 0.99, 0.10), (8, 0.99, 0.10), EMPTY, EMPTY])


# The worked trace gains on the hard token, and loses on the nine easy ones:
KEEPS = {
    "weighted_sum_log_prob": True,  # 0.78 * 2.1 = 1.65; 9 * 0.54 * 0.01 = 0.05
    "weighted_sum_inverse_prob": True,  # 0.78 / 0.12 = 6.5; 9 * 0.54 / 0.99 = 4.9
    "arithmetic_mean": False,  # 0.78; 9 * 0.54 = 4.9
    "log_prob": False,  # log(0.9 / 0.12) = 2.0; 9 log(0.99 / 0.45) = 7.1
}


@pytest.mark.parametrize("name", KEEPS)
def test_the_reward_decides_where_a_trace_costs_easy_tokens(name):
    row = preflight([TAXED] * 4, name)
    assert row["verdict"] == ("keeps thinking" if KEEPS[name] else "removes thinking")
    assert row["dead"] == 0
    assert preflight([FREE] * 4, name)["verdict"] == "keeps thinking"


def test_a_helpful_trace_may_get_less_by_the_margin():
    assert verdict(helpful=0.0, empty=MARGIN - 0.01, dead=0.0) == "keeps thinking"
    assert verdict(helpful=0.0, empty=MARGIN + 0.01, dead=0.0) == "removes thinking"
    # Half the price: log_prob pays the empty trace more, within the margin.
    row = preflight([group([(12, 0.75, 0.90), (8, 0.75, 0.12), EMPTY, EMPTY])], "log_prob")
    assert row["helpful"] < row["empty"] and row["verdict"] == "keeps thinking"


def test_equal_rewards_or_no_helpful_trace_are_no_signal():
    row = preflight([group([(5, 0.9, 0.2)] * 4)], "log_prob")
    assert row["verdict"] == "no signal" and row["dead"] == 1
    hurts = group([(5, 0.9, 0.1), (4, 0.9, 0.05), EMPTY])
    assert preflight([hurts], "log_prob")["verdict"] == "no signal"


def test_the_figures_are_means_of_the_advantages_that_training_would_use():
    row = preflight([TAXED, FREE], "arithmetic_mean")
    paid = []  # [2, K+1]
    for g in (TAXED, FREE):
        reward, weight = aggregate("arithmetic_mean", g.answer_logp, g.null_logp)
        paid.append(advantages(reward, "mean", "std", weight))
    paid = torch.stack(paid)
    assert row["empty"] == pytest.approx(float(paid[:, -1].mean()))
    assert row["helpful"] == pytest.approx(float(paid[:, 0].mean()))
    # Of 8 sampled traces two are empty, and two have 12 tokens.
    assert row["short"] == pytest.approx(float(paid[:, 3].mean()))
    assert row["long"] == pytest.approx(float(paid[:, 0].mean()))
    lengths = torch.tensor([12, 8, 8, 0] * 2, dtype=torch.float64)
    correlation = torch.corrcoef(torch.stack([lengths, paid[:, :-1].flatten()]))[0, 1]
    assert row["corr"] == pytest.approx(float(correlation))


def test_the_groups_are_sampled_traces_and_the_empty_one(tmp_path):
    model, tokenizer = tiny.model(3), letters(tmp_path)
    examples = [Example(i, [1 + i, 2], [3, 4, 5], "", "") for i in range(3)]
    for group in sample_group_scores(model, tokenizer, examples, k=4, max_trace=6, seed=7):
        assert group.answer_logp.shape == (5, 3)
        assert torch.equal(group.answer_logp[-1], group.null_logp)
        assert group.lengths()[-1] == 0 and (group.lengths() <= 6).all()


def test_the_command_prints_a_line_for_every_aggregator_but_the_random_one(
    tmp_path, monkeypatch, capsys
):
    save_model(tiny.model(9, torch.float32), tmp_path)
    letters(tmp_path / "words").save(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"question": "b c", "answer": "a b"}\n')
    flags = f"--model {tmp_path} --data {tmp_path}/rows.jsonl --max-trace 6 --device cpu"
    monkeypatch.setattr("sys.argv", ["preflight.py", *flags.split()])
    main()
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[1:]} == set(AGGREGATORS) - {"exact_match"}
