"""How fast sample.py decodes, beside the machine's memory bandwidth and matrix products.

    python bench/sample.py --model DIR                   1, 8, 64 and 256 rows
    python bench/sample.py --model DIR --rows 512 1024   other numbers of rows
    python bench/sample.py --model DIR --cuda-graph      without and with CUDA graphs, in turns
    --json: one JSON object as the last line; --save: bench/results/sample-<device>-<date>...json

R rows decode together from one prompt. A call that draws n tokens per row makes one prefill and
n - 1 forward passes of one token per row:

    seconds per decode step = (seconds of drawing n - seconds of drawing 1) / (n - 1)      (medians)
    tokens/s                = R / seconds per decode step
    with prompt             = R n / seconds of drawing n

What a decode step has to read and to multiply, W being the parameters that it multiplies (all but
an untied embedding), and tokens = P + n/2 the mean length of a row (at most the window):

    elements = W + R * 2 * layers * key/value heads * head size * tokens     of the model's dtype
    flops    = 2 R W + R * 4 * layers * query heads * head size * tokens

`% bandwidth` and `% matmul` are their shares of what this machine does, measured in the same run:
bytes per second of a large copy (read + written), flops per second of one large product in the same
dtype. One row is limited by bandwidth, many rows by products. Softmax and drawing are not counted.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder: `sample` is the sampler, not this file
import sample  # noqa: E402
from bench.machine import (  # noqa: E402
    check_device,
    check_least,
    circumstances,
    headline,
    now,
    random_ids,
    recorded_command,
    save,
    say,
)
from model import Transformer  # noqa: E402
from support.errors import InputError, OneLineParser, exit_on_bad_input  # noqa: E402
from support.weights import load_model  # noqa: E402


# ---- the machine's limits
def seconds(run: Callable[[], object]) -> float:
    start = now()
    run()
    return now() - start


def fastest(run: Callable[[], object], runs: int = 10) -> float:
    """Seconds of the fastest run: a limit is what the machine can do when it is not interrupted."""
    seconds(run)  # warm-up
    return min(seconds(run) for _ in range(runs))


def bandwidth(device: str) -> float:
    """Bytes per second, read and written, of a copy much larger than any cache."""
    size = 1 << 32 if device == "cuda" else 1 << 28
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / fastest(lambda: target.copy_(source))


def products(device: str, dtype: torch.dtype) -> float:
    """Flops per second of a large square product. Random data: a GPU multiplies zeros faster."""
    size = 8192 if device == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / fastest(lambda: a @ b)


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


def measure(model: Transformer, flags: argparse.Namespace, limits: dict[str, float]) -> list[dict]:
    """The figures of each number of rows; in every round all of them are timed once."""
    generator = torch.Generator().manual_seed(flags.seed)
    prompt = random_ids(flags.prompt, model.config.vocab_size, generator)
    graphs = (False, True) if flags.cuda_graph else (False,)
    cases = [(rows, graph) for rows in flags.rows for graph in graphs]
    first = {case: [] for case in cases}  # seconds of drawing 1 token per row
    whole = {case: [] for case in cases}  # seconds of drawing n
    too_large = set()

    def sampling(rows: int, new: int) -> float:
        return seconds(lambda: sample.sample_traces(model, [prompt], rows, new, seed=flags.seed))

    for round_ in range(flags.rounds + 1):
        say(f"round {round_} of {flags.rounds}" if round_ else "warm-up")
        for case in cases:
            if case in too_large:
                continue
            rows, sample.CUDA_GRAPH = case
            try:
                first[case].append(sampling(rows, 1))
                whole[case].append(sampling(rows, flags.new))
            except torch.OutOfMemoryError:
                too_large.add(case)

    results = []
    for rows, graph in cases:
        row = {"rows": rows, "cuda_graph": graph}
        if (rows, graph) in too_large:
            results.append(row | {"note": "out of memory"})
            continue
        prompt_s = statistics.median(first[rows, graph][1:])  # without the warm-up
        whole_s = statistics.median(whole[rows, graph][1:])
        # On a busy machine the difference of two times can be negative.
        step_s = max((whole_s - prompt_s) / (flags.new - 1), 1e-9)
        needed_bytes, needed_flops = needs(model, rows, flags.prompt + flags.new / 2)
        figures = {
            "tokens_per_s": rows / step_s,
            "tokens_per_s_with_prompt": rows * flags.new / whole_s,
            "step_ms": 1e3 * step_s,
            "prompt_s": prompt_s,
            "needed_mb": needed_bytes / 1e6,
            "needed_gflop": needed_flops / 1e9,
            "bandwidth_share": needed_bytes / step_s / limits["bandwidth"],
            "matmul_share": needed_flops / step_s / limits["matmul"],
        }
        results.append(row | figures)
    return results


# ---- the command
COLUMNS = {  # of the table: key -> title, digits, factor
    "tokens_per_s": ("tokens/s", 1, 1),
    "tokens_per_s_with_prompt": ("with prompt", 1, 1),
    "step_ms": ("ms per step", 2, 1),
    "prompt_s": ("prompt s", 3, 1),
    "needed_mb": ("needed MB", 1, 1),
    "needed_gflop": ("needed GFLOP", 2, 1),
    "bandwidth_share": ("% bandwidth", 1, 100),
    "matmul_share": ("% matmul", 1, 100),
}


def print_table(results: list[dict]) -> None:
    print("  rows  CUDA graph" + "".join(f"{title:>14s}" for title, _, _ in COLUMNS.values()))
    for row in results:
        cells = [f"  {row['note']}"] if "note" in row else []
        for key, (_, digits, factor) in COLUMNS.items():
            if key in row:
                cells.append(f"{factor * row[key]:14.{digits}f}")
        print(f"{row['rows']:6d}{'yes' if row['cuda_graph'] else 'no':>12s}" + "".join(cells))


def parse(argv: list[str]) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = OneLineParser(description=__doc__, formatter_class=formatter)
    add = parser.add_argument
    hops = str(ROOT / "examples/hops/base")
    dtypes, devices = ["float32", "bfloat16"], ["auto", "cpu", "cuda"]
    add("--model", default=hops, help="Hugging Face directory (the embedded task's)")
    add("--rows", type=int, nargs="+", default=[1, 8, 64, 256], help="R (1 8 64 256)")
    add("--prompt", type=int, default=96, help="P, tokens of the prompt (96)")
    add("--new", type=int, default=64, help="n, tokens drawn per row (64)")
    add("--dtype", choices=dtypes, default="bfloat16", help="of weights and KV cache (bfloat16)")
    add("--device", choices=devices, default="auto", help="auto = cuda if there is one, else cpu")
    add("--cuda-graph", action="store_true", help="each with CUDA graphs too (needs a GPU)")
    add("--rounds", type=int, default=3, help="timed runs of each (3)")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print one JSON object as the last line")
    add("--save", action="store_true", help="write the result to bench/results/")
    flags = parser.parse_args(argv)
    for rows in flags.rows:
        check_least("--rows", rows, 1)
    if len(set(flags.rows)) < len(flags.rows):
        raise InputError(f"--rows {' '.join(map(str, flags.rows))}: every number once")
    check_least("--prompt", flags.prompt, 1)
    check_least("--new", flags.new, 2)  # the first token is drawn from the prefill, without a step
    check_least("--rounds", flags.rounds, 1)
    check_least("--seed", flags.seed, 0)
    flags.device = check_device(flags.device)
    return flags


def main() -> None:
    flags = parse(sys.argv[1:])
    if flags.cuda_graph and flags.device == "cpu":
        raise InputError("--cuda-graph: there are none on a CPU")
    result = circumstances(flags.device)
    dtype = getattr(torch, flags.dtype)
    model = load_model(flags.model, dtype, flags.device)
    say("limits")
    limits = {"bandwidth": bandwidth(flags.device), "matmul": products(flags.device, dtype)}
    result |= {
        "command": recorded_command("sample.py", flags.model),
        "model": Path(flags.model).resolve().name,
        "prompt": flags.prompt,
        "new": flags.new,
        "dtype": flags.dtype,
        "rounds": flags.rounds,
        "bandwidth_gb_s": limits["bandwidth"] / 1e9,
        "matmul_tflop_s": limits["matmul"] / 1e12,
        "rows": measure(model, flags, limits),
    }
    print(headline(result))
    print(f"{result['model']}, {flags.dtype}: prompt {flags.prompt}, {flags.new} new", end="; ")
    print(f"medians of {flags.rounds}")
    print(f"limits: copy {result['bandwidth_gb_s']:.1f} GB/s", end=", ")
    print(f"matrix product {result['matmul_tflop_s']:.3f} TFLOP/s")
    print_table(result["rows"])
    if flags.save:
        path = save("sample", result, result["model"], flags.dtype)
        print(f"wrote {path.relative_to(ROOT)}")
    if flags.json:
        print(json.dumps(result))


if __name__ == "__main__":
    exit_on_bad_input(main)()
