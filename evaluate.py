"""Held-out figures: is the model's answer right, and does its own trace help it?

    eval_accuracy        share of examples whose answer, after a trace, is the gold answer
    eval_accuracy_null   the same after the empty trace (null think): prompt, marker, answer
    eval_gain            log-prob of the gold answer after the trace - after the null think,
                         nats per answer, mean
    eval_gain_shuffled   the same with the trace of the next example: a trace that helps only in
                         general keeps its gain, one about this question loses it
    eval_trace_len       tokens of a trace, a sampled marker included, mean

Trace and answer are decoded greedily, so the figures have no random part. An answer is right if it
ends with an eos token, has no more tokens than the gold answer, and has the same text.
A base without the marker gets it as training does: so it can be scored before and after.

    python evaluate.py --model DIR --data test.jsonl          the figures above
    python evaluate.py ... --predictions FILE                 and a line per question, as JSON
    python evaluate.py --model DIR --question Q --gold A      trace, answer, and what the trace does
                                                              to each token of the gold answer
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from aggregate import credit
from data import Example, Pairs, Trace, first_examples, fits, stream_seed
from model import Transformer
from reward import score
from sample import sample_groups, sample_to_marker, sample_traces, think_and_answer, trace_ids
from support.args import Args, flag_of, model_flags, open_model
from support.distributed import Progress, all_shares, gathered_view, own_share
from support.errors import exit_on_bad_input, printable, refusing, require
from support.metrics import Log, Outcome
from support.tokenizer import Tokenizer

FIGURES = ("accuracy", "accuracy_null", "gain", "gain_shuffled", "trace_len")


def mean_figures(rows: list[dict]) -> dict[str, float]:
    """Rows of `predict` on each rank -> the figures at the top of this file, of all examples."""
    figures = all_shares([[row[name] for name in FIGURES] for row in rows])
    columns = zip(FIGURES, zip(*figures, strict=True), strict=True)
    return {f"eval_{name}": sum(values) / len(figures) for name, values in columns}


@torch.no_grad()
def held_out_figures(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    log: Log,
    args: Args,
    initial: Transformer | None,
    step: int,
) -> dict[str, float]:
    """The figures during training. Logs K traces of the first example, scored as in training, too:
    they show how the traces of one question change.
    """
    example, marker = examples[0], tokenizer.marker_id
    with gathered_view(model) as view:
        figures = mean_figures(predict(view, tokenizer, examples, args.max_trace))
        (traces,) = sample_groups(view, tokenizer, [example], step, args)
        how = {"temperature": args.temperature, "entropy": True}  # as in train_question
        scores = score(view, example.prompt, traces, example.answer, marker, **how)
    null_logp = scores.null_logp
    if args.null == "frozen":
        null_logp = score(initial, example.prompt, [], example.answer, marker).null_logp
    torch.manual_seed(stream_seed(args.seed, step, example.index))  # as in train_step
    seen = (example, traces, tokenizer, scores)
    reward, advantage, _ = credit(scores.answer_logp, null_logp, args, seen)
    outcome = Outcome(example, traces, scores, null_logp, reward, advantage)
    log.samples(step, tokenizer, outcome, held_out=True)
    return figures


@torch.no_grad()
def predict(
    model: Transformer, tokenizer: Tokenizer, examples: Sequence[Example], max_trace: int
) -> list[dict]:
    """A row for each example of this rank: question, trace, answer, gold as text, and FIGURES.
    The model is whole. All ranks must call."""
    marker = tokenizer.marker_id
    own = own_share(range(len(examples)))  # indices
    mine = [examples[i] for i in own]
    shown = Progress("evaluating", len(own), "questions")
    prompts = [example.prompt for example in mine]
    groups = sample_to_marker(model, tokenizer, prompts, 1, max_trace, temperature=0.0)
    traces = all_shares([trace for (trace,) in groups])  # of all examples
    contexts = [trace_ids(traces[i], marker) for i in own]
    answers = sample_answers(model, tokenizer, mine, contexts)
    null_answers = sample_answers(model, tokenizer, mine, [[marker]] * len(mine))
    rows = []
    for i, example, answer, null_answer in zip(own, mine, answers, null_answers, strict=True):
        shown.update(len(rows))
        pair = [traces[i], traces[(i + 1) % len(traces)]]
        scores = score(model, example.prompt, pair, example.answer, marker)
        gain, shuffled = (scores.answer_logp.sum(dim=1) - scores.null_logp.sum()).tolist()
        rows.append(
            {
                "question": example.question,
                "answer": tokenizer.decode(answer.ids).strip(),
                "gold": example.gold,
                "accuracy": is_right(tokenizer, example, answer),
                "accuracy_null": is_right(tokenizer, example, null_answer),
                "gain": gain,
                "gain_shuffled": shuffled,
                "trace_len": len(traces[i].ids),
                "trace": tokenizer.decode(traces[i].ids, special=True),
            }
        )
    shown.update(len(own))
    return rows


def sample_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    contexts: Sequence[list[int]],
) -> list[Trace]:
    """The greedy answer after each prompt + context (the trace, with its marker).

    It has no more tokens than the gold answer.
    """
    prompts = [[*e.prompt, *context] for e, context in zip(examples, contexts, strict=True)]
    longest = max(len(example.answer) for example in examples)
    stop = tokenizer.eos_ids
    groups = sample_traces(model, prompts, 1, longest, temperature=0.0, stop_ids=stop)
    answers = []
    for example, (answer,) in zip(examples, groups, strict=True):
        # `longest` is another example's limit: what comes out must not depend on the batch.
        limit = len(example.answer)
        ended = answer.finished and len(answer.ids) <= limit
        answers.append(Trace(answer.ids[:limit], answer.logp[:limit], ended))
    return answers


def is_right(tokenizer: Tokenizer, example: Example, answer: Trace) -> bool:
    gold = tokenizer.decode(example.answer).strip()
    return answer.finished and tokenizer.decode(answer.ids).strip() == gold


# ---- one question
@torch.no_grad()
def print_gain(
    model: Transformer, tokenizer: Tokenizer, prompt: list[int], trace: Trace, gold: list[int]
) -> None:
    """Prints the gold answer's tokens and what the trace changes in their log-probs."""
    scores = score(model, prompt, [trace], gold, tokenizer.marker_id)
    logp, null_logp = scores.answer_logp[0], scores.null_logp  # [T] each
    after, without = float(logp.sum()), float(null_logp.sum())
    gain = f"gain {after - without:+.2f} nats"
    print(f"gold    {show_gains(tokenizer, gold, logp - null_logp)}")
    print(f"        log-prob {after:.2f} after thinking, {without:.2f} without: {gain}")


