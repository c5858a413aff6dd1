"""What kernels/logprob.py promises, each promise held against the whole logits in float64.

Every test that takes `backend` runs on both: "torch", and "triton" on the GPU where there is one, else through Triton's interpreter.
Chunks are made tiny (fixture `small_chunks`), so that each of these small inputs crosses chunk and tile borders. The interpreter does
not round dz to bf16; what that rounding costs is tested on a GPU only (the last section).
"""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # Triton looks at it when kernels/logprob_triton.py is imported

from kernels import logprob as module  # noqa: E402
from kernels.logprob import IGNORE, Plain, linear_logprob, linear_logprob_loss  # noqa: E402

N, H, V = 70, 80, 600  # no multiple of any tile
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GRADIENT_ERROR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}  # relative, in the 2-norm
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # the interpreter's lanes that are never stored
both_backends = pytest.mark.parametrize("backend", ["torch", "triton"])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, request):
    if request.node.name.startswith("test_gpu"):
        return  # real sizes, real chunks
    monkeypatch.setattr(Plain, "chunk_columns", staticmethod(lambda x: 256))
    monkeypatch.setattr(Plain, "chunk_rows", staticmethod(lambda x, vocab: 32))
    from kernels import logprob_triton

    monkeypatch.setattr(logprob_triton, "chunk_columns", lambda x: 256)
    monkeypatch.setattr(logprob_triton, "chunk_rows", lambda x, vocab: 32)


def place(backend: str) -> str:
    return "cuda" if CUDA and backend == "triton" else "cpu"


