"""preflight.py: the race, on groups worked by hand and from the command."""

import math
import xml.dom.minidom

import pytest
import tiny
import torch
from test_sample import letters

import preflight
from aggregate import credit
from data import Example
from preflight import EMPTY, HELPFUL, IDLE, NAMES, PUSH, REPAIR, Group, fate, main, race
from sample import sample_groups
from support.args import Args
from support.errors import InputError
from support.weights import save_model

EASY, HARD = 9, 1  # answer tokens


def group(rows: list[tuple[int, float, float]]) -> Group:
    """Traces as (length, probability of each easy token, of the hard one), the empty one last."""
    probabilities = [[easy] * EASY + [hard] * HARD for _, easy, hard in rows]
    logp = torch.tensor(probabilities, dtype=torch.float64).log()
    return Group([length for length, _, _ in rows], logp)


# A worked trace costs the easy tokens some probability and makes the hard one likely.
WORKED, RAMBLING, EMPTY_ONE = (12, 0.45, 0.90), (8, 0.50, 0.12), (0, 0.99, 0.12)
TAXED = group([WORKED, RAMBLING, RAMBLING, EMPTY_ONE, EMPTY_ONE])
FREE = group([(12, 0.99, 0.90), (8, 0.99, 0.10), (8, 0.99, 0.10), EMPTY_ONE, EMPTY_ONE])


def fate_of(groups: list[Group], name: str, steps: int = 60, **flags) -> str:
    return fate(race(groups, Args(aggregator=name, steps=steps, **flags))).split()[0]


# ---- kinds
def test_a_trace_helps_if_it_raises_the_uncertain_tokens_by_half_a_nat():
    assert TAXED.kind.tolist() == [HELPFUL, IDLE, IDLE, EMPTY, EMPTY]
    assert TAXED.gain[0] == pytest.approx(math.log(0.90 / 0.12))
    half = group([(1, 0.99, 0.12 * math.exp(0.49)), (1, 0.99, 0.12 * math.exp(0.51)), EMPTY_ONE])
    assert half.kind.tolist() == [IDLE, HELPFUL, EMPTY]
    # Where nothing is uncertain, the least likely token counts.
    sure = group([(1, 0.9, 0.95), (1, 0.9, 0.5), (0, 0.9, 0.6)])
    assert sure.gain.tolist() == pytest.approx([math.log(0.95 / 0.6), math.log(0.5 / 0.6), 0])


def test_the_groups_are_sampled_traces_and_the_empty_one(tmp_path):
    """Of prompt and answer ids alone: question and gold text are empty."""
    model, tokenizer = tiny.model(3), letters(tmp_path)
    examples = [Example(i, [1 + i, 2], [3, 4, 5], "", "") for i in range(3)]
    args = Args(traces=4, max_trace=6, seed=7)
    groups = sample_groups(model, tokenizer, examples, 0, args)
    assert {trace.finished for traces in groups for trace in traces} == {True, False}
    made = preflight.sample_and_score(model, tokenizer, examples, args)
    for group, traces in zip(made, groups, strict=True):
        assert group.answer_logp.shape == (5, 3)
        assert torch.equal(group.answer_logp[-1], group.null_logp)
        thoughts = [[t for t in trace.ids if t != tokenizer.marker_id] for trace in traces]
        assert group.lengths == [*map(len, thoughts), 0]


# ---- the equations
def test_the_race_is_its_equations_recomputed_step_by_step(monkeypatch):
    """At half of the embedded task's --lr, to which both rates are proportional."""
    drawn = []  # (logp, advantage) per question

    def recorded(logp, *given, **flags):
        reward, advantage, omega = credit(logp, *given, **flags)
        drawn.append((logp, advantage))
        return reward, advantage, omega

    monkeypatch.setattr(preflight, "credit", recorded)
    steps, questions, k = 12, 3, 5
    args = Args(aggregator="r3", steps=steps, questions=questions, traces=k, lr=Args.lr / 2)
    history = race([TAXED, FREE], args, seed=3)

    p, q = 0.6, 2 / 6  # 10 rows: 4 empty, 2 helpful
    state = {"a": math.log(p / (1 - p)), "b": math.log(q / (1 - q))}
    m, v, s = dict.fromkeys(state, 0.0), dict.fromkeys(state, 0.0), 0.0
    assert len(history) == steps + 1
    for step in range(1, steps + 1):
        pay = [0.0, 0.0, 0.0]
        for logp, advantage in drawn[(step - 1) * questions : step * questions]:
            for row, A in zip(logp.exp(), advantage, strict=True):
                hard, easy = float(row[-1]), float(row[0])
                kind = EMPTY if abs(hard - 0.12) < 1e-9 and easy > 0.98999 else IDLE
                kind = HELPFUL if hard > 0.5 else kind
                # An idle trace of FREE has a hard token of 0.10.
                pay[kind] += float(A) / (questions * k)
                cost = math.log(0.99 / {HELPFUL: 0.45, IDLE: 0.50, EMPTY: 0.99}[kind])
                if easy < 0.98999:
                    assert math.log(0.99 / easy) == pytest.approx((1 - s) * cost)
        gradients = {
            "a": pay[IDLE] + pay[HELPFUL] - p * sum(pay),
            "b": pay[HELPFUL] - q * (pay[IDLE] + pay[HELPFUL]),
        }
        for name, g in gradients.items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.95 * v[name] + 0.05 * g * g
            size = math.sqrt(v[name] / (1 - 0.95**step)) + 1e-15
            state[name] += PUSH / 2 * m[name] / (1 - 0.9**step) / size
        s += REPAIR / 2 * p * (1 - s)
        p, q = (1 / (1 + math.exp(-state[name])) for name in "ab")
        expected = [1 - p, p * (1 - q), p * q]
        assert history[step].tolist() == pytest.approx(expected, rel=1e-9)


