"""kernels/logprob.py against the whole logits in float64.

A test with `backend` runs on both backends: "torch" on the CPU, and "triton" on a GPU if there is
one, else in Triton's interpreter. Chunks are made small (fixture `small_chunks`), so that these
small inputs cross the borders of chunks and tiles. The interpreter computes bf16 wrongly, without
an error: the kernels run in bf16 on a GPU only.
"""

import gc
import math
import os
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before kernels/logprob_triton.py is imported

from kernels import logprob  # noqa: E402
from kernels.logprob import IGNORE, Plain, linear_logprob  # noqa: E402

N, H, V = 70, 80, 600  # not multiples of any tile
CHUNK = 256  # columns
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRADIENT_ERROR = {  # relative, in the 2-norm
    torch.float32: 1e-6,
    torch.float16: 4e-4,
    torch.bfloat16: 3e-3,
}
both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])
# the interpreter computes rows beyond the last one, whose results are never stored
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, request):
    if request.node.name.startswith("test_gpu"):
        return
    from kernels import logprob_triton

    monkeypatch.setattr(Plain, "chunk_columns", lambda x: CHUNK)
    monkeypatch.setattr(logprob_triton, "chunk_columns", lambda x: CHUNK)


def problem(
    backend: str, dtype=torch.float32, n=N, h=H, v=V
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, h], weight [v, h] (logits of deviation 1), target [n], upstream gradient [n]."""
    device = "cuda" if CUDA and backend == "triton" else "cpu"
    if (backend, device, dtype) == ("triton", "cpu", torch.bfloat16):
        pytest.skip("the interpreter computes bf16 wrongly")
    options = dict(generator=torch.Generator(device).manual_seed(0), device=device)
    hidden = torch.randn(n, h, **options).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, **options) / math.sqrt(h)).to(dtype).requires_grad_()
    target = torch.randint(v, (n,), **options)
    g = torch.randn(n, **options)  # of both signs
    if n > 9:
        target[4] = IGNORE
        target[n - 1] = IGNORE
        g[2] = 0
        g[7] = 0
    return hidden, weight, target, g


def reference(
    hidden: Tensor, weight: Tensor, target: Tensor, g: Tensor, temperature=1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """logp, entropy, d hidden, d weight in float64, from the whole logits."""
    x = hidden.detach().double().requires_grad_()
    w = weight.detach().double().requires_grad_()
    keep = (target != IGNORE).double()
    full = torch.log_softmax(x @ w.T / temperature, -1)
    logp = full.gather(1, target.clamp(min=0)[:, None]).squeeze(1) * keep
    entropy = -(full.exp() * full).sum(1) * keep
    logp.backward(g.double())
    return logp.detach(), entropy.detach(), x.grad, w.grad


def close(ours: Tensor, exact: Tensor, bound: float) -> None:
    """The largest absolute difference is at most `bound`."""
    assert ours.shape == exact.shape
    assert (ours.detach().double() - exact).abs().max().item() <= bound


def near(ours: Tensor, exact: Tensor, bound: float) -> None:
    """The relative difference in the 2-norm is at most `bound`."""
    assert ours.shape == exact.shape
    assert (ours.double() - exact).norm().item() <= bound * exact.norm().item()


def matches_float64(backend, hidden, weight, target, g, temperature=1.0, bound=1e-5) -> None:
    dtype = hidden.dtype
    logp, entropy = linear_logprob(hidden, weight, target, temperature, True, backend)
    assert logp.dtype == entropy.dtype == torch.promote_types(dtype, torch.float32)
    logp.backward(g.to(logp.dtype))
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    exact, exact_entropy, d_hidden, d_weight = reference(hidden, weight, target, g, temperature)
    close(logp, exact, bound)
    close(entropy, exact_entropy, bound)
    near(hidden.grad, d_hidden, GRADIENT_ERROR[dtype])
    near(weight.grad, d_weight, GRADIENT_ERROR[dtype])


@contextmanager
def memory_filled_with_nan():
    """In deterministic mode PyTorch fills new memory with NaN, so what is not written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


# ---- values and gradients
@both_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_match_float64(backend, dtype, temperature):
    matches_float64(backend, *problem(backend, dtype), temperature)


@both_backends
def test_neither_the_entropy_nor_no_grad_changes_a_bit_of_logp_and_the_entropy_has_no_gradient(
    backend,
):
    hidden, weight, target, g = problem(backend)
    alone = linear_logprob(hidden, weight, target, backend=backend)
    expected = torch.autograd.grad(alone, (hidden, weight), g)
    with torch.no_grad():
        without = linear_logprob(hidden, weight, target, backend=backend)
    logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
    assert not (without.requires_grad or entropy.requires_grad)
    assert torch.equal(without, alone)
    assert torch.equal(logp, alone)
    (logp * g + entropy).sum().backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


