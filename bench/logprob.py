"""Time, memory and error of kernels/logprob.py, beside other ways to compute the same log-probs.

    python bench/logprob.py                 # all shapes for this machine
    python bench/logprob.py --quick         # one shape
    python bench/logprob.py --shape 1024 4096 128256    # this shape, N H V; may be repeated
    python bench/logprob.py --variants      # a Hopper GPU: which kernel configuration is fastest
    --json: one JSON object as the last line; --save: bench/results/logprob-<device>-<date>.json

The mode of a row is fwd (log-probs without gradients) or total (log-probs and gradients). Measured
in this order:

1. Peak memory beyond the inputs and the gradients. On a CPU each contender gets a fresh process,
   because a process only knows the peak of its whole life.
2. Errors against float64.
3. Times. The contenders take turns; the median counts. Inputs are random, because a GPU multiplies
   zeros faster.

TFLOP/s count 2 N H V for fwd. For total they count 8 N H V, or 6 N H V if the logits are not
recomputed. Rows with upstream gradient 0 are counted too. "% mm" is the share of the TFLOP/s that
the three matrix products alone reach. A contender that fails has the reason in its row.

Kernels of other projects are contenders on a GPU where they are installed: Liger's (pip install
liger-kernel) and QuACK's (quack-kernels). Those that return only the sum over all tokens compute
the gradients of that sum in the forward pass: no weights per token, no errors in the table.
"""

import argparse
import functools
import gc
import importlib
import importlib.util
import json
import resource
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
from kernels.logprob import linear_logprob  # noqa: E402

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32

Shape = tuple[int, int, int]  # N, H, V
if CUDA:
    SHAPES = [(n, 4096, 128256) for n in (16384, 64, 256, 1024, 4096, 32768)]  # Llama-3.1-8B
    SHAPES += [(16384, 4096, 131072), (16384, 2048, 128256)]  # the shape of published tables; 1B
    SHAPES += [(16384, 4096, 32768), (16384, 4096, 32000), (1937, 4096, 152064)]
    QUICK = SHAPES[0]
    OTHER_SETTINGS = [(0.5, 1.0), (0.9, 1.0), (0.0, 0.7)]  # share of zeros in g, temperature
else:
    SHAPES = [(2048, 576, 49152)]  # SmolLM2-135M
    QUICK = (256, 576, 8192)
    OTHER_SETTINGS = [(0.9, 1.0)]


# ---- contenders: (hidden [N, H], weight [V, H], target [N], temperature) -> logp [N]


def with_entropy(hidden, weight, target, temperature) -> Tensor:
    return linear_logprob(hidden, weight, target, temperature, entropy=True)[0]


def naive(hidden, weight, target, temperature) -> Tensor:
    """The usual code: logits in the input's dtype, log_softmax in fp32."""
    logits = (hidden @ weight.T).float()
    if temperature != 1:
        logits = logits / temperature
    return torch.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1)


def chunked(hidden, weight, target, temperature, step=naive) -> Tensor:
    """The same for 256 rows at a time, recomputed in the backward pass."""
    parts = []
    for x, y in zip(hidden.split(256), target.split(256), strict=True):
        parts.append(checkpoint(step, x, weight, y, temperature, use_reentrant=False))
    return torch.cat(parts)


def torch_linear_cross_entropy(hidden, weight, target, temperature) -> Tensor:
    """The fused function of torch 2.13; its output has the input's dtype."""
    check_no_temperature(temperature)
    options = torch.nn.LinearCrossEntropyOptions()
    return -F.linear_cross_entropy(hidden, weight, target, reduction="none", options=options)


def liger_scaled(hidden, weight, target, temperature) -> Tensor:
    """Liger's kernel with our contract (from 0.8.5); on Hopper it needs its extra [cutedsl]."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    function = module.LigerFusedLinearScaledCrossEntropyFunction
    return -function.apply(hidden, weight, target, temperature)


def liger_sum(hidden, weight, target, temperature) -> Tensor:
    """Liger's Triton kernel, as trainers use it."""
    module = importlib.import_module("liger_kernel.transformers.functional")
    check_no_temperature(temperature)
    function = module.liger_fused_linear_cross_entropy
    return -function(hidden, weight, target, reduction="sum")


