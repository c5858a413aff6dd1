"""What examples/lab.py measures with a model: before training, and after it.

lookups_right        whether the base can work a question out at all
what_is_paid         which of a model's traces a reward pays for, and which tokens decide that
in_context_rows      data for the baseline that is trained on answers after the base's traces
hard_tokens          the hard tokens of test answers: greedy choice and log-prob
survives             whether the model that came out thinks
"""

import json
import math
import random
import re
from pathlib import Path
from statistics import mean, pstdev

import torch

from aggregate import aggregate
from data import Pairs
from support.tokenizer import Tokenizer
from evaluate import greedy_traces
from examples.hops.make import Task, make_trace
from preflight import NAMES, Group, preflight, sample_group_scores
from sample import sample_traces, trace_ids
from support.args import Args, parse_args
from support.metrics import mean_correlation
from support.weights import load_model
from train import group_advantages, rewards


# ---- before training
@torch.no_grad()
def lookups_right(folder: Path) -> float:
    """Share of hops whose second name the base predicts, given a rightly worked trace up to it."""
    model, tokenizer = load_model(folder / "base"), Tokenizer(folder / "base")
    pairs = Pairs(folder / "test.jsonl", tokenizer)
    right = []
    for i in range(min(32, len(pairs))):
        example = pairs[i]
        trace = tokenizer.encode_prompt(worked_trace(example.question))  # 1 ann bob , 2 bob kim ,
        hidden = model(torch.tensor([example.prompt + trace]))[0]  # [L, H]
        predicted = model.lm_head(hidden[len(example.prompt) - 1 : -1]).argmax(dim=-1).tolist()
        right += [predicted[at] == trace[at] for at in range(2, len(trace), 4)]
    return sum(right) / len(right)


TRACES = 8  # per question


def what_is_paid(
    model: Path, data: Path, task: Task, methods: dict[str, str], questions: int
) -> list[dict]:
    """Per method: which of the model's traces it would pay for, and which tokens decide that.

    model: its directory; data: the questions are the first of this file; methods: name -> flags of
    train.py, for methods that sample traces. The empty trace joins each group of sampled ones. The
    advantages of --scale none are divided by their root mean square, so that methods can be
    compared.

    predictor        mean advantage of rightly worked traces - that of the empty trace
    signal_to_noise  mean advantage of rightly worked traces / its std over them
    share_KIND       share of the reward's variance within a group from this kind of tokens
    len_reward_corr  correlation of trace length and reward within a group, mean over groups
    helpful, empty   figures of preflight.py, as is dead
    """
    policy, tokenizer = load_model(model), Tokenizer(model)
    pairs = Pairs(data, tokenizer)
    examples = [pairs[i] for i in range(min(questions, len(pairs)))]
    groups = sample_group_scores(policy, tokenizer, examples, TRACES, Args.max_trace)
    positions = [token_kinds(task, row) for row in read_rows(data)[:questions]]
    kinds = [
        kind_of_trace(example.question, tokenizer.decode(ids))
        for example, group in zip(examples, groups, strict=True)
        for ids in group.traces
    ]
    lengths = [group.lengths().tolist() for group in groups]

    measured = []
    for method, flags in methods.items():
        torch.manual_seed(0)  # exact_match draws random numbers
        args = parse_args(flags.split(), "")
        all_rewards, advantage = [], []
        for group in groups:
            reward, weight = rewards(group.answer_logp, group.null_logp, args)
            advantage += group_advantages(reward, weight, args).tolist()
            all_rewards.append(reward.tolist())
        if args.scale == "none":
            size = math.sqrt(sum(a * a for a in advantage) / len(advantage))
            advantage = [a / size if size else 0.0 for a in advantage]
        line = {"method": method, "predictor": None, "signal_to_noise": None}
        paid = by_kind(kinds, advantage)
        if "worked right" in paid:
            right = paid["worked right"]
            line["predictor"] = mean(right) - mean(paid["empty"])
            spread = pstdev(right)
            line["signal_to_noise"] = mean(right) / spread if spread > 1e-6 else None
        line |= {f"advantage of {kind}": mean(values) for kind, values in paid.items()}
        shares = variance_shares(args.aggregator, groups, positions)
        line |= {f"share_{kind}": value for kind, value in shares.items()}
        line["len_reward_corr"] = mean_correlation(lengths, all_rewards)
        line["worked_right"] = kinds.count("worked right")
        if args.aggregator in NAMES:
            checked = preflight(groups, args.aggregator)
            line |= {name: checked[name] for name in ("helpful", "empty", "dead")}
        measured.append(line)
    return measured


def kind_of_trace(question: str, text: str) -> str:
    """empty, worked right, worked wrong, rambling: by the format of make.py's documents."""
    if not text:
        return "empty"
    if text == worked_trace(question):
        return "worked right"
    return "worked wrong" if re.fullmatch(r"(\d \w+ \w+ ,\s*){2,}", text) else "rambling"


def worked_trace(question: str) -> str:
    """The trace that make.py writes where it works this question out."""
    told, asked = question.split("from")
    follows = dict(fact.split() for fact in told.split(";")[:-1])
    *starts, _, hops, _ = asked.split()  # a b c go 3 ?
    paths = []
    for start in starts:
        path = [start]
        for _ in range(int(hops)):
            path.append(follows[path[-1]])
        paths.append(path)
    text, _ = make_trace("worked", paths, random.Random())
    return text


def by_kind(kinds: list[str], values: list[float]) -> dict[str, list[float]]:
    found = {kind: [] for kind in kinds}
    for kind, value in zip(kinds, values, strict=True):
        found[kind].append(value)
    return found


