"""Rewards of other papers, as functions of one's own.

    python train.py --aggregator examples/rewards.py:nover

Each is a function of the answer's log-probs after K traces, logp [K, T],
and without one, null_logp [T], as in aggregate.py. Answer weights come from
autograd through it. Constants are those of the authors' code:

    nover     NOVER (arXiv 2505.16022), thinkwee/NOVER
    vr_cli    VR-CLI (arXiv 2503.22828), Alex-Gurung/ReasoningNCP
    mixture   after Quiet-STaR (arXiv 2403.09629)
"""

import math

import torch
from torch import Tensor


def nover(logp: Tensor, null_logp: Tensor, example, traces, tokenizer) -> Tensor:
    """Rank in the group by perplexity, 1 for the best and 1/K for the last, plus the share of the
    other traces that are both longer and worse.

    The perplexity is exp(NLL / (1 + log10 length)): a longer trace is compared as if its answer
    were likelier. Equal traces have neighbouring ranks. No exact answer weight: a rank has no
    gradient.
    """
    length = logp.new_tensor([max(1, len(trace.ids)) for trace in traces])  # [K] tokens
    nll = -logp.detach().mean(dim=1) / (1 + length.log10())  # [K]
    place = nll.argsort(stable=True).argsort(stable=True)  # [K] 0 for the best
    rank = (len(nll) - place) / len(nll)
    beats = (length[:, None] < length) & (nll[:, None] < nll)  # [K, K]
    return rank.to(logp) + beats.sum(dim=1) / max(1, len(nll) - 1)


nover.group = True


def vr_cli(logp: Tensor, null_logp: Tensor) -> Tensor:
    """By how much the trace lowers the answer's perplexity, in steps: 0 below 0.05 % of it, 0.5
    below 1 %, 0.9 below 2 %, else 1. No exact answer weight: steps have no gradient.
    """
    better = 1 - (null_logp.mean() - logp.detach().mean(dim=1)).exp()  # [K]
    steps = logp.new_tensor([0.0005, 0.01, 0.02])
    paid = logp.new_tensor([0.0, 0.5, 0.9, 1.0])
    return paid[torch.bucketize(better, steps, right=True)]


def mixture(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = sum_i log (c_i / 2 + n_i / 2): the answer is given with or without the trace, half-half.

    A trace costs a token log 2 at most, whatever it does to it.
    """
    return (torch.logaddexp(logp, null_logp) - math.log(2)).sum(dim=1)


mixture.signed = True


def mean_and_mixture(logp: Tensor, null_logp: Tensor) -> Tensor:
    """RLPR's mean of probabilities, and the mixture per token added to it."""
    return logp.exp().mean(dim=1) + mixture(logp, null_logp) / logp.shape[1]


mean_and_mixture.signed = True
