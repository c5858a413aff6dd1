"""sample.py: what is drawn, with which probability, where it ends, what is recorded."""

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import sample as sample_module
from data import stream_seed
from support.tokenizer import Tokenizer
from model import Transformer
from reward import score
from sample import DecodeBatch, draw, main, random_numbers, sample_traces, trace_ids, trace_starts
from data import Trace
from model import prefill
from support.errors import InputError
from support.weights import load_model, save_model

MISTRAL = Path(__file__).parent / "golden/mistral_v01"  # its window of 8 is shorter than the traces
INF = float("inf")
LOGITS = torch.tensor([1.3, -2.0, 0.1, -INF, 2.4, -6.5, 0.1, -INF], dtype=torch.float64)
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
        token = int(now.argmax())
        if temperature > 0:
            token = next(i for i in range(len(now)) if now[: i + 1].exp().sum() > u)
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


def assert_same_groups(a: list[list[Trace]], b: list[list[Trace]]) -> None:
    for group, expected in zip(a, b, strict=True):
        for trace, other in zip(group, expected, strict=True):
            assert_same(trace, other)


# ---- one token
@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.5])
def test_tokens_are_drawn_with_exactly_their_probabilities(temperature):
    grid = 4096
    uniforms = (torch.arange(grid, dtype=torch.float64) + 0.5) / grid
    token, logp = draw(LOGITS.expand(grid, -1), temperature, uniforms)
    probability = (LOGITS / temperature).softmax(0)
    count = torch.bincount(token, minlength=8)
    # An interval of that length holds as many grid points, give or take one.
    assert ((count - grid * probability).abs() <= 1).all()
    assert torch.allclose(logp, (LOGITS / temperature).log_softmax(0)[token], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_token_owns_one_interval_of_its_length_however_small(dtype):
    logits = torch.tensor([20.0, -1.0, 19.0, 0.5, -INF, -2.0], dtype=dtype)
    # Down to 2e-10; a fp32 sum would lose what is below 1e-7.
    probability = (logits - logits.max()).exp().double()
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
    logits[:, where] = -INF
    token, logp = draw(logits, 1.0, torch.full((3,), u, dtype=torch.float64))
    assert not set(token.tolist()) & set(where) and logp.isfinite().all()


def test_a_token_of_probability_zero_is_never_drawn_at_the_edge_of_its_neighbours():
    logits = torch.tensor([0.0, -INF, 0.0, -INF, -INF, 0.0, 0.0], dtype=torch.float64)
    edges = [k / 4 + e for k in (1, 2, 3) for e in (-(2**-54), 0.0, 2**-54)]
    edges = torch.tensor(edges, dtype=torch.float64)
    token, _ = draw(logits.expand(9, -1), 1.0, edges)
    assert set(token.tolist()) <= {0, 2, 5, 6}


def test_a_token_of_probability_zero_is_never_drawn_at_the_edge_of_a_chunk():
    """Every chunk begins with impossible tokens, and its mass is summed in two orders."""
    chunk, generator = sample_module.CHUNK, torch.Generator().manual_seed(0)
    logits = torch.randn(20, 16, chunk, generator=generator, dtype=torch.float64)
    logits[:, :, :100] = -INF
    mass = (logits - logits.amax((1, 2), keepdim=True)).exp().sum(2).cumsum(1)  # [20, 16]
    uniforms = mass / mass[:, -1:]
    for _ in range(6):
        uniforms = torch.nextafter(uniforms, torch.zeros_like(uniforms))
    for _ in range(13):  # from 6 numbers below the edges to 6 above
        below_one = uniforms.clamp(max=1 - 2**-53).flatten()
        _, logp = draw(logits.flatten(1).repeat_interleave(16, dim=0), 1.0, below_one)
        assert logp.isfinite().all()
        uniforms = torch.nextafter(uniforms, torch.full_like(uniforms, 2.0))


def test_temperature_zero_takes_the_most_likely_token_and_records_its_plain_log_prob():
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    for u in (0.0, 0.5, 0.999):
        token, logp = draw(logits, 0.0, torch.full((2,), u, dtype=torch.float64))
        assert token.tolist() == [4, 3]
        assert torch.allclose(logp, LOGITS.log_softmax(0)[[4, 4]], rtol=0, atol=1e-15)


def test_uniform_numbers_are_a_function_of_the_seed_and_lie_below_one():
    many = random_numbers(7, 4, 5000)
    assert many.shape == (4, 5000) and many.dtype == torch.float64
    assert many.min() >= 0 and many.max() < 1 and len(many.unique()) == many.numel()
    assert torch.equal(random_numbers(7, 4, 5000), many)
    assert not torch.equal(random_numbers(8, 4, 5000), many)


# ---- traces
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("which", ["tiny", "mistral_v01"])
def test_a_batch_of_traces_equals_each_drawn_alone_from_the_whole_text(which, temperature):
    model = tiny.model(3) if which == "tiny" else load_model(MISTRAL, torch.float64)
    ends = {"stop_ids": [0, 5], "cut_ids": [9]}
    groups = sample_traces(model, PROMPTS, 3, 14, temperature, seed=SEEDS, **ends)
    for prompt, seed, group in zip(PROMPTS, SEEDS, groups, strict=True):
        for trace, uniforms in zip(group, random_numbers(seed, 3, 14), strict=True):
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
            recorded = list(trace.logp)
            if trace.cut_id is not None:  # was sampled, too
                recorded.append(trace.cut_logp)
            scored = scores.trace_logp[row, : len(recorded)].tolist()
            assert scored == pytest.approx(recorded, rel=0, abs=1e-11)
            assert scores.trace_mask[row].sum() == len(recorded)
    assert any(trace.cut_id == 9 for group in groups for trace in group)


def test_recorded_log_probs_of_an_fp32_model_equal_those_of_scoring():
    model = load_model(MISTRAL)
    groups = sample_traces(model, PROMPTS, 4, 20, stop_ids=[0], seed=SEEDS)
    for prompt, group in zip(PROMPTS, groups, strict=True):
        with torch.no_grad():
            scores = score(model, prompt, group, [1, 2, 5], marker=0)
        for row, trace in enumerate(group):
            scored = scores.trace_logp[row, : len(trace.ids)].tolist()
            assert scored == pytest.approx(trace.logp, rel=0, abs=1e-5)


def test_a_prompts_traces_do_not_depend_on_what_is_sampled_beside_it():
    model = tiny.model(3)
    ends = {"stop_ids": [0], "cut_ids": [9]}
    together = sample_traces(model, PROMPTS, 3, 12, seed=SEEDS, **ends)
    for order in ([0], [1], [2], [3], [3, 2, 1, 0], [1, 2], [0, 0, 3]):
        prompts, seeds = [PROMPTS[i] for i in order], [SEEDS[i] for i in order]
        again = sample_traces(model, prompts, 3, 12, seed=seeds, **ends)
        assert_same_groups(again, [together[i] for i in order])


@pytest.mark.parametrize("temperature", [1.0, 0.0])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 11, 12, 100])
@pytest.mark.parametrize("prompt_tokens", [1, 20, 10**6])
def test_traces_do_not_depend_on_the_number_of_rows_nor_on_which_prompts_share_a_prefill(
    rows, prompt_tokens, temperature, monkeypatch
):
    model, ends = tiny.model(3), {"stop_ids": [0], "cut_ids": [9]}
    expected = sample_traces(model, PROMPTS, 3, 12, temperature, seed=SEEDS, **ends)
    monkeypatch.setattr(sample_module, "PROMPT_TOKENS", prompt_tokens)
    groups = sample_traces(model, PROMPTS, 3, 12, temperature, seed=SEEDS, rows=rows, **ends)
    assert_same_groups(groups, expected)


