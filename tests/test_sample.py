"""sample.py: what is drawn, with which probability, where it ends, what is recorded."""

from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from test_model import GOLDEN
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import sample as sample_module
from data import Trace, stream_seed
from model import Transformer
from sample import DecodeBatch, draw, main, random_numbers, sample_traces, trace_starts
from support.errors import InputError
from support.tokenizer import Tokenizer
from support.weights import load_model, save_model

MISTRAL = GOLDEN / "mistral_v01"  # its window of 8 is shorter than the traces
INF = float("inf")
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 1, 2], [3, 3]]
SEEDS = [11, 22, 33, 44]
ENDS = {"stop_ids": [0], "cut_ids": [9]}


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
            return Trace(ids, logp, False, cut_id=token, cut_logp=float(now[token]))
        ids.append(token)
        logp.append(float(now[token]))
        if token in stop_ids:
            return Trace(ids, logp, finished=True)
    return Trace(ids, logp, finished=False)


def assert_same(a: Trace, b: Trace) -> None:
    assert (a.ids, a.finished, a.cut_id) == (b.ids, b.finished, b.cut_id)
    assert [*a.logp, a.cut_logp] == pytest.approx([*b.logp, b.cut_logp], rel=0, abs=1e-11)


def assert_same_groups(a: list[list[Trace]], b: list[list[Trace]]) -> None:
    for group, expected in zip(a, b, strict=True):
        for trace, other in zip(group, expected, strict=True):
            assert_same(trace, other)


# ---- one token
def test_every_token_owns_one_interval_of_its_length_however_small():
    logits = torch.tensor([20.0, -1.0, 19.0, 0.5, -INF, -2.0])
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


def test_a_token_of_probability_zero_is_never_drawn():
    """At both ends, and at the edges of its neighbours' intervals."""
    logits = torch.tensor([-INF, 0.0, -INF, 0.0, -INF, -INF, 0.0, 0.0, -INF])
    edges = [k / 4 + e for k in (1, 2, 3) for e in (-(2**-54), 0.0, 2**-54)]
    uniforms = torch.tensor([0.0, *edges, 1 - 2**-53], dtype=torch.float64)
    token, _ = draw(logits.expand(11, -1), 1.0, uniforms)
    assert set(token.tolist()) == {1, 3, 6, 7}


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


@pytest.mark.parametrize("rows", [1, 5, 11, 100])
@pytest.mark.parametrize(("prompt_tokens", "finish_every"), [(1, 1), (20, 7), (10**6, 16)])
def test_traces_do_not_depend_on_how_the_work_is_cut(
    prompt_tokens, finish_every, rows, monkeypatch
):
    """Rows of the batch; prompts that share a prefill; steps until ended traces are looked for."""
    model = tiny.model(3)
    expected = sample_traces(model, PROMPTS, 3, 12, seed=SEEDS, **ENDS)
    monkeypatch.setattr(sample_module, "PROMPT_TOKENS", prompt_tokens)
    monkeypatch.setitem(sample_module.FINISH_EVERY, "cpu", finish_every)
    groups = sample_traces(model, PROMPTS, 3, 12, seed=SEEDS, rows=rows, **ENDS)
    assert_same_groups(groups, expected)


def test_seeds_decide():
    model = tiny.model(3)
    state = torch.get_rng_state()
    first, again, other = (sample_traces(model, PROMPTS, 3, 12, seed=seed) for seed in (5, 5, 6))
    assert first == again and all(a != b for a, b in zip(first, other, strict=True))
    assert random_numbers(7, 4, 5).dtype == torch.float64
    # One seed for all gives every prompt its own stream.
    assert first == sample_traces(model, PROMPTS, 3, 12, seed=[stream_seed(5, i) for i in range(4)])
    equal_prompts = sample_traces(model, [[1, 2]] * 3, 4, 12, seed=5)
    assert len({tuple(trace.ids) for group in equal_prompts for trace in group}) == 12
    # The first traces do not depend on how many there are.
    more = sample_traces(model, PROMPTS, 7, 12, seed=5)
    assert_same_groups(first, [group[:3] for group in more])
    assert torch.equal(torch.get_rng_state(), state)  # torch's own is left alone


