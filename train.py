"""Native Reasoning Training: a language model learns to think from question-answer pairs alone.

One step:
  1. the next questions x with their gold answers y*                   data.next_examples
  2. K reasoning traces z per question, sampled from the policy        sample.sample_groups
  3. log-probs of y* after every trace and after the empty one         reward.score
  4. from them, by the method's function f (--aggregator):             aggregate.credit
     reward R_k = f, advantage A_k = (R_k - mean) / std over the K traces, answer weight omega
  5. loss, backward through the forward of point 3                     loss_terms
  6. AdamW                                                             update

Points 3 to 5 are `train_question` below: the algorithm, for one question.

    loss = -1/B sum_x 1/K sum_k [ sum_t rho_kt A_k log pi(z_kt | x, z_k<t)         trace term
                                + sum_i omega_ki log c_ki                          answer term
                                + lambda 1[k not finished] log pi(m | x, z_k) ]    marker term
           / 512

x is a question, B the number of questions of one optimizer update, on all ranks together. z_k are
a trace's tokens; the sum over t also has the one that ended it: the marker m, which ends thinking
("finished"), another special token, or none at the length limit. The answer follows z_k and one m,
the sampled one or a forced one.
c_ki is the probability of token i of the gold answer there, n_i the same after the empty trace (the
null think), whose log-prob is `null_logp`. Traces are sampled and scored at --temperature, answers
at 1. rho is 1 with one update per step, else the truncated importance ratio (reward.py). omega = 1,
the paper's choice, makes the answer term supervised learning; omega = w = df/dlog c makes it the
gradient of J = E[f(c)] (--answer-weight exact --center none --scale none --marker-weight 0; the
group's mean as baseline leaves (K - 1)/K of the trace term).

How it differs from the usual GRPO script:
  1. No verifier and no reward model: the reward is made of the gold answer's probabilities.
  2. The answer term trains the answer as well.
  3. Stopping is an action: a sampled marker gets the advantage. A forced marker never does, it only
     gets a cross-entropy of weight lambda.
  4. Sums over tokens are divided by one constant, so that the gradient does not depend on padding,
     micro-batches or the number of processes.
  5. No forward for old log-probs (the sampler recorded them), and none of its own for the null
     think: it is one more branch beside the traces.

    python train.py                                       the task in examples/hops, on a laptop
    python train.py --traces 0 --out runs/hops-sft        plain SFT on the same pairs
    python train.py --model DIR --data pairs.jsonl --eval-data held-out.jsonl --lr 2e-6 \\
        --dtype bfloat16 --out runs/mine                  your model, your data
    torchrun --standalone --nproc-per-node 8 train.py ... the same on 8 GPUs

The flags are described in support/args.py.
"""

import math
import sys
from functools import partial

import torch
from torch import Tensor

from aggregate import credit, moving_average
from data import Example, Pairs, Trace, first_examples, fits, next_examples, stream_seed
from evaluate import held_out_figures
from model import Transformer, prefill
from reward import Scores, micro_batches, prompt_backward, prompt_leaves, score, truncated_ratio
from sample import sample_groups
from support import distributed
from support.args import Args, check_args, hops_defaults, parse_args
from support.errors import command, exit_on_bad_input, require
from support.metrics import Outcome, now, question_figures, step_figures, time_figures
from support.run import Run
from support.tokenizer import Tokenizer
from support.weights import load_model, load_with_marker

LENGTH_SCALE = 512  # tokens; the one divisor, so that a token's share does not depend on lengths
BETAS = (0.9, 0.95)  # AdamW, the paper's values; so is EPS
EPS = 1e-15  # gradients divided by 512 are small, the usual 1e-8 would damp them
SMALL_MODEL = 5_000_000  # parameters; with fewer a second thread gains little (EXPERIMENTS.md)


