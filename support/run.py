"""A run's folder: its layout, and how its parts stay complete when the process is killed.

    runs/NAME/  args.json  log.jsonl  samples.jsonl
                checkpoint-000010/   a Hugging Face directory: fp32 parameters, tokenizer
                    optimizer/       AdamW's moments, each rank's rows in a safetensors file
                    progress.json    step, data position, updates applied, digest of the data
                final/               the trained model, in the precision the initial one has
                run.lock             locked while a process writes here

A directory is written under a temporary name, flushed to disk and renamed: under its own name it is
complete. No random state is saved, because every random stream is a function of (seed, step,
question). Nothing here is a pickle, so that a directory from elsewhere can be loaded without
trusting it. Any number of ranks resumes what any other number has saved, from a file system that
they share (torch.distributed.checkpoint).

Files of other names are never touched, and those above only in a folder that is a run's.
"""

import fcntl
import math
import os
import re
import shlex
import shutil
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import (
    CheckpointException,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from data import Pairs
from support.tokenizer import Tokenizer
from model import Transformer
from support.args import MOST, Args, check_same_run, saved_args
from support.distributed import barrier, on_first_rank, rank, whole
from support.errors import InputError, TrainingError, python, require
from support.errors import is_file, read_json, read_log, write_beside, write_json
from support.weights import save_model

MOMENTS = ("exp_avg", "exp_avg_sq")


# ---- the folder
STEP = r"checkpoint-(\d{6,})"
OURS = re.compile(rf"{STEP}|final|args\.json|log\.jsonl|samples\.jsonl", re.ASCII)
TEMPORARY = re.compile(rf"({OURS.pattern})(\.old)?\.tmp", re.ASCII)  # what a kill leaves
HOLDER = re.compile(r"process \d+ on .*\n|")  # the text of run.lock; empty for a moment
LOCKS: dict[Path, TextIO] = {}  # held by this process: closing a file would release its lock


def check_run(out: Path, args: Args) -> Path | None:
    """The checkpoint to continue from, None for a run that begins.

    InputError for what --out cannot be used for. Nothing has been loaded yet, nothing is written.
    """
    found, temporary = holdings(out)
    if is_file(out / "run.lock"):
        lock_run(out)
    if not found:
        saved = None
    elif not (args.resume or args.overwrite):
        raise InputError(
            f"--out {out} already holds a run ({found[0].name}): "
            "take another folder, --resume it or --overwrite it"
        )
    else:
        saved = saved_args(out)
        others = f"{found[0].name}, but no args.json of a run: it is not this program's"
        require(saved is not None, f"--out {out} holds {others}; take another folder")
    owned = saved is not None or out in LOCKS
    if temporary and not owned:
        raise InputError(f"--out {out} holds {temporary[0].name}, and no run: take another folder")
    for name in ("model", "data", "eval_data"):
        source = Path(getattr(args, name)).resolve()
        for path in temporary + (found if args.overwrite else []):
            lost = getattr(args, name) and source.is_relative_to(path.resolve())
            require(not lost, f"--{name.replace('_', '-')} {source}: would be deleted with {path}")
    if not (args.resume and saved):
        return None
    check_same_run(args, saved)
    for name in ("log.jsonl", "samples.jsonl"):
        read_log(out / name)
    newest = newest_checkpoint(out)
    lost = newest is None and (out / "final").exists()
    require(not lost, f"--resume: {out} holds final/ but no checkpoint to go on from")
    return newest


def is_finished(out: Path, step: int, steps: int) -> bool:
    """Whether there is nothing left to do after `step`; says so."""
    finished = step >= steps and (out / "final").exists()
    if finished and rank() == 0:
        print(f"{out} is finished: step {step} of {steps}; --steps N would continue it")
    return finished


def holdings(out: Path) -> tuple[list[Path], list[Path]]:
    """What `out` holds under this program's names: complete, and temporary."""
    try:
        paths = sorted(out.iterdir()) if out.exists() else []
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None
    found = [path for path in paths if OURS.fullmatch(path.name)]
    return found, [path for path in paths if TEMPORARY.fullmatch(path.name)]


def lock_run(out: Path) -> None:
    """Locks the folder until this process ends; InputError if another one holds it."""
    if out in LOCKS:
        return
    name = out / "run.lock"
    try:
        file = open(name, "a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None
    file.seek(0)
    holder = file.read(1000)
    require(bool(HOLDER.fullmatch(holder)), f"{name}: not this program's; take another --out")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(
            f"--out {out}: {holder.strip()} writes there and holds {name}: "
            "wait for it, end it, or take another folder"
        ) from None
    except OSError as error:  # a file system without locks
        print(f"note: {name} cannot be locked: {error.strerror}", flush=True)
    LOCKS[out] = file


def open_run(out: Path, args: Args) -> None:
    """Makes the run's folder ready to be written to, and prints the run's command."""
    before = {}
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock_run(out)
        LOCKS[out].truncate(0)
        LOCKS[out].write(f"process {os.getpid()} on {socket.gethostname()}\n")
        LOCKS[out].flush()
        found, temporary = holdings(out)
        for path in temporary:
            remove(path)
        if args.resume and (saved := saved_args(out)):
            before = asdict(saved)
        new = write_beside(out / "args.json", asdict(args))  # so it can be written: now delete
        if args.overwrite:
            set_aside([path for path in found if path.name != "args.json"])
        new.replace(out / "args.json")
        for path in holdings(out)[1]:
            remove(path)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written: {error.strerror}") from None
    print(shlex.join(command_of(asdict(args))))
    for name, value in before.items():
        if name not in ("resume", "overwrite") and getattr(args, name) != value:
            print(f"note: --{name.replace('_', '-')} was {value!r} before the interruption")


def set_aside(paths: list[Path]) -> None:
    """Gives all of them temporary names, or none: what cannot be renamed cannot be deleted."""
    renamed = []
    try:
        for path in paths:
            renamed.append((path, path.rename(path.with_name(path.name + ".old.tmp"))))
    except OSError:
        for path, aside in renamed:
            aside.rename(path)
        raise


def command_of(args: dict) -> list[str]:
    """The command that makes the same run in an empty folder."""
    words = [python(), "train.py"]
    for name, value in args.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] * (value and name not in ("resume", "overwrite"))
        elif value is not None:
            words += [flag, str(value)]
    return words


def remove(path: Path) -> None:
    """Deletes a file or directory; of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def discard(path: Path) -> None:
    """Deletes what is no longer needed; a run does not end because it cannot."""
    try:
        if path.suffix != ".tmp" and path.exists():
            # renamed first: a kill must not leave half a checkpoint under a complete one's name
            path = path.rename(path.with_name(path.name + ".tmp"))
        remove(path)
    except OSError as error:
        print(f"note: {path} cannot be deleted: {error.strerror}", flush=True)


def write_directory(path: Path, write: Callable[[Path], None]) -> None:
    """All or nothing: every rank calls write(temporary), then rank 0 flushes and renames it."""
    temporary = path.with_name(path.name + ".tmp")

    def prepare() -> None:
        remove(temporary)
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
        discard(old)

    try:
        on_first_rank(prepare)
        if not temporary.exists():
            raise InputError(
                f"{path.parent}: rank {rank()} does not see what rank 0 writes there: "
                "--out must be on a file system shared by all"
            )
        write(temporary)
        barrier()
        on_first_rank(publish)
    except (OSError, SafetensorError, CheckpointException) as error:  # the disk is full
        if rank() == 0:
            discard(temporary)
        raise TrainingError(
            f"{path}: cannot be written: {error}; what is there is complete"
        ) from None


# ---- checkpoints
def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints, in the order of their steps."""
    found = [path for path in out.glob("checkpoint-*") if re.fullmatch(STEP, path.name, re.ASCII)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """Steps are integers: after checkpoint-999999 comes checkpoint-1000000."""
    return int(re.fullmatch(STEP, checkpoint.name, re.ASCII)[1])


def newest_checkpoint(out: Path) -> Path | None:
    return max(checkpoints(out), key=step_of, default=None)


# progress.json. data: Pairs.digest; position: in the stream of its rows (data.next_examples).
PROGRESS = {
    "step": (int, 0, MOST),
    "position": (int, 0, MOST),
    "updates": (int, 0, MOST),
    "data": (str, None, None),
}


def save_checkpoint(
    out: Path,
    step: int,
    position: int,
    data: str,
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
            write_json(folder / "progress.json", progress | {"data": data})

    def prune() -> None:
        for old in checkpoints(out)[:-keep]:
            discard(old)

    check_finite(model, step)
    write_directory(out / f"checkpoint-{step:06}", write)
    on_first_rank(prune)


def check_finite(model: Transformer, step: int) -> None:
    """TrainingError if a parameter is NaN or inf: such a checkpoint would replace a good one."""
    norm = whole(torch.nn.utils.get_total_norm([p.detach() for p in model.parameters()]))
    if not norm.isfinite():
        raise TrainingError(
            f"step {step}: a parameter is not finite; no checkpoint is written, those before are "
            "complete. A lower --lr?"
        )


def read_progress(checkpoint: Path) -> dict:
    file = checkpoint / "progress.json"
    progress = read_json(file, PROGRESS)
    for name in ("step", "position", "updates"):
        require(
            progress.get(name) is not None,
            f"{file}: not a checkpoint that can be resumed: no {name}",
        )
    step = progress["step"]
    require(step == step_of(checkpoint), f"{file}: step is {step}, the directory says otherwise")
    return progress


def check_same_input(checkpoint: Path, pairs: Pairs, tokenizer: Tokenizer) -> None:
    """InputError if the rows or the tokenizer are no longer those the checkpoint was trained on."""
    data = read_progress(checkpoint).get("data")
    same = data is None or data == pairs.digest  # None: saved before this was
    require(
        same, f"{pairs.path}: has changed since {checkpoint}: a position in it means other rows"
    )
    same = tokenizer.same_as(Tokenizer(checkpoint))
    require(same, f"{tokenizer.path}: its tokenizer or marker is not that of {checkpoint}")


def load_progress(
    checkpoint: Path, model: Transformer, optimizer: torch.optim.Optimizer
) -> tuple[int, int]:
    """Restores the optimizer's moments -> (step, data position)."""
    progress = read_progress(checkpoint)
    step, position, updates = (progress[name] for name in ("step", "position", "updates"))
    try:
        state = moments(model, optimizer)
        reader = HuggingFaceStorageReader(str(checkpoint / "optimizer"))
        found = reader.read_metadata().state_dict_metadata
        for name, tensor in state.items():
            if name not in found or found[name].size != tensor.shape:
                raise ValueError(f"optimizer/ holds no {name} of shape {list(tensor.shape)}")
        check_cover(found)
        with no_single_process_warning():
            dcp.load(state, storage_reader=reader)
    except (Exception, CheckpointException) as error:  # torch expects the files to be its own
        text = f"{checkpoint}: not a checkpoint that can be resumed: {cause(error)}"
        raise InputError(text) from None
    for name, parameter in model.named_parameters():
        # fused AdamW wants the count on the device of the parameters
        count = torch.tensor(float(updates), device=parameter.device)
        own = {key: state[f"{name}.{key}"] for key in MOMENTS}
        optimizer.state[parameter] = {"step": count} | own
    return step, position


def cause(error: BaseException) -> BaseException:
    """What went wrong on the first rank that failed, without its traceback."""
    if isinstance(error, CheckpointException):
        return next(iter(error.failures.values()))[0]
    return error


def check_cover(stored: dict[str, TensorStorageMetadata]) -> None:
    """ValueError unless every tensor's pieces are there: torch reads a missing one as zeros."""
    for name, tensor in stored.items():
        pieces = {tuple(piece.offsets): math.prod(piece.sizes) for piece in tensor.chunks}
        if sum(pieces.values()) != math.prod(tensor.size):
            raise ValueError(f"optimizer/ lacks a part of {name}: is a file of it missing?")


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


def save_final(
    out: Path, model: Transformer, tokenizer: Tokenizer, dtypes: dict[str, torch.dtype]
) -> None:
    """Writes final/: the trained model, each tensor in its type of the initial one (`dtypes`).

    Nothing is written after it: the folder is unlocked.
    """

    def write(folder: Path) -> None:
        save_model(model, folder, dtypes, whole=whole, writes=rank() == 0)
        if rank() == 0:
            tokenizer.save(folder)

    write_directory(out / "final", write)
    if out in LOCKS:
        LOCKS.pop(out).close()
