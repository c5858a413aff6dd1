"""The algorithm: what train_question adds to .grad is, on average, the gradient of J; it does not
depend on how the work is cut; and whole runs on the embedded task."""

import itertools
import json
import math
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from tiny import assert_close, lines_of, plain_logp, predictions, without_clock
from torch import Tensor

import train as train_module
from aggregate import (
    AGGREGATORS,
    advantages,
    aggregate,
    declares,
    joint_bound,
    moving_average,
    sees_text,
)
from data import Example, Pairs, Trace
from model import Transformer
from reward import score
from sample import sample_groups, sample_traces
from support.args import HELD_OUT, Args, hops_defaults, parse_args
from support.errors import InputError, read_json
from support.metrics import question_figures, step_figures
from support.tokenizer import Tokenizer
from support.weights import load_model, load_with_marker, save_model
from train import LENGTH_SCALE, make_optimizer, train, train_question, update

ROOT = Path(__file__).parents[1]
WORDS, MARKER, EOS = (0, 1, 2), 3, 4
PROMPT, ANSWER = [0, EOS, 2], [1, 0, EOS]
EXAMPLE = Example(index=0, prompt=PROMPT, answer=ANSWER, question="", gold="")
TOKENIZER = SimpleNamespace(marker_id=MARKER)  # all that train_question needs of one
QWENS = [{"qkv_bias": True}, {"qk_norm": True, "head_dim": 6}]


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float64, **changes) -> Transformer:
    return tiny.model(seed, dtype, **{"vocab_size": 5} | changes)


def gradient(model: Transformer) -> Tensor:
    """All gradients as one vector, and forgets them."""
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return flat


# ---- the reference: full rows and log_softmax, without reward.py
def null_think(model: Transformer) -> Tensor:
    return plain_logp(model, [*PROMPT, MARKER], ANSWER).detach()


def actions(trace: Trace) -> list[int]:
    """What was sampled."""
    return trace.ids if trace.cut_id is None else [*trace.ids, trace.cut_id]


def context(trace: Trace) -> list[int]:
    """What stands before the answer."""
    return [*PROMPT, *trace.ids] if trace.finished else [*PROMPT, *trace.ids, MARKER]


# ---- the estimator, summed over all that can be sampled
def every_trace(limit: int) -> list[Trace]:
    """All that sampling can return: ended by the marker, by eos (a cut token), or at the limit."""
    traces = []
    for length in range(limit):
        for words in itertools.product(WORDS, repeat=length):
            traces.append(Trace([*words, MARKER], [], finished=True))
            traces.append(Trace(list(words), [], finished=False, cut_id=EOS))
    for words in itertools.product(WORDS, repeat=limit):
        traces.append(Trace(list(words), [], finished=False))
    return traces


def trace_logps(model: Transformer, traces: list[Trace], temperature: float = 1.0) -> Tensor:
    """log P(z) of every trace, [Z]."""
    rows = [plain_logp(model, PROMPT, actions(trace), temperature) for trace in traces]
    return torch.stack([row.sum() for row in rows])


def gradient_of(J, model: Transformer, traces: list[Trace], k: int = 1, temperature=1.0) -> Tensor:
    """Autograd through sum P(z_1) ... P(z_k) J(c of z_1, ..., z_k) over all groups of k traces.

    J: answer log-probs [k, T] -> scalar.
    """
    trace_logp = trace_logps(model, traces, temperature)
    assert trace_logp.exp().sum().item() == pytest.approx(1, abs=1e-12)  # these are all
    answer_logp = torch.stack([plain_logp(model, context(trace), ANSWER) for trace in traces])
    total = 0.0
    for group in itertools.product(range(len(traces)), repeat=k):
        chosen = list(group)
        total = total + trace_logp[chosen].sum().exp() * J(answer_logp[chosen])
    total.backward()
    return gradient(model)


def expected_gradient(model: Transformer, traces: list[Trace], args: Args) -> Tensor:
    """What train_question adds to .grad for a group, on average over all groups of K traces."""
    probability = trace_logps(model, traces, args.temperature).exp().detach()
    total = 0.0
    for group in itertools.product(range(len(traces)), repeat=args.traces):
        train_question(model, TOKENIZER, EXAMPLE, [traces[i] for i in group], args)
        total = total + probability[list(group)].prod() * gradient(model)
    return -LENGTH_SCALE * total  # the loss is -J / 512


