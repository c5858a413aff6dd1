"""Scores from one prefill, against one full row per trace and a full log-softmax, in float64."""

import math
from collections import Counter
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_sample import Operations
from torch import Tensor

import reward
from data import Trace
from model import Config, Transformer, prefill
from reward import Scores, micro_batches, prompt_backward, prompt_leaves, prompt_tensors, score

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
    "plain": dict(num_attention_heads=4, num_key_value_heads=4),
    "grouped-query, tied": dict(
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True
    ),
    "sliding window": dict(
        num_attention_heads=4, num_key_value_heads=2, sliding_window=4, num_hidden_layers=3
    ),
}


def tiny(
    kind: str = "grouped-query, tied", dtype: torch.dtype = torch.float64, layers: int = 2
) -> Transformer:
    """A random model whose attention and output distributions are far from uniform."""
    torch.manual_seed(0)
    shape = (
        dict(vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=layers)
        | MODELS[kind]
    )
    model = Transformer(Config(**shape)).to(torch.float64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=float("norm" in name), std=0.2 if "norm" in name else 0.5)
    return model.to(dtype)


# ---- the reference
def body_and_actions(trace: list[int] | Trace) -> tuple[list[int], list[int]]:
    """What stands before the marker, and what was sampled."""
    if isinstance(trace, Trace):
        assert trace.ids[-1:] != [MARKER] and trace.cut_id is not None
        return trace.ids, [*trace.ids, trace.cut_id]
    return (trace[:-1] if trace[-1:] == [MARKER] else trace), trace


def full_logits(model: Transformer, row: list[int]) -> Tensor:
    return model(torch.tensor([row]))[0] @ model.lm_head.weight.T  # [L, V]


