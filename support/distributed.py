"""More than one process: each rank's questions, sharded parameters, the gathered view.

torchrun starts W processes of the same program ("ranks"). Each rank holds 1/W of the fp32
parameters, gradients and AdamW moments (rows of every tensor, as DTensors), and the gathered view:
a plain Transformer with the whole parameters in the dtype of --dtype, which samples and trains.

    refresh            the sharded parameters -> the gathered view        once per update
    ...                sampling, scoring, backward on own questions       no communication
    reduce_gradients   the views' gradients, summed over the ranks        once per update
                       -> the gradients of the sharded parameters

FSDP2 (`fully_shard`) is not used: its hooks around every layer would run at every decoded token.
Memory per rank for P parameters: 16 P/W bytes of parameters, gradients and moments, 2 P for
the view in bf16 (4 P in fp32), 4 P for its fp32 gradient sums. One process in bf16 uses the same
functions: its fp32 parameters keep updates as small as 2e-6, which bf16 would round away.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from model import Transformer
from support.errors import InputError, TrainingError
from support.weights import assign, empty_model, load_model, read_config, read_tensors

T = TypeVar("T")
SIGN_SECONDS = 5


# ---- ranks
def launched() -> bool:
    """Whether torchrun started this process (other launchers also set RANK and WORLD_SIZE)."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def start(device: str, timeout: float = 600) -> None:
    """Joins the process group of all ranks; nothing to do for a process started alone.

    timeout: seconds that a rank waits for the others (lost_ranks_are_named).
    """
    if not launched():
        return
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            count = torch.cuda.device_count()
            raise InputError(f"--nproc-per-node is more than the {count} GPU(s) of this machine")
        torch.cuda.set_device(local)
    dist.init_process_group(
        store=rendezvous_store(),
        rank=rank(),
        world_size=world_size(),
        timeout=timedelta(seconds=timeout),
    )


def rendezvous_store() -> dist.Store:
    """The store in which the ranks find each other's addresses, with names of its own per start.

    torchrun's store outlives a restart (torch 2.13), and with it the addresses of processes that
    are gone; reading one would block for half an hour.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False":
        return store  # a new one at every start
    several_machines = int(os.environ["GROUP_WORLD_SIZE"]) > 1
    if several_machines and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0:
        # Every machine counts its own restarts, so they would not agree on a name.
        raise InputError(
            "--max-restarts on several machines: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 "
            "in the environment of torchrun"
        )
    return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def lost_ranks_are_named() -> Iterator[None]:
    """A rank that hangs or is dead makes the others fail: they say which one, in a line.

    Those that failed sign in torchrun's store. Who has not signed some seconds later is lost.
    """
    try:
        yield
    except (RuntimeError, dist.DistError) as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error)
        if not lost or not dist.is_initialized():
            raise
        store = dist.distributed_c10d._get_default_store()
        store.set(f"failed {rank()}", "")
        missing = set(range(world_size()))
        deadline = time.monotonic() + SIGN_SECONDS
        while missing and time.monotonic() < deadline:
            missing = {other for other in missing if not store.check([f"failed {other}"])}
            time.sleep(0.1)
        names = ", ".join(map(str, sorted(missing))) or "unknown"
        raise TrainingError(
            f"rank {rank()} waited in vain for rank {names}, which hangs or has ended; "
            "--resume continues from the newest checkpoint"
        ) from None


def restarted() -> bool:
    """Whether torchrun restarted this process. Machines count apart and may not agree."""
    return launched() and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"


def any_restarted() -> bool:
    """Whether torchrun restarted any rank: the run is to be continued. All ranks must call."""
    return any(gather_objects(restarted()))


def stop() -> None:
    """Ends this process of several, once everything is written.

    Without destructors: the process group's threads may still run when theirs are called, which has
    been seen to abort a run that had finished.
    """
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


# ---- communication of small things; all ranks must call
def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in the order of the ranks."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


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
def equal_parts(items: list[T], count: int) -> list[list[T]]:
    """`items` cut into `count` lists of equal length, in order."""
    size = len(items) // count
    return [items[i * size : (i + 1) * size] for i in range(count)]


def own_questions(batch: list[T], updates: int) -> list[T]:
    """This rank's questions of a batch: its share of every optimizer update's, in their order."""
    own = []
    for questions in equal_parts(batch, updates):
        own += equal_parts(questions, world_size())[rank()]
    return own


def in_batch_order(own: list[T], updates: int) -> list[T]:
    """The inverse: what all ranks hold for their own questions, in the order of the batch."""
    by_rank = [equal_parts(values, updates) for values in gather_objects(own)]
    ordered = []
    for update in range(updates):
        for parts in by_rank:
            ordered += parts[update]
    return ordered


def own_share(items: list[T]) -> list[T]:
    """This rank's part of items that need not divide evenly."""
    return items[rank() :: world_size()]