def estimator_args(name: str, **changes) -> Args:
    """marker_weight 0: the cross-entropy on a forced marker is not in J."""
    exact = dict(center="none", scale="none", answer_weight="exact", marker_weight=0.0)
    return Args(**dict(aggregator=name, questions=1, traces=1) | exact | changes)


def is_single(name: str) -> bool:
    """Whether J is a sum over single traces."""
    return not (declares(name, "group") or declares(name, "random") or sees_text(name))


CASES = [(name, {}, {}) for name in AGGREGATORS if is_single(name)]
CASES += [("weighted_sum_log_prob", {}, qwen) for qwen in QWENS]
CASES += [("arithmetic_mean", {"clip_null": True}, {}), ("prob", {"temperature": 0.7}, {})]


@pytest.mark.parametrize("name, changes, family", CASES, ids=str)
def test_the_estimator_summed_over_all_traces_is_the_gradient_of_J(name, changes, family):
    model, traces = tiny_model(2, **family), every_trace(2)  # clipping: some exceed the null think
    args, null_logp = estimator_args(name, **changes), null_think(model)

    def J(logp: Tensor) -> Tensor:
        (value,) = AGGREGATORS[name](logp, null_logp)
        if args.clip_null:
            value = (value - AGGREGATORS[name](null_logp[None], null_logp)[0]).relu()
        return value

    exact = gradient_of(J, model, traces, temperature=args.temperature)
    assert_close(expected_gradient(model, traces, args), exact)


def test_jlb_multi_summed_over_all_groups_is_the_gradient_of_its_bound():
    """Centring is left on: a reward that is relative to its group is not centred again."""
    model, traces, k = tiny_model(), every_trace(1), 3
    exact = gradient_of(joint_bound, model, traces, k)
    args = estimator_args("jlb_multi", traces=k, center="mean")
    # The loss is a mean over traces; the gradient of the bound is a sum over them.
    assert_close(k * expected_gradient(model, traces, args), exact)


def test_exact_match_over_all_traces_and_outcomes_is_the_gradient_of_its_probability(monkeypatch):
    """J = sum_z P(z) prod_i c_i, the probability that a sampled answer is the gold answer."""
    model, traces, args = tiny_model(), every_trace(2), estimator_args("exact_match")
    exact = gradient_of(lambda logp: logp.sum().exp(), model, traces)
    total = torch.zeros_like(exact)
    for trace in traces:
        match = plain_logp(model, context(trace), ANSWER).sum().exp().detach()
        for uniform, outcome in ((0.0, match), (1.0, 1 - match)):  # it matches, it does not
            monkeypatch.setattr(torch, "rand", lambda shape, u=uniform: torch.full(shape, u))
            train_question(model, TOKENIZER, EXAMPLE, [trace], args)
            total += outcome * trace_logps(model, [trace]).exp().detach() * gradient(model)
    assert_close(-LENGTH_SCALE * total, exact)


@pytest.mark.parametrize("k, center, share", [(1, "none", 1.0), (2, "mean", 0.5)])
def test_without_answer_weight_it_is_the_gradient_of_J_through_the_traces_alone(k, center, share):
    """The mean of two rewards holds half of the trace's own: it leaves (K - 1) / K."""
    model, traces = tiny_model(), every_trace(3 - k)
    args = estimator_args("arithmetic_mean", traces=k, center=center, answer_weight="none")
    exact = gradient_of(lambda logp: logp.detach().exp().mean(), model, traces)
    assert_close(expected_gradient(model, traces, args), share * exact)


# ---- one group
def sampled_group(model: Transformer, k: int = 8, seed: int = 0) -> list[Trace]:
    return sample_traces(model, [PROMPT], k, 3, stop_ids=[MARKER], seed=seed, cut_ids=[EOS])[0]


def question_gradient(model: Transformer, traces: list[Trace], args: Args, **changes) -> Tensor:
    train_question(model, TOKENIZER, EXAMPLE, traces, replace(args, **changes))
    return gradient(model)


