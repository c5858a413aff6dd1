"""What one training step costs: ours beside the recipe that repeats the prompt for every trace, on random tokens of fixed lengths.

    python bench/step.py --model DIR                                     sample, score + update: ours and `dense`, in turns
    python bench/step.py --model DIR --peer dense transformers           ... and the same recipe through the transformers library
    python bench/step.py --model DIR --only ours --memory                the peak memory of one contender, in this very process
    python bench/step.py --sweep                                         ours as K, prompt and trace grow: which count the time follows
    --json: one JSON object as the last line; --save: bench/results/step-<device>-<date>...json

B questions of P prompt tokens and T answer tokens, K traces of n tokens each: there are no stop tokens, so every trace is cut at its
limit and its marker is forced. Tokens the model is fed after sampling (the contenders differ in nothing else; K = 8, P = 96, n = 64 and
T = 48 in brackets):

    ours          score, with its graph: P + K (n + T) + T           [1040]    the prompt once, then K traces and the null think
                  update: the backward of that very forward
    dense         old log-probs, no graph: K (P + n + T)             [1664]    the prompt K times
                  null think, no graph, K times over: K (P + T)      [1152]
                  update, with its graph: K (P + n + T)              [1664]    one micro-batch of K rows per question
    transformers  as dense; its own model, attention and generate()
    selective     ours with --activation-checkpointing selective, and full: what less memory costs

Sampling: ours reads a prompt once and copies its keys and values, the others read it in each of the K rows. The peers hold fp32 logits
[K, n + 1 + T, V] and their log_softmax; ours never forms logits (kernels/logprob.py), but computes the trace's entropy as well, as
training does. All share the rest: fp32 weights, gradients and AdamW moments, a copy in --dtype that computes, one update a step.

Before anything is timed: the peak memory of each contender, each in a process of its own with the model, AdamW's moments and, on a
CPU, Python and its libraries (`loaded MB` is what that comes to before the step); and the gradient of every peer on the same traces
beside ours, from the fp32 weights: relative 2-norm of the difference, rounding if both do the same work. Then one step of each to warm
up, then rounds in which all take turns; medians.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from aggregate import advantages, aggregate  # noqa: E402
from bench.machine import (  # noqa: E402
    Laps,
    check_device,
    check_least,
    circumstances,
    headline,
    held_mb,
    peak_mb,
    random_ids,
    recorded_command,
    save,
    say,
)
from data import Example, stream_seed  # noqa: E402
from sample import Trace, sample_traces  # noqa: E402
from support.distributed import add_to_main_grad, compute_copy  # noqa: E402
from support.errors import InputError, OneLineParser, TrainingError, exit_on_bad_input  # noqa: E402
from support.weights import file_name, load_model, read_config  # noqa: E402
from train import LENGTH_SCALE, Args, apply_update, make_optimizer, train_group  # noqa: E402

PARTS = {
    "sample": "sample",
    "old_logp": "old log-prob",
    "null": "null",
    "score": "score",
    "update": "update",
}
SWEEP = {
    "traces": (2, 4, 8, 16, 32),
    "prompt": (64, 128, 256, 512, 1024, 2048),
    "new": (32, 64, 128, 256, 512),
}


# ---- the work ---------------------------------------------------------------------------------------------------------------


@dataclass
class Work:
    """One step's questions, and train.py's settings for it."""

    examples: list[Example]
    marker: int
    args: Args


def make_work(flags: argparse.Namespace, vocab: int) -> Work:
    """Random token ids of fixed lengths, the same for the same --seed. Any id can be the marker: what it means costs nothing."""
    draw = torch.Generator().manual_seed(flags.seed)
    examples = [
        Example(
            index,
            random_ids(flags.prompt, vocab, draw),
            random_ids(flags.answer, vocab, draw),
            question="",
            gold="",
        )
        for index in range(flags.questions)
    ]
    args = Args(
        model=flags.model,
        questions=flags.questions,
        traces=flags.traces,
        max_trace=flags.new,
        seed=flags.seed,
    )
    args.dtype, args.device = flags.dtype, flags.device
    args.lr = 1e-6  # a real update that leaves the model what it was
    args.aggregator = "info_gain"  # in nats: a random answer's probabilities are all but 0, and equal rewards would be less work
    return Work(examples, marker=0, args=args)


@dataclass
class Learner:
    """What a step trains: fp32 weights with AdamW's moments, and the copy in --dtype that computes (the same object for float32)."""

    model: nn.Module
    policy: nn.Module
    optimizer: torch.optim.Optimizer


