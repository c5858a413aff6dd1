"""How fast sample.py decodes, beside what this machine could do: its memory bandwidth and its matrix products, measured in the same run.

    python bench/sample.py --model DIR                       1, 8, 64 and 256 rows of 96 prompt tokens and 64 new ones, bfloat16
    python bench/sample.py --model DIR --rows 512 1024       other numbers of rows
    --json: one JSON object as the last line; --save: bench/results/sample-<device>-<date>...json

R rows decode together from one prompt. A call that draws n tokens a row reads the prompt, draws once, and then makes n - 1 decode steps:

    seconds per decode step = (seconds of drawing n - seconds of drawing 1) / (n - 1)            medians of both
    tokens/s                = R / seconds per decode step                                        `with prompt`: R n / seconds of drawing n

What a decode step cannot do without, in the model's dtype, W the parameters it multiplies (all but an untied embedding):

    bytes = W + R * 2 * layers * key/value heads * head size * tokens held     every weight once, every row's keys and values once
    flops = 2 R W + R * 4 * layers * query heads * head size * tokens held     tokens held: P + n/2, the mean (at most the window)

Their shares of the limits say how far from the machine decoding is: `% bandwidth` = bytes per second / those of a large copy (read +
written), `% matmul` = flops per second / those of one large product in the same dtype. One row is bound by bandwidth, many by products.
Logits, softmax and the drawing are in neither count: they are overhead. A copy writes as much as it reads, so reading alone can beat it.
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
from model import Config, Transformer  # noqa: E402
from sample import sample_traces  # noqa: E402
from support.errors import InputError, OneLineParser, exit_on_bad_input  # noqa: E402
from support.weights import load_model  # noqa: E402

# ---- the machine's limits ----------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], object]) -> float:
    start = now()
    run()
    return now() - start


def best(run: Callable[[], object], runs: int = 10) -> float:
    """The fastest of some runs: a limit is what the machine can do, not what it does when it is interrupted."""
    seconds(run)
    return min(seconds(run) for _ in range(runs))


def bandwidth(device: str) -> float:
    """Bytes per second of a copy much larger than any cache, read and written."""
    source = torch.ones(
        (1 << 32 if device == "cuda" else 1 << 28), dtype=torch.uint8, device=device
    )
    target = torch.empty_like(source)
    return 2 * len(source) / best(lambda: target.copy_(source))


def products(device: str, dtype: torch.dtype) -> float:
    """Flops per second of one large square matrix product. Random data: a GPU multiplies zeros faster."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / best(lambda: a @ b)


# ---- what decoding needs and takes -------------------------------------------------------------------------------------------


def needs(model: Transformer, rows: int, held: float) -> tuple[float, float]:
    """Bytes and flops that one decode step of `rows` rows cannot do without, each holding `held` tokens."""
    config: Config = model.config
    weights = (
        sum(p.numel() for p in model.layers.parameters())
        + model.norm.weight.numel()
        + model.lm_head.weight.numel()
    )
    held = min(held, config.sliding_window or held)
    per_token = config.num_hidden_layers * config.head_dim
    size = model.lm_head.weight.element_size()
    return (
        size * (weights + rows * held * 2 * per_token * config.num_key_value_heads),
        2.0 * rows * weights + rows * held * 4 * per_token * config.num_attention_heads,
    )


def measure(model: Transformer, flags: argparse.Namespace, limits: dict[str, float]) -> list[dict]:
    """A row for each number of rows; all of them take turns, round by round."""
    prompt = random_ids(
        flags.prompt, model.config.vocab_size, torch.Generator().manual_seed(flags.seed)
    )
    times: dict[int, dict[int, list[float]]] = {rows: {1: [], flags.new: []} for rows in flags.rows}
    notes: dict[int, str] = {}
    settings = {"seed": flags.seed, "cuda_graphs": flags.cuda_graphs}
    for round_ in range(-1, flags.rounds):
        say(f"round {round_ + 1} of {flags.rounds}" if round_ >= 0 else "warm-up")
        for rows, by_length in times.items():
            try:
                for new, timed in by_length.items() if rows not in notes else ():
                    timed.append(
                        seconds(
                            lambda new=new, rows=rows: sample_traces(
                                model, [prompt], rows, new, **settings
                            )
                        )
                    )
            except torch.OutOfMemoryError:  # a row of the table, not the end of the benchmark
                notes[rows] = "out of memory"
    found = []
    for rows, by_length in times.items():
        if rows in notes:
            found.append({"rows": rows, "note": notes[rows]})
            continue
        first, whole = (
            statistics.median(timed[1:]) for timed in by_length.values()
        )  # the first run warmed up
        step = max(
            (whole - first) / (flags.new - 1), 1e-9
        )  # a busy machine can make the difference of two times negative
        needed_bytes, needed_flops = needs(model, rows, flags.prompt + flags.new / 2)
        figures = {
            "tokens_per_s": rows / step,
            "tokens_per_s_with_prompt": rows * flags.new / whole,
            "step_ms": 1e3 * step,
        }
        figures |= {
            "prompt_s": first,
            "needed_mb": needed_bytes / 1e6,
            "needed_gflop": needed_flops / 1e9,
        }
        figures["bandwidth_share"] = needed_bytes / step / limits["bandwidth"]
        figures["matmul_share"] = needed_flops / step / limits["matmul"]
        found.append({"rows": rows} | figures)
    return found