def formula(model: Transformer, traces: list[Trace], args: Args) -> Tensor:
    """The loss in train.py's docstring for the default reward: trace, answer, marker term."""
    logp = torch.stack([plain_logp(model, context(trace), ANSWER) for trace in traces])  # [K, T]
    weight = logp.detach().exp() * -null_think(model) / len(ANSWER)
    reward = weight.sum(dim=1)
    advantage = (reward - reward.mean()) / reward.std()
    omega = {"fixed": torch.ones_like(weight), "exact": weight, "none": torch.zeros_like(weight)}
    trace_term = marker_term = 0.0
    for trace, A in zip(traces, advantage.tolist(), strict=True):
        sampled = plain_logp(model, PROMPT, actions(trace), args.temperature)
        record = trace.logp if trace.cut_id is None else [*trace.logp, trace.cut_logp]
        for now, then in zip(sampled, record, strict=True):
            ratio = math.exp(now.item() - then)
            rho = min(max(ratio, 0.8), 1.28)
            if args.updates == 1:
                rho = 1.0
            elif (A > 0 and ratio > 1.28) or (A < 0 and ratio < 0.8):
                rho = 0.0
            trace_term = trace_term + rho * A * now
        if not trace.finished:
            marker = plain_logp(model, [*PROMPT, *trace.ids], [MARKER], args.temperature)
            marker_term = marker_term + args.marker_weight * marker[0]
    answer_term = (omega[args.answer_weight] * logp).sum()
    divisor = args.questions / args.updates * args.traces * 512
    return -torch.stack([trace_term, answer_term, marker_term]) / divisor


@pytest.mark.parametrize("micro", [0, 1, 3])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"answer_weight": "exact", "temperature": 0.7, "marker_weight": 1.0},
        {"answer_weight": "none", "questions": 3},
        {"updates": 2, "questions": 6},
    ],
    ids=str,
)
def test_loss_and_gradient_are_the_docstrings_formula_in_any_micro_batches(changes, micro):
    """A sampled marker gets the advantage, a forced one only its cross-entropy.

    The sums are divided by one constant, and the logged loss is that of all traces.
    """
    model, args = tiny_model(), Args(**{"questions": 1, "traces": 8} | changes)
    # Another policy's traces: ratios differ from 1, and some leave the range.
    traces = sampled_group(tiny_model(7))
    assert len({(trace.finished, trace.cut_id) for trace in traces}) == 3  # every kind of end
    expected = formula(model, traces, args)
    expected.sum().backward()
    exact = gradient(model)
    outcome = train_question(model, TOKENIZER, EXAMPLE, traces, replace(args, micro_traces=micro))
    assert_close(gradient(model), exact)
    assert_close(outcome.losses, expected)


def test_with_micro_traces_no_graph_holds_more_traces_than_that(monkeypatch):
    graphs = []

    def recorded(model, prompt, traces, *given, **flags):
        graphs.append((len(traces), torch.is_grad_enabled()))
        return score(model, prompt, traces, *given, **flags)

    monkeypatch.setattr(train_module, "score", recorded)
    model, args = tiny_model(), Args(questions=1, traces=8, micro_traces=3)
    train_question(model, TOKENIZER, EXAMPLE, sampled_group(model), args)
    assert graphs == [(8, False), (3, True), (3, True), (2, True)]


def test_sft_is_the_cross_entropy_of_answer_and_marker_without_a_trace():
    model, args = tiny_model(), Args(questions=1, traces=0)
    answer = plain_logp(model, [*PROMPT, MARKER], ANSWER).sum()
    marker = plain_logp(model, PROMPT, [MARKER]).sum()
    (-(answer + 0.3 * marker) / LENGTH_SCALE).backward()
    expected = gradient(model)
    [traces] = sample_groups(model, None, [EXAMPLE], 1, args)
    assert_close(question_gradient(model, traces, args), expected)


def test_the_frozen_null_think_is_that_of_the_initial_weights_and_they_get_no_gradient():
    model, initial = tiny_model(1), tiny_model(0)
    args = Args(questions=1, traces=8, null="frozen", aggregator="info_gain")
    outcome = train_question(model, TOKENIZER, EXAMPLE, sampled_group(model), args, initial)
    assert_close(outcome.null_logp, null_think(initial))
    gained = outcome.scores.answer_logp.detach().mean(dim=1) - null_think(initial).mean()
    assert_close(outcome.reward, gained)
    assert_close(outcome.scores.null_logp.detach(), null_think(model))  # for the log: the policy's
    assert all(parameter.grad is None for parameter in initial.parameters())


