"""Scores from one prefill, against one full row per trace and a full log-softmax, in float64."""

import math
from collections.abc import Sequence
from dataclasses import fields
from functools import partial

import pytest
import tiny
import torch
from tiny import assert_close, plain_logp, predictions
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import reward
from data import Trace
from model import Transformer, prefill
from reward import Scores, log_ratio, micro_batches, prompt_backward, prompt_leaves, score

EXACT = 1e-12  # relative to the largest element; the rounding of float64 adds up to 1e-14 here
VOCAB, MARKER = 23, 5
PROMPT = [10, 9, 9, 1, 17, 2, 11]
ANSWER = [7, 12, 4, 22]
EOS = 21  # a cut token: ends a trace without being context for the answer
# Finished by the marker, cut by length, finished at once, cut at once, a longer one, one cut by a
# token, one pair of equals.
# Token 0 pads the branches: no trace holds it, so that any gradient of its embedding is a fault.
CUT = Trace([6, 18, 3], [0.0] * 3, finished=False, cut_id=EOS)
TRACES = [[8, 2, 14, MARKER], [6, 6], [MARKER], [], [20, 13, 1, 1, 8, 19, MARKER], CUT, [6, 6]]
LONG = [(7 * i) % 22 + 1 for i in range(60)]
# Three layers where the window is short: a token's influence reaches further than the window.
MODELS = {
    "plain": dict(num_key_value_heads=4),
    "grouped-query, tied": dict(tie_word_embeddings=True),
    "sliding window": dict(sliding_window=4, num_hidden_layers=3),
}


def make(kind: str = "grouped-query, tied", dtype=torch.float64, **changes) -> Transformer:
    return tiny.model(0, dtype, **{"vocab_size": VOCAB} | MODELS[kind] | changes)


# ---- the reference
def body_and_actions(trace: list[int] | Trace) -> tuple[list[int], list[int]]:
    """What stands before the marker, and what was sampled."""
    if isinstance(trace, Trace):
        return trace.ids, [*trace.ids, trace.cut_id]
    return (trace[:-1] if trace[-1:] == [MARKER] else trace), trace


def repeated(
    model: Transformer, traces: list, temperature: float = 1.0, prompt=PROMPT, answer=ANSWER
) -> Scores:
    """Scores from full rows of prompt + trace + marker + answer."""
    split = [body_and_actions(trace) for trace in traces]
    policy = [predictions(model, prompt, sampled, temperature) for _, sampled in split]
    trace_logp = [plain_logp(model, prompt, sampled, temperature) for _, sampled in split]
    markers = [plain_logp(model, [*prompt, *body], [MARKER], temperature) for body, _ in split]
    contexts = [*([*prompt, *body, MARKER] for body, _ in split), [*prompt, MARKER]]
    *answer_logp, null_logp = (plain_logp(model, context, answer) for context in contexts)
    padded = partial(pad_sequence, batch_first=True)  # with zeros
    return Scores(
        trace_logp=padded(trace_logp),
        trace_mask=padded([torch.ones(len(logp), dtype=torch.bool) for logp in trace_logp]),
        finished=torch.tensor([sampled[-1:] == [MARKER] for _, sampled in split]),
        marker_logp=torch.cat(markers),
        answer_logp=torch.stack(answer_logp),
        null_logp=null_logp,
        entropy=padded([-(logp.exp() * logp).sum(-1).detach() for logp in policy]),
    )


def functional(scores: Scores, rows: Sequence[int] = range(len(TRACES))) -> Tensor:
    """A random linear functional of all differentiable fields. rows[j]: the trace in row j."""
    rng, k, t = torch.Generator().manual_seed(1), len(TRACES), len(ANSWER)
    shapes = (k, 64), (k,), (k, t), (t,)  # 64: also beyond a trace, where nothing has a gradient
    trace, marker, answer, null = (
        torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes
    )
    total = (trace[rows, : scores.trace_logp.shape[1]] * scores.trace_logp).sum()
    total = total + (marker[rows] * scores.marker_logp).sum()
    total = total + (answer[rows] * scores.answer_logp).sum()
    return total if scores.null_logp is None else total + (null * scores.null_logp).sum()


