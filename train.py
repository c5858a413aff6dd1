"""Native Reasoning Training: a language model learns to think from question-answer pairs alone.

One step (the loop in `train` below):
  1. the next questions x with their gold answers y*                   data.next_examples
  2. K reasoning traces z per question, sampled from the policy        sample.sample_traces
  3. log-probs of y* after every trace and after the empty one         reward.score
  4. reward R_k = f(probabilities of y*), answer weights               aggregate.aggregate
  5. advantage A_k = (R_k - mean) / std over the K traces              aggregate.advantages
  6. loss, backward through the forward of point 3, AdamW              loss_terms, update

    loss = -1/B sum_x 1/K sum_k [ sum_t rho_kt A_k log pi(z_kt | x, z_k<t)         trace term
                                + sum_i omega_ki log c_ki                          answer term
                                + lambda 1[k not finished] log pi(m | x, z_k) ]    marker term
           / 512

x is a question, B the number of questions of one optimizer update. z_k is a trace with the token
that ended it: the marker m, which ends thinking ("finished"), another special token, or none at the
length limit; then m is forced. c_ki is the probability of token i of the gold answer after z_k, m.
f is the method (--aggregator). rho is 1 with one update per step, else the truncated importance
ratio. omega is the answer weight: w = df/dlog c makes this the gradient of J = E[f(c)]
(--answer-weight exact); with omega = 1, the paper's choice, the answer term is supervised learning.

How it differs from the usual GRPO script:
  1. No verifier and no reward model: the reward is made of the gold answer's probabilities.
  2. The answer term trains the answer as well.
  3. Stopping is an action: a sampled marker gets the advantage. A forced marker never does, it only
     gets a cross-entropy of weight lambda.
  4. Sums over tokens are divided by one constant, so that the gradient does not depend on padding,
     micro-batches or the number of processes.
  5. No second forward for old log-probs (the sampler recorded them), none for the null think, which
     is the answer after the empty trace (one more branch that is scored beside the traces).

    python train.py                                       the task in examples/hops, on a laptop
    python train.py --traces 0 --out runs/hops-sft        plain SFT on the same pairs
    python train.py --model DIR --data pairs.jsonl --eval-data held-out.jsonl --lr 2e-6 \\
        --dtype bfloat16 --out runs/mine                  your model, your data
    torchrun --standalone --nproc-per-node 8 train.py ... the same on 8 GPUs

The flags are described in support/args.py.
"""

import math
import shlex
import sys
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aggregate import advantages, aggregate, declares
from data import Example, Pairs, first_examples, next_examples, stream_seed
from support.tokenizer import Tokenizer
from evaluate import evaluate
from model import Config, Transformer
from reward import (
    Scores,
    log_ratio,
    micro_batches,
    prompt_backward,
    prompt_leaves,
    score,
)
from sample import sample_traces
from data import Trace
from model import Prefill, prefill
from support import distributed
from support.args import Args, check_args, hops_defaults, parse_args
from support.run import (
    check_run,
    check_same_input,
    is_finished,
    load_progress,
    open_run,
    save_checkpoint,
    save_final,
)
from support.errors import Interrupted, StopSignals, TrainingError, exit_on_bad_input, python
from support.metrics import Clock, Log, question_figures, step_figures
from support.weights import stored_dtypes

LENGTH_SCALE = 512  # tokens; the one divisor, so that a token's share does not depend on lengths
RATIO_RANGE = (0.8, 1.28)  # of the importance ratio; looser above: unlikely tokens can gain (DAPO)
FORWARD_TOKENS = 8192  # of traces in one forward, at most, unless one trace is longer
MAX_BAD_UPDATES = 3  # NaN or inf gradients this many times in a row end the run
SMALL_MODEL = 5_000_000  # parameters; below, a second CPU thread gains nothing (EXPERIMENTS.md)


