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
"""

import os

# Before torch is imported: waiting threads sleep instead of spinning, which starves whoever shares the cores (10 steps of the embedded
# task took 63 s beside another busy process, and take 13 s like this).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import copy
import json
import math
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aggregate import AGGREGATORS, GROUP_AGGREGATORS, MAX_EXPONENT, advantages, aggregate
from data import Example, Pairs, Tokenizer, next_examples, stream_seed
from errors import InputError, OneLineParser, TrainingError, exit_on_bad_input
from model import Config, Transformer, copy_token_rows, load_model, save_model, stored_dtype, write_json
from reward import Scores, branch_loss, micro_batches, read_prompt, score
from sample import Trace, evaluate, sample_traces

LENGTH_SCALE = 512  # tokens; the one constant that divides every sum over tokens, so that no length weighs more than another
RATIO_RANGE = (0.8, 1.28)  # truncation of pi / pi_sampler: wider above, as unlikely tokens need room to grow (DAPO, CISPO)
MAX_BAD_UPDATES = 3  # NaN or inf this many times in a row is no accident


# ---------------------------------------------------------------------------------------------------------------- arguments
def arg(default: object, reason: str, choices: Sequence[str] | None = None) -> object:
    return field(default=default, metadata={"help": reason, "choices": choices})


@dataclass
class Args:
    """Every flag, its default and the reason for it. The defaults are the embedded task on a CPU; the paper's are in the reasons."""

    model: str = arg("examples/hops/base", "Hugging Face directory to start from")
    data: str = arg("examples/hops/train.jsonl", "question-answer pairs, JSONL")
    eval_data: str = arg("examples/hops/test.jsonl", "held-out pairs; '' = no evaluation (also when only --data is given)")
    out: str = arg("runs/hops", "folder of this run: args.json, log.jsonl, samples.jsonl, checkpoint-*/, final/")
    steps: int = arg(30, "batches of questions; the embedded task is solved after about 10 (paper: 810)")
    questions: int = arg(16, "questions per step (paper: 256)")
    traces: int = arg(8, "K, traces per question, as in the paper; 0 = plain SFT: the empty trace alone, answer cross-entropy")
    aggregator: str = arg("weighted_sum_log_prob", "f, the reward of a trace; the default is the paper's best", list(AGGREGATORS))
    answer_weight: str = arg("fixed", "omega: fixed = 1, the paper's main runs; exact = df/dlog c, the gradient of J", ["fixed", "exact"])
    null: str = arg("policy", "weights that think nothing for null_logp: the current ones, or the initial ones", ["policy", "frozen"])
    null_loss: float = arg(0.0, "weight of an SFT term on the empty trace; > 0 keeps null_logp from drifting off")
    clip_null: bool = arg(False, "reward = max(f - f of the empty trace, 0)")
    center: str = arg("mean", "baseline of the advantage: group mean, leave-one-out mean, none", ["mean", "loo", "none"])
    scale: str = arg("std", "divide advantages by the group's std (GRPO), or not (an unbiased gradient)", ["std", "none"])
    marker_weight: float = arg(0.3, "lambda, cross-entropy on a forced marker, as in the paper")
    updates: int = arg(1, "optimizer updates per step, each on its share of the questions (paper: 4); > 1 turns on the truncated ratio")
    micro_traces: int = arg(0, "traces per backward, 0 = all; fewer = less memory, one more forward pass, the same gradient")
    max_trace: int = arg(48, "tokens a trace may have before the marker is forced (paper: 2048)")
    max_prompt: int = arg(4096, "longer prompts are skipped and counted")
    max_answer: int = arg(2047, "longer answers are skipped and counted (paper: trace + marker + answer <= 4096)")
    temperature: float = arg(1.0, "of sampling; at 1 the trace is drawn from the policy that is trained")
    lr: float = arg(5e-4, "peak learning rate, for a 0.8M model from scratch (paper: 2e-6 for 3B-8B)")
    warmup: float = arg(0.1, "share of the steps with linearly rising learning rate; constant after that")
    weight_decay: float = arg(0.01, "AdamW, paper's value; so are the next three")
    beta2: float = arg(0.95, "AdamW; beta1 is 0.9")
    eps: float = arg(1e-15, "AdamW; gradients divided by 512 are small, the usual 1e-8 would damp them")
    grad_clip: float = arg(1.0, "largest gradient norm of an update")
    seed: int = arg(0, "names every random stream; same seed, same run")
    dtype: str = arg("float32", "compute; weights, gradient sums and optimizer stay fp32", ["float32", "bfloat16"])
    device: str = arg("auto", "auto = cuda if there is one, else cpu")
    resume: bool = arg(False, "continue from the newest checkpoint in --out, bit-identically on a CPU; start anew if there is none")
    overwrite: bool = arg(False, "replace the run that --out holds")
    eval_every: int = arg(5, "steps between evaluations; also before the first and after the last")
    eval_questions: int = arg(200, "held-out questions, from the top of the file")
    save_every: int = arg(10, "steps between checkpoints; also after the last")
    keep: int = arg(2, "checkpoints kept")
    marker: str | None = arg(None, "token between thinking and answer; default: the model directory's, else <|response_start|>")
    prompt_format: str | None = arg(None, "prompt with {question} in it, \\n = newline; default: the model directory's, else Tulu's")


