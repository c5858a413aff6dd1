"""kernels/logprob.py against the whole logits in float64.

A test with `backend` runs on both backends: "torch" on the CPU, and "triton" on a GPU if there is
one, else in Triton's interpreter. Chunks are made small (fixture `small_chunks`), so that these
small inputs cross the borders of chunks and tiles. The interpreter does not round dz to bf16. The
effect of that rounding is tested on a GPU only (the last section).
"""

import math
import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

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

    monkeypatch.setattr(Plain, "chunk_columns", staticmethod(lambda x: CHUNK))
    monkeypatch.setattr(logprob_triton, "chunk_columns", lambda x: CHUNK)


def device_of(backend: str) -> str:
    return "cuda" if CUDA and backend == "triton" else "cpu"


def problem(
    backend: str, dtype=torch.float32, n=N, h=H, v=V, seed=0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, h], weight [v, h] (logits of deviation 1), target [n], upstream gradient [n]."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=generator).to(dtype)
    weight = (torch.randn(v, h, generator=generator) / math.sqrt(h)).to(dtype)
    target = torch.randint(v, (n,), generator=generator)
    g = torch.randn(n, generator=generator)  # of both signs
    if n > 9:
        target[4] = IGNORE
        target[n - 1] = IGNORE
        g[2] = 0
        g[7] = 0
    device = device_of(backend)
    hidden = hidden.to(device).requires_grad_()
    weight = weight.to(device).requires_grad_()
    return hidden, weight, target.to(device), g.to(device)