def show_gains(tokenizer: Tokenizer, gold: list[int], gains: Tensor) -> str:
    """The gold tokens, each with its gain in nats [T]: on a terminal as a colour, else in brackets.

    Green: the trace raised the token's log-prob, red: it lowered it, in four shades of one nat.
    """
    shown = []
    for token, gain in zip(gold, gains.tolist(), strict=True):
        text = printable(tokenizer.decode([token], special=True))
        if not sys.stdout.isatty():
            shown.append(f"{text} ({gain:+.1f})")
            continue
        shade = min(4, int(abs(gain) + 0.5))  # 0: below half a nat, no colour
        # The terminal's 256 colours: 16 + 36 red + 6 green + blue, each from 0 to 5.
        colour = 16 + (6 if gain > 0 else 36) * shade
        shown.append(f"\x1b[48;5;{colour}m{text}\x1b[0m" if shade else text)
    return " ".join(shown)


# ---- the command
def open_examples(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer
) -> list[Example]:
    """The first --limit pairs of --data, without those longer than the model's positions."""
    positions = model.config.max_position_embeddings
    if args.max_trace > positions // 2:
        args.max_trace = positions // 2
        half = f"half of the model's {positions} positions"
        print(f"note: --max-trace {args.max_trace}, {half}", file=sys.stderr)

    pairs = Pairs(args.data, tokenizer)
    row_fits = partial(fits, positions=positions, max_trace=args.max_trace)
    examples = first_examples(pairs, args.limit, row_fits)
    left_out = min(args.limit, len(pairs)) - len(examples)
    if left_out:
        print(f"note: {left_out} rows are left out: longer than the model", file=sys.stderr)
    return examples


def main() -> None:
    parser = model_flags(__doc__, question=True)
    parser.add_argument("--data", help="JSONL file of question-answer pairs to score")
    parser.add_argument("--limit", type=int, default=1000, help="pairs of --data, from the top")
    parser.add_argument("--question", help="one question instead, together with --gold")
    parser.add_argument("--gold", help="its gold answer")
    parser.add_argument("--predictions", type=Path, help="JSONL file to write, a line per pair")
    args = parser.parse_args()
    given = [value is not None for value in (args.data, args.question, args.gold)]
    one = given in ([True, False, False], [False, True, True])
    require(one, "give either --data, or --question and --gold")
    require(args.temperature or not args.seed, "--seed has no effect on greedy decoding")
    unused = ("limit", "predictions") if args.data is None else ("max_answer", "temperature")
    where = "with --data" if args.data else "without --data"
    for name in unused:
        default = getattr(args, name) == parser.get_default(name)
        require(default, f"{flag_of(name)} has no effect {where}")
    folder = args.predictions and args.predictions.parent
    there = not folder or folder.is_dir()
    require(there, f"--predictions {args.predictions}: there is no folder {folder}")
    model, tokenizer = open_model(args, untrained=True)
    if args.gold is not None:
        with refusing("--gold"):
            gold = tokenizer.encode_answer(args.gold)
        prompt, trace = think_and_answer(model, tokenizer, args, len(gold))
        print_gain(model, tokenizer, prompt, trace, gold)
        return
    examples = open_examples(args, model, tokenizer)
    rows = predict(model, tokenizer, examples, args.max_trace)
    figures = mean_figures(rows)
    for name, value in figures.items():
        print(f"{name} {value:.4g}")
    if args.predictions:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        args.predictions.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    exit_on_bad_input(main)()
