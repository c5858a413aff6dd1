"""Log-probs of the gold answer under many traces: the prompt is read once, the K traces and the null think branch off it.

    prompt x [1, P]  --keys, values-->  branch 0:  z_0 ......... m y*_1 ... y*_{T-1}            z: the trace without marker, n_k tokens
                                        branch 1:  z_1 ... m y*_1 ... y*_{T-1}                  m: the marker, sampled or forced
                                        ...
                                        null:      m y*_1 ... y*_{T-1}                          the empty trace, gives null_logp

A branch is fed n_k + T tokens, and the prompt's last hidden state predicts its first. Branches are padded on the right, where causal
attention never looks; those of very different length go in forwards of their own, so that little is padding, and padding is never
multiplied by the head. Everything beyond the hidden state is fp32.

The forward that scores is the forward that trains: under grad the same Scores carry the graph. Where K branches do not fit in memory,
`read_prompt` and `leaves` let each micro-batch of branches run its own backward, and the prompt one at the end (train.py).
Equal to K full rows of prompt + trace + answer to rounding, at 1/K of the prompt's cost (tests/test_reward.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.logprob import linear_logprob, linear_logprob_loss
from model import Prefix, Transformer

MAX_PADDING = 0.15  # share of the tokens of a forward
SMALL_PADDING = 256  # tokens that cost less than a forward of their own


@dataclass
class Scores:
    """Log-probs in nats of one question's K traces of at most Z tokens and its gold answer of T tokens, fp32 (fp64 for an fp64 model)."""

    trace_logp: Tensor  # [K, Z] log pi(z_kt | x, z_k<t) of every sampled token, the one that ended the trace included; 0 beyond
    trace_mask: Tensor  # [K, Z] bool, True on those tokens
    finished: Tensor  # [K] bool, the trace ends with a sampled marker; False: the marker was forced
    marker_logp: Tensor  # [K] log pi(m | x, z_k), sampled or forced
    answer_logp: Tensor  # [K, T] log c_ki
    null_logp: Tensor | None  # [T] log-probs of the answer after the empty trace
    entropy: (
        Tensor | None
    )  # [K, Z] of the sampling distribution at each trace token, detached; 0 beyond the trace