def make_learner(model: nn.Module, policy: nn.Module, args: Args) -> Learner:
    optimizer = make_optimizer(model, replace(args, lr=0.0))
    for parameter in (
        model.parameters()
    ):  # an update by nothing: every step to come finds its moments in place, the first one too
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return Learner(model, policy, optimizer)


def load_native(args: Args) -> Learner:
    model = load_model(args.model, device=args.device)
    return make_learner(model, compute_copy(model, getattr(torch, args.dtype)), args)


def load_transformers(args: Args) -> Learner:
    """transformers' model and, as `compute_copy` makes it of ours, its copy in --dtype."""
    import transformers

    transformers.logging.set_verbosity_error()
    load = partial(
        transformers.AutoModelForCausalLM.from_pretrained, args.model, attn_implementation="sdpa"
    )
    model = policy = load(dtype=torch.float32).to(args.device)
    if args.dtype != "float32":
        policy = load(dtype=getattr(torch, args.dtype)).to(args.device)
        for low in policy.parameters():
            low.main_grad = None
            low.register_post_accumulate_grad_hook(add_to_main_grad)
    return make_learner(model, policy, args)


# ---- ours: what train.py does ------------------------------------------------------------------------------------------------


def sample_ours(policy: nn.Module, work: Work) -> list[list[Trace]]:
    seeds = [stream_seed(work.args.seed, example.index) for example in work.examples]
    return sample_traces(
        policy, [e.prompt for e in work.examples], work.args.traces, work.args.max_trace, seed=seeds
    )


def gradient_ours(
    policy: nn.Module, work: Work, groups: list[list[Trace]], laps: Laps, keep: str = "none"
) -> None:
    policy.activation_checkpointing = keep
    for example, traces in zip(work.examples, groups, strict=True):
        train_group(policy, example, traces, None, work.marker, work.args, laps)
    policy.activation_checkpointing = "none"  # others compute with the same model


# ---- the peers: every row has a prompt of its own ----------------------------------------------------------------------------


def sample_dense(policy: nn.Module, work: Work) -> list[list[Trace]]:
    """Our sampler, but the prompt of every row is read."""
    k, rows = work.args.traces, repeated_prompts(work)
    seeds = [stream_seed(work.args.seed, row) for row in range(len(rows))]
    traces = [trace for (trace,) in sample_traces(policy, rows, 1, work.args.max_trace, seed=seeds)]
    return [traces[i : i + k] for i in range(0, len(traces), k)]


def sample_generate(policy: nn.Module, work: Work) -> list[list[Trace]]:
    k, new, prompts = (
        work.args.traces,
        work.args.max_trace,
        torch.tensor(repeated_prompts(work), device=work.args.device),
    )
    torch.manual_seed(work.args.seed)
    settings = dict(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_new_tokens=new,
        max_new_tokens=new,
        pad_token_id=0,
    )
    with torch.no_grad():
        rows = policy.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)
    traces = [Trace(ids, [], finished=False) for ids in rows[:, prompts.shape[1] :].tolist()]
    return [traces[i : i + k] for i in range(0, len(traces), k)]


def repeated_prompts(work: Work) -> list[list[int]]:
    return [example.prompt for example in work.examples for _ in range(work.args.traces)]


def logits_dense(policy: nn.Module, tokens: Tensor, count: int) -> Tensor:
    """tokens [K, L] -> fp32 logits of the last `count` places, [K, count, V]."""
    return F.linear(policy(tokens)[:, -count:], policy.lm_head.weight).float()


def logits_transformers(policy: nn.Module, tokens: Tensor, count: int) -> Tensor:
    return policy(tokens, use_cache=False).logits[:, -count:].float()


def row_logp(logits: Callable, policy: nn.Module, rows: list[list[int]], count: int) -> Tensor:
    """Log-probs of the last `count` tokens of K equally long rows, [K, count]."""
    tokens = torch.tensor(rows, device=policy.lm_head.weight.device)
    return (
        logits(policy, tokens[:, :-1], count)
        .log_softmax(-1)
        .gather(-1, tokens[:, -count:, None])[..., 0]
    )