# ---- one question
def train_question(
    model: Transformer,
    tokenizer: Tokenizer,
    example: Example,
    traces: list[Trace],
    args: Args,
    initial: Transformer | None = None,
    least_std: float = 0.0,
) -> Outcome:
    """Adds the gradient of one question's share of the loss to the parameters' .grad.

    initial: the model of the null think with --null frozen. least_std: of rewards, below it no
    trace gets an advantage (--filter-std). With --micro-traces the K traces are scored without a
    graph first, as advantages need all K rewards; then again, a few at a time.
    """
    began = now()
    answer, marker, temperature = example.answer, tokenizer.marker_id, args.temperature
    prompt = prefill(model, [example.prompt])
    leaves = prompt_leaves(prompt)  # where the backward passes of the traces end
    batches = micro_batches(traces, args.micro_traces)  # indices of traces; one without the flag
    with torch.set_grad_enabled(len(batches) == 1):
        scores = score(model, leaves, traces, answer, marker, temperature=temperature, entropy=True)
    null_logp = scores.null_logp  # [T]
    if args.null == "frozen":
        with torch.no_grad():
            null_logp = score(initial, example.prompt, [], answer, marker).null_logp
    seen = (example, traces, tokenizer, scores)  # by an aggregator that takes them
    reward, advantage, omega = credit(scores.answer_logp, null_logp, args, seen, least_std)
    score_seconds = now() - began

    losses = []
    for batch in batches:
        own, part = [traces[i] for i in batch], scores
        if len(batches) > 1:
            part = score(model, leaves, own, answer, marker, temperature=temperature, null=False)
        terms = loss_terms(part, own, advantage[batch], omega[batch], args)
        terms.sum().backward()
        losses.append(terms.detach())
    prompt_backward(prompt, leaves)
    credited = (null_logp, reward, advantage)
    return Outcome(example, traces, scores, *credited, sum(losses), score_seconds)


def loss_terms(
    scores: Scores, traces: list[Trace], advantage: Tensor, omega: Tensor, args: Args
) -> Tensor:
    """The share of k traces of one question in the loss at the top of this file.

    advantage [k] and omega [k, T] are constants. -> [trace, answer, marker] terms, to be summed.
    """
    rho = torch.ones_like(scores.trace_logp)  # [k, Z]
    if args.updates > 1:
        rho = truncated_ratio(scores, traces, advantage)
    questions = args.questions // args.updates  # B
    divisor = questions * LENGTH_SCALE * max(1, args.traces)
    forced = (~scores.finished).to(scores.marker_logp.dtype)  # [k]

    # A coefficient multiplies a log-prob.
    trace_coefficient = rho * advantage[:, None] * scores.trace_mask / divisor  # [k, Z]
    answer_coefficient = omega / divisor  # [k, T]
    marker_coefficient = args.marker_weight * forced / divisor  # [k]

    trace = (trace_coefficient * scores.trace_logp).sum()
    answer = (answer_coefficient * scores.answer_logp).sum()
    marker = (marker_coefficient * scores.marker_logp).sum()
    return -torch.stack([trace, answer, marker])


# ---- one step
def train_step(
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    examples: list[Example],
    step: int,
    args: Args,
    initial: Transformer | None = None,
    reward_std: float = 0.0,
) -> tuple[dict[str, float], list[float], Outcome]:
    """Samples K traces per question and trains on them, in one update or several.

    All ranks must call; each has its share of the questions. reward_std: of earlier steps.
    -> the step's figures, the gradient norm of each update, what became of the first question
    """
    began = now()
    questions = distributed.own_share(examples)
    with distributed.gathered_view(model) as view:
        groups = sample_groups(view, tokenizer, questions, step, args)
    sampled = now()
    shown = distributed.Progress(f"step {step}: scoring and training", len(questions), "questions")

    lr = args.lr * min(1.0, step / max(1.0, args.warmup_steps))
    figures, norms, first, score_seconds = [], [], None, 0.0
    for done, (example, traces) in enumerate(zip(questions, groups, strict=True), start=1):
        # An aggregator may draw random numbers (exact_match): same ones in every run.
        torch.manual_seed(stream_seed(args.seed, step, example.index))
        last = done % (len(questions) // args.updates) == 0  # of an update
        distributed.gather_once(model, last)
        # With no trace term yet, no std is large enough.
        least_std = math.inf if step <= args.answers_first else args.filter_std * reward_std
        outcome = train_question(model, tokenizer, example, traces, args, initial, least_std)
        figures.append(question_figures(outcome))
        first = first or outcome
        score_seconds += outcome.score_seconds
        if last:
            norms.append(update(model, optimizer, lr, args.grad_clip))
        shown.update(done)
    update_seconds = now() - sampled - score_seconds

    figures = distributed.all_shares(figures)  # of all ranks
    record = {"step": step, "lr": lr} | step_figures(figures, norms)
    record |= time_figures(figures, sampled - began, score_seconds, update_seconds)
    return record, norms, first


def make_optimizer(model: Transformer, args: Args) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        model.parameters(),
        lr=args.lr,
        betas=BETAS,
        eps=EPS,
        weight_decay=args.weight_decay,
        fused=True,  # one pass over parameters, gradients and moments, without temporaries
    )


