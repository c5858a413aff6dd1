"""Likelihood of the gold answer under K traces: one prefill of the prompt, then a branch per trace.

    prompt x [1, P] --KV cache--> branch 0:  z_0 ............. m y*_1 ... y*_{T-1}
                                  branch 1:  z_1 ... m y*_1 ... y*_{T-1}
                                  ...
                                  null:      m y*_1 ... y*_{T-1}         the empty trace: null_logp

z_k is the trace without its marker, n_k tokens; m is the marker, sampled or forced. A branch feeds
n_k + T tokens, and the prompt's last hidden state predicts its first token. Branches are rows of a
batch that continues the prompt's KV cache. Rows are padded on the right: causal attention hides the
padding, and the head skips it. All log-probs are fp32 or wider.

How this differs from the usual GRPO scoring:
  1. The prompt runs once, not K times. Values and gradients equal those of K full rows.
  2. The null think is one more branch, not K passes.
  3. Under grad the same Scores carry the graph: the forward that scores is the forward that trains.
  4. When K branches do not fit in memory, the prompt's KV cache becomes leaf tensors: every
     micro-batch of branches runs its own backward into them, and the prompt runs its backward once
     at the end (`prompt_leaves`, `prompt_backward`; used in train.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.logprob import linear_logprob
from model import Prefix, Transformer
from data import Trace
from model import Prefill, prefill


@dataclass
class Scores:
    """Log-probs in nats of one question: K traces of at most Z tokens, a gold answer of T tokens.

    fp32, or fp64 for an fp64 model.
    """

    trace_logp: Tensor  # [K, Z] log pi(z_kt | x, z_k<t) of every sampled token; 0 beyond the trace
    trace_mask: Tensor  # [K, Z] bool, True on sampled tokens, the one that ended the trace included
    finished: Tensor  # [K] bool: the trace ends with a sampled marker; False: the marker was forced
    marker_logp: Tensor  # [K] log pi(m | x, z_k), sampled or forced
    answer_logp: Tensor  # [K, T] log c_ki
    null_logp: Tensor | None  # [T] the same after the empty trace
    entropy: Tensor | None  # [K, Z] of the sampling distribution, detached; 0 beyond the trace


def score(
    model: Transformer,
    prompt: Sequence[int] | Prefill,
    traces: Sequence[Trace | Sequence[int]],
    answer: Sequence[int],
    marker: int,
    null: bool = True,
    temperature: float = 1.0,
    entropy: bool = False,
    micro_traces: int = 0,
) -> Scores:
    """Scores of K traces of one question, with the graph when grad is enabled.

    prompt: token ids, or their prefill. traces: Traces, or plain id lists for experiments; a trace
    that does not end with the marker gets it forced. null: score the empty trace as well.
    temperature: of the sampling distribution; it applies to trace and marker, the answer is always
    scored at 1. entropy: compute it as well. micro_traces: most branches in a forward, 0 = any
    number; no value depends on it. The number of forwards is a function of the number of branches
    alone: ranks that shard a model must run equally many (support/distributed.py).
    """
    prompt = prompt if isinstance(prompt, Prefill) else prefill(model, [prompt])
    branches = [make_branch(trace, marker) for trace in traces]
    if null:
        branches.append(Branch(body=(), actions=(), finished=False))
    width = max([1, *(len(branch.actions) for branch in branches)])  # Z

    order, parts = [], []
    lengths = [len(branch.body) + len(answer) for branch in branches]
    for indices in micro_batches(lengths, micro_traces):
        batch = [branches[i] for i in indices]
        order += batch
        parts.append(
            score_branches(model, prompt, batch, answer, marker, temperature, entropy, width)
        )
    # Equal traces take the scores of the same row. Late in training many are equal, and their
    # rewards must be equal to the last bit: a difference of rounding would be scaled up to an
    # advantage.
    row_of = {branch: i for i, branch in enumerate(order)}
    device = prompt.hidden.device
    rows = torch.tensor([row_of[branch] for branch in branches], device=device)
    trace_logp, marker_logp, answer_logp, entropies = (
        torch.cat(part)[rows] for part in zip(*parts, strict=True)
    )

    k = len(traces)
    sampled = torch.tensor([len(branch.actions) for branch in branches[:k]], device=device)
    finished = torch.tensor([branch.finished for branch in branches[:k]], device=device)
    return Scores(
        trace_logp=trace_logp[:k],
        trace_mask=torch.arange(width, device=device) < sampled[:, None],
        finished=finished.bool(),
        marker_logp=marker_logp[:k],
        answer_logp=answer_logp[:k],
        null_logp=answer_logp[k] if null else None,
        entropy=entropies[:k] if entropy else None,
    )


@dataclass(frozen=True)
class Branch:
    """A trace as it is scored."""

    body: tuple[int, ...]  # the tokens between prompt and marker, n_k of them
    actions: tuple[int, ...]  # the sampled tokens: the body, then the marker or cut token if any
    finished: bool


def make_branch(trace: Trace | Sequence[int], marker: int) -> Branch:
    """A cut token (eos and the like) is dropped from the answer's context, but was an action.

    So its log-prob counts with the trace's; without it the gradient of J (aggregate.py) would be
    biased.
    """
    if not isinstance(trace, Trace):
        trace = Trace(list(trace), [], finished=False)
    ids = tuple(trace.ids)
    if ids[-1:] == (marker,):
        return Branch(ids[:-1], ids, finished=True)
    cut = () if trace.cut_id is None else (trace.cut_id,)
    return Branch(ids, ids + cut, finished=False)


def score_branches(
    model: Transformer,
    prompt: Prefill,
    branches: list[Branch],
    answer: Sequence[int],
    marker: int,
    temperature: float,
    entropy: bool,
    width: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One forward over B branches.

    -> log-probs of actions [B, Z], markers [B], answers [B, T]; the actions' entropies [B, Z].
    """
    device = prompt.hidden.device
    fed = [[*branch.body, marker, *answer[:-1]] for branch in branches]
    tokens = pad(fed, max(len(row) for row in fed), device)  # [B, L]
    first = prompt.hidden.expand(len(branches), 1, -1)  # predicts every branch's first token
    hidden = torch.cat([first, model(tokens, prompt.past)], dim=1)  # [B, L+1, H]
    # hidden[b, j] predicts the token that follows the first j tokens of branch b.
    head = model.lm_head.weight  # read after the forward: of a sharded model it is whole only now

    # Policy tokens: all actions of all branches (N in total), then the B markers.
    actions = pad([branch.actions for branch in branches], width, device)  # [B, Z]
    counts = torch.tensor([len(branch.actions) for branch in branches], device=device)
    action_row, action_at = (
        (torch.arange(width, device=device) < counts[:, None]).nonzero().T
    )  # [N]
    row = torch.arange(len(branches), device=device)  # [B]
    marker_at = torch.tensor([len(branch.body) for branch in branches], device=device)  # [B]
    policy_hidden = hidden[torch.cat([action_row, row]), torch.cat([action_at, marker_at])]
    policy_tokens = torch.cat([actions[action_row, action_at], torch.full_like(row, marker)])
    result = linear_logprob(policy_hidden, head, policy_tokens, temperature, entropy)
    logp, entropies = result if entropy else (result, torch.zeros_like(result))  # [N + B] each

    # Answer tokens follow the marker; log c is taken at temperature 1.
    answer_at = marker_at[:, None] + 1 + torch.arange(len(answer), device=device)  # [B, T]
    answer_hidden = hidden[row[:, None], answer_at].flatten(0, 1)  # [B T, H]
    answer_tokens = torch.tensor(answer, device=device).repeat(len(branches))
    answer_logp = linear_logprob(answer_hidden, head, answer_tokens).view(len(branches), -1)

    def spread(values: Tensor) -> Tensor:
        """values [N + B], of which the first N belong to actions -> [B, Z], 0 beyond a trace."""
        padded = values.new_zeros(len(branches), width)
        return padded.index_put((action_row, action_at), values[: len(action_row)])

    return spread(logp), logp[len(action_row) :], answer_logp, spread(entropies.detach())


