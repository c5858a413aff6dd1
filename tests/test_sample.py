"""sample.py: what is drawn, with which probability, where it ends, what is recorded; and the held-out figures."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import sample as sample_module
from data import Example, Tokenizer, stream_seed
from evaluate import evaluate, main
from model import Transformer
from reward import score
from sample import Trace, draw, sample_traces, trace_ids, uniform
from support.errors import InputError
from support.weights import load_model, save_model

MISTRAL = (
    Path(__file__).parent / "golden" / "mistral_v01"
)  # its window of 8 is shorter than the traces below
LOGITS = torch.tensor(
    [1.3, -2.0, 0.1, float("-inf"), 2.4, -6.5, 0.1, float("-inf")], dtype=torch.float64
)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1, 2], [3, 3]]
SEEDS = [11, 22, 33, 44]


def next_logits(model: Transformer, ids: list[int]) -> Tensor:
    """[V] by the whole text from the start: no cache, no batch, no padding."""
    with torch.no_grad():
        return model.lm_head.weight @ model(torch.tensor([ids]))[0, -1]


def slow_trace(model, prompt, uniforms, temperature=1.0, stop_ids=(), cut_ids=()) -> Trace:
    """The definition: draw, append, start again. `uniforms` [max_new_tokens] float64."""
    ids, logp = [], []
    for u in uniforms.tolist():
        now = (next_logits(model, [*prompt, *ids]) / (temperature or 1.0)).log_softmax(0)
        token = (
            int(now.argmax())
            if temperature == 0
            else next(i for i in range(len(now)) if now[: i + 1].exp().sum() > u)
        )
        if token in cut_ids:
            return Trace(ids, logp, finished=False)
        ids.append(token)
        logp.append(float(now[token]))
        if token in stop_ids:
            return Trace(ids, logp, finished=True)
    return Trace(ids, logp, finished=False)


def assert_same(a: Trace, b: Trace) -> None:
    assert (a.ids, a.finished) == (b.ids, b.finished)
    assert a.logp == pytest.approx(b.logp, rel=0, abs=1e-11)


# ---------------------------------------------------------------------------------------------------------------- one token
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_tokens_are_drawn_with_exactly_their_probabilities(temperature):
    grid = 4096
    uniforms = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    token, logp = draw(LOGITS.expand(grid, -1), temperature, uniforms)
    probability = (LOGITS / temperature).softmax(0)
    count = torch.bincount(token, minlength=8)
    assert (
        (count - grid * probability).abs() <= 1
    ).all()  # an interval of that length holds as many grid points, give or take one
    assert torch.allclose(logp, (LOGITS / temperature).log_softmax(0)[token], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_token_owns_one_interval_of_its_length_however_small(dtype):
    logits = torch.tensor([20.0, -1.0, 19.0, 0.5, float("-inf"), -2.0], dtype=dtype)
    probability = (
        (logits - logits.max()).exp().double()
    )  # down to 2e-10; a fp32 sum would lose what is below 1e-7
    probability /= probability.sum()
    ends = probability.cumsum(0) / probability.sum()
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    possible = torch.tensor([0, 1, 2, 3, 5])
    for inside in (0.001, 0.5, 0.999):
        uniforms = (starts + inside * (ends - starts))[possible]
        token, _ = draw(logits.expand(5, -1), 1.0, uniforms)
        assert torch.equal(token, possible)


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53])
@pytest.mark.parametrize(
    "where", [[0], [5], [0, 1, 4, 5], [2], []], ids=lambda where: f"{where} impossible"
)
def test_a_token_of_probability_zero_is_never_drawn(where, u):
    logits = torch.zeros(3, 6)
    logits[:, where] = float("-inf")
    token, logp = draw(logits, 1.0, torch.full((3,), u, dtype=torch.float64))
    assert not set(token.tolist()) & set(where) and logp.isfinite().all()


def test_a_token_of_probability_zero_is_never_drawn_at_the_edge_of_its_neighbours():
    logits = torch.tensor(
        [0.0, float("-inf"), 0.0, float("-inf"), float("-inf"), 0.0, 0.0], dtype=torch.float64
    )
    edges = torch.tensor(
        [k / 4 + e for k in (1, 2, 3) for e in (-(2**-54), 0.0, 2**-54)], dtype=torch.float64
    )
    token, _ = draw(logits.expand(9, -1), 1.0, edges)
    assert set(token.tolist()) <= {0, 2, 5, 6}


def test_temperature_zero_takes_the_most_likely_token_and_records_its_plain_log_prob():
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    for u in (0.0, 0.5, 0.999):
        token, logp = draw(logits, 0.0, torch.full((2,), u, dtype=torch.float64))
        assert token.tolist() == [4, 3]
        assert torch.allclose(logp, LOGITS.log_softmax(0)[[4, 4]], rtol=0, atol=1e-15)


def test_uniform_numbers_are_a_function_of_the_seed_and_lie_below_one():
    many = uniform(7, 4, 5000)
    assert many.shape == (4, 5000) and many.dtype == torch.float64
    assert many.min() >= 0 and many.max() < 1 and len(many.unique()) == many.numel()
    assert torch.equal(uniform(7, 4, 5000), many) and not torch.equal(uniform(8, 4, 5000), many)


# ---------------------------------------------------------------------------------------------------------------- traces
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("which", ["tiny", "mistral_v01"])
def test_a_batch_of_traces_equals_each_drawn_alone_from_the_whole_text(which, temperature):
    model = tiny.model(3) if which == "tiny" else load_model(MISTRAL, torch.float64)
    ends = {"stop_ids": [0, 5], "cut_ids": [9]}
    groups = sample_traces(model, PROMPTS, 3, 14, temperature, seed=SEEDS, **ends)
    for prompt, seed, group in zip(PROMPTS, SEEDS, groups, strict=True):
        for trace, uniforms in zip(group, uniform(seed, 3, 14), strict=True):
            assert_same(trace, slow_trace(model, prompt, uniforms, temperature, **ends))
    if temperature == 1.0 and which == "tiny":  # every kind of end is among them
        traces = [trace for group in groups for trace in group]
        assert {trace.ids[-1] for trace in traces if trace.finished} == {0, 5}
        unfinished = [len(trace.ids) for trace in traces if not trace.finished]
        assert 14 in unfinished and min(unfinished) < 14


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recorded_log_probs_equal_those_of_scoring(temperature):
    model = tiny.model(3)
    groups = sample_traces(model, PROMPTS, 6, 14, temperature, [0], SEEDS, [9])
    for prompt, group in zip(PROMPTS, groups, strict=True):
        scores = score(model, prompt, group, [1, 2, 5], marker=0, temperature=temperature)
        for row, trace in enumerate(group):
            recorded = (
                [*trace.logp, trace.cut_logp] if trace.cut_id is not None else trace.logp
            )  # a cut token was sampled, too
            assert scores.trace_logp[row, : len(recorded)].tolist() == pytest.approx(
                recorded, rel=0, abs=1e-11
            )
            assert scores.trace_mask[row].sum() == len(recorded)
    assert any(trace.cut_id == 9 for group in groups for trace in group)


def test_recorded_log_probs_of_an_fp32_model_equal_those_of_scoring():
    model = load_model(MISTRAL)
    groups = sample_traces(model, PROMPTS, 4, 20, stop_ids=[0], seed=SEEDS)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        with torch.no_grad():
            scores = score(model, prompt, group, [1, 2, 5], marker=0)
        for row, trace in enumerate(group):
            assert scores.trace_logp[row, : len(trace.ids)].tolist() == pytest.approx(
                trace.logp, rel=0, abs=1e-5
            )


def test_a_prompts_traces_do_not_depend_on_what_is_sampled_beside_it():
    model = tiny.model(3)
    ends = {"stop_ids": [0], "cut_ids": [9]}
    together = sample_traces(model, PROMPTS, 3, 12, seed=SEEDS, **ends)
    for order in ([0], [1], [2], [3], [3, 2, 1, 0], [1, 2], [0, 0, 3]):
        again = sample_traces(
            model, [PROMPTS[i] for i in order], 3, 12, seed=[SEEDS[i] for i in order], **ends
        )
        for i, group in zip(order, again, strict=True):
            for trace, expected in zip(group, together[i], strict=True):
                assert_same(trace, expected)


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("slots", [1, 2, 3, 5, 11, 12, 100])
@pytest.mark.parametrize("prompt_tokens", [1, 20, 10**6])
def test_traces_do_not_depend_on_the_number_of_slots_nor_on_which_prompts_are_read_together(
    slots, prompt_tokens, temperature, monkeypatch
):
    monkeypatch.setattr(sample_module, "PROMPT_TOKENS", prompt_tokens)
    model, ends = tiny.model(3), {"stop_ids": [0], "cut_ids": [9]}
    expected = sample_traces(model, PROMPTS, 3, 12, temperature, seed=SEEDS, **ends)
    for group, other in zip(
        sample_traces(model, PROMPTS, 3, 12, temperature, seed=SEEDS, slots=slots, **ends),
        expected,
        strict=True,
    ):
        for trace, same in zip(group, other, strict=True):
            assert_same(trace, same)


@pytest.mark.parametrize("glance", [1, 2, 7, 16])
def test_traces_do_not_depend_on_how_often_the_device_is_waited_for(glance, monkeypatch):
    model, ends = tiny.model(3), {"stop_ids": [0], "cut_ids": [9]}
    expected = sample_traces(model, PROMPTS, 3, 12, seed=SEEDS, slots=4, **ends)
    monkeypatch.setattr(sample_module, "glance_every", lambda device: glance)
    for group, other in zip(
        sample_traces(model, PROMPTS, 3, 12, seed=SEEDS, slots=4, **ends), expected, strict=True
    ):
        for trace, same in zip(group, other, strict=True):
            assert_same(trace, same)


class EmulatedGraph:
    """What a CUDA graph is, on a CPU: operations with the very tensors they had, run into those again without asking Python."""

    def __init__(self) -> None:
        self.operations, self.replays = [], 0

    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, results in self.operations:
            again = function(*args, **kwargs)
            for returned, old, new in zip(
                function._schema.returns, results, as_tuple(again), strict=True
            ):
                if (
                    returned.alias_info is None
                ):  # neither a view of what is there nor written in place
                    old.copy_(new)


def as_tuple(results) -> tuple:
    return results if isinstance(results, tuple) else (results,)


class Recording(TorchDispatchMode):
    """Fills an EmulatedGraph. Like a GPU, which does nothing while it records, it leaves all memory as it found it."""

    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()
        self.graph, self.before = graph, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
        ), "waits for the device"
        for declared, given in zip(function._schema.arguments, args, strict=False):
            if declared.alias_info is not None and declared.alias_info.is_write:
                memory = torch.empty(0, dtype=torch.uint8).set_(given.untyped_storage())
                self.before.setdefault(memory.data_ptr(), (memory, memory.clone()))
        results = function(*args, **kwargs or {})
        self.graph.operations.append((function, args, kwargs or {}, as_tuple(results)))
        return results

    def __exit__(self, *failure) -> None:
        super().__exit__(*failure)
        for memory, before in self.before.values():
            memory.copy_(before)


@pytest.mark.parametrize(("slots", "places"), [(3, 4), (12, 4), (12, 64)])
def test_a_recorded_decode_step_samples_the_same_traces(slots, places, monkeypatch):
    """The step changes nothing but tensors that stay where they are, depends on no Python number but its arguments, and never waits."""
    model, ends, graphs = tiny.model(3), {"stop_ids": [0], "cut_ids": [9]}, []
    expected = sample_traces(model, PROMPTS, 3, 40, seed=SEEDS, slots=slots, **ends)
    monkeypatch.setattr(sample_module, "GRAPH_PLACES", places)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: graphs.append(EmulatedGraph()) or graphs[-1]
    )
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: Recording(graph))
    again = sample_traces(model, PROMPTS, 3, 40, seed=SEEDS, slots=slots, cuda_graphs=True, **ends)
    for group, other in zip(again, expected, strict=True):
        for trace, same in zip(group, other, strict=True):
            assert_same(trace, same)
    assert len(graphs) > 1 and sum(graph.replays for graph in graphs) > 2 * len(graphs)


def test_every_prompt_is_read_once_and_an_ended_rows_slot_takes_the_next_trace_at_once():
    model, shapes = line(1, 2, 3, 4, 5), []
    model.register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape)))
    groups = sample_traces(model, [[4], [1], [3], [2]], 2, 9, stop_ids=[5], slots=2)
    assert [len(group[0].ids) for group in groups] == [1, 4, 2, 3]
    assert shapes[0] == (4, 1) and set(shapes[1:]) == {
        (2, 1)
    }  # all prompts in one batch, then two rows at a time
    assert (
        len(shapes) - 1 == 1 + 4 + 2 + 3 - 1
    )  # as many steps as one row's traces have tokens; the last token is not fed


def test_rows_close_ranks_when_half_of_them_idle():
    model, rows = line(1, 2, 3, 4, 5, 6), []
    model.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    groups = sample_traces(model, [[1], [4], [4], [5]], 1, 9, stop_ids=[6])
    assert [len(group[0].ids) for group in groups] == [5, 2, 2, 1]
    assert rows == [4, 4, 4, 1, 1]  # prompts; 4 rows; 3 live of 4; one


def test_no_more_places_are_read_than_the_longest_row_holds(monkeypatch):
    """A trace that begins late in a run pays for its own length, not for all the tokens that were sampled before it."""
    read, append = [], sample_module.Slots.append

    def watched(self, *arguments):
        keys, values = append(self, *arguments)
        read.append((keys.shape[2], int(self.length.max()) + 1))
        return keys, values

    monkeypatch.setattr(sample_module.Slots, "append", watched)
    sample_traces(line(1, 2, 3, 4, 5), [[4], [1], [3], [2], [1]], 2, 9, stop_ids=[5], slots=2)
    assert (
        all(places == longest for places, longest in read)
        and max(places for places, _ in read) == 5
    )


def test_slots_default_to_what_half_of_the_free_memory_holds(monkeypatch):
    model, rows = tiny.model(3), []
    model.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    config, capacity = model.config, max(map(len, PROMPTS)) + 9
    row_bytes = (
        2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * capacity * 8
    )
    for fitting, expected in ((0.5, 1), (5.5, 5), (50, 12)):
        monkeypatch.setattr(
            sample_module,
            "free_memory",
            lambda device, fitting=fitting: int(2 * fitting * row_bytes),
        )
        rows.clear()
        sample_traces(model, PROMPTS, 3, 9)
        assert rows[1] == expected


def test_bf16_logits_are_never_rounded_to_bf16():
    hidden, weight = (
        torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (5, 300)
    )
    exact = hidden.double() @ weight.double().T
    logits = sample_module.make_logits(weight)(hidden)
    assert (
        logits.dtype == torch.float32
        and (logits - exact).abs().max() < 1e-5 < (exact.bfloat16() - exact).abs().max()
    )


def test_a_large_vocabulary_is_drawn_from_like_a_small_one():
    """Over several chunks, the last one ragged: the token whose interval of the running sum holds the number, in fp64."""
    logits = 3 * torch.randn(
        64,
        3 * sample_module.CHUNK + 200,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )
    uniforms = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    token, _ = draw(logits, 0.8, uniforms)
    cdf = (logits / 0.8).softmax(1).cumsum(1)
    assert torch.equal(token, torch.searchsorted(cdf, uniforms[:, None], right=True)[:, 0])
    assert len(set((token // sample_module.CHUNK).tolist())) == 4


def test_the_first_traces_do_not_depend_on_how_many_there_are():
    model = tiny.model(3)
    ((few,), (many,)) = (
        sample_traces(model, PROMPTS[:1], k, 12, seed=[5], stop_ids=[0]) for k in (2, 7)
    )
    for trace, expected in zip(few, many, strict=False):
        assert_same(trace, expected)


def test_the_same_seed_gives_the_same_traces_and_another_seed_others():
    model = tiny.model(3)
    first, again, other = (sample_traces(model, PROMPTS, 3, 12, seed=seed) for seed in (5, 5, 6))
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))


def test_the_k_traces_of_a_prompt_differ_and_so_do_those_of_equal_prompts():
    groups = sample_traces(tiny.model(3), [[1, 2]] * 3, 4, 12, seed=5)
    assert len({tuple(trace.ids) for group in groups for trace in group}) == 12


def test_one_seed_for_all_gives_every_prompt_its_own_stream():
    model = tiny.model(3)
    assert sample_traces(model, PROMPTS, 2, 8, seed=5) == sample_traces(
        model, PROMPTS, 2, 8, seed=[stream_seed(5, i) for i in range(4)]
    )


def test_sampling_leaves_torchs_own_random_state_alone():
    model = tiny.model(3)
    before = torch.get_rng_state()
    sample_traces(model, PROMPTS, 2, 4)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------------------------------------------- where a trace ends
def line(*tokens: int, vocab: int = 8) -> Transformer:
    """A model that says tokens[1] after tokens[0], tokens[2] after tokens[1] and so on."""
    logits = torch.full((vocab, vocab), float("-inf"), dtype=torch.float64)
    logits[:, tokens[-1]] = 0.0
    for now, then in pairwise(tokens):
        logits[now] = float("-inf")
        logits[now, then] = 0.0
    return tiny.chain(logits.clamp(min=-1e4))


def test_the_stop_token_is_kept_and_its_trace_finished():
    ((trace,),) = sample_traces(line(1, 2, 3, 4), [[1]], 1, 6, stop_ids=[3])
    assert (trace.ids, trace.finished) == ([2, 3], True) and len(trace.logp) == 2


def test_a_cut_token_is_dropped_and_its_trace_not_finished():
    ((trace,),) = sample_traces(line(1, 2, 3, 4), [[1]], 1, 6, stop_ids=[4], cut_ids=[3])
    assert (trace.ids, trace.finished) == ([2], False) and len(trace.logp) == 1


def test_a_trace_may_be_cut_at_its_first_token_and_is_then_empty():
    ((trace,),) = sample_traces(line(1, 2), [[1]], 1, 6, stop_ids=[4], cut_ids=[2])
    assert (trace.ids, trace.logp, trace.finished, trace.cut_id) == ([], [], False, 2)


@pytest.mark.parametrize("role", ["stop_ids", "cut_ids"])
def test_each_of_several_end_tokens_ends_its_trace(role):
    model = line(1, 2, 3, 4, 5, 6)
    kept = role == "stop_ids"
    groups = sample_traces(model, [[1], [3], [5]], 1, 9, **{role: [6, 4, 2]})
    assert [group[0].ids for group in groups] == ([[2], [4], [6]] if kept else [[], [], []])
    assert all(group[0].finished == kept for group in groups)


def test_an_end_token_inside_the_prompt_does_not_end_the_trace():
    groups = sample_traces(
        line(1, 2, 3, 4), [[3, 7, 1], [4, 3, 4, 1]], 1, 6, stop_ids=[3], cut_ids=[4, 7]
    )
    assert [group[0].ids for group in groups] == [[2, 3], [2, 3]]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_length_limit_cuts_unless_the_last_token_stops(length):
    ((trace,),) = sample_traces(line(1, 2, 3, 4), [[1]], 1, length, stop_ids=[4])
    assert (trace.ids, trace.finished) == ([2, 3, 4][:length], length == 3)


def test_without_end_tokens_every_trace_is_as_long_as_allowed():
    traces = [trace for group in sample_traces(tiny.model(3), PROMPTS, 2, 9) for trace in group]
    assert len(traces) == 8 and all(
        len(trace.ids) == len(trace.logp) == 9 and not trace.finished for trace in traces
    )


def test_decoding_ends_when_the_last_row_has_ended():
    model, calls = line(1, 2, 3, 4, 5), []
    model.register_forward_hook(lambda *_: calls.append(1))
    groups = sample_traces(model, [[3], [1], [2]], 1, 50, stop_ids=[4])
    assert [len(group[0].ids) for group in groups] == [1, 3, 2]
    assert len(calls) == 3  # the prompts, and the longest trace's tokens but the last


def test_end_tokens_the_model_has_no_row_for_are_no_matter():
    """A tokenizer may know special tokens that were added after the model was trained."""
    model = line(1, 2, 3, 4)
    expected = sample_traces(model, [[1]], 1, 6, stop_ids=[3], cut_ids=[4])
    assert sample_traces(model, [[1]], 1, 6, stop_ids=[3, 8], cut_ids=[4, 32000]) == expected


def test_sampled_frequencies_follow_the_model():
    """End to end, on a chain whose distributions are known: how often each pair of first tokens occurs."""
    table = torch.tensor(
        [[0.5, 1.5, -1.0], [2.0, 0.0, 0.3], [-0.5, -0.5, 1.0]], dtype=torch.float64
    )
    group = sample_traces(tiny.chain(table), [[0]], 4000, 2, seed=[1])[0]
    now, then = torch.tensor([trace.ids for trace in group]).T
    p = table.softmax(1)
    counts = torch.bincount(3 * now + then, minlength=9).double()
    expected = 4000 * (p[0][:, None] * p).flatten()
    assert (counts - expected).square().div(
        expected
    ).sum() < 26.1  # chi squared, 8 degrees of freedom, p = 0.001; the seed is fixed
    for trace in group[:50]:
        a, b = trace.ids
        assert trace.logp == pytest.approx(
            [float(p[0, a].log()), float(p[a, b].log())], rel=0, abs=1e-12
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"prompts": []},
        {"prompts": [[1], []]},
    ],
    ids=lambda c: str(c),
)
def test_what_cannot_be_sampled_is_refused(changes):
    with pytest.raises(InputError, match="sample_traces needs"):
        sample_traces(tiny.model(), **{"prompts": [[1]], "k": 1, "max_new_tokens": 1, **changes})


# ---------------------------------------------------------------------------------------------------------------- evaluation
def test_the_marker_is_forced_only_where_the_model_did_not_emit_it():
    assert trace_ids(Trace([4, 3], [0.0, 0.0], finished=True), marker=3) == [4, 3]
    assert trace_ids(Trace([4, 5], [0.0, 0.0], finished=False), marker=3) == [4, 5, 3]
    assert trace_ids(Trace([], [], finished=False), marker=3) == [3]


@torch.no_grad()
def slow_figures(
    model: Transformer, tokenizer: Tokenizer, examples: list[Example], max_trace: int
) -> tuple[dict, list[Trace]]:
    """The four figures by their definitions, one example and one token at a time."""
    marker, rows, traces = tokenizer.marker_id, [], []
    for example in examples:
        trace = slow_trace(
            model, example.prompt, torch.zeros(max_trace), 0.0, [marker], tokenizer.cut_ids
        )
        right, logp = [], []
        for context in ([*trace.ids, *([] if trace.finished else [marker])], [marker]):
            read = [*example.prompt, *context]
            answer = slow_trace(
                model, read, torch.zeros(len(example.answer)), 0.0, tokenizer.eos_ids
            )
            right.append(answer.finished and tokenizer.decode(answer.ids).strip() == example.gold)
            logp.append(
                sum(
                    float(next_logits(model, read + example.answer[:i]).log_softmax(0)[y])
                    for i, y in enumerate(example.answer)
                )
            )
        rows.append([right[0], right[1], logp[0] - logp[1], len(trace.ids)])
        traces.append(trace)
    means = torch.tensor(rows, dtype=torch.float64).mean(0).tolist()
    return dict(
        zip(
            ("eval_accuracy", "eval_accuracy_null", "eval_gain", "eval_trace_len"),
            means,
            strict=True,
        )
    ), traces


def letters(tmp_path: Path) -> Tokenizer:
    """Ids: <unk> 0, <eos> 1, <eot> 2, a 3, b 4, ... f 8, m 9 (the marker)."""
    return Tokenizer(
        tiny.tokenizer_dir(tmp_path, [*"abcdefm"], ("<unk>", "<eos>", "<eot>")), "m", "{question}"
    )


def example(tokenizer: Tokenizer, question: str, gold: str) -> Example:
    return Example(
        0, tokenizer.encode_prompt(question), tokenizer.encode_answer(gold), question, gold
    )


def examples_to_get_right_and_wrong(
    model: Transformer, tokenizer: Tokenizer, max_trace: int
) -> list[Example]:
    """Gold answers: in turn what the model answers after thinking, what it answers without, and something else; of some length."""
    generator, examples, marker = torch.Generator().manual_seed(1), [], tokenizer.marker_id
    for i in range(12):
        prompt = torch.randint(3, 9, (1 + i % 5,), generator=generator).tolist()
        trace = slow_trace(model, prompt, torch.zeros(max_trace), 0.0, [marker], tokenizer.cut_ids)
        read = [*prompt, *(trace_ids(trace, marker) if i % 3 == 0 else [marker])]
        answer = slow_trace(model, read, torch.zeros(8), 0.0, tokenizer.eos_ids)
        gold = tokenizer.decode(answer.ids) if i % 3 < 2 and answer.finished else ""
        examples.append(
            example(tokenizer, tokenizer.decode(prompt), gold or "a b c"[: 1 + 2 * (i % 3)])
        )
    return examples


@pytest.mark.parametrize("seed", [54, 84])
@pytest.mark.parametrize("batch", [64, 5, 1])
def test_held_out_figures_equal_their_definitions(seed, batch, tmp_path):
    model, tokenizer = tiny.model(seed), letters(tmp_path)
    examples = examples_to_get_right_and_wrong(model, tokenizer, max_trace=6)
    expected, traces = slow_figures(model, tokenizer, examples, max_trace=6)
    assert (
        0 < expected["eval_accuracy"] < 1
        and 0 < expected["eval_accuracy_null"] < 1
        and abs(expected["eval_gain"]) > 0.01
    )
    assert expected["eval_accuracy"] != expected["eval_accuracy_null"]
    assert {(trace.finished, len(trace.ids) == 6) for trace in traces} >= {
        (True, False),
        (False, True),
        (False, False),
    }
    assert evaluate(model, tokenizer, examples, 6, batch) == pytest.approx(
        expected, rel=0, abs=1e-10
    )


def test_a_right_answer_ends_and_is_no_longer_than_the_gold_one_whatever_stands_beside_it(tmp_path):
    tokenizer = letters(tmp_path)
    short, long = example(tokenizer, "f", "a"), example(tokenizer, "f", "b c d e")
    says_more = line(
        8, 9, 2, 3, 1, vocab=10
    )  # f: m, then <eot> a <eos>: its text is "a", in three tokens for two
    goes_on = line(8, 9, 3, 3, vocab=10)  # f: m, then a a a ...
    says_it = line(8, 9, 3, 1, vocab=10)  # f: m, then a <eos>
    ends_otherwise = line(
        8, 9, 3, 2, vocab=10
    )  # f: m, then a <eot> <eot> ...: a special token, but no eos
    for model, right in ((says_more, 0.0), (goes_on, 0.0), (ends_otherwise, 0.0), (says_it, 1.0)):
        for beside in ([], [long]):
            figures = evaluate(model, tokenizer, [short, *beside], 4)
            assert (
                figures["eval_accuracy"]
                == figures["eval_accuracy_null"]
                == right / (1 + len(beside))
            )


# ---------------------------------------------------------------------------------------------------------------- the command
def command(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.setattr("sys.argv", ["sample.py", "--device", "cpu", *flags])
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "question, ends", [("f", "by the marker"), ("c", "at the limit"), ("c a b", "by a cut token")]
)
def test_the_command_shows_trace_and_answer_and_what_thinking_does_to_the_gold_one(
    question, ends, tmp_path, monkeypatch, capsys
):
    model, tokenizer = tiny.model(9), letters(tmp_path)
    save_model(model.float(), tmp_path)
    tokenizer.save(tmp_path)
    flags = [
        "--question",
        f" {question} ",
        "--gold",
        "a b",
        "--max-trace",
        "6",
        "--max-answer",
        "20",
    ]
    trace_shown, answer_shown, gold_shown, gain_shown = command(
        monkeypatch, capsys, "--model", str(tmp_path), *flags
    ).splitlines()
    prompt = tokenizer.encode_prompt(question)
    trace = slow_trace(model, prompt, torch.zeros(6), 0.0, [9], tokenizer.cut_ids)
    assert (trace.finished, len(trace.ids) == 6) == {
        "by the marker": (True, False),
        "at the limit": (False, True),
    }.get(ends, (False, False))
    answer = slow_trace(
        model, [*prompt, *trace_ids(trace, 9)], torch.zeros(20), 0.0, tokenizer.eos_ids
    )
    cut = "" if trace.finished else " [cut: the marker was forced]"
    assert trace_shown == f"trace   {tokenizer.decode(trace.ids, special=True)}{cut}"
    assert answer_shown == f"answer  {tokenizer.decode(answer.ids)}"
    figures, _ = slow_figures(model, tokenizer, [example(tokenizer, question, "a b")], 6)
    assert gold_shown.startswith("gold    a (") and "<eos> (" in gold_shown
    assert gain_shown.endswith(f"gain {figures['eval_gain']:+.2f} nats")


def test_the_command_scores_a_data_set(tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny.model(9), letters(tmp_path)
    save_model(model.float(), tmp_path)
    tokenizer.save(tmp_path)
    data = tmp_path / "rows.jsonl"
    data.write_text(
        "".join(
            json.dumps({"question": q, "answer": a}) + "\n"
            for q, a in (("b c", "a b"), ("d", "e f a"), ("a", "a"))
        )
    )
    output = command(
        monkeypatch,
        capsys,
        "--model",
        str(tmp_path),
        "--data",
        str(data),
        "--limit",
        "2",
        "--max-trace",
        "6",
    )
    expected, _ = slow_figures(
        model, tokenizer, [example(tokenizer, "b c", "a b"), example(tokenizer, "d", "e f a")], 6
    )
    assert output.splitlines() == [f"{name} {value:.4g}" for name, value in expected.items()]


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "--question"),
        (["--question", "a", "--data", "rows.jsonl"], "--question"),
        (["--question", " "], "--question is empty"),
        (["--question", "a", "--marker", "<new>"], "<new>"),
        (["--question", "a", "--max-trace", "many"], "--max-trace"),
        (["--question", "a", "--max-trace", "0"], "max_new_tokens"),
        (["--question", "a", "--seed", "-1"], "--seed"),
        (["--question", "a", "--colour"], "--colour"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(flags, says, tmp_path, monkeypatch, capsys):
    save_model(tiny.model(9, torch.float32), tmp_path)
    letters(tmp_path).save(tmp_path)
    with pytest.raises(InputError, match=says) as refusal:
        command(monkeypatch, capsys, "--model", str(tmp_path), *flags)
    assert "\n" not in str(refusal.value)