# ---- before the loop
def initial_model(args: Args, tokenizer: Tokenizer, dtype: torch.dtype) -> Transformer:
    """The parameters the run starts from.

    A marker whose embedding was never trained starts as a copy of eos (paper, section 4).
    """
    model = distributed.load(args.model, args.device, dtype)
    if tokenizer.marker_is_new or tokenizer.marker_is_reserved:
        distributed.copy_token_rows(model, tokenizer.marker_id, tokenizer.eos_ids[0])
    return model


def fits(args: Args, config: Config, example: Example) -> bool:
    """Whether an example is within the length limits and the positions the model knows."""
    prompt_len, answer_len = len(example.prompt), len(example.answer)
    positions = prompt_len + args.max_trace + 1 + answer_len  # 1 for a forced marker
    return (
        0 < prompt_len <= args.max_prompt
        and answer_len <= args.max_answer
        and positions <= config.max_position_embeddings
    )


# ---- one question: sample, score, reward, advantage
def sample_groups(
    policy: Transformer, tokenizer: Tokenizer, questions: list[Example], step: int, args: Args
) -> list[list[Trace]]:
    """K traces per question. Plain SFT (K = 0) has one: the empty trace with a forced marker."""
    if args.traces == 0:
        return [[Trace([], [], finished=False)] for _ in questions]
    return sample_traces(
        policy,
        [question.prompt for question in questions],
        args.traces,
        args.max_trace,
        args.temperature,
        stop_ids=[tokenizer.marker_id],
        seed=[stream_seed(args.seed, step, question.index) for question in questions],
        cut_ids=tokenizer.cut_ids,
        rows=args.decode_rows,
    )


def in_one_backward(args: Args) -> bool:
    """Whether the K traces of a question run their backward together."""
    return args.micro_traces == 0 or args.micro_traces >= args.traces