def gradient_repeated(
    logits: Callable, policy: nn.Module, work: Work, groups: list[list[Trace]], laps: Laps
) -> None:
    """The three passes, and train.py's loss written out for traces that were all cut:

    -1/(512 B K) sum_k [ A_k sum_t log pi(z_kt) + lambda log pi(m) + sum_i log c_ki ]
    """
    args, width = work.args, len(work.examples[0].answer)
    rows = [
        [[*e.prompt, *trace.ids, work.marker, *e.answer] for trace in group]
        for e, group in zip(work.examples, groups, strict=True)
    ]
    count = args.max_trace + 1 + width
    with torch.no_grad():
        old_logp = [row_logp(logits, policy, group, count) for group in rows]
        laps.lap("old_logp")
        null_logp = [
            row_logp(logits, policy, [[*e.prompt, work.marker, *e.answer]] * args.traces, width)
            for e in work.examples
        ]
        laps.lap("null")
    for group, old, null in zip(rows, old_logp, null_logp, strict=True):
        reward, _ = aggregate(args.aggregator, old[:, -width:], null[0])
        weight = torch.ones_like(old)
        weight[:, : args.max_trace] = advantages(reward, args.center, args.scale)[:, None]
        weight[:, args.max_trace] = args.marker_weight
        loss = -(weight * row_logp(logits, policy, group, count)).sum() / (
            args.questions * args.traces * LENGTH_SCALE
        )
        loss.backward()
    laps.lap("update")


@dataclass
class Contender:
    load: Callable[[Args], Learner]  # contenders with the same loader share what it loads
    sample: Callable[[nn.Module, Work], list[list[Trace]]]
    gradient: Callable[[nn.Module, Work, list[list[Trace]], Laps], None]  # adds to the gradients


CONTENDERS = {
    "ours": Contender(load_native, sample_ours, gradient_ours),
    "selective": Contender(load_native, sample_ours, partial(gradient_ours, keep="selective")),
    "full": Contender(load_native, sample_ours, partial(gradient_ours, keep="full")),
    "dense": Contender(load_native, sample_dense, partial(gradient_repeated, logits_dense)),
    "transformers": Contender(
        load_transformers, sample_generate, partial(gradient_repeated, logits_transformers)
    ),
}


# ---- one measurement ---------------------------------------------------------------------------------------------------------


def step(name: str, learner: Learner, work: Work) -> dict[str, float]:
    """One training step of a contender -> seconds of its parts."""
    contender, laps = CONTENDERS[name], Laps()
    groups = contender.sample(learner.policy, work)
    laps.lap("sample")
    contender.gradient(learner.policy, work, unfinished(groups, work), laps)
    norm = apply_update(
        learner.model, learner.policy, learner.optimizer, work.args.lr, work.args.grad_clip
    )
    laps.lap("update")
    if not norm < float("inf"):
        raise TrainingError(
            f"{name}: the gradient's norm is {norm}, no update was made: there is nothing to time"
        )
    total = sum(laps.seconds.values())
    parts = {f"{part}_s": seconds for part, seconds in laps.seconds.items()}
    return parts | {"score_update_s": total - parts["sample_s"], "total_s": total}


def unfinished(groups: list[list[Trace]], work: Work) -> list[list[Trace]]:
    """One trace in V happens to end with the marker: it gets another last token, so that all rows have one length."""
    for trace in (trace for group in groups for trace in group):
        if len(trace.ids) != work.args.max_trace:
            raise TrainingError(
                f"a trace of {len(trace.ids)} tokens where {work.args.max_trace} were asked for"
            )
        trace.ids[-1] += trace.ids[-1] == work.marker
    return groups


def gradients(
    name: str, model: nn.Module, work: Work, groups: list[list[Trace]]
) -> dict[str, Tensor]:
    """A contender's gradient of the loss on given traces, by the tensors' Hugging Face names."""
    CONTENDERS[name].gradient(model, work, groups, Laps())
    found = {
        name if name.startswith("model.") else file_name(name): p.grad.cpu()
        for name, p in model.named_parameters()
    }
    model.zero_grad()
    return found


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """|a - b| / |b| over all parameters."""
    apart = sum((a[name] - b[name]).double().square().sum() for name in b)
    return float((apart / sum(tensor.double().square().sum() for tensor in b.values())).sqrt())


def agreement(names: list[str], learners: dict[str, Learner], work: Work) -> dict[str, float]:
    """Every peer's gradient beside ours, on one question with the same traces, from the fp32 weights: what a copy rounds does not show."""
    one = replace(work, examples=work.examples[:1])
    groups = unfinished(sample_ours(learners["ours"].policy, one), one)
    exact = gradients("ours", learners["ours"].model, one, groups)
    return {
        name: difference(gradients(name, learners[name].model, one, groups), exact)
        for name in names
        if name != "ours"
    }