def gradients(model: Transformer, loss: Tensor | None = None) -> dict[str, Tensor]:
    """Of `loss`; without it those that were collected. Forgets them."""
    if loss is not None:
        loss.backward()
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: parameter.grad for name, parameter in learning.items()}
    model.zero_grad()
    return found


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 1e-3, f"{name}: comparing no gradient shows nothing"
        assert_close(got[name], expected[name], EXACT)


def assert_same_scores(got: Scores, expected: Scores) -> None:
    for field in fields(Scores):
        ours, theirs = getattr(got, field.name), getattr(expected, field.name)
        assert (ours is None) == (theirs is None), field.name
        if theirs is not None and theirs.dtype == torch.bool:
            assert torch.equal(ours, theirs), field.name
        elif theirs is not None:
            assert_close(ours, theirs, EXACT)


# ---- once = repeated
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", MODELS)
def test_prompt_once_equals_prompt_repeated(kind, temperature):
    """Values, and the gradient of a random functional of them in every parameter.

    Temperature and entropy are the sampling distribution's; the answer is scored at 1. A forced
    marker is no token of the trace; a cut token is one, but no context of the answer.
    """
    model = make(kind)
    once = score(model, PROMPT, TRACES, ANSWER, MARKER, temperature=temperature, entropy=True)
    full = repeated(model, TRACES, temperature)
    assert_same_scores(once, full)
    assert not once.entropy.requires_grad
    ours, theirs = (gradients(model, functional(scores)) for scores in (once, full))
    assert_same_gradients(ours, theirs)


def test_one_token_of_prompt_and_one_of_answer_are_enough():
    model, traces = make(), [[4], [MARKER]]
    once = score(model, [3], traces, [7], MARKER, entropy=True)
    assert_same_scores(once, repeated(model, traces, prompt=[3], answer=[7]))


# ---- micro-batches
FROZEN = [(kind, "") for kind in MODELS]
FROZEN += [("plain", "embed_tokens layers norm"), ("sliding window", "embed_tokens layers.0")]


@pytest.mark.parametrize("kind, frozen", FROZEN)
def test_backward_by_micro_batches_with_the_prompt_last_equals_one_backward(kind, frozen):
    """The prompt's KV cache as leaves, a backward per micro-batch, then the prompt's own."""
    model = make(kind)
    for name in frozen.split():
        model.get_submodule(name).requires_grad_(False)
    expected = gradients(model, functional(score(model, PROMPT, TRACES, ANSWER, MARKER)))
    prompt = prefill(model, [PROMPT])
    leaves = prompt_leaves(prompt)
    traces = [Trace(body_and_actions(trace)[0], [], finished=False) for trace in TRACES]
    for batch in micro_batches(traces, 3):
        own = [TRACES[i] for i in batch]
        functional(score(model, leaves, own, ANSWER, MARKER, null=False), batch).backward()
    functional(score(model, leaves, [], ANSWER, MARKER), []).backward()
    prompt_backward(prompt, leaves)
    assert_same_gradients(gradients(model), expected)


@pytest.mark.parametrize("size", range(7))
def test_micro_batches_take_every_trace_once_and_their_number_depends_on_no_length(size):
    """Ranks with other traces must run equally many forwards. The longest come first."""
    for lengths in ([3, 9, 0, 9, 4], [0] * 5):
        batches = micro_batches([Trace([1] * n, [], finished=False) for n in lengths], size)
        assert len(batches) == math.ceil(5 / (size or 5))
        order = [i for batch in batches for i in batch]
        assert sorted(order) == list(range(5))
        if len(batches) > 1:
            assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
        assert all(len(batch) == min(size or 5, 5) for batch in batches[:-1])


def test_a_group_is_one_forward_whatever_its_traces():
    model, forwards = make("plain"), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    prompt = prefill(model, [PROMPT])
    for traces in (TRACES, [LONG, *TRACES[1:]], [TRACES[0]] * 3, [[]] * 3):
        forwards.clear()
        score(model, prompt, traces, ANSWER, MARKER)
        assert len(forwards) == 1


