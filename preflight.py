"""Which reward would keep this model thinking? An answer before training, from one batch of traces.

    python preflight.py --model DIR --data pairs.jsonl

K traces per question are sampled and scored as in training, and the empty trace (null think) joins
each group. The advantages of an aggregator are those of its first update on such groups:

    helpful      mean advantage of the trace that raises a question's uncertain answer tokens most
    empty        mean advantage of the empty trace of the same questions
    short, long  mean advantages of the shortest and the longest quarter of the sampled traces
    corr         correlation of trace length and advantage
    dead         share of questions whose rewards are all equal: nothing is learnt from them

An answer token is uncertain where its probability after the empty trace is below 0.5; if none is,
the least likely one. A question without a trace that raises them counts for neither column. Helpful
traces need not be right: no ground truth is used. The definition is close to what the weighted sums
reward, on purpose: it names the traces that thinking could grow from.

Verdict: "removes thinking" if the helpful trace's advantage is more than MARGIN below that of the
empty one: then the first updates teach to stop at once, and helpful traces become too rare to come
back soon. Less far below, traces shrink first and come back once the answers after them are as
fluent as without; "keeps thinking" says that of both. "no signal" where no trace helps or more than
DEAD of the groups are dead. short, long and corr are stable only over a few hundred traces.

How often the verdict is right is in examples/hops/map.md, for 12 settings of the embedded task;
MARGIN was placed on seven of them, for K = 8.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from aggregate import AGGREGATORS, advantages, aggregate, declares, sees_text
from data import Example, stream_seed
from evaluate import open_examples
from model import Transformer
from reward import score
from sample import sample_to_marker
from support.args import model_flags, open_model
from support.errors import exit_on_bad_input
from support.tokenizer import Tokenizer

UNCERTAIN = 0.5  # probability of an answer token after the empty trace
DEAD = 0.9  # share of questions
MARGIN = 1.55  # of advantages, in units of a group's std
# Random rewards are left out, and those that see more than log-probs.
NAMES = [name for name in AGGREGATORS if not declares(name, "random") and not sees_text(name)]


@dataclass
class Group:
    """One question's sampled traces, and the empty one as the last row."""

    traces: list[list[int]]  # K+1 times the token ids before the marker; the last is empty
    answer_logp: Tensor  # [K+1, T]
    null_logp: Tensor  # [T]

    def lengths(self) -> Tensor:  # [K+1] tokens
        return torch.tensor([float(len(ids)) for ids in self.traces])

    def helpful(self) -> int | None:
        """The trace that raises the uncertain tokens most; None if none raises them."""
        uncertain = self.null_logp.exp() < UNCERTAIN  # [T]
        if not uncertain.any():
            uncertain = self.null_logp == self.null_logp.min()
        gain = (self.answer_logp - self.null_logp)[:-1, uncertain].sum(dim=1)  # [K]
        return int(gain.argmax()) if gain.max() > 0 else None


@torch.no_grad()
def sample_group_scores(
    model: Transformer,
    tokenizer: Tokenizer,
    examples: list[Example],
    k: int,
    max_trace: int,
    seed: int = 0,
) -> list[Group]:
    """Groups of K traces and the empty one, sampled and scored as a training step does."""
    marker = tokenizer.marker_id
    prompts = [example.prompt for example in examples]
    seeds = [stream_seed(seed, 0, example.index) for example in examples]
    sampled = sample_to_marker(model, tokenizer, prompts, k, max_trace, seed=seeds)
    groups = []
    for example, traces in zip(examples, sampled, strict=True):
        scores = score(model, example.prompt, traces, example.answer, marker)
        ids = [trace.ids[:-1] if trace.finished else trace.ids for trace in traces]
        answer_logp = torch.cat([scores.answer_logp, scores.null_logp[None]]).double().cpu()
        groups.append(Group([*ids, []], answer_logp, answer_logp[-1]))
    return groups


def preflight(groups: list[Group], name: str) -> dict[str, float | str]:
    """One aggregator's row of the table: the figures above, nan where there are none; verdict."""
    helpful, empty, lengths, paid, dead = [], [], [], [], 0
    center = "none" if declares(name, "relative") else "mean"  # as in train.py
    for group in groups:
        reward, weight = aggregate(name, group.answer_logp, group.null_logp)
        advantage = advantages(reward, center, "std", weight)  # [K+1]
        dead += not advantage.any()
        lengths.append(group.lengths()[:-1])
        paid.append(advantage[:-1])
        best = group.helpful()
        if best is not None:
            helpful.append(advantage[best])
            empty.append(advantage[-1])
    length, advantage = torch.cat(lengths), torch.cat(paid)  # [N] all sampled traces
    by_length = advantage[length.argsort(stable=True)]
    quarter = max(1, len(by_length) // 4)
    row = {
        "helpful": mean(helpful),
        "empty": mean(empty),
        "short": float(by_length[:quarter].mean()),
        "long": float(by_length[-quarter:].mean()),
        "corr": float(torch.corrcoef(torch.stack([length.double(), advantage]))[0, 1]),
        "dead": dead / len(groups),
    }
    return row | {"verdict": verdict(row["helpful"], row["empty"], row["dead"])}


def verdict(helpful: float, empty: float, dead: float) -> str:
    if dead > DEAD or math.isnan(helpful):
        return "no signal"
    return "keeps thinking" if helpful > empty - MARGIN else "removes thinking"


def mean(values: list[Tensor]) -> float:
    return float(torch.stack(values).mean()) if values else float("nan")


def preflight_table(groups: list[Group]) -> list[str]:
    """The lines that the command prints, best first."""
    rows = {name: preflight(groups, name) for name in NAMES}
    order = sorted(rows, key=lambda name: rows[name]["empty"] - rows[name]["helpful"])
    columns = ("helpful", "empty", "short", "long", "corr", "dead")
    lines = [f"{'aggregator':26}" + "".join(f"{column:>9}" for column in columns) + "  verdict"]
    for name in order:
        cells = "".join(f"{rows[name][column]:+9.2f}" for column in columns[:-1])
        lines.append(f"{name:26}{cells}{rows[name]['dead']:9.2f}  {rows[name]['verdict']}")
    return lines


def main() -> None:
    parser = model_flags(__doc__)
    parser.add_argument("--data", required=True, help="JSONL file of question-answer pairs")
    parser.add_argument("--limit", type=int, default=32, help="pairs of --data, from the top")
    parser.add_argument("--traces", type=int, default=8, help="K, traces per question")
    args = parser.parse_args()
    model, tokenizer = open_model(args, untrained=True)
    examples = open_examples(args, model, tokenizer)
    groups = sample_group_scores(model, tokenizer, examples, args.traces, args.max_trace, args.seed)
    print("\n".join(preflight_table(groups)))


if __name__ == "__main__":
    exit_on_bad_input(main)()
