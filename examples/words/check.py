"""What a model's traces on word problems are worth: do they compute, or have they only the form?

accuracy, accuracy_null, gain, gain_shuffled     as in evaluate.py, after greedy traces
digits_null             log-prob of the gold number's digits without thinking, nats
digits_gain             what the greedy trace adds to it; digits_gain_shuffled: another question's
accuracy_sampled        share of answers right after traces sampled at --temperature; of these:
steps_right             share with at least one step, and all steps right
worked                  share of those that also end at the gold number
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

from data import Example, Pairs  # noqa: E402
from evaluate import is_right, predict, sample_answers  # noqa: E402
from model import Transformer  # noqa: E402
from reward import score  # noqa: E402
from sample import sample_to_marker, trace_ids  # noqa: E402
from support.args import model_flags, open_model  # noqa: E402
from support.errors import exit_on_bad_input  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402

STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")
MAX_TRACE = 32  # tokens
SAMPLES = 4  # traces of a question


def check_trace(text: str, gold: str) -> tuple[bool, bool]:
    """-> whether its steps are right, and whether they also end at the number of `gold`."""
    steps = STEP.findall(text)
    right = [int(a) + int(sign + b) == int(c) for a, sign, b, c in steps]
    steps_right = bool(steps) and all(right)
    return steps_right, steps_right and steps[-1][-1] == re.search(r"\d+", gold).group()


def digits(model: Transformer, tokenizer: Tokenizer, examples: list[Example]) -> list[tuple]:
    """For each example digits_null, digits_gain and digits_gain_shuffled."""
    prompts = [example.prompt for example in examples]
    greedy = sample_to_marker(model, tokenizer, prompts, 1, MAX_TRACE, 0.0)
    rows = []
    for i, example in enumerate(examples):
        pair = [greedy[i][0], greedy[i - 1][0]]
        scores = score(model, example.prompt, pair, example.answer, tokenizer.marker_id)
        chosen = [tokenizer.decode([token]).strip().isdigit() for token in example.answer]
        null = float(scores.null_logp[chosen].sum())
        after, shuffled = scores.answer_logp[:, chosen].sum(dim=1).tolist()
        rows.append((null, after - null, shuffled - null))
    return rows


def sampled(
    model: Transformer, tokenizer: Tokenizer, examples: list[Example], temperature: float
) -> list[tuple]:
    """For each of SAMPLES traces an example: right, steps_right, worked, trace_len, finished."""
    prompts = [example.prompt for example in examples]
    groups = sample_to_marker(model, tokenizer, prompts, SAMPLES, MAX_TRACE, temperature)
    traces = [trace for group in groups for trace in group]
    asked = [example for example in examples for _ in range(SAMPLES)]
    contexts = [trace_ids(trace, tokenizer.marker_id) for trace in traces]
    answers = sample_answers(model, tokenizer, asked, contexts)
    rows = []
    for example, trace, answer in zip(asked, traces, answers, strict=True):
        checked = check_trace(tokenizer.decode(trace.ids), example.gold)
        right = is_right(tokenizer, example, answer)
        rows.append((right, *checked, len(trace.ids), trace.finished))
    return rows


def means(names: str, rows: list[tuple]) -> dict[str, float]:
    columns = zip(names.split(), zip(*rows, strict=True), strict=True)
    return {name: round(sum(column) / len(column), 4) for name, column in columns}


@torch.no_grad()
def main() -> None:
    parser = model_flags(__doc__)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampled traces")
    parser.add_argument("--data", default=str(ROOT / "runs" / "words-task" / "test.jsonl"))
    parser.add_argument("--limit", type=int, default=200, help="pairs of --data, from the top")
    args = parser.parse_args()
    model, tokenizer = open_model(args, untrained=True)
    examples = list(Pairs(args.data, tokenizer))[: args.limit]
    predicted = predict(model, tokenizer, examples, MAX_TRACE)
    names = "accuracy accuracy_null gain gain_shuffled"
    found = means(names, [tuple(row[name] for name in names.split()) for row in predicted])
    found |= means(
        "digits_null digits_gain digits_gain_shuffled", digits(model, tokenizer, examples)
    )
    names = "accuracy_sampled steps_right worked trace_len finished"
    found |= means(names, sampled(model, tokenizer, examples, args.temperature))
    print(json.dumps(found))


if __name__ == "__main__":
    exit_on_bad_input(main)()
