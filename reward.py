"""Likelihood of the gold answer under K traces: one prefill of the prompt, then a branch per trace.

    prompt x [1, P] --KV cache--> branch 0:  z_0 ............. m y*_1 ... y*_{T-1}
                                  branch 1:  z_1 ... m y*_1 ... y*_{T-1}
                                  ...
                                  null:      m y*_1 ... y*_{T-1}         the empty trace: null_logp

z_k is the trace without its marker, L_k tokens; m is the marker, sampled or forced. A branch feeds
L_k + T tokens, and the prompt's last hidden state predicts its first token. Branches are rows of a
batch that continues the prompt's KV cache. Rows are padded on the right: causal attention hides the
padding, and the head skips it. All log-probs are fp32 or wider.

How this differs from the usual GRPO scoring:
  1. The prompt runs once, not K times. Values and gradients equal those of K full rows.
  2. The null think is one more branch, not K passes.
  3. Under grad the same Scores carry the graph: the forward that scores is the forward that trains
     (but with --micro-traces, where each part is scored again with its graph).
  4. The prompt's KV cache becomes leaf tensors: any number of micro-batches of branches run their
     own backward into them, and the prompt runs its backward once at the end (`prompt_leaves`,
     `prompt_backward`; used in train.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import Trace
from kernels.logprob import linear_logprob
from model import Prefill, Prefix, Transformer, prefill


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
) -> Scores:
    """Scores of K traces of one question, with the graph when grad is enabled.

    prompt: token ids, or their prefill. traces: Traces, or plain id lists for experiments; a trace
    that does not end with the marker gets it forced. null: score the empty trace as well.
    temperature: of the sampling distribution; it applies to trace and marker, the answer is always
    scored at 1. entropy: compute it as well. In the shapes B is the number of branches.
    """
    prompt = prompt if isinstance(prompt, Prefill) else prefill(model, [prompt])
    device = prompt.hidden.device
    branches = [make_branch(trace, marker) for trace in traces]
    if null:
        branches.append(Branch(context=(), actions=(), finished=False))
    rows = sorted(branches, key=lambda branch: -len(branch.context))  # of the forward
    fed = [torch.tensor([*branch.context, marker, *answer[:-1]]) for branch in rows]
    tokens = pad_sequence(fed, batch_first=True).to(device)  # [B, L]
    first = prompt.hidden.expand(len(rows), 1, -1)  # predicts every branch's first token
    hidden = torch.cat([first, model(tokens, prompt.past)], dim=1)  # [B, L+1, H]
    # hidden[b, j] predicts the token that follows the first j tokens of branch b.
    head = model.lm_head.weight  # read after the forward: of a sharded model it is whole only now

    # Policy tokens: all actions of all branches (N in total), then the B markers.
    width = max([1, *(len(branch.actions) for branch in rows)])  # Z
    count = torch.tensor([len(branch.actions) for branch in rows], device=device)  # [B]
    sampled = torch.arange(width, device=device) < count[:, None]  # [B, Z]
    action_row, action_at = sampled.nonzero().T  # [N]
    row = torch.arange(len(rows), device=device)  # [B]
    marker_at = torch.tensor([len(branch.context) for branch in rows], device=device)  # [B]
    policy_hidden = hidden[torch.cat([action_row, row]), torch.cat([action_at, marker_at])]
    policy_tokens = [token for branch in rows for token in branch.actions] + [marker] * len(rows)
    policy_tokens = torch.tensor(policy_tokens, device=device)  # [N + B]
    result = linear_logprob(policy_hidden, head, policy_tokens, temperature, entropy)
    policy_logp, entropies = result if entropy else (result, None)  # [N + B] each
    trace_logp, marker_logp = policy_logp.split([len(action_row), len(rows)])

    # Answer tokens follow the marker; log c is taken at temperature 1.
    answer_at = marker_at[:, None] + 1 + torch.arange(len(answer), device=device)  # [B, T]
    answer_hidden = hidden[row[:, None], answer_at].flatten(0, 1)  # [B T, H]
    answer_tokens = torch.tensor(answer, device=device).repeat(len(rows))
    answer_logp = linear_logprob(answer_hidden, head, answer_tokens).view(len(rows), -1)  # [B, T]

    # Equal traces take the scores of the same row. Late in training many are equal, and their
    # rewards must be equal to the last bit: a difference of rounding would be scaled up to an
    # advantage.
    row_of = {branch: i for i, branch in enumerate(rows)}
    of_trace = torch.tensor([row_of[branch] for branch in branches], device=device)  # [K (+ 1)]
    answer_logp = answer_logp[of_trace]
    of_trace = of_trace[: len(traces)]  # [K]

    def spread(values: Tensor) -> Tensor:
        """values [N] of the actions -> [K, Z], 0 beyond a trace."""
        padded = values.new_zeros(len(rows), width)
        return padded.index_put((action_row, action_at), values)[of_trace]

    finished = [branch.finished for branch in branches[: len(traces)]]
    return Scores(
        trace_logp=spread(trace_logp),
        trace_mask=sampled[of_trace],
        finished=torch.tensor(finished, dtype=torch.bool, device=device),
        marker_logp=marker_logp[of_trace],
        answer_logp=answer_logp[: len(traces)],
        null_logp=answer_logp[-1] if null else None,
        entropy=spread(entropies[: len(action_row)].detach()) if entropy else None,
    )


@dataclass(frozen=True)
class Branch:
    """A trace as it is scored."""

    context: tuple[int, ...]  # the tokens between prompt and marker, L_k of them
    actions: tuple[int, ...]  # the sampled tokens: the context, then the marker or cut token if any
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


# ---- the backward passes of a prompt whose branches run in micro-batches
def micro_batches(traces: Sequence[Trace], size: int) -> list[list[int]]:
    """Indices of the traces: in batches of `size`, the longest first; or all in one batch.

    Neighbours in length share a batch, which keeps padding low. The number of batches is a function
    of the number of traces alone: ranks that shard a model must run equally many forwards.
    """
    indices = list(range(len(traces)))
    if not 0 < size < len(traces):
        return [indices]
    indices.sort(key=lambda i: -len(traces[i].ids))
    return [indices[i : i + size] for i in range(0, len(traces), size)]


def prompt_leaves(prompt: Prefill) -> Prefill:
    """The same values as leaf tensors, which collect the gradients of any number of backwards.

    Those of frozen layers collect none.
    """

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().requires_grad_(tensor.requires_grad)

    past = Prefix()
    past.kv = [(leaf(k), leaf(v)) for k, v in prompt.past.kv]
    return Prefill(past, leaf(prompt.hidden))


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
RATIO_RANGE = (0.8, 1.28)  # looser above: unlikely tokens can gain (DAPO)


def log_ratio(scores: Scores, traces: Sequence[Trace]) -> Tensor:
    """log pi - log pi_sampler of every sampled token, [K, Z], detached; 0 beyond a trace.

    pi_sampler is the sampler's own record, so that no pass is needed for old log-probs.
    """
    recorded = torch.zeros_like(scores.trace_logp.detach(), device="cpu")
    for row, trace in zip(recorded, traces, strict=True):
        logp = trace.logp if trace.cut_id is None else [*trace.logp, trace.cut_logp]
        row[: len(logp)] = torch.tensor(logp, dtype=recorded.dtype)
    return scores.trace_logp.detach() - recorded.to(scores.trace_logp.device)


def truncated_ratio(scores: Scores, traces: Sequence[Trace], advantage: Tensor) -> Tensor:
    """rho [K, Z]: pi / pi_sampler per token, clamped to RATIO_RANGE, a constant (as in CISPO).

    A token whose ratio has left the range in the direction its advantage [K] pushes gets 0 (as in
    PPO).
    """
    low, high = RATIO_RANGE
    ratio = log_ratio(scores, traces).exp()
    gone = torch.where(advantage[:, None] > 0, ratio > high, ratio < low)
    return ratio.clamp(low, high).masked_fill(gone, 0.0)