def quack_sum(hidden, weight, target, temperature) -> Tensor:
    module = importlib.import_module("quack.linear_cross_entropy")
    check_no_temperature(temperature)
    return -module.chunked_linear_cross_entropy(hidden, weight, target, reduction="sum")


def check_no_temperature(temperature: float) -> None:
    if temperature != 1:
        raise NotImplementedError("no temperature")


@functools.cache
def contenders() -> dict[str, Callable]:
    found = {"ours": linear_logprob, "ours, with entropy": with_entropy}
    found |= {"naive": naive, "chunked": chunked}
    if CUDA:
        compiled = torch.compile(naive, dynamic=False)
        found["ours, plain"] = functools.partial(linear_logprob, backend="torch")
        found["compiled"] = compiled
        found["compiled chunked"] = functools.partial(chunked, step=compiled)
    # on a CPU it takes ten times as long as naive
    if CUDA and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        found["F.linear_cross_entropy"] = torch_linear_cross_entropy
    if CUDA and importlib.util.find_spec("liger_kernel"):
        found["Liger, per token"] = liger_scaled
        found["Liger, sum"] = liger_sum
    if CUDA and importlib.util.find_spec("quack"):
        found["QuACK, sum"] = quack_sum
    return found


NO_RECOMPUTATION = ("naive", "compiled", "Liger, sum", "QuACK, sum")


# ---- one measurement


class Problem:
    """Random inputs, and the upstream gradient g [N], of which the share `zero` is exactly 0."""

    def __init__(self, shape: Shape, zero: float = 0.0, temperature: float = 1.0):
        n, h, v = shape
        generator = torch.Generator(DEVICE).manual_seed(0)
        options = dict(generator=generator, device=DEVICE)
        self.hidden = torch.randn(n, h, dtype=DTYPE, **options).requires_grad_()
        # in place: a temporary of this size would raise the peak that memory is measured from
        self.weight = torch.randn(v, h, dtype=DTYPE, **options).div_(h**0.5).requires_grad_()
        self.target = torch.randint(v, (n,), **options)
        self.g = torch.randn(n, **options) * (torch.rand(n, **options) >= zero)
        self.temperature = temperature

    def run(self, f: Callable, mode: str) -> Tensor:
        self.hidden.grad = None
        self.weight.grad = None
        with torch.set_grad_enabled(mode == "total"):
            logp = f(self.hidden, self.weight, self.target, self.temperature)
        if mode == "total":
            upstream = self.g if logp.dim() else torch.ones_like(logp)
            logp.backward(upstream.to(logp.dtype))
        return logp.detach()

    @functools.cached_property
    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """logp [N], the first 64 rows of d hidden and of d weight, in float64."""
        hidden = self.hidden.detach()
        weight = self.weight.detach().double()
        logp, d_hidden = [], None
        d_weight = weight.new_zeros(64, weight.shape[1])
        for start in range(0, len(hidden), 64):
            rows = slice(start, start + 64)
            x = hidden[rows].double()
            y = self.target[rows, None]
            g = self.g[rows, None].double()
            full = torch.log_softmax(x @ weight.T / self.temperature, -1)
            logp.append(full.gather(1, y).squeeze(1))
            dz = full.exp_().mul_(-g).scatter_add_(1, y, g).div_(self.temperature)
            d_weight.addmm_(dz[:, :64].T, x)
            if d_hidden is None:
                d_hidden = dz @ weight
        return torch.cat(logp), d_hidden, d_weight


def seconds(f: Callable, *arguments) -> float:
    synchronize = torch.cuda.synchronize if CUDA else lambda: None
    synchronize()
    start = time.perf_counter()
    f(*arguments)
    synchronize()
    return time.perf_counter() - start


def errors(problem: Problem, f: Callable) -> dict[str, float]:
    """Largest |d logp|; relative 2-norm error of the first 64 rows of each gradient.

    Nothing for a contender that returns the sum alone.
    """
    logp = problem.run(f, "total")
    if logp.dim() == 0:
        return {}
    exact_logp, exact_d_hidden, exact_d_weight = problem.exact
    d_hidden = problem.hidden.grad[:64].double() - exact_d_hidden
    d_weight = problem.weight.grad[:64].double() - exact_d_weight
    return dict(
        logp_error=(logp.double() - exact_logp).abs().max().item(),
        d_hidden_error=(d_hidden.norm() / exact_d_hidden.norm()).item(),
        d_weight_error=(d_weight.norm() / exact_d_weight.norm()).item(),
    )


