"""Per-token log-probabilities of given tokens under the language-model head, without ever holding the logits.

The reward of this method IS a number computed here, and at a 128k vocabulary the head is also its memory wall: the logits of
16384 rows are 8.4 GB in fp32, and log_softmax with its backward wants several copies. So head and log-softmax are one function:

    z_nj   = <hidden_n, weight_j> / temperature                      logits, fp32 from the accumulator on (never rounded to bf16)
    logp_n = z_n,target - log sum_j exp z_nj                         of the target token, in nats
    H_n    = - sum_j p_nj log p_nj,   p_nj = exp(z_nj - lse_n)       entropy of the whole row, optional, in nats

and for any upstream gradients g_n (of logp) and h_n (of the entropy), zeros and negatives included,

    dz_nj     = ((1[j = target_n] - p_nj) g_n - h_n p_nj (log p_nj + H_n)) / temperature
    d hidden  = dz weight          d weight = dz^T hidden

The [N, V] matrices z, p and dz exist only as chunks of vocabulary columns. Forward, every chunk c leaves three numbers per row,
from which `_combine` builds the whole row exactly (this order of operations also survives logits that all lie at -200):

    m_c = max_j z_nj      s_c = sum_j exp(z_nj - m_c)      t_c = sum_j exp(z_nj - m_c) (z_nj - m_c)

Backward, every chunk is recomputed from hidden and weight, turned into dz in place, and used twice: its rows of d weight are
complete after one product and are written once, and its share of d hidden is added to an fp32 sum. Multiply-adds count
8 N H V flops in total (2 forward, 6 backward). Where every row's weight is known before the pass, as in a policy-gradient loss,
`linear_logprob_loss` takes whole rows at a time and computes the gradients in the forward pass: 6 N H V.

Two backends do the chunk work and share everything else: "torch" below runs anywhere and is the readable definition; "triton"
(kernels/logprob_triton.py, imported only when used) fuses each chunk's product and elementwise work into one kernel.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORE = -100  # a target that asks for nothing: logp 0, entropy 0, no gradient (the value cross_entropy uses)

# How many logits a chunk of the plain version may hold. On a CPU a chunk that stays near the caches is also the fastest.
CHUNK_LOGITS = 1 << 22
ROW_CHUNK_LOGITS = 1 << 24  # `linear_logprob_loss`: whole rows; more rows a chunk = fewer passes over d weight


def linear_logprob(
    hidden: Tensor, weight: Tensor, target: Tensor, temperature: float = 1.0, entropy: bool = False, backend: str = "auto"
) -> Tensor | tuple[Tensor, Tensor]:
    """log softmax(hidden weight^T / temperature) at the target tokens, differentiable in hidden and weight.

    hidden [N, H] and weight [V, H] share a dtype: bf16, fp16, fp32 or fp64. target [N] integer, each in [0, V) or -100 (ignored:
    logp 0, entropy 0, no gradient). Returns logp [N] in nats, or (logp [N], entropy [N]) with `entropy`; both fp32 (fp64 for fp64
    inputs) and both differentiable. Rows whose upstream gradient is exactly 0 cost nothing in the backward pass.
    backend: "triton" | "torch" | "auto" (triton on a CUDA device, torch elsewhere). Gradients come in the dtype of their input;
    fp16 gradients under- and overflow as everywhere, so scale the loss. Raises ValueError for anything else.
    """
    _check(hidden, weight, target, temperature)
    backend = _pick_backend(backend, hidden)
    logp, row_entropy = _LinearLogprob.apply(hidden, weight, target, float(temperature), entropy, backend)
    return (logp, row_entropy) if entropy else logp


def linear_logprob_loss(
    hidden: Tensor, weight: Tensor, target: Tensor, row_weight: Tensor, temperature: float = 1.0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """loss = -sum_n row_weight_n logp_n for weights known in advance, its gradient computed in the forward pass (6 N H V flops).

    hidden [N, H], weight [V, H], target [N] as in `linear_logprob`; row_weight [N] float, taken as a constant. Returns
    (loss [], logp [N] without gradient), equal to `-(row_weight * linear_logprob(...)).sum()` to rounding. Holds the gradients from
    the forward to the one backward pass it allows. A 16-bit weight whose rows need more than one chunk also holds an fp32
    [V, H] sum meanwhile, because rounding every chunk's share to 16 bits would be felt. Raises ValueError for bad arguments.
    """
    _check(hidden, weight, target, temperature)
    if row_weight.shape != target.shape or not row_weight.is_floating_point() or row_weight.device != hidden.device:
        raise ValueError(
            f"row_weight must be a float tensor of shape {list(target.shape)} on {hidden.device}, "
            f"not {row_weight.dtype} of shape {list(row_weight.shape)} on {row_weight.device}"
        )
    backend = _pick_backend(backend, hidden)
    need = tuple(torch.is_grad_enabled() and t.requires_grad for t in (hidden, weight))
    return _LinearLogprobLoss.apply(hidden, weight, target, row_weight.detach(), float(temperature), backend, need)


def _check(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [N, H] and weight [V, H], not {list(hidden.shape)} and {list(weight.shape)}")
    if 0 in weight.shape:
        raise ValueError(f"weight must have at least one row and one column, not {list(weight.shape)}")
    if target.shape != hidden.shape[:1]:
        raise ValueError(f"target must be [N] = [{hidden.shape[0]}], one token per row of hidden, not {list(target.shape)}")
    if hidden.dtype != weight.dtype or hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        raise ValueError(f"hidden and weight must share one of bf16, fp16, fp32, fp64, not {hidden.dtype} and {weight.dtype}")
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"target must hold integers (int64 or int32), not {target.dtype}")
    if not hidden.device == weight.device == target.device:
        raise ValueError(f"hidden, weight and target must be on one device, not {hidden.device}, {weight.device}, {target.device}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a positive number, not {temperature}")


def _pick_backend(backend: str, hidden: Tensor) -> str:
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f'backend must be "auto", "triton" or "torch", not {backend!r}')
    if backend == "triton":
        raise ValueError("the triton backend is not built yet")
    return "torch"


def _wanted_rows(target: Tensor, vocab: int) -> Tensor | None:
    """Indices of the rows that are not ignored, or None when all are wanted (then nothing has to be copied). One device sync."""
    wanted = target != IGNORE
    outside = wanted & ((target < 0) | (target >= vocab))
    n_wanted, n_outside = torch.stack([wanted.sum(), outside.sum()]).tolist()
    if n_outside:
        row = int(outside.nonzero()[0])
        raise ValueError(f"target[{row}] = {int(target[row])} is outside [0, {vocab}) and is not {IGNORE}")
    return None if n_wanted == len(target) else wanted.nonzero().squeeze(1)


def _take(rows: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    return list(tensors) if rows is None else [t[rows] for t in tensors]


def _spread(rows: Tensor | None, values: Tensor, n: int) -> Tensor:
    """values [len(rows), ...] -> [n, ...] with zeros in the other rows."""
    return values if rows is None else values.new_zeros(n, *values.shape[1:]).index_copy_(0, rows, values)


# ---- the general path: any upstream gradient -----------------------------------------------------------------------------------


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, temperature, want_entropy, backend):
        n = len(hidden)
        rows = _wanted_rows(target, len(weight))
        x, y = _take(rows, hidden, target.long())
        parts = _partials(x, weight, y, temperature, want_entropy)
        logp, entropy, row_max, log_sum = (_spread(rows, v, n) for v in _combine(*parts, temperature))
        ctx.save_for_backward(hidden, weight, target, row_max, log_sum, entropy)
        ctx.temperature, ctx.backend = temperature, backend
        ctx.set_materialize_grads(False)  # an output nobody used sends None, not zeros: it then costs nothing
        return logp, entropy if want_entropy else None

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logp, grad_entropy):
        hidden, weight, target, row_max, log_sum, entropy = ctx.saved_tensors
        need_x, need_w = ctx.needs_input_grad[:2]
        live = torch.zeros_like(target, dtype=torch.bool)  # [N]
        for g in (grad_logp, grad_entropy):
            if g is not None:
                live |= g != 0
        rows = (live & (target != IGNORE)).nonzero().squeeze(1)
        rows = None if len(rows) == len(target) else rows
        zero = torch.zeros_like(row_max)
        x, y, row_max, log_sum, entropy, g, h = _take(
            rows, hidden, target.long(), row_max, log_sum, entropy, zero if grad_logp is None else grad_logp,
            zero if grad_entropy is None else grad_entropy,
        )  # fmt: skip
        h = None if grad_entropy is None else h

        dx = torch.zeros(x.shape, dtype=_sum_dtype(x), device=x.device) if need_x else None  # [n, H] summed over the chunks
        dw = (torch.empty_like if len(x) else torch.zeros_like)(weight) if need_w else None  # [V, H] every row written once
        columns = _chunk_columns(len(x))
        for v in range(0, len(weight) if len(x) else 0, columns):
            w = weight[v : v + columns]  # [c, H]
            dz = _dz_chunk(x, w, y - v, row_max, log_sum, entropy, g, h, ctx.temperature)  # [n, c]
            if need_w:
                _mm_out(dw[v : v + columns], dz.T, x)
            if need_x:
                _add_mm(dx, dz, w)
        if need_x:
            dx = _spread(rows, dx.to(hidden.dtype), len(hidden))
        return dx, dw, None, None, None, None


def _combine(m: Tensor, s: Tensor, t: Tensor | None, target_logit: Tensor, temperature: float) -> tuple[Tensor, ...]:
    """Chunk partials [C, N] -> (logp, entropy, row_max, log_sum), each [N].

    m and target_logit are logits before the temperature, as the accumulator held them: only their differences are ever scaled, so
    an offset common to all logits costs no precision. log_sum = log sum_j exp((logit_j - row_max) / temperature).
    """
    row_max = m.amax(0)
    below = (m - row_max) / temperature  # [C, N] <= 0
    scale = below.exp()
    total = (s * scale).sum(0)
    log_sum = total.log()
    logp = (target_logit - row_max) / temperature - log_sum
    # H = log total - sum_j e_j (z_j - max) / total: no p log p of a vanishing p is ever formed
    entropy = torch.zeros_like(logp) if t is None else log_sum - ((t + s * below) * scale).sum(0) / total
    return logp, entropy, row_max, log_sum


# ---- the chunk work, plain -----------------------------------------------------------------------------------------------------


def _partials(x: Tensor, weight: Tensor, y: Tensor, temperature: float, want_entropy: bool) -> tuple[Tensor, ...]:
    """x [n, H], weight [V, H], y [n] -> m, s, t (or None) [C, n] and the target's logit [n]; m and the logit before temperature."""
    columns = _chunk_columns(len(x))
    target_logit = torch.zeros(len(x), dtype=_sum_dtype(x), device=x.device)
    ms, ss, ts = [], [], []
    for v in range(0, len(weight), columns):
        z = _logits(x, weight[v : v + columns])  # [n, c]
        inside = (y >= v) & (y < v + z.shape[1])
        at_target = z.gather(1, (y - v).clamp(0, z.shape[1] - 1)[:, None]).squeeze(1)
        target_logit = torch.where(inside, at_target, target_logit)
        ms.append(z.amax(1))
        z.sub_(ms[-1][:, None])
        if temperature != 1:
            z.div_(temperature)
        if want_entropy:
            e = z.exp()
            ts.append(z.mul_(e).sum(1))
        else:
            e = z.exp_()
        ss.append(e.sum(1))
    return torch.stack(ms), torch.stack(ss), torch.stack(ts) if want_entropy else None, target_logit


