"""Time, memory and error of kernels/logprob.py, beside other ways to compute the same log-probs.

    python bench/logprob.py                                     # all shapes for this machine
    python bench/logprob.py --shape 1024 4096 128256            # N H V; may be repeated
    --json: one JSON object as the last line; --save: bench/results/logprob-<device>-<date>-...json

    mode          fwd: log-probs without gradients; total: log-probs and gradients
    ms            median; the contenders take turns
    tflops        2 N H V for fwd; for total 8 N H V, or 6 N H V if the logits are not recomputed;
                  rows with upstream gradient 0 (their share is `zero`) are counted too
    of_mm         share of the TFLOP/s that the three matrix products alone reach
    peak_mb       on a GPU, beyond the inputs and the gradients
    logp_error    largest error of a log-prob against float64

Inputs are random, because a GPU multiplies zeros faster. A contender that fails has the reason in
its row.
"""

import functools
import gc
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.machine import circumstances, conclude, seconds, table
from kernels.logprob import linear_logprob
from support.errors import OneLineParser, exit_on_bad_input

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32

Shape = tuple[int, int, int]  # N, H, V
SHAPES = [(2048, 576, 49152)]  # SmolLM2-135M
if CUDA:
    SHAPES = [(n, 4096, 128256) for n in (16384, 64, 256, 1024, 4096, 32768)]  # Llama-3.1-8B
    SHAPES += [(16384, 4096, 131072), (16384, 2048, 128256)]  # the shape of published tables; 1B
    SHAPES += [(16384, 4096, 32768), (16384, 4096, 32000), (1937, 4096, 152064)]

# ---- contenders: (hidden [N, H], weight [V, H], target [N]) -> logp [N]


def with_entropy(hidden, weight, target) -> Tensor:
    return linear_logprob(hidden, weight, target, entropy=True)[0]


def naive(hidden, weight, target) -> Tensor:
    """The usual code: logits in the input's dtype, log_softmax in fp32."""
    logits = (hidden @ weight.T).float()
    return torch.log_softmax(logits, -1).gather(1, target[:, None]).squeeze(1)


def chunked(hidden, weight, target, step=naive) -> Tensor:
    """The same for 256 rows at a time, recomputed in the backward pass."""
    parts = []
    for x, y in zip(hidden.split(256), target.split(256), strict=True):
        parts.append(checkpoint(step, x, weight, y, use_reentrant=False))
    return torch.cat(parts)


@functools.cache
def contenders() -> dict[str, Callable]:
    found = {"ours": linear_logprob, "ours, with entropy": with_entropy}
    found |= {"naive": naive, "chunked": chunked}
    if CUDA:
        compiled = torch.compile(naive, dynamic=False)
        found["ours, torch"] = functools.partial(linear_logprob, backend="torch")
        found["compiled"] = compiled
        found["compiled chunked"] = functools.partial(chunked, step=compiled)
    return found


NO_RECOMPUTATION = ("naive", "compiled")


# ---- one measurement


class Problem:
    """Random inputs, and the upstream gradient g [N], of which the share `zero` is exactly 0."""

    def __init__(self, shape: Shape, zero: float = 0.0):
        n, h, v = shape
        options = dict(generator=torch.Generator(DEVICE).manual_seed(0), device=DEVICE)
        self.hidden = torch.randn(n, h, dtype=DTYPE, **options).requires_grad_()
        # in place: a temporary of this size would raise the peak that memory is measured from
        self.weight = torch.randn(v, h, dtype=DTYPE, **options).div_(h**0.5).requires_grad_()
        self.target = torch.randint(v, (n,), **options)
        self.g = torch.randn(n, **options) * (torch.rand(n, **options) >= zero)

    def run(self, f: Callable, mode: str) -> Tensor:
        self.hidden.grad = None
        self.weight.grad = None
        with torch.set_grad_enabled(mode == "total"):
            logp = f(self.hidden, self.weight, self.target)
        if mode == "total":
            logp.backward(self.g.to(logp.dtype))
        return logp.detach()


