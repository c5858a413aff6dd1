"""What the benchmarks share: flags, the machine's description, tables, saved results."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
from collections.abc import Callable
from pathlib import Path

import torch

from support.errors import OneLineParser
from support.metrics import now

ROOT = Path(__file__).resolve().parents[1]
BASE = ROOT / "examples/hops/base"


# ---- flags of step.py and sample.py
def make_parser(doc: str) -> OneLineParser:
    parser = OneLineParser(description=doc)
    add = parser.add_argument
    add("--model", default=str(BASE), help="Hugging Face directory (that of the embedded task)")
    add("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    add("--device", choices=["cpu", "cuda"], default=default_device())
    add("--rounds", type=count, default=3, help="timed runs, after one that warms up (3)")
    add("--json", action="store_true", help="print one JSON object as the last line")
    add("--save", action="store_true", help="write it to bench/results/")
    return parser


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def count(text: str) -> int:
    """The type of a flag: an integer of 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} should be 1 or more")
    return value


def random_ids(number: int, vocab: int, generator: torch.Generator) -> list[int]:
    """Token ids from 1 to vocab - 1."""
    return torch.randint(1, vocab, (number,), generator=generator).tolist()


# ---- timing
def seconds(run: Callable, *arguments: object) -> float:
    began = now()
    run(*arguments)
    return now() - began


# ---- a result
def circumstances(device: str, *packages: str) -> dict:
    """The first entries of every result: device, date, versions, threads.

    packages: those of them that are installed have a version. On a CPU the load average, too, as it
    was before the benchmark: above 0, other programs ran.
    """
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    head = {
        "device": device_name(device),
        "date": datetime.date.today().isoformat(),
        "versions": versions,
        "threads": torch.get_num_threads(),
    }
    if device == "cpu" and hasattr(os, "getloadavg"):
        head["load_average"] = [round(load, 1) for load in os.getloadavg()]
    return head


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        name = found.group(1) if found else name
    return f"{name}, {os.cpu_count()} cores"


def headline(result: dict) -> str:
    installed = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['device']}; {installed}; {result['threads']} threads"


def save(what: str, result: dict, *tags: str) -> Path:
    """Writes bench/results/<what>-<device>-<date>[-<n>-threads][-<tags>].json, threads on a CPU."""
    threads = f"{result['threads']}-threads" if "load_average" in result else ""
    words = [what, result["device"], result["date"], threads, *tags]
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
    path = ROOT / "bench/results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def conclude(flags: argparse.Namespace, what: str, result: dict, lines: list[str], *tags: str):
    """Prints a result, and saves it where the flags say so."""
    print(headline(result))
    print("\n".join(lines))
    if flags.save:
        print(f"wrote {save(what, result, flags.dtype, *tags).relative_to(ROOT)}")
    if flags.json:
        print(json.dumps(result))


# ---- a table
def table(columns: list[str], rows: list[dict]) -> list[str]:
    """A line of titles, a line per row; then what the row's "note" says."""
    cells = [columns, *([cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    notes = ["", *(row.get("note", "") for row in rows)]
    lines = []
    for line, note in zip(cells, notes, strict=True):
        padded = [text.rjust(width) for text, width in zip(line, widths, strict=True)]
        lines.append("  ".join([*padded, note]).rstrip())
    return lines


def cell(value: object) -> str:
    """Three digits of a number."""
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return "-" if value is None else str(value)
