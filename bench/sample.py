"""How fast sample.py decodes, beside the machine's memory bandwidth and matrix products.

    python bench/sample.py --model DIR --rows 1 8 64 256
    python bench/sample.py --model llama-3.2-1b             random weights (bench/make_model.py)
    --json: one JSON object as the last line; --save: bench/results/sample-<device>-<date>-...json

R rows decode together from one prompt. A call that draws n tokens per row makes one prefill and
n - 1 forward passes of one token per row:

    step_ms       seconds per decode step = (seconds of drawing n - seconds of drawing 1) / (n - 1)
    tokens_per_s  R / seconds per decode step

What a decode step has to read and to multiply, W being the parameters that it multiplies (all but
an untied embedding), and tokens = P + n/2 the mean length of a row (at most the window):

    elements = W + R * 2 * layers * key/value heads * head size * tokens     of the model's dtype
    flops    = 2 R W + R * 4 * layers * query heads * head size * tokens

bandwidth_share and matmul_share are their shares of what this machine does, measured in the same
run: bytes per second of a large copy (read + written), flops per second of one large product in the
same dtype. One row is limited by bandwidth, many rows by products. Softmax and drawing are not
counted.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `sample` is the sampler, not this
import sample
from bench import machine
from bench.make_model import SHAPES, random_model
from model import Transformer
from support.errors import exit_on_bad_input, require
from support.weights import load_model

COLUMNS = ["rows", "tokens_per_s", "step_ms", "prompt_s", "bandwidth_share", "matmul_share"]


# ---- the machine's limits
def fastest(run: Callable, *arguments: object) -> float:
    """Seconds of the fastest run: a limit is what the machine can do when it is not interrupted."""
    machine.seconds(run, *arguments)  # warm-up
    return min(machine.seconds(run, *arguments) for _ in range(10))


def bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy much larger than any cache."""
    size = 1 << 32 if device == "cuda" else 1 << 28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / fastest(target.copy_, source)


def products(device: str, dtype: torch.dtype) -> float:
    """Flops per second of a large square product. Random data: a GPU multiplies zeros faster."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / fastest(torch.matmul, a, b)


# ---- what decoding needs and takes
def needs(model: Transformer, rows: int, tokens: float) -> tuple[float, float]:
    """Bytes and flops of one decode step of `rows` rows with `tokens` in the KV cache of each."""
    config = model.config
    multiplied = [*model.layers.parameters(), model.norm.weight, model.lm_head.weight]
    weights = sum(parameter.numel() for parameter in multiplied)
    tokens = min(tokens, config.sliding_window or tokens)
    per_head = rows * tokens * config.num_hidden_layers * config.head_dim
    element_bytes = model.lm_head.weight.element_size()
    needed_bytes = element_bytes * (weights + 2 * per_head * config.num_key_value_heads)
    needed_flops = 2.0 * rows * weights + 4 * per_head * config.num_attention_heads
    return needed_bytes, needed_flops


def measure(model: Transformer, flags: argparse.Namespace) -> tuple[dict, list[dict]]:
    """-> the machine's limits, the figures of each number of rows."""
    copied = bandwidth(flags.device)
    multiplied = products(flags.device, model.lm_head.weight.dtype)
    generator = torch.Generator().manual_seed(0)
    prompt = machine.random_ids(flags.prompt, model.config.vocab_size, generator)
    times = {rows: ([], []) for rows in flags.rows}  # of drawing 1 token per row, and n
    for _ in range(flags.rounds + 1):
        for rows, both in times.items():  # in turns
            for new, taken in zip((1, flags.new), both, strict=True):
                run = partial(sample.sample_traces, rows=rows)
                taken.append(machine.seconds(run, model, [prompt], rows, new))
    results = []
    for rows, taken in times.items():
        prompt_s, whole_s = [statistics.median(values[1:]) for values in taken]  # no warm-up
        # On a busy machine the difference of two times can be negative.
        step_s = max((whole_s - prompt_s) / (flags.new - 1), 1e-9)
        needed_bytes, needed_flops = needs(model, rows, flags.prompt + flags.new / 2)
        results.append(
            {
                "rows": rows,
                "tokens_per_s": rows / step_s,
                "step_ms": 1e3 * step_s,
                "prompt_s": prompt_s,
                "bandwidth_share": needed_bytes / step_s / copied,
                "matmul_share": needed_flops / step_s / multiplied,
            }
        )
    limits = {"bandwidth_gb_s": copied / 1e9, "matmul_tflop_s": multiplied / 1e12}
    return limits, results


# ---- the command
def main() -> None:
    parser = machine.make_parser(__doc__)
    add = parser.add_argument
    add("--rows", type=machine.count, nargs="+", default=[1, 8, 64, 256], help="R (1 8 64 256)")
    add("--prompt", type=machine.count, default=96, help="P, tokens of the prompt (96)")
    add("--new", type=machine.count, default=64, help="n, tokens drawn per row, 2 or more (64)")
    flags = parser.parse_args()
    require(flags.new > 1, "--new 1: the first token is drawn from the prefill, without a step")
    dtype = getattr(torch, flags.dtype)
    result = machine.circumstances(flags.device)
    result["model"] = Path(flags.model).resolve().name  # no path of the machine
    result |= {key: getattr(flags, key) for key in ("dtype", "prompt", "new", "rounds")}
    if flags.model in SHAPES:
        model = random_model(flags.model, dtype=dtype, device=flags.device)
    else:
        model = load_model(flags.model, dtype, flags.device)
    limits, result["rows"] = measure(model, flags)
    result |= limits
    lengths = f"prompt {flags.prompt}, {flags.new} new, medians of {flags.rounds}"
    copy = f"copy {limits['bandwidth_gb_s']:.1f} GB/s"
    product = f"matrix product {limits['matmul_tflop_s']:.3f} TFLOP/s"
    lines = [f"{result['model']}, {flags.dtype}: {lengths}; limits: {copy}, {product}"]
    lines += machine.table(COLUMNS, result["rows"])
    machine.conclude(flags, "sample", result, lines, result["model"])


if __name__ == "__main__":
    exit_on_bad_input(main)()
