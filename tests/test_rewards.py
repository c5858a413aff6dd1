"""examples/rewards.py: rewards of other papers are their formulas, worked by hand in float64."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from aggregate import aggregate
from support.args import Args, check_args
from support.errors import InputError

FILE = Path(__file__).parents[1] / "examples" / "rewards.py"
LOGP = torch.tensor(
    [[-0.1, -2.0, -0.3], [-0.2, -0.5, -0.1], [-1.0, -1.0, -1.0], [-0.2, -0.5, -0.1]],
    dtype=torch.float64,
)
NULL = torch.tensor([-0.05, -2.5, -0.2], dtype=torch.float64)


def reward_of(name: str, lengths=(4, 20, 1, 20)) -> tuple[torch.Tensor, torch.Tensor]:
    traces = [SimpleNamespace(ids=[0] * length) for length in lengths]
    return aggregate(f"{FILE}:{name}", LOGP, NULL, (None, traces, None))


def test_nover_is_the_rank_by_perplexity_plus_the_pairs_both_shorter_and_better():
    lengths = [4, 20, 1, 20]
    perplexity = [
        math.exp(-sum(row) / 3 / (1 + math.log10(length)))
        for row, length in zip(LOGP.tolist(), lengths, strict=True)
    ]
    expected = []
    for k in range(4):
        # an equal one that comes earlier is before it
        before = sum(
            perplexity[j] < perplexity[k] or (perplexity[j] == perplexity[k] and j < k)
            for j in range(4)
        )
        beats = sum(lengths[k] < lengths[j] and perplexity[k] < perplexity[j] for j in range(4))
        expected.append((4 - before) / 4 + beats / 3)
    reward, weight = reward_of("nover", lengths)
    assert reward.tolist() == pytest.approx(expected, rel=1e-13)
    assert not weight.any()  # a rank has no gradient


def test_nover_takes_an_empty_trace_for_one_token():
    assert torch.equal(reward_of("nover", (4, 20, 0, 20))[0], reward_of("nover")[0])


@pytest.mark.parametrize(
    "percent, paid",
    [(-1, 0), (0.04, 0), (0.06, 0.5), (0.9, 0.5), (1.1, 0.9), (1.9, 0.9), (2.1, 1), (50, 1)],
)
def test_vr_cli_pays_for_a_lower_perplexity_in_steps(percent, paid):
    null_logp = torch.tensor([-0.5, -1.5], dtype=torch.float64)
    logp = (null_logp - math.log(1 - percent / 100))[None]
    reward, weight = aggregate(f"{FILE}:vr_cli", logp, null_logp)
    assert reward.tolist() == [paid] and not weight.any()


def test_the_mixture_costs_a_token_log_2_at_most_and_its_weight_is_the_traces_share():
    reward, weight = reward_of("mixture")
    c, n = LOGP.exp(), NULL.exp()
    assert torch.allclose(reward, ((c + n) / 2).log().sum(dim=1), rtol=1e-13, atol=0)
    assert torch.allclose(weight, c / (c + n), rtol=1e-13, atol=0)
    hopeless, _ = aggregate(f"{FILE}:mixture", torch.full_like(LOGP, -1e6), NULL)
    assert torch.allclose(hopeless, NULL.sum() - 3 * torch.tensor(2.0).double().log())


def test_the_mean_and_the_mixture_are_added():
    reward, _ = reward_of("mean_and_mixture")
    mixture, _ = reward_of("mixture")
    assert torch.allclose(reward, LOGP.exp().mean(dim=1) + mixture / 3, rtol=1e-13, atol=0)


def test_a_reward_that_can_be_negative_has_no_mean_to_divide_by():
    with pytest.raises(InputError, match="--scale mean --aggregator"):
        check_args(Args(aggregator=f"{FILE}:mixture", scale="mean"))
    check_args(Args(aggregator=f"{FILE}:vr_cli", scale="mean"))
    check_args(Args(aggregator="log_prob", scale="mean", clip_null=True))