def problem(backend: str, dtype=torch.float32, n=N, h=H, v=V, seed=0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [n, h], weight [v, h] (logits of standard deviation 1), target [n], upstream gradients of logp and entropy [n]."""
    r = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n, h, generator=r).to(dtype)
    weight = (torch.randn(v, h, generator=r) / math.sqrt(h)).to(dtype)
    target = torch.randint(v, (n,), generator=r)
    g, e = torch.randn(2, n, generator=r).unbind()  # negatives included
    if n > 9:
        target[4] = target[n - 1] = IGNORE
        g[2] = g[7] = e[2] = e[8] = 0  # row 2 wants no gradient at all
    d = place(backend)
    return hidden.to(d).requires_grad_(), weight.to(d).requires_grad_(), target.to(d), g.to(d), e.to(d)


def reference(hidden, weight, target, g=None, e=None, temperature=1.0):
    """(logp, entropy, d hidden, d weight) in float64 on the CPU, from the whole logits."""
    x, w = (t.detach().double().cpu().requires_grad_() for t in (hidden, weight))
    target = target.cpu().long()
    keep = (target != IGNORE).double()
    full = torch.log_softmax(x @ w.T / temperature, -1)
    logp = full.gather(1, target.clamp(min=0)[:, None]).squeeze(1) * keep
    entropy = -(full.exp() * full).sum(1) * keep
    if g is not None:
        ((logp * g.double().cpu()).sum() + (0 if e is None else (entropy * e.double().cpu()).sum())).backward()
    return logp.detach(), entropy.detach(), x.grad, w.grad


def close(ours: Tensor, exact: Tensor, bound: float) -> None:
    """Largest absolute difference."""
    assert ours.shape == exact.shape
    assert (ours.detach().double().cpu() - exact).abs().max().item() <= bound


def near(ours: Tensor, exact: Tensor, bound: float) -> None:
    """Relative difference in the 2-norm."""
    assert ours.shape == exact.shape
    assert ((ours.double().cpu() - exact).norm() / exact.norm()).item() <= bound


# ---- values and gradients ------------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_match_float64(backend, dtype, temperature):
    hidden, weight, target, g, _ = problem(backend, dtype)
    logp = linear_logprob(hidden, weight, target, temperature, backend=backend)
    logp.backward(g)
    exact, _, dx, dw = reference(hidden, weight, target, g, None, temperature)
    assert logp.dtype == torch.float32 and hidden.grad.dtype == weight.grad.dtype == dtype
    close(logp, exact, 1e-5)
    near(hidden.grad, dx, GRADIENT_ERROR[dtype])
    near(weight.grad, dw, GRADIENT_ERROR[dtype])


@both_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_and_its_gradient_match_float64(backend, dtype, temperature):
    hidden, weight, target, g, e = problem(backend, dtype, seed=1)
    logp, entropy = linear_logprob(hidden, weight, target, temperature, entropy=True, backend=backend)
    torch.autograd.backward([logp, entropy], [g, e])
    exact, exact_entropy, dx, dw = reference(hidden, weight, target, g, e, temperature)
    close(logp, exact, 1e-5)
    close(entropy, exact_entropy, 1e-5)
    near(hidden.grad, dx, GRADIENT_ERROR[dtype])
    near(weight.grad, dw, GRADIENT_ERROR[dtype])


@both_backends
def test_entropy_alone_can_be_differentiated(backend):
    hidden, weight, target, g, e = problem(backend, seed=2)
    linear_logprob(hidden, weight, target, entropy=True, backend=backend)[1].backward(e)
    _, _, dx, dw = reference(hidden, weight, target, torch.zeros_like(g), e)
    near(hidden.grad, dx, 1e-6)
    near(weight.grad, dw, 1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_float64_inputs_stay_float64_from_end_to_end(temperature):
    hidden, weight, target, g, e = problem("torch", torch.float64)
    g, e = g.double(), e.double()
    logp, entropy = linear_logprob(hidden, weight, target, temperature, entropy=True)
    torch.autograd.backward([logp, entropy], [g, e])
    exact, exact_entropy, dx, dw = reference(hidden, weight, target, g, e, temperature)
    close(logp, exact, 1e-12)
    close(entropy, exact_entropy, 1e-12)
    near(hidden.grad, dx, 1e-12)
    near(weight.grad, dw, 1e-12)
    hidden.grad = weight.grad = None
    loss, logp = linear_logprob_loss(hidden, weight, target, -g, temperature)
    loss.backward()
    _, _, dx, dw = reference(hidden, weight, target, g, None, temperature)
    close(logp, exact, 1e-12)
    near(hidden.grad, dx, 1e-12)
    near(weight.grad, dw, 1e-12)


def test_gradients_match_finite_differences_in_float64():
    hidden, weight, target, _, _ = problem("torch", torch.float64, n=4, h=3, v=7)
    target[1] = IGNORE
    assert torch.autograd.gradcheck(lambda x, w: linear_logprob(x, w, target, 0.7, entropy=True), (hidden, weight))


@both_backends
def test_a_64_token_answer_in_bf16_is_exact_to_a_thousandth_nat(backend):
    """Bf16 logits would be off by some tenths: the reward is this sum."""
    hidden, weight, target, _, _ = problem(backend, torch.bfloat16, n=64, v=4000)
    answer = linear_logprob(hidden, weight, target, backend=backend).double().sum().cpu()
    assert abs(answer - reference(hidden, weight, target)[0].sum()) < 1e-3


@both_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_all_lie_at_minus_200_lose_no_precision(backend, dtype):
    """Inputs on a coarse grid make every fp32 product exact, so nothing but the softmax arithmetic can differ from float64."""
    r = torch.Generator().manual_seed(3)
    hidden = torch.randint(-32, 33, (N, H), generator=r) / 16
    weight = torch.randint(-8, 9, (V, H), generator=r) / 16
    hidden[:, -1], weight[:, -1] = 16, -12.5  # the product that shifts every logit by -200
    hidden, weight = (t.to(dtype).to(place(backend)).requires_grad_() for t in (hidden, weight))
    target = torch.randint(V, (N,), generator=r).to(place(backend))
    g, e = torch.randn(2, N, generator=r).to(place(backend)).unbind()
    logp, entropy = linear_logprob(hidden, weight, target, 0.7, entropy=True, backend=backend)
    torch.autograd.backward([logp, entropy], [g, e])
    exact, exact_entropy, dx, dw = reference(hidden, weight, target, g, e, 0.7)
    close(logp, exact, 1e-5)
    close(entropy, exact_entropy, 1e-5)
    near(hidden.grad[:, :-1], dx[:, :-1], GRADIENT_ERROR[dtype])  # the last column is the sum of dz times -12.5, exactly 0
    near(weight.grad, dw, GRADIENT_ERROR[dtype])


@both_backends
def test_probabilities_that_underflow_give_no_nan(backend):
    """Logits some 1000 nats apart: most p are exactly 0 in fp32, and p log p must not become 0 * inf."""
    hidden, weight, target, g, e = problem(backend)
    sharp = (hidden.detach() * 100).requires_grad_()
    logp, entropy = linear_logprob(sharp, weight, target, entropy=True, backend=backend)
    torch.autograd.backward([logp, entropy], [g, e])
    exact, exact_entropy, _, _ = reference(sharp, weight, target)
    assert (exact < -500).any() and ((exact_entropy < 1e-9) & (exact != 0)).any()
    assert ((logp.double().cpu() - exact).abs() <= 1e-6 * exact.abs() + 1e-3).all()
    close(entropy, exact_entropy, 1e-3)
    assert sharp.grad.isfinite().all() and weight.grad.isfinite().all()


@both_backends
def test_a_nan_in_one_row_shows_in_that_row_and_in_no_other(backend):
    hidden, weight, target, _, _ = problem(backend)
    clean = linear_logprob(hidden, weight, target, backend=backend)
    with torch.no_grad():
        hidden[5, 3] = math.nan
    dirty = linear_logprob(hidden, weight, target, backend=backend)
    assert dirty[5].isnan() and torch.equal(dirty[:5], clean[:5]) and torch.equal(dirty[6:], clean[6:])


# ---- rows that want nothing ------------------------------------------------------------------------------------------------------


@both_backends
def test_ignored_rows_give_exact_zeros_whatever_stands_in_them(backend):
    hidden, weight, target, g, e = problem(backend)
    ignored = target == IGNORE
    with torch.no_grad():
        hidden[ignored] = math.nan
    g[ignored] = math.inf
    logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
    torch.autograd.backward([logp, entropy], [g, e])
    assert (logp[ignored] == 0).all() and (entropy[ignored] == 0).all() and (hidden.grad[ignored] == 0).all()
    assert ignored.sum() == 2 and (logp[~ignored] < 0).all() and weight.grad.isfinite().all()


@both_backends
def test_all_rows_ignored_is_zero_everywhere(backend):
    hidden, weight, target, g, _ = problem(backend)
    target.fill_(IGNORE)
    logp = linear_logprob(hidden, weight, target, backend=backend)
    logp.backward(g)
    assert (logp == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


@both_backends
def test_rows_whose_upstream_gradient_is_zero_are_not_computed(backend, monkeypatch):
    hidden, weight, target, g, _ = problem(backend)
    g[: N // 2] = 0
    work = module._work(backend)
    seen = []
    real = work.dz_chunk
    watched = lambda x, *rest: seen.append(len(x)) or real(x, *rest)  # noqa: E731
    monkeypatch.setattr(work, "dz_chunk", staticmethod(watched) if backend == "torch" else watched)
    linear_logprob(hidden, weight, target, backend=backend).backward(g)
    live = int(((g != 0) & (target != IGNORE)).sum())
    assert seen == [live] * 3  # three chunks of 256 columns
    assert live < N // 2 and (hidden.grad[: N // 2] == 0).all()
    near(hidden.grad, reference(hidden, weight, target, g)[2], 1e-6)


@both_backends
def test_a_nan_upstream_gradient_is_not_taken_for_a_zero(backend):
    hidden, weight, target, g, _ = problem(backend)
    g[0] = math.nan
    linear_logprob(hidden, weight, target, backend=backend).backward(g)
    assert hidden.grad[0].isnan().all() and hidden.grad[1].isfinite().all()


# ---- shapes, memory, bits --------------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("shape", [(1, 80, 600), (1, 1, 1), (3, 64, 256), (65, 7, 257), (5, 130, 2)], ids=str)
def test_any_shape_matches_float64(backend, shape):
    n, h, v = shape
    hidden, weight, target, g, e = problem(backend, torch.float32, n, h, v)
    logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
    torch.autograd.backward([logp, entropy], [g, e])
    exact, exact_entropy, dx, dw = reference(hidden, weight, target, g, e)
    close(logp, exact, 1e-5)
    close(entropy, exact_entropy, 1e-5)
    close(hidden.grad, dx, 1e-5)
    close(weight.grad, dw, 1e-5)


@both_backends
def test_no_rows_is_fine(backend):
    hidden, weight, target, g, e = problem(backend, n=0)
    logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend=backend)
    torch.autograd.backward([logp, entropy], [g, e])
    assert logp.shape == entropy.shape == (0,) and hidden.grad.shape == (0, H) and (weight.grad == 0).all()
    loss, _ = linear_logprob_loss(hidden, weight, target, g, backend=backend)
    loss.backward()
    assert loss == 0 and (weight.grad == 0).all()


class Largest(TorchDispatchMode):
    """Remembers the size of the largest float tensor any operation returned (Triton's interpreter also copies tensors as bytes)."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (list, tuple)) else [out]:
            if isinstance(t, Tensor) and t.is_floating_point():
                self.numel = max(self.numel, t.numel())
        return out


@both_backends
@pytest.mark.parametrize("known_weights", [False, True])
def test_no_tensor_ever_holds_the_logits_of_the_whole_batch(backend, known_weights):
    hidden, weight, target, g, e = problem(backend, n=130, h=16, v=1500)
    hidden, weight = hidden.detach(), weight.detach()
    with Largest() as largest:  # created inside, so that the mode sees the backward pass too
        x, w = hidden.requires_grad_(), weight.requires_grad_()
        if known_weights:
            linear_logprob_loss(x, w, target, g, backend=backend)[0].backward()
        else:
            torch.autograd.backward(linear_logprob(x, w, target, entropy=True, backend=backend), [g, e])
    assert weight.numel() <= largest.numel <= 130 * 1500 // 2


@both_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_output_is_written_and_the_same_call_gives_the_same_bits(backend, dtype):
    """In deterministic mode PyTorch fills fresh memory with NaN: what a kernel left out would show."""

    def run():
        hidden, weight, target, g, e = problem(backend, dtype)
        logp, entropy = linear_logprob(hidden, weight, target, 0.7, entropy=True, backend=backend)
        torch.autograd.backward([logp, entropy], [g, e])
        x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss, logp_2 = linear_logprob_loss(x, w, target, g, 0.7, backend=backend)
        loss.backward()
        return [logp, entropy, hidden.grad, weight.grad, loss, logp_2, x.grad, w.grad]

    fresh = run()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        poisoned = run()
    finally:
        torch.use_deterministic_algorithms(False)
    for a, b in zip(fresh, poisoned, strict=True):
        assert a.isfinite().all() and torch.equal(a, b)


@both_backends
def test_layout_of_the_inputs_does_not_matter(backend):
    hidden, weight, target, _, _ = problem(backend, h=128)  # whole steps of H and no ignored row: nothing on the way makes a copy
    target.clamp_(min=0)
    logp = linear_logprob(hidden, weight, target, backend=backend)
    logp.sum().backward()  # a gradient of stride 0
    expected = [t.detach().double().cpu() for t in (logp, hidden.grad, weight.grad)]
    x = hidden.detach().repeat_interleave(2, 0)[::2].requires_grad_()
    w = weight.detach().T.contiguous().T.requires_grad_()
    y = target.repeat_interleave(2) * 0
    y[::2] = target
    y = y[::2]
    assert not (x.is_contiguous() or w.is_contiguous() or y.is_contiguous())
    strided = linear_logprob(x, w, y, backend=backend)
    strided.sum().backward()
    close(strided, expected[0], 1e-6)
    near(x.grad, expected[1], 1e-6)
    near(w.grad, expected[2], 1e-6)
    x.grad = w.grad = None
    loss, strided = linear_logprob_loss(x, w, y.to(torch.int32), -torch.ones_like(logp), backend=backend)
    loss.backward()
    close(strided, expected[0], 1e-6)
    near(x.grad, expected[1], 1e-6)
    near(w.grad, expected[2], 1e-6)


# ---- with autograd ----------------------------------------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_the_gradient_that_is_wanted_is_computed(backend, wanted):
    hidden, weight, target, g, _ = problem(backend)
    _, _, dx, dw = reference(hidden, weight, target, g)
    other, name, exact = (weight, hidden, dx) if wanted == "hidden" else (hidden, weight, dw)
    other.requires_grad_(False)
    linear_logprob(hidden, weight, target, backend=backend).backward(g)
    near(name.grad, exact, 1e-6)
    name.grad = None
    linear_logprob_loss(hidden, weight, target, -g, backend=backend)[0].backward()
    near(name.grad, exact, 1e-6)
    assert other.grad is None


@both_backends
def test_without_grad_the_values_are_the_same_and_no_gradient_work_is_done(backend, monkeypatch):
    hidden, weight, target, g, _ = problem(backend)
    logp = linear_logprob(hidden, weight, target, backend=backend)
    loss, _ = linear_logprob_loss(hidden, weight, target, g, backend=backend)
    monkeypatch.setattr(module._work(backend), "dz_rows", None)  # calling it would raise
    with torch.no_grad():
        assert torch.equal(linear_logprob(hidden, weight, target, backend=backend), logp)
        quiet, quiet_logp = linear_logprob_loss(hidden, weight, target, g, backend=backend)
    assert not quiet.requires_grad
    close(quiet_logp, logp.detach().double().cpu(), 1e-6)
    close(quiet, loss.detach().double().cpu(), 1e-4)


@both_backends
def test_weight_tied_to_the_embedding_gets_both_gradients(backend):
    _, weight, target, g, _ = problem(backend)
    tokens = torch.arange(N, device=weight.device) % 50
    hidden = torch.tanh(torch.nn.functional.embedding(tokens, weight))
    linear_logprob(hidden, weight, target, backend=backend).backward(g)
    w = weight.detach().double().cpu().requires_grad_()
    full = torch.log_softmax(torch.tanh(w[tokens.cpu()]) @ w.T, -1)
    keep = target.cpu() != IGNORE
    (full.gather(1, target.cpu().clamp(min=0)[:, None]).squeeze(1) * keep).backward(g.double().cpu())
    near(weight.grad, w.grad, 1e-6)


# ---- known weights: the gradient in the forward pass --------------------------------------------------------------------------------


@both_backends
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_loss_of_known_weights_equals_the_general_path(backend, dtype, temperature):
    hidden, weight, target, g, _ = problem(backend, dtype)
    row_weight = -g  # zeros and negatives among them
    logp = linear_logprob(hidden, weight, target, temperature, backend=backend)
    logp.backward(g)
    general = hidden.grad.double().cpu(), weight.grad.double().cpu()
    hidden.grad = weight.grad = None
    loss, loss_logp = linear_logprob_loss(hidden, weight, target, row_weight, temperature, backend=backend)
    loss.backward()
    assert loss.shape == () and not loss_logp.requires_grad and hidden.grad.dtype == weight.grad.dtype == dtype
    close(loss_logp, logp.detach().double().cpu(), 1e-5)
    assert abs(loss.double().cpu() + (row_weight.double() * logp.double()).sum().cpu()) < 1e-4
    near(hidden.grad, general[0], GRADIENT_ERROR[dtype])
    near(weight.grad, general[1], GRADIENT_ERROR[dtype])
    exact, _, dx, dw = reference(hidden, weight, target, g, None, temperature)
    close(loss_logp, exact, 1e-5)
    near(hidden.grad, dx, GRADIENT_ERROR[dtype])
    near(weight.grad, dw, GRADIENT_ERROR[dtype])


@both_backends
def test_rows_that_fit_one_chunk_give_the_same_gradient(backend, monkeypatch):
    hidden, weight, target, g, _ = problem(backend, torch.bfloat16)
    monkeypatch.setattr(module._work(backend), "chunk_rows", lambda x, vocab: 1000)
    linear_logprob_loss(hidden, weight, target, -g, backend=backend)[0].backward()
    _, _, dx, dw = reference(hidden, weight, target, g)
    near(hidden.grad, dx, 3e-3)
    near(weight.grad, dw, 3e-3)


@both_backends
def test_the_loss_can_be_scaled_before_its_backward_pass(backend):
    hidden, weight, target, g, _ = problem(backend)
    (linear_logprob_loss(hidden, weight, target, -g, backend=backend)[0] * -2.5).backward()
    _, _, dx, dw = reference(hidden, weight, target, -2.5 * g)
    near(hidden.grad, dx, 1e-6)
    near(weight.grad, dw, 1e-6)


@both_backends
def test_ignored_rows_do_not_reach_the_loss_even_with_a_nan_weight(backend):
    hidden, weight, target, g, _ = problem(backend)
    ignored = target == IGNORE
    exact = reference(hidden, weight, target)[0]
    g[ignored] = math.nan
    with torch.no_grad():
        hidden[ignored] = math.nan
    loss, logp = linear_logprob_loss(hidden, weight, target, g, backend=backend)
    loss.backward()
    assert (logp[ignored] == 0).all() and (hidden.grad[ignored] == 0).all() and weight.grad.isfinite().all()
    assert abs(loss.double().cpu() + (exact * g.double().cpu().nan_to_num()).sum()) < 1e-4


@both_backends
def test_all_weights_zero_still_gives_log_probs(backend):
    hidden, weight, target, g, _ = problem(backend)
    loss, logp = linear_logprob_loss(hidden, weight, target, torch.zeros_like(g), backend=backend)
    loss.backward()
    close(logp, reference(hidden, weight, target)[0], 1e-5)
    assert loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_a_second_backward_pass_of_the_loss_is_refused():
    hidden, weight, target, g, _ = problem("torch")
    loss, _ = linear_logprob_loss(hidden, weight, target, g)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()


# ---- refusals and imports -----------------------------------------------------------------------------------------------------------


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
    hidden, weight, target, g, _ = problem("torch")
    arguments = dict(hidden=hidden, weight=weight, target=target) | change
    with pytest.raises(ValueError, match=message):
        linear_logprob(**arguments)
    with pytest.raises(ValueError, match=message):
        linear_logprob_loss(**arguments, row_weight=g)


def test_bad_row_weights_are_refused_by_name():
    hidden, weight, target, g, _ = problem("torch")
    for bad in (g[:-1], g.long(), g[:, None]):
        with pytest.raises(ValueError, match="row_weight"):
            linear_logprob_loss(hidden, weight, target, bad)


def test_triton_refuses_what_it_cannot_compute(monkeypatch):
    hidden, weight, target, _, _ = problem("torch", torch.float64)
    with pytest.raises(ValueError, match="fp64"):
        linear_logprob(hidden, weight, target, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="CUDA"):
        linear_logprob(hidden.float(), weight.float(), target, backend="triton")


def test_on_a_cpu_the_function_works_where_triton_is_not_installed():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from kernels.logprob import linear_logprob\n"
        "print(linear_logprob(torch.ones(2, 3), torch.ones(5, 3), torch.tensor([1, 4])).tolist())"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert run.returncode == 0, run.stderr
    assert [round(value, 5) for value in eval(run.stdout)] == [-1.60944, -1.60944]  # log 1/5


# ---- what only Triton has --------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CUDA, reason="chooses the configuration of the interpreter")
def test_bulk_copies_and_pointers_give_the_same_bits(monkeypatch):
    from kernels import logprob_triton

    def run(config):
        monkeypatch.setattr(logprob_triton, "INTERPRETER", config)
        hidden, weight, target, g, e = problem("triton")
        logp, entropy = linear_logprob(hidden, weight, target, entropy=True, backend="triton")
        torch.autograd.backward([logp, entropy], [g, e])
        return logp, entropy, hidden.grad, weight.grad

    plain = replace(logprob_triton.INTERPRETER, tma=False)
    for a, b in zip(run(plain), run(replace(plain, tma=True)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(CUDA, reason="chooses the configuration of the interpreter")
@pytest.mark.parametrize("group", [1, 3, 8])
def test_the_order_of_the_tiles_does_not_change_a_bit(monkeypatch, group):
    from kernels import logprob_triton

    hidden, weight, target, _, _ = problem("triton", n=130, v=1100)  # 3 x 5 tiles: the last band is narrower than the others
    expected = linear_logprob(hidden, weight, target, backend="triton")
    monkeypatch.setattr(logprob_triton, "INTERPRETER", replace(logprob_triton.INTERPRETER, group=group))
    assert torch.equal(linear_logprob(hidden, weight, target, backend="triton"), expected)


needs_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device: real bf16 rounding, real tensor cores, real sizes")


@needs_gpu
@pytest.mark.parametrize("shape", [(256, 2048, 32000), (1937, 4096, 128256), (4096, 1024, 152064), (300, 1001, 50257)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gpu_real_sizes_match_float64(shape, dtype):
    n, h, v = shape
    hidden, weight, target, g, e = problem("triton", dtype, n, h, v)
    exact, exact_entropy, dx, dw = blockwise_float64(hidden, weight, target, g, e)
    logp, entropy = linear_logprob(hidden, weight, target, entropy=True)
    torch.autograd.backward([logp, entropy], [g, e])
    close(logp, exact, 1e-3)
    close(entropy, exact_entropy, 1e-3)
    near(hidden.grad, dx, GRADIENT_ERROR[dtype])
    near(weight.grad, dw, GRADIENT_ERROR[dtype])
    _, _, dx, dw = blockwise_float64(hidden, weight, target, g, None)
    hidden.grad = weight.grad = None
    linear_logprob_loss(hidden, weight, target, -g)[0].backward()
    near(hidden.grad, dx, GRADIENT_ERROR[dtype])
    near(weight.grad, dw, GRADIENT_ERROR[dtype])


@needs_gpu
def test_gpu_memory_beyond_the_gradients_stays_under_600_mb():
    hidden, weight, target, g, _ = problem("triton", torch.bfloat16, 16384, 4096, 128256)
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    inputs_and_gradients = torch.cuda.memory_allocated() + (hidden.numel() + weight.numel()) * 2
    torch.cuda.reset_peak_memory_stats()
    linear_logprob(hidden, weight, target).backward(g)
    assert torch.cuda.max_memory_allocated() - inputs_and_gradients <= 600e6


def blockwise_float64(hidden, weight, target, g, e):
    """`reference` on the GPU, 128 rows at a time: the whole logits in float64 would not fit."""
    w = weight.detach().double()
    dw = torch.zeros_like(w)
    outs = []
    for i in range(0, len(hidden), 128):
        x = hidden[i : i + 128].detach().double().requires_grad_()
        full = torch.log_softmax(x @ w.T, -1)
        y, keep = target[i : i + 128], (target[i : i + 128] != IGNORE).double()
        logp = full.gather(1, y.clamp(min=0)[:, None]).squeeze(1) * keep
        entropy = -(full.exp() * full).sum(1) * keep
        up = g[i : i + 128].double() * keep, (torch.zeros_like(keep) if e is None else e[i : i + 128].double() * keep)
        with torch.no_grad():
            p = full.exp()
            full_entropy = -(p * full).sum(1, keepdim=True)
            dz = -p * up[0][:, None] - up[1][:, None] * p * (full + full_entropy)
            dz.scatter_add_(1, y.clamp(min=0)[:, None], up[0][:, None])
            dw.addmm_(dz.T, x)
            outs.append((logp.detach().cpu(), entropy.detach().cpu(), (dz @ w).cpu()))
    logp, entropy, dx = (torch.cat(t) for t in zip(*outs, strict=True))
    return logp, entropy, dx, dw.cpu()