def test_the_first_steps_have_no_trace_term(monkeypatch):
    """--answers-first 2: the third step's gradient is bit for bit that without the flag."""
    model, args, gradients = tiny_model(), Args(questions=1, traces=8), []
    traces = sampled_group(model)
    formula(model, traces, args)[1:].sum().backward()
    without = gradient(model)
    monkeypatch.setattr(train_module, "sample_groups", lambda *given: [traces])
    monkeypatch.setattr(train_module, "update", lambda *given: gradients.append(gradient(model)))
    monkeypatch.setattr(train_module, "step_figures", lambda *given: {})
    for step, answers_first in ((1, 2), (2, 2), (3, 2), (1, 0)):
        own = replace(args, answers_first=answers_first)
        train_module.train_step(model, TOKENIZER, None, [EXAMPLE], step, own)
    assert_close(gradients[0], without)
    assert torch.equal(gradients[1], gradients[0])
    assert torch.equal(gradients[2], gradients[3])
    assert not torch.allclose(gradients[3], without)


@pytest.mark.parametrize(
    "average, new, expected",
    [(0.0, 0.4, 0.4), (0.4, 0.5, 0.401), (0.4, math.nan, 0.4), (0.0, math.nan, 0.0)],
)
def test_the_moving_average_begins_with_the_first_step_and_takes_no_nan(average, new, expected):
    assert moving_average(average, new) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("family", [{}, *QWENS], ids=str)
@pytest.mark.parametrize("micro", [0, 3])
def test_recomputation_changes_no_bit_of_the_gradient(micro, family):
    model, args = tiny_model(**family), Args(questions=1, traces=8, micro_traces=micro)
    traces = sampled_group(model)
    plain = question_gradient(model, traces, args)
    model.recompute = True
    assert torch.equal(question_gradient(model, traces, args), plain)


def test_nothing_handed_to_a_question_is_changed_by_it():
    model, args = tiny_model(), Args(questions=1, traces=8, micro_traces=3)
    traces = sampled_group(model)
    before = repr((EXAMPLE, traces, args))
    question_gradient(model, traces, args)
    assert repr((EXAMPLE, traces, args)) == before


@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_trains_in_bf16_with_an_fp32_loss(name):
    model, args = tiny_model(dtype=torch.bfloat16), Args(questions=1, traces=8, aggregator=name)
    outcome = train_question(model, TOKENIZER, EXAMPLE, sampled_group(model), args)
    assert outcome.losses.dtype == torch.float32 and outcome.losses.isfinite().all()
    flat = gradient(model)
    assert flat.isfinite().all() and flat.any()


# ---- an update
def test_an_update_clips_the_gradient_and_is_not_applied_where_it_is_not_finite():
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=7.0)  # it moves by lr x gradient
    before = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    for value, norm in ((1.0, len(before) ** 0.5), (math.nan, math.nan), (math.inf, math.inf)):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        assert update(model, optimizer, lr=0.5, grad_clip=2.0) == pytest.approx(norm, nan_ok=True)
        after = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        step = 0.5 * 2.0 / len(before) ** 0.5  # of the first update; the others are not applied
        torch.testing.assert_close(before - after, torch.full_like(before, step), rtol=1e-5, atol=0)
        assert all(parameter.grad is None for parameter in model.parameters())


def test_the_optimizer_is_adamw_with_the_papers_values():
    """Two steps by hand; an eps of 1e-8 would damp gradients of 1e-9."""
    parameter = torch.nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = make_optimizer(torch.nn.ParameterList([parameter]), Args(lr=0.1))
    value, m, v = 2.0, 0.0, 0.0
    for step, g in enumerate((1e-9, -3e-9), start=1):
        parameter.grad = torch.full_like(parameter, g)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.95 * v + 0.05 * g * g
        size = m / (1 - 0.9**step) / (math.sqrt(v / (1 - 0.95**step)) + 1e-15)
        value -= 0.1 * 0.01 * value + 0.1 * size
        assert parameter.item() == pytest.approx(value, rel=1e-9)


