"""f, its answer weight and the advantages, against formulas in probability space, Python floats."""

import math
import statistics
from dataclasses import replace

import pytest
import torch

from aggregate import AGGREGATORS, advantages, aggregate, credit, declares
from support.args import Args

PUBLISHED = [name for name in AGGREGATORS if not declares(name, "random")]
DTYPES = [torch.float32, torch.float64]
# Rewards that are logarithms have an absolute error (c = 1 makes them 0), the others a relative.
LOGARITHMIC = {"log_prob", "info_gain", "r3", "jlb_multi"}

ORDINARY = [[0.9, 0.2, 0.5, 0.03], [0.4, 0.6, 0.99, 0.1], [0.7, 0.05, 0.3, 0.8]]
ORDINARY_NULL = [0.5, 0.1, 0.9, 0.02]
CASES = {  # name: (probabilities c [K][T], null probabilities [T])
    "ordinary": (ORDINARY, ORDINARY_NULL),
    "one token is certain": ([[1.0, 0.2, 0.5], [0.4, 1.0, 0.9]], [0.5, 0.3, 0.8]),
    "every token is certain": ([[1.0] * 4] * 3, ORDINARY_NULL),
    "null is certain": (ORDINARY, [1.0] * 4),
    "null and answer are certain": ([[1.0] * 4] * 3, [1.0] * 4),
    "null is 1e-30": (ORDINARY, [0.5, 1e-30, 0.9, 1e-30]),
    "answer is 1e-30": ([[1e-30, 0.5, 1e-30], [0.2, 1e-30, 0.3]], [0.5, 0.1, 0.9]),
    "T = 1": ([[0.9], [0.2], [0.5]], [0.3]),
    "K = 1": (ORDINARY[:1], ORDINARY_NULL),
    "equal traces": (ORDINARY[:1] * 5, ORDINARY_NULL),
}


# ---- the references
def joint(c: list[list[float]]) -> float:
    return math.log(statistics.fmean(math.prod(row) for row in c))


def r3_weights(c: list[list[float]]) -> list[float]:
    spread = [statistics.pstdev(math.log(p) for p in column) for column in zip(*c, strict=True)]
    return [s / sum(spread) if sum(spread) else 1 / len(spread) for s in spread]


def expected_reward(name: str, c: list[list[float]], null: list[float]) -> list[float]:
    """The f column of the table, one trace at a time."""
    t = len(null)
    if name == "jlb_multi" and len(c) > 1:
        return [joint(c) - joint(c[:k] + c[k + 1 :]) for k in range(len(c))]
    if name == "r3":
        return [sum(v * math.log(p) for v, p in zip(r3_weights(c), row, strict=True)) for row in c]
    f = {
        "log_prob": lambda row: math.log(math.prod(row)),
        "jlb_multi": lambda row: math.log(math.prod(row)),
        "prob": math.prod,
        "geometric_mean": lambda row: math.prod(row) ** (1 / t),
        "arithmetic_mean": statistics.fmean,
        "weighted_sum_inverse_prob": lambda row: (
            sum(p / n for p, n in zip(row, null, strict=True)) / t
        ),
        "weighted_sum_log_prob": lambda row: (
            -sum(p * math.log(n) for p, n in zip(row, null, strict=True)) / t
        ),
        "info_gain": lambda row: sum(math.log(p / n) for p, n in zip(row, null, strict=True)) / t,
    }[name]
    return [f(row) for row in c]


def expected_weight(name: str, c: list[list[float]], null: list[float]) -> list[list[float]]:
    """The w column of the table."""
    t = len(null)
    likelihood = [math.prod(row) for row in c]
    w = {
        "log_prob": lambda k, i: 1.0,
        "prob": lambda k, i: likelihood[k],
        "geometric_mean": lambda k, i: likelihood[k] ** (1 / t) / t,
        "arithmetic_mean": lambda k, i: c[k][i] / t,
        "weighted_sum_inverse_prob": lambda k, i: c[k][i] / (t * null[i]),
        "weighted_sum_log_prob": lambda k, i: -c[k][i] * math.log(null[i]) / t,
        "info_gain": lambda k, i: 1 / t,
        "r3": lambda k, i: r3_weights(c)[i],
        "jlb_multi": lambda k, i: likelihood[k] / sum(likelihood),
    }[name]
    return [[w(k, i) for i in range(t)] for k in range(len(c))]


def given(case: str, dtype: torch.dtype) -> tuple:
    """logp [K, T] and null_logp [T] in dtype, and the probabilities of those rounded numbers."""
    c, null = (torch.tensor(p, dtype=torch.float64).log().to(dtype) for p in CASES[case])
    return c, null, c.double().exp().tolist(), null.double().exp().tolist()


def rounding(logp: torch.Tensor, null_logp: torch.Tensor) -> float:
    """Relative error of exp(x) for x rounded to dtype: eps |x|, for the largest sum of logs."""
    largest = float(logp.sum(1).abs().max() + null_logp.abs().max())
    return 4 * torch.finfo(logp.dtype).eps * (1 + largest)