def parse_args(argv: Sequence[str]) -> Args:
    parser = OneLineParser(description=__doc__.split("\n")[0])
    for f in fields(Args):
        flag = "--" + f.name.replace("_", "-")
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=f.metadata["help"])
        else:
            kind = f.type if isinstance(f.type, type) else str
            shown = f.metadata["help"] + f" (default: {f.default})"
            parser.add_argument(flag, type=kind, default=f.default, choices=f.metadata["choices"], help=shown.replace("%", "%%"))
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
    least = {"steps": 1, "questions": 1, "traces": 0, "updates": 1, "micro_traces": 0, "max_trace": 1, "max_prompt": 1, "max_answer": 1}
    least |= {"seed": 0, "eval_every": 1, "eval_questions": 1, "save_every": 1, "keep": 1}
    least |= {"lr": 0, "warmup": 0, "weight_decay": 0, "eps": 0, "null_loss": 0, "marker_weight": 0, "beta2": 0}
    for name, low in least.items():
        if not getattr(args, name) >= low:  # "not >=", so that nan is refused too
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: should be at least {low}")
    for name in ("temperature", "grad_clip"):
        if not getattr(args, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: should be above 0")
    if not args.beta2 < 1 or not args.warmup <= 1:
        raise InputError(f"--beta2 {args.beta2} --warmup {args.warmup}: beta2 should be below 1, warmup at most 1")
    if args.questions % args.updates:
        raise InputError(f"--questions {args.questions} does not divide into --updates {args.updates} equal shares")
    if args.traces == 1 and args.center != "none" and args.aggregator != "jlb_multi":
        raise InputError(f"--traces 1 with --center {args.center}: every advantage would be 0; take --traces 2 or more, or --center none")
    if args.traces == 1 and args.scale != "none":
        raise InputError("--traces 1 with --scale std: one reward has no std; take --scale none")
    if args.clip_null and args.aggregator in GROUP_AGGREGATORS:
        raise InputError(f"--clip-null with --aggregator {args.aggregator}: the empty trace has no reward outside the group")
    if args.traces == 0 and (args.null_loss > 0 or args.clip_null or args.null == "frozen"):
        raise InputError("--traces 0 is plain SFT on the empty trace: --null, --null-loss and --clip-null have no meaning there")
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite contradict each other")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise InputError(f"--device {args.device}: no such device here; cpu is")


# ---------------------------------------------------------------------------------------------------------------- the loop
def train(args: Args) -> None:
    """Runs the whole of it: reads, trains, logs, evaluates, writes checkpoints and final/."""
    tokenizer = Tokenizer(args.model, args.marker, args.prompt_format)
    pairs = Pairs(args.data, tokenizer)
    held_out = Pairs(args.eval_data, tokenizer) if args.eval_data else []
    held_out = [held_out[i] for i in range(min(args.eval_questions, len(held_out)))]

    checkpoint = newest_checkpoint(Path(args.out)) if args.resume else None
    model = load_model(checkpoint, device=args.device) if checkpoint else initial_model(args, tokenizer)  # fp32: trained and saved
    policy = low_precision_twin(model, args.dtype) if args.dtype != "float32" else model  # what samples, scores and collects gradients
    frozen_null = FrozenNull(initial_model(args, tokenizer), args.dtype, tokenizer.marker_id) if args.null == "frozen" else None
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, args.beta2), eps=args.eps, weight_decay=args.weight_decay)
    step, position = load_progress(checkpoint, optimizer, model) if checkpoint else (0, 0)
    row_fits = partial(fits, args, model.config)
    next_examples(pairs, position, 1, args.seed, row_fits)  # refuses if none does
    out = open_run(args)  # not before everything that is read has proved good
    log = Log(out, args, last_step=step)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {len(pairs)} pairs, {len(held_out)} held out\n")

    bad_updates = 0
    if step == 0 and held_out:
        log.write({"step": 0} | evaluate(policy, tokenizer, held_out, args.max_trace))
    while step < args.steps:
        step += 1
        clock = Clock()
        examples, position, skipped = next_examples(pairs, position, args.questions, args.seed, row_fits)
        groups = sample_groups(policy, tokenizer, examples, step, args)
        clock.lap("sample")

        figures, norms = [], []
        lr = args.lr * min(1.0, step / max(1.0, args.warmup * args.steps))
        share = args.questions // args.updates
        for update in range(args.updates):
            for i in range(update * share, (update + 1) * share):
                null_logp = frozen_null(examples[i]) if args.null == "frozen" else None
                figures.append(train_group(policy, examples[i], groups[i], null_logp, tokenizer.marker_id, args, clock))
            norms.append(apply_update(model, policy, optimizer, lr, args.grad_clip))
            bad_updates = 0 if math.isfinite(norms[-1]) else bad_updates + 1
            clock.lap("update")

        record = {"step": step} | summary(figures, norms, args) | {"lr": lr, "skipped_long": skipped} | clock.figures(groups)
        if step % args.eval_every == 0 or step == args.steps:
            record |= evaluate(policy, tokenizer, held_out, args.max_trace) if held_out else {}
        log.write(record)
        log.samples(step, tokenizer, examples[0], groups[0], figures[0])
        if bad_updates >= MAX_BAD_UPDATES:
            raise TrainingError(f"step {step}: loss or gradient not finite {bad_updates} times in a row; none of it was applied, see {out}")
        if step % args.save_every == 0 or step == args.steps:
            save_checkpoint(out, step, position, model, tokenizer, optimizer, args.keep)
    save_final(out, model, tokenizer, args)


