"""What the benchmarks share: the machine's description, time, memory, saved results, checks."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import resource
import shlex
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch

from support.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


# ---- the head of a result, and its file
def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        found = re.search(r"model name\s*: (.*)", cpuinfo.read_text())
        name = found.group(1) if found else name
    return f"{name}, {os.cpu_count()} cores"


def versions(*packages: str) -> dict[str, str]:
    """Of Python, torch, and those of `packages` that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    return found


def circumstances(device: str, *packages: str) -> dict:
    """The first entries of every result: device, date, versions, threads.

    On a CPU the load average, too, as it was before the benchmark: above 0, other programs ran.
    """
    head = {
        "device": device_name(device),
        "date": datetime.date.today().isoformat(),
        "versions": versions(*packages),
        "threads": torch.get_num_threads(),
    }
    if device == "cpu" and hasattr(os, "getloadavg"):
        head["load_average"] = [round(load, 1) for load in os.getloadavg()]
    return head


def headline(result: dict) -> str:
    installed = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return f"{result['device']}; {installed}; {result['threads']} threads"


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def recorded_command(script: str, model: str) -> str:
    """The command for the result, with the model's name instead of its path on this machine."""
    name = Path(model).resolve().name
    shown = {model: name, f"--model={model}": f"--model={name}"}
    words = [shown.get(word, word) for word in sys.argv[1:]]
    return shlex.join(["python", f"bench/{script}", *words])


def save(what: str, result: dict, *tags: str) -> Path:
    """Writes bench/results/<what>-<device>-<date>[-<n>-threads][-<tags>].json, threads on a CPU."""
    threads = f"{result['threads']}-threads" if "load_average" in result else ""
    words = [what, result["device"], result["date"], threads, *tags]
    name = re.sub(r"[^a-z0-9]+", "-", "-".join(words).lower()).strip("-")
    path = ROOT / "bench/results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


# ---- time
def now() -> float:
    """Seconds, once a GPU has computed all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Laps:
    """Seconds that a run spends in each of its parts, in the order in which they first occur."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = now()

    def lap(self, part: str) -> None:
        """Adds the time since the last lap to `part`."""
        at = now()
        self.seconds[part] += at - self.last
        self.last = at


# ---- memory
def held_mb(device: str) -> float:
    """MB in use: allocated tensors on a GPU, the resident memory of this process on a CPU."""
    if device == "cuda":
        return torch.cuda.memory_allocated() / 1e6
    return status_mb("VmRSS") or peak_mb(device)


def peak_mb(device: str) -> float:
    """The most MB in use so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes on Linux
    # VmHWM first: in a process started by a larger one, ru_maxrss begins at the larger one's size.
    return status_mb("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def status_mb(name: str) -> float:
    """A line of Linux's /proc/self/status in MB, 0 where there is no such file."""
    file = Path("/proc/self/status")
    if not file.exists():
        return 0.0
    found = re.search(rf"^{name}:\s*(\d+) kB", file.read_text(), re.MULTILINE)
    return int(found.group(1)) * 1024 / 1e6 if found else 0.0


# ---- arguments
def check_device(name: str) -> str:
    """auto, cpu or cuda -> cpu or cuda; InputError where there is no such device."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no such device here; cpu is")
    return name


def check_least(flag: str, value: int, least: int) -> None:
    """InputError that names the flag where value < least."""
    if value < least:
        raise InputError(f"{flag} {value}: should be at least {least}")


def random_ids(count: int, vocab: int, generator: torch.Generator) -> list[int]:
    """`count` token ids below `vocab`."""
    return torch.randint(vocab, (count,), generator=generator).tolist()
