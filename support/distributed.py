"""More than one process, or bf16: FSDP2 shards the model; each rank has questions of its own.

torchrun starts W processes of the same program ("ranks"). Each holds 1/W of the rows of every fp32
parameter, gradient and AdamW moment (DTensors). Parameters are whole, in --dtype, only in

    sampling, evaluation    all of them, in the gathered view: a plain Transformer, so that no hook
                            and no collective runs per decoded token; then freed
    every other forward,    a layer at a time; embedding and head from one to the other
    every backward

    collective      of what                             when
    all-gather      all parameters, the gathered view   per sampling or evaluation
    all-gather      one layer's parameters              per forward and backward
    reduce-scatter  one layer's gradients, fp32 sums    per backward
    all-reduce      the gradient norm                   per update
    all-gather      figures for the log (objects)       per step

Hence all ranks run equally many forwards and backwards: each has as many questions, K traces each,
and traces are cut into micro-batches by their number, not their length (reward.py).

Memory of a rank, P parameters, bf16: 12 P/W + 2 P bytes while it samples, with the view; 16 P/W,
two layers, embedding, head and activations while it trains. While it starts, each rank reads the
whole model: 4 P. One process in fp32 does without all this: a plain Transformer, no process group.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from model import Transformer
from support.errors import ERASE, InputError, require
from support.weights import assign, empty_model, tensors_of

T = TypeVar("T")


# ---- ranks
def launched() -> bool:
    """Whether torchrun started this process (other launchers also set RANK and WORLD_SIZE)."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def start(device: str, dtype: torch.dtype) -> None:
    """Joins the process group of all ranks. A process started alone needs one in bf16 only."""
    # Named: without a name torch takes the machine's accelerator, even for tensors on the CPU.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    if not launched():
        if dtype != torch.float32 and not dist.is_initialized():
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return
    restarts = int(os.environ["TORCHELASTIC_MAX_RESTARTS"])
    require(restarts == 0, f"--max-restarts {restarts}: train.py --resume continues a run instead")
    if device == "cuda":
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        require(local < count, f"--nproc-per-node is more than the {count} GPU(s) of this machine")
        torch.cuda.set_device(local)
    dist.init_process_group(backend)


def stop() -> None:
    """Leaves the process group; ends this process if it is one of several.

    Without destructors: the process group's threads may still run when theirs are called, which has
    been seen to abort a run that had finished.
    """
    if launched():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    if dist.is_initialized():
        dist.destroy_process_group()


EVERY = 30  # seconds between two lines of progress in a file


class Progress:
    """What rank 0 is doing, on stderr: on a terminal in one line that is rewritten and at the end
    removed, in a file in a line every 30 seconds."""

    def __init__(self, doing: str, total: int, what: str) -> None:
        self.text, self.total = f"{doing} {{}}/{total} {what}", total
        self.done = None
        self.said = time.monotonic()
        self.update(0)

    def update(self, done: int) -> None:
        line, now = self.text.format(done), time.monotonic()
        if rank() > 0 or (ERASE and done == self.done):
            return
        if ERASE:
            self.done = done
            print(ERASE + line * (done < self.total), end="", file=sys.stderr, flush=True)
        elif now - self.said > EVERY:
            self.said = now
            print(line, file=sys.stderr, flush=True)


# ---- communication of small things; all ranks must call
def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def on_first_rank(action: Callable[[], T]) -> T:
    """Rank 0 acts, the others wait -> its result. Every rank raises its InputError or OSError."""
    result = failure = None
    if rank() == 0:
        try:
            result = action()
        except (InputError, OSError) as error:
            failure = error
    failure, result = gather_objects((failure, result))[0]
    if failure:
        failure.said = rank() != 0
        raise failure
    return result


# ---- which questions are whose
def own_share(items: list[T]) -> list[T]:
    """This rank's part of the items: every W-th, so a batch's share has equally many questions of
    each optimizer update if an update's number of questions is a multiple of W (support/args.py).
    """
    return items[rank() :: world_size()]


def all_shares(own: list[T]) -> list[T]:
    """The inverse: what all ranks hold for their shares, in the order of the items."""
    shares = gather_objects(own)
    count = sum(len(share) for share in shares)
    return [shares[i % len(shares)][i // len(shares)] for i in range(count)]


# ---- the sharded model
def shard(model: Transformer, dtype: torch.dtype) -> Transformer:
    """In a process group: FSDP2 on `model`, each rank keeps its rows; computes in `dtype`.

    Each layer is a unit that is gathered and freed by itself. Embedding, final norm and head belong
    to the root: the head is used outside of a forward.
    """
    if not dist.is_initialized():
        return model
    mesh = dist.init_device_mesh(model.lm_head.weight.device.type, (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in (*model.layers, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        # Sums over the ranks, not means: the loss is divided by the questions of all ranks.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return model


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; of a sharded one all ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gather_once(model: Transformer, last: bool) -> None:
    """Before a question of an update; last: no other question of the update follows.

    In ONE process nothing is split, so that gathering and reducing for every question would only
    move memory: 97 bytes a parameter. Parameters stay gathered from the update's first question to
    its last, and gradients are reduced in the last backward pass. With several ranks that would
    cost 6 bytes a parameter on each: there every question gathers and reduces for itself.
    """
    if world_size() > 1:
        return
    for unit in fsdp_units(model):
        unit.set_requires_gradient_sync(last, recurse=False)
        unit.set_reshard_after_backward(last, recurse=False)
        unit.set_reshard_after_forward(last and unit is not model, recurse=False)


def fsdp_units(model: Transformer) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered_view(model: Transformer) -> Iterator[Transformer]:
    """The whole parameters as a plain Transformer, for passes without gradients; freed at the end.

    `model` itself where it is whole. All ranks must enter; inside they run independently.
    """
    units = fsdp_units(model)
    if not units:
        yield model
        return
    for unit in units:
        unit.unshard()
    yield assign(empty_model(model.config), tensors_of(model))
    for unit in units:
        unit.reshard()
