"""What every benchmark here needs to know about the machine it runs on, and how it writes down what it measured."""

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


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return f"{model.group(1) if model else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


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
    """The head of every result: where, when, with what. The load average is the machine's before we began: above zero, somebody else
    was computing too."""
    head = dict(
        device=device_name(device),
        date=datetime.date.today().isoformat(),
        versions=versions(*packages),
    )
    head["threads"] = torch.get_num_threads()
    if device == "cpu" and hasattr(os, "getloadavg"):
        head["load_average"] = [round(load, 1) for load in os.getloadavg()]
    return head


def headline(result: dict) -> str:
    return f"{result['device']}; {', '.join(f'{k} {v}' for k, v in result['versions'].items())}; {result['threads']} threads"


def say(text: str) -> None:
    """Progress, on stderr: stdout is for the result."""
    print(text, file=sys.stderr, flush=True)


def recorded_command(script: str, model: str) -> str:
    """The command as the result remembers it: the model by its name alone, wherever it stands here."""
    here = {
        model: Path(model).resolve().name,
        f"--model={model}": f"--model={Path(model).resolve().name}",
    }
    return shlex.join(
        ["python", f"bench/{script}", *(here.get(word, word) for word in sys.argv[1:])]
    )


def save(what: str, result: dict, *tags: str) -> Path:
    """Writes bench/results/<what>-<device>-<date>[-<n>-threads][-<tags>].json, the threads on a CPU only."""
    threads = f"{result['threads']}-threads" if "load_average" in result else ""
    words = "-".join(
        word for word in (what, result["device"], result["date"], threads, *tags) if word
    )
    path = (
        ROOT
        / "bench"
        / "results"
        / (re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + ".json")
    )
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


# ---- time ----------------------------------------------------------------------------------------------------


def now() -> float:
    """Seconds, once a GPU has done all it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Laps:
    """Seconds a run spends in each of its parts, in the order they first occur."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = now()

    def lap(self, part: str) -> None:
        """Books the time since the last lap on `part`."""
        at = now()
        self.seconds[part] += at - self.last
        self.last = at


# ---- memory ---------------------------------------------------------------------------------------------------


def held_mb(device: str) -> float:
    """MB in use: allocated tensors on a GPU, the resident memory of this process on a CPU."""
    return (
        torch.cuda.memory_allocated() / 1e6
        if device == "cuda"
        else (status_mb("VmRSS") or peak_mb(device))
    )


def peak_mb(device: str) -> float:
    """MB in use at this process's highest point so far."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, kilobytes on Linux
    # VmHWM first: where a process was started by a larger one, ru_maxrss begins at the other's size
    return status_mb("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def status_mb(name: str) -> float:
    """A line of Linux's /proc/self/status in MB, 0 where there is no such thing."""
    file = Path("/proc/self/status")
    line = (
        re.search(rf"^{name}:\s*(\d+) kB", file.read_text(), re.MULTILINE)
        if file.exists()
        else None
    )
    return int(line.group(1)) * 1024 / 1e6 if line else 0.0


# ---- arguments ------------------------------------------------------------------------------------------------


def check_device(name: str) -> str:
    """auto, cpu or cuda -> cpu or cuda; InputError where that device is not here."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no such device here; cpu is")
    return name


def check_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise InputError(f"{flag} {value}: should be at least {least}")


def random_ids(count: int, vocab: int, generator: torch.Generator) -> list[int]:
    return torch.randint(vocab, (count,), generator=generator).tolist()