def memory(name: str, work: Work) -> dict[str, float]:
    learner = CONTENDERS[name].load(work.args)
    loaded = held_mb(work.args.device)
    step(name, learner, work)
    return {"loaded_mb": loaded, "peak_mb": peak_mb(work.args.device)}


def memory_elsewhere(name: str, flags: argparse.Namespace) -> dict[str, float]:
    """`memory` in a process of its own, which holds nothing of another contender's."""
    settings = (
        "model",
        "questions",
        "traces",
        "prompt",
        "new",
        "answer",
        "dtype",
        "device",
        "seed",
    )
    command = [
        sys.executable,
        __file__,
        *(f"--{key}={getattr(flags, key)}" for key in settings),
        f"--only={name}",
        "--memory",
        "--json",
    ]
    child = subprocess.run(command, capture_output=True, text=True)
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    last = (child.stderr.strip().splitlines() or [""])[-1]
    if child.returncode == 2:
        raise InputError(last.removeprefix("error: "))
    raise TrainingError(
        "out of memory"
        if "OutOfMemory" in last or child.returncode == -9
        else last[:100] or f"exit code {child.returncode}"
    )


def load_once(names: list[str], work: Work) -> dict[str, Learner]:
    loaded = {
        load: load(work.args) for load in dict.fromkeys(CONTENDERS[name].load for name in names)
    }
    return {name: loaded[CONTENDERS[name].load] for name in names}


def measure(names: list[str], flags: argparse.Namespace, work: Work) -> dict:
    """Memory, agreement, then the times -> {name: figures, "ratios": ..., "rows": every timed step}."""
    figures: dict[str, dict] = {name: {} for name in names}
    for name in names:
        say(f"memory: {name}")
        try:
            figures[name] |= memory_elsewhere(name, flags)
        except (
            TrainingError
        ) as error:  # a contender that fails says so in its row, it is not the end of the benchmark
            figures[name]["note"] = str(error)
    alive = [name for name in names if "note" not in figures[name]]
    try:
        learners = load_once(alive, work)
        if "ours" in alive and len(alive) > 1:
            say("agreement")
            for name, apart in agreement(alive, learners, work).items():
                figures[name]["gradient_difference"] = apart
    except torch.OutOfMemoryError:
        raise TrainingError(
            "out of memory: the contenders do not fit beside each other; time one after the other with --only"
        ) from None
    rows = []
    for round_ in range(-1, flags.rounds):
        say(f"round {round_ + 1} of {flags.rounds}" if round_ >= 0 else "warm-up")
        first = round_ % max(1, len(alive))
        for name in alive[first:] + alive[:first]:  # nobody always runs after the same neighbour
            try:
                parts = step(name, learners[name], work)
            except torch.OutOfMemoryError:  # it fits alone, but not beside the other contenders
                figures[name]["note"] = "out of memory beside the others: try --only"
                alive.remove(name)
                for parameter in (
                    *learners[name].model.parameters(),
                    *learners[name].policy.parameters(),
                ):
                    parameter.grad = parameter.main_grad = (
                        None  # half a step's gradients, which others who share them should not find
                    )
                torch.cuda.empty_cache()
                continue
            if round_ >= 0:
                rows.append({"name": name, "round": round_ + 1} | parts)
    for name in alive:
        timed = [row for row in rows if row["name"] == name]
        figures[name] |= {
            key: statistics.median(row[key] for row in timed)
            for key in timed[0]
            if key.endswith("_s")
        }
        figures[name]["tokens_per_s"] = (
            flags.questions * flags.traces * flags.new / figures[name]["total_s"]
        )
    ratios = {
        name: ratio(figures[name], figures["ours"])
        for name in alive
        if name != "ours" and "ours" in alive
    }
    return figures | {"ratios": ratios, "rows": rows}


def ratio(peer: dict, ours: dict) -> dict[str, float]:
    return {
        key: peer[key] / ours[key] for key in ("sample_s", "score_update_s", "total_s", "peak_mb")
    }


# ---- the sweep -----------------------------------------------------------------------------------------------------------------


