"""The reward of a trace from the gold answer's probabilities, its answer weights, its advantage.

    c_i = pi(y*_i | x, z, m, y*_<i)   probability of gold token i after trace z    logp[k, i]
    n_i = the same after the empty trace ("null think"), a constant                null_logp[i]

The objective and its gradient (paper, section 3). A method is the choice of one function f:

    J      = E_z[ f(c) ]
    grad J = E_z[ f(c) grad log pi(z|x)  +  sum_i w_i grad log c_i ],     w_i = d f / d log c_i

Each published f is one function below, under its formula. `AGGREGATORS` names them for the flag
--aggregator. The exact answer weight w comes from autograd through the same function: a new f needs
no second formula. A function of your own stays in a file of your own:

    def hardest_token(logp, null_logp):  # [K, T], [T] -> reward [K]
        return logp.exp().min(dim=1).values

    python train.py --aggregator my_file.py:hardest_token

One that looks at more takes more parameters, as many as it needs in this order: the question's
Example, its K Traces (data.py), the Tokenizer, and the traces' Scores (reward.py):

    def brief(logp, null_logp, example, traces):
        lengths = logp.new_tensor([len(trace.ids) for trace in traces])
        return logp.mean(dim=1).exp() - 0.01 * lengths

What is unusual about a function is an attribute of it, set below it:

    f.group = True          a trace's reward depends on the other traces of its question
    f.signed = True         it can be below 0 (--scale mean divides by the mean)
    f.relative = True       and is relative to them already: it is not centred again
    f.objective = function  of logp: what w differentiates, where that is not the sum of rewards
    f.random = True         it draws random numbers

All of it works on log-probs in nats, in the dtype it is given.
"""

import math
import runpy
from collections.abc import Callable
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor

# 1 / n_i = exp(-log n_i) is capped at exp(80) = 5.5e34. The sum over 4096 answer tokens at the cap
# is still a finite fp32 number.
MAX_EXPONENT = 80.0
# An fp32 log-prob is good to about 1e-6 nats. Rewards that differ by no more than that amounts to
# count as equal: dividing rounding noise by its own std would give advantages of +-2.
ROUNDING = 1e-6


