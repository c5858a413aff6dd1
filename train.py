"""Native Reasoning Training: a language model learns to think from question-answer pairs alone.

One step, top to bottom (one function call each; formulas in aggregate.py and below):
  1. draw questions x with gold answers y*                                  data.next_examples
  2. sample K reasoning traces z per question from the policy               sample.sample_traces
  3. score y* under every trace and under none, prompt read once            reward.score
  4. reward of a trace = f(its answer probabilities); advantage, weight     aggregate.aggregate, .advantages
  5. loss, on the very forward that scored; backward; AdamW

    loss = -1/B sum_x 1/K sum_k [ sum_t rho_kt A_k log pi(z_kt | ...)       the token that ended z included: stopping is learnt
                                + sum_i omega_ki log c_ki                   the gold answer, given the trace
                                + lambda 1[k not finished] log pi(m | x, z_k) ] / 512

How it differs from the usual GRPO script: (1) no verifier or reward model, (2) the answer has a gradient of its own, (3) stopping gets
the advantage, a forced marker only a cross-entropy, (4) sums over tokens divided by one constant, so nothing depends on padding or on
micro-batches, (5) no second pass for old log-probs (the sampler's own record is used) nor K passes for "without thinking".

    python train.py                                                         the embedded task on a laptop, under a minute
    python train.py --traces 0 --out runs/hops-sft                          plain fine-tuning on the same pairs, the baseline
    python train.py --model DIR --data pairs.jsonl --eval-data held-out.jsonl --lr 2e-6 --dtype bfloat16 --out runs/mine
    torchrun --standalone --nproc-per-node 8 train.py --model DIR ...       the same with more hands (distributed.py)
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import DeviceMesh

from aggregate import AGGREGATORS, GROUP_AGGREGATORS, advantages, aggregate
from data import Example, Pairs, Tokenizer, next_examples, stream_seed
from evaluate import evaluate
from model import KEEP, Config, Transformer
from reward import Scores, branch_loss, micro_batches, read_prompt, score
from sample import Trace, sample_traces
from support.checkpoint import (
    first_rank_does,
    load_progress,
    newest_checkpoint,
    open_run,
    save_checkpoint,
    save_final,
)
from support.distributed import (
    compute_copy,
    from_all,
    gather,
    own_share,
    rank,
    reduce_gradients,
    restarted,
    start,
    stop,
    world_size,
)
from support.errors import InputError, OneLineParser, TrainingError, exit_on_bad_input
from support.metrics import Clock, Log, group_figures, summary
from support.weights import copy_token_rows, load_model, whole

LENGTH_SCALE = 512  # tokens; the one constant that divides every sum over tokens, so that no length weighs more than another
RATIO_RANGE = (
    0.8,
    1.28,
)  # truncation of pi / pi_sampler: wider above, as unlikely tokens need room to grow (DAPO, CISPO)
MAX_BAD_UPDATES = 3  # NaN or inf this many times in a row is no accident
SMALL_MODEL = 5_000_000  # parameters; below, two CPU threads gain next to nothing, and starve beside a busy process (EXPERIMENTS.md)


# ---------------------------------------------------------------------------------------------------------------- arguments
def arg(default: object, reason: str, choices: Sequence[str] | None = None) -> object:
    return field(default=default, metadata={"help": reason, "choices": choices})


@dataclass
class Args:
    """Every flag, its default and the reason for it. The defaults are the embedded task on a CPU; the paper's are in the reasons."""

    model: str = arg("examples/hops/base", "Hugging Face directory to start from")
    data: str = arg("examples/hops/train.jsonl", "question-answer pairs, JSONL")
    eval_data: str = arg(
        "examples/hops/test.jsonl",
        "held-out pairs; '' = no evaluation (also when only --data is given)",
    )
    out: str = arg(
        "runs/hops",
        "folder of this run: args.json, log.jsonl, samples.jsonl, checkpoint-*/, final/",
    )
    steps: int = arg(
        30, "batches of questions; the embedded task is solved after about 10 (paper: 810)"
    )
    questions: int = arg(16, "questions per step (paper: 256)")
    traces: int = arg(
        8,
        "K, traces per question, as in the paper; 0 = plain SFT: the empty trace alone, answer cross-entropy",
    )
    aggregator: str = arg(
        "weighted_sum_log_prob",
        "f, the reward of a trace; the default is the paper's best",
        list(AGGREGATORS),
    )
    answer_weight: str = arg(
        "fixed",
        "omega: fixed = 1, the paper's main runs; exact = df/dlog c, the gradient of J",
        ["fixed", "exact"],
    )
    null: str = arg(
        "policy",
        "weights that think nothing for null_logp: the current ones, or the initial ones",
        ["policy", "frozen"],
    )
    null_loss: float = arg(
        0.0, "weight of an SFT term on the empty trace; > 0 keeps null_logp from drifting off"
    )
    clip_null: bool = arg(False, "reward = max(f - f of the empty trace, 0)")
    center: str = arg(
        "mean",
        "baseline of the advantage: group mean, leave-one-out mean, none",
        ["mean", "loo", "none"],
    )
    scale: str = arg(
        "std",
        "divide advantages by the group's std (GRPO), or not (an unbiased gradient)",
        ["std", "none"],
    )
    marker_weight: float = arg(0.3, "lambda, cross-entropy on a forced marker, as in the paper")
    updates: int = arg(
        1,
        "optimizer updates per step, each on its share of the questions (paper: 4); > 1 turns on the truncated ratio",
    )
    micro_traces: int = arg(
        0,
        "traces per backward, 0 = all; fewer = less memory, one more forward pass, the same gradient",
    )
    activation_checkpointing: str = arg(
        "none", "compute again in the backward pass: all but matrix products, or all", list(KEEP)
    )
    max_trace: int = arg(48, "tokens a trace may have before the marker is forced (paper: 2048)")
    slots: int = arg(
        0,
        "traces sampled at a time, 0 = as many as half of the free memory holds; the traces do not depend on it",
    )
    cuda_graphs: bool = arg(
        False,
        "record decode steps as CUDA graphs and replay them; off, as it has not been tried on a GPU yet",
    )
    max_prompt: int = arg(4096, "longer prompts are skipped and counted")
    max_answer: int = arg(
        2047, "longer answers are skipped and counted (paper: trace + marker + answer <= 4096)"
    )
    temperature: float = arg(
        1.0, "of sampling; at 1 the trace is drawn from the policy that is trained"
    )
    lr: float = arg(
        5e-4, "peak learning rate, for a 0.8M model from scratch (paper: 2e-6 for 3B-8B)"
    )
    warmup: float = arg(
        0.1, "share of the steps with linearly rising learning rate; constant after that"
    )
    weight_decay: float = arg(0.01, "AdamW, paper's value; so are the next three")
    beta2: float = arg(0.95, "AdamW; beta1 is 0.9")
    eps: float = arg(
        1e-15, "AdamW; gradients divided by 512 are small, the usual 1e-8 would damp them"
    )
    grad_clip: float = arg(1.0, "largest gradient norm of an update")
    seed: int = arg(0, "names every random stream; same seed, same run")
    dtype: str = arg(
        "float32",
        "compute; weights, gradient sums and optimizer stay fp32",
        ["float32", "bfloat16"],
    )
    device: str = arg("auto", "auto = cuda if there is one, else cpu")
    resume: bool = arg(
        False,
        "continue from the newest checkpoint in --out, bit-identically on a CPU; if there is none, begin",
    )
    overwrite: bool = arg(False, "replace the run that --out holds")
    eval_every: int = arg(5, "steps between evaluations; also before the first and after the last")
    eval_questions: int = arg(200, "held-out questions, from the top of the file")
    save_every: int = arg(10, "steps between checkpoints; also after the last")
    keep: int = arg(2, "checkpoints kept")
    marker: str | None = arg(
        None,
        "token between thinking and answer; default: the model directory's, else <|response_start|>",
    )
    prompt_format: str | None = arg(
        None,
        "prompt with {question} in it, \\n = newline; default: the model directory's, else Tulu's",
    )