@pytest.mark.parametrize("steps", [1, 2, 7, 16])
def test_traces_do_not_depend_on_how_often_ended_ones_are_looked_for(steps, monkeypatch):
    model, ends = tiny.model(3), {"stop_ids": [0], "cut_ids": [9]}
    expected = sample_traces(model, PROMPTS, 3, 12, seed=SEEDS, rows=4, **ends)
    monkeypatch.setitem(sample_module.FINISH_EVERY, "cpu", steps)
    groups = sample_traces(model, PROMPTS, 3, 12, seed=SEEDS, rows=4, **ends)
    assert_same_groups(groups, expected)


class Operations(TorchDispatchMode):
    """Every operation with the shapes of its tensors, views left out."""

    VIEWS = "view _unsafe_view t transpose select slice unbind unsqueeze expand split detach"

    def __init__(self) -> None:
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in self.VIEWS.split():
            tensors = pytree.tree_leaves((args, kwargs))
            shapes = [tuple(x.shape) for x in tensors if isinstance(x, Tensor)]
            self.seen.append((name, shapes))
        return function(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts what would wait for a GPU: operations whose result Python has to know."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if function.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.equal):
            self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("steps", [1, 5])
def test_only_looking_for_ended_traces_waits_for_the_device(steps, monkeypatch):
    model, ends = tiny.model(3), {"stop_ids": [0], "cut_ids": [9]}
    waits, in_finish, forwards = Waits(), [], []
    model.register_forward_hook(lambda *_: forwards.append(1))
    tolist, finish = Tensor.tolist, sample_module.DecodeBatch.finish

    def counted_tolist(self):
        waits.count += 1
        return tolist(self)

    def counted_finish(self, *arguments):
        before = waits.count
        traces = finish(self, *arguments)
        in_finish.append(waits.count - before)
        return traces

    monkeypatch.setitem(sample_module.FINISH_EVERY, "cpu", steps)
    monkeypatch.setattr(Tensor, "tolist", counted_tolist)
    monkeypatch.setattr(sample_module.DecodeBatch, "finish", counted_finish)
    with waits:
        sample_traces(model, PROMPTS, 3, 40, seed=SEEDS, rows=5, **ends)
    assert waits.count == sum(in_finish) == len(in_finish) + 2 * 12  # ids and logp of 12 traces
    assert len(in_finish) == len(forwards) // steps  # a prefill and all tokens but the last


def test_every_prompt_is_read_once_and_a_row_whose_trace_has_ended_begins_the_next_at_once():
    model, shapes = line(1, 2, 3, 4, 5), []
    model.register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape)))
    groups = sample_traces(model, [[4], [1], [3], [2]], 2, 9, stop_ids=[5], rows=2)
    assert [len(group[0].ids) for group in groups] == [1, 4, 2, 3]
    assert shapes[0] == (4, 1)  # all prompts in one forward pass
    assert set(shapes[1:]) == {(2, 1)}  # then two rows at a time
    # As many steps as one row's traces have tokens; the last token is not fed.
    assert len(shapes) - 1 == 1 + 4 + 2 + 3 - 1
    shapes.clear()
    groups = sample_traces(model, [[1], [4], [4], [4]], 1, 9, stop_ids=[5], rows=2)
    assert [len(trace.ids) for (trace,) in groups] == [4, 1, 1, 1]
    assert shapes[1:] == [(2, 1)] * 3  # beside the first trace, the three others one by one


