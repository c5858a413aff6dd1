"""Log-probs of the gold answer under many traces: the prompt is read once, the K traces and the null think branch off it.

    prompt x [1, P]  --keys, values-->  branch 0:  z_0 ......... m y*_1 ... y*_{T-1}            z: the trace without marker, n_k tokens
                                        branch 1:  z_1 ... m y*_1 ... y*_{T-1}                  m: the marker, sampled or forced
                                        ...
                                        null:      m y*_1 ... y*_{T-1}                          the empty trace, gives null_logp

A branch is fed n_k + T tokens and scored on n_k + 1 + T: the prompt's last hidden state predicts its first. Branches are padded on the
right, where causal attention never looks; padding is never multiplied by the head, and everything beyond the hidden state is fp32.

The forward that scores is the forward that trains: under grad the same Scores carry the graph. Where K branches do not fit in memory,
`read_prompt` and `leaves` let each micro-batch of branches run its own backward, and the prompt one at the end (train.py).
Equal to K full rows of prompt + trace + answer to rounding, at 1/K of the prompt's cost (tests/test_reward.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.logprob import linear_logprob
from model import Prefix, Transformer


@dataclass
class Scores:
    """Log-probs in nats of one question's K traces of at most Z tokens and its gold answer of T tokens, fp32 (fp64 for an fp64 model)."""

    trace_logp: Tensor  # [K, Z] log pi(z_kt | x, z_k<t), the sampled marker included; 0 beyond the trace
    trace_mask: Tensor  # [K, Z] bool, True on the tokens of the trace
    finished: Tensor  # [K] bool, the trace ends with a sampled marker; False: the marker was forced
    marker_logp: Tensor  # [K] log pi(m | x, z_k), sampled or forced
    answer_logp: Tensor  # [K, T] log c_ki
    null_logp: Tensor | None  # [T] log-probs of the answer after the empty trace
    entropy: Tensor | None  # [K, Z] of the sampling distribution at each trace token, detached; 0 beyond the trace


@dataclass
class ReadPrompt:
    """A prompt the model has read: its keys and values, and the hidden state that predicts the next token."""

    past: Prefix
    hidden: Tensor  # [H]

    def leaves(self) -> "ReadPrompt":
        """The same values cut off from the graph, as leaves that collect the gradients of any number of branch backwards."""
        past = Prefix()
        past.kv = [(k.detach().requires_grad_(), v.detach().requires_grad_()) for k, v in self.past.kv]
        return ReadPrompt(past, self.hidden.detach().requires_grad_())

    def tensors(self) -> list[Tensor]:
        return [self.hidden, *(tensor for kv in self.past.kv for tensor in kv)]

    def backward(self, leaves: "ReadPrompt") -> None:
        """One backward through the prompt with what its leaves have collected."""
        pairs = [(own, leaf.grad) for own, leaf in zip(self.tensors(), leaves.tensors(), strict=True) if leaf.grad is not None]
        torch.autograd.backward([own for own, _ in pairs], [grad for _, grad in pairs])


