"""What a model's traces on word problems are worth: do they compute, or have they only the form?

After the empty trace, the greedy one, and SAMPLES traces a question at --temperature, means of

    accuracy                the greedy answer is the gold answer
    number_right            its first number is that of the gold answer, whatever else it says
    digits                  log-prob of the gold number's digits, nats
    digits_gain             what the trace adds to it
    digits_gain_shuffled    what another question's trace adds
    steps_right             the trace has at least one step, and all its steps are right
    worked                  and the last one ends at the gold number
    trace_len, finished     tokens; ended by the marker

    python examples/words/check.py --model runs/words/final --temperature 0.7    a line of JSON
"""

import json
import re
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data import Example, Trace  # noqa: E402
from evaluate import is_right, open_examples, sample_answers  # noqa: E402
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
    return steps_right, steps_right and steps[-1][-1] == number(gold)


def number(text: str) -> str | None:
    found = re.search(r"\d+", text)
    return found and found.group()


def figures(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: list[Example],
    groups: list[list[Trace]],
) -> dict[str, float]:
    """The means at the top of this file. groups: equally many traces for each example."""
    marker, rows = tokenizer.marker_id, []
    asked = [example for example, group in zip(examples, groups, strict=True) for _ in group]
    contexts = [trace_ids(trace, marker) for group in groups for trace in group]
    answers = iter(sample_answers(model, tokenizer, asked, contexts))
    for i, (example, group) in enumerate(zip(examples, groups, strict=True)):
        scores = score(model, example.prompt, group + groups[i - 1], example.answer, marker)
        digit = [tokenizer.decode([token]).strip().isdigit() for token in example.answer]
        null = float(scores.null_logp[digit].sum())
        gains = (scores.answer_logp[:, digit].sum(dim=1) - null).view(2, -1)  # [2, K]
        for trace, gain, shuffled in zip(group, *gains.tolist(), strict=True):
            answer = next(answers)
            steps_right, worked = check_trace(tokenizer.decode(trace.ids), example.gold)
            row = {
                "accuracy": is_right(tokenizer, example, answer),
                "number_right": number(tokenizer.decode(answer.ids)) == number(example.gold),
                "digits": null + gain,
                "digits_gain": gain,
                "digits_gain_shuffled": shuffled,
                "steps_right": steps_right,
                "worked": worked,
                "trace_len": len(trace.ids),
                "finished": trace.finished,
            }
            rows.append(row)
    return {name: round(sum(row[name] for row in rows) / len(rows), 4) for name in rows[0]}


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
    prompts = [example.prompt for example in examples]
    greedy = sample_to_marker(model, tokenizer, prompts, 1, args.max_trace, temperature=0.0)
    how = {"temperature": args.temperature, "seed": args.seed}
    sampled = sample_to_marker(model, tokenizer, prompts, SAMPLES, args.max_trace, **how)
    empty = [[Trace([], [], finished=False)]] * len(examples)
    found = {}
    for kind, groups in (("empty", empty), ("greedy", greedy), ("sampled", sampled)):
        found[kind] = figures(model, tokenizer, examples, groups)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