def initial_model(args: Args, tokenizer: Tokenizer) -> Transformer:
    """The weights the run starts from, fp32. A marker the vocabulary lacked starts as a copy of eos (paper, section 4)."""
    model = load_model(args.model, device=args.device)
    if tokenizer.marker_is_new:
        copy_token_rows(model, tokenizer.marker_id, tokenizer.eos_ids[0])
    return model


def fits(args: Args, config: Config, example: Example) -> bool:
    """Whether an example is within the length limits, and within the positions the model knows."""
    prompt, answer = len(example.prompt), len(example.answer)
    room = config.max_position_embeddings - args.max_trace - 1
    return prompt <= args.max_prompt and answer <= args.max_answer and prompt + answer <= room


def sample_groups(policy: Transformer, tokenizer: Tokenizer, examples: list[Example], step: int, args: Args) -> list[list[Trace]]:
    """K traces per question. Plain SFT (K = 0) has the one empty trace, whose marker is forced."""
    if args.traces == 0:
        return [[Trace([], [], finished=False)] for _ in examples]
    prompts = [example.prompt for example in examples]
    seeds = [stream_seed(args.seed, step, example.index) for example in examples]
    stop, cut = [tokenizer.marker_id], tokenizer.cut_ids
    return sample_traces(policy, prompts, args.traces, args.max_trace, args.temperature, stop, seeds, cut)