def parse_args(argv: Sequence[str]) -> Args:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    for f in fields(Args):
        flag = "--" + f.name.replace("_", "-")
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=f.metadata["help"])
        else:
            kind = f.type if isinstance(f.type, type) else str
            shown = f.metadata["help"] + f" (default: {f.default})"
            parser.add_argument(
                flag,
                type=kind,
                default=f.default,
                choices=f.metadata["choices"],
                help=shown.replace("%", "%%"),
            )
    args = Args(**vars(parser.parse_args(argv)))
    if args.data != Args.data and args.eval_data == Args.eval_data:
        args.eval_data = ""  # the embedded test set says nothing about other data
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.prompt_format:
        args.prompt_format = args.prompt_format.replace("\\n", "\n")
    check_args(args)
    return args


def check_args(args: Args) -> None:
    """InputError naming the flag whose value cannot work, before anything is read or written."""
    least = {
        "steps": 1,
        "questions": 1,
        "traces": 0,
        "updates": 1,
        "micro_traces": 0,
        "max_trace": 1,
        "max_prompt": 1,
        "max_answer": 1,
    }
    least |= {
        "slots": 0,
        "seed": 0,
        "eval_every": 1,
        "eval_questions": 1,
        "save_every": 1,
        "keep": 1,
    }
    least |= {
        "lr": 0,
        "warmup": 0,
        "weight_decay": 0,
        "eps": 0,
        "null_loss": 0,
        "marker_weight": 0,
        "beta2": 0,
    }
    for name, low in least.items():
        if not getattr(args, name) >= low:  # "not >=", so that nan is refused too
            raise InputError(
                f"--{name.replace('_', '-')} {getattr(args, name)}: should be at least {low}"
            )
    for name in ("temperature", "grad_clip"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: should be above 0")
    if not args.beta2 < 1 or not args.warmup <= 1:
        raise InputError(
            f"--beta2 {args.beta2} --warmup {args.warmup}: beta2 should be below 1, warmup at most 1"
        )
    if args.questions % (args.updates * world_size()):
        ranks = f" on each of {world_size()} processes" if world_size() > 1 else ""
        raise InputError(
            f"--questions {args.questions} does not divide into --updates {args.updates} equal shares{ranks}"
        )
    if args.traces == 1 and args.center != "none" and args.aggregator != "jlb_multi":
        raise InputError(
            f"--traces 1 with --center {args.center}: every advantage would be 0; take --traces 2 or more, or --center none"
        )
    if args.traces == 1 and args.scale != "none":
        raise InputError("--traces 1 with --scale std: one reward has no std; take --scale none")
    if args.clip_null and args.aggregator in GROUP_AGGREGATORS:
        raise InputError(
            f"--clip-null with --aggregator {args.aggregator}: the empty trace has no reward outside the group"
        )
    if args.traces == 0 and (args.null_loss > 0 or args.clip_null or args.null == "frozen"):
        raise InputError(
            "--traces 0 is plain SFT on the empty trace: --null, --null-loss and --clip-null have no meaning there"
        )
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite contradict each other")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: no such device here; cpu is")
    if args.cuda_graphs and args.device != "cuda":
        raise InputError(f"--cuda-graphs: there are none on --device {args.device}")


