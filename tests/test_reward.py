"""Scores from one prefill, against one full row per trace and a full log-softmax, in float64."""

import math
from collections import Counter
from dataclasses import dataclass, fields

import pytest
import tiny
import torch
import torch.nn.functional as F
from test_sample import Operations
from torch import Tensor

import reward
from data import Trace
from model import Transformer, prefill
from reward import (
    Scores,
    log_ratio,
    micro_batches,
    prompt_backward,
    prompt_leaves,
    prompt_tensors,
    score,
    truncated_ratio,
)

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


def full_logits(model: Transformer, row: list[int]) -> Tensor:
    return model(torch.tensor([row]))[0] @ model.lm_head.weight.T  # [L, V]


def repeated(
    model: Transformer, traces: list, temperature: float = 1.0, prompt=PROMPT, answer=ANSWER
) -> Scores:
    """Scores from K + 1 full rows of prompt + trace + marker + answer, token by token."""
    split = [body_and_actions(trace) for trace in traces]
    k, width = len(traces), max(1, *(len(sampled) for _, sampled in split))
    trace_logp = [[torch.zeros((), dtype=torch.float64)] * width for _ in range(k)]
    entropy = [[torch.zeros((), dtype=torch.float64)] * width for _ in range(k)]
    mask = torch.zeros(k, width, dtype=torch.bool)
    marker_logp, answer_logp = [], []
    for index, (body, sampled) in enumerate([*split, ([], [])]):
        context = [*prompt, *body, MARKER]
        logits = full_logits(model, [*context, *answer])
        policy, plain = (logits / temperature).log_softmax(-1), logits.log_softmax(-1)
        at = range(len(context) - 1, len(context) - 1 + len(answer))
        answer_logp.append(plain[list(at), answer])
        marker_logp.append(policy[len(context) - 2, MARKER])
        for t, token in enumerate(sampled):
            p = policy[len(prompt) + t - 1]
            trace_logp[index][t], entropy[index][t] = p[token], -(p.exp() * p).sum().detach()
            mask[index, t] = True
    return Scores(
        trace_logp=torch.stack([torch.stack(row) for row in trace_logp]),
        trace_mask=mask,
        finished=torch.tensor([sampled[-1:] == [MARKER] for _, sampled in split]),
        marker_logp=torch.stack(marker_logp[:k]),
        answer_logp=torch.stack(answer_logp[:k]),
        null_logp=answer_logp[k],
        entropy=torch.stack([torch.stack(row) for row in entropy]),
    )


@dataclass
class Functional:
    """A random linear functional of all differentiable fields, with weights per trace, not row."""

    trace: Tensor  # [K, 64], also beyond the trace, where there is nothing to differentiate
    marker: Tensor  # [K]
    answer: Tensor  # [K, T]
    null: Tensor  # [T]

    def __call__(self, scores: Scores, rows: list[int] | None = None) -> Tensor:
        """rows[j] = the trace in row j of scores; those beyond len(rows) do not count."""
        rows = list(range(len(scores.marker_logp))) if rows is None else rows
        n, width = len(rows), scores.trace_logp.shape[1]
        total = (self.trace[rows, :width] * scores.trace_logp[:n]).sum()
        total = total + (self.marker[rows] * scores.marker_logp[:n]).sum()
        total = total + (self.answer[rows] * scores.answer_logp[:n]).sum()
        return total if scores.null_logp is None else total + (self.null * scores.null_logp).sum()


def functional(k: int = len(TRACES)) -> Functional:
    rng = torch.Generator().manual_seed(1)
    shapes = (k, 64), (k,), (k, len(ANSWER)), (len(ANSWER),)
    return Functional(*(torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes))