def pad(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    """Token ids padded on the right with 0, [len(rows), width]."""
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of branches, the longest first, cut into batches of `size` (0: one batch).

    Neighbours in length share a batch, which keeps padding low.
    """
    longest_first = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    size = size or len(lengths)
    return [longest_first[i : i + size] for i in range(0, len(lengths), size)]


# ---- the backward pass of a prompt whose branches ran in micro-batches
def prompt_leaves(prompt: Prefill) -> Prefill:
    """The same values as leaf tensors, which collect the gradients of any number of backwards."""
    past = Prefix()
    past.kv = [
        (k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in prompt.past.kv
    ]
    return Prefill(past, prompt.hidden.detach().requires_grad_())


def prompt_backward(prompt: Prefill, leaves: Prefill) -> None:
    """One backward through the prompt, from the gradients its leaves have collected."""
    tensors, gradients = [], []
    for tensor, leaf in zip(prompt_tensors(prompt), prompt_tensors(leaves), strict=True):
        if leaf.grad is not None:
            tensors.append(tensor)
            gradients.append(leaf.grad)
    torch.autograd.backward(tensors, gradients)


def prompt_tensors(prompt: Prefill) -> list[Tensor]:
    return [prompt.hidden, *(tensor for kv in prompt.past.kv for tensor in kv)]


# ---- importance ratio
def log_ratio(scores: Scores, traces: Sequence[Trace]) -> Tensor:
    """log pi - log pi_sampler of every sampled token, [K, Z], detached; 0 beyond a trace.

    pi_sampler is the sampler's own record, so that no pass is needed for old log-probs.
    """
    recorded = torch.zeros_like(scores.trace_logp.detach(), device="cpu")
    for row, trace in zip(recorded, traces, strict=True):
        logp = trace.logp if trace.cut_id is None else [*trace.logp, trace.cut_logp]
        row[: len(logp)] = torch.tensor(logp, dtype=recorded.dtype)
    return scores.trace_logp.detach() - recorded.to(scores.trace_logp.device)