# ---- f, one function per method: logp [K, T], null_logp [T] -> reward [K]
def log_prob(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = sum_i log c_i.  LaTRO; JEPO with one sample (JLB, Jensen's lower bound)."""
    return logp.sum(dim=1)


log_prob.signed = True


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
    """f = 1/T sum_i c_i (-log n_i).  NRT-WS(-log p), the paper's best.

    A token that is easy without thinking has weight 0.
    """
    return (logp.exp() * -null_logp).mean(dim=1)


def info_gain(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = 1/T sum_i (log c_i - log n_i), the information gained over not thinking.  RLP."""
    return (logp - null_logp).mean(dim=1)


info_gain.signed = True


def r3(logp: Tensor, null_logp: Tensor) -> Tensor:
    """f = sum_i v_i log c_i.  DRO's R3.

    v_i = std of log c_i over the K traces, normalised to sum 1; no gradient flows through it.
    """
    spread = logp.detach().std(dim=0, correction=0)  # [T]
    total = spread.sum()
    if total == 0:  # one trace, or K equal ones: no token differs between traces
        return logp.mean(dim=1)
    return (logp * (spread / total)).sum(dim=1)


r3.group = r3.signed = True


def jlb_multi(logp: Tensor, null_logp: Tensor) -> Tensor:
    """reward_k = L - L without trace k,  L = log 1/K sum_k prod_i c_{k,i}.  JEPO's K-sample bound.

    K = 1 is log_prob. The reward is already relative to the group and is not centred again.
    """
    traces = logp.shape[0]
    if traces == 1:
        return joint_bound(logp)[None]
    others = ~torch.eye(traces, dtype=torch.bool, device=logp.device)
    return joint_bound(logp) - torch.stack([joint_bound(logp[keep]) for keep in others])


def joint_bound(logp: Tensor) -> Tensor:
    """L = log 1/K sum_k prod_i c_{k,i}, a scalar: a lower bound of log pi(y*|x) in expectation."""
    return logp.sum(dim=1).logsumexp(dim=0) - math.log(logp.shape[0])


jlb_multi.group = jlb_multi.signed = jlb_multi.relative = True
jlb_multi.objective = joint_bound


def exact_match(logp: Tensor, null_logp: Tensor) -> Tensor:
    """1 if an answer sampled after the trace is the gold answer, token by token, else 0.  RLVR.

    P(match) = prod_i c_i, so one uniform number replaces sampling and comparing an answer. w_i is
    the reward itself: on average prod_i c_i, as for `prob`.
    """
    answer_logp = logp.sum(dim=1)  # [K]
    uniform = torch.rand(answer_logp.shape).to(answer_logp)
    hit = (uniform < answer_logp.detach().exp()).to(logp.dtype)
    return hit * (1 + answer_logp - answer_logp.detach())


exact_match.random = True


AGGREGATORS = {
    "log_prob": log_prob,
    "prob": prob,
    "geometric_mean": geometric_mean,
    "arithmetic_mean": arithmetic_mean,
    "weighted_sum_inverse_prob": weighted_sum_inverse_prob,
    "weighted_sum_log_prob": weighted_sum_log_prob,
    "info_gain": info_gain,
    "r3": r3,
    "jlb_multi": jlb_multi,
    "exact_match": exact_match,
}


@cache
def find_aggregator(name: str) -> Callable[..., Tensor]:
    """A function of AGGREGATORS by its name, or `function` of a Python file by "file.py:function".

    The file is run: it is the user's own code. Raises ValueError for an unknown name, and what
    running the file raises.
    """
    if name in AGGREGATORS:
        return AGGREGATORS[name]
    file, _, function = name.rpartition(":")
    if not file.endswith(".py"):
        known = ", ".join(AGGREGATORS)
        raise ValueError(f"unknown aggregator {name!r}; there are {known}, and FILE.py:FUNCTION")
    defined = runpy.run_path(file)
    if function not in defined:
        raise ValueError(f"{file}: defines no function {function!r}")
    return defined[function]


def declares(name: str, attribute: str) -> bool:
    """Whether the aggregator has `attribute` (top of this file)."""
    return bool(getattr(find_aggregator(name), attribute, False))


def sees_text(name: str) -> bool:
    """Whether the aggregator takes more than the two log-probs."""
    return len(signature(find_aggregator(name)).parameters) > 2


# ---- reward and answer weight
def aggregate(
    name: str, logp: Tensor, null_logp: Tensor, seen: tuple = ()
) -> tuple[Tensor, Tensor]:
    """Rewards and exact answer weights of one question's traces.

    logp [K, T] and null_logp [T] in nats -> reward [K], weight [K, T] = d objective / d logp, both
    detached. The objective is the sum of the K rewards; for jlb_multi it is the bound L, so that
    weight[k] is the softmax over traces of sum_i logp, the same for every token of a trace.
    seen: (example, traces, tokenizer, scores) for a function that sees them.
    ValueError for an unknown name, or for a reward that is not of shape [K].
    """
    f = find_aggregator(name)
    logp = logp.detach().requires_grad_()
    null_logp = null_logp.detach()
    with torch.enable_grad():
        reward = f(logp, null_logp, *seen[: len(signature(f).parameters) - 2])
        reward = reward.to(logp)  # it may be of whole numbers or truth values
        if reward.shape != logp.shape[:1]:  # broadcasting would go on with it, and be wrong
            shape = list(reward.shape)
            raise ValueError(f"{name} returned shape {shape}, it should be [{len(logp)}]")
        objective = f.objective(logp) if declares(name, "objective") else reward.sum()
        if not objective.requires_grad:  # made of text alone
            return reward, torch.zeros_like(null_logp).expand_as(logp)
        # materialize_grads: 0 where it is made of scores alone
        (weight,) = torch.autograd.grad(objective, logp, materialize_grads=True)
    return reward.detach(), weight


# ---- advantage
def advantages(
    reward: Tensor,
    center: str = "mean",
    scale: str = "std",
    weight: Tensor | None = None,
    least_std: float = 0.0,
) -> Tensor:
    """Group-relative advantages of one question's K traces, as in GRPO.

    reward [K] -> advantage [K], detached. center: "mean" or "none". scale: "std" (divisor K - 1),
    "mean" (of rewards that are not negative; MaxRL, arXiv 2602.02710) or "none". weight [K, T]: the
    exact answer weights of the rewards. ValueError for K = 1 with centring or scaling, and for
    unknown names.

    Rewards that differ only by rounding count as equal and get exactly 0, unless center and scale
    are both "none". An error of 1e-6 in every log-prob changes a reward by 1e-6 sum_i |w_i|, the
    floor of the std. For `prob` on long answers it lies far below 1e-6, for `log_prob` above.
    Without weights the floor is 1e-6 max(1, max |reward|).
    Rewards whose std (of the population) is below least_std get 0 as well (--filter-std).
    """
    if center not in ("mean", "none") or scale not in ("std", "mean", "none"):
        raise ValueError(f"center is mean or none, scale std, mean or none: {center!r}, {scale!r}")
    if reward.shape[0] == 1 and (center, scale) != ("none", "none"):
        raise ValueError(f"center {center} and scale {scale} need at least 2 traces")
    # fp64, because weighted_sum_inverse_prob reaches 1e34, whose square is no fp32 number.
    values = reward.detach().double()
    if values.std(correction=0) < least_std:
        return torch.zeros_like(reward)
    if center == "none" and scale == "none":
        return values.to(reward.dtype)
    if weight is None:
        floor = ROUNDING * values.abs().max().clamp(min=1.0)
    else:
        floor = ROUNDING * weight.double().abs().sum(dim=1).max()
    mean, std = values.mean(), values.std()
    if std <= floor:
        return torch.zeros_like(reward)
    if center == "mean":
        values = values - mean
    if scale != "none":
        values = values / (std if scale == "std" else mean)
    return values.to(reward.dtype)


def moving_average(average: float, new: float) -> float:
    """Of the groups' std over the steps, 0 before the first (--filter-std); 0.99 is RLPR's."""
    if not math.isfinite(new):
        return average
    return 0.99 * average + 0.01 * new if average else new


# ---- all of it for one question
def credit(
    logp: Tensor, null_logp: Tensor, args: Any, seen: tuple = (), least_std: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """What multiplies the log-probs of one question's traces and answer in the loss; no gradient.

    logp [K, T] and null_logp [T] in nats, seen: as in `aggregate`. args: the flags --aggregator,
    --clip-null, --traces, --center, --scale, --answer-weight. least_std: as in `advantages`.
    -> reward [K], advantage [K] of the traces, answer weight omega [K, T].
    """
    reward, weight = aggregate(args.aggregator, logp, null_logp, seen)
    if args.clip_null:
        null_reward, _ = aggregate(args.aggregator, null_logp[None], null_logp)  # [1]
        weight = weight * (reward > null_reward)[:, None]  # clamped: the derivative is 0
        reward = (reward - null_reward).clamp(min=0)
    if args.traces == 0:  # plain SFT: nothing was sampled
        return reward, torch.zeros_like(reward), torch.ones_like(weight)
    center = "none" if declares(args.aggregator, "relative") else args.center
    advantage = advantages(reward, center, args.scale, weight, least_std)
    omega = {"exact": weight, "fixed": torch.ones_like(weight), "none": torch.zeros_like(weight)}
    return reward, advantage, omega[args.answer_weight]
