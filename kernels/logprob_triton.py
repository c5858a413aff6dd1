"""The work on one chunk of kernels/logprob.py (which has the math) as two fused Triton kernels.

A persistent grid, one program per multiprocessor, walks over the tiles of the [N, V] logits. A tile
is BM rows x BN columns. Its accumulator stays in registers; hidden and weight are loaded BK columns
of H at a time, `stages` loads in flight:

                     V (vocabulary) ->
                 BN   BN   BN   BN | BN   BN ..      The numbers are the order of the tiles, drawn
              +----+----+----+----+----+----+        for GROUP = 4. The vocabulary is cut into bands
    N     BM  |  0 |  1 |  2 |  3 | 12 | 13 |        of GROUP tiles, and a band is walked row by
  (rows)  BM  |  4 |  5 |  6 |  7 | 14 |             row. So the programs that run at one moment
    |     BM  |  8 |  9 | 10 | 11 |                  share few weight tiles: these stay in the L2
    v         +----+----+----+----+----+----+        cache, and weight is read from memory once.

A tile is hidden[BM, H] weight[BN, H]^T in fp32. The rest is done on the accumulator:

    forward    m, s and t of the tile's rows [C, N], and the logit of each target in the tile
    backward   dz [BM, BN] for a chunk of columns, the operand of the two products that follow

Each number is written by one tile and summed in a fixed order. There are no atomics and no locks,
so the same call gives the same bits.

Two traps:
1. TMA descriptors made on the device need an allocator. Triton keeps it in a context variable,
   which new threads, such as autograd's, do not inherit. So it is set before every launch.
2. Triton's default for fp32 products is TF32, which has three digits. So the precision is "ieee".
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

# Bytes of dz in one backward chunk: 8192 columns of bf16 at 16384 rows. Narrower chunks would slow
# down the two products that follow.
CHUNK_BYTES = 1 << 28
LOG2E = 1.4426950408889634
LN2 = tl.constexpr(0.6931471805599453)
NO_LOGIT = tl.constexpr(-1e20)  # exp of it is 0, and 0 times it is 0 (0 times -inf is NaN)


# ---- configurations
# Chosen by code and not by triton.autotune: the same call always runs the same kernel and gives the
# same bits. tests/test_logprob_compile.py compiles each of them, so none fails first on a GPU.


@dataclass(frozen=True)
class Config:
    bm: int  # tile: rows
    bn: int  # tile: columns of the vocabulary
    bk: int  # columns of H in one load
    stages: int  # loads in flight
    warps: int
    group: int = 8  # tiles of the vocabulary in a band
    tma: bool = False  # load tiles by TMA, the bulk copy engine


HOPPER = Config(128, 256, 64, stages=4, warps=8, tma=True)
HOPPER_FEW_ROWS = Config(64, 256, 64, stages=4, warps=8, tma=True)
OTHER = Config(128, 128, 64, stages=3, warps=8)  # 96 KB of shared memory: fits since Ampere
FP32 = Config(64, 128, 32, stages=3, warps=8)  # no tensor cores: bound by registers, not by loads
INTERPRETER = Config(64, 256, 64, stages=1, warps=4, group=2)


def pick_config(x: Tensor) -> Config:
    """For the rows x [n, H]."""
    if not x.is_cuda:
        return INTERPRETER
    if x.dtype == torch.float32:
        return FP32
    major, _ = torch.cuda.get_device_capability(x.device)
    if major != 9:
        return OTHER
    return HOPPER if len(x) > 64 else HOPPER_FEW_ROWS


# ---- launches: functions of the same names as in kernels.logprob.Plain


def chunk_columns(x: Tensor) -> int:
    """Columns of the vocabulary in one backward chunk, for the rows x [n, H]."""
    return max(1024, CHUNK_BYTES // (max(len(x), 1) * x.element_size()) // 256 * 256)


def partials(
    x: Tensor, weight: Tensor, y: Tensor, temperature: float, want_entropy: bool
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """x [n, H], weight [V, H], target y [n] -> m, s, t or None [C, n], the target's logit [n]."""
    config = pick_config(x)
    tiles = triton.cdiv(len(weight), config.bn)  # C: here a chunk is one tile wide
    m = torch.empty(tiles, len(x), dtype=torch.float32, device=x.device)
    s = torch.empty_like(m)
    t = torch.empty_like(m) if want_entropy else None
    target_logit = torch.empty(len(x), dtype=torch.float32, device=x.device)
    outputs = (m, s, t, target_logit)
    flags = dict(ENTROPY=want_entropy, EVEN_V=len(weight) % config.bn == 0)
    _launch(_partials_kernel, config, x, weight, temperature, y.contiguous(), *outputs, **flags)
    return outputs