def test_the_batch_shrinks_when_half_of_its_rows_are_idle():
    model, rows = line(1, 2, 3, 4, 5, 6), []
    model.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    groups = sample_traces(model, [[1], [4], [4], [5]], 1, 9, stop_ids=[6])
    assert [len(group[0].ids) for group in groups] == [5, 2, 2, 1]
    assert rows == [4, 4, 4, 1, 1]  # prompts; 4 rows; 3 live of 4; one


def test_no_more_positions_are_read_than_the_longest_row_holds(monkeypatch):
    """A trace that begins late pays for its own length, not for all tokens sampled before it."""
    read, append = [], sample_module.DecodeBatch.append

    def watched(self, *arguments):
        keys, values = append(self, *arguments)
        read.append((keys.shape[2], int(self.length.max()) + 1))
        return keys, values

    monkeypatch.setattr(sample_module.DecodeBatch, "append", watched)
    sample_traces(line(1, 2, 3, 4, 5), [[4], [1], [3], [2], [1]], 2, 9, stop_ids=[5], rows=2)
    assert all(positions == longest for positions, longest in read)
    assert max(positions for positions, _ in read) == 5


def fits(monkeypatch, model: Transformer, positions: float) -> None:
    """Makes the free memory such that half of it holds so many positions of the KV cache."""
    config = model.config
    position_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 8
    free = int(2 * positions * position_bytes)
    monkeypatch.setattr(sample_module, "free_memory", lambda device: free)


@pytest.mark.parametrize("share", [0.5, 0.85])
def test_rows_default_to_what_a_share_of_the_free_memory_holds(share, monkeypatch):
    """Half of it on a CPU, 0.85 on a GPU."""
    assert share in sample_module.MEMORY_SHARE.values()
    model, rows = tiny.model(3), []
    model.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    capacity = max(map(len, PROMPTS)) + 9
    monkeypatch.setitem(sample_module.MEMORY_SHARE, "cpu", share)
    for fitting, expected in ((0.5, 1), (5.5, 5), (50, 12)):
        fits(monkeypatch, model, fitting * capacity * 0.5 / share)
        rows.clear()
        sample_traces(model, PROMPTS, 3, 9)
        assert rows[1] == expected


