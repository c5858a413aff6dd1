"""Which reward keeps this model thinking? Computed before training, from one batch of traces.

    python preflight.py --model DIR --data pairs.jsonl
    python preflight.py --model DIR --data pairs.jsonl --traces 16 --clip-null --draw race.svg

At first a trace often costs an answer's easy tokens more than it gains on the hard ones, and many
rewards remove thinking; while traces are sampled, the answer term repairs the cost. This file plays
that race. Sampled traces and the empty one are scored once, and are of three kinds:

    empty
    helpful    raises the uncertain answer tokens by more than HELPS nats together; uncertain are
               those of probability below 0.5 after the empty trace, or else the least likely one
    idle       the rest

The policy is two decisions, to think and then to help, and the state three numbers:

    p = sigmoid(a)    share of traces that think
    q = sigmoid(b)    share of helpful ones among those
    s                 share of the cost repaired: tokens that are not uncertain count
                      (1 - s) log c + s log n

A step draws --questions groups of K of a question's own traces, weighted by how far the shares
1 - p, p q, p (1 - q) have moved. The pay of a kind is the sum of its advantages (aggregate.credit)
over the number of traces; think = helpful and idle, all = the three. Then, along the policy's
gradient in a and b,

    a, b += Adam step of learning rate PUSH along pay_think - p pay_all, pay_helpful - q pay_think
    s    += REPAIR p (1 - s)

As in training, Adam's step is no smaller where the gradient is. s stands for what the answer term
does: 0 with --answer-weight none. A reward keeps thinking where p q exceeds THINKS within --steps;
it returns where once fewer than VANISHED of the traces thought. It is lost where fewer do at the
end, and undecided where more do: take more --steps. Nothing tells it which tokens are easy. The
rates are the embedded task's at train.py's --lr, and proportional to it: give that of your run.
examples/hops/race_settings.json has the settings they were placed on. Left out: traces shorten bit
by bit and get better at helping; an answer that is trained after idle traces gains less and less
from helpful ones (a long --answers-first does harm); while thinking is lost q grows less (where few
traces help, trust no return); warm-up. --answer-weight exact counts as fixed, --null policy as
frozen.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from aggregate import AGGREGATORS, credit, declares, moving_average, sees_text
from data import Example, Pairs
from evaluate import open_examples
from model import Transformer
from reward import score
from sample import sample_groups
from support.args import Args, add_flag, check_args, model_flags, open_model
from support.errors import InputError, exit_on_bad_input, refusing, require
from support.tokenizer import Tokenizer

HELPS = 0.5  # nats
THINKS, VANISHED = 0.6, 0.1  # shares of all traces
PUSH, REPAIR = 0.12, 0.25  # per step
LARGEST = 12.0  # logit: no kind dies out
EMPTY, IDLE, HELPFUL = range(3)
# Random rewards are left out, and those that see more than log-probs.
NAMES = [name for name in AGGREGATORS if not declares(name, "random") and not sees_text(name)]
OF_TRAINING = "traces questions lr temperature answer_weight null clip_null center scale"
OF_TRAINING += " filter_std answers_first"


@dataclass
class Group:
    """One question's sampled traces, and the empty one as the last row."""

    lengths: list[int]  # K+1, tokens before the marker
    answer_logp: Tensor  # [K+1, T]

    def __post_init__(self) -> None:
        self.null_logp = self.answer_logp[-1]  # [T]
        least = self.null_logp.min().clamp(min=math.log(0.5))
        self.uncertain = self.null_logp <= least  # [T]
        self.change = self.answer_logp - self.null_logp  # [K+1, T] nats
        self.gain = self.change[:, self.uncertain].sum(dim=1)  # [K+1]
        helps = torch.where(self.gain > HELPS, HELPFUL, IDLE)
        self.kind = torch.where(torch.tensor(self.lengths) > 0, helps, EMPTY)  # [K+1]


@torch.no_grad()
def sample_and_score(
    model: Transformer, tokenizer: Tokenizer, examples: list[Example], args: Args
) -> list[Group]:
    """--traces traces a question and the empty one, sampled and scored as a training step does."""
    groups = []
    sampled = sample_groups(model, tokenizer, examples, 0, args)
    for example, traces in zip(examples, sampled, strict=True):
        scores = score(model, example.prompt, traces, example.answer, tokenizer.marker_id)
        logp = torch.cat([scores.answer_logp, scores.null_logp[None]])
        lengths = [len(trace.ids) - trace.finished for trace in traces]
        groups.append(Group([*lengths, 0], logp.double().cpu()))
    return groups


def shares_of(kind: Tensor) -> Tensor:
    return torch.bincount(kind, minlength=3).double() / len(kind)  # [3]