def repeated(
    model: Transformer, traces: list, temperature: float = 1.0, prompt=PROMPT, answer=ANSWER
) -> Scores:
    """Scores from K + 1 full rows of prompt + trace + marker + answer, token by token."""
    split = [body_and_actions(trace) for trace in traces]
    k, width = len(traces), max(1, *(len(actions) for _, actions in split))
    trace_logp = [[torch.zeros((), dtype=torch.float64)] * width for _ in range(k)]
    entropy = [[torch.zeros((), dtype=torch.float64)] * width for _ in range(k)]
    mask = torch.zeros(k, width, dtype=torch.bool)
    marker_logp, answer_logp = [], []
    for index, (body, actions) in enumerate([*split, ([], [])]):
        context = [*prompt, *body, MARKER]
        logits = full_logits(model, [*context, *answer])
        policy, plain = (logits / temperature).log_softmax(-1), logits.log_softmax(-1)
        answer_logp.append(
            torch.stack([plain[len(context) + i - 1, token] for i, token in enumerate(answer)])
        )
        marker_logp.append(policy[len(context) - 2, MARKER])
        for t, token in enumerate(actions):
            p = policy[len(prompt) + t - 1]
            trace_logp[index][t], entropy[index][t] = p[token], -(p.exp() * p).sum().detach()
            mask[index, t] = True
    return Scores(
        trace_logp=torch.stack([torch.stack(row) for row in trace_logp]),
        trace_mask=mask,
        finished=torch.tensor([actions[-1:] == [MARKER] for _, actions in split]),
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
        total = (self.trace[rows, :width] * scores.trace_logp[:n]).sum() + (
            self.marker[rows] * scores.marker_logp[:n]
        ).sum()
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
    torch.testing.assert_close(
        got, expected, rtol=0, atol=EXACT * float(expected.detach().abs().max())
    )


def assert_same_gradients(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name in expected:
        assert expected[name].abs().max() > 1e-3, (
            f"{name} has no gradient: comparing it shows nothing"
        )
        assert_close(got[name], expected[name])


def assert_same_scores(got: Scores, expected: Scores, rows: list[int] | None = None) -> None:
    """Every field of every trace; row j of expected is row rows[j] of got, which may be wider."""
    rows = list(range(len(expected.marker_logp))) if rows is None else rows
    width = expected.trace_logp.shape[1]
    assert not got.trace_mask[rows, width:].any() and not got.trace_logp[rows, width:].any()
    assert torch.equal(got.trace_mask[rows, :width], expected.trace_mask)
    assert torch.equal(got.finished[rows], expected.finished)
    assert_close(got.trace_logp[rows, :width], expected.trace_logp)
    assert_close(got.marker_logp[rows], expected.marker_logp)
    assert_close(got.answer_logp[rows], expected.answer_logp)
    assert (got.null_logp is None) == (expected.null_logp is None) and (got.entropy is None) == (
        expected.entropy is None
    )
    if expected.null_logp is not None:
        assert_close(got.null_logp, expected.null_logp)
    if expected.entropy is not None:
        assert_close(got.entropy[rows, :width], expected.entropy)
        assert not got.entropy[rows, width:].any()


# ---- once = repeated
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", MODELS)
def test_prompt_once_equals_prompt_repeated(kind, temperature):
    """Values, and the gradient of a random functional of them in every parameter."""
    model, f = tiny(kind), functional()
    once = score(model, PROMPT, TRACES, ANSWER, MARKER, temperature=temperature, entropy=True)
    full = repeated(model, TRACES, temperature)
    assert_same_scores(once, full)
    assert_same_gradients(gradients(model, f(once)), gradients(model, f(full)))


def test_a_branch_sees_as_much_of_the_prompt_as_the_window_lets_it():
    """One layer, window 4: the marker at position 7 sees only the prompt's last three tokens."""
    model = tiny("sliding window")
    model.layers = model.layers[:1]
    first_token = score(model, PROMPT, [], ANSWER, MARKER).null_logp[0]
    for place in range(len(PROMPT)):
        prompt = list(PROMPT)
        prompt[place] = 21
        changed = score(model, prompt, [], ANSWER, MARKER).null_logp[0]
        assert (changed != first_token) == (place >= 4)


def test_one_token_of_prompt_and_one_of_answer_are_enough():
    model, traces = tiny(), [[4], [MARKER]]
    once = score(model, [3], traces, [7], MARKER, entropy=True)
    assert_same_scores(once, repeated(model, traces, prompt=[3], answer=[7]))


def test_null_logp_is_the_row_of_the_empty_trace():
    model = tiny()
    null = score(model, PROMPT, TRACES, ANSWER, MARKER).null_logp
    logits = full_logits(model, [*PROMPT, MARKER, *ANSWER]).log_softmax(-1)
    assert_close(
        null, torch.stack([logits[len(PROMPT) + i, token] for i, token in enumerate(ANSWER)])
    )
    for empty in (
        [],
        [MARKER],
    ):  # forced or sampled, the marker right after the prompt is the null think
        assert_close(score(model, PROMPT, [empty], ANSWER, MARKER, null=False).answer_logp[0], null)


def test_without_the_null_think_only_null_logp_is_missing():
    model = tiny()
    full = repeated(model, TRACES)
    full.null_logp = full.entropy = None
    assert_same_scores(score(model, PROMPT, TRACES, ANSWER, MARKER, null=False), full)


def test_the_null_think_alone_can_be_scored():
    """What a cache of frozen null log-probs asks for."""
    model = tiny()
    alone = score(model, PROMPT, [], ANSWER, MARKER, entropy=True)
    assert (
        alone.marker_logp.shape == (0,)
        and alone.answer_logp.shape == (0, len(ANSWER))
        and alone.trace_logp.shape[0] == 0
    )
    assert_close(alone.null_logp, repeated(model, [[]]).null_logp)


def test_plain_sft_is_one_empty_unfinished_trace():
    model, f = tiny(), functional()
    scores = score(model, PROMPT, [[]], ANSWER, MARKER, null=False)
    assert (
        scores.trace_mask.tolist() == [[False]]
        and scores.trace_logp.tolist() == [[0.0]]
        and scores.null_logp is None
    )
    full = repeated(model, [[]])
    full.null_logp = full.entropy = None
    assert_same_scores(scores, full)
    assert_same_gradients(gradients(model, f(scores)), gradients(model, f(full)))


# ---- the marker
def test_a_forced_marker_is_scored_like_a_sampled_one_but_is_no_token_of_the_trace():
    model = tiny()
    scores = score(model, PROMPT, [[8, 2, MARKER], [8, 2]], ANSWER, MARKER, entropy=True)
    assert scores.trace_mask.tolist() == [
        [True, True, True],
        [True, True, False],
    ] and scores.finished.tolist() == [True, False]
    assert_close(scores.marker_logp[1], scores.marker_logp[0])
    assert_close(scores.answer_logp[1], scores.answer_logp[0])
    assert_close(scores.trace_logp[1, :2], scores.trace_logp[0, :2])
    assert_close(scores.trace_logp[0, 2], scores.marker_logp[0])
    assert scores.entropy[0, 2] > 0
    assert scores.trace_logp[1, 2] == 0 and scores.entropy[1, 2] == 0


def test_a_forced_marker_gets_no_gradient_through_the_trace():
    """The advantage multiplies trace_logp: it trains a sampled marker and never a forced one."""
    model = tiny("plain")
    for trace, trained in ([], False), ([MARKER], True):
        grad = gradients(model, score(model, PROMPT, [trace], ANSWER, MARKER).trace_logp.sum())[
            "lm_head.weight"
        ]
        assert bool(grad.any()) == trained


def test_a_cut_token_is_an_action_but_no_context():
    """Ended by eos: the answer is scored as after a cut by length; only trace_logp counts eos."""
    model = tiny()
    scores = score(model, PROMPT, [CUT, CUT.ids], ANSWER, MARKER, entropy=True)
    assert scores.trace_mask.tolist() == [
        [True] * 4,
        [True] * 3 + [False],
    ] and scores.finished.tolist() == [False, False]
    assert_close(scores.trace_logp[0, :3], scores.trace_logp[1, :3])
    assert_close(scores.marker_logp[0], scores.marker_logp[1])
    assert_close(scores.answer_logp[0], scores.answer_logp[1])
    last = full_logits(model, [*PROMPT, *CUT.ids]).log_softmax(-1)[-1]
    assert_close(scores.trace_logp[0, 3], last[EOS])
    assert_close(scores.marker_logp[0], last[MARKER])
    assert_close(scores.entropy[0, 3], -(last.exp() * last).sum())


def test_traces_are_read_from_trace_objects_and_from_lists_alike():
    model = tiny()
    traces = [trace for trace in TRACES if isinstance(trace, list)]
    lists = score(model, PROMPT, traces, ANSWER, MARKER, entropy=True)
    objects = [Trace(list(ids), [0.0] * len(ids), finished=ids[-1:] == [MARKER]) for ids in traces]
    assert_same_scores(score(model, PROMPT, objects, ANSWER, MARKER, entropy=True), lists)
    assert [trace.ids for trace in objects] == traces  # and they are left as they were


# ---- invariances
def test_neither_values_nor_gradients_depend_on_padding():
    """A very long trace beside them pads the others to its length."""
    model, f = tiny(), functional()
    alone = score(model, PROMPT, TRACES, ANSWER, MARKER, entropy=True)
    beside = score(model, PROMPT, [*TRACES, LONG], ANSWER, MARKER, entropy=True)
    rows = list(range(len(TRACES)))
    assert_same_scores(beside, alone, rows)
    assert_same_gradients(gradients(model, f(beside, rows)), gradients(model, f(alone)))


def test_neither_values_nor_gradients_depend_on_the_order_of_traces():
    model, f, order = tiny(), functional(), [4, 0, 5, 3, 6, 1, 2]
    straight = score(model, PROMPT, TRACES, ANSWER, MARKER, entropy=True)
    shuffled = score(model, PROMPT, [TRACES[i] for i in order], ANSWER, MARKER, entropy=True)
    assert_same_scores(shuffled, straight, [order.index(i) for i in range(len(TRACES))])
    assert_same_gradients(gradients(model, f(shuffled, order)), gradients(model, f(straight)))


@pytest.mark.parametrize("size", [1, 2, 4, len(TRACES), 100])
@pytest.mark.parametrize("kind", MODELS)
def test_neither_values_nor_gradients_depend_on_micro_traces(kind, size):
    model, f = tiny(kind), functional()
    together = score(model, PROMPT, TRACES, ANSWER, MARKER, entropy=True)
    split = score(model, PROMPT, TRACES, ANSWER, MARKER, entropy=True, micro_traces=size)
    assert_same_scores(split, together)
    assert_same_gradients(gradients(model, f(split)), gradients(model, f(together)))


@pytest.mark.parametrize("size", [1, 2, 4, len(TRACES)])
@pytest.mark.parametrize("kind", MODELS)
def test_backward_by_micro_batches_with_the_prompt_last_equals_one_backward(kind, size):
    """The prompt's KV cache as leaves, a backward per micro-batch, then the prompt's own."""
    model, f = tiny(kind), functional()
    expected = gradients(model, f(score(model, PROMPT, TRACES, ANSWER, MARKER)))
    model.zero_grad()
    prompt = prefill(model, [PROMPT])
    leaves = prompt_leaves(prompt)
    for batch in micro_batches([len(body_and_actions(trace)[0]) for trace in TRACES], size):
        f(
            score(model, leaves, [TRACES[i] for i in batch], ANSWER, MARKER, null=False), batch
        ).backward()
    (f.null * score(model, leaves, [], ANSWER, MARKER).null_logp).sum().backward()
    prompt_backward(prompt, leaves)
    assert_same_gradients(collected(model), expected)


def test_leaves_hold_the_prompts_values_and_keep_its_graph_out_of_a_branch():
    model = tiny("plain")
    prompt = prefill(model, [PROMPT])
    leaves = prompt_leaves(prompt)
    assert_same_scores(
        score(model, leaves, TRACES, ANSWER, MARKER), score(model, PROMPT, TRACES, ANSWER, MARKER)
    )
    grad = gradients(model, functional()(score(model, leaves, TRACES, ANSWER, MARKER)))[
        "embed_tokens.weight"
    ]
    fed_to_branches = {
        MARKER,
        *ANSWER,
        *(token for trace in TRACES for token in body_and_actions(trace)[0]),
    }
    only_in_prompt = sorted(set(PROMPT) - fed_to_branches)
    assert only_in_prompt and not grad[only_in_prompt].any()
    assert all(leaf.grad is not None and leaf.grad.any() for leaf in prompt_tensors(leaves))
    prompt_backward(prompt, leaves)
    assert all(row.any() for row in model.embed_tokens.weight.grad[only_in_prompt])


def test_a_prompt_already_read_can_be_scored_any_number_of_times():
    model = tiny()
    prompt, expected = prefill(model, [PROMPT]), score(model, PROMPT, TRACES, ANSWER, MARKER)
    score(model, prompt, [LONG], ANSWER, MARKER)
    assert_same_scores(score(model, prompt, TRACES, ANSWER, MARKER), expected)


@pytest.mark.parametrize("size", range(6))
def test_micro_batches_take_every_branch_once_and_the_longest_first(size):
    lengths = [3, 9, 0, 9, 4]
    batches = micro_batches(lengths, size)
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(5)) and [lengths[i] for i in order] == sorted(
        lengths, reverse=True
    )
    assert all(len(batch) == (size or 5) for batch in batches[:-1]) and 1 <= len(batches[-1]) <= (
        size or 5
    )


@pytest.mark.parametrize("size", [0, 1, 3])
def test_the_number_of_forwards_depends_on_the_number_of_branches_alone(size):
    """Not on lengths or equal traces: ranks with other traces must run as many forwards."""
    model, forwards = tiny("plain"), []
    model.register_forward_hook(lambda *_: forwards.append(1))
    for traces in (TRACES, [LONG, *TRACES[1:]], [TRACES[0]] * len(TRACES), [[]] * len(TRACES)):
        forwards.clear()
        score(model, PROMPT, traces, ANSWER, MARKER, micro_traces=size)
        branches = len(TRACES) + 1
        assert len(forwards) == 1 + math.ceil(branches / (size or branches))


def test_padding_is_never_multiplied_by_the_head(monkeypatch):
    rows = []
    linear_logprob = reward.linear_logprob

    def counted(hidden, *arguments):
        rows.append(len(hidden))
        return linear_logprob(hidden, *arguments)

    monkeypatch.setattr(reward, "linear_logprob", counted)
    score(tiny(), PROMPT, [*TRACES, LONG], ANSWER, MARKER, null=False)
    # every action, the marker once more (in whatever way the trace ended), and the answer
    actions = sum(len(body_and_actions(trace)[1]) for trace in [*TRACES, LONG])
    assert sum(rows) == actions + (len(TRACES) + 1) * (1 + len(ANSWER))


# ---- temperature, entropy
def test_temperature_is_the_sampling_distributions_and_leaves_the_answer_alone():
    model = tiny()
    cold, warm = (score(model, PROMPT, TRACES, ANSWER, MARKER, temperature=t) for t in (0.7, 1.0))
    assert torch.equal(cold.answer_logp, warm.answer_logp) and torch.equal(
        cold.null_logp, warm.null_logp
    )
    logits = full_logits(model, [*PROMPT, 6, 6])  # of the cut trace [6, 6] with its forced marker
    policy = (logits / 0.7).log_softmax(-1)[len(PROMPT) - 1 :]
    assert_close(cold.trace_logp[1, :2], policy[[0, 1], [6, 6]])
    assert_close(cold.marker_logp[1], policy[2, MARKER])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_is_that_of_the_sampling_distribution_and_no_nll(temperature):
    """Two tokens drawn from one distribution have one entropy, though their log-probs differ."""
    model = tiny()
    scores = score(model, PROMPT, [[8], [2]], ANSWER, MARKER, temperature=temperature, entropy=True)
    p = (full_logits(model, PROMPT)[-1] / temperature).softmax(-1)
    for trace in range(2):
        assert_close(scores.entropy[trace, 0], -(p * p.log()).sum())
    assert scores.trace_logp[0, 0] != scores.trace_logp[1, 0]


def test_entropy_is_detached_and_only_made_when_asked_for():
    scores = score(tiny(), PROMPT, TRACES, ANSWER, MARKER, entropy=True)
    assert not scores.entropy.requires_grad and scores.trace_logp.requires_grad
    assert score(tiny(), PROMPT, TRACES, ANSWER, MARKER).entropy is None


# ---- modes and dtypes
@pytest.mark.parametrize("size", [0, 2])
def test_the_forward_that_scores_is_the_forward_that_trains(size):
    model = tiny()
    trains = score(model, PROMPT, TRACES, ANSWER, MARKER, entropy=True, micro_traces=size)
    with torch.no_grad():
        scores = score(model, PROMPT, TRACES, ANSWER, MARKER, entropy=True, micro_traces=size)
    for name in (
        "trace_logp",
        "trace_mask",
        "finished",
        "marker_logp",
        "answer_logp",
        "null_logp",
        "entropy",
    ):
        assert (
            torch.equal(getattr(scores, name), getattr(trains, name))
            and not getattr(scores, name).requires_grad
        )
    for name in ("trace_logp", "marker_logp", "answer_logp", "null_logp"):
        assert getattr(trains, name).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_probs_are_fp32_from_the_hidden_state_on(dtype, monkeypatch):
    """Against a float64 head on the very hidden states: bf16 logits would be off by 1e-2."""
    heads = []  # expected log-probs and entropies: of the policy rows, then of the answer rows
    linear_logprob = reward.linear_logprob

    def recorded(hidden, weight, target, *arguments):
        logp = (hidden.double() @ weight.double().T).log_softmax(-1).detach()
        heads.append((logp[torch.arange(len(target)), target], -(logp.exp() * logp).sum(-1)))
        return linear_logprob(hidden, weight, target, *arguments)

    model = tiny(dtype=dtype)
    monkeypatch.setattr(reward, "linear_logprob", recorded)
    scores = score(
        model, PROMPT, TRACES[:1], ANSWER, MARKER, null=False, entropy=True
    )  # one finished trace: rows in order, no padding
    (policy, entropy), (answer, _) = heads
    fields = [
        (scores.trace_logp[0], policy[:-1]),
        (scores.entropy[0], entropy[:-1]),
    ]  # the marker's row comes once more, last
    fields += [(scores.marker_logp, policy[-1:]), (scores.answer_logp[0], answer)]
    for got, expected in fields:
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.detach().double(), expected, rtol=0, atol=2e-6
        )  # two roundings of a logit of 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_group_scored_by_an_fp32_or_bf16_model_has_fp32_log_probs(dtype):
    scores = score(tiny(dtype=dtype), PROMPT, TRACES, ANSWER, MARKER, entropy=True)
    fields = (
        scores.trace_logp,
        scores.marker_logp,
        scores.answer_logp,
        scores.null_logp,
        scores.entropy,
    )
    assert [field.dtype for field in fields] == [torch.float32] * 5 and all(
        field.isfinite().all() for field in fields
    )
    # rounded to bf16 on the way, every one of them would be a bf16 number
    assert all(not torch.equal(field, field.bfloat16().float()) for field in fields)


