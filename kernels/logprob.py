"""Log-probs of given tokens under the language-model head, without the [N, V] logits.

The reward is computed here, so it has to be exact. With 128k tokens in the vocabulary the head also
needs the most memory: the logits of 16384 rows take 8.4 GB in fp32, and log_softmax with its
backward needs several copies. So the head and log-softmax are one function:

    z_nj   = <hidden_n, weight_j> / temperature     logits, in fp32
    logp_n = z_n,target - log sum_j exp z_nj        log-prob of the target token, in nats
    H_n    = - sum_j p_nj log p_nj                  entropy of row n, in nats; p_n = softmax(z_n)

and for upstream gradients g_n of logp_n, zero and negative ones included,

    dz_nj    = g_n (1[j = target_n] - p_nj) / temperature
    d hidden = dz weight          d weight = dz^T hidden

The entropy is a metric and has no gradient. The [N, V] matrices z, p and dz exist only as chunks of
vocabulary columns.

Forward: a chunk c leaves three numbers per row, from which `combine` computes logp and H. Only
differences of logits are scaled and exponentiated, so logits around -200 lose no precision:

    m_c = max_j z_nj     s_c = sum_j exp(z_nj - m_c)     t_c = sum_j exp(z_nj - m_c) (z_nj - m_c)

Backward: each chunk of z is recomputed from hidden and weight and turned into dz in place. One
product gives its rows of d weight; another one is added to d hidden, which is summed in fp32.

Compared with the usual fused cross-entropy:
1. That one returns a mean and computes its gradient in the forward pass, 6 N H V flops. Here each
   token has its own log-prob and upstream gradient: 8 N H V (2 forward, 6 backward).
2. That one cuts the rows into chunks and sums d weight over them. With chunks of the vocabulary,
   each row of d weight is written once and no fp32 [V, H] sum is held.
3. Logits are never rounded to bf16. The rounding would change the log-prob of a 64-token answer
   by tenths of a nat.

There are two backends for the work on a chunk. "torch" is the class `Plain` below: it runs on any
device and is the readable definition. "triton" (kernels/logprob_triton.py, imported only when used)
fuses the product of a chunk with its elementwise work.
"""