def test_a_long_prompt_does_not_size_the_rows_of_short_ones(monkeypatch):
    model, shapes = tiny.model(3), []
    model.register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape)))
    given = (model, PROMPTS, 4, 2)  # rows of 5, 3, 10 and 4 positions
    expected = sample_traces(*given, seed=SEEDS)
    assert shapes == [(4, 8), (16, 1)]  # all at once, where memory holds them
    for positions, forwards in (
        # The long prompt alone, 4 rows of 10. Then 9 rows of 5 for 12 traces.
        (45, [(1, 8), (4, 1), (3, 3), (9, 1), (9, 1), (3, 1)]),
        # 5 rows of 10, which the long prompt does not fill: the next longest joins it, the others
        # decode in 8 rows of 4.
        (59, [(2, 8), (5, 1), (5, 1), (5, 1), (2, 2), (8, 1)]),
    ):
        fits(monkeypatch, model, positions)
        shapes.clear()
        assert_same_groups(sample_traces(*given, seed=SEEDS), expected)
        assert shapes == forwards


@torch.no_grad()
def test_a_batch_that_shrinks_copies_one_layer_at_a_time():
    """A copy of the whole KV cache would not fit beside it."""
    model = tiny.model(3, num_hidden_layers=4)
    batch = DecodeBatch(model.config, 8, capacity=20, max_new=12, like=model.lm_head.weight)
    batch.kv.copy_(torch.rand_like(batch.kv))
    batch.number = [None, 0, None, None, None, 1, 2, None]
    kept, layer = batch.kv[:, :, [1, 5, 6]], batch.kv[0].numel()
    with Operations() as operations:
        batch.compact()
    assert torch.equal(batch.kv, kept)
    sizes = [math.prod(shape) for name, shapes in operations.seen for shape in shapes]
    assert max(sizes) <= layer


