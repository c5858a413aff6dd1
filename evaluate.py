"""Held-out figures: is the model's answer right, and does its own trace help it?

    eval_accuracy        share of examples whose answer, after a trace, is the gold answer
    eval_accuracy_null   the same after the empty trace (null think): prompt, marker, answer
    eval_gain            log-prob of the gold answer after the trace - after the null think,
                         nats per answer, mean
    eval_gain_shuffled   the same with the trace of the next example: a trace that helps only in
                         general keeps its gain, one about this question loses it
    eval_gain_half       the same with the first half of the trace
    eval_trace_len       tokens of a trace, a sampled marker included, mean

Trace and answer are decoded greedily, so the figures have no random part. An answer is right if it
ends with an eos token, has no more tokens than the gold answer, and has the same text.

    python evaluate.py --model DIR --data test.jsonl          the figures above
    python evaluate.py --model DIR --data d.jsonl --preflight which reward would keep it thinking
                                                              (preflight.py); for a base as well
    python evaluate.py --model DIR --question Q --gold A      trace, answer, and what the trace does
                                                              to each token of the gold answer
"""

import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from data import Example, Pairs, Tokenizer, first_examples, is_text
from model import Transformer
from preflight import preflight_table, sample_group_scores
from reward import score
from sample import Trace, model_flags, open_model, sample_traces, think_and_answer, trace_ids
from support.distributed import all_shares, copy_token_rows, gather_objects, own_share
from support.errors import exit_on_bad_input, printable, require

MOST_TRACES = 10**8
FIGURES = ("accuracy", "accuracy_null", "gain", "gain_shuffled", "gain_half", "trace_len")


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
    marker = tokenizer.marker_id
    own = own_share(range(len(examples)))  # indices
    mine = [examples[i] for i in own]
    traces = all_shares(greedy_traces(model, tokenizer, mine, max_trace, batch))  # of all examples
    totals = dict.fromkeys(FIGURES, 0.0)
    for start in range(0, len(mine), batch):
        part = mine[start : start + batch]
        thoughts = [trace_ids(traces[i], marker) for i in own[start : start + batch]]
        no_thoughts = [[marker] for _ in part]
        totals["accuracy"] += count_right(model, tokenizer, part, thoughts)
        totals["accuracy_null"] += count_right(model, tokenizer, part, no_thoughts)
    for i, example in zip(own, mine, strict=True):
        body = [token for token in traces[i].ids if token != marker]
        other = traces[(i + 1) % len(traces)]
        variants = [traces[i], other, body[: len(body) // 2]]
        scores = score(model, example.prompt, variants, example.answer, marker)
        gains = scores.answer_logp.sum(dim=1) - scores.null_logp.sum()  # [3]
        for name, gain in zip(("gain", "gain_shuffled", "gain_half"), gains.tolist(), strict=True):
            totals[name] += gain
        totals["trace_len"] += len(traces[i].ids)
    shares = gather_objects(totals)  # of all ranks
    return {f"eval_{name}": sum(s[name] for s in shares) / len(examples) for name in FIGURES}


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


def count_right(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    contexts: Sequence[list[int]],
) -> int:
    """How many greedy answers after prompt + context (the trace, with its marker) are right."""
    prompts = [[*e.prompt, *context] for e, context in zip(examples, contexts, strict=True)]
    longest = max(len(example.answer) for example in examples)
    groups = sample_traces(model, prompts, 1, longest, 0.0, stop_ids=tokenizer.eos_ids)
    right = 0
    for example, (answer,) in zip(examples, groups, strict=True):
        # `longest` is another example's limit: what comes out must not depend on the batch.
        if answer.finished and len(answer.ids) <= len(example.answer):
            gold = tokenizer.decode(example.answer).strip()
            right += tokenizer.decode(answer.ids).strip() == gold
    return right


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
    parser.add_argument("--preflight", action="store_true", help="compare rewards on 32 questions")
    parser.add_argument("--traces", type=int, default=8, help="K, traces per question (8)")
    args = parser.parse_args()
    one_question = args.question is not None
    one = one_question != (args.data is not None) and one_question == (args.gold is not None)
    require(one, "give either --data, or --question and --gold")
    require(not (args.preflight and one_question), "--preflight needs --data")
    for name, least in (("limit", 1), ("traces", 2)):
        value = getattr(args, name)
        text = f"--{name} is {value}, it should be {least} to {MOST_TRACES}"
        require(value is None or least <= value <= MOST_TRACES, text)
    model, tokenizer = open_model(args, untrained=args.preflight)
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
        if tokenizer.marker_is_new or tokenizer.marker_is_reserved:
            copy_token_rows(model, tokenizer.marker_id, tokenizer.eos_ids[0])  # as training does
        groups = sample_group_scores(
            model, tokenizer, examples, args.traces, args.max_trace, args.seed
        )
        print("\n".join(preflight_table(groups)))
        return
    for name, value in evaluate(model, tokenizer, examples, args.max_trace).items():
        print(f"{name} {value:.4g}")


if __name__ == "__main__":
    exit_on_bad_input(main)()
