"""A run's folder: its layout, and how its parts stay complete when the process is killed.

    runs/NAME/  args.json  log.jsonl  samples.jsonl
                checkpoint-000010/   a Hugging Face directory: fp32 parameters, tokenizer
                    optimizer/       AdamW's moments, each rank's rows in a safetensors file
                    progress.json    step, data position, updates applied
                final/               the trained model, in the precision the initial one has

A directory is written under a temporary name, flushed to disk and renamed: under its own name it is
complete. No random state is saved, because every random stream is a function of (seed, step,
question). Nothing here is a pickle, so that a directory from elsewhere can be loaded without
trusting it. Any number of ranks resumes what any other number has saved, from a file system that
they share (torch.distributed.checkpoint).
"""

import json
import os
import shlex
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from data import Tokenizer
from model import Transformer
from support.distributed import barrier, on_first_rank, rank, whole
from support.errors import InputError
from support.weights import save_model, stored_dtype, write_json

MOMENTS = ("exp_avg", "exp_avg_sq")


# ---- the folder
def open_run(out: Path, args: dict) -> None:
    """Makes the run's folder ready to be written to, and prints the run's command.

    InputError if it holds a run and neither --resume nor --overwrite was given.
    """
    patterns = ("log.jsonl", "samples.jsonl", "checkpoint-*", "final*")
    found = [path for pattern in patterns for path in out.glob(pattern)]
    if found and not (args["resume"] or args["overwrite"]):
        raise InputError(
            f"--out {out} already holds a run ({found[0].name}): "
            "take another folder, --resume it or --overwrite it"
        )
    before = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        if args["overwrite"]:
            for path in found:
                remove(path)
        for path in out.glob("*.tmp"):  # what a kill left half-written
            remove(path)
        if args["resume"] and (out / "args.json").exists():
            before = json.loads((out / "args.json").read_text())
        write_json(out / "args.json", args)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None
    print(shlex.join(command_of(args)))
    for name, value in before.items():
        if name not in ("resume", "overwrite") and args.get(name, value) != value:
            print(f"note: --{name.replace('_', '-')} was {value!r} before the interruption")


def command_of(args: dict) -> list[str]:
    """The command that makes the same run in an empty folder."""
    words = ["python", "train.py"]
    for name, value in args.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] * (value and name not in ("resume", "overwrite"))
        elif value is not None:
            words += [flag, str(value)]
    return words


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """All or nothing: every rank calls write(temporary), then rank 0 flushes and renames it."""
    temporary = path.with_name(path.name + ".tmp")

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def publish() -> None:
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        old = path.with_name(path.name + ".old.tmp")
        if path.exists():
            path.rename(old)  # at no moment does its name stand for half a directory
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)

    on_first_rank(prepare)
    if not temporary.exists():
        raise InputError(
            f"{path.parent}: rank {rank()} does not see what rank 0 writes there: "
            "--out must be on a file system shared by all"
        )
    write(temporary)
    barrier()
    on_first_rank(publish)


# ---- checkpoints
def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints, in the order of their steps."""
    return sorted(path for path in out.glob("checkpoint-*") if path.suffix != ".tmp")


def newest_checkpoint(out: Path) -> Path | None:
    return max(checkpoints(out), default=None)


def save_checkpoint(
    out: Path,
    step: int,
    position: int,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> None:
    """Writes checkpoint-STEP/ and removes all but the newest `keep`."""

    def write(folder: Path) -> None:
        save_model(model, folder, whole=whole, writes=rank() == 0)
        # save_distributed: every rank writes its own rows
        writer = HuggingFaceStorageWriter(str(folder / "optimizer"), save_distributed=True)
        with no_single_process_warning():
            dcp.save(moments(model, optimizer), storage_writer=writer)
        if rank() == 0:
            tokenizer.save(folder)
            counts = [int(state.get("step", 0)) for state in optimizer.state.values()]
            progress = {"step": step, "position": position, "updates": max(counts, default=0)}
            write_json(folder / "progress.json", progress)

    def prune() -> None:
        for old in checkpoints(out)[:-keep]:
            # renamed first: a kill must not leave half a checkpoint under a complete one's name
            shutil.rmtree(old.rename(old.with_name(old.name + ".tmp")))

    write_directory(out / f"checkpoint-{step:06}", write)
    on_first_rank(prune)


def load_progress(
    checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer
) -> tuple[int, int]:
    """Restores the optimizer's moments -> (step, data position)."""
    try:
        progress = json.loads((checkpoint / "progress.json").read_text())
        step, position, updates = (int(progress[name]) for name in ("step", "position", "updates"))
        state = moments(model, optimizer)
        reader = HuggingFaceStorageReader(str(checkpoint / "optimizer"))
        found = reader.read_metadata().state_dict_metadata
        for name, tensor in state.items():
            if name not in found or found[name].size != tensor.shape:
                raise ValueError(f"optimizer/ holds no {name} of shape {list(tensor.shape)}")
        with no_single_process_warning():
            dcp.load(state, storage_reader=reader)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"{checkpoint}: not a checkpoint that can be resumed: {error}") from None
    for name, parameter in model.named_parameters():
        # fused AdamW wants the count on the device of the parameters
        count = torch.tensor(float(updates), device=parameter.device)
        own = {key: state[f"{name}.{key}"] for key in MOMENTS}
        optimizer.state[parameter] = {"step": count} | own
    return step, position


def moments(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name; zeros, as AdamW starts, where a parameter has none yet."""
    found = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        for key in MOMENTS:
            found[f"{name}.{key}"] = state[key] if state else torch.zeros_like(parameter.detach())
    return found


@contextmanager
def no_single_process_warning() -> Iterator[None]:
    """torch.distributed.checkpoint warns a single process that it is one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def save_final(out: Path, model: Transformer, tokenizer: Tokenizer, initial: str) -> None:
    """Writes final/: the trained model, in the precision the initial one is stored in."""

    def write(folder: Path) -> None:
        save_model(model, folder, stored_dtype(initial), whole=whole, writes=rank() == 0)
        if rank() == 0:
            tokenizer.save(folder)

    write_directory(out / "final", write)