@pytest.mark.parametrize("sizes", [[3, 1, 8, 2], [5], [2, 2]])
def test_prefill_gives_each_prompts_own_state_and_gradient_whatever_it_is_padded_to(sizes):
    model = tiny.model(3)
    prompts = [PROMPTS[2][:size] for size in sizes]
    goal = torch.randn(
        len(sizes), 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    read = prefill(model, prompts)
    (read.hidden * goal).sum().backward()
    gradient = [parameter.grad.clone() for parameter in model.layers.parameters()]
    model.zero_grad()
    for i, prompt in enumerate(prompts):
        alone = model(torch.tensor([prompt]))[0, -1]
        assert torch.allclose(read.hidden[i], alone, rtol=0, atol=1e-12)
        (alone * goal[i]).sum().backward()
    for own, parameter in zip(gradient, model.layers.parameters(), strict=True):
        assert torch.allclose(own, parameter.grad, rtol=0, atol=1e-11)
    assert read.past.length == max(sizes)


def test_bf16_logits_are_never_rounded_to_bf16():
    hidden, weight = (
        torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (5, 300)
    )
    exact = hidden.double() @ weight.double().T
    logits = sample_module.make_logits(weight)(hidden)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-5 < (exact.bfloat16() - exact).abs().max()


def test_a_large_vocabulary_is_drawn_from_like_a_small_one():
    """Over several chunks, the last one ragged: as by one fp64 cumulative sum over the row."""
    generator, vocab = torch.Generator().manual_seed(0), 3 * sample_module.CHUNK + 200
    logits = 3 * torch.randn(64, vocab, generator=generator, dtype=torch.float64)
    uniforms = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    token, _ = draw(logits, 0.8, uniforms)
    cdf = (logits / 0.8).softmax(1).cumsum(1)
    assert torch.equal(token, torch.searchsorted(cdf, uniforms[:, None], right=True)[:, 0])
    assert len(set((token // sample_module.CHUNK).tolist())) == 4


def test_the_first_traces_do_not_depend_on_how_many_there_are():
    model = tiny.model(3)
    [few], [many] = (
        sample_traces(model, PROMPTS[:1], k, 12, seed=[5], stop_ids=[0]) for k in (2, 7)
    )
    assert_same_groups([few], [many[:2]])


def test_the_same_seed_gives_the_same_traces_and_another_seed_others():
    model = tiny.model(3)
    first, again, other = (sample_traces(model, PROMPTS, 3, 12, seed=seed) for seed in (5, 5, 6))
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))


def test_the_k_traces_of_a_prompt_differ_and_so_do_those_of_equal_prompts():
    groups = sample_traces(tiny.model(3), [[1, 2]] * 3, 4, 12, seed=5)
    assert len({tuple(trace.ids) for group in groups for trace in group}) == 12


def test_one_seed_for_all_gives_every_prompt_its_own_stream():
    model = tiny.model(3)
    seeds = [stream_seed(5, i) for i in range(4)]
    expected = sample_traces(model, PROMPTS, 2, 8, seed=seeds)
    assert sample_traces(model, PROMPTS, 2, 8, seed=5) == expected


def test_sampling_leaves_torchs_own_random_state_alone():
    model = tiny.model(3)
    before = torch.get_rng_state()
    sample_traces(model, PROMPTS, 2, 4)
    assert torch.equal(torch.get_rng_state(), before)


# ---- where a trace ends
def line(*tokens: int, vocab: int = 8) -> Transformer:
    """A model that says tokens[1] after tokens[0], tokens[2] after tokens[1] and so on."""
    logits = torch.full((vocab, vocab), -INF, dtype=torch.float64)
    logits[:, tokens[-1]] = 0.0
    for now, then in pairwise(tokens):
        logits[now] = -INF
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
    prompts = [[3, 7, 1], [4, 3, 4, 1]]
    groups = sample_traces(line(1, 2, 3, 4), prompts, 1, 6, stop_ids=[3], cut_ids=[4, 7])
    assert [group[0].ids for group in groups] == [[2, 3], [2, 3]]


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_length_limit_cuts_unless_the_last_token_stops(length):
    ((trace,),) = sample_traces(line(1, 2, 3, 4), [[1]], 1, length, stop_ids=[4])
    assert (trace.ids, trace.finished) == ([2, 3, 4][:length], length == 3)


def test_without_end_tokens_every_trace_is_as_long_as_allowed():
    traces = [trace for group in sample_traces(tiny.model(3), PROMPTS, 2, 9) for trace in group]
    assert len(traces) == 8
    for trace in traces:
        assert len(trace.ids) == len(trace.logp) == 9 and not trace.finished


def test_decoding_ends_when_the_last_row_has_ended():
    model, calls = line(1, 2, 3, 4, 5), []
    model.register_forward_hook(lambda *_: calls.append(1))
    groups = sample_traces(model, [[3], [1], [2]], 1, 50, stop_ids=[4])
    assert [len(group[0].ids) for group in groups] == [1, 3, 2]
    assert len(calls) == 3  # the prompts, and the longest trace's tokens but the last


def test_end_tokens_beyond_the_models_vocabulary_change_nothing():
    """A tokenizer may know special tokens that were added after the model was trained."""
    model = line(1, 2, 3, 4)
    expected = sample_traces(model, [[1]], 1, 6, stop_ids=[3], cut_ids=[4])
    assert sample_traces(model, [[1]], 1, 6, stop_ids=[3, 8], cut_ids=[4, 32000]) == expected


def test_sampled_frequencies_follow_the_model():
    """How often each pair of first tokens occurs, on a chain whose distributions are known."""
    table = [[0.5, 1.5, -1.0], [2.0, 0.0, 0.3], [-0.5, -0.5, 1.0]]
    table = torch.tensor(table, dtype=torch.float64)
    group = sample_traces(tiny.chain(table), [[0]], 4000, 2, seed=[1])[0]
    now, then = torch.tensor([trace.ids for trace in group]).T
    p = table.softmax(1)
    counts = torch.bincount(3 * now + then, minlength=9).double()
    expected = 4000 * (p[0][:, None] * p).flatten()
    chi_squared = ((counts - expected).square() / expected).sum()
    assert chi_squared < 26.1  # p = 0.001 with 8 degrees of freedom; the seed is fixed
    for trace in group[:50]:
        a, b = trace.ids
        exact = [float(p[0, a].log()), float(p[a, b].log())]
        assert trace.logp == pytest.approx(exact, rel=0, abs=1e-12)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 0},
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"rows": -1},
        {"prompts": []},
        {"prompts": [[1], []]},
    ],
    ids=lambda c: str(c),
)
def test_what_cannot_be_sampled_is_refused(changes):
    with pytest.raises(InputError, match="sample_traces needs"):
        sample_traces(tiny.model(), **{"prompts": [[1]], "k": 1, "max_new_tokens": 1, **changes})


