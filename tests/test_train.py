"""The training loop: the estimator is right, nothing depends on batching, runs resume."""

import inspect
import itertools
import json
import math
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train as train_module
from aggregate import AGGREGATORS, advantages, aggregate, declares, sees_text
from data import Example, Trace
from model import KEEP, Config, Transformer, prefill
from reward import Scores, log_ratio, prompt_backward, prompt_leaves, score
from sample import sample_traces
from support import distributed
from support.args import Args, hops_defaults, parse_args
from support.errors import InputError, TrainingError, python
from support.metrics import question_figures, step_figures
from support.run import command_of
from support.tokenizer import Tokenizer
from support.weights import load_model, save_model
from train import (
    LENGTH_SCALE,
    RATIO_RANGE,
    answer_weights,
    backward_in_micro_batches,
    frozen_null_logp,
    group_advantages,
    in_one_backward,
    loss_terms,
    rewards,
    score_group,
    score_without_graph,
    train,
    truncated_ratio,
)

ROOT = Path(__file__).parents[1]
WORDS, MARKER, EOS = (0, 1, 2), 3, 4
PROMPT, ANSWER = [0, EOS, 2], [1, 0, EOS]
BRIEF = dict(
    steps=3,
    questions=4,
    traces=4,
    max_trace=12,
    eval_questions=4,
    eval_every=2,
    save_every=1,
    device="cpu",
)
SHORT = dict(steps=1, questions=2, eval_data="")


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> Transformer:
    torch.manual_seed(seed)
    sizes = dict(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = Transformer(Config(**sizes | changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(
            parameter, std=0.5
        )  # far from uniform, so that every term of the gradient shows
    return model.to(dtype)


def gradient(model: Transformer) -> torch.Tensor:
    """All gradients as one vector, and forgets them."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return flat


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


def credit(scores: Scores, args: Args) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """-> reward [K], advantage [K], answer weight omega [K, T]"""
    reward, weight = rewards(scores.answer_logp.detach(), scores.null_logp.detach(), args)
    return reward, group_advantages(reward, weight, args), answer_weights(weight, args)


# ---- the estimator
def every_trace(limit: int = 3) -> list[Trace]:
    """All that sampling can return: ended by the marker, by eos (a cut token), or at the limit."""
    traces = []
    for length in range(limit):
        for words in itertools.product(WORDS, repeat=length):
            traces.append(Trace([*words, MARKER], [0.0] * (length + 1), finished=True))
            traces.append(Trace(list(words), [0.0] * length, finished=False, cut_id=EOS))
    traces += [
        Trace(list(words), [0.0] * limit, finished=False)
        for words in itertools.product(WORDS, repeat=limit)
    ]
    return traces


def plain_logp(model: Transformer, context: list[int], tokens: list[int]) -> torch.Tensor:
    """Log-probs of `tokens` after `context`: one full row and log_softmax, without reward.py."""
    hidden = model(torch.tensor([context + tokens]))[0]
    logp = (hidden @ model.lm_head.weight.T).log_softmax(-1)
    at = torch.arange(len(context) - 1, len(context) + len(tokens) - 1)
    return logp[at, torch.tensor(tokens)]


def exact_objective(model: Transformer, name: str) -> torch.Tensor:
    """J = sum over all traces of P(z) f(c(z)), straight from its definition."""
    null_logp = plain_logp(model, [*PROMPT, MARKER], ANSWER).detach()
    total = torch.zeros((), dtype=torch.float64)
    for trace in every_trace():
        actions = [*trace.ids, EOS] if trace.cut_id is not None else trace.ids
        context = PROMPT + (trace.ids if trace.finished else [*trace.ids, MARKER])
        probability = plain_logp(model, PROMPT, actions).sum().exp()
        total = (
            total
            + probability
            * AGGREGATORS[name](plain_logp(model, context, ANSWER)[None], null_logp)[0]
        )
    return total


def estimator_args(name: str, **changes) -> Args:
    """One question, K = 1; marker_weight 0: the cross-entropy on a forced marker is not in J."""
    args = Args(
        aggregator=name,
        questions=1,
        traces=1,
        center="none",
        scale="none",
        answer_weight="exact",
        marker_weight=0.0,
    )
    return replace(args, **changes)


SINGLE = []  # those whose J is a sum over single traces
for NAME in AGGREGATORS:
    if not (declares(NAME, "group") or declares(NAME, "random") or sees_text(NAME)):
        SINGLE.append(NAME)


def test_the_traces_of_the_enumeration_have_total_probability_one():
    model = tiny_model()
    total = sum(
        plain_logp(model, PROMPT, [*t.ids, EOS] if t.cut_id is not None else t.ids).sum().exp()
        for t in every_trace()
    )
    assert abs(total.item() - 1) < 1e-12


QWENS = [{"qkv_bias": True}, {"qk_norm": True, "head_dim": 6}]


@pytest.mark.parametrize(
    "name, family",
    [*((name, {}) for name in SINGLE), *(("weighted_sum_log_prob", qwen) for qwen in QWENS)],
    ids=str,
)
def test_the_estimator_summed_over_all_traces_is_the_gradient_of_J(name, family):
    model, traces, args = tiny_model(**family), every_trace(), estimator_args(name)
    exact_objective(model, name).backward()
    exact = gradient(model)

    scores = score(model, PROMPT, traces, ANSWER, MARKER)
    probability = scores.trace_logp.detach().sum(dim=1).exp()  # [Z]
    reward, advantage, weight = credit(scores, args)
    # The loss is linear in advantage and weight. Scaling those of each trace by its probability
    # sums what K = 1 would do over all traces.
    loss_terms(
        scores, traces, advantage * probability, weight * probability[:, None], args
    ).sum().backward()
    assert torch.equal(reward, advantage)  # center none, scale none
    assert relative(-LENGTH_SCALE * gradient(model), exact) < 1e-6


def test_exact_match_over_all_traces_and_outcomes_is_the_gradient_of_its_probability(monkeypatch):
    """J = sum_z P(z) prod_i c_i, the probability that a sampled answer is the gold answer."""
    model, traces, args = tiny_model(), every_trace(), estimator_args("exact_match")
    exact_objective(model, "prob").backward()
    exact = gradient(model)

    scores = score(model, PROMPT, traces, ANSWER, MARKER)
    probability = scores.trace_logp.detach().sum(dim=1).exp()  # [Z]
    match = scores.answer_logp.detach().sum(dim=1).exp()  # [Z] probability of reward 1
    advantage, omega = torch.zeros_like(match), torch.zeros_like(scores.answer_logp)
    for uniform, outcome in ((0.0, match), (1.0, 1 - match)):  # all match, none does
        monkeypatch.setattr(torch, "rand", lambda shape, u=uniform: torch.full(shape, u))
        _, one_advantage, one_omega = credit(scores, args)
        advantage += outcome * one_advantage
        omega += outcome[:, None] * one_omega
    terms = loss_terms(scores, traces, advantage * probability, omega * probability[:, None], args)
    terms.sum().backward()
    assert relative(-LENGTH_SCALE * gradient(model), exact) < 1e-6


@pytest.mark.parametrize("name", ["weighted_sum_log_prob", "arithmetic_mean"])
def test_without_answer_weight_the_estimator_is_the_gradient_through_the_traces_alone(name):
    model, traces = tiny_model(), every_trace()
    args = estimator_args(name, answer_weight="none")
    fixed = tiny_model()  # the same parameters, behind the answer's probabilities as constants
    null_logp = plain_logp(fixed, [*PROMPT, MARKER], ANSWER).detach()
    for trace in traces:
        actions = [*trace.ids, EOS] if trace.cut_id is not None else trace.ids
        context = PROMPT + (trace.ids if trace.finished else [*trace.ids, MARKER])
        answer_logp = plain_logp(fixed, context, ANSWER).detach()
        value = AGGREGATORS[name](answer_logp[None], null_logp)[0]
        (plain_logp(model, PROMPT, actions).sum().exp() * value).backward()
    exact = gradient(model)

    scores = score(model, PROMPT, traces, ANSWER, MARKER)
    probability = scores.trace_logp.detach().sum(dim=1).exp()  # [Z]
    _, advantage, omega = credit(scores, args)
    loss_terms(scores, traces, advantage * probability, omega, args).sum().backward()
    assert relative(-LENGTH_SCALE * gradient(model), exact) < 1e-6


@pytest.mark.parametrize("name", ["weighted_sum_log_prob", "prob"])
def test_leave_one_out_over_all_pairs_of_traces_is_the_gradient_of_J(name):
    model, traces, args = tiny_model(1), every_trace(), estimator_args(name, traces=2, center="loo")
    exact_objective(model, name).backward()
    exact = gradient(model)

    scores = score(model, PROMPT, traces, ANSWER, MARKER)
    probability = scores.trace_logp.detach().sum(dim=1).exp()
    reward, _, weight = credit(scores, replace(args, center="none", traces=1))
    advantage, answer_weight = torch.zeros_like(reward), torch.zeros_like(weight)
    for i, j in itertools.product(range(len(traces)), repeat=2):
        both = probability[i] * probability[j]
        pair = advantages(reward[[i, j]], center="loo", scale="none") * both
        for trace, own in zip((i, j), pair, strict=True):
            advantage[trace] += own
            answer_weight[trace] += weight[trace] * both
    loss_terms(scores, traces, advantage, answer_weight, args).sum().backward()
    assert relative(-LENGTH_SCALE * gradient(model), exact) < 1e-6


# ---- one group
EXAMPLE = Example(index=0, prompt=PROMPT, answer=ANSWER, question="", gold="")


def sampled_group(model: Transformer, k: int = 8, seed: int = 0) -> list[Trace]:
    return sample_traces(model, [PROMPT], k, 6, stop_ids=[MARKER], seed=seed, cut_ids=[EOS])[0]


def train_group(
    model: Transformer, traces: list[Trace], args: Args, null_logp=None, example=EXAMPLE
) -> dict:
    """What the loop of train.py does with one question -> its figures."""
    scores = None
    if not in_one_backward(args):
        with distributed.gathered_view(model) as view:
            [scores] = score_without_graph(view, [(example, traces, None)], MARKER, args)
    prompt = prefill(model, [example.prompt])
    leaves = prompt_leaves(prompt)
    if scores is None:
        scores = score_group(model, leaves, example, traces, MARKER, args)
    null_logp = scores.null_logp.detach() if null_logp is None else null_logp
    reward, weight = rewards(scores.answer_logp.detach(), null_logp, args)
    advantage = group_advantages(reward, weight, args)
    omega = answer_weights(weight, args)
    losses = loss_terms(scores, traces, advantage, omega, args)
    if in_one_backward(args):
        losses.sum().backward()
    else:
        backward_in_micro_batches(model, leaves, example, traces, MARKER, advantage, omega, args)
    prompt_backward(prompt, leaves)
    return question_figures(scores, traces, RATIO_RANGE, reward, advantage, null_logp, losses)


def group_gradient(model: Transformer, traces: list[Trace], args: Args) -> torch.Tensor:
    train_group(model, traces, args)
    return gradient(model)


@pytest.mark.parametrize("micro", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "changes", [{}, {"answer_weight": "exact"}, {"updates": 2, "questions": 2}, {"null_loss": 0.5}]
)
def test_the_gradient_does_not_depend_on_micro_traces(micro, changes):
    model = tiny_model()
    traces = sampled_group(
        tiny_model(7)
    )  # another policy's traces: ratios differ from 1 and some are clipped
    args = Args(questions=1, traces=8, aggregator="geometric_mean")
    args = replace(args, **changes)
    assert (
        relative(
            group_gradient(model, traces, replace(args, micro_traces=micro)),
            group_gradient(model, traces, args),
        )
        < 1e-6
    )


def test_the_gradient_does_not_depend_on_the_order_of_the_traces():
    model = tiny_model()
    traces = sampled_group(model)
    args = Args(questions=1, traces=8)
    assert (
        relative(group_gradient(model, traces[::-1], args), group_gradient(model, traces, args))
        < 1e-6
    )


def test_the_gradient_does_not_depend_on_padding():
    """A far longer trace with advantage and weight 0 pads every row and changes nothing else."""
    model, args = tiny_model(), Args(questions=1, traces=2)
    traces, long = sampled_group(model, 2), Trace([0] * 40, [0.0] * 40, finished=False)
    advantage, weight = (
        torch.tensor([1.0, -2.0], dtype=torch.float64),
        torch.ones(2, 3, dtype=torch.float64),
    )
    loss_terms(
        score(model, PROMPT, traces, ANSWER, MARKER),
        traces,
        advantage,
        weight,
        replace(args, marker_weight=0.0),
    ).sum().backward()
    short = gradient(model)
    zero = torch.zeros(1, dtype=torch.float64)
    scores = score(model, PROMPT, [*traces, long], ANSWER, MARKER)
    more = torch.cat([advantage, zero]), torch.cat([weight, zero.expand(1, 3)])
    loss_terms(scores, [*traces, long], *more, replace(args, marker_weight=0.0)).sum().backward()
    assert relative(gradient(model), short) < 1e-6


def test_the_gradient_does_not_depend_on_the_number_of_questions_per_backward():
    model, args = tiny_model(), Args(questions=2, traces=4)
    groups = [sampled_group(model, 4, seed) for seed in (1, 2)]
    for traces in groups:
        train_group(model, traces, args)
    one_by_one = gradient(model)
    loss = torch.zeros((), dtype=torch.float64)
    for traces in groups:
        scores = score(model, PROMPT, traces, ANSWER, MARKER)
        _, advantage, weight = credit(scores, args)
        loss = loss + loss_terms(scores, traces, advantage, weight, args).sum()
    loss.backward()
    assert relative(gradient(model), one_by_one) < 1e-6


def test_the_loss_is_the_formula_of_the_docstring():
    """Sums over tokens are divided by K and one constant, not by a length or number of tokens."""
    model, args = tiny_model(), Args(questions=3, traces=2, marker_weight=0.3)
    traces = [
        Trace([0, 1, MARKER], [0.0] * 3, finished=True),
        Trace([2, 2, 2, 1, 0], [0.0] * 5, finished=False),
    ]
    advantage, weight = (
        torch.tensor([0.7, -1.1], dtype=torch.float64),
        torch.rand(2, 3, dtype=torch.float64),
    )
    with torch.no_grad():
        terms = loss_terms(
            score(model, PROMPT, traces, ANSWER, MARKER), traces, advantage, weight, args
        )
        trace_term = (
            0.7 * plain_logp(model, PROMPT, [0, 1, MARKER]).sum()
            - 1.1 * plain_logp(model, PROMPT, [2, 2, 2, 1, 0]).sum()
        )
        contexts = [[*PROMPT, 0, 1, MARKER], [*PROMPT, 2, 2, 2, 1, 0, MARKER]]
        answer_term = sum(
            (w * plain_logp(model, c, ANSWER)).sum() for w, c in zip(weight, contexts, strict=True)
        )
        marker_term = 0.3 * plain_logp(model, [*PROMPT, 2, 2, 2, 1, 0], [MARKER]).sum()
    expected = -torch.stack(
        [trace_term, answer_term, marker_term, torch.zeros_like(trace_term)]
    ) / (3 * 2 * LENGTH_SCALE)
    assert torch.allclose(terms, expected, rtol=1e-10, atol=0)


def test_a_sampled_marker_gets_the_advantage_and_a_forced_one_never_does():
    model, args = tiny_model(), Args(questions=1, traces=1, marker_weight=0.0)
    advantage, weight = torch.ones(1, dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64)
    for trace, expected in (
        (Trace([MARKER], [0.0], True), [MARKER]),
        (Trace([1], [0.0], False), [1]),
        (Trace([], [], False, EOS), [EOS]),
    ):
        terms = loss_terms(
            score(model, PROMPT, [trace], ANSWER, MARKER), [trace], advantage, weight, args
        )
        assert torch.allclose(
            -terms.sum() * LENGTH_SCALE, plain_logp(model, PROMPT, expected).sum(), rtol=1e-10
        )


def test_the_ratio_is_truncated_and_a_token_that_has_left_the_range_gets_no_gradient():
    model = tiny_model()
    ids = [0, 1, 2, 1, 0, 2]
    own = plain_logp(model, PROMPT, ids).tolist()
    ratios = [1.0, 1.2, 0.9, 1.5, 0.5, 1.27]
    trace = Trace(
        ids,
        [logp - math.log(ratio) for logp, ratio in zip(own, ratios, strict=True)],
        finished=False,
    )
    scores = score(model, PROMPT, [trace, trace], ANSWER, MARKER)
    ratio = log_ratio(scores, [trace, trace])
    rho = truncated_ratio(ratio, torch.tensor([1.0, -1.0], dtype=torch.float64))
    expected = [[1.0, 1.2, 0.9, 0.0, 0.8, 1.27], [1.0, 1.2, 0.9, 1.28, 0.0, 1.27]]
    assert torch.allclose(rho, torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    assert not rho.requires_grad


def test_nothing_handed_to_a_group_is_changed_by_it():
    model = tiny_model()
    traces = sampled_group(model)
    before = repr((EXAMPLE, traces))
    group_gradient(model, traces, Args(questions=1, traces=8, null_loss=0.5, micro_traces=3))
    assert repr((EXAMPLE, traces)) == before


@pytest.mark.parametrize("micro", [0, 1, 3])
def test_the_logged_loss_is_that_of_all_traces(micro):
    """Not the last micro-batch's, not a mean of means."""
    model = tiny_model()
    traces, args = (
        sampled_group(model),
        Args(questions=1, traces=8, micro_traces=micro, null_loss=0.2),
    )
    figures = train_group(model, traces, args)
    scores = score(model, PROMPT, traces, ANSWER, MARKER)
    _, advantage, weight = credit(scores, args)
    assert figures["losses"] == pytest.approx(
        loss_terms(scores, traces, advantage, weight, args).tolist(), rel=1e-5
    )


def test_sft_is_the_cross_entropy_of_answer_and_marker_without_a_trace():
    model, args = tiny_model(), Args(questions=1, traces=0)
    train_group(model, [Trace([], [], finished=False)], args)
    got = gradient(model)
    loss = (
        plain_logp(model, [*PROMPT, MARKER], ANSWER).sum()
        + 0.3 * plain_logp(model, PROMPT, [MARKER]).sum()
    )
    (-loss / LENGTH_SCALE).backward()
    assert relative(got, gradient(model)) < 1e-10


def test_clipping_against_the_null_think_floors_rewards_and_silences_their_answer_weight():
    logp = torch.tensor([[-1.0, -1.0], [-3.0, -3.0]])
    null_logp = torch.tensor([-2.0, -2.0])
    args = Args(
        aggregator="geometric_mean",
        clip_null=True,
        center="none",
        scale="none",
        answer_weight="exact",
    )
    reward, weight = rewards(logp, null_logp, args)
    advantage = group_advantages(reward, weight, args)
    assert torch.allclose(reward, torch.tensor([math.exp(-1) - math.exp(-2), 0.0])) and torch.equal(
        reward, advantage
    )
    assert torch.allclose(weight, torch.tensor([[math.exp(-1) / 2] * 2, [0.0] * 2]))


# ---- whole runs
WALL_CLOCK = ("tokens_per_s", "sec_sample", "sec_score", "sec_update", "mem_gb")
# The stable names: dashboards and scripts rely on them.
KEYS = """step reward_mean reward_std reward_min reward_max zero_std_frac gold_logp_think
gold_logp_null gain gold_ce trace_len_mean trace_len_min trace_len_max finished_frac entropy
dup_frac rep_frac ratio_max clip_frac sampler_gap trace_loss answer_loss marker_loss grad_norm lr
tokens_per_s sec_sample sec_score sec_update mem_gb""".split()


def run(out: Path, **changes) -> list[dict]:
    """Trains in this process on the embedded task -> log lines."""
    train(Args(**(BRIEF | {"out": str(out)} | changes)))
    return read_log(out)


def read_log(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def without_clock(lines: list[dict]) -> list[dict]:
    return [
        {name: value for name, value in line.items() if name not in WALL_CLOCK} for line in lines
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(folder).named_parameters())


def assert_same_weights(a: Path, b: Path) -> None:
    ours, theirs = weights(a), weights(b)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "plain"
    run(out)
    return out


def test_a_run_logs_every_stable_name_and_evaluates_before_during_and_after(plain_run):
    lines = read_log(plain_run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    assert all(set(KEYS) <= set(line) for line in lines[1:])
    evaluated = [
        line["step"]
        for line in lines
        if {"eval_accuracy", "eval_accuracy_null", "eval_gain", "eval_trace_len"} <= set(line)
    ]
    assert evaluated == [0, 2, 3]
    assert all(
        line["sampler_gap"] < 1e-4 for line in lines[1:]
    )  # what was scored is, token for token, what was sampled
    assert all(
        line["gain"] == pytest.approx(line["gold_logp_think"] - line["gold_logp_null"])
        for line in lines[1:]
    )
    parts = ("trace_loss", "answer_loss", "marker_loss", "null_loss")
    assert all(
        line["loss"] == pytest.approx(sum(line[name] for name in parts)) for line in lines[1:]
    )


def test_a_run_leaves_its_arguments_samples_checkpoints_and_a_final_model(plain_run):
    assert json.loads((plain_run / "args.json").read_text()) == asdict(
        Args(**(BRIEF | {"out": str(plain_run)}))
    )
    samples = [json.loads(line) for line in (plain_run / "samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["held_out"]) for sample in samples] == [
        (0, True),
        (1, False),
        (2, False),
        (2, True),
        (3, False),
        (3, True),
    ]
    assert all(len(sample["traces"]) == 4 for sample in samples)
    assert sorted(path.name for path in plain_run.glob("checkpoint-*")) == [
        "checkpoint-000002",
        "checkpoint-000003",
    ]  # --keep 2
    final, last = weights(plain_run / "final"), weights(plain_run / "checkpoint-000003")
    for name, tensor in last.items():  # in the precision the initial model is stored in
        assert torch.equal(final[name], tensor.bfloat16().float())
    assert (
        Tokenizer(plain_run / "final").marker == "=>"
    )  # final/ knows its marker and prompt format


def test_logged_samples_hold_the_log_probs_that_their_rewards_were_computed_from(plain_run):
    samples = [json.loads(line) for line in (plain_run / "samples.jsonl").read_text().splitlines()]
    assert len({sample["question"] for sample in samples if sample["held_out"]}) == 1
    for sample in samples:
        logp = torch.tensor([trace["logp"] for trace in sample["traces"]])
        null_logp = torch.tensor(sample["null_logp"])
        assert logp.shape == (4, len(sample["answer"]))
        reward, weight = aggregate("weighted_sum_log_prob", logp, null_logp)
        logged = torch.tensor([trace["reward"] for trace in sample["traces"]])
        assert torch.allclose(logged, reward, atol=1e-5)
        advantage = [trace["advantage"] for trace in sample["traces"]]
        assert advantages(logged, weight=weight).tolist() == pytest.approx(advantage, abs=1e-5)


def test_the_held_out_sample_has_the_null_think_that_rewards_use(plain_run, tmp_path):
    def of_held_out(folder: Path) -> list[list[float]]:
        lines = map(json.loads, (folder / "samples.jsonl").read_text().splitlines())
        return [line["null_logp"] for line in lines if line["held_out"]]

    run(tmp_path / "frozen", null="frozen")
    first, *later = of_held_out(tmp_path / "frozen")
    assert later and all(null_logp == first for null_logp in later)
    assert of_held_out(plain_run)[-1] != first  # the current policy's drifts


def test_the_same_seed_gives_the_same_run_and_another_seed_another(plain_run, tmp_path):
    assert without_clock(run(tmp_path / "again")) == without_clock(read_log(plain_run))
    assert without_clock(run(tmp_path / "other", seed=1)) != without_clock(read_log(plain_run))


@pytest.mark.parametrize(
    "changes",
    [
        {"traces": 0},
        {"updates": 2},
        {"null": "frozen"},
        {"null_loss": 0.1, "answer_weight": "exact"},
        {"clip_null": True, "micro_traces": 1},
        {"aggregator": "jlb_multi", "center": "loo", "scale": "none"},
        {"temperature": 0.7},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
def test_every_mode_trains(changes, tmp_path):
    lines = run(tmp_path / "run", **changes, steps=2)
    assert all(set(KEYS) <= set(line) for line in lines[1:])
    assert all(value is not None for line in lines for value in line.values())
    assert any(
        not torch.equal(a, b)
        for a, b in zip(
            weights(tmp_path / "run/final").values(), weights(Args.model).values(), strict=True
        )
    )


def test_every_aggregator_trains(tmp_path):
    for name in AGGREGATORS:
        lines = run(tmp_path / name, aggregator=name, steps=1, questions=1)
        assert all(value is not None for value in lines[-1].values()), name


def test_a_qwen_trains_and_is_exported_as_one(tmp_path):
    vocab = Tokenizer(Args.model).model.get_vocab_size()
    base = tiny_model(dtype=torch.float32, qk_norm=True, vocab_size=vocab)
    save_model(base, tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "nrt.json"):
        shutil.copy(Path(Args.model) / name, tmp_path / "base")
    lines = run(tmp_path / "run", model=str(tmp_path / "base"), **SHORT)
    assert lines[-1]["grad_norm"] > 0 and lines[-1]["sampler_gap"] < 1e-4
    config = json.loads((tmp_path / "run/final/config.json").read_text())
    assert config["model_type"] == "qwen3"
    assert weights(tmp_path / "run/final").keys() == dict(base.named_parameters()).keys()


LENGTHS = """
import torch

def brief(logp, null_logp, example, traces, tokenizer):
    assert tokenizer.decode(example.answer).strip() == example.gold
    return torch.tensor([-float(len(trace.ids)) for trace in traces])
"""


def test_a_reward_of_ones_own_sees_the_traces_that_are_trained_on(tmp_path):
    (tmp_path / "mine.py").write_text(LENGTHS)
    run(tmp_path / "run", aggregator=f"{tmp_path}/mine.py:brief", **SHORT)
    (sample,) = map(json.loads, (tmp_path / "run/samples.jsonl").read_text().splitlines())
    tokenizer = Tokenizer(Args.model)
    lengths = [len(tokenizer.encode_prompt(trace["trace"])) for trace in sample["traces"]]
    assert [trace["reward"] for trace in sample["traces"]] == [-length for length in lengths]


def test_a_figure_of_ones_own_is_logged_as_its_mean_over_the_questions():
    traces = sampled_group(tiny_model())
    figures = [train_group(tiny_model(), traces, Args(questions=1)) for _ in range(2)]
    assert not any(name.startswith("own_") for name in step_figures(figures, [1.0]))
    figures[0]["own_size"], figures[1]["own_size"] = 3.0, 4.0
    assert step_figures(figures, [1.0])["own_size"] == 3.5


def test_the_frozen_null_think_is_the_initial_weights_whatever_has_been_learnt():
    initial, trained = tiny_model(0), tiny_model(1)
    [frozen] = frozen_null_logp(initial, [EXAMPLE], MARKER)
    expected = plain_logp(tiny_model(0), [*PROMPT, MARKER], ANSWER)
    assert torch.allclose(frozen, expected, rtol=1e-10)
    args = Args(
        questions=1, traces=8, null="frozen", aggregator="info_gain", center="none", scale="none"
    )
    figures = train_group(trained, sampled_group(trained), args, frozen)
    assert figures["reward"] == pytest.approx(
        [(think - expected.sum().item()) / 3 for think in figures["gold_logp_think"]]
    )


@pytest.mark.parametrize("marker", ["<|new|>", "<|reserved_special_token_0|>", "<|eot_id|>"])
def test_a_marker_the_model_has_never_seen_starts_as_a_copy_of_eos_and_one_it_knows_is_left_alone(
    marker, tmp_path
):
    shutil.copytree(ROOT / "tests/golden/export", tmp_path / "model")
    (tmp_path / "model/nrt.json").unlink()
    before = load_model(tmp_path / "model")
    tokenizer = Tokenizer(tmp_path / "model", marker)
    after = train_module.initial_model(
        Args(model=str(tmp_path / "model"), device="cpu"), tokenizer, torch.float32
    )
    assert (
        after.config.vocab_size
        == len(after.lm_head.weight)
        == max(tokenizer.marker_id + 1, before.config.vocab_size)
    )
    for ours, theirs in (
        (after.embed_tokens, before.embed_tokens),
        (after.lm_head, before.lm_head),
    ):
        source = tokenizer.marker_id if marker == "<|eot_id|>" else tokenizer.eos_ids[0]
        assert torch.equal(ours.weight[tokenizer.marker_id], theirs.weight[source])
        kept = [i for i in range(before.config.vocab_size) if i != tokenizer.marker_id]
        assert torch.equal(ours.weight[kept], theirs.weight[kept])


class CountProducts(TorchDispatchMode):
    """Counts the matrix products that run, and the bytes they produce."""

    def __init__(self) -> None:
        super().__init__()
        self.count = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if function in (
            torch.ops.aten.mm.default,
            torch.ops.aten.addmm.default,  # a product with a bias
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        ):
            self.count += 1
            self.bytes += sum(
                t.nbytes
                for t in (result if isinstance(result, tuple) else (result,))
                if isinstance(t, torch.Tensor)
            )
        return result


@pytest.mark.parametrize("family", [{}, *QWENS], ids=str)
def test_activation_checkpointing_changes_memory_and_no_gradient(family):
    model, args = tiny_model(**family), Args(questions=1, traces=8, null_loss=0.5)
    traces, products, held = sampled_group(model), {}, {}
    plain = {
        micro: group_gradient(model, traces, replace(args, micro_traces=micro)) for micro in (0, 3)
    }
    for mode in KEEP:
        model.activation_checkpointing = mode
        for micro in plain:
            assert torch.equal(
                group_gradient(model, traces, replace(args, micro_traces=micro)), plain[micro]
            ), (mode, micro)

        saved: dict[int, int] = {}  # bytes by address: all of it is alive at once
        keep = torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.update({t.data_ptr(): t.nbytes}) or t, lambda t: t
        )
        with CountProducts() as forward, keep:
            answer_logp = score(model, PROMPT, traces, ANSWER, MARKER).answer_logp
        held[mode] = sum(saved.values()) + (forward.bytes if mode == "selective" else 0)
        with CountProducts() as backward:
            answer_logp.sum().backward()
        products[mode] = backward.count
        model.zero_grad()
    assert held["full"] < held["selective"] < held["none"]
    assert (
        products["none"] == products["selective"] < products["full"]
    )  # only "full" computes a product twice


def test_bf16_computes_while_fp32_gradients_collect_what_bf16_would_lose(tmp_path):
    """A gradient and 1/1024 of it: a bf16 sum would be the first alone."""
    save_model(tiny_model(dtype=torch.float32), tmp_path)
    distributed.start("cpu", torch.bfloat16)
    model = distributed.shard(distributed.load(tmp_path, "cpu"), torch.bfloat16)
    sums = {}
    for factors in ([1], [1024, 1]):
        for factor in factors:  # a power of 2 changes no digit of a bf16 number
            (factor * score(model, PROMPT, [[1]], ANSWER, MARKER).answer_logp.sum()).backward()
        sums[len(factors)] = {n: distributed.whole(p.grad) for n, p in model.named_parameters()}
        model.zero_grad()
    distributed.stop()
    for name, one in sums[1].items():
        assert one.dtype == torch.float32 and one.abs().max() > 0
        torch.testing.assert_close(sums[2][name], 1025 * one, rtol=1e-5, atol=0)


def test_the_flags_of_sampling_reach_the_sampler(monkeypatch):
    seen = []
    monkeypatch.setattr(
        train_module,
        "sample_traces",
        lambda *given, **named: seen.append(inspect.signature(sample_traces).bind(*given, **named)),
    )
    args = Args(traces=3, max_trace=7, temperature=0.9, decode_rows=5)
    tokenizer = Tokenizer(args.model)
    train_module.sample_groups(tiny_model(), tokenizer, [EXAMPLE], 1, args)
    reached = seen[0].arguments
    assert {
        "k": 3,
        "max_new_tokens": 7,
        "temperature": 0.9,
        "rows": 5,
    }.items() <= reached.items()
    assert (reached["stop_ids"], reached["cut_ids"]) == ([tokenizer.marker_id], tokenizer.cut_ids)


def test_the_command_that_a_run_prints_makes_the_same_run():
    args = Args(traces=4, clip_null=True, prompt_format="Q: {question}\nA:", device="cpu")
    words = shlex.split(shlex.join(command_of(asdict(args))))
    assert words[:2] == [python(), "train.py"]
    assert parse_args(words[2:], "") == args


def test_a_printed_command_names_the_interpreter_inside_the_project_by_its_path_there():
    assert python(str(ROOT / ".venv" / "bin" / "python")) == ".venv/bin/python"
    assert python("/usr/bin/python3") == "python"


def test_help_has_sections_and_the_commands_of_the_docstring(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"], train_module.__doc__)
    shown = capsys.readouterr().out
    sections = ["model and data:", "method:", "optimisation:", "memory and device:", "run:"]
    assert [line for line in shown.splitlines() if line in sections] == sections
    command = f"    {python()} train.py"
    commands = [line for line in shown.splitlines() if line.startswith(command)]
    assert len(commands) == 3 and "torchrun" in shown


def test_args_made_in_python_are_those_of_the_command_line():
    made = Args(data="mine.jsonl", prompt_format="Q: {question}\\nA:")
    flags = ["--data", "mine.jsonl", "--prompt-format", "Q: {question}\\nA:"]
    assert made == parse_args(flags, "")
    assert made.eval_data == "" and made.device != "auto" and "\n" in made.prompt_format
    with pytest.raises(InputError, match="--questions"):
        train(Args(questions=5, updates=2))


def test_another_model_under_the_embedded_tasks_defaults_is_told_the_papers():
    assert hops_defaults(Args()) == hops_defaults(Args(lr=1e-3)) == ""
    said = hops_defaults(Args(model="DIR", questions=64))
    assert "--lr 0.0002 --max-trace 48 suits" in said and "--lr 2e-6 --max-trace 2048\n" in said
    assert hops_defaults(Args(model="DIR", questions=64, lr=2e-6, max_trace=512)) == ""


def test_every_flag_is_used():
    """A flag that does nothing is a lie."""
    files = ("train.py", "support/checkpoint.py")
    source = "".join((ROOT / file).read_text() for file in files)
    unused = [f.name for f in fields(Args) if f"args.{f.name}" not in source]
    assert not unused


# ---- interruption
def start(out: Path, *flags: str) -> subprocess.Popen:
    brief = [
        text
        for name, value in BRIEF.items()
        for text in ("--" + name.replace("_", "-"), str(value))
    ]
    command = [sys.executable, "train.py", *brief, "--out", str(out), *flags]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_the_log_is_that_of_an_uninterrupted_run(tmp_path):
    seed = random.SystemRandom().randrange(10**6)
    print("kill seed", seed)  # pytest shows it if the test fails
    rng = random.Random(seed)
    flags = ("--steps", "8", "--save-every", "2")
    assert start(tmp_path / "whole", *flags).wait() == 0

    for kills in range(3):
        process = start(tmp_path / "killed", *flags, "--resume")
        wanted = rng.randrange(2, 6)  # lines on its console; the first step is the fourth
        for _ in range(wanted):
            process.stdout.readline()
        for _ in range(
            rng.randrange(200_000)
        ):  # somewhere within what comes after that line: a step, its log line, a checkpoint
            pass
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        for checkpoint in (tmp_path / "killed").glob("checkpoint-??????"):
            assert (checkpoint / "progress.json").exists(), kills
            load_model(checkpoint)
    resumed = start(tmp_path / "killed", *flags, "--resume")
    output, _ = resumed.communicate()
    assert resumed.returncode == 0, output
    assert without_clock(read_log(tmp_path / "killed")) == without_clock(
        read_log(tmp_path / "whole")
    )
    assert (tmp_path / "killed/samples.jsonl").read_text() == (
        tmp_path / "whole/samples.jsonl"
    ).read_text()
    assert_same_weights(tmp_path / "killed/final", tmp_path / "whole/final")


def test_a_run_that_any_machine_has_restarted_is_resumed_by_all(plain_run, tmp_path, monkeypatch):
    """Machines count restarts apart: this process has just begun, another was restarted."""
    shutil.copytree(plain_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/final")  # a finished run would be left as it is
    monkeypatch.setattr(
        distributed,
        "gather_objects",
        lambda value: [value, True] if isinstance(value, bool) else [value],
    )
    resumed = run(
        tmp_path / "run"
    )  # without --resume: else it would be refused, as the folder holds a run
    assert json.loads((tmp_path / "run/args.json").read_text())["resume"] is True
    assert without_clock(resumed) == without_clock(read_log(plain_run))


def test_resuming_forgets_what_was_logged_after_the_checkpoint_half_a_line_included(
    plain_run, tmp_path
):
    out = tmp_path / "run"
    shutil.copytree(plain_run, out)
    shutil.rmtree(out / "checkpoint-000003")
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 4, "rew')
    (out / "checkpoint-000004.tmp").mkdir()  # what a kill in the middle of saving leaves
    run(out, resume=True)
    assert without_clock(read_log(out)) == without_clock(read_log(plain_run))
    assert not list(out.glob("*.tmp"))


# ---- NaN
def test_a_gradient_that_is_not_finite_is_not_applied_and_three_in_a_row_stop_the_run(
    tmp_path, monkeypatch
):
    real, calls = train_module.loss_terms, itertools.count()

    def poisoned(*args):
        poison = (
            math.nan if next(calls) // 4 in (1, 3, 4, 5) else 1.0
        )  # 4 questions a step: step 2, and steps 4, 5, 6
        return real(*args) * poison

    monkeypatch.setattr(train_module, "loss_terms", poisoned)
    with pytest.raises(TrainingError, match="3 times in a row"):
        run(tmp_path / "run", steps=9, keep=9)
    lines = read_log(tmp_path / "run")
    assert [line["bad_updates"] for line in lines[1:]] == [0, 1, 0, 1, 1, 1]
    assert [line["loss"] is None for line in lines[1:]] == [False, True, False, True, True, True]
    assert_same_weights(tmp_path / "run/checkpoint-000002", tmp_path / "run/checkpoint-000001")
    assert_same_weights(tmp_path / "run/checkpoint-000005", tmp_path / "run/checkpoint-000003")
    assert all(p.isfinite().all() for p in weights(tmp_path / "run/checkpoint-000005").values())


# ---- bad input
def test_the_command_itself_exits_with_code_2_and_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "train.py", "--traces", "1", "--out", str(tmp_path / "run")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    assert "--traces 1" in done.stderr


def test_k_1_with_centring_is_refused_by_the_function_too():
    with pytest.raises(ValueError, match="traces"):
        advantages(torch.tensor([1.0]), center="mean")


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.sh")))
def test_the_launch_scripts_say_only_what_train_py_understands(script, tmp_path, monkeypatch):
    for name in ("python", "torchrun"):
        (tmp_path / name).write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        (tmp_path / name).chmod(0o755)
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "MODEL": "m",
        "DATA": "d",
        "OUT": "o",
        "HEAD": "h",
    }
    shown = subprocess.run(
        ["bash", ROOT / "examples" / script], env=given, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    launcher, flags = shown[: shown.index("train.py")], shown[shown.index("train.py") + 1 :]
    ranks = 16 if "--nnodes" in launcher else 8 if launcher else 1
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": str(ranks), "RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert (
        parse_args(flags, "").dtype == "bfloat16"
    )  # and no InputError: known flags, shares that divide