def test_equal_traces_get_equal_scores_to_the_bit_and_their_gradients_add_up():
    """In any micro-batches: two roundings of one number would pass for a difference."""
    model = tiny(dtype=torch.bfloat16)
    traces = [TRACES[0], LONG, TRACES[0], TRACES[1], TRACES[0]]
    with torch.no_grad():
        scores = score(model, PROMPT, traces, ANSWER, MARKER, micro_traces=2)
    assert torch.equal(scores.answer_logp[0], scores.answer_logp[2]) and torch.equal(
        scores.answer_logp[0], scores.answer_logp[4]
    )
    model = tiny()
    score(model, PROMPT, traces, ANSWER, MARKER).answer_logp.sum().backward()
    together = model.lm_head.weight.grad.clone()
    model.zero_grad()
    for trace in traces:
        score(model, PROMPT, [trace], ANSWER, MARKER).answer_logp.sum().backward()
    torch.testing.assert_close(together, model.lm_head.weight.grad, rtol=1e-10, atol=1e-12)


def test_training_a_question_launches_150_kernels_a_layer(monkeypatch):
    """Of prompt and branches, forward and backward: a short question waits for them."""
    # CUDA normalises in one kernel, and its backward takes two; a product and its backward as many.
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: x * weight)
    counts = []
    for layers in (1, 2):
        model = tiny(dtype=torch.float32, layers=layers)
        with Operations() as operations:
            prompt = prefill(model, [PROMPT])
            leaves = prompt_leaves(prompt)
            scores = score(model, leaves, TRACES, ANSWER, MARKER)
            (scores.trace_logp.sum() + scores.answer_logp.sum()).backward()
            prompt_backward(prompt, leaves)
        counts.append(Counter(name for name, _ in operations.seen))
    layer = counts[1] - counts[0]
    assert layer.total() == 150, layer