# ---- the command
def test_the_marker_is_forced_only_where_the_model_did_not_emit_it():
    assert trace_ids(Trace([4, 3], [0.0, 0.0], finished=True), marker=3) == [4, 3]
    assert trace_ids(Trace([4, 5], [0.0, 0.0], finished=False), marker=3) == [4, 5, 3]
    assert trace_ids(Trace([], [], finished=False), marker=3) == [3]


def letters(path: Path) -> Tokenizer:
    """Ids: <unk> 0, <eos> 1, <eot> 2, a 3, b 4, ... f 8, m 9 (the marker)."""
    special = ("<unk>", "<eos>", "<eot>")
    return Tokenizer(tiny.tokenizer_dir(path, [*"abcdefm"], special), "m", "{question}")


@pytest.mark.parametrize(
    "question, ends", [("f", "by the marker"), ("c", "at the limit"), ("c a b", "by a cut token")]
)
def test_the_command_shows_trace_and_answer(question, ends, tmp_path, monkeypatch, capsys):
    model, tokenizer = tiny.model(9), letters(tmp_path)
    save_model(model.float(), tmp_path)
    tokenizer.save(tmp_path)
    command = f"sample.py --device cpu --model {tmp_path} --max-trace 6 --max-answer 20".split()
    monkeypatch.setattr("sys.argv", [*command, "--question", f" {question} "])
    main()
    trace_shown, answer_shown = capsys.readouterr().out.splitlines()
    prompt = tokenizer.encode_prompt(question)
    trace = slow_trace(model, prompt, torch.zeros(6), 0.0, [9], tokenizer.cut_ids)
    kinds = {"by the marker": (True, False), "at the limit": (False, True)}
    assert (trace.finished, len(trace.ids) == 6) == kinds.get(ends, (False, False))
    context = [*prompt, *trace_ids(trace, 9)]
    answer = slow_trace(model, context, torch.zeros(20), 0.0, tokenizer.eos_ids)
    forced = "" if trace.finished else " [cut: the marker was forced]"
    assert trace_shown == f"trace   {tokenizer.decode(trace.ids, special=True)}{forced}"
    assert answer_shown == f"answer  {tokenizer.decode(answer.ids)}"


@pytest.mark.parametrize(
    "flags, says",
    [
        ([], "--question"),
        (["--question", " "], "--question is empty"),
        (["--question", "a", "--marker", "<new>"], "<new>"),
        (["--question", "a", "--max-trace", "many"], "--max-trace"),
        (["--question", "a", "--max-trace", "0"], "max_new_tokens"),
        (["--question", "a", "--seed", "-1"], "--seed"),
        (["--question", "a", "--colour"], "--colour"),
    ],
)
def test_the_command_refuses_what_it_cannot_use(flags, says, tmp_path, monkeypatch):
    save_model(tiny.model(9, torch.float32), tmp_path)
    letters(tmp_path).save(tmp_path)
    monkeypatch.setattr("sys.argv", ["sample.py", "--device=cpu", f"--model={tmp_path}", *flags])
    with pytest.raises(InputError, match=says) as refusal:
        main()
    assert "\n" not in str(refusal.value)


# ---- the decoding batch as a KV cache
GOLDEN = Path(__file__).parent / "golden"
MODELS = sorted(folder.parent.name for folder in GOLDEN.glob("*/expected.safetensors"))
every_model = pytest.mark.parametrize("name", MODELS)
both_dtypes = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"]
)


def golden_tokens(name: str) -> Tensor:
    return load_file(GOLDEN / name / "expected.safetensors")["tokens"]  # [2, 24]


def assert_close(a: Tensor, b: Tensor, tolerance: float) -> None:
    """Relative to the largest element."""
    assert a.shape == b.shape and a.dtype == b.dtype
    assert (a - b).abs().max() <= tolerance * b.abs().max()


@every_model
@both_dtypes
@torch.no_grad()
def test_the_decoding_batch_token_by_token_equals_the_text_read_at_once(name, dtype, tolerance):
    model, tokens = load_model(GOLDEN / name, dtype), golden_tokens(name)
    whole = model(tokens)
    batch = DecodeBatch(model.config, 2, capacity=30, max_new=24, like=whole)
    batch.live.fill_(True)
    batch.kv.fill_(float("nan"))  # where no token has been written, nothing must be read
    steps = []
    for t in range(24):
        batch.feed(model, tokens[:, t])
        steps.append(batch.hidden.clone())
    assert_close(torch.stack(steps, dim=1), whole, tolerance)


