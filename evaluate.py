"""Held-out figures of a model: is the answer right, and does its own trace raise the gold answer's log-prob?

python evaluate.py --model DIR --data test.jsonl               exact match with and without thinking, gain, trace length
python evaluate.py --model DIR --question Q --gold A           each gold token, coloured by how much thinking raised it
"""

import argparse
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from data import Example, Pairs, Tokenizer
from model import Transformer
from reward import score
from sample import sample_traces, trace_ids
from support.distributed import mean_over_ranks, own_share
from support.errors import InputError, OneLineParser, exit_on_bad_input
from support.weights import load_model


@torch.no_grad()
def evaluate(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: Sequence[Example],
    max_trace: int,
    batch: int = 64,
) -> dict[str, float]:
    """Held-out figures over `examples`, decoding greedily: the answer is right if its text equals the gold answer's.

    eval_accuracy: after a trace of the model's own. eval_accuracy_null: with the empty trace. eval_gain: how much the trace raises the
    gold answer's log-prob, nats per answer. eval_trace_len: tokens.
    """
    marker, totals = tokenizer.marker_id, torch.zeros(4, dtype=torch.float64)
    for start in range(0, len(examples), batch):
        part = examples[start : start + batch]
        thoughts = sample_traces(
            model, [e.prompt for e in part], 1, max_trace, 0.0, [marker], cut_ids=tokenizer.cut_ids
        )
        traces = [trace for (trace,) in thoughts]
        right = answers_right(
            model, tokenizer, part, [trace_ids(trace, marker) for trace in traces]
        )
        right_null = answers_right(model, tokenizer, part, [[marker] for _ in part])
        for example, trace, *rights in zip(part, traces, right, right_null, strict=True):
            scores = score(model, example.prompt, [trace], example.answer, marker)
            gain = scores.answer_logp.sum() - scores.null_logp.sum()
            totals += torch.tensor([*rights, float(gain), len(trace.ids)], dtype=torch.float64)
    names = ("eval_accuracy", "eval_accuracy_null", "eval_gain", "eval_trace_len")
    return dict(zip(names, (totals / len(examples)).tolist(), strict=True))


def evaluate_all(
    policy: Transformer, tokenizer: Tokenizer, held_out: list[Example], max_trace: int
) -> dict[str, float]:
    """The held-out figures of evaluate.py, each rank on its share of the questions."""
    own = own_share(held_out)
    figures = evaluate(policy, tokenizer, own, max_trace) if own else {}
    return mean_over_ranks(figures, len(own))


def answers_right(
    model: Transformer, tokenizer: Tokenizer, examples: Sequence[Example], contexts: list[list[int]]
) -> list[bool]:
    """Whether the greedy answer after prompt + context is the gold answer. More tokens than the gold has cannot be right."""
    prompts = [[*e.prompt, *context] for e, context in zip(examples, contexts, strict=True)]
    longest = max(len(e.answer) for e in examples)
    answers = sample_traces(model, prompts, 1, longest, 0.0, tokenizer.eos_ids)
    return [
        answer.finished
        and len(answer.ids) <= len(e.answer)
        and tokenizer.decode(answer.ids).strip() == tokenizer.decode(e.answer).strip()
        for e, (answer,) in zip(examples, answers, strict=True)
    ]


def main() -> None:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help="Hugging Face directory, a run's final/ for instance"
    )
    parser.add_argument("--question", help="one question to answer")
    parser.add_argument(
        "--gold", help="its gold answer: shows what thinking does to each of its tokens"
    )
    parser.add_argument("--data", help="JSONL file to score instead")
    parser.add_argument("--limit", type=int, default=1000, help="rows of --data to score")
    parser.add_argument("--max-trace", type=int, default=512, help="tokens")
    parser.add_argument("--max-answer", type=int, default=512, help="tokens")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 = greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--marker", help="default: the model directory's own")
    parser.add_argument("--prompt-format", help="default: the model directory's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    if (args.question is None) == (args.data is None):
        raise InputError("give either --question or --data")
    if args.seed < 0:
        raise InputError(f"--seed is {args.seed}, it should be 0 or more")
    tokenizer = Tokenizer(args.model, args.marker, args.prompt_format)
    if tokenizer.marker_is_new:
        raise InputError(
            f"--marker {tokenizer.marker!r} is not in {args.model}'s vocabulary: was this model trained with another?"
        )
    model = load_model(args.model, getattr(torch, args.dtype), args.device)
    if args.data:
        pairs = Pairs(args.data, tokenizer)
        figures = evaluate(
            model, tokenizer, [pairs[i] for i in range(min(args.limit, len(pairs)))], args.max_trace
        )
        print("\n".join(f"{name} {value:.4g}" for name, value in figures.items()))
    else:
        talk(model, tokenizer, args)


def talk(model: Transformer, tokenizer: Tokenizer, args: argparse.Namespace) -> None:
    """Prints the trace and the answer to one question, and what the trace does to the gold answer."""
    marker = tokenizer.marker_id
    prompt = tokenizer.encode_prompt(
        tokenizer.prompt_format.replace("{question}", args.question.strip())
    )
    if not prompt:
        raise InputError("--question is empty")
    ((trace,),) = sample_traces(
        model, [prompt], 1, args.max_trace, args.temperature, [marker], args.seed, tokenizer.cut_ids
    )
    context = [*prompt, *trace_ids(trace, marker)]
    ((answer,),) = sample_traces(
        model, [context], 1, args.max_answer, args.temperature, tokenizer.eos_ids, args.seed
    )
    print(
        f"trace   {tokenizer.decode(trace.ids, special=True)}"
        + ("" if trace.finished else " [cut: the marker was forced]")
    )
    print(f"answer  {tokenizer.decode(answer.ids)}")
    if args.gold:
        gold = tokenizer.encode_answer(args.gold)
        with torch.no_grad():
            scores = score(model, prompt, [trace], gold, marker)
        print(f"gold    {colour_by_gain(tokenizer, gold, scores.answer_logp[0], scores.null_logp)}")
        think, null = float(scores.answer_logp.sum()), float(scores.null_logp.sum())
        print(
            f"        log-prob {think:.2f} after thinking, {null:.2f} without: gain {think - null:+.2f} nats"
        )


def colour_by_gain(tokenizer: Tokenizer, gold: list[int], logp: Tensor, null_logp: Tensor) -> str:
    """The gold tokens, green where thinking raised their log-prob and red where it lowered it; plain numbers where colours do not show."""
    shown = []
    for token, gain in zip(gold, (logp - null_logp).tolist(), strict=True):
        text = tokenizer.decode([token], special=True)
        if sys.stdout.isatty():
            strength = min(4, int(abs(gain) + 0.5))  # full colour from 3.5 nats
            ground = (16 + 36 * strength, 16 + 6 * strength)[
                gain > 0
            ]  # a step of the terminal's red or green scale
            shown.append(f"\x1b[48;5;{ground}m{text}\x1b[0m" if strength else text)
        else:
            shown.append(f"{text} ({gain:+.1f})")
    return " ".join(shown)


if __name__ == "__main__":
    exit_on_bad_input(main)()