# ---- the command -------------------------------------------------------------------------------------------------------------


def table(rows: list[dict]) -> list[str]:
    """A line per number of rows."""
    titles = (
        "tokens/s",
        "with prompt",
        "ms per step",
        "prompt s",
        "needed MB",
        "needed GFLOP",
        "% bandwidth",
        "% matmul",
    )
    lines = [f"{'rows':>6s}" + "".join(f"{title:>14s}" for title in titles)]
    for row in rows:
        if "note" in row:
            lines.append(f"{row['rows']:6d}  {row['note']}")
            continue
        cells = [
            f"{row['tokens_per_s']:.1f}",
            f"{row['tokens_per_s_with_prompt']:.1f}",
            f"{row['step_ms']:.2f}",
            f"{row['prompt_s']:.3f}",
        ]
        cells += [f"{row['needed_mb']:.1f}", f"{row['needed_gflop']:.2f}"]
        cells += [f"{100 * row[share]:.1f}" for share in ("bandwidth_share", "matmul_share")]
        lines.append(f"{row['rows']:6d}" + "".join(f"{cell:>14s}" for cell in cells))
    return lines


def parse(argv: list[str]) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model",
        default=str(ROOT / "examples/hops/base"),
        help="Hugging Face directory (default: the embedded task's)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[1, 8, 64, 256],
        help="R, rows that decode together (1 8 64 256)",
    )
    parser.add_argument("--prompt", type=int, default=96, help="P, tokens of the prompt (96)")
    parser.add_argument("--new", type=int, default=64, help="n, tokens drawn per row (64)")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="bfloat16",
        help="of weights, keys and values (bfloat16)",
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cpu", "cuda"],
        default="auto",
        help="auto = cuda if there is one, else cpu",
    )
    parser.add_argument("--cuda-graphs", action="store_true", help="as in train.py")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each (3)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    parser.add_argument("--save", action="store_true", help="write the result to bench/results/")
    flags = parser.parse_args(argv)
    for rows in flags.rows:
        check_least("--rows", rows, 1)
    if len(set(flags.rows)) < len(flags.rows):
        raise InputError(f"--rows {' '.join(map(str, flags.rows))}: every number once")
    for name, least in {"prompt": 1, "new": 2, "rounds": 1, "seed": 0}.items():
        check_least(
            f"--{name}", getattr(flags, name), least
        )  # n >= 2: the first token is drawn before any decode step
    flags.device = check_device(flags.device)
    if flags.cuda_graphs and flags.device != "cuda":
        raise InputError(f"--cuda-graphs: there are none on --device {flags.device}")
    return flags


def main() -> None:
    flags = parse(sys.argv[1:])
    result = circumstances(flags.device)
    dtype = getattr(torch, flags.dtype)
    model = load_model(flags.model, dtype, flags.device)
    model_name = Path(flags.model).resolve().name
    result |= {"command": recorded_command("sample.py", flags.model), "model": model_name}
    result |= {
        key: getattr(flags, key) for key in ("prompt", "new", "dtype", "cuda_graphs", "rounds")
    }
    say("limits")
    limits = {"bandwidth": bandwidth(flags.device), "matmul": products(flags.device, dtype)}
    result |= {
        "bandwidth_gb_s": limits["bandwidth"] / 1e9,
        "matmul_tflop_s": limits["matmul"] / 1e12,
    }
    result["rows"] = measure(model, flags, limits)
    print(
        f"{headline(result)}\n{model_name}, {flags.dtype}: prompt {flags.prompt}, {flags.new} new; medians of {flags.rounds}"
    )
    print(
        f"limits: copy {result['bandwidth_gb_s']:.1f} GB/s, matrix product {result['matmul_tflop_s']:.3f} TFLOP/s"
    )
    print("\n".join(table(result["rows"])))
    if flags.save:
        print(f"wrote {save('sample', result, model_name, flags.dtype).relative_to(ROOT)}")
    if flags.json:
        print(json.dumps(result))


if __name__ == "__main__":
    exit_on_bad_input(main)()