# ---------------------------------------------------------------------------------------------------------------- one question
def train_group(
    policy: Transformer, example: Example, traces: list[Trace], null_logp: Tensor | None, marker: int, args: Args, clock: "Clock"
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
        scores = score(policy, branch_point, traces, example.answer, marker, True, args.temperature, True, micro)
    null_logp = scores.null_logp.detach() if null_logp is None else null_logp
    reward, advantage, weight = judge(scores.answer_logp.detach(), null_logp, args)
    clock.lap("score")

    weights = token_weights(scores, traces, advantage, weight, args)
    losses = loss_terms(scores, weights)
    if whole:
        losses.sum().backward()
    else:
        for batch in micro_batches([len(trace.ids) for trace in traces], args.micro_traces):
            part = [traces[i] for i in batch]
            own = (weights.trace[batch], weights.marker[batch], weights.answer[batch])
            branch_loss(policy, branch_point, part, example.answer, marker, *own, args.temperature).backward()
        if weights.null > 0:
            null_scores = score(policy, branch_point, [], example.answer, marker)
            (-weights.null * null_scores.null_logp.sum()).backward()
        prompt.backward(branch_point)
    clock.lap("update")
    return group_figures(scores, traces, reward, advantage, null_logp, losses.detach())


def judge(logp: Tensor, null_logp: Tensor, args: Args) -> tuple[Tensor, Tensor, Tensor]:
    """logp [K, T], null_logp [T], no graph -> reward [K], advantage [K], answer weight omega [K, T]."""
    reward, exact = aggregate(args.aggregator, logp, null_logp)
    if args.traces == 0:  # plain SFT: nothing was sampled, every answer token weighs 1
        return reward, torch.zeros_like(reward), torch.ones_like(logp)
    if args.clip_null:
        (null_reward,) = aggregate(args.aggregator, null_logp[None], null_logp)[0]
        exact = exact * (reward > null_reward)[:, None]  # where the clip holds, f is flat
        reward = (reward - null_reward).clamp(min=0)
    center = "none" if args.aggregator == "jlb_multi" else args.center  # its reward is an advantage already
    return reward, advantages(reward, center, args.scale), exact if args.answer_weight == "exact" else torch.ones_like(logp)


@dataclass
class TokenWeights:
    """What multiplies each log-prob in one question's share of the loss: constants, the common denominator included."""

    trace: Tensor  # [K, Z] rho A
    answer: Tensor  # [K, T] omega
    marker: Tensor  # [K] lambda where the marker was forced
    null: float  # --null-loss, on every answer token of the empty trace


def token_weights(scores: Scores, traces: list[Trace], advantage: Tensor, answer_weight: Tensor, args: Args) -> TokenWeights:
    """advantage [K] and answer_weight omega [K, T] -> the weights of the loss at the top of this file."""
    rho = truncated_ratio(scores, traces, advantage) if args.updates > 1 else torch.ones_like(scores.trace_logp)
    questions, k = args.questions // args.updates, max(1, args.traces)
    return TokenWeights(
        trace=rho * advantage[:, None] * scores.trace_mask / (questions * k * LENGTH_SCALE),
        answer=answer_weight / (questions * k * LENGTH_SCALE),
        marker=args.marker_weight * (~scores.finished).to(scores.marker_logp.dtype) / (questions * k * LENGTH_SCALE),
        null=args.null_loss / (questions * LENGTH_SCALE),
    )


def loss_terms(scores: Scores, weights: TokenWeights) -> Tensor:
    """One question's share of the loss as [trace, answer, marker, null] terms, to be summed."""
    trace = (weights.trace * scores.trace_logp).sum()
    answer = (weights.answer * scores.answer_logp).sum()
    marker = (weights.marker * scores.marker_logp).sum()
    return -torch.stack([trace, answer, marker, weights.null * scores.null_logp.sum()])


def truncated_ratio(scores: Scores, traces: list[Trace], advantage: Tensor) -> Tensor:
    """rho [K, Z], a constant: pi / pi_sampler per token, clamped to RATIO_RANGE, and 0 where it has left the range already in the
    direction its advantage pushes (CISPO, with the mask at the same bounds)."""
    ratio = (scores.trace_logp.detach() - sampler_logp(traces, scores.trace_logp)).exp()
    low, high = RATIO_RANGE
    gone = torch.where(advantage[:, None] > 0, ratio > high, ratio < low)
    return ratio.clamp(low, high).masked_fill(gone, 0.0)


def sampler_logp(traces: list[Trace], like: Tensor) -> Tensor:
    """The sampler's own record of the traces' log-probs, [K, Z] like `like`, 0 beyond a trace."""
    rows = [trace.logp if trace.cut_id is None else [*trace.logp, trace.cut_logp] for trace in traces]
    return torch.tensor([row + [0.0] * (like.shape[1] - len(row)) for row in rows], dtype=like.dtype, device=like.device)


def apply_update(model: Transformer, policy: Transformer, optimizer: torch.optim.Optimizer, lr: float, grad_clip: float) -> float:
    """One AdamW update -> gradient norm before clipping. A norm that is not finite means: nothing is applied."""
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        if policy is not model:
            with torch.no_grad():
                for low, full in zip(policy.parameters(), model.parameters(), strict=True):
                    low.copy_(full)
    optimizer.zero_grad()
    return norm


def low_precision_twin(model: Transformer, dtype: str) -> Transformer:
    """A copy of the model that computes in `dtype`, while its gradients add up in the fp32 model's.

    bf16 alone would lose the training: with 8 bits, 1 + 2e-6 is 1, and 64 questions' gradients do not add up.
    """
    twin = copy.deepcopy(model).to(getattr(torch, dtype))
    for low, full in zip(twin.parameters(), model.parameters(), strict=True):

        def collect(low: Tensor, full: Tensor = full) -> None:
            full.grad = low.grad.float() if full.grad is None else full.grad.add_(low.grad)
            low.grad = None

        low.register_post_accumulate_grad_hook(collect)
    return twin


class FrozenNull:
    """null_logp under the weights the run started from, computed once per example."""

    def __init__(self, initial: Transformer, dtype: str, marker: int) -> None:
        self.model, self.marker = initial.to(getattr(torch, dtype)), marker
        self.known: dict[int, Tensor] = {}

    @torch.no_grad()
    def __call__(self, example: Example) -> Tensor:
        if example.index not in self.known:
            self.known[example.index] = score(self.model, example.prompt, [], example.answer, self.marker).null_logp
        return self.known[example.index]


# ---------------------------------------------------------------------------------------------------------------- figures
def group_figures(scores: Scores, traces: list[Trace], reward: Tensor, advantage: Tensor, null_logp: Tensor, losses: Tensor) -> dict:
    """What one question contributes to the log; lists have one entry per trace."""
    trace_logp = scores.trace_logp.detach()
    log_ratio = (trace_logp - sampler_logp(traces, trace_logp))[scores.trace_mask]
    ratio, (low, high) = log_ratio.exp(), RATIO_RANGE
    return {
        "reward": reward.tolist(),
        "advantage": advantage.tolist(),
        "think": scores.answer_logp.detach().sum(dim=1).tolist(),
        "null": scores.null_logp.sum().item(),
        "answer_tokens": scores.answer_logp.shape[1],
        "capped": (-null_logp > MAX_EXPONENT).sum().item(),
        "length": [len(trace.ids) for trace in traces],
        "finished": [trace.finished for trace in traces],
        "entropy": scores.entropy.sum().item(),
        "distinct": len({tuple(trace.ids) for trace in traces}) / len(traces),
        "repeats": [repeated_4grams(trace.ids) for trace in traces],
        "ratio_max": ratio.max().item() if len(ratio) else 1.0,
        "clipped": ((ratio < low) | (ratio > high)).sum().item(),
        "gap": log_ratio.abs().max().item() if len(ratio) else 0.0,
        "losses": losses.tolist(),
    }


def repeated_4grams(ids: list[int]) -> float:
    """Share of a trace's 4-grams that occurred in it before: 0 for fresh thought, towards 1 for a loop."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def summary(figures: list[dict], norms: list[float], args: Args) -> dict[str, float]:
    """One step's log line from its questions' figures, in the order they were trained on. Nats, tokens, shares of 1."""

    def every(name: str) -> list[float]:  # one entry per trace of the step
        return [value for f in figures for value in f[name]]

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    def total(name: str) -> float:
        return sum(f[name] for f in figures)

    rewards, lengths = every("reward"), every("length")
    tokens = max(1, sum(lengths))
    trace_loss, answer_loss, marker_loss, null_loss = (sum(f["losses"][i] for f in figures) / args.updates for i in range(4))
    think, null = mean(every("think")), mean([f["null"] for f in figures])
    return {
        "reward_mean": mean(rewards),
        "reward_std": mean([statistics.pstdev(f["reward"]) for f in figures]),  # within a question: what advantages are made of
        "reward_min": min(rewards),
        "reward_max": max(rewards),
        "zero_std_frac": mean([not any(f["advantage"]) for f in figures]),
        "gold_logp_think": think,
        "gold_logp_null": null,
        "gain": think - null,
        "gold_ce": -sum(every("think")) / sum(f["answer_tokens"] * len(f["think"]) for f in figures),
        "null_capped": total("capped"),
        "trace_len_mean": mean(lengths),
        "trace_len_min": min(lengths),
        "trace_len_max": max(lengths),
        "finished_frac": mean(every("finished")),
        "entropy": total("entropy") / tokens,
        "dup_frac": 1 - mean([f["distinct"] for f in figures]),
        "rep_frac": mean(every("repeats")),
        "ratio_max": max(f["ratio_max"] for f in figures),
        "clip_frac": total("clipped") / tokens,
        "sampler_gap": max(f["gap"] for f in figures[: args.questions // args.updates]),  # before the weights have moved
        "trace_loss": trace_loss,
        "answer_loss": answer_loss,
        "marker_loss": marker_loss,
        "null_loss": null_loss,
        "loss": trace_loss + answer_loss + marker_loss + null_loss,
        "grad_norm": mean(norms),
        "bad_updates": sum(not math.isfinite(norm) for norm in norms),
    }


class Clock:
    """Seconds a step spends in each part."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("sample", "score", "update"), 0.0)
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Books the time since the last lap on `part`."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[part] += now - self.last
        self.last = now

    def figures(self, groups: list[list[Trace]]) -> dict[str, float]:
        """tokens_per_s: trace tokens sampled, scored and trained on, per second of the step."""
        tokens = sum(len(trace.ids) for group in groups for trace in group)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_rss()
        return (
            {"tokens_per_s": tokens / sum(self.seconds.values())}
            | {f"sec_{part}": seconds for part, seconds in self.seconds.items()}
            | {"mem_gb": peak / 1e9}
        )


def peak_rss() -> int:
    """Largest resident memory of this process so far, bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Log:
    """log.jsonl (a line per step), samples.jsonl (traces one can read), the console, and tensorboard where it is installed."""

    def __init__(self, out: Path, args: Args, last_step: int) -> None:
        self.out, self.args, self.began, self.first = out, args, time.perf_counter(), last_step
        for name in ("log.jsonl", "samples.jsonl"):
            drop_lines_after(out / name, last_step)
        self.tensorboard = None
        if find_spec("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(out / "tensorboard"), purge_step=last_step + 1)

    def write(self, record: dict) -> None:
        # JSON knows no NaN: a figure that is not finite is null
        record = {name: value if math.isfinite(value) else None for name, value in record.items()}
        append_line(self.out / "log.jsonl", record)
        if self.tensorboard:
            for name, value in record.items():
                if value is not None:
                    self.tensorboard.add_scalar(name, value, record["step"])
        print(self.console_line(record), flush=True)

    def console_line(self, record: dict) -> str:
        step, steps = record["step"], self.args.steps
        parts = [f"step {step:>{len(str(steps))}}/{steps}"]
        shown = {"reward_mean": "reward {:.3f}", "gain": "gain {:+.2f}", "gold_ce": "gold_ce {:.3f}", "trace_len_mean": "trace_len {:.1f}"}
        shown |= {"finished_frac": "finished {:.0%}", "entropy": "entropy {:.2f}", "grad_norm": "grad_norm {:.2g}"}
        shown |= {"eval_accuracy": "| eval_accuracy {:.3f}", "eval_accuracy_null": "without thinking {:.3f}", "eval_gain": "gain {:+.2f}"}
        parts += [shape.format(record[name]) for name, shape in shown.items() if record.get(name) is not None]
        if record.get("bad_updates"):
            parts.append(f"NOT APPLIED: {record['bad_updates']} update(s) not finite")
        if step > self.first:
            left = (time.perf_counter() - self.began) / (step - self.first) * (steps - step)
            parts.append(f"| {left / 60:.0f} min left" if left > 120 else f"| {left:.0f} s left")
        return "  ".join(parts)

    def samples(self, step: int, tokenizer: Tokenizer, example: Example, traces: list[Trace], figures: dict) -> None:
        """The traces of the step's first question, with what they earned."""
        shown = [
            {"trace": tokenizer.decode(trace.ids, special=True), "finished": trace.finished, "reward": reward, "advantage": advantage}
            for trace, reward, advantage in zip(traces, figures["reward"], figures["advantage"], strict=True)
        ]
        append_line(self.out / "samples.jsonl", {"step": step, "question": example.question, "gold": example.gold, "traces": shown})


def append_line(file: Path, record: dict) -> None:
    with open(file, "a") as lines:
        lines.write(json.dumps(record, ensure_ascii=False) + "\n")


def drop_lines_after(file: Path, step: int) -> None:
    """Forgets what an interrupted run logged beyond its last checkpoint (its last line may be half-written): it will be done again."""
    lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
    kept = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] <= step and step > 0]
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_bytes(b"".join(kept))
    temporary.replace(file)