# ---- reward and weight
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", PUBLISHED)
def test_reward_and_answer_weight_from_autograd_are_the_tables_formulas(name, case, dtype):
    logp, null_logp, c, null = given(case, dtype)
    reward, weight = aggregate(name, logp, null_logp)
    expected = torch.tensor(expected_reward(name, c, null), dtype=torch.float64)
    expected_w = torch.tensor(expected_weight(name, c, null), dtype=torch.float64)
    assert reward.isfinite().all() and weight.isfinite().all()
    error, tiny = rounding(logp, null_logp), torch.finfo(dtype).tiny
    atol = error if name in LOGARITHMIC else tiny
    torch.testing.assert_close(reward.double(), expected, rtol=error, atol=atol)
    torch.testing.assert_close(weight.double(), expected_w, rtol=error, atol=tiny)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *DTYPES], ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_results_are_detached_in_the_dtype_that_comes_in_and_inputs_stay_as_they_were(name, dtype):
    """Under no_grad too."""
    logp, null_logp, _, _ = given("ordinary", dtype)
    before = logp.clone(), null_logp.clone()
    results = aggregate(name, logp, null_logp)
    with torch.no_grad():
        inside = aggregate(name, logp, null_logp)
    for result, same in zip(results, inside, strict=True):
        assert result.dtype == dtype and not result.requires_grad
        assert torch.equal(result, same)
    assert torch.equal(logp, before[0]) and torch.equal(null_logp, before[1])
    assert not logp.requires_grad and logp.grad is None and not null_logp.requires_grad


def test_exact_match_is_one_where_the_uniform_number_lies_below_the_answers_probability(
    monkeypatch,
):
    """So its mean is the probability of sampling the gold answer, token by token."""
    c = torch.tensor([[0.5, 0.5], [0.9, 0.2], [1.0, 1.0]], dtype=torch.float64)
    grid = (torch.arange(100) + 0.5) / 100
    hits = torch.zeros(3, dtype=torch.float64)
    for uniform in grid:
        monkeypatch.setattr(torch, "rand", lambda shape, u=uniform: u.expand(shape))
        reward, weight = aggregate("exact_match", c.log(), torch.zeros(2, dtype=torch.float64))
        assert torch.equal(weight, reward[:, None].expand(3, 2))  # d log prod c / d log c_i = 1
        hits += reward
    assert hits.tolist() == [25, 18, 100]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_over_null_is_capped_at_the_documented_exponent(dtype):
    """At the cap 4096 certain answer tokens have finite rewards; just below it nothing changes."""
    name, logp = "weighted_sum_inverse_prob", torch.zeros(2, 4096, dtype=dtype)
    reward, weight = aggregate(name, logp, torch.full((4096,), -1000.0, dtype=dtype))
    error = 128 * torch.finfo(dtype).eps  # of exp(80) computed in dtype, and of a sum of 4096
    assert reward.tolist() == pytest.approx([math.exp(80)] * 2, rel=error)
    expected = torch.full((2, 4096), math.exp(80) / 4096, dtype=torch.float64)
    torch.testing.assert_close(weight.double(), expected, rtol=error, atol=0)
    below, _ = aggregate(name, logp[:, :1], torch.tensor([-79.0], dtype=dtype))
    assert float(below[0]) == pytest.approx(math.exp(79), rel=error)


# ---- functions of one's own
def test_a_reward_made_of_the_scores_alone_has_no_answer_weight(monkeypatch):
    """Though their graph is still there."""

    def sure(logp, null_logp, example, traces, tokenizer, scores):
        return scores.sum(dim=1)

    monkeypatch.setitem(AGGREGATORS, "sure", sure)
    logp, null_logp, _, _ = given("ordinary", torch.float64)
    trace_logp = torch.rand(len(logp), 4, dtype=logp.dtype, requires_grad=True)
    reward, weight = aggregate("sure", logp, null_logp, (None, None, None, trace_logp.exp()))
    assert torch.equal(reward, trace_logp.exp().sum(dim=1).detach()) and not weight.any()
    assert not reward.requires_grad and trace_logp.grad is None


def test_rewards_that_differ_by_more_than_the_floor_without_weights_have_advantages():
    assert advantages(1 + 3e-6 * torch.arange(4.0, dtype=torch.float64)).all()


@pytest.mark.parametrize("hits", [[1, 0, 0, 1], [True, False, False, True]], ids=str)
def test_a_reward_of_whole_numbers_or_truth_values_has_the_advantages_of_its_number(
    hits, monkeypatch
):
    """In its own type every advantage would be rounded."""
    monkeypatch.setitem(AGGREGATORS, "hits", lambda logp, null_logp, example: torch.tensor(hits))
    args = Args(aggregator="hits", answer_weight="none")
    reward, advantage, _ = credit(torch.zeros(4, 3), torch.zeros(3), args, (None,))
    assert reward.tolist() == [1, 0, 0, 1]
    assert advantage.tolist() == pytest.approx([0.75**0.5 * (2 * hit - 1) for hit in hits])