# ---------------------------------------------------------------------------------------------------------------- the loop
def train(args: Args) -> None:
    """Runs the whole of it: reads, trains, logs, evaluates, writes checkpoints and final/. Every rank runs it on its own questions."""
    mesh = start(args.device)
    if any(from_all(restarted())):  # torchrun --max-restarts: the same run, once more
        args.resume, args.overwrite = True, False
    tokenizer = Tokenizer(args.model, args.marker, args.prompt_format)
    pairs = Pairs(args.data, tokenizer)
    held_out = Pairs(args.eval_data, tokenizer) if args.eval_data else []
    held_out = [held_out[i] for i in range(min(args.eval_questions, len(held_out)))]

    out = Path(args.out)
    checkpoint = newest_checkpoint(out) if args.resume else None
    model = (
        load_model(checkpoint, device=args.device, mesh=mesh)
        if checkpoint
        else initial_model(args, tokenizer, mesh)
    )  # fp32: trained
    policy = compute_copy(
        model, getattr(torch, args.dtype)
    )  # what samples, scores and collects gradients; often the model itself
    policy.activation_checkpointing = args.activation_checkpointing
    frozen_null = (
        FrozenNull(initial_model(args, tokenizer), args.dtype, tokenizer.marker_id)
        if args.null == "frozen"
        else None
    )
    if args.device == "cpu" and sum(p.numel() for p in model.parameters()) < SMALL_MODEL:
        torch.set_num_threads(1)
    optimizer = make_optimizer(model, args)
    step, position = load_progress(checkpoint, model, optimizer) if checkpoint else (0, 0)
    row_fits = partial(fits, args, model.config)
    next_examples(pairs, position, 1, args.seed, row_fits)  # refuses if none does
    first_rank_does(
        lambda: open_run(out, asdict(args))
    )  # not before everything that is read has proved good
    log = Log(out, args.steps, last_step=step)
    log.say(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(pairs)} pairs, {len(held_out)} held out\n"
    )

    bad_updates = 0
    if step == 0 and held_out:
        log.write({"step": 0} | evaluate_together(policy, tokenizer, held_out, args.max_trace))
    while step < args.steps:
        step += 1
        clock = Clock()
        examples, position, skipped = next_examples(
            pairs, position, args.questions, args.seed, row_fits
        )
        share = (
            args.questions // args.updates
        )  # questions of one update, of which every rank takes its own
        own = [
            examples[update * share : (update + 1) * share][own_share(share)]
            for update in range(args.updates)
        ]
        groups = sample_groups(
            policy, tokenizer, [example for part in own for example in part], step, args
        )
        clock.lap("sample")

        figures, norms, sampled = [], [], iter(groups)
        lr = args.lr * min(1.0, step / max(1.0, args.warmup * args.steps))
        for part in own:
            figures.append([])
            for example in part:
                null_logp = frozen_null(example) if args.null == "frozen" else None
                figures[-1].append(
                    train_group(
                        policy, example, next(sampled), null_logp, tokenizer.marker_id, args, clock
                    )
                )
            norms.append(apply_update(model, policy, optimizer, lr, args.grad_clip))
            bad_updates = 0 if math.isfinite(norms[-1]) else bad_updates + 1
            clock.lap("update")

        everybodys = from_all(
            figures
        )  # [W][updates][questions], put back in the order of the batch
        figures = [
            f for update in range(args.updates) for ranks in everybodys for f in ranks[update]
        ]
        tokens = sum(sum(f["length"]) for f in figures)
        record = (
            {"step": step}
            | summary(figures, norms)
            | {"lr": lr, "skipped_long": skipped}
            | clock.figures(tokens)
        )
        if held_out and (step % args.eval_every == 0 or step == args.steps):
            record |= evaluate_together(policy, tokenizer, held_out, args.max_trace)
        log.write(record)
        log.samples(step, tokenizer, examples[0], groups[0], figures[0])
        if bad_updates >= MAX_BAD_UPDATES:
            raise TrainingError(
                f"step {step}: loss or gradient not finite {bad_updates} times in a row; none of it was applied, see {out}"
            )
        if step % args.save_every == 0 or step == args.steps:
            save_checkpoint(out, step, position, model, tokenizer, optimizer, args.keep)
    save_final(out, model, tokenizer, args.model)
    log.say(
        f"wrote {out / 'final'}, a Hugging Face directory; try: python sample.py --model {out / 'final'} --question ..."
    )
    stop()