def peak_mb(shape: Shape, name: str, mode: str) -> float:
    """Peak MB beyond the inputs and, for total, the gradients."""
    if not CUDA:
        command = [sys.executable, __file__, "--memory-of", name, mode, *map(str, shape)]
        return float(subprocess.check_output(command, text=True).split()[-1])
    return measure_peak_mb(shape, name, mode)


def measure_peak_mb(shape: Shape, name: str, mode: str) -> float:
    f = contenders()[name]
    # On a GPU compiled code and library workspaces depend on the shape. On a CPU this first run
    # would set the peak, so it is a small one.
    Problem(shape if CUDA else (8, 64, 512)).run(f, mode)
    gc.collect()
    problem = Problem(shape)
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    before = peak_bytes()
    problem.run(f, mode)
    gradients = problem.hidden.nbytes + problem.weight.nbytes if mode == "total" else 0
    return (peak_bytes() - before - gradients) / 1e6


def peak_bytes() -> int:
    if CUDA:
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, else in KB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def attempt(f: Callable, *arguments) -> tuple[object, str]:
    """(result, "") or (None, the reason of the failure)."""
    try:
        return f(*arguments), ""
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:80]
    if CUDA:
        torch.cuda.empty_cache()
    return None, reason


# ---- all measurements of one shape


def measure(shape: Shape, rounds: int, zero=0.0, temperature=1.0, memory=True) -> list[dict]:
    n, h, v = shape
    if CUDA:
        torch.compiler.reset()  # torch.compile gives up on a function after eight shapes
    functions = contenders()
    rows = []
    for name in functions:
        for mode in ("fwd", "total"):
            row = dict(name=name, mode=mode, n=n, h=h, v=v, zero=zero, temperature=temperature)
            if memory:
                row["peak_mb"], _ = attempt(peak_mb, shape, name, mode)
            rows.append(row)

    problem = Problem(shape, zero, temperature)
    for row in rows:
        f = functions[row["name"]]
        if row["mode"] == "total":
            found, row["note"] = attempt(errors, problem, f)
            row |= found or {}
        else:
            _, row["note"] = attempt(problem.run, f, "fwd")
    working = [row for row in rows if not row["note"]]
    times = [[] for _ in working]
    for round_ in range(rounds):
        for i in range(len(working)):
            i = (i + round_) % len(working)  # another one goes first in each round
            row = working[i]
            times[i].append(seconds(problem.run, functions[row["name"]], row["mode"]))

    mm_tflops = 6 * n * h * v / three_products(problem, rounds) / 1e12
    for row, row_times in zip(working, times, strict=True):
        factor = 6 if row["name"] in NO_RECOMPUTATION else 8
        if row["mode"] == "fwd":
            factor = 2
        median = statistics.median(row_times)
        row["ms"] = median * 1e3
        row["convention"] = f"{factor}NHV"
        row["tflops"] = factor * n * h * v / median / 1e12
        row["of_mm"] = row["tflops"] / mm_tflops
    return rows


