"""How fast, how large and how exact kernels/logprob.py is, beside the ways people write the same thing.

    python bench/logprob.py                  every shape for this machine; writes bench/results/<device>-<date>.json, the table comes last
    python bench/logprob.py --quick          one shape, a minute
    python bench/logprob.py --json           one JSON object as the last line
    python bench/logprob.py --variants       a Hopper GPU: the kernel configurations that compete for the table in logprob_triton.py

One call, in this order: the peak memory of every contender (on a CPU each in a fresh process, since a process only knows its all-time
peak); correctness of every contender against float64; then the times, contenders interleaved round by round, medians. Data is random,
never zeros (a GPU multiplies zeros faster). TFLOP/s count 2NHV for a forward pass, 8NHV for a total of the general path (the backward
pass recomputes the logits), 6NHV where nothing is recomputed; rows of weight zero are counted too, skipped or not. A contender that
fails or runs out of memory says so in its row.
"""

import argparse
import functools
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.machine import circumstances, headline, save  # noqa: E402
from kernels.logprob import linear_logprob, linear_logprob_loss  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"

LLAMA = (4096, 128256)
GPU_SHAPES = [(n, *LLAMA) for n in (16384, 64, 256, 1024, 4096, 32768)]  # (N, H, V); the first is the one for --quick
GPU_SHAPES += [(16384, 4096, 131072), (16384, 2048, 128256), (16384, 4096, 32768), (16384, 4096, 32000), (1937, 4096, 152064)]
CPU_SHAPES = [(2048, 576, 49152)]
CPU_QUICK = [(256, 576, 8192)]


# ---- contenders: each (hidden [N,H], weight [V,H], target [N], temperature) -> logp [N] -------------------------------------------


def naive(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float) -> Tensor:
    """What everybody writes: logits in the input's dtype, log_softmax in fp32."""
    logits = (hidden @ weight.T).float()
    logits = logits if temperature == 1 else logits / temperature
    return torch.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1)


def chunked(hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, rows: int = 256, step: Callable = naive) -> Tensor:
    """The same for `rows` rows at a time, recomputed in the backward pass."""
    parts = zip(hidden.split(rows), target.split(rows), strict=True)
    return torch.cat([checkpoint(step, x, weight, y, temperature, use_reentrant=False) for x, y in parts])


@functools.cache
def compiled_naive() -> Callable:
    return torch.compile(naive, dynamic=False)


def compiled(hidden, weight, target, temperature):
    return compiled_naive()(hidden, weight, target, temperature)


def compiled_chunked(hidden, weight, target, temperature):
    return chunked(hidden, weight, target, temperature, step=compiled_naive())


def torch_linear_cross_entropy(hidden, weight, target, temperature):
    """torch 2.13's own fused function: per-token output in the input's dtype. On a CPU it took ten times as long as naive: GPU only."""
    if temperature != 1:
        raise NotImplementedError("no temperature")
    return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=torch.nn.LinearCrossEntropyOptions())


def ours(hidden, weight, target, temperature):
    return linear_logprob(hidden, weight, target, temperature)


def ours_plain(hidden, weight, target, temperature):
    return linear_logprob(hidden, weight, target, temperature, backend="torch")


def ours_with_entropy(hidden, weight, target, temperature):
    return linear_logprob(hidden, weight, target, temperature, entropy=True)[0]


def ours_known_weights(hidden, weight, target, temperature, row_weight):
    return linear_logprob_loss(hidden, weight, target, row_weight, temperature)


def contenders() -> dict[str, Callable]:
    found: dict[str, Callable] = {"ours": ours, "naive": naive, "chunked": chunked}
    if CUDA:
        found |= {"ours, plain": ours_plain, "compiled": compiled, "compiled chunked": compiled_chunked}
    if CUDA and hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy"] = torch_linear_cross_entropy
    return found


def cases(entropy: bool) -> list[tuple[str, str, Callable]]:
    """(name, mode, function) of everything that is measured. Modes: fwd, total (forward and backward)."""
    rows = [(name, mode, f) for name, f in contenders().items() for mode in ("fwd", "total")]
    rows.append(("ours, known weights", "total", ours_known_weights))
    if entropy:
        rows += [("ours, with entropy", mode, ours_with_entropy) for mode in ("fwd", "total")]
    return rows


