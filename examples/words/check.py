"""What a model's traces on word problems are worth: whether they compute, or only have the form.

    accuracy          share of answers right after a greedy trace; accuracy_null: without thinking;
                      accuracy_sampled: after traces sampled at --temperature
    worked            share of sampled traces whose steps are all right and end at the gold number;
                      steps_right: with at least one step, and all of them right
    digits_null       log-prob of the gold number's digits without thinking, nats; digits_gain: what
                      the greedy trace adds to it; digits_gain_shuffled: another question's trace
    trace_len         tokens of a sampled trace; finished: share ended by the marker

    python examples/words/check.py --model runs/words/final      a line of JSON
"""

import json
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import Pairs  # noqa: E402
from evaluate import is_right, predict, sample_answers  # noqa: E402
from reward import score  # noqa: E402
from sample import sample_to_marker, trace_ids  # noqa: E402
from support.args import model_flags, open_model  # noqa: E402
from support.errors import exit_on_bad_input  # noqa: E402

STEP = re.compile(r"(\d+) ([+-]) (\d+) = (\d+)")


def check_trace(text: str, gold: str) -> tuple[bool, bool]:
    """-> whether its steps are right, and whether they also end at the number of `gold`."""
    steps = STEP.findall(text)
    right = [int(a) + int(sign + b) == int(c) for a, sign, b, c in steps]
    steps_right = bool(steps) and all(right)
    return steps_right, steps_right and steps[-1][-1] == re.search(r"\d+", gold).group()


@torch.no_grad()
def figures(model, tokenizer, examples, samples: int, max_trace: int, temperature: float) -> dict:
    marker = tokenizer.marker_id
    prompts = [example.prompt for example in examples]
    greedy = sample_to_marker(model, tokenizer, prompts, 1, max_trace, 0.0)
    digits = []
    for i, example in enumerate(examples):
        pair = [greedy[i][0], greedy[i - 1][0]]
        scores = score(model, example.prompt, pair, example.answer, marker)
        texts = [tokenizer.decode([token]).strip() for token in example.answer]
        chosen = [text.isdigit() for text in texts]
        null = scores.null_logp[chosen].sum()
        after, shuffled = scores.answer_logp[:, chosen].sum(dim=1)
        digits.append(torch.stack([null, after - null, shuffled - null]))
    digits_mean = torch.stack(digits).mean(dim=0).tolist()

    groups = sample_to_marker(model, tokenizer, prompts, samples, max_trace, temperature)
    pairs = [(example, trace) for example, group in zip(examples, groups) for trace in group]
    contexts = [trace_ids(trace, marker) for _, trace in pairs]
    asked = [example for example, _ in pairs]
    answers = sample_answers(model, tokenizer, asked, contexts)
    rows = []
    for (example, trace), answer in zip(pairs, answers, strict=True):
        right = is_right(tokenizer, example, answer)
        checked = check_trace(tokenizer.decode(trace.ids), example.gold)
        rows.append((right, *checked, len(trace.ids), trace.finished))
    columns = zip(*rows, strict=True)
    names = ("accuracy_sampled", "steps_right", "worked", "trace_len", "finished")
    found = {name: sum(column) / len(rows) for name, column in zip(names, columns, strict=True)}

    predicted = predict(model, tokenizer, examples, max_trace)
    for name in ("accuracy", "accuracy_null", "gain", "gain_shuffled"):
        found[name] = sum(row[name] for row in predicted) / len(predicted)
    names = ("digits_null", "digits_gain", "digits_gain_shuffled")
    return found | dict(zip(names, digits_mean, strict=True))


def main() -> None:
    parser = model_flags(__doc__, question=False)
    parser.set_defaults(max_trace=32)
    parser.add_argument("--temperature", type=float, default=1.0, help="of the sampled traces")
    parser.add_argument("--data", default=str(ROOT / "runs" / "words-task" / "test.jsonl"))
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--samples", type=int, default=4, help="traces a question")
    args = parser.parse_args()
    model, tokenizer = open_model(args, untrained=True)
    pairs = Pairs(args.data, tokenizer)
    examples = [pairs[i] for i in range(min(args.limit, len(pairs)))]
    found = figures(model, tokenizer, examples, args.samples, args.max_trace, args.temperature)
    print(json.dumps({name: round(value, 4) for name, value in sorted(found.items())}))


if __name__ == "__main__":
    exit_on_bad_input(main)()