@both_backends
def test_logits_around_minus_200_lose_no_precision(backend):
    """The inputs are on a coarse grid, so their fp32 products are exact: only the arithmetic of the
    softmax can differ from float64."""
    hidden, weight, target, g = problem(backend)
    with torch.no_grad():
        hidden.mul_(16).round_().div_(16)
        weight.mul_(64).round_().div_(16)
        hidden[:, -1] = 16
        weight[:, -1] = -12.5  # their product shifts every logit by -200
    logp, entropy = linear_logprob(hidden, weight, target, 0.7, True, backend)
    logp.backward(g)
    exact, exact_entropy, d_hidden, d_weight = reference(hidden, weight, target, g, 0.7)
    close(logp, exact, 1e-5)
    close(entropy, exact_entropy, 1e-5)
    # the last column of d hidden is -12.5 times the sum of dz, which is exactly 0
    near(hidden.grad[:, :-1], d_hidden[:, :-1], 1e-6)
    near(weight.grad, d_weight, 1e-6)


@both_backends
def test_probabilities_that_underflow_give_no_nan(backend):
    """With logits 1000 nats apart most p are 0 in fp32, and p log p must not become 0 * inf."""
    hidden, weight, target, g = problem(backend)
    sharp = (hidden.detach() * 100).requires_grad_()
    logp, entropy = linear_logprob(sharp, weight, target, entropy=True, backend=backend)
    logp.backward(g)
    exact, exact_entropy, _, _ = reference(sharp, weight, target, g)
    assert (exact < -500).any()
    assert ((exact_entropy < 1e-9) & (exact != 0)).any()
    assert ((logp - exact).abs() <= 1e-6 * exact.abs() + 1e-3).all()
    close(entropy, exact_entropy, 1e-3)
    assert sharp.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@both_backends
def test_a_nan_shows_in_its_row_and_in_no_other(backend):
    hidden, weight, target, g = problem(backend)
    clean = linear_logprob(hidden, weight, target, backend=backend)
    with torch.no_grad():
        hidden[5, 3] = math.nan
    g[0] = math.nan  # must not be taken for a zero
    dirty = linear_logprob(hidden, weight, target, backend=backend)
    dirty.backward(g)
    assert dirty[5].isnan()
    assert torch.equal(dirty[:5], clean[:5])
    assert torch.equal(dirty[6:], clean[6:])
    nan_rows = hidden.grad.isnan()
    assert nan_rows[[0, 5]].all()
    assert nan_rows.any(1).sum() == 2


# ---- rows that are not computed
@both_backends
def test_ignored_rows_give_exact_zeros_whatever_they_contain(backend):
    hidden, weight, target, g = problem(backend)
    ignored = target == IGNORE
    assert ignored.sum() == 2
    with torch.no_grad():
        hidden[ignored] = math.nan
    g[ignored] = math.inf
    logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
    logp.backward(g)
    assert (logp[ignored] == 0).all()
    assert (entropy[ignored] == 0).all()
    assert (hidden.grad[ignored] == 0).all()
    assert (logp[~ignored] < 0).all()
    assert weight.grad.isfinite().all()


@both_backends
@pytest.mark.parametrize("n", [0, N])
def test_without_a_target_everything_is_zero(backend, n):
    hidden, weight, target, g = problem(backend, n=n)
    target.fill_(IGNORE)
    with memory_filled_with_nan():
        logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
        logp.backward(g)
    assert torch.equal(logp, torch.zeros_like(g))
    assert torch.equal(entropy, torch.zeros_like(g))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@both_backends