def all_shares(own: list[T]) -> list[T]:
    """The inverse: what all ranks hold for their shares, in the order of the items."""
    shares = gather_objects(own)
    count = sum(len(share) for share in shares)
    return [shares[i % len(shares)][i // len(shares)] for i in range(count)]


def mean_over_ranks(figures: dict[str, float], count: int) -> dict[str, float]:
    """The means over all ranks' items, from every rank's means over its own `count` items."""
    parts = [part for part in gather_objects((count, figures)) if part[0]]
    total = sum(count for count, _ in parts)
    names = parts[0][1]
    return {name: sum(count * means[name] for count, means in parts) / total for name in names}


# ---- sharded parameters
def load_sharded(path: str | Path, device: str) -> Transformer:
    """The fp32 model in directory `path`, its tensors split by rows over the ranks.

    Each rank reads its own rows and no others. A process started alone gets a plain model.
    """
    if not launched():
        return load_model(path, device=device)
    mesh = dist.init_device_mesh(device, (world_size(),))
    model = empty_model(read_config(path))
    state = read_tensors(path, model, torch.float32, device, partial(own_rows, mesh))
    for name, parameter in model.named_parameters():
        state[name] = DTensor.from_local(
            state[name],
            mesh,
            [Shard(0)],
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
    return assign(model, state)


def own_rows(mesh: DeviceMesh, rows: int) -> slice:
    """This rank's rows of a tensor, as torch.chunk splits: the last ranks may hold fewer."""
    size = -(-rows // mesh.size())
    first = min(rows, size * mesh.get_local_rank())
    return slice(first, min(rows, first + size))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; of a sharded one all ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_token_rows(model: Transformer, token: int, source: int) -> None:
    """Gives `token` the embedding and output row of `source`; the vocabulary grows if it must.

    This is how a new marker token starts: as a copy of eos (paper, section 4). Tied or untied
    heads, sharded or not.
    """
    tied = model.config.tie_word_embeddings
    for table in [model.embed_tokens] if tied else [model.embed_tokens, model.lm_head]:
        rows = whole(table.weight.detach())  # [V, H]
        missing = max(0, token + 1 - len(rows))
        grown = torch.cat([rows, rows[source].expand(missing, -1)])
        grown[token] = grown[source].clone()
        if isinstance(table.weight, DTensor):
            mesh = table.weight.device_mesh
            # src_data_rank None: all ranks hold the same rows, nothing is sent
            grown = distribute_tensor(grown, mesh, [Shard(0)], src_data_rank=None)
        table.weight = nn.Parameter(grown)
    if tied:
        model.lm_head.weight = model.embed_tokens.weight
    model.config.vocab_size = len(model.embed_tokens.weight)


# ---- the gathered view
def gathered_view(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The whole parameters in `dtype`, as a model that samples, scores and collects gradients.

    `model` itself where it is that already: one process in fp32.
    """
    if dtype == torch.float32 and not isinstance(model.lm_head.weight, DTensor):
        return model
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = whole(parameter.detach()).to(dtype, copy=True)
    view = assign(empty_model(model.config), state)
    for parameter in view.parameters():
        parameter.main_grad = None
        parameter.register_post_accumulate_grad_hook(add_to_main_grad)
    return view


def add_to_main_grad(parameter: Tensor) -> None:
    """Gradients of the questions add up in fp32: in bf16 the later ones would be rounded away."""
    if parameter.main_grad is None:
        parameter.main_grad = parameter.grad.float()
    else:
        parameter.main_grad.add_(parameter.grad)
    parameter.grad = None


@torch.no_grad()
def refresh(model: Transformer, view: Transformer) -> None:
    """After an update: the view takes the new parameters."""
    if view is not model:
        for parameter, low in zip(model.parameters(), view.parameters(), strict=True):
            low.copy_(whole(parameter.to(low.dtype)))


def reduce_gradients(model: Transformer, view: Transformer) -> None:
    """The views' gradients, summed over the ranks, become those of the fp32 parameters."""
    if view is model:
        return
    for parameter, low in zip(model.parameters(), view.parameters(), strict=True):
        gradient, low.main_grad = low.main_grad, None
        if isinstance(parameter, DTensor):
            if gradient is None:  # every rank takes part in the sum
                gradient = torch.zeros_like(low, dtype=torch.float32)
            mesh = parameter.device_mesh
            gradient = DTensor.from_local(gradient, mesh, [Partial()], run_check=False)
            gradient = gradient.redistribute(placements=[Shard(0)])
        parameter.grad = gradient