# ---- modes and dtypes
def test_the_forward_that_scores_is_the_forward_that_trains():
    model = make()
    trains = score(model, PROMPT, TRACES, ANSWER, MARKER, entropy=True)
    with torch.no_grad():
        scores = score(model, PROMPT, TRACES, ANSWER, MARKER, entropy=True)
    for field in fields(Scores):
        ours, theirs = getattr(scores, field.name), getattr(trains, field.name)
        assert torch.equal(ours, theirs) and not ours.requires_grad
        differentiable = field.name.endswith("logp")
        assert theirs.requires_grad == differentiable


@pytest.mark.parametrize("temperature", [1.0, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_are_fp32_from_the_hidden_state_on(dtype, temperature, monkeypatch):
    """Against a float64 head on the very hidden states: bf16 logits would be off by 1e-2."""
    heads = []  # expected log-probs and entropies: of the policy rows, then of the answer rows
    linear_logprob = reward.linear_logprob

    def recorded(hidden, weight, target, temperature=1.0, *arguments):
        logits = hidden.double() @ weight.double().T / temperature
        logp = logits.log_softmax(-1).detach()
        heads.append((logp[torch.arange(len(target)), target], -(logp.exp() * logp).sum(-1)))
        return linear_logprob(hidden, weight, target, temperature, *arguments)

    monkeypatch.setattr(reward, "linear_logprob", recorded)
    # One finished trace: rows in order, no padding.
    one = TRACES[:1]
    scores = score(make(dtype=dtype), PROMPT, one, ANSWER, MARKER, False, temperature, entropy=True)
    logp, entropy = (torch.cat(part) for part in zip(*heads, strict=True))
    policy, answer = logp.split([len(logp) - len(ANSWER), len(ANSWER)])
    for got, expected in (
        (scores.trace_logp[0], policy[:-1]),  # the marker's row comes once more, last
        (scores.entropy[0], entropy[: len(policy) - 1]),
        (scores.marker_logp, policy[-1:]),
        (scores.answer_logp[0], answer),
    ):
        assert got.dtype == torch.float32
        # two roundings of a logit of 6
        torch.testing.assert_close(got.detach().double(), expected, rtol=0, atol=2e-6)


def test_equal_traces_get_equal_scores_to_the_bit():
    """Two roundings of one number would pass for a difference."""
    traces = [TRACES[0], LONG, TRACES[0], TRACES[1], TRACES[0]]
    scores = score(make(dtype=torch.bfloat16), PROMPT, traces, ANSWER, MARKER)
    for other in (2, 4):
        assert torch.equal(scores.answer_logp[0], scores.answer_logp[other])


# ---- importance ratio
def test_the_ratio_is_to_the_samplers_record_truncated_and_0_for_a_token_that_has_left():
    """Left the range, in the direction in which its advantage pushes."""
    model, ids = make(), [0, 1, 2, 1, 0]
    trace = Trace(ids, [0.0] * 5, finished=False, cut_id=EOS)
    now = score(model, PROMPT, [trace, [1]], ANSWER, MARKER).trace_logp[0].tolist()
    ratios = [1.0, 1.2, 0.9, 1.5, 0.5, 1.27]
    then = [logp - math.log(ratio) for logp, ratio in zip(now, ratios, strict=True)]
    trace.logp, trace.cut_logp = then[:5], then[5]
    short = Trace([1], [-1.0], finished=False)
    traces = [trace, trace, short]
    scores = score(model, PROMPT, traces, ANSWER, MARKER)
    log = log_ratio(scores, traces)
    assert log[2, 1:].tolist() == [0.0] * 5  # beyond a trace
    advantage = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    rho = reward.truncated_ratio(scores, traces, advantage)
    expected = [[1.0, 1.2, 0.9, 0.0, 0.8, 1.27], [1.0, 1.2, 0.9, 1.28, 0.0, 1.27]]
    assert torch.allclose(rho[:2], torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    assert not rho.requires_grad
