"""What a model's traces on word problems are worth: do they compute, or have they only the form?

    accuracy, accuracy_null, gain, gain_shuffled     as in evaluate.py, after greedy traces
    digits_null             log-prob of the gold number's digits without thinking, nats
    digits_gain             what the greedy trace adds to it
    digits_gain_shuffled    what another question's greedy trace adds to it

Four traces a question, sampled at --temperature:

    accuracy_sampled        share after which the greedy answer is right
    steps_right             share with at least one step, and all steps right
    worked                  share with all steps right, the last one ending at the gold number
    trace_len, finished     tokens; share ended by the marker

    python examples/words/check.py --model runs/words/final --temperature 0.7    a line of JSON
"""

import json
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import Example  # noqa: E402
from evaluate import is_right, open_examples, predict, sample_answers  # noqa: E402
from model import Transformer  # noqa: E402
from reward import score  # noqa: E402
from sample import sample_to_marker, trace_ids  # noqa: E402
from support.args import model_flags, open_model  # noqa: E402
from support.errors import exit_on_bad_input  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402

STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
SAMPLES = 4  # traces of a question


def check_trace(text: str, gold: str) -> tuple[bool, bool]:
    """-> whether its steps are right, and whether they also end at the number of `gold`."""
    steps = STEP.findall(text)
    right = [int(a) + int(sign + b) == int(c) for a, sign, b, c in steps]
    steps_right = bool(steps) and all(right)
    return steps_right, steps_right and steps[-1][-1] == re.search(r"\d+", gold).group()


def digits(
    model: Transformer, tokenizer: Tokenizer, examples: list[Example], max_trace: int
) -> list[dict]:
    prompts = [example.prompt for example in examples]
    greedy = sample_to_marker(model, tokenizer, prompts, 1, max_trace, 0.0)
    rows = []
    for i, example in enumerate(examples):
        pair = [greedy[i][0], greedy[i - 1][0]]
        scores = score(model, example.prompt, pair, example.answer, tokenizer.marker_id)
        chosen = [tokenizer.decode([token]).strip().isdigit() for token in example.answer]
        null = float(scores.null_logp[chosen].sum())
        own, other = (scores.answer_logp[:, chosen].sum(dim=1) - null).tolist()
        rows.append({"digits_null": null, "digits_gain": own, "digits_gain_shuffled": other})
    return rows


def sampled(model: Transformer, tokenizer: Tokenizer, examples: list[Example], args) -> list[dict]:
    prompts = [example.prompt for example in examples]
    limits = (SAMPLES, args.max_trace, args.temperature, args.seed)
    groups = sample_to_marker(model, tokenizer, prompts, *limits)
    traces = [trace for group in groups for trace in group]
    asked = [example for example in examples for _ in range(SAMPLES)]
    contexts = [trace_ids(trace, tokenizer.marker_id) for trace in traces]
    answers = sample_answers(model, tokenizer, asked, contexts)
    rows = []
    for example, trace, answer in zip(asked, traces, answers, strict=True):
        steps_right, worked = check_trace(tokenizer.decode(trace.ids), example.gold)
        rows.append(
            {
                "accuracy_sampled": is_right(tokenizer, example, answer),
                "steps_right": steps_right,
                "worked": worked,
                "trace_len": len(trace.ids),
                "finished": trace.finished,
            }
        )
    return rows


@exit_on_bad_input
@torch.no_grad()
def main() -> None:
    parser = model_flags(__doc__)
    parser.set_defaults(max_trace=32)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampled traces")
    parser.add_argument("--data", default=str(ROOT / "runs" / "words-task" / "test.jsonl"))
    parser.add_argument("--limit", type=int, default=200, help="pairs of --data, from the top")
    args = parser.parse_args()
    model, tokenizer = open_model(args, untrained=True)
    examples = open_examples(args, model, tokenizer)
    predicted = predict(model, tokenizer, examples, args.max_trace)
    figures = ("accuracy", "accuracy_null", "gain", "gain_shuffled")
    parts = [
        [{name: row[name] for name in figures} for row in predicted],
        digits(model, tokenizer, examples, args.max_trace),
        sampled(model, tokenizer, examples, args),
    ]
    found = {}
    for rows in parts:
        for name in rows[0]:
            found[name] = round(sum(row[name] for row in rows) / len(rows), 4)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
