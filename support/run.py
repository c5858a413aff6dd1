"""A run's folder: its layout, and how its parts stay complete when the process is killed.

    runs/NAME/  args.json  log.jsonl  samples.jsonl
                checkpoint-000010/   a Hugging Face directory: fp32 parameters, tokenizer
                    optimizer/       AdamW's moments, each rank's rows in a safetensors file
                    progress.json    step, data position, updates applied, digest of the data,
                                     moving average of the reward std, steps of warm-up
                final/               the trained model, in --dtype: as it was evaluated
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
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor

from aggregate import AGGREGATORS
from data import Pairs
from model import Transformer
from support.args import Args, check_same_run, flag_of, saved_args
from support.distributed import gather_objects, launched, on_first_rank, rank, whole
from support.errors import (
    ERASE,
    InputError,
    Interrupted,
    TrainingError,
    command,
    python,
    read_json,
    refusing,
    require,
    write_json,
)
from support.metrics import Log
from support.tokenizer import Tokenizer
from support.weights import save_model

MAX_BAD_UPDATES = 3  # NaN or inf gradients this many times in a row end the run
KEEP = 2  # checkpoints
MOMENTS = ("exp_avg", "exp_avg_sq")
OURS = re.compile(r"checkpoint-\d{6,}|final|args\.json|log\.jsonl|samples\.jsonl", re.ASCII)
TEMPORARY = re.compile(rf"({OURS.pattern})(\.old)?\.tmp", re.ASCII)  # what a kill leaves


class Run:
    """A run in its folder. Every rank has one; rank 0 writes what is not sharded.

    A process has one run at a time: a new one takes the lock of one whose train() raised.
    """

    lock: IO | None = None  # of the process, an open file: closing it releases the lock

    def __init__(self, args: Args) -> None:
        self.release()
        self.args = args
        self.out = Path(args.out)
        self.checkpoint: Path | None = on_first_rank(self.check)  # to continue from
        self.step = 0  # the last one that is done
        self.position = 0  # in the stream of rows (data.next_examples)
        self.reward_std = 0.0  # moving average over the steps (--filter-std)
        self.bad_updates = 0  # in a row
        self.signal = 0  # Ctrl-C or SIGTERM, as its number
        # `restore` brings what is saved: model, optimizer, tokenizer, pairs.

    # ---- before anything is written
    def check(self) -> Path | None:
        """InputError for what --out cannot be used for -> the checkpoint to continue from."""
        args, out = self.args, self.out
        found, temporary = self.holdings()
        if (out / "run.lock").exists():
            self.take_lock()
        if found and not (args.resume or args.overwrite):
            raise InputError(
                f"--out {out} already holds a run ({found[0].name}): "
                "take another folder, --resume it or --overwrite it"
            )
        is_run = "marker_weight" in read_json(out / "args.json")  # of any version of this program
        begun = out / "args.json.tmp" if Run.lock else None  # a kill before the first file
        for path in found + temporary:
            text = f"--out {out} holds {path.name}, but no args.json of a run; take another folder"
            require(is_run or path == begun, text)
        for name in ("model", "data", "eval_data"):
            source = Path(getattr(args, name)).resolve()
            for path in temporary + (found if args.overwrite else []):
                lost = getattr(args, name) and source.is_relative_to(path.resolve())
                require(not lost, f"{flag_of(name)} {source}: would be deleted with {path}")
        if not (args.resume and is_run):
            return None
        check_same_run(args, saved_args(out))
        kept = self.checkpoints()
        lost = not kept and (out / "final").exists()
        require(not lost, f"--resume: {out} holds final/ but no checkpoint to go on from")
        return kept[-1] if kept else None

    def holdings(self) -> tuple[list[Path], list[Path]]:
        """What the folder holds under this program's names: complete, and temporary."""
        with refusing(f"--out {self.out}"):
            paths = sorted(self.out.iterdir()) if self.out.exists() else []
        found = [path for path in paths if OURS.fullmatch(path.name)]
        return found, [path for path in paths if TEMPORARY.fullmatch(path.name)]

    def checkpoints(self) -> list[Path]:
        """In the order of their steps: after checkpoint-999999 comes checkpoint-1000000."""
        found = [path for path in self.holdings()[0] if path.name.startswith("checkpoint-")]
        return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))

    def take_lock(self) -> None:
        """Locks the folder while this process runs in it; InputError if another one holds it."""
        if Run.lock:
            return
        name = self.out / "run.lock"
        Run.lock = open(name, "a")
        try:
            fcntl.flock(Run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"another process writes there and holds {name}: wait for it or end it"
            raise InputError(f"--out {self.out}: {text}") from None
        except OSError as error:  # a file system without locks
            print(f"note: {name} cannot be locked: {error.strerror}", flush=True)

    def release(self) -> None:
        if Run.lock:
            Run.lock.close()
        Run.lock = None

    # ---- resuming
    def restore(
        self,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        tokenizer: Tokenizer,
        pairs: Pairs,
    ) -> None:
        """What is trained and saved from here on: as the checkpoint left it, if there is one.

        `model` was read from it. InputError if rows or tokenizer are no longer those that it was
        trained on.
        """
        self.model, self.optimizer, self.tokenizer, self.pairs = model, optimizer, tokenizer, pairs
        if self.checkpoint is None:
            return
        same = tokenizer.same_as(Tokenizer(self.checkpoint))
        text = f"its tokenizer or marker is not that of {self.checkpoint}"
        require(same, f"{tokenizer.path}: {text}")
        folder = self.checkpoint / "optimizer"
        with refusing(f"{self.checkpoint}: not a checkpoint that can be resumed"):
            progress = read_json(self.checkpoint / "progress.json")
            self.step, self.position = int(progress["step"]), int(progress["position"])
            updates, self.reward_std = float(progress["updates"]), progress["reward_std"]
            self.args.warmup_steps = float(progress["warmup_steps"])  # it began with
            same = progress["data"] == pairs.digest
            text = f"has changed since {self.checkpoint}: a position in it means other rows"
            require(same, f"{pairs.path}: {text}")
            state = moments(model, optimizer)
            reader = dcp.HuggingFaceStorageReader(str(folder))
            stored = reader.read_metadata().state_dict_metadata
            for name, tensor in state.items():
                pieces = {tuple(piece.offsets): piece.sizes for piece in stored[name].chunks}
                # torch reads a piece that is missing as zeros
                found = sum(map(math.prod, pieces.values())) == tensor.numel()
                require(found, f"{folder}: lacks a part of {name}: is a file of it missing?")
            with plainly():
                dcp.load(state, storage_reader=reader)
        for name, parameter in model.named_parameters():
            # fused AdamW wants the count on the device of the parameters
            count = torch.tensor(updates, device=parameter.device)
            own = {key: state[f"{name}.{key}"] for key in MOMENTS}
            optimizer.state[parameter] = {"step": count} | own

    def is_finished(self) -> bool:
        """Whether there is nothing left to do; says so."""
        final = read_json(self.out / "final/progress.json").get("step")  # may be of fewer --steps
        finished = self.step >= self.args.steps and self.step == final
        if finished and rank() == 0:
            print(f"{self.out} is finished: a --steps of more than {self.step} would continue it")
        return finished

    # ---- writing
    def open(self) -> Log:
        """Makes the folder ready to be written to, and listens to signals."""
        on_first_rank(self.prepare)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)
        log = Log(self.out, self.args.steps, self.step, writes=rank() == 0)
        if self.args.resume:
            log.print(f"{self.out} has done {self.step} of {self.args.steps} steps")
        return log

    def prepare(self) -> None:
        with refusing(f"--out {self.out}: cannot be written"):
            self.out.mkdir(parents=True, exist_ok=True)
            self.take_lock()
            found, temporary = self.holdings()
            for path in found if self.args.overwrite else []:
                if path.name != "args.json":
                    temporary.append(set_aside(path))
            pasted = shlex.join([python(), *launcher(), *sys.argv])
            write_json(self.out / "args.json", asdict(self.args) | {"command": pasted})
            for path in temporary:
                remove(path)

    def receive(self, number: int, frame: object) -> None:
        """The first Ctrl-C or SIGTERM asks the run to stop after its step; a second ends it."""
        self.signal = number
        self.restore_signals(signal.SIG_DFL)
        if rank() == 0:  # not by print, which the signal may have interrupted
            text = f"{ERASE}finishing step {max(1, self.step)}; again to stop now\n"
            with suppress(OSError):  # the same Ctrl-C has ended the tee that reads this
                os.write(2, text.encode())

    def restore_signals(self, interrupt: object = signal.default_int_handler) -> None:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def after_step(self, norms: list[float]) -> None:
        """Counts bad updates, saves a checkpoint when it is due, stops if a signal asked for it.

        norms: the gradient norms of the step's updates. `step` and `position` are those after it.
        """
        for norm in norms:
            self.bad_updates = 0 if math.isfinite(norm) else self.bad_updates + 1
        if self.bad_updates >= MAX_BAD_UPDATES:
            raise TrainingError(
                f"step {self.step}: loss or gradient not finite {self.bad_updates} times in a row; "
                f"none of these updates was applied, see {self.out}"
            )
        stop = max(gather_objects(self.signal))  # of any rank
        due = self.step % self.args.save_every == 0 or self.step == self.args.steps
        if due or stop:
            self.save_checkpoint()
        if stop:
            self.restore_signals()
            flags = ["--resume", "--out", str(self.out)]
            if self.args.aggregator not in AGGREGATORS:  # code is never taken from args.json
                flags += ["--aggregator", self.args.aggregator]
            pasted = command("train.py", *flags, launcher=launcher())
            stopped = Interrupted(f"step {self.step} is saved; {pasted} continues after it")
            stopped.number = stop
            stopped.said = rank() != 0
            raise stopped

    def save_checkpoint(self) -> None:
        """Writes checkpoint-STEP/ and removes all but the newest KEEP."""
        model, optimizer = self.model, self.optimizer
        # A NaN must not replace a good checkpoint.
        norm = whole(torch.nn.utils.get_total_norm([p.detach() for p in model.parameters()]))
        if not norm.isfinite():
            raise TrainingError(
                f"step {self.step}: a parameter is not finite; no checkpoint is written, those "
                "before are complete. A lower --lr?"
            )

        def write(folder: Path) -> None:
            save_model(model, folder, whole=whole, writes=rank() == 0)
            # save_distributed: every rank writes its own rows
            where = str(folder / "optimizer")
            writer = dcp.HuggingFaceStorageWriter(where, save_distributed=True)
            with plainly():
                dcp.save(moments(model, optimizer), storage_writer=writer)
            if rank() == 0:
                self.tokenizer.save(folder)
                # There is no state where no update was finite yet.
                updates = max((int(state["step"]) for state in optimizer.state.values()), default=0)
                progress = {"step": self.step, "position": self.position, "updates": updates}
                progress |= {"reward_std": self.reward_std, "data": self.pairs.digest}
                progress["warmup_steps"] = self.args.warmup_steps
                write_json(folder / "progress.json", progress)

        def prune() -> None:
            for old in self.checkpoints()[:-KEEP]:
                discard(old)

        write_directory(self.out / f"checkpoint-{self.step:06}", write)
        on_first_rank(prune)

    def finish(self) -> Path:
        """Writes final/, in the type of the computation, and unlocks the folder.

        In a smaller one a short run's updates would be rounded away. With bfloat16 they are, as in
        every evaluation; the last checkpoint has the fp32 parameters.
        """

        def write(folder: Path) -> None:
            dtype = getattr(torch, self.args.dtype)
            save_model(self.model, folder, dtype, whole=whole, writes=rank() == 0)
            if rank() == 0:
                self.tokenizer.save(folder)
                write_json(folder / "progress.json", {"step": self.step})

        self.restore_signals()
        write_directory(self.out / "final", write)
        self.release()
        return self.out / "final"