def peak_mb(shape: Shape, f: Callable, mode: str) -> float | None:
    """Peak MB of a GPU beyond the inputs and, for total, the gradients. None on a CPU."""
    if not CUDA:
        return None
    Problem(shape).run(f, mode)  # compiles, and makes the workspaces of libraries
    gc.collect()
    problem = Problem(shape)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    problem.run(f, mode)
    gradients = problem.hidden.nbytes + problem.weight.nbytes if mode == "total" else 0
    return (torch.cuda.max_memory_allocated() - before - gradients) / 1e6


def attempt(row: dict, f: Callable, *arguments) -> object:
    """f's result, or None: row["note"] says how this call or an earlier one failed."""
    if row["note"]:
        return None
    try:
        return f(*arguments)
    except Exception as error:
        row["note"] = " ".join(f"{type(error).__name__}: {error}".split())[:80]
    if CUDA:
        torch.cuda.empty_cache()
    return None


# ---- all measurements of one shape


def measure(functions: dict[str, Callable], shape: Shape, zero: float, rounds: int) -> list[dict]:
    n, h, v = shape
    if CUDA:
        torch.compiler.reset()  # torch.compile gives up on a function after eight shapes
    rows = []
    for name, f in functions.items():
        for mode in ("fwd", "total"):
            row = dict(name=name, mode=mode, n=n, h=h, v=v, zero=zero, note="")
            row["peak_mb"] = attempt(row, peak_mb, shape, f, mode)
            rows.append(row)

    problem = Problem(shape, zero)
    weight = problem.weight.detach().double()
    exact = linear_logprob(problem.hidden.detach().double(), weight, problem.target)
    del weight
    for row in rows:
        logp = attempt(row, problem.run, functions[row["name"]], row["mode"])
        if logp is not None:
            row["logp_error"] = (logp.double() - exact).abs().max().item()
    working = [row for row in rows if not row["note"]]
    times = [[] for _ in working]
    for _ in range(rounds):
        for row, so_far in zip(working, times, strict=True):
            so_far.append(seconds(problem.run, functions[row["name"]], row["mode"]))

    mm_tflops = 6 * n * h * v / three_products(problem, rounds) / 1e12
    for row, seconds_each in zip(working, times, strict=True):
        factor = 6 if row["name"] in NO_RECOMPUTATION else 8
        if row["mode"] == "fwd":
            factor = 2
        median = statistics.median(seconds_each)
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


# ---- the command
COLUMNS = "n h v zero name mode ms tflops convention of_mm peak_mb logp_error".split()


def main() -> None:
    parser = OneLineParser(description=__doc__)
    shape_help = "rows, their size, vocabulary: this shape; may be repeated"
    parser.add_argument(
        "--shape", nargs=3, type=int, action="append", metavar=("N", "H", "V"), help=shape_help
    )
    parser.add_argument("--zero", type=float, default=0.0, help="share of zeros in the gradient")
    rounds_help = "timed runs of each (default: 20 on a GPU, 5 on a CPU)"
    parser.add_argument("--rounds", type=int, default=20 if CUDA else 5, help=rounds_help)
    parser.add_argument("--json", action="store_true", help="JSON as the last line")
    parser.add_argument("--save", action="store_true", help="write it to bench/results/")
    args = parser.parse_args()
    result = circumstances(DEVICE, "triton")
    rows = []
    for shape in args.shape or SHAPES:
        print(f"N, H, V = {shape}", file=sys.stderr, flush=True)
        rows += measure(contenders(), tuple(shape), args.zero, args.rounds)
    command = " ".join(["python bench/logprob.py", *sys.argv[1:]])
    result |= dict(dtype=str(DTYPE), rounds=args.rounds, command=command, rows=rows)
    args.dtype = str(DTYPE).removeprefix("torch.")
    conclude(args, "logprob", result, table(COLUMNS, rows))


if __name__ == "__main__":
    exit_on_bad_input(main)()
