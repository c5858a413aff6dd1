"""A run's folder, and what survives a kill at any moment.

    runs/NAME/  args.json  log.jsonl  samples.jsonl
                checkpoint-000010/   a Hugging Face directory, usable as it is: fp32 weights, tokenizer
                    optimizer/       AdamW's moments, each rank's rows in a safetensors file (torch.distributed.checkpoint)
                    progress.json    step, data position, updates applied
                final/               the trained model, in the precision the initial one was stored in

A directory is written under a temporary name, flushed and renamed, so under its own name it is whole. No random state is saved: every
random stream is a function of (seed, step, question). Nothing here is a pickle, so a directory from somewhere else can be loaded without
trusting it. Any number of processes can resume what any other number has saved; they need a file system they share.
"""

import json
import os
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
from support.distributed import from_all, rank, wait_for_all
from support.errors import InputError
from support.weights import save_model, stored_dtype, write_json

MOMENTS = ("exp_avg", "exp_avg_sq")


# ---------------------------------------------------------------------------------------------------------------- the folder
def open_run(out: Path, args: dict) -> None:
    """Makes the run's folder ready to be written to; InputError if it holds a run that neither --resume nor --overwrite was said of."""
    holds = [
        path
        for pattern in ("log.jsonl", "samples.jsonl", "checkpoint-*", "final*")
        for path in out.glob(pattern)
    ]
    if holds and not (args["resume"] or args["overwrite"]):
        raise InputError(
            f"--out {out} already holds a run ({holds[0].name}): take another folder, --resume it or --overwrite it"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in [
            *(holds if args["overwrite"] else []),
            *out.glob("*.tmp"),
        ]:  # *.tmp: what a kill left half-written
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        before = (
            json.loads((out / "args.json").read_text())
            if args["resume"] and (out / "args.json").exists()
            else {}
        )
        write_json(out / "args.json", args)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None
    print(
        " ".join(
            [
                "python train.py",
                *(f"--{name.replace('_', '-')} {value!r}" for name, value in args.items()),
            ]
        )
    )
    for name, value in before.items():
        if name not in ("resume", "overwrite") and args.get(name, value) != value:
            print(f"note: --{name.replace('_', '-')} was {value!r} before the interruption")


def first_rank_does(action: Callable[[], None]) -> None:
    """Rank 0 does it for all, the others wait. Its refusal is everybody's: nobody is left waiting for a process that has gone."""
    refusal = None
    if rank() == 0:
        try:
            action()
        except InputError as error:
            refusal = str(error)
    refusal = from_all(refusal)[0]
    if refusal:
        raise InputError(refusal)


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """All or nothing: `write(temporary)` is called on every rank, then rank 0 flushes what is there to disk and gives it its name."""
    temporary = path.with_name(path.name + ".tmp")

    def prepare() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def publish() -> None:
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(path)
        temporary.rename(path)

    first_rank_does(prepare)
    if not temporary.exists():
        raise InputError(
            f"{path.parent}: rank {rank()} does not see what rank 0 writes there: --out must be on a file system shared by all"
        )
    write(temporary)
    wait_for_all()
    first_rank_does(publish)


# ---------------------------------------------------------------------------------------------------------------- checkpoints
def newest_checkpoint(out: Path) -> Path | None:
    """The complete checkpoint of the highest step: a directory has its final name only once all of it is on disk."""
    return max((path for path in out.glob("checkpoint-*") if path.suffix != ".tmp"), default=None)


def save_checkpoint(
    out: Path,
    step: int,
    position: int,
    model: Transformer,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    keep: int,
) -> None:
    """Writes checkpoint-STEP/ and lets the last `keep` stay."""

    def write(folder: Path) -> None:
        save_model(model, folder)
        writer = HuggingFaceStorageWriter(
            str(folder / "optimizer"), save_distributed=True
        )  # every rank writes its own rows
        with alone_is_fine():
            dcp.save(moments(model, optimizer), storage_writer=writer)
        if rank() == 0:
            tokenizer.save(folder)
            updates = max(
                (int(state.get("step", 0)) for state in optimizer.state.values()), default=0
            )
            write_json(
                folder / "progress.json", {"step": step, "position": position, "updates": updates}
            )

    def prune() -> None:
        for old in sorted(path for path in out.glob("checkpoint-*") if path.suffix != ".tmp")[
            :-keep
        ]:
            shutil.rmtree(
                old.rename(old.with_name(old.name + ".tmp"))
            )  # never half a checkpoint under a whole one's name

    write_directory(out / f"checkpoint-{step:06}", write)
    first_rank_does(prune)


def moments(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name; zeros, as AdamW would start, where a parameter has none yet."""
    found = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter] or {
            key: torch.zeros_like(parameter.detach()) for key in MOMENTS
        }
        found |= {f"{name}.{key}": state[key] for key in MOMENTS}
    return found


@contextmanager
def alone_is_fine() -> Iterator[None]:
    """torch.distributed.checkpoint warns a process that works alone that it does."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def load_progress(
    checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer
) -> tuple[int, int]:
    """Puts the optimizer's moments back -> (step, data position)."""
    try:
        progress = json.loads((checkpoint / "progress.json").read_text())
        step, position, updates = (int(progress[name]) for name in ("step", "position", "updates"))
        state, reader = (
            moments(model, optimizer),
            HuggingFaceStorageReader(str(checkpoint / "optimizer")),
        )
        found = (
            reader.read_metadata().state_dict_metadata
        )  # what is not as it should be is refused here, in a line
        for name, tensor in state.items():
            if name not in found or found[name].size != tensor.shape:
                raise ValueError(f"optimizer/ holds no {name} of shape {list(tensor.shape)}")
        with alone_is_fine():
            dcp.load(state, storage_reader=reader)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        raise InputError(f"{checkpoint}: not a checkpoint that can be resumed: {error}") from None
    for name, parameter in model.named_parameters():
        steps = torch.tensor(
            float(updates), device=parameter.device
        )  # fused AdamW wants the count where the weights are
        optimizer.state[parameter] = {"step": steps} | {
            key: state[f"{name}.{key}"] for key in MOMENTS
        }
    return step, position


def save_final(out: Path, model: Transformer, tokenizer: Tokenizer, initial: str) -> None:
    """final/: the trained model, in the precision the initial one was stored in."""

    def write(folder: Path) -> None:
        save_model(model, folder, stored_dtype(initial))
        if rank() == 0:
            tokenizer.save(folder)

    write_directory(out / "final", write)