def read_prompt(model: Transformer, prompt: Sequence[int]) -> ReadPrompt:
    past = Prefix()
    hidden = model(torch.tensor([list(prompt)], device=model.lm_head.weight.device), past)  # [1, P, H]
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

    prompt: token ids, or a prompt already read. traces: K Traces or plain id lists; one that does not end with the marker gets it
    forced. temperature: of the sampling distribution; it applies to trace and marker, the answer is always scored at 1. micro_traces:
    branches per forward (0 = all), for scoring without grad in bounded memory; the values do not depend on it.
    """
    prompt = prompt if isinstance(prompt, ReadPrompt) else read_prompt(model, prompt)
    ids = [list(getattr(trace, "ids", trace)) for trace in traces]
    finished = [trace[-1:] == [marker] for trace in ids]
    bodies = [trace[:-1] if done else trace for trace, done in zip(ids, finished, strict=True)] + [[]] * null
    width = 1 + max(len(body) for body in bodies)  # Z: room for the longest trace and its marker

    order, parts = [], []
    for batch in micro_batches([len(body) for body in bodies], micro_traces):
        order += batch
        parts.append(score_branches(model, prompt, [bodies[i] for i in batch], list(answer), marker, temperature, entropy, width))
    back = torch.tensor(order).argsort()
    policy_logp, policy_entropy, answer_logp = (torch.cat(part)[back] if part[0] is not None else None for part in zip(*parts, strict=True))

    count = len(ids)
    device = policy_logp.device
    length = torch.tensor([len(body) for body in bodies[:count]], dtype=torch.long, device=device)[:, None]  # [K, 1]: m's place, too
    done = torch.tensor(finished, dtype=torch.bool, device=device)
    mask = torch.arange(width, device=device) < length + done[:, None]  # [K, Z]: a forced marker is no token of the trace
    return Scores(
        trace_logp=policy_logp[:count].masked_fill(~mask, 0.0),
        trace_mask=mask,
        finished=done,
        marker_logp=policy_logp[:count].gather(1, length)[:, 0],
        answer_logp=answer_logp[:count],
        null_logp=answer_logp[count] if null else None,
        entropy=policy_entropy[:count].masked_fill(~mask, 0.0) if entropy else None,
    )


def score_branches(
    model: Transformer,
    prompt: ReadPrompt,
    bodies: list[list[int]],
    answer: list[int],
    marker: int,
    temperature: float,
    entropy: bool,
    width: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """One forward over B branches -> log-probs of body and marker [B, Z], their entropies [B, Z] or None, answer log-probs [B, T]."""
    device = prompt.hidden.device
    targets = [[*body, marker, *answer] for body in bodies]  # n_k + 1 + T each
    length = max(len(target) for target in targets)
    padded = torch.tensor([target + [0] * (length - len(target)) for target in targets])  # [B, L]
    hidden = model(padded[:, :-1].to(device), prompt.past)  # [B, L-1, H]
    first = prompt.hidden.expand(len(bodies), 1, -1)  # the prompt's last state predicts every branch's first token
    hidden = torch.cat([first, hidden], dim=1).flatten(0, 1)  # [B*L, H]: row b*L + j predicts padded[b, j]

    place = torch.arange(length)
    marker_at = torch.tensor([len(body) for body in bodies])[:, None]
    is_policy = place <= marker_at  # [B, L] body and marker: what the policy does
    is_answer = (place > marker_at) & (place <= marker_at + len(answer))  # [B, L]; the rest is padding, which the head never sees

    def rows(mask: Tensor) -> tuple[Tensor, Tensor]:
        """hidden [N, H] and target [N] of the N marked places; they are found on the CPU, so that nothing waits for the device."""
        at = mask.flatten().nonzero()[:, 0]
        return hidden[at.to(device)], padded.flatten()[at].to(device)

    policy_rows, policy_targets = rows(is_policy)
    policy_logp = linear_logprob(policy_rows, model.lm_head.weight, policy_targets, temperature, entropy)  # [N], or a pair of them
    answer_rows, answer_targets = rows(is_answer)
    answer_logp = linear_logprob(answer_rows, model.lm_head.weight, answer_targets)  # [B*T]

    def padded_to_width(flat: Tensor) -> Tensor:
        wide = F.pad(is_policy, (0, max(0, width - length)))[:, :width].to(device)
        return flat.new_zeros(wide.shape).masked_scatter(wide, flat)  # [B, Z]

    policy_logp, policy_entropy = policy_logp if entropy else (policy_logp, None)
    return (
        padded_to_width(policy_logp),
        padded_to_width(policy_entropy.detach()) if entropy else None,
        answer_logp.view(len(bodies), len(answer)),
    )


def micro_batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Splits branches into batches of at most `size` (0 = one batch), longest first, so that neighbours in length share their padding."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    size = size or len(order)
    return [order[i : i + size] for i in range(0, len(order), size)]