def initial_model(args: Args, tokenizer: Tokenizer, mesh: DeviceMesh | None = None) -> Transformer:
    """The weights the run starts from, fp32. A marker the model has never seen starts as a copy of eos (paper, section 4)."""
    model = load_model(args.model, device=args.device, mesh=mesh)
    if tokenizer.marker_is_new or tokenizer.marker_is_reserved:
        copy_token_rows(model, tokenizer.marker_id, tokenizer.eos_ids[0])
    return model


def fits(args: Args, config: Config, example: Example) -> bool:
    """Whether an example is within the length limits, and within the positions the model knows."""
    prompt, answer = len(example.prompt), len(example.answer)
    room = config.max_position_embeddings - args.max_trace - 1
    return prompt <= args.max_prompt and answer <= args.max_answer and prompt + answer <= room


def sample_groups(
    policy: Transformer, tokenizer: Tokenizer, examples: list[Example], step: int, args: Args
) -> list[list[Trace]]:
    """K traces per question. Plain SFT (K = 0) has the one empty trace, whose marker is forced."""
    if args.traces == 0:
        return [[Trace([], [], finished=False)] for _ in examples]
    prompts = [example.prompt for example in examples]
    seeds = [stream_seed(args.seed, step, example.index) for example in examples]
    stop, cut = [tokenizer.marker_id], tokenizer.cut_ids
    return sample_traces(
        policy,
        prompts,
        args.traces,
        args.max_trace,
        args.temperature,
        stop,
        seeds,
        cut,
        args.slots,
        args.cuda_graphs,
    )