def branches_per_forward(args: Args) -> int:
    """A function of the flags alone, so that all ranks run equally many forwards."""
    if not in_one_backward(args):
        return args.micro_traces
    return max(1, FORWARD_TOKENS // args.max_trace)


def score_group(
    policy: Transformer,
    prompt: Prefill | list[int],
    example: Example,
    traces: list[Trace],
    marker: int,
    args: Args,
) -> Scores:
    """Scores of all K traces: log-probs of trace, marker, answer and of the null think's answer."""
    return score(
        policy,
        prompt,
        traces,
        example.answer,
        marker,
        temperature=args.temperature,
        entropy=True,
        micro_traces=branches_per_forward(args),
    )


@torch.no_grad()
def score_without_graph(
    view: Transformer, batch: list[tuple], marker: int, args: Args
) -> list[Scores]:
    """For --micro-traces: advantages need all K rewards, and K graphs may not fit in memory."""
    return [
        score_group(view, example.prompt, example, traces, marker, args)
        for example, traces, _ in batch
    ]


@torch.no_grad()
def frozen_null_logp(view: Transformer, questions: list[Example], marker: int) -> list[Tensor]:
    """null_logp [T] of each question under the parameters the run started from (--null frozen)."""
    return [score(view, q.prompt, [], q.answer, marker).null_logp for q in questions]


def rewards(
    answer_logp: Tensor, null_logp: Tensor, args: Args, text: tuple = ()
) -> tuple[Tensor, Tensor]:
    """answer_logp [K, T], null_logp [T] -> reward [K], exact answer weight w [K, T].

    text: (example, traces, tokenizer), for an aggregator that sees them.
    """
    reward, weight = aggregate(args.aggregator, answer_logp, null_logp, text)
    if args.clip_null:
        null_reward, _ = aggregate(args.aggregator, null_logp[None], null_logp)  # [1]
        weight = weight * (reward > null_reward)[:, None]  # clamped: the derivative is 0
        reward = (reward - null_reward).clamp(min=0)
    return reward, weight


def group_advantages(reward: Tensor, weight: Tensor, args: Args) -> Tensor:
    """reward [K] -> advantage [K]. weight [K, T]: says how exact a reward is (aggregate.py)."""
    if args.traces == 0:  # plain SFT: nothing was sampled
        return torch.zeros_like(reward)
    relative = declares(args.aggregator, "relative")
    return advantages(reward, "none" if relative else args.center, args.scale, weight)


def answer_weights(weight: Tensor, args: Args) -> Tensor:
    """Exact answer weight w [K, T] -> omega [K, T] of --answer-weight; 1 for plain SFT."""
    if args.answer_weight == "exact" and args.traces > 0:
        return weight
    if args.answer_weight == "none" and args.traces > 0:
        return torch.zeros_like(weight)
    return torch.ones_like(weight)


@torch.no_grad()
def held_out_figures(
    model: Transformer,
    initial: Transformer | None,
    tokenizer: Tokenizer,
    held_out: list[Example],
    step: int,
    log: Log,
    args: Args,
) -> dict[str, float]:
    """The figures of evaluate.py. Logs K traces of the first held-out question, scored as in
    training, too: they show how the traces of one question change.
    """
    example, marker = held_out[0], tokenizer.marker_id
    with distributed.gathered_view(model) as view:
        figures = evaluate(view, tokenizer, held_out, args.max_trace)
        (traces,) = sample_groups(view, tokenizer, [example], step, args)
        scores = score(
            view, example.prompt, traces, example.answer, marker, micro_traces=args.micro_traces
        )
    null_logp = scores.null_logp
    if initial is not None:
        with distributed.gathered_view(initial) as view:
            (null_logp,) = frozen_null_logp(view, [example], marker)
    torch.manual_seed(stream_seed(args.seed, step, example.index))  # as in the loop
    text = (example, traces, tokenizer)
    reward, weight = rewards(scores.answer_logp, null_logp, args, text)
    advantage = group_advantages(reward, weight, args)
    log.samples(
        step, tokenizer, example, traces, scores, null_logp, reward, advantage, held_out=True
    )
    return figures


# ---- loss and backward
def loss_terms(
    scores: Scores, traces: list[Trace], advantage: Tensor, omega: Tensor, args: Args
) -> Tensor:
    """One question's share of the loss at the top of this file, for all K traces or m of them.

    advantage [m] and omega [m, T] are constants. -> [trace, answer, marker, null] terms, to be
    summed. The null term is that of --null-loss, 0 by default: a cross-entropy on the null think,
    where it was scored.
    """
    rho = torch.ones_like(scores.trace_logp)  # [m, Z]
    if args.updates > 1:
        rho = truncated_ratio(log_ratio(scores, traces), advantage)
    per_question = args.questions // args.updates * LENGTH_SCALE  # 512 B
    per_trace = per_question * max(1, args.traces)  # 512 B K
    forced = (~scores.finished).to(scores.marker_logp.dtype)  # [m]

    # A coefficient multiplies a log-prob.
    trace_coefficient = rho * advantage[:, None] * scores.trace_mask / per_trace  # [m, Z]
    answer_coefficient = omega / per_trace  # [m, T]
    marker_coefficient = args.marker_weight * forced / per_trace  # [m]
    null_coefficient = args.null_loss / per_question

    trace = (trace_coefficient * scores.trace_logp).sum()
    answer = (answer_coefficient * scores.answer_logp).sum()
    marker = (marker_coefficient * scores.marker_logp).sum()
    null = torch.zeros_like(answer)
    if scores.null_logp is not None:
        null = null_coefficient * scores.null_logp.sum()
    return -torch.stack([trace, answer, marker, null])


def truncated_ratio(log_ratio: Tensor, advantage: Tensor) -> Tensor:
    """rho [K, Z]: pi / pi_sampler per token, clamped to RATIO_RANGE, a constant (as in CISPO).

    A token whose ratio has left the range in the direction its advantage pushes gets 0 (as in PPO).
    """
    low, high = RATIO_RANGE
    ratio = log_ratio.exp()
    gone = torch.where(advantage[:, None] > 0, ratio > high, ratio < low)
    return ratio.clamp(low, high).masked_fill(gone, 0.0)


def backward_in_micro_batches(
    model: Transformer,
    leaves: Prefill,
    example: Example,
    traces: list[Trace],
    marker: int,
    advantage: Tensor,
    omega: Tensor,
    args: Args,
) -> None:
    """The gradient of all K traces, --micro-traces at a time.

    Each micro-batch is scored again with its graph; its backward stops at the prompt's leaves.
    """
    lengths = [len(trace.ids) + len(example.answer) for trace in traces]
    batches = micro_batches(lengths, args.micro_traces)
    if args.null_loss > 0:
        batches.append([])  # the null think alone
    for rows in batches:
        part = [traces[i] for i in rows]
        scores = score(
            model,
            leaves,
            part,
            example.answer,
            marker,
            null=not part,
            temperature=args.temperature,
        )
        loss_terms(scores, part, advantage[rows], omega[rows], args).sum().backward()


# ---- update
def equal_parts(items: list, count: int) -> list[list]:
    """`items` cut into `count` lists of equal length, in order: one per optimizer update."""
    size = len(items) // count
    return [items[i * size : (i + 1) * size] for i in range(count)]


def make_optimizer(model: Transformer, args: Args) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=args.lr,
        betas=(0.9, args.beta2),
        eps=args.eps,
        weight_decay=args.weight_decay,
        fused=True,  # one pass over parameters, gradients and moments, without temporaries
    )