def gradients(model: Transformer, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return collected(model)


def collected(model: Transformer) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(got: Tensor, expected: Tensor) -> None:
    atol = EXACT * float(expected.detach().abs().max())
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 1e-3, f"{name}: comparing no gradient shows nothing"
        assert_close(got[name], expected[name])


def assert_same_scores(got: Scores, expected: Scores, rows: list[int] | None = None) -> None:
    """Every field of every trace; row j of expected is row rows[j] of got, which may be wider."""
    rows = list(range(len(expected.marker_logp))) if rows is None else rows
    width = expected.trace_logp.shape[1]
    for field in (got.trace_logp, got.trace_mask, got.entropy):
        assert field is None or not field[rows, width:].any()
    assert torch.equal(got.trace_mask[rows, :width], expected.trace_mask)
    assert torch.equal(got.finished[rows], expected.finished)
    assert_close(got.trace_logp[rows, :width], expected.trace_logp)
    assert_close(got.marker_logp[rows], expected.marker_logp)
    assert_close(got.answer_logp[rows], expected.answer_logp)
    assert (got.null_logp is None) == (expected.null_logp is None)
    if expected.null_logp is not None:
        assert_close(got.null_logp, expected.null_logp)
    assert (got.entropy is None) == (expected.entropy is None)
    if expected.entropy is not None:
        assert_close(got.entropy[rows, :width], expected.entropy)


# ---- once = repeated
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", MODELS)
def test_prompt_once_equals_prompt_repeated(kind, temperature):
    """Values, and the gradient of a random functional of them in every parameter.

    Temperature and entropy are the sampling distribution's; the answer is scored at 1.
    """
    model, f = make(kind), functional()
    once = score(model, PROMPT, TRACES, ANSWER, MARKER, temperature=temperature, entropy=True)
    full = repeated(model, TRACES, temperature)
    assert_same_scores(once, full)
    assert not once.entropy.requires_grad
    assert_same_gradients(gradients(model, f(once)), gradients(model, f(full)))


def test_a_branch_sees_as_much_of_the_prompt_as_the_window_lets_it():
    """One layer, window 4: the marker at position 7 sees only the prompt's last three tokens."""
    model = make("sliding window", num_hidden_layers=1)
    first_token = score(model, PROMPT, [], ANSWER, MARKER).null_logp[0]
    for place in range(len(PROMPT)):
        prompt = list(PROMPT)
        prompt[place] = 21
        changed = score(model, prompt, [], ANSWER, MARKER).null_logp[0]
        assert (changed != first_token) == (place >= 4)


def test_one_token_of_prompt_and_one_of_answer_are_enough():
    model, traces = make(), [[4], [MARKER]]
    once = score(model, [3], traces, [7], MARKER, entropy=True)
    assert_same_scores(once, repeated(model, traces, prompt=[3], answer=[7]))


def test_null_think_and_entropy_are_only_made_when_asked_for():
    model = make()
    full = repeated(model, TRACES)
    full.null_logp = full.entropy = None
    assert_same_scores(score(model, PROMPT, TRACES, ANSWER, MARKER, null=False), full)


def test_the_null_think_alone_can_be_scored_and_is_what_an_empty_trace_gets():
    """Forced or sampled, the marker right after the prompt is the null think."""
    model = make()
    alone = score(model, PROMPT, [], ANSWER, MARKER, entropy=True)
    assert alone.marker_logp.shape == (0,) and alone.answer_logp.shape == (0, len(ANSWER))
    for empty in ([], [MARKER]):
        scores = score(model, PROMPT, [empty], ANSWER, MARKER, null=False)
        assert_close(scores.answer_logp[0], alone.null_logp)


# ---- the marker
def test_a_forced_marker_is_scored_like_a_sampled_one_but_is_no_token_of_the_trace():
    scores = score(make(), PROMPT, [[8, 2, MARKER], [8, 2]], ANSWER, MARKER, entropy=True)
    assert scores.trace_mask.tolist() == [[True, True, True], [True, True, False]]
    assert scores.finished.tolist() == [True, False]
    assert_close(scores.marker_logp[1], scores.marker_logp[0])
    assert_close(scores.answer_logp[1], scores.answer_logp[0])
    assert_close(scores.trace_logp[1, :2], scores.trace_logp[0, :2])
    assert_close(scores.trace_logp[0, 2], scores.marker_logp[0])
    assert scores.entropy[0, 2] > 0
    assert scores.trace_logp[1, 2] == 0 and scores.entropy[1, 2] == 0


def test_a_cut_token_is_an_action_but_no_context():
    """Ended by eos: the answer is scored as after a cut by length; only trace_logp counts eos."""
    model = make()
    scores = score(model, PROMPT, [CUT, CUT.ids], ANSWER, MARKER, entropy=True)
    assert scores.trace_mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert scores.finished.tolist() == [False, False]
    assert_close(scores.trace_logp[0, :3], scores.trace_logp[1, :3])
    assert_close(scores.marker_logp[0], scores.marker_logp[1])
    assert_close(scores.answer_logp[0], scores.answer_logp[1])
    last = full_logits(model, [*PROMPT, *CUT.ids]).log_softmax(-1)[-1]
    assert_close(scores.trace_logp[0, 3], last[EOS])
    assert_close(scores.marker_logp[0], last[MARKER])
    assert_close(scores.entropy[0, 3], -(last.exp() * last).sum())


# ---- invariances
def test_neither_values_nor_gradients_depend_on_padding():
    """A very long trace beside them pads the others to its length."""
    model, f = make(), functional()
    alone = score(model, PROMPT, TRACES, ANSWER, MARKER, entropy=True)
    beside = score(model, PROMPT, [*TRACES, LONG], ANSWER, MARKER, entropy=True)
    rows = list(range(len(TRACES)))
    assert_same_scores(beside, alone, rows)
    assert_same_gradients(gradients(model, f(beside, rows)), gradients(model, f(alone)))


def test_neither_values_nor_gradients_depend_on_the_order_of_traces():
    model, f, order = make(), functional(), [4, 0, 5, 3, 6, 1, 2]
    straight = score(model, PROMPT, TRACES, ANSWER, MARKER, entropy=True)
    shuffled = score(model, PROMPT, [TRACES[i] for i in order], ANSWER, MARKER, entropy=True)
    assert_same_scores(shuffled, straight, [order.index(i) for i in range(len(TRACES))])
    assert_same_gradients(gradients(model, f(shuffled, order)), gradients(model, f(straight)))


@pytest.mark.parametrize("size", [1, 3, len(TRACES)])
@pytest.mark.parametrize("kind", MODELS)
def test_backward_by_micro_batches_with_the_prompt_last_equals_one_backward(kind, size):
    """The prompt's KV cache as leaves, a backward per micro-batch, then the prompt's own."""
    model, f = make(kind), functional()
    expected = gradients(model, f(score(model, PROMPT, TRACES, ANSWER, MARKER)))
    model.zero_grad()
    prompt = prefill(model, [PROMPT])
    leaves = prompt_leaves(prompt)
    traces = [Trace(body_and_actions(trace)[0], [], finished=False) for trace in TRACES]
    for batch in micro_batches(traces, size):
        own = [TRACES[i] for i in batch]
        f(score(model, leaves, own, ANSWER, MARKER, null=False), batch).backward()
    (f.null * score(model, leaves, [], ANSWER, MARKER).null_logp).sum().backward()
    prompt_backward(prompt, leaves)
    assert_same_gradients(collected(model), expected)


def test_leaves_hold_the_prompts_values_and_keep_its_graph_out_of_a_branch():
    model, f = make("plain"), functional()
    prompt = prefill(model, [PROMPT])
    leaves = prompt_leaves(prompt)
    scores = score(model, leaves, TRACES, ANSWER, MARKER)
    assert_same_scores(scores, score(model, PROMPT, TRACES, ANSWER, MARKER))
    grad = gradients(model, f(scores))["embed_tokens.weight"]
    in_branches = {MARKER, *ANSWER}.union(*(body_and_actions(trace)[0] for trace in TRACES))
    only_in_prompt = sorted(set(PROMPT) - in_branches)
    assert only_in_prompt and not grad[only_in_prompt].any()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in prompt_tensors(leaves))
    prompt_backward(prompt, leaves)
    assert all(row.any() for row in model.embed_tokens.weight.grad[only_in_prompt])