def test_bf16_logits_are_never_rounded_to_bf16():
    hidden, weight = (
        torch.randn(n, 64, generator=torch.Generator().manual_seed(n)).bfloat16() for n in (5, 300)
    )
    exact = hidden.double() @ weight.double().T
    logits = sample_module.head_logits(hidden, weight)
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-5 < (exact.bfloat16() - exact).abs().max()


@pytest.mark.parametrize(
    "changes", [{"k": 0}, {"temperature": -0.1}, {"prompts": []}, {"prompts": [[1], []]}], ids=str
)
def test_what_cannot_be_sampled_is_refused(changes):
    with pytest.raises(InputError, match="sample_traces needs"):
        sample_traces(tiny.model(), **{"prompts": [[1]], "k": 1, "max_new_tokens": 1, **changes})


# ---- where a trace ends
def line(*tokens: int, vocab: int = 8) -> Transformer:
    """A model that says tokens[1] after tokens[0], tokens[2] after tokens[1] and so on."""
    logits = torch.full((vocab, vocab), -INF, dtype=torch.float64)
    logits[:, tokens[-1]] = 0.0
    for now, then in pairwise(tokens):
        logits[now] = -INF
        logits[now, then] = 0.0
    return tiny.chain(logits.clamp(min=-1e4))


@pytest.mark.parametrize(
    ("prompt", "limit", "stop", "cut", "ids", "finished", "cut_id"),
    [
        ([1], 6, [3], [], [2, 3], True, None),  # a stop token is kept
        ([1], 6, [4], [3], [2], False, 3),  # a cut token is dropped
        ([1], 6, [4], [2], [], False, 2),  # at the first token
        ([1], 2, [4], [], [2, 3], False, None),  # the limit
        ([1], 3, [4], [], [2, 3, 4], True, None),  # the last token stops
        ([1], 9, [6, 4, 2], [], [2], True, None),  # each of several
        ([3], 9, [6, 4, 2], [], [4], True, None),
        ([3], 9, [], [6, 4, 2], [], False, 4),
        ([4, 3, 7, 1], 6, [3], [4, 7], [2, 3], True, None),  # inside the prompt it ends nothing
        ([1], 6, [3, 8], [4, 32000], [2, 3], True, None),  # tokens that the model does not know
    ],
)
def test_a_trace_ends_at(prompt, limit, stop, cut, ids, finished, cut_id):
    model = line(1, 2, 3, 4, 5, 6)
    [[trace]] = sample_traces(model, [prompt], 1, limit, stop_ids=stop, cut_ids=cut)
    assert (trace.ids, trace.finished, trace.cut_id) == (ids, finished, cut_id)
    assert len(trace.logp) == len(ids)


# ---- how many forward passes that takes
def test_every_prompt_is_read_once_and_a_row_whose_trace_has_ended_begins_the_next_at_once():
    model, shapes = line(1, 2, 3, 4, 5), []
    model.register_forward_hook(lambda module, args, out: shapes.append(tuple(args[0].shape)))
    groups = sample_traces(model, [[4], [1], [3], [2]], 2, 9, stop_ids=[5], rows=2)
    assert [len(group[0].ids) for group in groups] == [1, 4, 2, 3]
    # All prompts in one forward pass, then two rows at a time, and as many steps as one row's
    # traces have tokens; the last token is not fed.
    assert shapes == [(4, 1)] + [(2, 1)] * (1 + 4 + 2 + 3 - 1)


def test_the_batch_shrinks_when_half_of_its_rows_are_idle():
    model, rows = line(1, 2, 3, 4, 5, 6), []
    model.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    groups = sample_traces(model, [[1], [4], [4], [5]], 1, 9, stop_ids=[6])
    assert [len(group[0].ids) for group in groups] == [5, 2, 2, 1]
    assert rows == [4, 4, 4, 1, 1]  # prompts; 4 rows; 3 live of 4; one