def test_credit_gets_the_flags_and_no_push_comes_in_the_first_steps(monkeypatch):
    least = []

    def recorded(logp, null_logp, args, least_std):
        least.append(least_std)
        assert logp.shape[0] == 5 and args.scale == "none"
        return credit(logp, null_logp, args, least_std=least_std)

    monkeypatch.setattr(preflight, "credit", recorded)
    flags = dict(traces=5, questions=1, scale="none", filter_std=0.5, answers_first=3, steps=6)
    history = race([TAXED], Args(aggregator="prob", **flags))
    assert torch.allclose(history[1:4], history[0]) and not torch.allclose(history[6], history[0])
    assert least[:3] == [math.inf] * 3 and 0 < least[3] < math.inf


# ---- fates
def test_the_reward_decides_where_a_trace_costs_easy_tokens():
    for name in ("weighted_sum_log_prob", "weighted_sum_inverse_prob"):
        assert fate_of([TAXED], name) == "keeps"
    assert fate_of([TAXED], "arithmetic_mean") == "lost"
    assert fate_of([TAXED], "arithmetic_mean", clip_null=True) == "keeps"
    untrained = dict(clip_null=True, answer_weight="none")  # nothing repairs the easy tokens
    assert fate_of([TAXED], "arithmetic_mean", **untrained) == "undecided"
    assert fate_of([TAXED], "arithmetic_mean", answers_first=30) == "keeps"
    assert {fate_of([FREE], name) for name in NAMES} == {"keeps"}


def test_what_comes_back_after_traces_vanished_returns():
    history = torch.tensor([[0.4, 0.5, 0.1], [0.95, 0.04, 0.01], [0.3, 0.05, 0.65]])
    assert fate(history) == "returns at about step 2"
    assert fate(history[:2]) == "lost within 1 steps"
    assert fate(history[:1]) == "undecided within 0 steps"
    assert fate(history[[0, 2]]) == "keeps thinking, helpful traces prevail at step 1"


def test_the_same_seed_gives_the_same_race_and_no_other_random_stream_moves():
    args, state = Args(aggregator="prob", steps=5), torch.get_rng_state()
    first, same, other = (race([TAXED, FREE], args, seed) for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_of_empty_or_of_helpful_traces_alone_are_no_fault():
    none = group([EMPTY_ONE] * 3)
    assert fate_of([none], "log_prob", steps=3) == "lost"
    assert "no trace helps, the best gains +0.00 nats" in preflight.describe([none])
    assert fate_of([group([WORKED, WORKED, EMPTY_ONE])], "weighted_sum_log_prob") == "keeps"


# ---- the command
@pytest.mark.parametrize("flags", ["--traces 2", "--traces 8 --clip-null", "--traces 32"])
@pytest.mark.parametrize("answer", ["a b", "a"])
def test_a_model_with_random_weights_gets_a_line_for_every_reward(
    flags, answer, tmp_path, monkeypatch, capsys
):
    save_model(tiny.model(9, torch.float32), tmp_path)
    letters(tmp_path / "words").save(tmp_path)
    (tmp_path / "rows.jsonl").write_text(f'{{"question": "b z", "answer": "{answer}"}}\n')
    flags += f" --model {tmp_path} --data {tmp_path}/rows.jsonl --max-trace 6 --seed 3 --device cpu"
    flags += f" --questions 2 --sampled 8 --steps 3 --draw {tmp_path}/race.svg"
    monkeypatch.setattr("sys.argv", ["preflight.py", *flags.split()])
    real, seen = preflight.sample_and_score, []

    def recorded(model, tokenizer, examples, args):
        seen.append((args.traces, args.max_trace, args.seed))
        return real(model, tokenizer, examples, args)

    monkeypatch.setattr(preflight, "sample_and_score", recorded)
    main()
    assert seen == [(8, 6, 3)]
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("1 questions (") and ", 8 traces, " in first and "nats" in first
    assert "of their tokens are <unk>: the tokenizer lacks them" in first
    assert [line.split()[0] for line in lines] == NAMES
    refused = {line.split()[0] for line in lines if "the empty trace has no such reward" in line}
    assert refused == ({"r3", "jlb_multi"} if "--clip-null" in flags else set())
    drawn = xml.dom.minidom.parse(f"{tmp_path}/race.svg")
    assert len(drawn.getElementsByTagName("polyline")) == 2 * (len(NAMES) - len(refused))
    # Refused before anything is sampled.
    monkeypatch.setattr(preflight, "sample_and_score", None)
    monkeypatch.setattr("sys.argv", ["preflight.py", *flags.split()[:-1], f"{tmp_path}/no/a.svg"])
    with pytest.raises(InputError, match=r"no/a\.svg"):
        main()
