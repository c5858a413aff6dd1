"""The chunk work of kernels/logprob.py as Triton kernels: one product, its elementwise work fused behind it. The math is over there.

The schedule, drawn once. A persistent grid (one program per multiprocessor) walks over the tiles of the [N, V] logits; a tile is
BM rows x BN columns, its accumulator stays in registers, and hidden and weight stream in BK wide through a ring of `stages` slots:

                     V (vocabulary) ->
                 BN   BN   BN   BN | BN   BN ..        order of the tiles: down a band of GROUP columns, row by row, so that
              +----+----+----+----+----+----+          the programs running at one moment share few weight tiles (they stay in
    N     BM  |  0 |  1 |  2 |  3 | 12 | 13 |          the L2 cache while hidden passes by) and all of weight is read once
  (rows)  BM  |  4 |  5 |  6 |  7 | 14 |              (drawn for GROUP = 4)
    |     BM  |  8 |  9 | 10 | 11 |
    v         +----+----+----+----+----+----+
                   |
                   +-- tile = hidden[BM, H] weight[BN, H]^T in fp32, then, still in registers,
                       forward  -> m, s (, t) of each row in this tile [C, N] and, from the tile that owns it, the target's logit
                       backward -> dz [BM, BN] of a chunk of columns, ready for the two products of d hidden and d weight
                       loss     -> both at once: m, s and exp(z - m) [BM, BN]; `_finish_rows` turns the latter into dz

Every number is written by exactly one tile and summed in a fixed order: no atomics, no locks, the same bits every time.

Three traps. Device-made TMA descriptors need an allocator, which Triton keeps in a context variable that new threads do not
inherit, autograd's backward thread among them: so it is set before every launch. The interpreter computes bf16 wrongly without a word: so
it is given fp32 operands (UPCAST). And Triton's default for fp32 products on tensor cores is TF32, three digits: so "ieee".
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.logprob import combine

CHUNK_BYTES = 1 << 28  # dz of one backward chunk: 8192 columns of bf16 at 16384 rows; wide enough that its two products run at full rate
ROW_CHUNK_BYTES = 1 << 29  # exp(z - m) of one row chunk of the loss: 2048 rows of bf16 at V = 128k
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1e20)  # a logit that is none: exp gives 0, and 0 times it is 0 (with -inf it would be NaN)


@dataclass(frozen=True)
class Config:
    """How one kernel is cut: tile [bm, bn], bk columns of H a step, `stages` steps in flight, `group` vocabulary tiles a band."""

    bm: int
    bn: int
    bk: int
    stages: int
    warps: int
    group: int = 8
    tma: bool = False  # tiles fetched by the bulk copy engine
    flatten: bool = False  # one loop over (tile, step): the next tile's loads start under this tile's epilogue
    specialize: bool = False  # separate warps for loading and for computing (sm_90; 4 warps, no flatten, or Triton ignores it)


# ---- kernels -------------------------------------------------------------------------------------------------------------------


@triton.jit
def _tile_corner(tile, n, vocab, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Number of a tile -> (its first row, its column of tiles): bands of GROUP columns, each walked row by row."""
    down = tl.cdiv(n, BM)
    across = tl.cdiv(vocab, BN)
    band = tile // (GROUP * down)
    left = band * GROUP
    width = min(across - left, GROUP)  # the last band may be narrower
    inside = tile - left * down
    return (inside // width) * BM, left + inside % width


@triton.jit
def _operand(ptr, rows, columns, BR: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """The matrix [rows, columns] as what `_logits_tile` loads from: a TMA descriptor, or the pointer itself."""
    if TMA:
        return tl.make_tensor_descriptor(ptr, shape=[rows, columns], strides=[columns, 1], block_shape=[BR, BK])
    else:
        return ptr


@triton.jit
def _load(source, row, k, rows, columns, BR: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """[BR, BK] from (row, k); beyond the last row anything will do, those results are never stored."""
    if TMA:
        return source.load([row, k])
    else:
        r = tl.minimum(row + tl.arange(0, BR), rows - 1).to(tl.int64)
        return tl.load(source + r[:, None] * columns + (k + tl.arange(0, BK))[None, :])


@triton.jit
def _logits_tile(
    x, w, row, col, n, vocab, hidden_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x[row : row + BM] w[col : col + BN]^T in fp32 [BM, BN], before the temperature."""
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, hidden_size, BK):
        a = _load(x, row, k, n, hidden_size, BM, BK, TMA)
        b = _load(w, col, k, vocab, hidden_size, BN, BK, TMA)
        if UPCAST:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["n", "vocab"])  # ragged batches must not compile anew
def _partials_kernel(
    x_ptr, w_ptr, y_ptr,  # [n, H], [V, H], [n]
    m_ptr, s_ptr, t_ptr, target_ptr, e_ptr,  # [C, n], [C, n], [C, n] if ENTROPY, [n], [n, e_stride] if KEEP_EXP
    n, vocab, hidden_size, e_stride, scale,  # H is a multiple of BK; scale = log2(e) / temperature
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    EVEN_V: tl.constexpr, ENTROPY: tl.constexpr, KEEP_EXP: tl.constexpr,
    TMA: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    x = _operand(x_ptr, n, hidden_size, BM, BK, TMA)
    w = _operand(w_ptr, vocab, hidden_size, BN, BK, TMA)
    tiles = tl.cdiv(n, BM) * tl.cdiv(vocab, BN)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN, warp_specialize=SPECIALIZE):
        row, c = _tile_corner(tile, n, vocab, BM, BN, GROUP)
        col = c * BN
        acc = _logits_tile(x, w, row, col, n, vocab, hidden_size, BM, BN, BK, TMA, UPCAST)
        rows = row + tl.arange(0, BM)
        columns = col + tl.arange(0, BN)
        if not EVEN_V:
            acc = tl.where(columns[None, :] < vocab, acc, NOTHING)
        is_row = rows < n
        y = tl.load(y_ptr + rows, mask=is_row, other=-1)

        # the target's logit, from the accumulator that the sum is made of: log p <= 0 holds to the last bit of the sum
        is_target = columns[None, :] == y[:, None].to(tl.int32)
        target_logit = tl.sum(tl.where(is_target, acc, 0.0), 1)
        tl.store(target_ptr + rows, target_logit, mask=is_row & (y >= col) & (y < col + BN))

        m = tl.max(acc, 1)  # of raw logits: nothing is rounded before the difference is taken
        d = (acc - m[:, None]) * scale
        e = tl.exp2(d)
        at = c.to(tl.int64) * n + rows
        tl.store(m_ptr + at, m, mask=is_row)
        tl.store(s_ptr + at, tl.sum(e, 1), mask=is_row)
        if ENTROPY:
            tl.store(t_ptr + at, tl.sum(e * d, 1) * LN2, mask=is_row)
        if KEEP_EXP:
            to = e_ptr + rows.to(tl.int64)[:, None] * e_stride + columns[None, :]
            tl.store(to, e.to(e_ptr.dtype.element_ty), mask=is_row[:, None])  # the buffer is padded to whole tiles


@triton.jit(do_not_specialize=["n", "vocab"])  # ragged batches must not compile anew
def _dz_kernel(
    x_ptr, w_ptr, y_ptr,  # [n, H], [c, H], [n] column of the target in this chunk, or outside [0, c)
    max_ptr, g_ptr, a_ptr, b_ptr,  # [n] each, see dz_chunk; the last one if ENTROPY
    dz_ptr,  # [n, dz_stride], padded to whole tiles: no column has to be masked
    n, vocab, hidden_size, dz_stride, scale,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, PROGRAMS: tl.constexpr,
    ENTROPY: tl.constexpr,
    TMA: tl.constexpr, FLATTEN: tl.constexpr, SPECIALIZE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    x = _operand(x_ptr, n, hidden_size, BM, BK, TMA)
    w = _operand(w_ptr, vocab, hidden_size, BN, BK, TMA)
    tiles = tl.cdiv(n, BM) * tl.cdiv(vocab, BN)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN, warp_specialize=SPECIALIZE):
        row, c = _tile_corner(tile, n, vocab, BM, BN, GROUP)
        col = c * BN
        acc = _logits_tile(x, w, row, col, n, vocab, hidden_size, BM, BN, BK, TMA, UPCAST)
        rows = row + tl.arange(0, BM)
        columns = col + tl.arange(0, BN)
        is_row = rows < n
        y = tl.load(y_ptr + rows, mask=is_row, other=-1)
        row_max = tl.load(max_ptr + rows, mask=is_row, other=0.0)
        a = tl.load(a_ptr + rows, mask=is_row, other=0.0)
        d = (acc - row_max[:, None]) * scale
        if ENTROPY:
            b = tl.load(b_ptr + rows, mask=is_row, other=0.0)
            dz = (d * b[:, None] + a[:, None]) * tl.exp2(d)
        else:
            dz = tl.exp2(d) * a[:, None]
        g = tl.load(g_ptr + rows, mask=is_row, other=0.0)
        dz = tl.where(columns[None, :] == y[:, None].to(tl.int32), dz + g[:, None], dz)
        to = dz_ptr + rows.to(tl.int64)[:, None] * dz_stride + columns[None, :]
        tl.store(to, dz.to(dz_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit(do_not_specialize=["n", "vocab"])  # ragged batches must not compile anew
def _finish_rows_kernel(
    e_ptr, factor_ptr, y_ptr, g_ptr,  # [n, e_stride], [C, n], [n], [n]
    n, vocab, e_stride,
    BN: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """e [n, V] in place: exp(z - m of its tile) -> dz = 1[target] g + factor e, with factor = -g exp(m - lse), one per tile and row."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * TILES + tl.arange(0, TILES)  # [TILES] tiles of BN columns
    columns = c[:, None] * BN + tl.arange(0, BN)[None, :]  # [TILES, BN]
    factor = tl.load(factor_ptr + c.to(tl.int64) * n + row, mask=c * BN < vocab, other=0.0)
    is_tile = (c * BN < vocab)[:, None]  # whole tiles, padding included: a ragged mask would cost the wide loads and stores
    y = tl.load(y_ptr + row).to(tl.int32)
    g = tl.load(g_ptr + row)
    at = e_ptr + row * e_stride + columns
    e = tl.load(at, mask=is_tile, other=0.0).to(tl.float32)
    dz = tl.where(columns == y, g, 0.0) + factor[:, None] * e
    tl.store(at, dz.to(e_ptr.dtype.element_ty), mask=is_tile)


# ---- which configuration for which call ------------------------------------------------------------------------------------------
# Chosen by code, not by triton.autotune: the same call always runs the same kernel (and gives the same bits), and a configuration
# that a Triton version cannot compile is caught by tests/test_logprob_compile.py rather than on somebody's GPU.

HOPPER = Config(128, 256, 64, stages=4, warps=8, tma=True)
HOPPER_FEW_ROWS = Config(64, 256, 64, stages=4, warps=8, tma=True)  # reading weight once is all the work there is
AMPERE = Config(128, 256, 32, stages=4, warps=8)
AMPERE_FEW_ROWS = Config(64, 256, 64, stages=3, warps=8)
OTHER = Config(128, 128, 64, stages=3, warps=8)  # 96 KB of shared memory: what every GPU since Ampere has
FP32 = Config(64, 128, 32, stages=3, warps=8)  # no tensor cores: multiply-adds bound by registers, not by loads
INTERPRETER = Config(64, 256, 64, stages=1, warps=4, group=2)


def pick_config(capability: tuple[int, int] | None, dtype: torch.dtype, n: int) -> Config:
    """For n rows on a GPU of this capability (None: the interpreter)."""
    if capability is None:
        return INTERPRETER
    if dtype == torch.float32:
        return FP32
    if capability[0] == 9:
        return HOPPER if n > 64 else HOPPER_FEW_ROWS
    if capability[0] == 8:
        return AMPERE if n > 64 else AMPERE_FEW_ROWS
    return OTHER


# ---- launches: the functions that kernels/logprob.py calls (the same names as its class Plain) -------------------------------------


def chunk_columns(x: Tensor) -> int:
    return max(1024, CHUNK_BYTES // (max(len(x), 1) * x.element_size()) // 256 * 256)


def chunk_rows(x: Tensor, vocab: int) -> int:
    return max(128, ROW_CHUNK_BYTES // (vocab * x.element_size()) // 128 * 128)


def partials(x: Tensor, weight: Tensor, y: Tensor, temperature: float, want_entropy: bool) -> tuple[Tensor | None, ...]:
    """x [n, H], weight [V, H], y [n] -> m, s, t (or None), each [C, n], and the target's logit [n]: the arguments of `combine`."""
    return _forward(x, weight, y, temperature, want_entropy, keep_exp=False)[:4]


def dz_rows(x: Tensor, weight: Tensor, y: Tensor, g: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(logp [n], dz [n, V]) of whole rows for the upstream gradient g [n] of logp."""
    m, s, _, target_logit, e, bn = _forward(x, weight, y, temperature, False, keep_exp=True)
    tile_max = m.clone()  # combine overwrites
    logp, _, row_max, log_sum = combine(m, s, None, target_logit, temperature)
    g = g / temperature
    factor = ((tile_max - row_max) / temperature - log_sum).exp_().mul_(-g)  # [C, n]
    if len(x):
        with torch.cuda.device_of(x):
            grid = (len(x), triton.cdiv(len(factor), 8))
            _finish_rows_kernel[grid](e, factor, y.contiguous(), g, len(x), len(weight), e.stride(0), BN=bn, TILES=8, num_warps=8)
    return logp, e[:, : len(weight)]


def dz_chunk(x, w, y, row_max, log_sum, entropy, g, h, temperature) -> Tensor:
    """dz [n, c] of the columns w [c, H]. y [n] is the target's column in this chunk, or outside [0, c); h [n] may be None.

    With d = (logit - row_max) log2(e) / temperature, so that log p = d ln 2 - log_sum, the formula of the math becomes
    dz = 1[target] g' + exp2(d) (a + b d), each of g', a, b one number per row:
    """
    config = _config(x)
    g = g / temperature
    scale = -(-log_sum).exp()  # -1 / sum_j exp(z_j - max)
    a, b = scale * g, None
    if h is not None:
        h = h / temperature
        a, b = scale * (g + h * (entropy - log_sum)), scale * h / LOG2E
    dz = torch.empty(len(x), triton.cdiv(len(w), config.bn) * config.bn, dtype=_dz_dtype(x), device=x.device)
    _launch(_dz_kernel, config, x, w, y, row_max, g, a, b, dz, stride=dz.stride(0), temperature=temperature, ENTROPY=h is not None)
    return dz[:, : len(w)]


def _forward(x: Tensor, weight: Tensor, y: Tensor, temperature: float, want_entropy: bool, keep_exp: bool):
    config = _config(x)
    y = y.contiguous()
    n, tiles = len(x), triton.cdiv(len(weight), config.bn)
    m, s, t = (torch.empty(tiles, n, dtype=torch.float32, device=x.device) if want else None for want in (True, True, want_entropy))
    target_logit = torch.empty(n, dtype=torch.float32, device=x.device)
    e = torch.empty(n, tiles * config.bn, dtype=_dz_dtype(x), device=x.device) if keep_exp else None
    _launch(
        _partials_kernel, config, x, weight, y, m, s, t, target_logit, e, stride=e.stride(0) if keep_exp else 0, temperature=temperature,
        ENTROPY=want_entropy, KEEP_EXP=keep_exp, EVEN_V=len(weight) % config.bn == 0,
    )  # fmt: skip
    return m, s, t, target_logit, e, config.bn


def _interpreted_bf16(x: Tensor) -> bool:
    return not x.is_cuda and x.dtype == torch.bfloat16


def _dz_dtype(x: Tensor) -> torch.dtype:
    """16-bit dz for 16-bit inputs, since the products that follow want one dtype (the interpreter truncates to bf16, so not there)."""
    return torch.float32 if _interpreted_bf16(x) else x.dtype


def _config(x: Tensor) -> Config:
    capability = torch.cuda.get_device_capability(x.device) if x.is_cuda else None
    return pick_config(capability, x.dtype, len(x))


def _loadable(matrix: Tensor, bk: int) -> Tensor:
    """What the kernels can load in whole aligned steps: the matrix itself for every model we know, else a copy padded with zeros."""
    matrix = matrix.contiguous()
    if matrix.shape[1] % bk == 0 and matrix.data_ptr() % 16 == 0:
        return matrix
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % bk)).clone(memory_format=torch.contiguous_format)


def _launch(kernel, config: Config, x: Tensor, w: Tensor, *tensors: Tensor | None, stride: int, temperature: float, **flags: bool) -> None:
    n, vocab = len(x), len(w)
    if n == 0:
        return
    x, w = _loadable(x, config.bk), _loadable(w, config.bk)
    tiles = triton.cdiv(n, config.bm) * triton.cdiv(vocab, config.bn)
    # 3 in the interpreter: fewer than the tiles of any test worth the name, so that the persistent walk is tested too
    programs = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 3
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=x.device))
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[(min(tiles, programs),)](
            x, w, *tensors, n, vocab, x.shape[1], stride, LOG2E / temperature,
            BM=config.bm, BN=config.bn, BK=config.bk, GROUP=config.group, PROGRAMS=programs,
            TMA=config.tma, FLATTEN=config.flatten, SPECIALIZE=config.specialize, UPCAST=_interpreted_bf16(x),
            num_warps=config.warps, num_stages=config.stages, **flags,
        )  # fmt: skip