def reference(
    hidden: Tensor, weight: Tensor, target: Tensor, g: Tensor | None = None, temperature=1.0
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """logp, entropy, d hidden, d weight in float64 on the CPU, from the whole logits."""
    x = hidden.detach().double().cpu().requires_grad_()
    w = weight.detach().double().cpu().requires_grad_()
    target = target.cpu().long()
    keep = (target != IGNORE).double()
    full = torch.log_softmax(x @ w.T / temperature, -1)
    logp = full.gather(1, target.clamp(min=0)[:, None]).squeeze(1) * keep
    entropy = -(full.exp() * full).sum(1) * keep
    if g is not None:
        logp.backward(g.double().cpu())
    return logp.detach(), entropy.detach(), x.grad, w.grad


def close(ours: Tensor, exact: Tensor, bound: float) -> None:
    """The largest absolute difference is at most `bound`."""
    assert ours.shape == exact.shape
    assert (ours.detach().double().cpu() - exact).abs().max().item() <= bound


def near(ours: Tensor, exact: Tensor, bound: float) -> None:
    """The relative difference in the 2-norm is at most `bound`."""
    assert ours.shape == exact.shape
    assert ((ours.double().cpu() - exact).norm() / exact.norm()).item() <= bound


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
    hidden, weight, target, g = problem(backend, dtype)
    logp = linear_logprob(hidden, weight, target, temperature, backend=backend)
    logp.backward(g)
    exact, _, d_hidden, d_weight = reference(hidden, weight, target, g, temperature)
    assert logp.dtype == torch.float32
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    close(logp, exact, 1e-5)
    near(hidden.grad, d_hidden, GRADIENT_ERROR[dtype])
    near(weight.grad, d_weight, GRADIENT_ERROR[dtype])


@both_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_entropy_matches_float64(backend, dtype, temperature):
    hidden, weight, target, _ = problem(backend, dtype, seed=1)
    _, entropy = linear_logprob(hidden, weight, target, temperature, True, backend)
    assert entropy.dtype == torch.float32
    close(entropy, reference(hidden, weight, target, None, temperature)[1], 1e-5)


@both_backends
def test_the_entropy_has_no_gradient_and_leaves_that_of_logp_as_it_is(backend):
    hidden, weight, target, g = problem(backend)
    alone = linear_logprob(hidden, weight, target, backend=backend)
    expected = torch.autograd.grad(alone, (hidden, weight), g)
    logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
    assert not entropy.requires_grad
    assert torch.equal(logp, alone)
    (logp * g + entropy).sum().backward()
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(weight.grad, expected[1])


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float64_inputs_are_computed_in_float64(temperature):
    hidden, weight, target, g = problem("torch", torch.float64)
    logp, entropy = linear_logprob(hidden, weight, target, temperature, entropy=True)
    logp.backward(g.double())
    exact, exact_entropy, d_hidden, d_weight = reference(hidden, weight, target, g, temperature)
    close(logp, exact, 1e-12)
    close(entropy, exact_entropy, 1e-12)
    near(hidden.grad, d_hidden, 1e-12)
    near(weight.grad, d_weight, 1e-12)


def test_gradients_match_finite_differences_in_float64():
    hidden, weight, target, _ = problem("torch", torch.float64, n=4, h=3, v=7)
    target[1] = IGNORE
    assert torch.autograd.gradcheck(
        lambda x, w: linear_logprob(x, w, target, 0.7), (hidden, weight)
    )


@both_backends
def test_the_log_prob_of_a_64_token_answer_in_bf16_is_exact_to_a_thousandth_nat(backend):
    """With logits rounded to bf16 it would be off by tenths of a nat."""
    hidden, weight, target, _ = problem(backend, torch.bfloat16, n=64, v=4000)
    answer = linear_logprob(hidden, weight, target, backend=backend).double().sum().cpu()
    assert abs(answer - reference(hidden, weight, target)[0].sum()) < 1e-3


@both_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_around_minus_200_lose_no_precision(backend, dtype):
    """The inputs are on a coarse grid, so their fp32 products are exact: only the arithmetic of the
    softmax can differ from float64."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randint(-32, 33, (N, H), generator=generator) / 16
    weight = torch.randint(-8, 9, (V, H), generator=generator) / 16
    hidden[:, -1] = 16
    weight[:, -1] = -12.5  # their product shifts every logit by -200
    device = device_of(backend)
    hidden = hidden.to(device, dtype).requires_grad_()
    weight = weight.to(device, dtype).requires_grad_()
    target = torch.randint(V, (N,), generator=generator).to(device)
    g = torch.randn(N, generator=generator).to(device)
    logp, entropy = linear_logprob(hidden, weight, target, 0.7, True, backend)
    logp.backward(g)
    exact, exact_entropy, d_hidden, d_weight = reference(hidden, weight, target, g, 0.7)
    close(logp, exact, 1e-5)
    close(entropy, exact_entropy, 1e-5)
    # the last column of d hidden is -12.5 times the sum of dz, which is exactly 0
    near(hidden.grad[:, :-1], d_hidden[:, :-1], GRADIENT_ERROR[dtype])
    near(weight.grad, d_weight, GRADIENT_ERROR[dtype])


@both_backends
def test_probabilities_that_underflow_give_no_nan(backend):
    """With logits 1000 nats apart most p are 0 in fp32, and p log p must not become 0 * inf."""
    hidden, weight, target, g = problem(backend)
    sharp = (hidden.detach() * 100).requires_grad_()
    logp, entropy = linear_logprob(sharp, weight, target, entropy=True, backend=backend)
    logp.backward(g)
    exact, exact_entropy, _, _ = reference(sharp, weight, target)
    assert (exact < -500).any()
    assert ((exact_entropy < 1e-9) & (exact != 0)).any()
    assert ((logp.double().cpu() - exact).abs() <= 1e-6 * exact.abs() + 1e-3).all()
    close(entropy, exact_entropy, 1e-3)
    assert sharp.grad.isfinite().all()
    assert weight.grad.isfinite().all()


@both_backends
def test_a_nan_in_one_row_of_hidden_shows_in_that_row_and_in_no_other(backend):
    hidden, weight, target, _ = problem(backend)
    clean = linear_logprob(hidden, weight, target, backend=backend)
    with torch.no_grad():
        hidden[5, 3] = math.nan
    dirty = linear_logprob(hidden, weight, target, backend=backend)
    assert dirty[5].isnan()
    assert torch.equal(dirty[:5], clean[:5])
    assert torch.equal(dirty[6:], clean[6:])


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_if_all_rows_are_ignored_everything_is_zero(backend, dtype):
    hidden, weight, target, g = problem(backend, dtype)
    target.fill_(IGNORE)
    with memory_filled_with_nan():
        logp = linear_logprob(hidden, weight, target, backend=backend)
        logp.backward(g)
    assert (logp == 0).all()
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


@both_backends
def test_rows_whose_upstream_gradient_is_zero_are_not_computed(backend, monkeypatch):
    hidden, weight, target, g = problem(backend)
    g[: N // 2] = 0
    work = logprob._chunk_work(backend)
    dz_chunk = work.dz_chunk
    rows = []

    def recorded(x, *arguments):
        rows.append(len(x))
        return dz_chunk(x, *arguments)

    monkeypatch.setattr(work, "dz_chunk", staticmethod(recorded) if work is Plain else recorded)
    linear_logprob(hidden, weight, target, backend=backend).backward(g)
    live = int(((g != 0) & (target != IGNORE)).sum())
    assert live < N // 2
    assert rows == [live] * 3  # three chunks of 256 columns
    assert (hidden.grad[: N // 2] == 0).all()
    near(hidden.grad, reference(hidden, weight, target, g)[2], 1e-6)


@both_backends
def test_a_nan_upstream_gradient_is_not_taken_for_a_zero(backend):
    hidden, weight, target, g = problem(backend)
    g[0] = math.nan
    linear_logprob(hidden, weight, target, backend=backend).backward(g)
    assert hidden.grad[0].isnan().all()
    assert hidden.grad[1].isfinite().all()


# ---- shapes, memory, bits


@both_backends
@pytest.mark.parametrize(
    "shape", [(1, 80, 600), (1, 1, 1), (3, 64, 256), (65, 7, 257), (5, 130, 2)], ids=str
)
def test_any_shape_matches_float64(backend, shape):
    hidden, weight, target, g = problem(backend, torch.float32, *shape)
    logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
    logp.backward(g)
    exact, exact_entropy, d_hidden, d_weight = reference(hidden, weight, target, g)
    close(logp, exact, 1e-5)
    close(entropy, exact_entropy, 1e-5)
    close(hidden.grad, d_hidden, 1e-5)
    close(weight.grad, d_weight, 1e-5)


@both_backends
def test_no_rows_are_allowed(backend):
    hidden, weight, target, g = problem(backend, n=0)
    with memory_filled_with_nan():
        logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
        logp.backward(g)
    assert logp.shape == entropy.shape == (0,)
    assert hidden.grad.shape == (0, H)
    assert (weight.grad == 0).all()


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
        alive = sum(size for reference, size in self.storages.values() if not reference.expired())
        self.peak = max(self.peak, alive)
        return out


@both_backends
def test_no_tensor_holds_the_logits_of_the_whole_batch(backend):
    n, h, v = 130, 16, 1500
    hidden, weight, target, g = problem(backend, n=n, h=h, v=v)
    with Memory() as memory:
        logp, _ = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
        logp.backward(g)
    assert weight.nbytes <= memory.largest <= 4 * n * v // 2


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
    close(strided, logp.detach().double().cpu(), 1e-6)
    near(x.grad, hidden.grad.double().cpu(), 1e-6)
    near(w.grad, weight.grad.double().cpu(), 1e-6)


# ---- with autograd


@both_backends
@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_the_gradient_that_is_wanted_is_computed(backend, wanted, monkeypatch):
    hidden, weight, target, g = problem(backend)
    _, _, d_hidden, d_weight = reference(hidden, weight, target, g)
    if wanted == "hidden":
        weight.requires_grad_(False)
        monkeypatch.setattr(logprob, "_mm_out", None)  # a call would raise
    else:
        hidden.requires_grad_(False)
        monkeypatch.setattr(logprob, "_add_mm", None)
    linear_logprob(hidden, weight, target, backend=backend).backward(g)
    if wanted == "hidden":
        near(hidden.grad, d_hidden, 1e-6)
        assert weight.grad is None
    else:
        near(weight.grad, d_weight, 1e-6)
        assert hidden.grad is None


@both_backends
def test_without_grad_the_values_are_the_same(backend):
    hidden, weight, target, _ = problem(backend)
    logp = linear_logprob(hidden, weight, target, backend=backend)
    with torch.no_grad():
        without = linear_logprob(hidden, weight, target, backend=backend)
    assert logp.requires_grad and not without.requires_grad
    assert torch.equal(without, logp)


@both_backends
def test_a_weight_tied_to_the_embedding_gets_both_gradients(backend):
    _, weight, target, g = problem(backend)
    tokens = torch.arange(N, device=weight.device) % 50
    hidden = torch.tanh(torch.nn.functional.embedding(tokens, weight))
    linear_logprob(hidden, weight, target, backend=backend).backward(g)

    w = weight.detach().double().cpu().requires_grad_()
    full = torch.log_softmax(torch.tanh(w[tokens.cpu()]) @ w.T, -1)
    logp = full.gather(1, target.cpu().clamp(min=0)[:, None]).squeeze(1)
    (logp * (target.cpu() != IGNORE)).backward(g.double().cpu())
    near(weight.grad, w.grad, 1e-6)


# ---- bad arguments, imports


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(hidden=torch.zeros(N, H + 1)), "hidden must be"),
        (dict(hidden=torch.zeros(2, N, H)), "hidden must be"),
        (dict(weight=torch.zeros(0, H)), "at least one row"),
        (dict(target=torch.zeros(N + 1, dtype=torch.long)), "one token per row"),
        (dict(target=torch.zeros(N)), "integers"),
        (dict(target=torch.full((N,), V)), "outside"),
        (dict(target=torch.full((N,), -1)), "outside"),
        (dict(weight=torch.zeros(V, H, dtype=torch.bfloat16)), "share"),
        (dict(hidden=torch.zeros(N, H, dtype=torch.int32)), "share"),
        (dict(weight=torch.zeros(V, H, device="meta")), "one device"),
        (dict(temperature=0.0), "temperature"),
        (dict(temperature=math.nan), "temperature"),
        (dict(backend="cuda"), "backend"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value,
)
def test_bad_arguments_are_refused_by_name(change, message):
    hidden, weight, target, _ = problem("torch")
    arguments = dict(hidden=hidden, weight=weight, target=target) | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)


def test_triton_refuses_fp64_and_a_cpu(monkeypatch):
    hidden, weight, target, _ = problem("torch", torch.float64)
    with pytest.raises(ValueError, match="fp64"):
        linear_logprob(hidden, weight, target, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA"):
        linear_logprob(hidden.float(), weight.float(), target, backend="triton")


def test_on_a_cpu_triton_need_not_be_installed():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels.logprob import linear_logprob\n"
        "print(linear_logprob(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([1, 4])).tolist())"
    )
    root = Path(__file__).parent.parent
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    assert [round(value, 5) for value in eval(run.stdout)] == [-1.60944, -1.60944]  # log 1/5


# ---- Triton only

needs_interpreter = pytest.mark.skipif(CUDA, reason="changes the configuration of the interpreter")
needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device: bf16 rounding, tensor cores")


@needs_interpreter
def test_tma_and_pointers_give_the_same_bits(monkeypatch):
    from kernels import logprob_triton

    config = logprob_triton.INTERPRETER

    def run(tma: bool):
        monkeypatch.setattr(logprob_triton, "INTERPRETER", replace(config, tma=tma))
        hidden, weight, target, g = problem("triton")
        logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend="triton")
        logp.backward(g)
        return logp, entropy, hidden.grad, weight.grad

    for a, b in zip(run(tma=False), run(tma=True), strict=True):
        assert torch.equal(a, b)


@needs_interpreter
@pytest.mark.parametrize("group", [1, 3, 8])
def test_the_order_of_the_tiles_does_not_change_a_bit(monkeypatch, group):
    from kernels import logprob_triton

    # 3 x 5 tiles: the last band is narrower than the others
    hidden, weight, target, _ = problem("triton", n=130, v=1100)
    expected = linear_logprob(hidden, weight, target, backend="triton")
    config = replace(logprob_triton.INTERPRETER, group=group)
    monkeypatch.setattr(logprob_triton, "INTERPRETER", config)
    assert torch.equal(linear_logprob(hidden, weight, target, backend="triton"), expected)


@needs_gpu
@pytest.mark.parametrize(
    "shape",
    [(256, 2048, 32000), (1937, 4096, 128256), (4096, 1024, 152064), (300, 1001, 50257)],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_real_sizes_match_float64(shape, dtype):
    hidden, weight, target, g = problem("triton", dtype, *shape)
    logp, entropy = linear_logprob(hidden, weight, target, entropy=True)
    logp.backward(g)
    exact, exact_entropy, d_hidden, d_weight = blockwise_reference(hidden, weight, target, g)
    close(logp, exact, 1e-3)
    close(entropy, exact_entropy, 1e-3)
    near(hidden.grad, d_hidden, GRADIENT_ERROR[dtype])
    near(weight.grad, d_weight, GRADIENT_ERROR[dtype])


def blockwise_reference(hidden, weight, target, g):
    """`reference` on the GPU, 128 rows at a time: the whole logits in float64 would not fit."""
    w = weight.detach().double()
    d_weight = torch.zeros_like(w)
    logp, entropy, d_hidden = [], [], []
    for start in range(0, len(hidden), 128):
        block = slice(start, start + 128)
        x = hidden[block].detach().double()
        keep = (target[block] != IGNORE).double()
        y = target[block].clamp(min=0)[:, None]
        full = torch.log_softmax(x @ w.T, -1)
        p = full.exp()
        logp.append((full.gather(1, y).squeeze(1) * keep).cpu())
        entropy.append((-(p * full).sum(1) * keep).cpu())
        upstream = (g[block].double() * keep)[:, None]
        dz = (-p * upstream).scatter_add_(1, y, upstream)
        d_hidden.append((dz @ w).cpu())
        d_weight.addmm_(dz.T, x)
    return torch.cat(logp), torch.cat(entropy), torch.cat(d_hidden), d_weight.cpu()


@needs_gpu
def test_gpu_memory_beyond_the_gradients_stays_under_600_mb():
    hidden, weight, target, g = problem("triton", torch.bfloat16, 16384, 4096, 128256)
    hidden.grad = torch.zeros_like(hidden)
    weight.grad = torch.zeros_like(weight)
    inputs_and_gradients = torch.cuda.memory_allocated() + hidden.nbytes + weight.nbytes
    torch.cuda.reset_peak_memory_stats()
    linear_logprob(hidden, weight, target).backward(g)
    assert torch.cuda.max_memory_allocated() - inputs_and_gradients <= 600e6