def sweep(flags: argparse.Namespace, vocab: int, axes: dict[str, tuple[int, ...]]) -> list[dict]:
    """Ours at every value of every axis, the others at their base -> a row each, with the two ways of counting its tokens."""
    points = [{"axis": axis, axis: value} for axis, values in axes.items() for value in values]
    rows = [
        {key: getattr(flags, key) for key in ("questions", "traces", "prompt", "new", "answer")}
        | point
        for point in points
    ]
    work = [make_work(argparse.Namespace(**vars(flags) | row), vocab) for row in rows]
    learner = CONTENDERS["ours"].load(work[0].args)
    times: list[list[dict]] = [[] for _ in rows]
    for round_ in range(-1, flags.rounds):
        say(f"round {round_ + 1} of {flags.rounds}" if round_ >= 0 else "warm-up")
        for timed, one in zip(times, work, strict=True):
            timed.append(step("ours", learner, one))
    for row, (_, *timed) in zip(rows, times, strict=True):  # the first warmed up
        row |= {
            key: statistics.median(one[key] for one in timed)
            for key in ("sample_s", "score_update_s", "total_s")
        }
        branches = row["traces"] * (row["new"] + row["answer"])
        row["tokens_prompt_once"] = row["questions"] * (row["prompt"] + branches)
        row["tokens_prompt_repeated"] = row["questions"] * (
            row["traces"] * row["prompt"] + branches
        )
        for count in ("once", "repeated"):
            row[f"s_per_1000_{count}"] = 1000 * row["total_s"] / row[f"tokens_prompt_{count}"]
    return rows


def growth(rows: list[dict]) -> list[str]:
    """Per axis: by how much the times grew from its first value to its last, and by how much the two counts did."""
    keys = {"sample": "sample_s", "after": "score_update_s", "total": "total_s"}
    keys |= {"P + K (n + T)": "tokens_prompt_once", "K (P + n + T)": "tokens_prompt_repeated"}
    lines = []
    for axis in dict.fromkeys(row["axis"] for row in rows):
        first, *_, last = (row for row in rows if row["axis"] == axis)
        grown = "".join(f"   {name} x {last[key] / first[key]:5.2f}" for name, key in keys.items())
        lines.append(f"{axis + f' {first[axis]} -> {last[axis]}':20s}{grown}")
    return lines


# ---- the command -------------------------------------------------------------------------------------------------------------