def dz_chunk(x, w, y, row_max, log_sum, g, temperature) -> Tensor:
    """dz [n, c] for the columns w [c, H]; see `Plain.dz_chunk`."""
    config = pick_config(x)
    g = g / temperature
    factor = -(-log_sum).exp() * g  # dz_nj = exp((logit_nj - row_max_n) / temperature) factor_n
    padded = triton.cdiv(len(w), config.bn) * config.bn  # whole tiles: no column is masked
    dz = torch.empty(len(x), padded, dtype=x.dtype, device=x.device)
    _launch(_dz_kernel, config, x, w, temperature, y, row_max, g, factor, dz)
    return dz[:, : len(w)]


def _launch(kernel, config, x, w, temperature: float, *tensors: Tensor | None, **flags: bool):
    n, vocab = len(x), len(w)
    if n == 0:
        return
    x = _loadable(x, config.bk)
    w = _loadable(w, config.bk)
    tiles = triton.cdiv(n, config.bm) * triton.cdiv(vocab, config.bn)
    if x.is_cuda:
        programs = torch.cuda.get_device_properties(x.device).multi_processor_count
    else:
        programs = 3  # fewer than the tiles of a test, so that the persistent loop is tested
    device = x.device  # Triton keeps the allocator, which must not keep the rows x as well
    triton.set_allocator(
        lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)
    )
    with torch.cuda.device_of(x):  # Triton launches on the current device
        kernel[(min(tiles, programs),)](
            x, w, *tensors, n, vocab, x.shape[1], LOG2E / temperature,
            BM=config.bm, BN=config.bn, BK=config.bk, GROUP=config.group, PROGRAMS=programs,
            TMA=config.tma, num_warps=config.warps, num_stages=config.stages, **flags,
        )  # fmt: skip


def _loadable(matrix: Tensor, bk: int) -> Tensor:
    """The matrix in whole aligned steps of bk columns: itself, or a copy padded with zeros."""
    rows, columns = matrix.shape
    if matrix.is_contiguous() and columns % bk == 0 and matrix.data_ptr() % 16 == 0:
        return matrix  # this is so for every model we know
    padded = matrix.new_zeros(rows, triton.cdiv(columns, bk) * bk)
    padded[:, :columns] = matrix
    return padded


# ---- kernels


@triton.jit(do_not_specialize=["n", "vocab"])  # a new batch size must not compile again
def _partials_kernel(
    x_ptr, w_ptr, y_ptr,  # [n, H], [V, H], target [n]
    m_ptr, s_ptr, t_ptr, target_ptr,  # [C, n], [C, n], [C, n] if ENTROPY, logit of the target [n]
    n, vocab, hidden_size, scale,  # H is a multiple of BK; scale = log2(e) / temperature
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr, TMA: tl.constexpr,
    ENTROPY: tl.constexpr, EVEN_V: tl.constexpr,
):  # fmt: skip
    x = _operand(x_ptr, n, hidden_size, BM, BK, TMA)
    w = _operand(w_ptr, vocab, hidden_size, BN, BK, TMA)
    tiles = tl.cdiv(n, BM) * tl.cdiv(vocab, BN)
    first = tl.program_id(0)
    for tile in tl.range(first, tiles, PROGRAMS):
        row, c = _tile_position(tile, n, vocab, BM, BN, GROUP)
        col = c * BN
        acc = _logits_tile(x, w, row, col, n, vocab, hidden_size, BM, BN, BK, TMA)
        rows = row + tl.arange(0, BM)
        columns = col + tl.arange(0, BN)
        if not EVEN_V:
            acc = tl.where(columns[None, :] < vocab, acc, NO_LOGIT)
        is_row = rows < n
        y = tl.load(y_ptr + rows, mask=is_row, other=-1)

        # from the accumulator that is also summed, so that log p <= 0 up to the rounding of the sum
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