@every_model
@both_dtypes
@torch.no_grad()
def test_rows_of_different_length_decode_as_if_each_were_alone(name, dtype, tolerance):
    model, tokens = load_model(GOLDEN / name, dtype), golden_tokens(name)
    whole = model(tokens)  # [2, 24, H]
    prompts = [tokens[0, :3].tolist(), tokens[1, :14].tolist()]
    batch = DecodeBatch(model.config, 4, capacity=24, max_new=10, like=whole)
    batch.kv.fill_(7.0)  # left over from earlier traces
    batch.admit(trace_starts(model, prompts, 2, seeds=[0, 0], max_new_tokens=10))
    steps = [batch.hidden.clone()]
    for t in range(10):
        batch.feed(model, torch.stack([tokens[0, 3 + t], tokens[1, 14 + t]]).repeat_interleave(2))
        steps.append(batch.hidden.clone())
    expected = torch.stack([whole[0, 2:13], whole[1, 13:]])  # [2, 11, H]
    assert_close(torch.stack(steps, dim=1), expected.repeat_interleave(2, dim=0), tolerance)


# ---- decode steps as a GPU runs them: the fixture `flash` of conftest.py
def flash_batch(model: Transformer) -> DecodeBatch:
    """Rows of different length in the middle of their traces."""
    batch = DecodeBatch(model.config, 6, capacity=20, max_new=12, like=model.lm_head.weight)
    batch.kv.fill_(float("nan"))  # whatever is read and was not written, shows
    batch.admit(trace_starts(model, PROMPTS[:3], 2, seeds=[1, 2, 3], max_new_tokens=12))
    return batch


def decode_step(model: Transformer, batch: DecodeBatch) -> None:
    ends_trace = torch.zeros(11, dtype=torch.bool)
    batch.feed(model, batch.draw(sample_module.make_logits(model.lm_head.weight), 1.0, ends_trace))


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("rows", [0, 5])
def test_traces_in_flash_attention_equal_those_under_the_mask(rows, temperature, request):
    model, ends = tiny.model(3, head_dim=8), {"stop_ids": [0], "cut_ids": [9]}
    given = (model, PROMPTS, 3, 14, temperature)
    expected = sample_traces(*given, seed=SEEDS, rows=rows, **ends)
    request.getfixturevalue("flash")
    assert_same_groups(sample_traces(*given, seed=SEEDS, rows=rows, **ends), expected)