# ---- one measurement --------------------------------------------------------------------------------------


class Problem:
    """Random inputs of one shape; g [N] the upstream gradient, of which a share is exactly 0."""

    def __init__(self, n: int, h: int, v: int, zero: float = 0.0, temperature: float = 1.0):
        r = torch.Generator(DEVICE).manual_seed(0)
        dtype = torch.bfloat16 if CUDA else torch.float32
        self.hidden = torch.randn(n, h, generator=r, device=DEVICE, dtype=dtype).requires_grad_()
        # in place: a temporary of this size would raise the peak that memory is measured from
        self.weight = torch.randn(v, h, generator=r, device=DEVICE, dtype=dtype).div_(h**0.5).requires_grad_()
        self.target = torch.randint(v, (n,), generator=r, device=DEVICE)
        self.g = torch.randn(n, generator=r, device=DEVICE) * (torch.rand(n, generator=r, device=DEVICE) >= zero)
        self.temperature = temperature

    def run(self, f: Callable, mode: str) -> Tensor:
        self.hidden.grad = self.weight.grad = None
        arguments = (self.hidden, self.weight, self.target, self.temperature)
        if f is ours_known_weights:
            loss, logp = f(*arguments, -self.g)
            loss.backward()
            return logp
        with torch.set_grad_enabled(mode == "total"):
            logp = f(*arguments)
        if mode == "total":
            logp.backward(self.g.to(logp.dtype))
        return logp.detach()