def token_kinds(task: Task, row: dict) -> dict[str, list[int]]:
    """Positions of the answer's hard, unpredictable ("noise") and easy tokens, eos included."""
    length = len(row["answer"].split()) + 1
    noise = list(range(length - 2 - task.noise, length - 2))  # before the full stop and eos
    easy = sorted(set(range(length)) - set(row["hard"]) - set(noise))
    return {"hard": row["hard"], "easy": easy, "noise": noise}


def variance_shares(
    aggregator: str,
    groups: list[Group],
    positions: list[dict[str, list[int]]],
) -> dict[str, float]:
    """Share of each kind of tokens in the reward's variance within a group, to first order.

    positions: of each kind of tokens, per group.
    To first order the reward of trace k is sum_i w_i log c_ki, with the group's mean of the exact
    answer weights as w. A kind's part g of this sum has the share cov(g, sum) / var(sum). The
    shares add up to 1; one below 0 belongs to tokens that are worse after traces that are paid for.
    """
    covariance = {"hard": 0.0, "easy": 0.0, "noise": 0.0}
    for group, of_kind in zip(groups, positions, strict=True):
        logp = group.answer_logp  # [K+1, T]
        _, weight = aggregate(aggregator, logp, group.null_logp)
        part = weight.double().mean(dim=0) * (logp - logp.mean(dim=0)).double()  # [K+1, T]
        parts = {kind: part[:, at].sum(dim=1) for kind, at in of_kind.items()}  # [K] each
        size = sum(g.square().sum().item() for g in parts.values())
        if size == 0:  # no token differs between these traces
            continue
        for kind, g in parts.items():  # every question counts the same, whatever its rewards' size
            covariance[kind] += (g * part.sum(dim=1)).sum().item() / size
    total = sum(covariance.values())
    return {kind: value / total if total else 0.0 for kind, value in covariance.items()}


def in_context_rows(folder: Path) -> str:
    """train.jsonl with a trace of the base behind each question."""
    model, tokenizer = load_model(folder / "base"), Tokenizer(folder / "base")
    pairs = Pairs(folder / "train.jsonl", tokenizer)
    examples = [pairs[i] for i in range(len(pairs))]
    prompts = [example.prompt for example in examples]
    stop, cut = [tokenizer.marker_id], tokenizer.cut_ids
    groups = sample_traces(model, prompts, 1, Args.max_trace, stop_ids=stop, cut_ids=cut)
    lines = []
    for example, (trace,) in zip(examples, groups, strict=True):
        ids = trace.ids[:-1] if trace.finished else trace.ids  # without the marker
        question = f"{example.question} {tokenizer.decode(ids)}".strip()
        lines.append(json.dumps({"question": question, "answer": example.gold}) + "\n")
    return "".join(lines)


# ---- after training
HARD_ROWS = 100  # test rows on which the hard tokens are scored


@torch.no_grad()
def hard_tokens(final: Path, data: Path) -> dict[str, float]:
    """Means over the hard tokens of the first rows of `data`, each after the gold tokens before it.

    hard_right: the greedy choice is the gold token, hard_logp: its log-prob in nats; after the
    model's own greedy trace, after the empty one (_null) and after the next row's (_shuffled).
    """
    model, tokenizer = load_model(final), Tokenizer(final)
    marker = tokenizer.marker_id
    hard = [row["hard"] for row in read_rows(data)[:HARD_ROWS]]
    pairs = Pairs(data, tokenizer)
    examples = [pairs[i] for i in range(len(hard))]
    traces = greedy_traces(model, tokenizer, examples, Args.max_trace, 64)
    thoughts = [trace_ids(trace, marker) for trace in traces]
    contexts = {
        "": thoughts,
        "_null": [[marker] for _ in examples],
        "_shuffled": thoughts[1:] + thoughts[:1],
    }
    figures = {}
    for name, context in contexts.items():
        right, logps = [], []
        for example, thought, positions in zip(examples, context, hard, strict=True):
            before = [*example.prompt, *thought]
            hidden = model(torch.tensor([before + example.answer]))[0]  # [L, H]
            predicts = [len(before) + position - 1 for position in positions]
            logp = model.lm_head(hidden[predicts]).float().log_softmax(dim=-1)  # [N, V]
            gold = torch.tensor([example.answer[position] for position in positions])
            right += (logp.argmax(dim=-1) == gold).tolist()
            logps += logp.gather(1, gold[:, None])[:, 0].tolist()
        figures[f"hard_right{name}"] = sum(right) / len(right)
        figures[f"hard_logp{name}"] = sum(logps) / len(logps)
    return figures


def survives(row: dict) -> bool:
    """Whether a trained model thinks: it writes traces, and they help it with the hard tokens.

    The gain must hold over the null think and over another question's trace. The null think alone
    would not do: nothing trains it, so it can drift until any trace gains over it. 0.2 nats are
    a fifth more probability on the gold token, well above what 100 rows scatter; no trace of 3
    tokens, marker included, can hold a hop.
    """
    without = max(row["hard_logp_null"], row["hard_logp_shuffled"])
    return row["eval_trace_len"] > 3 and row["hard_logp"] - without > 0.2


HOLDS = 3  # steps in a row


def first_thinking_step(log: list[dict]) -> int | None:
    """The first of HOLDS steps whose sampled traces help with the answer; None if there is none."""
    lines = [line for line in log if "trace_len_mean" in line]
    helps = [line["gain"] > 0.2 and line["trace_len_mean"] > 3 for line in lines]
    for i in range(len(helps) - HOLDS + 1):
        if all(helps[i : i + HOLDS]):
            return lines[i]["step"]
    return None


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]
