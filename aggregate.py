"""From the gold answer's probabilities to what the policy learns: reward, answer weight, advantage.

    c_i = pi(y*_i | x, z, m, y*_<i)     probability of gold token i after the trace z         logp[k, i] = log c_i of trace k
    n_i = the same with an empty trace  ("null think"), never differentiated                  null_logp[i]

    J = E_z[ f(c) ],   grad J = E_z[ f(c) grad log pi(z|x)  +  sum_i w_i grad log c_i ],   w_i = d f / d log c_i

A published method is a choice of f. Each is one function below, under its formula; `AGGREGATORS` names them for --aggregator. The answer
weight w comes from autograd through the same function, so a new f brings its answer gradient along:

    def shortest_path(logp, null_logp):          # [K, T], [T] -> reward [K]
        return logp.exp().min(dim=1).values
    AGGREGATORS["shortest_path"] = shortest_path

Everything is in log space and in the dtype it is given.
"""

import math

import torch
from torch import Tensor

from support.errors import InputError

# 1 / n_i = exp(-log n_i) is capped at exp(80) = 5.5e34: 4096 answer tokens at the cap still add up to a finite fp32 number.
MAX_EXPONENT = 80.0
# Rewards closer than this, or than this fraction of the largest, are equal: dividing rounding noise by its own std would hand out
# advantages of +-2. The last fp32 bit of a log-likelihood of -300 nats is 3e-5 already.
MIN_STD = 1e-6


# ---------------------------------------------------------------------------------------------------------------- f, one per method
def log_prob(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = sum_i log c_i.  JLB / JEPO with one sample; LaTRO."""
    return logp.sum(dim=1)


def prob(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = prod_i c_i.  VeriFree."""
    return logp.sum(dim=1).exp()


def geometric_mean(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = (prod_i c_i)^(1/T), one over the perplexity.  NRT-GM."""
    return logp.mean(dim=1).exp()


def arithmetic_mean(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = 1/T sum_i c_i.  RLPR."""
    return logp.exp().mean(dim=1)


def weighted_sum_inverse_prob(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = 1/T sum_i c_i / n_i.  NRT-WS(1/p)."""
    return (logp.exp() * (-null_logp).clamp(max=MAX_EXPONENT).exp()).mean(dim=1)


def weighted_sum_log_prob(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = 1/T sum_i c_i (-log n_i).  NRT-WS(-log p), the paper's best: tokens that are easy without thinking weigh nothing."""
    return (logp.exp() * -null_logp).mean(dim=1)


def info_gain(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = 1/T sum_i (log c_i - log n_i).  RLP: information gained over not thinking."""
    return (logp - null_logp).mean(dim=1)


def r3(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = sum_i v_i log c_i,  v_i = std over the K traces of log c_i, normalised to sum 1, a constant.  DRO's R3."""
    spread = logp.detach().std(dim=0, correction=0)  # [T]
    total = spread.sum()
    if total == 0:  # one trace, or K equal ones: no token stands out
        return logp.mean(dim=1)
    return (logp * (spread / total)).sum(dim=1)


def jlb_multi(logp: Tensor, null_logp: Tensor) -> Tensor:
    """reward_k = L - L without trace k,  L = log 1/K sum_k prod_i c_{k,i}.  JEPO's K-sample bound; K = 1 is log_prob.

    Trace k's own contribution already is its advantage: it is not centred again (train.py).
    """
    traces = logp.shape[0]
    if traces == 1:
        return joint_bound(logp)[None]
    others = ~torch.eye(traces, dtype=torch.bool, device=logp.device)
    return joint_bound(logp) - torch.stack([joint_bound(logp[keep]) for keep in others])


def joint_bound(logp: Tensor) -> Tensor:
    """L = log 1/K sum_k prod_i c_{k,i}, a scalar: the likelihood of the gold answer averaged over K traces, a bound on log pi(y*|x)."""
    return logp.sum(dim=1).logsumexp(dim=0) - math.log(logp.shape[0])


AGGREGATORS = {
    f.__name__: f
    for f in (
        log_prob,
        prob,
        geometric_mean,
        arithmetic_mean,
        weighted_sum_inverse_prob,
        weighted_sum_log_prob,
        info_gain,
        r3,
        jlb_multi,
    )
}
GROUP_AGGREGATORS = ("r3", "jlb_multi")  # their reward of one trace depends on the others


# ---------------------------------------------------------------------------------------------------------------- reward, weight, advantage
def aggregate(name: str, logp: Tensor, null_logp: Tensor) -> tuple[Tensor, Tensor]:
    """Reward and exact answer weight of every trace of one question.

    logp [K, T] and null_logp [T], nats -> reward [K], weight [K, T] = d objective / d logp, both detached. The objective is the sum of
    the K rewards; for jlb_multi it is the bound L itself, so weight[k] = softmax over traces of sum_i logp, the same for every token.
    """
    if name not in AGGREGATORS:
        raise InputError(f"--aggregator {name!r} is unknown; known are {', '.join(AGGREGATORS)}")
    logp, null_logp = logp.detach().requires_grad_(), null_logp.detach()
    with torch.enable_grad():
        reward = AGGREGATORS[name](logp, null_logp)
        objective = joint_bound(logp) if name == "jlb_multi" else reward.sum()
        (weight,) = torch.autograd.grad(objective, logp)
    return reward.detach(), weight


def advantages(reward: Tensor, center: str = "mean", scale: str = "std") -> Tensor:
    """Group-relative advantages of the K traces of one question.

    reward [K] -> [K], detached. center "mean", "loo" (the mean of the other K - 1) or "none"; scale "std" (unbiased) or "none". A group
    whose rewards have std < 1e-6 max(1, max |reward|) says nothing about its traces: its advantages are exactly 0, unless center and
    scale are both "none". InputError for K = 1 with centring or scaling, and for unknown names.
    """
    if center not in ("mean", "loo", "none") or scale not in ("std", "none"):
        raise InputError(
            f"--center {center!r} --scale {scale!r}: center is mean, loo or none, scale is std or none"
        )
    traces = reward.shape[0]
    if traces == 1 and (center, scale) != ("none", "none"):
        raise InputError(
            f"--center {center} --scale {scale} needs at least 2 traces a question: with --traces 1 every advantage would be 0 "
            "(--center none --scale none takes the reward as it is)"
        )
    values = (
        reward.detach().double()
    )  # weighted_sum_inverse_prob reaches 1e34, whose square is no fp32 number
    if center == "none" and scale == "none":
        return values.to(reward.dtype)
    std = values.std()
    if std < MIN_STD * values.abs().max().clamp(min=1.0):
        return torch.zeros_like(reward)
    baseline = {"mean": values.mean(), "loo": (values.sum() - values) / (traces - 1), "none": 0.0}[
        center
    ]
    advantage = (values - baseline) / (std if scale == "std" else 1.0)
    return advantage.to(reward.dtype)