# ---------------------------------------------------------------------------------------------------------------- files of a run
def open_run(args: Args) -> Path:
    """The run's folder, ready to be written to; InputError if it holds a run that neither --resume nor --overwrite was said of."""
    out = Path(args.out)
    holds = [path for pattern in ("log.jsonl", "samples.jsonl", "checkpoint-*", "final*") for path in out.glob(pattern)]
    if holds and not (args.resume or args.overwrite):
        raise InputError(f"--out {out} already holds a run ({holds[0].name}): take another folder, --resume it or --overwrite it")
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in [*(holds if args.overwrite else []), *out.glob("*.tmp")]:  # *.tmp: what a kill left half-written
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = json.loads((out / "args.json").read_text()) if args.resume and (out / "args.json").exists() else {}
        write_json(out / "args.json", asdict(args))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None
    print(" ".join(["python train.py", *(f"--{name.replace('_', '-')} {value!r}" for name, value in asdict(args).items())]))
    for name, value in before.items():
        if name not in ("resume", "overwrite") and getattr(args, name, value) != value:
            print(f"note: --{name.replace('_', '-')} was {value!r} before the interruption")
    return out


def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint of the highest step: a directory has its final name only once all of it is on disk."""
    return max((path for path in out.glob("checkpoint-*") if path.suffix != ".tmp"), default=None)


def save_checkpoint(
    out: Path, step: int, position: int, model: Transformer, tokenizer: Tokenizer, optimizer: torch.optim.Optimizer, keep: int
) -> None:
    """checkpoint-STEP/: a Hugging Face directory (fp32), the optimizer's moments and the data position. The last `keep` stay."""
    names = [name for name, _ in model.named_parameters()]
    moments = {f"{names[index]}.{key}": value for index, state in optimizer.state_dict()["state"].items() for key, value in state.items()}

    def write(folder: Path) -> None:
        save_model(model, folder)
        tokenizer.save(folder)
        save_file(moments, folder / "optimizer.safetensors")
        write_json(folder / "progress.json", {"step": step, "position": position})

    write_directory(out / f"checkpoint-{step:06}", write)
    for old in sorted(path for path in out.glob("checkpoint-*") if path.suffix != ".tmp")[:-keep]:
        doomed = old.rename(old.with_name(old.name + ".tmp"))  # never half a checkpoint under a whole one's name
        shutil.rmtree(doomed)