def seconds(run: Callable[[], object]) -> float:
    if not CUDA:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def peak_mb(shape: tuple[int, int, int], name: str, f: Callable, mode: str) -> float:
    """MB at the peak above the inputs and, for a total, above the gradients that stay."""
    if not CUDA:  # before this process allocates anything large: a child's peak starts at its parent's
        command = [sys.executable, __file__, "--memory-of", name, mode, *map(str, shape)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    problem = Problem(*shape)
    problem.run(f, mode)  # compile and let libraries take their workspaces
    problem.hidden.grad = problem.weight.grad = None
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    problem.run(f, mode)
    return (torch.cuda.max_memory_allocated() - before - gradient_bytes(problem, mode)) / 1e6


def gradient_bytes(problem: Problem, mode: str) -> int:
    return 0 if mode == "fwd" else sum(t.numel() * t.element_size() for t in (problem.hidden, problem.weight))


def memory_of(name: str, mode: str, shape: list[int]) -> None:
    """The child process of `peak_mb`."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes on Linux
    f = next(f for other, m, f in cases(True) if (other, m) == (name, mode))
    Problem(8, 64, 512).run(f, mode)  # threads and library workspaces
    problem = Problem(*shape)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    problem.run(f, mode)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(((peak - before) * unit - gradient_bytes(problem, mode)) / 1e6)


def errors(problem: Problem, f: Callable) -> dict[str, float]:
    """Against float64: largest |d logp| over all rows, relative 2-norm error of 64 rows of each gradient."""
    logp = problem.run(f, "total")
    exact, dx, dw = exact_values(problem)
    pick = slice(0, 64)
    relative = [((ours[pick].double() - exact).norm() / exact.norm()).item() for ours, exact in
                ((problem.hidden.grad, dx), (problem.weight.grad, dw))]  # fmt: skip
    return {"logp": (logp.double() - exact).abs().max().item(), "d_hidden": relative[0], "d_weight": relative[1]}


def exact_values(problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    """logp [N], the first 64 rows of d hidden and of d weight, in float64, 64 rows at a time."""
    if not hasattr(problem, "exact"):
        x, w = problem.hidden.detach(), problem.weight.detach().double()
        g = problem.g.double()
        logp, dx, dw = [], None, torch.zeros(64, x.shape[1], dtype=torch.float64, device=x.device)
        for i in range(0, len(x), 64):
            rows = slice(i, i + 64)
            full = torch.log_softmax(x[rows].double() @ w.T / problem.temperature, -1)
            logp.append(full.gather(1, problem.target[rows, None]).squeeze(1))
            dz = full.exp_().mul_(-g[rows, None]).scatter_add_(1, problem.target[rows, None], g[rows, None]).div_(problem.temperature)
            dw.addmm_(dz[:, :64].T, x[rows].double())
            dx = dz @ w if dx is None else dx
        problem.exact = torch.cat(logp), dx, dw
    return problem.exact


# ---- one shape --------------------------------------------------------------------------------------------


def attempt(f: Callable, *arguments) -> tuple[object, str]:
    """(result, "") or (None, why not): a contender that fails is a row of the table, not the end of the benchmark."""
    try:
        return f(*arguments), ""
    except Exception as error:
        reason = "out of memory" if isinstance(error, torch.cuda.OutOfMemoryError) else f"{type(error).__name__}: {error}"
        if CUDA:
            torch.cuda.empty_cache()
        return None, " ".join(reason.split())[:80]


def measure(shape: tuple[int, int, int], rounds: int, zero: float = 0.0, temperature: float = 1.0, memory: bool = True) -> list[dict]:
    n, h, v = shape
    rows = [dict(name=name, mode=mode, f=f) for name, mode, f in cases(entropy=True)]
    if memory:
        for row in rows:
            row["peak_mb"], row["note"] = attempt(peak_mb, shape, row["name"], row["f"], row["mode"])
    problem = Problem(n, h, v, zero, temperature)
    for row in rows:
        if row["mode"] == "total":
            row["error"], row["note"] = attempt(errors, problem, row["f"])
        else:
            _, row["note"] = attempt(problem.run, row["f"], row["mode"])  # warm-up
    alive = [row for row in rows if not row["note"]]
    times: dict[int, list[float]] = {id(row): [] for row in alive}
    for round_ in range(rounds):
        for row in alive[round_ % len(alive) :] + alive[: round_ % len(alive)]:  # nobody always runs after the same neighbour
            times[id(row)].append(seconds(functools.partial(problem.run, row["f"], row["mode"])))
    products = three_products(problem, rounds)
    for row in rows:
        row |= dict(n=n, h=h, v=v, zero=zero, temperature=temperature)
        if not row["note"]:
            row["ms"] = statistics.median(times[id(row)]) * 1e3
            factor = 2 if row["mode"] == "fwd" else 6 if row["name"] in ("ours, known weights", "naive", "compiled") else 8
            flops = factor * n * h * v
            row |= dict(convention=f"{factor}NHV", tflops=flops / row["ms"] / 1e9)
            row["of_mm"] = row["tflops"] / (6 * n * h * v / products / 1e12)
        del row["f"]
    return rows


def three_products(problem: Problem, rounds: int) -> float:
    """Seconds of the three matrix products alone (6NHV), through chunks of columns as the kernel does them: the practical floor."""
    x, w = problem.hidden.detach(), problem.weight.detach()
    columns = max(256, (1 << 27 if CUDA else 1 << 22) // len(x))

    def products() -> None:
        for v in range(0, len(w), columns):
            z = x @ w[v : v + columns].T
            z.T @ x
            z @ w[v : v + columns]

    seconds(products)
    return statistics.median(seconds(products) for _ in range(rounds))


def measure_variants(shape: tuple[int, int, int], rounds: int) -> list[dict]:
    """The Hopper configurations that compiled for sm_90: which is fastest can only be found here."""
    from kernels import logprob_triton as module

    base = module.HOPPER
    candidates = {"table": base, "flatten": replace(base, flatten=True), "specialize": replace(base, warps=4, specialize=True)}
    candidates |= {f"group {g}": replace(base, group=g) for g in (4, 16)}
    candidates |= {"3 stages": replace(base, stages=3), "128 columns": replace(base, bn=128)}
    problem, rows = Problem(*shape), []
    for name, config in candidates.items():
        module.HOPPER = config
        for mode, f in (("fwd", ours), ("total", ours), ("total", ours_known_weights)):
            error, note = attempt(errors, problem, f)
            row = dict(name=f"{name}{', known weights' if f is ours_known_weights else ''}", mode=mode, error=error, note=note)
            if not note:
                row["ms"] = statistics.median(seconds(functools.partial(problem.run, f, mode)) for _ in range(rounds)) * 1e3
            rows.append(row | dict(zip("nhv", shape, strict=True)) | dict(zero=0.0, temperature=1.0))
    module.HOPPER = base
    return rows


# ---- the table --------------------------------------------------------------------------------


def show(row: dict) -> str:
    def number(key: str, digits: int, width: int, scale: float = 1) -> str:
        return f"{row[key] * scale:{width}.{digits}f}" if row.get(key) is not None else " " * (width - 1) + "-"

    error = row.get("error") or {}
    exact = " ".join(f"{error[k]:8.1e}" for k in ("logp", "d_hidden", "d_weight")) if error else " " * 26
    shape = f"{row['n']:6d} {row['h']:5d} {row['v']:7d} {row['zero']:4.0%} {row['temperature']:4.1f}"
    figures = f"{number('ms', 2, 10)} {number('tflops', 2, 8)} {row.get('convention', '-'):>5s} {number('of_mm', 0, 5, 100)}"
    return f"{shape}  {row['name']:26s} {row['mode']:6s} {figures} {number('peak_mb', 0, 8)}  {exact}  {row['note']}".rstrip()


HEADER = (
    f"{'N':>6s} {'H':>5s} {'V':>7s} {'zero':>4s} {'T':>4s}  {'':26s} {'mode':6s} {'ms':>10s} {'TFLOP/s':>8s} {'count':>5s} {'% mm':>5s} "
    f"{'peak MB':>8s}  {'|d logp|':>8s} {'d hidden':>8s} {'d weight':>8s}"
)


def bars(rows: list[dict]) -> dict[str, float]:
    """The plain version's bars on a CPU: peak memory and time as a share of naive."""
    total = {row["name"]: row for row in rows if row["mode"] == "total" and not row["zero"] and not row["note"]}
    base = total["naive"]
    return {
        "memory, general (bar 0.25)": total["ours"]["peak_mb"] / base["peak_mb"],
        "memory, known weights (bar 0.25)": total["ours, known weights"]["peak_mb"] / base["peak_mb"],
        "time, general (bar 1.20)": total["ours"]["ms"] / base["ms"],
        "time, known weights (bar 0.95)": total["ours, known weights"]["ms"] / base["ms"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--variants", action="store_true", help="time the Hopper kernel configurations against each other")
    parser.add_argument("--rounds", type=int, default=0, help="timed runs of each (default 20 on a GPU, 5 on a CPU, 3 with --quick)")
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        return memory_of(args.memory_of[0], args.memory_of[1], [int(a) for a in args.memory_of[2:]])

    rounds = args.rounds or (3 if args.quick else 20 if CUDA else 5)
    shapes = GPU_SHAPES[: 1 if args.quick or args.variants else None] if CUDA else CPU_QUICK if args.quick else CPU_SHAPES
    if args.variants and not (CUDA and torch.cuda.get_device_capability()[0] == 9):
        sys.exit("error: --variants needs a Hopper GPU (compute capability 9.0)")
    result = circumstances(DEVICE, "triton")
    rows = []
    for i, shape in enumerate(shapes):
        print(f"N, H, V = {shape}", file=sys.stderr, flush=True)
        rows += measure_variants(shape, rounds) if args.variants else measure(shape, rounds)
        if i == 0 and not args.quick and not args.variants:
            for zero, temperature in ((0.5, 1.0), (0.9, 1.0), (0.0, 0.7)) if CUDA else ((0.9, 1.0),):
                rows += measure(shape, max(3, rounds // 2), zero, temperature, memory=False)
    result |= dict(dtype="bf16" if CUDA else "fp32", rounds=rounds, command="python bench/logprob.py " + " ".join(sys.argv[1:]), rows=rows)
    if not CUDA:
        result["bars"] = bars(rows)
    path = save("logprob", result, "quick" if args.quick else "variants" if args.variants else "")

    print(f"{headline(result)}; {path.name}")
    print(HEADER)
    for row in rows:
        print(show(row))
    for bar, value in result.get("bars", {}).items():
        print(f"{bar}: {value:.2f}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