@pytest.mark.parametrize(("fitting", "rows"), [(0.5, 1), (5.5, 5), (50, 12)])
def test_rows_default_to_what_half_of_the_free_memory_holds(fitting, rows, monkeypatch):
    model, sizes = tiny.model(3), []
    model.register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
    capacity = max(map(len, PROMPTS)) + 9
    row_bytes = capacity * 2 * 2 * 2 * 4 * 8  # layers, keys and values, heads, head_dim, fp64
    free = int(fitting * row_bytes * 2)
    monkeypatch.setattr(sample_module, "free_memory", lambda device: free)
    sample_traces(model, PROMPTS, 3, 9)
    assert sizes[1] == rows


# ---- the command
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
    context = [*prompt, *trace.ids, *([] if trace.finished else [9])]
    answer = slow_trace(model, context, torch.zeros(20), 0.0, tokenizer.eos_ids)
    forced = "" if trace.finished else " [cut: the marker was forced]"
    assert trace_shown == f"trace   {tokenizer.decode(trace.ids, special=True)}{forced}"
    assert answer_shown == f"answer  {tokenizer.decode(answer.ids)}"


# ---- decode steps as a GPU runs them: the fixture `flash` of conftest.py
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


@pytest.mark.parametrize("rows", [0, 5])
def test_traces_in_flash_attention_equal_those_under_the_mask(rows, request):
    given = (tiny.model(3, head_dim=8), PROMPTS, 3, 14)
    expected = sample_traces(*given, seed=SEEDS, rows=rows, **ENDS)
    request.getfixturevalue("flash")
    assert_same_groups(sample_traces(*given, seed=SEEDS, rows=rows, **ENDS), expected)


@torch.no_grad()
def test_every_decode_step_in_flash_attention_issues_the_same_operations_and_asks_for_no_result(
    flash,
):
    """As a CUDA graph needs it, and as a GPU that must not wait for Python."""
    model = tiny.model(3, head_dim=8)
    batch = DecodeBatch(model.config, 6, capacity=20, max_new=12, like=model.lm_head.weight)
    batch.admit(trace_starts(model, PROMPTS[:3], 2, seeds=[1, 2, 3], max_new_tokens=12))
    ends_trace = torch.zeros(11, dtype=torch.bool)

    def addresses() -> list[int]:
        return [x.data_ptr() for x in vars(batch).values() if isinstance(x, Tensor)]

    before, steps = addresses(), []
    for _ in range(3):
        with Operations() as operations:
            batch.feed(model, batch.draw(model.lm_head.weight, 1.0, ends_trace))
        steps.append(operations.seen)
    assert steps[0] == steps[1] == steps[2] and addresses() == before
    host = {"_local_scalar_dense", "nonzero", "equal", "lift_fresh"}  # the last: torch.tensor(...)
    assert not host & {name for name, _ in steps[0]}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_traces_from_a_cuda_graph_are_the_same(monkeypatch):
    model = tiny.model(3, torch.bfloat16, head_dim=64).cuda()
    traces = sample_traces(model, PROMPTS, 8, 80, seed=SEEDS, stop_ids=[0])
    monkeypatch.setattr(DecodeBatch, "record", lambda *_: None)
    assert sample_traces(model, PROMPTS, 8, 80, seed=SEEDS, stop_ids=[0]) == traces


@torch.no_grad()
def test_torchs_own_flash_attention_has_the_arguments_of_a_decode_step(monkeypatch):
    """On tensors without memory: names, shapes and types are checked, nothing is computed."""
    monkeypatch.setattr("model.can_use_flash_attention", lambda parameters: True)
    model = tiny.model(head_dim=8, dtype=torch.bfloat16).to("meta")
    batch = DecodeBatch(model.config, 6, capacity=20, max_new=12, like=model.lm_head.weight)
    with Operations() as operations:
        batch.forward(model)
    calls = [shapes for name, shapes in operations.seen if name == "_flash_attention_forward"]
    query, keys = (6, 4, 8), (6 * 20, 2, 8)
    assert calls == [[query, keys, keys, (7,), (7,), (6,)]] * 2
    assert "clone" not in {name for name, _ in operations.seen}  # the KV cache is read in place