def load_progress(checkpoint: Path, optimizer: torch.optim.Optimizer, model: Transformer) -> tuple[int, int]:
    """Puts the optimizer's moments back -> (step, data position)."""
    try:
        progress = json.loads((checkpoint / "progress.json").read_text())
        with safe_open(checkpoint / "optimizer.safetensors", framework="pt") as moments:
            state = {
                index: {key: moments.get_tensor(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq")}
                for index, (name, _) in enumerate(model.named_parameters())
            }
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return progress["step"], progress["position"]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{checkpoint}: not a checkpoint that can be resumed: {error}") from None


def save_final(out: Path, model: Transformer, tokenizer: Tokenizer, args: Args) -> None:
    """final/: the trained model, in the precision the initial one was stored in."""

    def write(folder: Path) -> None:
        save_model(model, folder, stored_dtype(args.model))
        tokenizer.save(folder)

    write_directory(out / "final", write)
    print(f"wrote {out / 'final'}, a Hugging Face directory; try: python sample.py --model {out / 'final'} --question ...")


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """All or nothing: written under a temporary name, flushed to disk, renamed."""
    temporary = path.with_name(path.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    write(temporary)
    for file in temporary.iterdir():
        with open(file, "rb") as handle:
            os.fsync(handle.fileno())
    if path.exists():
        shutil.rmtree(path)
    temporary.rename(path)


def main() -> None:
    train(parse_args(sys.argv[1:]))


if __name__ == "__main__":
    exit_on_bad_input(main)()