# ---- figures
def test_the_figures_of_a_step_are_their_definitions():
    model, args = tiny_model(), Args(questions=1, traces=4, aggregator="log_prob")
    finished, loop = [1, MARKER], [0, 1, 2, 1, 0, 1, 2, 1, 0]
    now = plain_logp(model, PROMPT, finished).tolist()
    then = plain_logp(model, PROMPT, loop).tolist()
    then[0] -= 0.5  # the ratio is 1.65
    at_2 = plain_logp(model, PROMPT, [2, EOS]).tolist()
    traces = [
        Trace(finished, now, finished=True),
        Trace(loop, then, finished=False),
        Trace(finished, now, finished=True),
        Trace([2], at_2[:1], finished=False, cut_id=EOS, cut_logp=at_2[1]),
    ]
    outcome = train_question(model, TOKENIZER, EXAMPLE, traces, args)
    figures = step_figures([question_figures(outcome)], [math.inf])

    entropy = 0.0
    for ids in (finished, loop, finished, [2, EOS]):
        logp = predictions(model, PROMPT, ids)
        entropy -= (logp.exp() * logp).sum().item()
    reward = torch.stack([plain_logp(model, context(trace), ANSWER).sum() for trace in traces])
    null = null_think(model).sum().item()
    expected = {
        "reward_mean": reward.mean().item(),
        "reward_std": reward.std(correction=0).item(),
        "reward_min": reward.min().item(),
        "reward_max": reward.max().item(),
        "zero_std_frac": 0.0,
        "gold_logp_think": reward.mean().item(),
        "gold_logp_null": null,
        "gain": reward.mean().item() - null,
        "gold_ce": -reward.mean().item() / len(ANSWER),
        "trace_len_mean": 14 / 4,
        "trace_len_min": 1,
        "trace_len_max": 9,
        "finished_frac": 0.5,
        "cut_frac": 0.25,
        "limit_frac": 0.25,
        "entropy": entropy / 15,  # the cut token was sampled as well
        "dup_frac": 0.25,
        "rep_frac": (2 / 6) / 4,  # 4-grams 0121, 1210, 2101, 1012, and the first two again
        "ratio_max": math.exp(0.5),
        "clip_frac": 1 / 15,
        "sampler_gap": 0.5,
        "loss": outcome.losses.sum().item(),
        "grad_norm": math.inf,
        "bad_updates": 1,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-6)


def test_a_figure_of_ones_own_is_logged_as_its_mean_over_the_questions():
    model, args = tiny_model(), Args(questions=1, traces=8)
    outcome = train_question(model, TOKENIZER, EXAMPLE, sampled_group(model), args)
    questions = [question_figures(outcome) | {"size": size, "_part": size} for size in (3.0, 4.0)]
    record = step_figures(questions, [1.0])
    assert record["size"] == 3.5 and not any(name.startswith("_") for name in record)


# ---- whole runs
BRIEF = dict(steps=3, questions=4, traces=4, max_trace=12, save_every=1, warmup=1.0)
BRIEF |= dict(eval_questions=4, eval_every=2, device="cpu")
# The stable names: dashboards and scripts rely on them.
KEYS = """step reward_mean reward_std reward_min reward_max zero_std_frac gold_logp_think
gold_logp_null gain gold_ce trace_len_mean trace_len_min trace_len_max finished_frac cut_frac
limit_frac entropy dup_frac rep_frac ratio_max clip_frac sampler_gap trace_loss answer_loss
marker_loss loss grad_norm bad_updates lr skipped_long tokens_per_s sec_sample sec_score
sec_update mem_gb""".split()


def run(out: Path, **changes) -> list[dict]:
    """Trains in this process on the embedded task -> log lines."""
    train(Args(**(BRIEF | {"out": str(out)} | changes)))
    return lines_of(out / "log.jsonl")


def weights(folder: Path | str) -> dict[str, Tensor]:
    return dict(load_model(folder).named_parameters())


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "plain"
    run(out)
    return out


