"""Held-out figures: is the model's answer right, and does its own trace help it?

    eval_accuracy        share of examples whose answer, after a trace, is the gold answer
    eval_accuracy_null   the same after the empty trace (null think): prompt, marker, answer
    eval_f1              F1 of the answer's words against the gold answer's, mean: a softer score
    eval_gain            log-prob of the gold answer after the trace - after the null think,
                         nats per answer, mean
    eval_gain_shuffled   the same with the trace of the next example: a trace that helps only in
                         general keeps its gain, one about this question loses it
    eval_gain_half       the same with the first half of the trace
    eval_trace_len       tokens of a trace, a sampled marker included, mean

Trace and answer are decoded greedily, so the figures have no random part. An answer is right if it
ends with an eos token, has no more tokens than the gold answer, and has the same text. --samples M
adds eval_sampled: the share of right answers among M per question, sampled at temperature 1.
A base without the marker gets it as training does: so it can be scored before and after.

    python evaluate.py --model DIR --data test.jsonl          the figures above
    python evaluate.py ... --predictions FILE --samples 8     and a line per question, as JSON
    python evaluate.py --model DIR --data d.jsonl --preflight which reward would keep it thinking
                                                              (preflight.py); for a base as well
    python evaluate.py --model DIR --question Q --gold A      trace, answer, and what the trace does
                                                              to each token of the gold answer
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from data import Example, Pairs, first_examples, stream_seed
from support.tokenizer import Tokenizer, is_text
from model import Transformer
from preflight import preflight_table, sample_group_scores
from reward import score
from sample import sample_traces, think_and_answer, trace_ids
from data import Trace
from support.args import model_flags, open_model
from support.distributed import all_shares, copy_token_rows, own_share
from support.errors import exit_on_bad_input, printable, require

MOST_TRACES = 10**8
FIGURES = ("accuracy", "accuracy_null", "f1", "gain", "gain_shuffled", "gain_half", "trace_len")


@torch.no_grad()
def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    max_trace: int,
    batch: int = 64,
) -> dict[str, float]:
    """The figures over `examples`, at least one, `batch` of which are decoded together.

    Each rank computes its share on a model that is whole; all ranks must call and get the figures
    of all examples.
    """
    return mean_figures(predict(model, tokenizer, examples, max_trace, batch))


def mean_figures(rows: list[dict]) -> dict[str, float]:
    """Rows of `predict` on each rank -> the figures at the top of this file, of all examples."""
    figures = all_shares([[row[name] for name in FIGURES] for row in rows])
    columns = zip(FIGURES, zip(*figures, strict=True), strict=True)
    return {f"eval_{name}": sum(values) / len(figures) for name, values in columns}


@torch.no_grad()
def predict(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    max_trace: int,
    batch: int = 64,
) -> list[dict]:
    """A row for each example of this rank: question, trace, answer, gold as text, and FIGURES."""
    marker = tokenizer.marker_id
    own = own_share(range(len(examples)))  # indices
    mine = [examples[i] for i in own]
    traces = all_shares(greedy_traces(model, tokenizer, mine, max_trace, batch))  # of all examples
    rows = []
    for start in range(0, len(mine), batch):
        part = mine[start : start + batch]
        thoughts = [trace_ids(traces[i], marker) for i in own[start : start + batch]]
        answers = sample_answers(model, tokenizer, part, thoughts)
        null_answers = sample_answers(model, tokenizer, part, [[marker] for _ in part])
        for example, answer, null_answer in zip(part, answers, null_answers, strict=True):
            text = tokenizer.decode(answer.ids).strip()
            row = {"question": example.question, "answer": text, "gold": example.gold}
            row["accuracy"] = is_right(tokenizer, example, answer)
            row["accuracy_null"] = is_right(tokenizer, example, null_answer)
            row["f1"] = word_f1(text, example.gold)
            rows.append(row)
    for row, i, example in zip(rows, own, mine, strict=True):
        body = [token for token in traces[i].ids if token != marker]
        other = traces[(i + 1) % len(traces)]
        variants = [traces[i], other, body[: len(body) // 2]]
        scores = score(model, example.prompt, variants, example.answer, marker)
        gains = scores.answer_logp.sum(dim=1) - scores.null_logp.sum()  # [3]
        row["gain"], row["gain_shuffled"], row["gain_half"] = gains.tolist()
        row["trace_len"] = len(traces[i].ids)
        row["trace"] = tokenizer.decode(traces[i].ids, special=True)
    return rows


def greedy_traces(
    model: Transformer, tokenizer: Tokenizer, examples: list[Example], max_trace: int, batch: int
) -> list[Trace]:
    traces = []
    for start in range(0, len(examples), batch):
        prompts = [example.prompt for example in examples[start : start + batch]]
        stop, cut = [tokenizer.marker_id], tokenizer.cut_ids
        groups = sample_traces(model, prompts, 1, max_trace, 0.0, stop_ids=stop, cut_ids=cut)
        traces += [trace for (trace,) in groups]
    return traces


def sample_answers(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    contexts: Sequence[list[int]],
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Trace]:
    """An answer after each prompt + context (the trace, with its marker), greedy by default.

    It has no more tokens than the gold answer.
    """
    prompts = [[*e.prompt, *context] for e, context in zip(examples, contexts, strict=True)]
    longest = max(len(example.answer) for example in examples)
    stop = tokenizer.eos_ids
    groups = sample_traces(model, prompts, 1, longest, temperature, stop_ids=stop, seed=seed)
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


def word_f1(answer: str, gold: str) -> float:
    """2 PR / (P + R): the words in common, each as often as in both, over the mean of words."""
    ours, theirs = Counter(answer.split()), Counter(gold.split())
    return 2 * (ours & theirs).total() / max(1, ours.total() + theirs.total())


def sampled_accuracy(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    samples: int,
    max_trace: int,
    seed: int = 0,
) -> float:
    """Share of right answers among `samples` per example, trace and answer at temperature 1."""
    marker = tokenizer.marker_id
    prompts = [example.prompt for example in examples]
    stop, cut = [marker], tokenizer.cut_ids
    groups = sample_traces(
        model, prompts, samples, max_trace, stop_ids=stop, cut_ids=cut, seed=stream_seed(seed, 0)
    )
    repeated = [example for example in examples for _ in range(samples)]
    contexts = [trace_ids(trace, marker) for traces in groups for trace in traces]
    answers = sample_answers(model, tokenizer, repeated, contexts, 1.0, stream_seed(seed, 1))
    right = [is_right(tokenizer, *pair) for pair in zip(repeated, answers, strict=True)]
    return sum(right) / len(right)


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


def main() -> None:
    parser = model_flags(__doc__)
    parser.add_argument("--data", help="JSONL file of question-answer pairs to score")
    parser.add_argument("--limit", type=int, help="pairs of --data, from the top (1000)")
    parser.add_argument("--question", help="one question instead, together with --gold")
    parser.add_argument("--gold", help="its gold answer")
    parser.add_argument("--predictions", type=Path, help="JSONL file to write, a line per pair")
    parser.add_argument("--samples", type=int, help="answers per question for eval_sampled")
    parser.add_argument("--preflight", action="store_true", help="compare rewards on 32 questions")
    parser.add_argument("--traces", type=int, default=8, help="K, traces per question (8)")
    args = parser.parse_args()
    one_question = args.question is not None
    one = one_question != (args.data is not None) and one_question == (args.gold is not None)
    require(one, "give either --data, or --question and --gold")
    of_data = args.preflight or args.predictions or args.samples
    text = "--preflight, --predictions and --samples need --data"
    require(not (of_data and one_question), text)
    if args.predictions:
        folder = args.predictions.parent
        require(folder.is_dir(), f"--predictions {args.predictions}: there is no folder {folder}")
    for name, least in (("limit", 1), ("traces", 2), ("samples", 1)):
        value = getattr(args, name)
        text = f"--{name} is {value}, it should be {least} to {MOST_TRACES}"
        require(value is None or least <= value <= MOST_TRACES, text)
    model, tokenizer = open_model(args, untrained=True)
    if tokenizer.marker_is_new or tokenizer.marker_is_reserved:
        copy_token_rows(model, tokenizer.marker_id, tokenizer.eos_ids[0])  # as training does
    if one_question:
        require(is_text(args.gold), "--gold is empty or no text")
        gold = tokenizer.encode_answer(args.gold)
        prompt, trace = think_and_answer(model, tokenizer, args, len(gold))
        print_gain(model, tokenizer, prompt, trace, gold)
        return
    positions = model.config.max_position_embeddings
    if args.max_trace > positions // 2:
        args.max_trace = positions // 2
        half = f"half of the model's {positions} positions"
        print(f"note: --max-trace {args.max_trace}, {half}", file=sys.stderr)
    pairs = Pairs(args.data, tokenizer, positions, positions)
    count = args.limit or (32 if args.preflight else 1000)

    def fits(example: Example) -> bool:
        length = len(example.prompt) + args.max_trace + 1 + len(example.answer)
        return bool(example.prompt) and length <= positions

    examples = first_examples(pairs, count, fits)
    left_out = min(count, len(pairs)) - len(examples)
    if left_out:
        print(f"note: {left_out} rows are left out: longer than the model", file=sys.stderr)
    if args.preflight:
        step = len(examples) * args.traces * args.max_trace
        require(step <= 10 * MOST_TRACES, f"--traces {args.traces}: {step} tokens are too many")
        groups = sample_group_scores(
            model, tokenizer, examples, args.traces, args.max_trace, args.seed
        )
        print("\n".join(preflight_table(groups)))
        return
    rows = predict(model, tokenizer, examples, args.max_trace)
    for name, value in mean_figures(rows).items():
        print(f"{name} {value:.4g}")
    if args.samples:
        share = sampled_accuracy(
            model, tokenizer, examples, args.samples, args.max_trace, args.seed
        )
        print(f"eval_sampled {share:.4g}")
    if args.predictions:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        args.predictions.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    exit_on_bad_input(main)()