def evaluate_together(
    policy: Transformer, tokenizer: Tokenizer, held_out: list[Example], max_trace: int
) -> dict[str, float]:
    """sample.evaluate over all held-out examples, each rank its share of them."""
    own = held_out[rank() :: world_size()]
    parts = from_all((len(own), evaluate(policy, tokenizer, own, max_trace) if own else {}))
    parts = [(count, figures) for count, figures in parts if count]
    return {
        name: sum(count * figures[name] for count, figures in parts) / len(held_out)
        for name in parts[0][1]
    }


# ---------------------------------------------------------------------------------------------------------------- one question
def train_group(
    policy: Transformer,
    example: Example,
    traces: list[Trace],
    null_logp: Tensor | None,
    marker: int,
    args: Args,
    clock: "Clock",
) -> dict:
    """Scores one question's K traces and adds the gradient of its share of the loss -> its figures for the log.

    null_logp [T] is given where it is frozen. With --micro-traces, the K branches are scored without grad first (an advantage needs all
    K rewards); then each micro-batch runs its own backward, into the prompt's keys and values as leaves, and the prompt runs one.
    """
    whole = not 0 < args.micro_traces < len(traces)
    prompt = read_prompt(policy, example.prompt)
    branch_point = prompt if whole else prompt.leaves()
    with torch.set_grad_enabled(whole):
        micro = 0 if whole else args.micro_traces
        scores = score(
            policy,
            branch_point,
            traces,
            example.answer,
            marker,
            True,
            args.temperature,
            True,
            micro,
        )
    null_logp = scores.null_logp.detach() if null_logp is None else null_logp
    reward, advantage, weight = judge(scores.answer_logp.detach(), null_logp, args)
    clock.lap("score")

    log_ratio = scores.trace_logp.detach() - sampler_logp(
        traces, scores.trace_logp
    )  # [K, Z], 0 where all is on-policy
    weights = token_weights(scores, log_ratio, advantage, weight, args)
    losses = loss_terms(scores, weights)
    if whole:
        losses.sum().backward()
    else:
        for batch in micro_batches(
            [len(trace.ids) + len(example.answer) for trace in traces], args.micro_traces
        ):
            part = [traces[i] for i in batch]
            own = (weights.trace[batch], weights.marker[batch], weights.answer[batch])
            branch_loss(
                policy, branch_point, part, example.answer, marker, *own, args.temperature
            ).backward()
        if weights.null > 0:
            null_scores = score(policy, branch_point, [], example.answer, marker)
            (-weights.null * null_scores.null_logp.sum()).backward()
        prompt.backward(branch_point)
    clock.lap("update")
    outside = (log_ratio.exp() < RATIO_RANGE[0]) | (log_ratio.exp() > RATIO_RANGE[1])
    return group_figures(
        scores, traces, log_ratio, outside, reward, advantage, null_logp, losses.detach()
    )