@dataclass
class ReadPrompt:
    """A prompt the model has read: its keys and values, and the hidden state that predicts the next token."""

    past: Prefix
    hidden: Tensor  # [H]

    def leaves(self) -> "ReadPrompt":
        """The same values cut off from the graph, as leaves that collect the gradients of any number of branch backwards."""
        past = Prefix()
        past.kv = [
            (k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in self.past.kv
        ]
        return ReadPrompt(past, self.hidden.detach().requires_grad_())

    def tensors(self) -> list[Tensor]:
        return [self.hidden, *(tensor for kv in self.past.kv for tensor in kv)]

    def backward(self, leaves: "ReadPrompt") -> None:
        """One backward through the prompt with what its leaves have collected."""
        pairs = [
            (own, leaf.grad)
            for own, leaf in zip(self.tensors(), leaves.tensors(), strict=True)
            if leaf.grad is not None
        ]
        torch.autograd.backward([own for own, _ in pairs], [grad for _, grad in pairs])


def read_prompt(model: Transformer, prompt: Sequence[int]) -> ReadPrompt:
    past = Prefix()
    hidden = model(
        torch.tensor([list(prompt)], device=model.lm_head.weight.device), past
    )  # [1, P, H]
    return ReadPrompt(past, hidden[0, -1])


def score(
    model: Transformer,
    prompt: Sequence[int] | ReadPrompt,
    traces: Sequence,
    answer: Sequence[int],
    marker: int,
    null: bool = True,
    temperature: float = 1.0,
    entropy: bool = False,
    micro_traces: int = 0,
) -> Scores:
    """Scores of K traces of one question, under grad or no_grad.

    prompt: token ids, or a prompt already read. traces: K Traces (sample.py) or plain id lists; one that does not end with the marker
    gets it forced. A cut token (Trace.cut_id) is no context for the answer, but sampling it was an action, and its log-prob counts with
    the trace's: without it the gradient of J would be biased. temperature: of the sampling distribution; it applies to trace and marker,
    the answer is always scored at 1. micro_traces: most branches per forward (0 = any number), for scoring without grad in bounded memory;
    the values do not depend on it.
    """
    prompt = prompt if isinstance(prompt, ReadPrompt) else read_prompt(model, prompt)
    branches = [make_branch(trace, marker) for trace in traces] + [
        Branch((), (), finished=False)
    ] * null
    width = max(1, *(len(branch.actions) for branch in branches))  # Z

    # Equal traces are scored once: late in training most of a group are, and two roundings of one number must not look like a difference.
    distinct = list(dict.fromkeys(branches))
    scored, parts = [], []
    for batch in micro_batches(
        [len(branch.body) + len(answer) for branch in distinct], micro_traces
    ):
        scored += [distinct[i] for i in batch]
        parts.append(
            score_branches(
                model, prompt, scored[-len(batch) :], answer, marker, temperature, entropy, width
            )
        )
    row = {branch: i for i, branch in enumerate(scored)}
    rows = torch.tensor([row[branch] for branch in branches], device=prompt.hidden.device)
    trace_logp, marker_logp, answer_logp, entropies = (
        torch.cat(part)[rows] for part in zip(*parts, strict=True)
    )

    count, device = len(traces), answer_logp.device
    actions = torch.tensor(
        [len(branch.actions) for branch in branches[:count]], dtype=torch.long, device=device
    )
    return Scores(
        trace_logp=trace_logp[:count],
        trace_mask=torch.arange(width, device=device) < actions[:, None],
        finished=torch.tensor(
            [branch.finished for branch in branches[:count]], dtype=torch.bool, device=device
        ),
        marker_logp=marker_logp[:count],
        answer_logp=answer_logp[:count],
        null_logp=answer_logp[count] if null else None,
        entropy=entropies[:count] if entropy else None,
    )


@dataclass(frozen=True)
class Branch:
    """A trace as scoring sees it."""

    body: tuple[int, ...]  # what stands between prompt and marker, n_k tokens
    actions: tuple[
        int, ...
    ]  # what was sampled: the body, and what ended it (the marker, a cut token, nothing at the length limit)
    finished: bool


def make_branch(trace: object, marker: int) -> Branch:
    ids, cut_id = tuple(getattr(trace, "ids", trace)), getattr(trace, "cut_id", None)
    if ids[-1:] == (marker,):
        return Branch(ids[:-1], ids, finished=True)
    return Branch(ids, ids if cut_id is None else (*ids, cut_id), finished=False)


def score_branches(
    model: Transformer,
    prompt: ReadPrompt,
    branches: list[Branch],
    answer: Sequence[int],
    marker: int,
    temperature: float,
    entropy: bool,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One forward over B branches -> log-probs of actions [B, Z], marker [B] and answer [B, T], and the actions' entropies [B, Z]."""
    hidden, (policy_at, policy_tokens), (gold_at, gold_tokens) = read_branches(
        model, prompt, branches, answer, marker
    )
    head, count = model.lm_head.weight, len(policy_tokens) - len(branches)
    policy = linear_logprob(hidden[policy_at], head, policy_tokens, temperature, entropy)
    logp, entropies = (
        policy if entropy else (policy, policy)
    )  # unasked for, entropies are a stand-in that nobody reads
    answer_logp = linear_logprob(hidden[gold_at], head, gold_tokens)

    def spread(flat: Tensor) -> Tensor:
        """Values of the actions -> [B, Z], 0 beyond a trace."""
        row, place = (at[:count] for at in policy_at)
        return flat.new_zeros(len(branches), width).index_put((row, place), flat[:count])

    return (
        spread(logp),
        logp[count:],
        answer_logp.view(len(branches), len(answer)),
        spread(entropies.detach()),
    )


def branch_loss(
    model: Transformer,
    prompt: ReadPrompt,
    traces: Sequence,
    answer: Sequence[int],
    marker: int,
    trace_weight: Tensor,
    marker_weight: Tensor,
    answer_weight: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """- sum of weight * log-prob over the tokens of m traces, for weights known before the pass: the training loss of a micro-batch.

    trace_weight [m, Z], marker_weight [m], answer_weight [m, T], constants. The same number as from `score`, but the head computes its
    gradient together with the loss, in three matrix products instead of four.
    """
    branches = [make_branch(trace, marker) for trace in traces]
    hidden, (policy_at, policy_tokens), (gold_at, gold_tokens) = read_branches(
        model, prompt, branches, answer, marker
    )
    row, place = (at[: -len(branches)] for at in policy_at)
    policy_weight = torch.cat([trace_weight[row, place], marker_weight])
    policy_loss, _ = linear_logprob_loss(
        hidden[policy_at], model.lm_head.weight, policy_tokens, policy_weight, temperature
    )
    answer_loss, _ = linear_logprob_loss(
        hidden[gold_at], model.lm_head.weight, gold_tokens, answer_weight.flatten()
    )
    return policy_loss + answer_loss


def read_branches(
    model: Transformer,
    prompt: ReadPrompt,
    branches: list[Branch],
    answer: Sequence[int],
    marker: int,
) -> tuple[Tensor, tuple, tuple]:
    """One forward over B branches -> hidden [B, L+1, H], whose place j predicts what comes after j tokens of a branch, and twice
    (places as an index (row [N], place [N]), tokens [N] they should predict): every action, then the B markers; and the answers."""
    device = prompt.hidden.device
    fed = [[*branch.body, marker, *answer[:-1]] for branch in branches]  # n_k + T tokens each
    length = max(len(tokens) for tokens in fed)
    tokens = torch.tensor([row + [0] * (length - len(row)) for row in fed], device=device)  # [B, L]
    first = prompt.hidden.expand(
        len(branches), 1, -1
    )  # the prompt's last state predicts every branch's first token
    hidden = torch.cat([first, model(tokens, prompt.past)], dim=1)  # [B, L+1, H]

    def index(places: list[tuple[int, int, int]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        row, place, token = torch.tensor(places).T.to(device)
        return (row, place), token

    policy = [
        (b, j, token) for b, branch in enumerate(branches) for j, token in enumerate(branch.actions)
    ]
    policy += [(b, len(branch.body), marker) for b, branch in enumerate(branches)]
    gold = [
        (b, len(branch.body) + 1 + i, token)
        for b, branch in enumerate(branches)
        for i, token in enumerate(answer)
    ]
    return hidden, index(policy), index(gold)  # padding is in neither: the head never sees it


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Splits branches into batches of at most `size` (0: any number), longest first, so that neighbours in length share their padding.

    A batch ends where the next branch would make more than MAX_PADDING of it padding, or where it is full.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and len(batches[-1]) != size:
            batch = [*batches[-1], i]
            fed = len(batch) * lengths[batch[0]]  # tokens, padding included
            padding = fed - sum(lengths[j] for j in batch)
            if padding <= max(MAX_PADDING * fed, SMALL_PADDING):
                batches[-1] = batch
                continue
        batches.append([i])
    return batches