@torch.no_grad()
def test_in_flash_attention_a_row_reads_its_own_keys_only(flash):
    model = tiny.model(3, head_dim=8)
    batch = flash_batch(model)
    for _ in range(3):
        decode_step(model, batch)
    assert batch.flash and batch.hidden.isfinite().all()
    for row in range(6):
        ids = [*PROMPTS[row // 2], *batch.ids[row, :3].tolist()]
        logits = batch.hidden[row] @ model.lm_head.weight.T
        assert_close(logits, next_logits(model, ids), 1e-12)


@torch.no_grad()
def test_every_decode_step_in_flash_attention_issues_the_same_operations_and_asks_for_no_result(
    flash, monkeypatch
):
    """As a CUDA graph needs it, and as a GPU that must not wait for Python."""
    model = tiny.model(3, head_dim=8)
    batch = flash_batch(model)
    steps = []
    for _ in range(3):
        with Operations() as operations:
            decode_step(model, batch)
        steps.append(operations.seen)
    assert steps[0] == steps[1] == steps[2]
    host = {"_local_scalar_dense", "nonzero", "equal", "lift_fresh"}  # the last: torch.tensor(...)
    assert not host & {name for name, _ in steps[0]}


@torch.no_grad()
def test_a_layer_of_a_decode_step_launches_24_kernels(flash, monkeypatch):
    # CUDA normalises in one kernel, a CPU in six.
    monkeypatch.setattr(F, "rms_norm", lambda x, shape, weight, eps: x * weight)
    counts = []
    for layers in (1, 2):
        model = tiny.model(3, head_dim=8, num_hidden_layers=layers)
        batch = flash_batch(model)
        with Operations() as operations:
            decode_step(model, batch)
        counts.append(Counter(name for name, _ in operations.seen))
    layer = counts[1] - counts[0]
    assert layer.total() == 24, layer


class Graph:
    """torch.cuda.CUDAGraph on a CPU: operations, replayed with the tensors that they had."""

    recorded = replayed = 0

    def __init__(self) -> None:
        self.operations = []

    def replay(self) -> None:
        Graph.replayed += 1
        for function, args, kwargs, results in self.operations:
            again = pytree.tree_leaves(function(*args, **kwargs))
            for result, value in zip(pytree.tree_leaves(results), again, strict=True):
                result.copy_(value)


class Record(TorchDispatchMode):
    """torch.cuda.graph on a CPU. It leaves nothing computed: no tensor keeps what was written."""

    def __init__(self, graph: Graph, capture_error_mode: str) -> None:
        super().__init__()
        Graph.recorded += 1
        self.graph = graph
        self.before = []  # tensors that were written, their values then

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = zip(args, function._schema.arguments, strict=False)
        written = [x for x, argument in inputs if argument.is_write]
        self.before += [(x, x.clone()) for x in written]
        results = function(*args, **kwargs)
        if not written and not function.is_view:
            new = [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]
            self.before += [(x, torch.full_like(x, -1)) for x in new]
        self.graph.operations.append((function, args, kwargs, results))
        return results

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for tensor, value in reversed(self.before):
            tensor.copy_(value)


@pytest.mark.parametrize("after", [1, 2, 5])
@pytest.mark.parametrize("rows", [0, 5])
def test_traces_from_a_cuda_graph_are_the_same(flash, rows, after, monkeypatch):
    """A step uses the same memory every time, and nothing that changes in Python."""
    model, ends = tiny.model(3, head_dim=8), {"stop_ids": [0], "cut_ids": [9]}
    given = (model, PROMPTS, 3, 14)
    expected = sample_traces(*given, seed=SEEDS, rows=rows, **ends)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", Record)
    monkeypatch.setattr(sample_module, "CUDA_GRAPH", True)
    monkeypatch.setattr(sample_module, "RECORD_AFTER", after)
    Graph.recorded = Graph.replayed = 0
    assert_same_groups(sample_traces(*given, seed=SEEDS, rows=rows, **ends), expected)
    assert Graph.replayed > Graph.recorded > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_traces_from_a_cuda_graph_are_the_same(monkeypatch):
    model = tiny.model(3, torch.bfloat16, head_dim=64).cuda()
    expected = sample_traces(model, PROMPTS, 8, 80, seed=SEEDS, stop_ids=[0])
    monkeypatch.setattr(sample_module, "CUDA_GRAPH", True)
    assert sample_traces(model, PROMPTS, 8, 80, seed=SEEDS, stop_ids=[0]) == expected


@torch.no_grad()
def test_torchs_own_flash_attention_has_the_arguments_of_a_decode_step(monkeypatch):
    """On tensors without memory: names, shapes and types are checked, nothing is computed."""
    monkeypatch.setattr("model.can_use_flash_attention", lambda parameters: True)
    model = tiny.model(head_dim=8, dtype=torch.bfloat16).to("meta")
    batch = DecodeBatch(model.config, 6, capacity=20, max_new=12, like=model.lm_head.weight)
    with Operations() as operations:
        batch.feed(model, torch.empty(6, dtype=torch.long, device="meta"))
    calls = [shapes for name, shapes in operations.seen if name == "_flash_attention_forward"]
    query, keys = (6, 4, 8), (6 * 20, 2, 8)
    assert calls == [[query, keys, keys, (7,), (7,), (6,)]] * 2
    assert "clone" not in {name for name, _ in operations.seen}  # the KV cache is read in place


def test_traces_do_not_depend_on_how_attention_lays_out_its_output(monkeypatch):
    """CUDA's memory-efficient kernel returns [B, L, heads, D] in memory."""
    attention, model = F.scaled_dot_product_attention, tiny.model(3)
    expected = sample_traces(model, PROMPTS, 2, 9, seed=SEEDS)

    def transposed(*inputs: Tensor, **options: object) -> Tensor:
        return attention(*inputs, **options).transpose(1, 2).contiguous().transpose(1, 2)

    monkeypatch.setattr(F, "scaled_dot_product_attention", transposed)
    assert sample_traces(model, PROMPTS, 2, 9, seed=SEEDS) == expected