def launcher() -> list[str]:
    """torchrun, between the interpreter and train.py; any number of ranks can resume a run."""
    ranks = f"--nproc-per-node={os.environ.get('LOCAL_WORLD_SIZE')}"
    return ["-m", "torch.distributed.run", "--standalone", ranks] if launched() else []


def moments(model: Transformer, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """AdamW's state by parameter name; zeros, as AdamW starts, where a parameter has none yet."""
    found = {}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter)
        for key in MOMENTS:
            found[f"{name}.{key}"] = state[key] if state else torch.zeros_like(parameter.detach())
    return found


@contextmanager
def plainly() -> Iterator[None]:
    """torch.distributed.checkpoint collects the errors of all ranks: raises the first of them.

    And it warns a single process that it is one: not shown.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except dcp.CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from None


# ---- directories that are whole or not there
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
        old = set_aside(path) if path.exists() else None
        temporary.rename(path)
        if old:
            discard(old)

    try:
        on_first_rank(prepare)
        shared = f"rank {rank()} does not see what rank 0 writes there: is the file system shared?"
        require(temporary.exists(), f"{path.parent}: {shared}")
        write(temporary)
        gather_objects(None)  # all have written
        on_first_rank(publish)
    except (OSError, SafetensorError) as error:  # the disk is full
        if rank() == 0:
            discard(temporary)
        text = f"{path}: cannot be written: {error}; what is there is complete"
        raise TrainingError(text) from None


def set_aside(path: Path) -> Path:
    """Gives it a temporary name: a kill must not leave half of it under a complete one's name."""
    return path.rename(path.with_name(path.name + ".old.tmp"))


def discard(path: Path) -> None:
    """Deletes what is no longer needed; a run does not end because it cannot."""
    try:
        if path.exists():
            remove(path if path.suffix == ".tmp" else set_aside(path))
    except OSError as error:
        print(f"note: {path} cannot be deleted: {error.strerror}", flush=True)


def remove(path: Path) -> None:
    """Deletes a file or directory; of a symbolic link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