def figure(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(names: list[str], result: dict) -> list[str]:
    """A line per contender, then one per peer with the peer's figure divided by ours."""
    keys = [f"{part}_s" for part in PARTS] + [
        "score_update_s",
        "total_s",
        "tokens_per_s",
        "peak_mb",
        "loaded_mb",
    ]
    titles = [*PARTS.values(), "after sample", "total", "tokens/s", "peak MB", "loaded MB"]
    digits = [3] * (len(PARTS) + 2) + [0] * 3
    lines = [
        f"{'seconds':20s}" + "".join(f"{title:>13s}" for title in titles) + f"{'gradient':>10s}"
    ]
    for name in names:
        row = result[name]
        apart = (
            f"{row['gradient_difference']:10.1e}" if "gradient_difference" in row else f"{'-':>10s}"
        )
        cells = "".join(
            f"{figure(row.get(key), n):>13s}" for key, n in zip(keys, digits, strict=True)
        )
        lines.append(f"{name:20s}{cells}{apart}  {row.get('note', '')}".rstrip())
    for name, row in result["ratios"].items():
        lines.append(
            f"{name + ' / ours':20s}"
            + "".join(
                f"{figure(row.get(key), 2) if key in row else '':>13s}" for key in keys
            ).rstrip()
        )
    return lines


def sweep_table(rows: list[dict]) -> list[str]:
    lines = [
        f"{'':4s}{'K':>4s} {'P':>5s} {'n':>5s} {'sample s':>10s} {'after s':>9s} {'total s':>9s}   "
        f"{'P + K (n + T)':>14s} {'s per 1000':>10s}   {'K (P + n + T)':>14s} {'s per 1000':>10s}"
    ]
    axis = rows[0]["axis"]
    for row in rows:
        lines += [""] * (row["axis"] != axis)
        axis = row["axis"]
        lines.append(
            f"{'':4s}{row['traces']:4d} {row['prompt']:5d} {row['new']:5d} {row['sample_s']:10.3f} {row['score_update_s']:9.3f} "
            f"{row['total_s']:9.3f}   {row['tokens_prompt_once']:14d} {row['s_per_1000_once']:10.3f}   "
            f"{row['tokens_prompt_repeated']:14d} {row['s_per_1000_repeated']:10.3f}"
        )
    return [*lines, "", *growth(rows)]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=str(ROOT / "examples/hops/base"),
        help="Hugging Face directory (default: the embedded task's)",
    )
    parser.add_argument("--questions", type=int, default=4, help="B, questions a step (4)")
    parser.add_argument("--traces", type=int, default=8, help="K, traces a question (8)")
    parser.add_argument("--prompt", type=int, default=96, help="P, tokens of a prompt (96)")
    parser.add_argument("--new", type=int, default=64, help="n, tokens of a trace (64)")
    parser.add_argument("--answer", type=int, default=48, help="T, tokens of an answer (48)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="bfloat16",
        help="of the computation (bfloat16)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto = cuda if there is one, else cpu",
    )
    parser.add_argument(
        "--peer",
        nargs="+",
        choices=["none", *list(CONTENDERS)[1:]],
        default=["dense"],
        help="beside ours (dense)",
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed steps of each (3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sweep", action="store_true", help="ours alone, as traces, prompt and trace length grow"
    )
    parser.add_argument("--only", choices=list(CONTENDERS), help="this contender alone")
    parser.add_argument(
        "--memory",
        action="store_true",
        help="with --only: one step in this process, and its peak memory",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    parser.add_argument("--save", action="store_true", help="write the result to bench/results/")
    flags = parser.parse_args(argv)
    for name, least in {
        "questions": 1,
        "traces": 2,
        "prompt": 1,
        "new": 1,
        "answer": 1,
        "rounds": 1,
        "seed": 0,
    }.items():
        check_least(
            f"--{name}", getattr(flags, name), least
        )  # K >= 2: an advantage compares the traces of a group
    if "none" in flags.peer and len(flags.peer) > 1:
        raise InputError(f"--peer {' '.join(flags.peer)}: none goes alone")
    if flags.memory and not flags.only:
        raise InputError("--memory needs --only: which contender's?")
    if flags.sweep and flags.only not in (None, "ours"):
        raise InputError(f"--sweep --only {flags.only}: the sweep is of ours alone")
    if "transformers" in (flags.only, *flags.peer) and not find_spec("transformers"):
        raise InputError(
            "the peer transformers needs the transformers library, which is not installed here; dense needs nothing"
        )
    flags.device = check_device(flags.device)
    return flags


def main() -> None:
    flags = parse(sys.argv[1:])
    config = read_config(flags.model)
    names = (
        [flags.only]
        if flags.only
        else ["ours", *dict.fromkeys(peer for peer in flags.peer if peer != "none")]
    )
    if flags.memory:
        used = memory(flags.only, make_work(flags, config.vocab_size))
        print(
            json.dumps(used)
            if flags.json
            else f"peak {used['peak_mb']:.0f} MB, {used['loaded_mb']:.0f} MB of it before the step"
        )
        return
    model_name = Path(flags.model).resolve().name
    result = circumstances(flags.device, *(["transformers"] * ("transformers" in names)))
    settings = ("questions", "traces", "prompt", "new", "answer", "dtype", "rounds")
    result |= {"command": recorded_command("step.py", flags.model), "model": model_name} | {
        key: getattr(flags, key) for key in settings
    }
    if flags.sweep:
        result["rows"] = sweep(flags, config.vocab_size, SWEEP)
        lines = sweep_table(result["rows"])
    else:
        found = measure(names, flags, make_work(flags, config.vocab_size))
        result |= found.get("ours", {}) | {
            name: found[name] for name in names if name != "ours"
        }  # ours stands at the top level
        result |= {"ratios": found["ratios"], "rows": found["rows"]}
        lines = table(names, found)
    lengths = f"{flags.questions} questions x {flags.traces} traces, prompt {flags.prompt}, trace {flags.new}, answer {flags.answer}"
    print(
        f"{headline(result)}\n{model_name}, {flags.dtype}: {lengths}{' where not swept' * flags.sweep}; medians of {flags.rounds}"
    )
    print("\n".join(lines))
    if flags.save:
        print(
            f"wrote {save('step', result, model_name, flags.dtype, 'sweep' if flags.sweep else f'prompt-{flags.prompt}').relative_to(ROOT)}"
        )
    if flags.json:
        print(json.dumps(result))


if __name__ == "__main__":
    exit_on_bad_input(main)()