def race(groups: list[Group], args: Args, seed: int = 0) -> Tensor:
    """Shares [steps + 1, 3] of the kinds before the first step and after each, until it thinks."""
    start = shares_of(torch.cat([group.kind for group in groups]))
    thinking = 1 - start[EMPTY]
    helps = (start[HELPFUL] / thinking).nan_to_num()
    logits = torch.stack([thinking, helps]).logit().clamp(-LARGEST, LARGEST)  # a, b
    speed = args.lr / Args.lr
    repair = min(1.0, REPAIR * speed) if args.answer_weight != "none" else 0.0
    adam = torch.optim.Adam([logits], PUSH * speed, betas=(0.9, 0.95), eps=1e-15, maximize=True)
    generator = torch.Generator().manual_seed(seed)
    history, s, reward_std = [start], 0.0, 0.0
    while len(history) <= args.steps and history[-1][HELPFUL] <= THINKS:
        pushed = len(history) > args.answers_first
        least_std = args.filter_std * reward_std if pushed else math.inf  # as in train.py
        pay, stds = torch.zeros(3, dtype=torch.float64), []
        for i in torch.randint(len(groups), (args.questions,), generator=generator).tolist():
            group, null_logp = groups[i], groups[i].null_logp
            odds = (history[-1] / start)[group.kind]
            drawn = torch.multinomial(odds, args.traces, replacement=True, generator=generator)
            left = torch.where(group.uncertain, 1, 1 - s)  # [T] of the change
            logp = null_logp + left * group.change[drawn]  # [K, T]
            reward, advantage, _ = credit(logp, null_logp, args, least_std=least_std)
            pay.index_add_(0, group.kind[drawn], advantage)
            stds.append(reward.std(correction=0))
        pay /= args.questions * args.traces
        reward_std = moving_average(reward_std, float(torch.stack(stds).mean()))
        (p, q), think = logits.sigmoid(), pay[IDLE] + pay[HELPFUL]
        logits.grad = torch.stack([think - p * pay.sum(), pay[HELPFUL] - q * think])
        s += repair * float(p) * (1 - s)
        adam.step()
        p, q = logits.clamp_(-LARGEST, LARGEST).sigmoid()
        history.append(torch.stack([1 - p, p * (1 - q), p * q]))
    return torch.stack(history)


def fate(history: Tensor) -> str:
    steps = len(history) - 1
    if history[-1, HELPFUL] <= THINKS:
        lost = history[-1, EMPTY] > 1 - VANISHED
        return f"{'lost' if lost else 'undecided'} within {steps} steps"
    if history[:, EMPTY].max() > 1 - VANISHED:
        return f"returns at about step {steps}"
    return f"keeps thinking, helpful traces prevail at step {steps}"


def describe(groups: list[Group]) -> str:
    """What traces do before training."""
    kind = torch.cat([group.kind[:-1] for group in groups])  # without the empty one that was added
    gain = torch.cat([group.gain[:-1] for group in groups])
    empty, _, helpful = shares_of(kind)
    text = f"{len(kind)} traces, {empty:.1%} empty, {helpful:.1%} helpful"
    if not helpful:
        return f"{text}: no trace helps, the best gains {gain.max():+.2f} nats on uncertain tokens"
    return f"{text}: these gain {gain[kind == HELPFUL].mean():+.2f} nats on uncertain tokens"


def draw(histories: dict[str, Tensor], steps: int) -> str:
    """SVG, a row per reward: shares of traces that think (grey) and help (blue), over the steps."""
    parts = []
    for row, (name, history) in enumerate(histories.items()):
        parts.append(f'<text y="{60 * row + 40}">{name}</text>')
        for color, share in (("grey", 1 - history[:, EMPTY]), ("blue", history[:, HELPFUL])):
            ys = (60 * row + 55 - 50 * share).tolist()
            points = " ".join(f"{200 + 400 * x / steps:.1f},{y:.1f}" for x, y in enumerate(ys))
            parts.append(f'<polyline fill="none" stroke="{color}" points="{points}"/>')
    size = f'width="600" height="{60 * len(histories)}" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>\n'


def main() -> None:
    parser = model_flags(__doc__)
    parser.set_defaults(max_trace=Args.max_trace)
    add = parser.add_argument
    add("--data", required=True, help="JSONL file of question-answer pairs")
    add("--limit", type=int, default=64, help="pairs of --data, from the top")
    add("--sampled", type=int, default=32, help="traces per question that the race draws from")
    add("--steps", type=int, default=100, help="of the race")
    add("--race-seed", type=int, default=0, help="of the draws; --seed: of the sample")
    add("--draw", metavar="FILE.svg", type=Path, help="the shares over the steps")
    for name in OF_TRAINING.split():
        add_flag(parser, name)
    given = parser.parse_args()
    args = Args(**{name: getattr(given, name) for name in [*OF_TRAINING.split(), "steps"]})
    check_args(args)
    require(min(args.traces, given.sampled) > 0, "--traces, --sampled: should be 1 or more")
    there = not given.draw or given.draw.parent.is_dir()
    require(there, f"--draw {given.draw}: there is no folder {given.draw and given.draw.parent}")
    model, tokenizer = open_model(given, untrained=True)
    examples = open_examples(given, model, tokenizer)
    how = {"traces": given.sampled, "max_trace": given.max_trace, "seed": given.seed}
    groups = sample_and_score(model, tokenizer, examples, replace(args, **how))
    print(f"{len(groups)} questions{Pairs(given.data, tokenizer).note()}, {describe(groups)}")
    histories = {}
    for name in NAMES:
        own = replace(args, aggregator=name)
        try:
            check_args(own)
            histories[name] = race(groups, own, given.race_seed)
            text = fate(histories[name])
        except InputError as error:
            text = str(error)
        print(f"{name:26} {text}", flush=True)
    if given.draw:
        with refusing(given.draw):
            given.draw.write_text(draw(histories, args.steps))


if __name__ == "__main__":
    exit_on_bad_input(main)()
