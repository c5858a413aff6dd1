"""One question of the embedded task, looked at: every number of train.py's step, then its proof.

    python examples/one_step.py

First train_question runs on the question and 4 sampled traces, and its parts are printed. The gold
answer is cut to its first 5 tokens, so that all fit; only the fifth needs thought. Then
J = E_z[f(c)] is made small enough to be summed over all traces there are, those of at most 2
tokens. Autograd through the sum gives its gradient, and beside it stands the mean of what
train_question adds to .grad for sampled traces.
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from aggregate import AGGREGATORS, credit  # noqa: E402
from data import Example, Pairs, Trace  # noqa: E402
from model import Transformer  # noqa: E402
from reward import score  # noqa: E402
from sample import sample_groups  # noqa: E402
from support.args import Args  # noqa: E402
from support.errors import OneLineParser, exit_on_bad_input  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
from support.weights import load_with_marker  # noqa: E402
from train import LENGTH_SCALE, train_question  # noqa: E402

EXACT = dict(center="none", scale="none", answer_weight="exact", marker_weight=0.0)
GROUPS = (4, 16, 64)  # of traces, whose gradients are averaged


def row(name: str, values: Tensor, digits: int = 3) -> None:
    print(f"{name:28}" + "".join(f"{value:9.{digits}f}" for value in values.tolist()))


def show(model: Transformer, tokenizer: Tokenizer, example: Example, args: Args) -> None:
    """One call of train_question, in words."""
    [traces] = sample_groups(model, tokenizer, [example], 1, args)
    outcome = train_question(model, tokenizer, example, traces, args)
    scores, null_logp = outcome.scores, outcome.null_logp
    _, _, weight = credit(scores.answer_logp, null_logp, replace(args, answer_weight="exact"))
    print(f"question  {example.question}")
    for k, trace in enumerate(traces):
        print(f"trace {k}   {tokenizer.decode(trace.ids, special=True)}")
    answer = "".join(f"{tokenizer.decode([token]):>9}" for token in example.answer)
    print(f"\n{'log-probs of the answer':28}{answer}")
    for k, logp in enumerate(scores.answer_logp):
        row(f"  log c after trace {k}", logp)
    row("  log n, without a trace", null_logp)
    print("weights of its tokens, df/dlog c (omega with --answer-weight exact; by default 1)")
    for k in range(len(traces)):
        row(f"  after trace {k}", weight[k])
    print(f"\n{'of each trace':28}" + "".join(f"{k:9}" for k in range(len(traces))))
    row("  log pi of its tokens", scores.trace_logp.sum(dim=1))
    row("  reward f(c)", outcome.reward, 4)
    row("  advantage", outcome.advantage)
    print()
    row("loss: trace, answer, marker", outcome.losses, 6)
    row("norm of the gradient", gradient(model).norm()[None], 6)


def gradient(model: Transformer) -> Tensor:
    """All gradients as one vector, and forgets them."""
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
    return flat


def every_trace(tokenizer: Tokenizer, vocabulary: int) -> list[Trace]:
    """All that sampling at most 2 tokens can return."""
    marker, cut = tokenizer.marker_id, sorted(tokenizer.cut_ids)
    words = [token for token in range(vocabulary) if token not in (marker, *cut)]
    starts = [[], *([word] for word in words)]
    traces = [Trace([*start, marker], [], finished=True) for start in starts]
    traces += [Trace(start, [], False, cut_id=token) for start in starts for token in cut]
    pairs = itertools.product(words, repeat=2)
    return traces + [Trace(list(pair), [], finished=False) for pair in pairs]


def prove(model: Transformer, tokenizer: Tokenizer, example: Example, args: Args) -> None:
    """The gradient of J by its definition, beside the estimator's mean."""
    traces, f = every_trace(tokenizer, model.config.vocab_size), AGGREGATORS[args.aggregator]
    total = 0.0
    for first in range(0, len(traces), 500):
        part = traces[first : first + 500]
        scores = score(model, example.prompt, part, example.answer, tokenizer.marker_id)
        probability = scores.trace_logp.sum(dim=1).exp()  # of each trace
        (probability * f(scores.answer_logp, scores.null_logp.detach())).sum().backward()
        total += probability.sum().item()
    exact = gradient(model)
    print(f"\nall {len(traces)} traces of at most 2 tokens, of total probability {total:.6f}")
    print(f"gradient of J by autograd: norm {exact.norm():.5f}; the estimator beside it")
    summed, done = torch.zeros_like(exact), 0
    for groups in GROUPS:
        for step in range(done, groups):
            [sampled] = sample_groups(model, tokenizer, [example], step, args)
            train_question(model, tokenizer, example, sampled, args)
        summed += -LENGTH_SCALE * gradient(model)  # the loss is -J / 512
        done, estimate = groups, summed / groups
        share = (estimate @ exact / exact.norm() ** 2).item()
        off = ((estimate - exact).norm() / exact.norm()).item()
        text = f"mean of {groups:3} groups of {args.traces} traces: along it {share:.3f},"
        print(f"{text} distance {off:.2f} of its norm")


def main() -> None:
    OneLineParser(description=__doc__).parse_args()
    args = Args(questions=1, traces=4, device="cpu")
    tokenizer = Tokenizer(args.model)
    model = load_with_marker(args.model, tokenizer, torch.float32, args.device)
    example = Pairs(args.data, tokenizer)[0]
    example = replace(example, answer=example.answer[:5])
    show(model, tokenizer, example, args)
    prove(model, tokenizer, example, replace(args, traces=8, max_trace=2, **EXACT))


if __name__ == "__main__":
    exit_on_bad_input(main)()