def three_products(problem: Problem, rounds: int) -> float:
    """Seconds of the three matrix products of 6 N H V, in chunks of vocabulary columns."""
    x = problem.hidden.detach()
    weight = problem.weight.detach()
    columns = max(256, (1 << 27 if CUDA else 1 << 22) // len(x))

    def products() -> None:
        for w in weight.split(columns):
            z = x @ w.T
            z.T @ x
            z @ w

    products()
    return statistics.median(seconds(products) for _ in range(rounds))


VARIANTS = {  # of the configuration HOPPER; tests/test_logprob_compile.py compiles them
    "table": {},
    "flatten": {"flatten": True},
    "specialize": {"warps": 4, "specialize": True},
    "group 4": {"group": 4},
    "group 16": {"group": 16},
    "3 stages": {"stages": 3},
    "128 columns": {"bn": 128},
}


def measure_variants(shape: Shape, rounds: int) -> list[dict]:
    """Hopper configurations that compile for sm_90, in the place of the one in the table."""
    from kernels import logprob_triton

    base = logprob_triton.HOPPER
    n, h, v = shape
    problem = Problem(shape)
    rows = []
    for name, changes in VARIANTS.items():
        logprob_triton.HOPPER = replace(base, **changes)
        for mode in ("fwd", "total"):
            row = dict(name=name, mode=mode, n=n, h=h, v=v, zero=0.0, temperature=1.0)
            found, row["note"] = attempt(errors, problem, linear_logprob)
            if found:
                row |= found
                times = [seconds(problem.run, linear_logprob, mode) for _ in range(rounds)]
                row["ms"] = statistics.median(times) * 1e3
            rows.append(row)
    logprob_triton.HOPPER = base
    return rows


# ---- the table

COLUMNS = [  # heading, key in the row, width, format
    ("N", "n", 6, "d"),
    ("H", "h", 5, "d"),
    ("V", "v", 7, "d"),
    ("zero", "zero", 4, ".0%"),
    ("T", "temperature", 4, ".1f"),
    ("contender", "name", 22, "s"),
    ("mode", "mode", 5, "s"),
    ("ms", "ms", 9, ".2f"),
    ("TFLOP/s", "tflops", 8, ".2f"),
    ("count", "convention", 5, "s"),
    ("% mm", "of_mm", 5, ".0%"),
    ("peak MB", "peak_mb", 8, ".0f"),
    ("|d logp|", "logp_error", 8, ".1e"),
    ("d hidden", "d_hidden_error", 8, ".1e"),
    ("d weight", "d_weight_error", 8, ".1e"),
]


def table_line(row: dict) -> str:
    cells = []
    for _, key, width, form in COLUMNS:
        text = format(row[key], form) if row.get(key) is not None else "-"
        cells.append(text.rjust(width))
    return " ".join([*cells, row["note"]]).rstrip()


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape")
    shape_help = "rows, their size, vocabulary: this shape; may be repeated"
    parser.add_argument(
        "--shape", nargs=3, type=int, action="append", metavar=("N", "H", "V"), help=shape_help
    )
    parser.add_argument("--json", action="store_true", help="JSON as the last line")
    parser.add_argument("--save", action="store_true", help="write it to bench/results/")
    parser.add_argument("--variants", action="store_true", help="kernel configurations (Hopper)")
    rounds_help = "timed runs of each (default: 20 on a GPU, 5 on a CPU, 3 with --quick)"
    parser.add_argument("--rounds", type=int, default=0, help=rounds_help)
    parser.add_argument("--memory-of", nargs=5, help=argparse.SUPPRESS)  # see peak_mb
    return parser.parse_args(argv)


def main() -> None:
    args = parse(sys.argv[1:])
    if args.memory_of:
        name, mode, *shape = args.memory_of
        return print(measure_peak_mb(tuple(map(int, shape)), name, mode))
    if args.variants and not (CUDA and torch.cuda.get_device_capability()[0] == 9):
        sys.exit("error: --variants needs a Hopper GPU (compute capability 9.0)")

    default_rounds = 20 if CUDA else 5
    rounds = args.rounds or (3 if args.quick else default_rounds)
    result = circumstances(DEVICE, "triton")
    rows = []
    if args.variants:
        rows += measure_variants(QUICK, rounds)
    elif args.quick or args.shape:
        for shape in args.shape or [QUICK]:
            rows += measure(tuple(shape), rounds)
    else:
        for shape in SHAPES:
            print(f"N, H, V = {shape}", file=sys.stderr, flush=True)
            rows += measure(shape, rounds)
        for zero, temperature in OTHER_SETTINGS:
            rows += measure(SHAPES[0], max(3, rounds // 2), zero, temperature, memory=False)
    command = " ".join(["python bench/logprob.py", *sys.argv[1:]])
    result |= dict(dtype=str(DTYPE), rounds=rounds, command=command, rows=rows)
    print(headline(result))
    print(*(heading.rjust(width) for heading, _, width, _ in COLUMNS))
    for row in rows:
        print(table_line(row))
    if args.save:
        tag = "variants" if args.variants else "quick" if args.quick or args.shape else ""
        print(f"wrote {save('logprob', result, tag).relative_to(ROOT)}")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