def update(
    model: Transformer, optimizer: torch.optim.Optimizer, lr: float, grad_clip: float
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


# ---- the run
def train(args: Args) -> None:
    """Trains, logs, evaluates, writes checkpoints and final/. Every rank runs this function."""
    check_args(args)
    dtype = getattr(torch, args.dtype)
    distributed.start(args.device, dtype)
    run = Run(args)  # refuses what --out cannot be used for
    tokenizer = Tokenizer(args.model, args.marker, args.prompt_format)
    pairs = Pairs(args.data, tokenizer)
    held_out_pairs = Pairs(args.eval_data, tokenizer) if args.eval_data else []

    # Parameters are fp32, in any dtype of the computation.
    if run.checkpoint:
        model = load_model(run.checkpoint, torch.float32, args.device)
    else:
        model = load_with_marker(args.model, tokenizer, torch.float32, args.device)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model = distributed.shard(model, dtype)
    model.recompute = args.recompute
    initial = None
    if args.null == "frozen":
        initial = load_with_marker(args.model, tokenizer, dtype, args.device)
        initial = distributed.shard(initial, dtype)
    optimizer = make_optimizer(model, args)
    run.restore(model, optimizer, tokenizer, pairs)
    if run.is_finished():
        return distributed.stop()
    if args.device == "cpu" and parameters < SMALL_MODEL:
        torch.set_num_threads(1)
    row_fits = partial(
        fits,
        positions=model.config.max_position_embeddings,
        max_trace=args.max_trace,
        max_prompt=args.max_prompt,
        max_answer=args.max_answer,
    )
    next_examples(pairs, run.position, 1, args.seed, row_fits)  # refuses data without a fitting row
    held_out = []
    if args.eval_data:
        held_out = first_examples(held_out_pairs, args.eval_questions, row_fits)
        text = f"--eval-questions {args.eval_questions}: {len(held_out)} fit, fewer than processes"
        require(len(held_out) >= distributed.world_size(), text)

    # The input is read and usable: files are written only from here on.
    log = run.open()
    size = f"{parameters / 1e6:.1f}M parameters"
    rows = f"{len(pairs)} pairs{pairs.note()}, {len(held_out)} held out"
    log.print(f"{size}, {rows}\n{hops_defaults(args)}{tokenizer.note}")
    evaluate = partial(held_out_figures, model, tokenizer, held_out, log, args, initial)
    if run.step == 0 and held_out:
        log.write({"step": 0} | evaluate(0))
    while run.step < args.steps:
        run.step += 1
        examples, run.position, skipped = next_examples(
            pairs, run.position, args.questions, args.seed, row_fits
        )
        record, norms, outcome = train_step(
            model, tokenizer, optimizer, examples, run.step, args, initial, run.reward_std
        )
        run.reward_std = moving_average(run.reward_std, record["reward_std"])
        log.samples(run.step, tokenizer, outcome)
        record["skipped_long"] = skipped
        if held_out and (run.step % args.eval_every == 0 or run.step == args.steps):
            record |= evaluate(run.step)
        log.write(record)
        run.after_step(norms)

    final = run.finish()
    log.print(f"wrote {final}, a Hugging Face directory; try:")
    log.print(command("sample.py", "--model", str(final), "--question", "..."))
    log.track("finish")
    distributed.stop()


def main() -> None:
    train(parse_args(sys.argv[1:], __doc__))


if __name__ == "__main__":
    exit_on_bad_input(main)()