# ---- advantages
REWARDS = [0.3, -1.2, 0.8, 2.5, 0.31]
BY_HAND = {
    ("mean", "std"): lambda r, k: (r[k] - statistics.fmean(r)) / statistics.stdev(r),
    ("mean", "none"): lambda r, k: r[k] - statistics.fmean(r),
    ("none", "std"): lambda r, k: r[k] / statistics.stdev(r),
    ("mean", "mean"): lambda r, k: r[k] / statistics.fmean(r) - 1,
    ("none", "none"): lambda r, k: r[k],
}


HUGE = [1e34, 3e34, 5e34, 0.0]  # of weighted_sum_inverse_prob; their squares are no fp32 numbers


@pytest.mark.parametrize("rewards", [REWARDS, REWARDS[:2], HUGE], ids=["K = 5", "K = 2", "huge"])
@pytest.mark.parametrize("center, scale", BY_HAND)
def test_advantages_are_the_formula_worked_by_hand(center, scale, rewards):
    dtype, rel = (torch.float32, 1e-6) if rewards is HUGE else (torch.float64, 1e-13)
    reward = torch.tensor(rewards, dtype=dtype)
    expected = [BY_HAND[center, scale](reward.tolist(), k) for k in range(len(rewards))]
    assert advantages(reward, center, scale).tolist() == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("center, scale", [key for key in BY_HAND if key != ("none", "none")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, -300.0, -7e3, 1e30])
def test_rewards_equal_up_to_rounding_get_exactly_no_advantage(size, dtype, center, scale):
    """Without a floor, one that differs in the last bit from seven others would get +-2.5."""
    reward = torch.full((8,), size, dtype=dtype)
    assert advantages(reward, center, scale).tolist() == [0.0] * 8
    reward[2] = torch.nextafter(reward[2], torch.tensor(math.inf, dtype=dtype))
    reward[5] = torch.nextafter(reward[5], torch.tensor(-math.inf, dtype=dtype))
    assert advantages(reward, center, scale).tolist() == [0.0] * 8


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_floor_of_equal_rewards_is_what_rounding_does_to_this_reward(name, scale):
    """On answers of 200 tokens: `prob` is 1e-40 there, and its differences count all the same."""
    r = torch.Generator().manual_seed(0)
    base = -torch.rand(200, generator=r, dtype=torch.float64) - 0.02
    null_logp = base - 0.5
    noise = torch.randn(8, 200, generator=r, dtype=torch.float64)
    if name == "r3":  # its weights come from the differences themselves
        noise = noise[:, :1].expand(-1, 200)
    for size, equal in ((1e-8, True), (1e-3, False)):
        reward, weight = aggregate(name, base + size * noise, null_logp)
        advantage = advantages(reward, "mean", scale, weight)
        assert (advantage == 0).all() == equal


@pytest.mark.parametrize("center, scale", BY_HAND)
def test_rewards_whose_std_is_below_the_least_get_no_advantage(center, scale):
    reward = torch.tensor(REWARDS, dtype=torch.float64)
    std = statistics.pstdev(REWARDS)
    kept = advantages(reward, center, scale, least_std=0.999 * std)
    assert torch.equal(kept, advantages(reward, center, scale))
    assert not advantages(reward, center, scale, least_std=1.001 * std).any()


@pytest.mark.parametrize(
    "rewards, center, scale, says",
    [
        ([0.5], "mean", "none", "center mean .* at least 2 traces"),
        # Its std is 0: every advantage would be 0, and the trace would never be trained.
        ([0.5], "none", "std", "scale std .* at least 2 traces"),
        ([0.5, 0.7], "loo", "std", "mean or none, .* mean or none: 'loo', 'std'"),
        ([0.5, 0.7], "mean", "mad", "mean or none, .* mean or none: 'mean', 'mad'"),
    ],
)
def test_what_has_no_advantage_is_refused_in_one_line(rewards, center, scale, says):
    assert advantages(torch.tensor([0.5]), "none", "none").tolist() == [0.5]  # one trace, as it is
    with pytest.raises(ValueError, match=says) as refusal:
        advantages(torch.tensor(rewards), center, scale)
    assert "\n" not in str(refusal.value)


# ---- credit: all of it for one question
def test_clipping_against_the_null_think_floors_rewards_and_silences_their_answer_weight():
    logp = torch.tensor([[-1.0, -1.0], [-3.0, -3.0]])
    null_logp = torch.tensor([-2.0, -2.0])
    raw = Args(aggregator="geometric_mean", center="none", scale="none", answer_weight="exact")
    reward, advantage, omega = credit(logp, null_logp, replace(raw, clip_null=True))
    assert torch.allclose(reward, torch.tensor([math.exp(-1) - math.exp(-2), 0.0]))
    assert torch.equal(reward, advantage)
    assert torch.allclose(omega, torch.tensor([[math.exp(-1) / 2] * 2, [0.0] * 2]))