def test_a_run_logs_every_stable_name_and_evaluates_before_during_and_after(plain_run):
    lines = lines_of(plain_run / "log.jsonl")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    held_out = {"eval_accuracy", "eval_accuracy_null", "eval_gain", "eval_trace_len"}
    assert [line["step"] for line in lines if held_out <= set(line)] == [0, 2, 3]
    for line in lines[1:]:
        assert set(KEYS) <= set(line)
        assert line["lr"] == pytest.approx(Args.lr * line["step"] / 3)  # --warmup 1.0
        # What was scored is, token for token, what was sampled.
        assert line["sampler_gap"] < 1e-4 and 1 < line["trace_len_max"] <= 12
        assert line["gain"] == pytest.approx(line["gold_logp_think"] - line["gold_logp_null"])
        terms = line["trace_loss"] + line["answer_loss"] + line["marker_loss"]
        assert line["loss"] == pytest.approx(terms)


def test_a_run_leaves_its_arguments_samples_checkpoints_and_a_final_model(plain_run):
    args = Args(**(BRIEF | {"out": str(plain_run)}))
    written = json.loads((plain_run / "args.json").read_text())
    assert written.pop("command") and written == asdict(args)
    samples = [(line["step"], line["held_out"]) for line in lines_of(plain_run / "samples.jsonl")]
    assert samples == [(0, True), (1, False), (2, False), (2, True), (3, False), (3, True)]
    kept = sorted(path.name for path in plain_run.glob("checkpoint-*"))
    assert kept == ["checkpoint-000002", "checkpoint-000003"]
    final = weights(plain_run / "final")
    for name, tensor in weights(plain_run / "checkpoint-000003").items():
        assert torch.equal(final[name], tensor)
    assert Tokenizer(plain_run / "final").marker == "=>"  # final/ knows its marker


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_final_scores_answers_as_the_last_evaluation_did(dtype, tmp_path):
    """Also with a base stored in bf16, in which the updates of a short run would be lost."""
    run(tmp_path / "run", dtype=dtype, steps=1)
    last = [sample for sample in lines_of(tmp_path / "run/samples.jsonl") if sample["held_out"]][-1]
    final = tmp_path / "run/final"
    assert read_json(final / "config.json")["torch_dtype"] == dtype
    model, tokenizer = load_model(final, getattr(torch, dtype)), Tokenizer(final)
    example = Pairs(HELD_OUT, tokenizer)[0]
    null_logp = score(model, example.prompt, [], example.answer, tokenizer.marker_id).null_logp
    assert null_logp.tolist() == pytest.approx(last["null_logp"], abs=1e-5)


def test_logged_samples_hold_the_log_probs_that_their_rewards_were_computed_from(plain_run):
    samples = lines_of(plain_run / "samples.jsonl")
    assert len({sample["question"] for sample in samples if sample["held_out"]}) == 1
    for sample in samples:
        logp = torch.tensor([trace["logp"] for trace in sample["traces"]])
        assert logp.shape == (4, len(sample["answer"]))
        null_logp = torch.tensor(sample["null_logp"])
        reward, weight = aggregate("weighted_sum_log_prob", logp, null_logp)
        logged = torch.tensor([trace["reward"] for trace in sample["traces"]])
        assert torch.allclose(logged, reward, atol=1e-5)
        advantage = [trace["advantage"] for trace in sample["traces"]]
        assert advantages(logged, weight=weight).tolist() == pytest.approx(advantage, abs=1e-5)


def test_the_held_out_sample_has_the_null_think_that_rewards_use(plain_run, tmp_path):
    def of_held_out(folder: Path) -> list[list[float]]:
        lines = lines_of(folder / "samples.jsonl")
        return [line["null_logp"] for line in lines if line["held_out"]]

    run(tmp_path / "frozen", null="frozen", clip_null=True, steps=2)
    first, *later = of_held_out(tmp_path / "frozen")
    assert later and all(null_logp == first for null_logp in later)
    assert of_held_out(plain_run)[1] != first  # the current policy's drifts


def test_a_reward_sees_traces_scored_as_they_were_sampled_in_training_and_evaluation(tmp_path):
    own = """def gap(logp, null_logp, example, traces, tokenizer, scores):
    assert scores.entropy.shape == scores.trace_logp.shape
    recorded = [sum(trace.logp) + trace.cut_logp for trace in traces]
    return scores.trace_logp.sum(dim=1) - logp.new_tensor(recorded)
"""
    (tmp_path / "own.py").write_text(own)
    run(tmp_path / "run", aggregator=f"{tmp_path}/own.py:gap", temperature=0.7, steps=1)
    samples = lines_of(tmp_path / "run/samples.jsonl")
    assert [sample["held_out"] for sample in samples] == [True, False, True]
    rewards = [trace["reward"] for sample in samples for trace in sample["traces"]]
    # After the update the held-out traces are still the sampler's own.
    assert max(map(abs, rewards)) < 1e-3