def _dz_chunk(x, w, y, row_max, log_sum, entropy, g, h, temperature) -> Tensor:
    """dz [n, c] of the columns w [c, H]; y [n] is the target's column here (outside [0, c): not in this chunk), the rest is [n]."""
    z = _logits(x, w).sub_(row_max[:, None])
    if temperature != 1:
        z.div_(temperature)
    z.sub_(log_sum[:, None])  # log p
    if h is None:
        dz = z.exp_().mul_(-(g / temperature)[:, None])
    else:
        dz = z.exp().mul_(z.add_(entropy[:, None]).mul_(h[:, None]).add_(g[:, None])).mul_(-1 / temperature)
    inside = (y >= 0) & (y < len(w))
    dz.scatter_add_(1, y.clamp(0, len(w) - 1)[:, None], (g * inside / temperature)[:, None].to(dz.dtype))
    return dz


# ---- products that accumulate in fp32 ------------------------------------------------------------------------------------------
# On CUDA the tensor cores take 16-bit operands and hand over fp32 (out_dtype). A CPU product of 16-bit operands rounds its result
# to 16 bits, so there the operands are widened, chunk by chunk.


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _chunk_columns(n: int) -> int:
    return max(256, CHUNK_LOGITS // max(n, 1) // 64 * 64)


def _widens(a: Tensor) -> bool:
    return a.is_cuda and a.dtype in (torch.bfloat16, torch.float16)


def _logits(x: Tensor, w: Tensor) -> Tensor:
    """x [n, H] w^T [H, c] -> [n, c], fp32 or fp64."""
    if _widens(x):
        return torch.mm(x, w.T, out_dtype=torch.float32)
    return torch.mm(x.to(_sum_dtype(x)), w.to(_sum_dtype(x)).T)


def _mm_out(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, rounded once to out's dtype; b sets the precision of the product's operands on CUDA."""
    if _widens(b) or b.dtype == a.dtype == out.dtype:
        torch.mm(a.to(b.dtype), b, out=out)
    else:
        out.copy_(torch.mm(a.to(_sum_dtype(b)), b.to(_sum_dtype(b))))


def _add_mm(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in total's dtype (fp32 or fp64)."""
    if _widens(b):
        torch.addmm(total, a.to(b.dtype), b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


# ---- the path of known weights: gradients in the forward pass -------------------------------------------------------------------


class _LinearLogprobLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, row_weight, temperature, backend, need):
        n = len(hidden)
        wide = _sum_dtype(hidden)
        rows = _wanted_rows(target, len(weight))
        g = -row_weight.to(wide)
        if rows is not None:
            g = _spread(rows, g[rows], n)  # an ignored row's weight, NaN included, must not reach the loss
        logp = torch.zeros(n, dtype=wide, device=hidden.device)
        learns = (g != 0) & (target != IGNORE) if any(need) else torch.zeros_like(g, dtype=torch.bool)
        rows_g = learns.nonzero().squeeze(1)
        rows_0 = (~learns & (target != IGNORE)).nonzero().squeeze(1)
        if len(rows_0):  # weight 0: the log-prob is still wanted, the gradient is not
            x, y = hidden[rows_0], target[rows_0].long()
            logp[rows_0] = _combine(*_partials(x, weight, y, temperature, False), temperature)[0]
        rows_g = None if len(rows_g) == n else rows_g
        x, y, g_live = _take(rows_g, hidden, target.long(), g)
        logp_live, dx, dw = _loss_gradients(x, weight, y, g_live, temperature, need)
        if rows_g is None:
            logp = logp_live
        else:
            logp[rows_g] = logp_live
        ctx.grads = (None if dx is None else _spread(rows_g, dx, n), dw)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(logp)
        return (g * logp).sum(), logp

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, _):
        if ctx.grads is None:
            raise RuntimeError("linear_logprob_loss keeps one set of gradients: it allows one backward pass (use linear_logprob)")
        grads, ctx.grads = ctx.grads, None
        dx, dw = (None if d is None or grad_loss is None else d.mul_(grad_loss) for d in grads)
        return dx, dw, None, None, None, None, None


def _loss_gradients(x: Tensor, weight: Tensor, y: Tensor, g: Tensor, temperature: float, need: tuple[bool, bool]):
    """x [n, H], weight [V, H], y [n], g [n] = d loss / d logp -> logp [n], d x [n, H] or None, d weight [V, H] or None."""
    n, wide = len(x), _sum_dtype(x)
    logp = torch.empty(n, dtype=wide, device=x.device)
    step = max(1, ROW_CHUNK_LOGITS // len(weight))
    dx = torch.empty_like(x) if need[0] else None
    dw = torch.zeros(weight.shape, dtype=wide, device=x.device) if need[1] else None
    w = weight if _widens(weight) or not n else weight.to(wide)
    for i in range(0, n, step):
        r = slice(i, i + step)
        z = _logits(x[r], w)  # [step, V]: complete rows, so their sum is known before the next line of work
        z.sub_(z.amax(1, keepdim=True))
        if temperature != 1:
            z.div_(temperature)
        at_target = z.gather(1, y[r, None])  # [step, 1]
        total = z.exp_().sum(1, keepdim=True)
        logp[r] = (at_target - total.log()).squeeze(1)
        a = g[r, None] / temperature
        dz = z.mul_(-a / total)
        dz.scatter_add_(1, y[r, None], a)
        if need[0]:
            _mm_out(dx[r], dz, w)
        if need[1]:
            _add_mm(dw, dz.T, x[r])
    return logp, dx, None if dw is None else dw.to(weight.dtype)