def test_rows_whose_upstream_gradient_is_zero_are_not_computed(backend, monkeypatch):
    hidden, weight, target, g = problem(backend)
    g[: N // 2] = 0
    rows = []
    work = logprob._chunk_work(backend)
    dz_chunk = work.dz_chunk
    monkeypatch.setattr(
        work, "dz_chunk", lambda x, *rest: rows.append(len(x)) or dz_chunk(x, *rest)
    )
    linear_logprob(hidden, weight, target, backend=backend).backward(g)
    live = int(((g != 0) & (target != IGNORE)).sum())
    assert live < N // 2 and rows == [live] * 3  # three chunks of 256 columns
    assert (hidden.grad[: N // 2] == 0).all()


# ---- shapes, memory, bits
@both_backends
@pytest.mark.parametrize(
    "shape", [(1, 80, 600), (1, 1, 1), (3, 64, 256), (65, 7, 257), (5, 130, 2)], ids=str
)
def test_any_shape_matches_float64(backend, shape):
    matches_float64(backend, *problem(backend, torch.float32, *shape))


class Memory(TorchDispatchMode):
    """Bytes of the float tensors that operations return: the largest one, and the peak of all that
    are alive at the same time. (Triton's interpreter also copies tensors, as bytes: not counted.)
    """

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.peak = 0
        self.storages = {}  # address of the storage -> (weak reference, bytes)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
                self.largest = max(self.largest, tensor.nbytes)
        self.peak = max(self.peak, self.alive())
        return out

    def alive(self) -> int:
        return sum(size for reference, size in self.storages.values() if not reference.expired())


@both_backends
def test_no_tensor_holds_all_logits_and_after_the_call_only_its_results_are_in_memory(backend):
    """Triton keeps the allocator of the last launch and all that it refers to. The rows of hidden,
    copied without those that are ignored, must not be among it."""
    n, h, v = 130, 16, 1500
    hidden, weight, target, g = problem(backend, n=n, h=h, v=v)
    with Memory() as memory:
        logp, _ = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
        logp.backward(g)
        del logp, _
    assert weight.nbytes <= memory.largest <= 4 * n * v // 2
    gc.collect()  # of the interpreter's cycles
    gradients = hidden.grad.nbytes + weight.grad.nbytes
    assert memory.alive() == gradients + weight.nbytes  # its chunks are views


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_backward_pass_holds_one_chunk_of_dz_at_a_time(temperature):
    """On the CPU alone: the interpreter makes copies of its own. Both backends share this loop."""
    n, h, v = 128, 2, 4 * CHUNK
    hidden, weight, target, g = problem("torch", n=n, h=h, v=v)
    logp = linear_logprob(hidden, weight, target, temperature, backend="torch")
    with Memory() as memory:
        logp.backward(g)
    chunk = 4 * n * CHUNK
    gradients = weight.nbytes + hidden.nbytes
    assert 1 <= (memory.peak - gradients) / chunk < 1.2  # 0.2: inputs [n, h], [v, h], vectors [n]


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_output_is_written_and_the_same_call_gives_the_same_bits(backend, dtype):
    def run():
        hidden, weight, target, g = problem(backend, dtype)
        logp, entropy = linear_logprob(hidden, weight, target, 0.7, True, backend)
        logp.backward(g)
        return logp, entropy, hidden.grad, weight.grad

    first = run()
    with memory_filled_with_nan():
        second = run()
    for a, b in zip(first, second, strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


@both_backends
@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32], ids=str)
def test_the_layout_of_the_inputs_does_not_matter(backend, target_dtype):
    # H of whole loads and no ignored row: otherwise the rows would be copied on the way
    hidden, weight, target, _ = problem(backend, h=128)
    target.clamp_(min=0)
    logp = linear_logprob(hidden, weight, target, backend=backend)
    logp.sum().backward()  # an upstream gradient of stride 0
    x = hidden.detach().repeat_interleave(2, 0)[::2].requires_grad_()
    w = weight.detach().T.contiguous().T.requires_grad_()
    y = torch.stack([target, 0 * target], 1).to(target_dtype)[:, 0]
    assert not (x.is_contiguous() or w.is_contiguous() or y.is_contiguous())
    strided = linear_logprob(x, w, y, backend=backend)
    strided.sum().backward()
    close(strided, logp.detach().double(), 1e-6)
    near(x.grad, hidden.grad.double(), 1e-6)
    near(w.grad, weight.grad.double(), 1e-6)


# ---- bad arguments
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden=torch.zeros(N, H + 1)), "do not fit"),
        (dict(target=torch.zeros(N + 1, dtype=torch.long)), "do not fit"),
        (dict(target=torch.full((N,), V)), "outside"),
        (dict(target=torch.full((N,), -1)), "outside"),
        (dict(weight=torch.zeros(V, H, dtype=torch.bfloat16)), "not one dtype"),
        (dict(temperature=math.nan), "temperature"),
    ],
    ids=str,
)
def test_arguments_that_would_give_wrong_numbers_are_refused(change, message):
    hidden, weight, target, _ = problem("torch")
    arguments = dict(hidden=hidden, weight=weight, target=target) | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


# ---- Triton only
@pytest.mark.skipif(CUDA, reason="changes the configuration of the interpreter")
@pytest.mark.parametrize("change", [dict(tma=True), dict(group=3)], ids=str)
def test_how_tiles_are_loaded_and_in_which_order_does_not_change_a_bit(monkeypatch, change):
    from kernels import logprob_triton

    def run():
        # 3 x 5 tiles: the last band is narrower than the others
        hidden, weight, target, g = problem("triton", n=130, v=1100)
        logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend="triton")
        logp.backward(g)
        return logp, entropy, hidden.grad, weight.grad

    expected = run()
    config = replace(logprob_triton.INTERPRETER, **change)
    monkeypatch.setattr(logprob_triton, "INTERPRETER", config)
    for a, b in zip(run(), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(not CUDA, reason="needs a CUDA device: bf16 rounding, tensor cores")
@pytest.mark.parametrize(
    "shape", [(700, 4096, 128256), (937, 1024, 152064), (300, 1001, 50257)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_real_sizes_match_float64(shape, dtype):
    matches_float64("triton", *problem("triton", dtype, *shape), bound=1e-3)