def test_a_prompt_already_read_can_be_scored_any_number_of_times():
    model = make()
    prompt, expected = prefill(model, [PROMPT]), score(model, PROMPT, TRACES, ANSWER, MARKER)
    score(model, prompt, [LONG], ANSWER, MARKER)
    assert_same_scores(score(model, prompt, TRACES, ANSWER, MARKER), expected)


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


def test_padding_is_never_multiplied_by_the_head(monkeypatch):
    rows = []
    linear_logprob = reward.linear_logprob

    def counted(hidden, *arguments):
        rows.append(len(hidden))
        return linear_logprob(hidden, *arguments)

    monkeypatch.setattr(reward, "linear_logprob", counted)
    score(make(), PROMPT, [*TRACES, LONG], ANSWER, MARKER, null=False)
    # every action, the marker once more (in whatever way the trace ended), and the answer
    sampled = sum(len(body_and_actions(trace)[1]) for trace in [*TRACES, LONG])
    assert sum(rows) == sampled + (len(TRACES) + 1) * (1 + len(ANSWER))


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


@pytest.mark.parametrize("temperature, calls", [(1.0, 1), (0.8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_are_fp32_from_the_hidden_state_on(dtype, temperature, calls, monkeypatch):
    """Against a float64 head on the very hidden states: bf16 logits would be off by 1e-2.

    At temperature 1 policy and answer rows share one call of the head.
    """
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
    assert len(heads) == calls
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
    rho = truncated_ratio(log, torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64))
    expected = [[1.0, 1.2, 0.9, 0.0, 0.8, 1.27], [1.0, 1.2, 0.9, 1.28, 0.0, 1.27]]
    assert torch.allclose(rho[:2], torch.tensor(expected, dtype=torch.float64), atol=1e-9)
    assert not rho.requires_grad


def test_training_a_question_launches_150_kernels_a_layer(monkeypatch):
    """Of prompt and branches, forward and backward: a short question waits for them."""
    # CUDA normalises in one kernel, and its backward takes two; a product and its backward as many.
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: x * weight)
    counts = []
    for layers in (1, 2):
        model = make(dtype=torch.float32, num_hidden_layers=layers)
        with Operations() as operations:
            prompt = prefill(model, [PROMPT])
            leaves = prompt_leaves(prompt)
            scores = score(model, leaves, TRACES, ANSWER, MARKER)
            (scores.trace_logp.sum() + scores.answer_logp.sum()).backward()
            prompt_backward(prompt, leaves)
        counts.append(Counter(name for name, _ in operations.seen))
    layer = counts[1] - counts[0]
    assert layer.total() == 150, layer