def judge(logp: Tensor, null_logp: Tensor, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """logp [K, T], null_logp [T], no graph -> reward [K], advantage [K], answer weight omega [K, T]."""
    reward, exact = aggregate(args.aggregator, logp, null_logp)
    if args.traces == 0:  # plain SFT: nothing was sampled, every answer token weighs 1
        return reward, torch.zeros_like(reward), torch.ones_like(logp)
    if args.clip_null:
        (null_reward,) = aggregate(args.aggregator, null_logp[None], null_logp)[0]
        exact = exact * (reward > null_reward)[:, None]  # where the clip holds, f is flat
        reward = (reward - null_reward).clamp(min=0)
    center = (
        "none" if args.aggregator == "jlb_multi" else args.center
    )  # its reward is an advantage already
    return (
        reward,
        advantages(reward, center, args.scale),
        exact if args.answer_weight == "exact" else torch.ones_like(logp),
    )


@dataclass
class TokenWeights:
    """What multiplies each log-prob in one question's share of the loss: constants, the common denominator included."""

    trace: Tensor  # [K, Z] rho A
    answer: Tensor  # [K, T] omega
    marker: Tensor  # [K] lambda where the marker was forced
    null: float  # --null-loss, on every answer token of the empty trace


def token_weights(
    scores: Scores, log_ratio: Tensor, advantage: Tensor, answer_weight: Tensor, args: Args
) -> TokenWeights:
    """log_ratio [K, Z], advantage [K], answer_weight omega [K, T] -> the weights of the loss at the top of this file."""
    rho = truncated_ratio(log_ratio, advantage) if args.updates > 1 else torch.ones_like(log_ratio)
    questions, k = args.questions // args.updates, max(1, args.traces)
    return TokenWeights(
        trace=rho * advantage[:, None] * scores.trace_mask / (questions * k * LENGTH_SCALE),
        answer=answer_weight / (questions * k * LENGTH_SCALE),
        marker=args.marker_weight
        * (~scores.finished).to(scores.marker_logp.dtype)
        / (questions * k * LENGTH_SCALE),
        null=args.null_loss / (questions * LENGTH_SCALE),
    )


def loss_terms(scores: Scores, weights: TokenWeights) -> Tensor:
    """One question's share of the loss as [trace, answer, marker, null] terms, to be summed."""
    trace = (weights.trace * scores.trace_logp).sum()
    answer = (weights.answer * scores.answer_logp).sum()
    marker = (weights.marker * scores.marker_logp).sum()
    return -torch.stack([trace, answer, marker, weights.null * scores.null_logp.sum()])


def truncated_ratio(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """rho [K, Z], a constant: pi / pi_sampler per token, clamped to RATIO_RANGE, and 0 where it has left the range already in the
    direction its advantage pushes (CISPO, with the mask at the same bounds)."""
    ratio, (low, high) = log_ratio.exp(), RATIO_RANGE
    gone = torch.where(advantage[:, None] > 0, ratio > high, ratio < low)
    return ratio.clamp(low, high).masked_fill(gone, 0.0)


def sampler_logp(traces: list[Trace], like: Tensor) -> Tensor:
    """The sampler's own record of the traces' log-probs, [K, Z] like `like`, 0 beyond a trace."""
    rows = [
        trace.logp if trace.cut_id is None else [*trace.logp, trace.cut_logp] for trace in traces
    ]
    return torch.tensor(
        [row + [0.0] * (like.shape[1] - len(row)) for row in rows],
        dtype=like.dtype,
        device=like.device,
    )


def make_optimizer(model: Transformer, args: Args) -> torch.optim.AdamW:
    """fused: one pass over weights, gradients and moments, and no temporaries of their size."""
    return torch.optim.AdamW(
        model.parameters(), args.lr, (0.9, args.beta2), args.eps, args.weight_decay, fused=True
    )


def apply_update(
    model: Transformer,
    policy: Transformer,
    optimizer: torch.optim.Optimizer,
    lr: float,
    grad_clip: float,
) -> float:
    """One AdamW update from all ranks' gradients -> their norm before clipping. A norm that is not finite means: nothing is applied."""
    reduce_gradients(model, policy)
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        gather(model, policy)
    optimizer.zero_grad()
    return norm


class FrozenNull:
    """null_logp under the weights the run started from, computed once per example."""

    def __init__(self, initial: Transformer, dtype: str, marker: int) -> None:
        self.model, self.marker = initial.to(getattr(torch, dtype)), marker
        self.known: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, example: Example) -> Tensor:
        if example.index not in self.known:
            self.known[example.index] = score(
                self.model, example.prompt, [], example.answer, self.marker
            ).null_logp
        return self.known[example.index]


def main() -> None:
    train(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    exit_on_bad_input(main)()