def update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    lr: float,
    grad_clip: float,
) -> float:
    """One AdamW update -> the gradient norm before clipping, over all ranks.

    An update whose norm is not finite is not applied.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    norm = distributed.whole(norm).item()
    if math.isfinite(norm):
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    optimizer.zero_grad()
    return norm


# ---- the loop
def train(args: Args) -> None:
    """Trains, logs, evaluates, writes checkpoints and final/. Every rank runs this function."""
    dtype = getattr(torch, args.dtype)
    check_args(args)
    distributed.start(args.device, dtype, args.timeout)
    if distributed.any_restarted():  # torchrun --max-restarts: continue the same run
        args.resume, args.overwrite = True, False
    out = Path(args.out)
    checkpoint = distributed.on_first_rank(lambda: check_run(out, args))
    tokenizer = Tokenizer(args.model, args.marker, args.prompt_format)
    marker = tokenizer.marker_id
    limits = (args.max_prompt, args.max_answer)
    pairs = Pairs(args.data, tokenizer, *limits)
    held_out_pairs = Pairs(args.eval_data, tokenizer, *limits) if args.eval_data else []

    # Passes with gradients run on `model`, all others on a gathered view of it. In a single fp32
    # process both are a plain Transformer.
    if checkpoint:
        check_same_input(checkpoint, pairs, tokenizer)
        model = distributed.load(checkpoint, args.device)
    else:
        model = initial_model(args, tokenizer, torch.float32)
    model = distributed.shard(model, dtype)
    model.activation_checkpointing = args.activation_checkpointing
    initial = None
    if args.null == "frozen":
        initial = distributed.shard(initial_model(args, tokenizer, dtype), dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if args.device == "cpu" and parameters < SMALL_MODEL:
        torch.set_num_threads(1)
    optimizer = make_optimizer(model, args)
    step, position = load_progress(checkpoint, model, optimizer) if checkpoint else (0, 0)
    if is_finished(out, step, args.steps):
        return distributed.stop()
    row_fits = partial(fits, args, model.config)
    next_examples(pairs, position, 1, args.seed, row_fits)  # refuses data without a row that fits
    held_out = []
    if args.eval_data:
        held_out = first_examples(held_out_pairs, args.eval_questions, row_fits)

    # The input is read and usable: files are written only from here on.
    dtypes = stored_dtypes(args.model)  # of final/
    distributed.on_first_rank(lambda: open_run(out, args))
    log = Log(out, args.steps, last_step=step)
    size = f"{parameters / 1e6:.1f}M parameters"
    left_out = min(args.eval_questions, len(held_out_pairs)) - len(held_out)
    long = f" ({left_out} more are too long)" if left_out else ""
    pairs_line = f"{len(pairs)} pairs{pairs.note()}, {len(held_out)} held out{long}"
    log.print(f"{size}, {pairs_line}\n{hops_defaults(args)}{tokenizer.note}")
    if step == 0 and held_out:
        figures = held_out_figures(model, initial, tokenizer, held_out, 0, log, args)
        log.write({"step": 0} | figures)

    signals = StopSignals()
    bad_updates = 0
    while step < args.steps:
        step += 1
        clock = Clock()
        lr = args.lr * min(1.0, step / max(1.0, args.warmup * args.steps))
        examples, position, skipped = next_examples(
            pairs, position, args.questions, args.seed, row_fits
        )
        own = distributed.own_share(examples)  # this rank's questions
        with distributed.gathered_view(model) as view:
            groups = sample_groups(view, tokenizer, own, step, args)  # K traces each
        clock.lap("sample")
        frozen = [None] * len(own)
        if initial is not None:
            with distributed.gathered_view(initial) as view:
                frozen = frozen_null_logp(view, own, marker)

        figures, norms = [], []
        work = list(zip(own, groups, frozen, strict=True))
        for batch in equal_parts(work, args.updates):
            known = [None] * len(batch)
            if not in_one_backward(args):
                with distributed.gathered_view(model) as view:
                    known = score_without_graph(view, batch, marker, args)
            for (example, traces, null_logp), scores in zip(batch, known, strict=True):
                prompt = prefill(model, [example.prompt])
                leaves = prompt_leaves(prompt)
                if scores is None:
                    scores = score_group(model, leaves, example, traces, marker, args)
                if null_logp is None:
                    null_logp = scores.null_logp.detach()
                # An aggregator may draw random numbers (exact_match): same ones in every run.
                torch.manual_seed(stream_seed(args.seed, step, example.index))
                text = (example, traces, tokenizer)
                reward, weight = rewards(scores.answer_logp.detach(), null_logp, args, text)
                advantage = group_advantages(reward, weight, args)
                omega = answer_weights(weight, args)
                clock.lap("score")
                if example is own[0]:
                    log.samples(
                        step, tokenizer, example, traces, scores, null_logp, reward, advantage
                    )

                losses = loss_terms(scores, traces, advantage, omega, args)
                if in_one_backward(args):
                    losses.sum().backward()
                else:
                    backward_in_micro_batches(
                        model, leaves, example, traces, marker, advantage, omega, args
                    )
                prompt_backward(prompt, leaves)
                clock.lap("update")
                figures.append(
                    question_figures(
                        scores, traces, RATIO_RANGE, reward, advantage, null_logp, losses
                    )
                )
            norms.append(update(model, optimizer, lr, args.grad_clip))
            bad_updates = 0 if math.isfinite(norms[-1]) else bad_updates + 1
            clock.lap("update")

        figures = distributed.all_shares(figures)  # of all ranks
        record = {"step": step} | step_figures(figures, norms) | clock.figures(figures)
        record |= {"lr": lr, "skipped_long": skipped}
        if held_out and (step % args.eval_every == 0 or step == args.steps):
            record |= held_out_figures(model, initial, tokenizer, held_out, step, log, args)
        log.write(record)
        if bad_updates >= MAX_BAD_UPDATES:
            raise TrainingError(
                f"step {step}: loss or gradient not finite {bad_updates} times in a row; "
                f"none of these updates was applied, see {out}"
            )
        stop = max(distributed.gather_objects(signals.number))  # Ctrl-C or SIGTERM, on any rank
        if step % args.save_every == 0 or step == args.steps or stop:
            save_checkpoint(
                out, step, position, pairs.digest, model, tokenizer, optimizer, args.keep
            )
        if stop:
            command = shlex.join([python(), "train.py", "--resume", "--out", str(out)])
            raise Interrupted(f"step {step} is saved; {command} continues after it", stop)

    signals.restore()
    save_final(out, model, tokenizer, dtypes)
    final = out / "final"
    log.print(f"wrote {final}, a Hugging Face directory; try:")
    log.print(f"{python()} sample.py --model {shlex.quote(str(final))} --question ...")
    distributed.stop()


def main() -> None:
    args = parse_args(sys.argv[1:], __doc__)
    with distributed.lost_ranks_are_named():
        train(args)


if __name__ == "__main__":
    exit_on_bad_input(main)()