import importlib.util
import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # target of a row without a target token, as in cross_entropy


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    entropy: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature) at the targets, differentiable in hidden, weight.

    hidden: [N, H] in bf16, fp16, fp32 or fp64.
    weight: [V, H] in the same dtype.
    target: [N] int64 or int32, in [0, V) or -100 (ignored: logp 0, entropy 0, no gradient).
    backend: "torch"; "triton" (a CUDA device; not fp64); or "auto", which is triton for more than
        16 rows of a 16-bit dtype on an Ampere or newer GPU, else torch.

    Returns logp [N] in nats, or (logp [N], entropy [N]) with `entropy`; in fp32 (fp64 for fp64
    inputs). logp is differentiable once; the entropy is not. Gradients have the dtype of their
    input. Rows whose upstream gradient is exactly 0 cost nothing in the backward pass.

    Raises ValueError for shapes, dtypes, targets and temperatures that would give wrong numbers
    without an error of torch or Triton.
    """
    _check(hidden, weight, target, temperature)
    if backend == "auto":
        backend = _pick_backend(hidden)
    logp, row_entropy = _LinearLogprob.apply(
        hidden, weight, target, float(temperature), entropy, backend
    )
    return (logp, row_entropy) if entropy else logp


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, want_entropy, backend):
        rows = _wanted_rows(target, len(weight))
        x, y = _take(rows, hidden, target.long())  # [n, H], [n]
        partials = _chunk_work(backend).partials(x, weight, y, temperature, want_entropy)
        per_row = combine(*partials, temperature)
        logp, entropy, row_max, log_sum = (
            _put_back(rows, values, len(hidden)) for values in per_row
        )
        ctx.save_for_backward(hidden, weight, target, row_max, log_sum)
        ctx.temperature = temperature
        ctx.backend = backend
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, _):
        hidden, weight, target, row_max, log_sum = ctx.saved_tensors
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        live = (grad_logp != 0) & (target != IGNORE)  # a NaN is not 0, so it reaches the gradients
        rows = live.nonzero().squeeze(1)
        x, y, row_max, log_sum, g = _take(rows, hidden, target.long(), row_max, log_sum, grad_logp)

        d_hidden = torch.zeros(x.shape, dtype=_wide(x), device=x.device) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        work = _chunk_work(ctx.backend)
        columns = work.chunk_columns(x)
        for start in range(0, len(weight), columns):
            w = weight[start : start + columns]  # [c, H]
            dz = work.dz_chunk(x, w, y - start, row_max, log_sum, g, ctx.temperature)  # [n, c]
            if need_weight:
                # in the dtype of d_weight, rounded once
                torch.mm(dz.T.to(x.dtype), x, out=d_weight[start : start + columns])
            if need_hidden:
                _add_mm(d_hidden, dz, w)
            del dz  # or it would still be held while the next chunk is computed
        if need_hidden:
            d_hidden = _put_back(rows, d_hidden.to(hidden.dtype), len(hidden))
        return d_hidden, d_weight, None, None, None, None


def combine(
    m: Tensor, s: Tensor, t: Tensor | None, target_logit: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """m, s, t [C, n] of all chunks -> logp, entropy, row_max, log_sum, each [n].

    m and target_logit [n] are logits before the division by the temperature; s and t are sums over
    logits after it. Without t the entropy is 0. m, s and t are overwritten.
    log_sum = log sum_j exp((logit_j - row_max) / temperature).
    """
    row_max = m.amax(0)
    difference = m.sub_(row_max).div_(temperature)  # [C, n]
    scale = difference.exp()
    if t is not None:
        moment = t.add_(s * difference).mul_(scale).sum(0)  # sum_j exp(z_j - max z) (z_j - max z)
    total = s.mul_(scale).sum(0)  # sum_j exp(z_j - max z)
    log_sum = total.log()
    logp = (target_logit - row_max) / temperature - log_sum
    # p log p is never formed: for a p that underflows to 0 it would be 0 * inf
    entropy = torch.zeros_like(logp) if t is None else log_sum - moment / total
    return logp, entropy, row_max, log_sum


def _take(rows: Tensor, *tensors: Tensor) -> list[Tensor]:
    """The given rows (indices [n]) of each tensor [N, ...]; uncopied if that is all of them."""
    if len(rows) == len(tensors[0]):
        return list(tensors)
    return [tensor[rows] for tensor in tensors]


def _put_back(rows: Tensor, values: Tensor, size: int) -> Tensor:
    """The inverse of `_take`: values [n, ...] -> [size, ...], zeros in the other rows."""
    if len(rows) == size:
        return values
    return values.new_zeros(size, *values.shape[1:]).index_copy_(0, rows, values)


# ---- the work on one chunk


def _chunk_work(backend: str):
    """`Plain`, or the Triton module, which has functions of the same names."""
    if backend == "torch":
        return Plain
    from kernels import logprob_triton  # here, because Triton need not be installed

    return logprob_triton


class Plain:
    """The work on one chunk in PyTorch operations, in place where that saves an [n, c] buffer."""

    # Logits in a chunk. On a CPU a chunk that stays near the caches is also the fastest.
    LOGITS = 1 << 23
    GPU_LOGITS = 1 << 26

    @staticmethod
    def chunk_columns(x: Tensor) -> int:
        """Columns of the vocabulary in one chunk, for the rows x [n, H]."""
        logits = Plain.GPU_LOGITS if x.is_cuda else Plain.LOGITS
        return max(256, logits // max(len(x), 1) // 64 * 64)

    @staticmethod
    def partials(
        x: Tensor, weight: Tensor, y: Tensor, temperature: float, want_entropy: bool
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """x [n, H], weight [V, H], target y [n] -> the arguments of `combine`.

        These are m, s and t (None without the entropy), each [C, n], and the target's logit [n].
        """
        n = len(x)
        columns = Plain.chunk_columns(x)
        target_logit = torch.zeros(n, dtype=_wide(x), device=x.device)
        # Buffers for all chunks: allocated for each chunk, between the small results that stay,
        # they fragmented the heap to many times their size.
        z_buffer = target_logit.new_empty(n * min(columns, len(weight)))
        e_buffer = torch.empty_like(z_buffer) if want_entropy else z_buffer
        m, s, t = [], [], []
        for start in range(0, len(weight), columns):
            w = weight[start : start + columns]  # [c, H]
            z = z_buffer[: n * len(w)].view(n, len(w))  # [n, c]
            e = e_buffer[: n * len(w)].view(n, len(w))  # [n, c]
            head_logits(x, w, out=z)
            column, inside = _column_in_chunk(y - start, w)
            at_column = z.gather(1, column).squeeze(1)
            target_logit = torch.where(inside, at_column, target_logit)
            m.append(z.amax(1))
            z.sub_(m[-1][:, None])
            if temperature != 1:
                z.div_(temperature)
            torch.exp(z, out=e)
            s.append(e.sum(1))
            if want_entropy:
                t.append(z.mul_(e).sum(1))
        moments = torch.stack(t) if want_entropy else None
        return torch.stack(m), torch.stack(s), moments, target_logit

    @staticmethod
    def dz_chunk(x, w, y, row_max, log_sum, g, temperature) -> Tensor:
        """dz [n, c] for the columns w [c, H] of the vocabulary.

        y [n]: the target's column in this chunk; outside [0, c) if it is in another chunk.
        row_max, log_sum [n]: from `combine`. g [n]: upstream gradient of logp.
        """
        z = head_logits(x, w).sub_(row_max[:, None])
        if temperature != 1:
            z.div_(temperature)
        factor = -(-log_sum).exp() / temperature * g  # [n]: p_nj = exp(z_nj - max z - log_sum)
        dz = z.exp_().mul_(factor[:, None])
        column, inside = _column_in_chunk(y, w)
        at_target = torch.where(inside, g / temperature, 0)
        return dz.scatter_add_(1, column, at_target[:, None])


def _column_in_chunk(y: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """y [n] -> the same clamped to the columns of w [c, H], as an index [n, 1]; y in [0, c) [n]."""
    inside = (y >= 0) & (y < len(w))
    return y.clamp(0, len(w) - 1)[:, None], inside


# ---- products of 16-bit matrices, summed in fp32
# The tensor cores of a GPU multiply 16-bit matrices and return fp32 sums (out_dtype). On a CPU the
# operands of the logits are converted to fp32. Those of the gradients are not: the gradients are
# rounded to 16 bits anyway, and the products would take twice the time.


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _tensor_cores(x: Tensor) -> bool:
    return x.is_cuda and x.element_size() == 2


def head_logits(x: Tensor, w: Tensor, out: Tensor | None = None) -> Tensor:
    """x [n, H], w [c, H] -> x w^T [n, c] in fp32 or fp64. On a CPU w may be wider than x."""
    if _tensor_cores(x):
        return torch.mm(x, w.T, out_dtype=torch.float32, out=out)
    return torch.mm(x.to(_wide(x)), w.to(_wide(x)).T, out=out)


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, with total in fp32 or fp64. On a CPU a 16-bit product is rounded before."""
    if _tensor_cores(b):
        torch.addmm(total, a.to(b.dtype), b, out_dtype=total.dtype, out=total)
    elif b.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a.to(b.dtype), b))


# ---- arguments


def _check(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> None:
    if hidden.shape[1:] != weight.shape[1:] or target.shape != hidden.shape[:1]:
        shapes = [list(tensor.shape) for tensor in (hidden, weight, target)]
        raise ValueError(f"hidden [N, H], weight [V, H], target [N] do not fit: {shapes}")
    if hidden.dtype != weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: not one dtype")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a positive number, not {temperature}")


def _pick_backend(hidden: Tensor) -> str:
    # cuBLAS is better at fp32 products, which do not use tensor cores, and at 16 rows or fewer
    if not _tensor_cores(hidden) or len(hidden) <= 16:
        return "torch"
    ampere = torch.cuda.get_device_capability(hidden.device) >= (8, 0)
    return "triton" if ampere and importlib.util.find_spec("triton") else "torch"


def _wanted_rows(target: Tensor, vocab: int) -> Tensor:
    """Indices of the rows that are not ignored; ValueError for a target outside [0, vocab)."""
    wanted = target != IGNORE
    outside = wanted & ((target < 0) | (target >= vocab))
    if outside.any():
        raise ValueError(f"target {int(target[outside][0])} is outside [0, {vocab})")
    return wanted.nonzero().squeeze(1)