def test_the_same_seed_gives_the_same_run_and_another_seed_another(plain_run, tmp_path):
    plain = without_clock(lines_of(plain_run / "log.jsonl"))
    assert without_clock(run(tmp_path / "again")) == plain
    (other,) = run(tmp_path / "other", seed=1, steps=1, eval_data="")
    assert other["reward_mean"] != plain[1]["reward_mean"]


@pytest.mark.parametrize(
    "changes",
    [
        {"traces": 0},
        {"updates": 2, "answer_weight": "exact"},
        {"aggregator": "jlb_multi", "scale": "none", "temperature": 0.7},
        {"dtype": "bfloat16", "micro_traces": 2, "recompute": True},
    ],
    ids=str,
)
def test_every_mode_trains(changes, tmp_path):
    lines = run(tmp_path / "run", **changes, steps=2, eval_data="")
    assert all(value is not None for line in lines for value in line.values())
    before, after = weights(Args.model), weights(tmp_path / "run/final")
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert "dtype" in changes or all(line["sampler_gap"] < 1e-4 for line in lines)
    if "updates" in changes:  # the second update's policy is no longer the sampler's
        assert all(line["ratio_max"] - 1 > 1e-4 for line in lines)


@pytest.mark.parametrize("kind", ["new", "reserved_special_token_0", "start_header_id"])
def test_a_marker_never_trained_starts_as_a_copy_of_eos_and_one_the_model_knows_stays(
    kind, tmp_path
):
    """What copying does to the tables: test_weights.py."""
    shutil.copytree(ROOT / "tests/golden/tokenizers/llama3", tmp_path / "model")
    save_model(tiny_model(dtype=torch.float32, vocab_size=365), tmp_path / "model")
    tokenizer = Tokenizer(tmp_path / "model", f"<|{kind}|>")
    after = load_with_marker(tmp_path / "model", tokenizer, torch.float32, "cpu")
    source = tokenizer.marker_id if kind == "start_header_id" else tokenizer.eos_ids[0]
    before = load_model(tmp_path / "model").lm_head.weight
    assert torch.equal(after.lm_head.weight[tokenizer.marker_id], before[source])


# ---- flags
def test_every_flag_is_used():
    """A flag that does nothing is a lie. Of --tracker there is a test in test_metrics.py."""
    files = ["train.py", "aggregate.py", "sample.py", "evaluate.py", "support/run.py"]
    source = "".join((ROOT / file).read_text() for file in files)
    assert [f.name for f in fields(Args) if f"args.{f.name}" not in source] == ["tracker"]


def test_help_has_sections_and_the_commands_of_the_docstring(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"], train_module.__doc__)
    shown = capsys.readouterr().out
    sections = ["model and data:", "method:", "optimisation:", "memory and device:", "run:"]
    assert [line for line in shown.splitlines() if line in sections] == sections
    assert "train.py --traces 0" in shown and "torchrun" in shown


def test_args_made_in_python_are_those_of_the_command_line():
    made = Args(data="mine.jsonl", prompt_format="Q: {question}\\nA:")
    flags = ["--data", "mine.jsonl", "--prompt-format", "Q: {question}\\nA:"]
    assert made == parse_args(flags, "")
    assert made.eval_data == "" and made.device != "auto" and "\n" in made.prompt_format
    assert Args().eval_data == Args(data="mine.jsonl", eval_data=HELD_OUT).eval_data == HELD_OUT
    with pytest.raises(InputError, match="--questions"):
        train(Args(questions=5, updates=2))


def test_another_model_under_the_embedded_tasks_learning_rate_is_told_the_papers():
    assert hops_defaults(Args()) == hops_defaults(Args(model="DIR", lr=1e-5)) == ""
    said = hops_defaults(Args(model="DIR"))
    assert "--lr 0.0002" in said and "2e-6" in said