@triton.jit(do_not_specialize=["n", "vocab"])
def _dz_kernel(
    x_ptr, w_ptr, y_ptr,  # [n, H], [c, H], target [n] as a column of this chunk or outside [0, c)
    max_ptr, g_ptr, factor_ptr,  # [n] each: row_max, g and factor of `dz_chunk`
    dz_ptr,  # [n, c rounded up to whole tiles]
    n, vocab, hidden_size, scale,  # vocab = c
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    GROUP: tl.constexpr, PROGRAMS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    x = _operand(x_ptr, n, hidden_size, BM, BK, TMA)
    w = _operand(w_ptr, vocab, hidden_size, BN, BK, TMA)
    across = tl.cdiv(vocab, BN)
    tiles = tl.cdiv(n, BM) * across
    first = tl.program_id(0)
    for tile in tl.range(first, tiles, PROGRAMS):
        row, c = _tile_position(tile, n, vocab, BM, BN, GROUP)
        col = c * BN
        acc = _logits_tile(x, w, row, col, n, vocab, hidden_size, BM, BN, BK, TMA)
        rows = row + tl.arange(0, BM)
        columns = col + tl.arange(0, BN)
        is_row = rows < n
        y = tl.load(y_ptr + rows, mask=is_row, other=-1)
        row_max = tl.load(max_ptr + rows, mask=is_row, other=0.0)
        factor = tl.load(factor_ptr + rows, mask=is_row, other=0.0)
        g = tl.load(g_ptr + rows, mask=is_row, other=0.0)
        dz = tl.exp2((acc - row_max[:, None]) * scale) * factor[:, None]
        is_target = columns[None, :] == y[:, None].to(tl.int32)
        dz = tl.where(is_target, dz + g[:, None], dz)
        at = rows.to(tl.int64)[:, None] * (across * BN) + columns[None, :]
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=is_row[:, None])


@triton.jit
def _tile_position(tile, n, vocab, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    """Number of a tile -> (its first row, its column of tiles), in the order drawn above."""
    down = tl.cdiv(n, BM)
    across = tl.cdiv(vocab, BN)
    band = tile // (GROUP * down)
    left = band * GROUP
    width = min(across - left, GROUP)  # the last band may be narrower
    inside = tile - left * down
    return (inside // width) * BM, left + inside % width


@triton.jit
def _logits_tile(
    x, w, row, col, n, vocab, hidden_size,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """x[row : row + BM] w[col : col + BN]^T in fp32 [BM, BN], before the temperature."""
    acc = tl.zeros([BM, BN], dtype=tl.float32)
    for k in range(0, hidden_size, BK):
        a = _load(x, row, k, n, hidden_size, BM, BK, TMA)
        b = _load(w, col, k, vocab, hidden_size, BN, BK, TMA)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _operand(ptr, rows, columns, BR: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """The matrix [rows, columns] as what `_load` takes: a TMA descriptor, or the pointer."""
    if TMA:
        return tl.make_tensor_descriptor(
            ptr, shape=[rows, columns], strides=[columns, 1], block_shape=[BR, BK]
        )
    else:
        return ptr


@triton.jit
def _load(source, row, k, rows, columns, BR: tl.constexpr, BK: tl.constexpr, TMA: tl.constexpr):
    """[BR, BK] from (row, k). Rows beyond the last hold any values: they are never stored."""
    if TMA:
        return source.load([row, k])
    else:
        r = tl.minimum(row + tl.arange(0, BR), rows - 1).to(tl.int64)
        return tl.load(source + r[:, None] * columns + (k + tl.arange(0, BK))[None, :])
