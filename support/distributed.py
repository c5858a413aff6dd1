"""More than one process, or bf16: FSDP2 shards the model; each rank has questions of its own.

torchrun starts W processes of the same program ("ranks"). Each holds 1/W of the rows of every fp32
parameter, gradient and AdamW moment (DTensors). Parameters are whole, in --dtype, only in

    passes without gradients        all of them, in the gathered view: a plain Transformer, so that
    (sampling, evaluation, ...)     no hook and no collective runs per decoded token; then freed
    a training forward, backward    a layer at a time; embedding and head from one to the other

    collective      of what                             when
    all-gather      all parameters, the gathered view   per sampling, scoring or evaluation
    all-gather      one layer's parameters              per training forward and backward
    reduce-scatter  one layer's gradients, fp32 sums    per training backward
    all-reduce      the gradient norm                   per update
    all-gather      figures for the log (objects)       per step

Hence all ranks run equally many training forwards and backwards: each has as many questions, K
traces each, and branches are cut into forwards by their number, not their length (reward.py).

Memory of a rank, P parameters, bf16: 16 P/W bytes; and either 2 P for the view, or two layers,
embedding, head and activations. Forwards that share one backward hold their bf16 gradients until
its end, up to 2 P more; with --micro-traces, or all branches in one forward, there are none. One
process in fp32 does without all this: a plain Transformer, no process group.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

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


def start(device: str, dtype: torch.dtype, timeout: float = 600) -> None:
    """Joins the process group of all ranks. A process started alone needs one in bf16 only.

    timeout: seconds that a rank waits for the others (lost_ranks_are_named).
    """
    if not launched():
        if dtype != torch.float32 and not dist.is_initialized():
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
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


def any_restarted() -> bool:
    """Whether torchrun restarted any rank, so that the run is to be continued. All ranks must call.

    Machines count their restarts apart and may not agree.
    """
    return any(gather_objects(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))


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
def load(path: str | Path, device: str, dtype: torch.dtype = torch.float32) -> Transformer:
    """The model in directory `path`. In a process group each rank reads its own rows alone."""
    if not dist.is_initialized():
        return load_model(path, dtype, device)
    mesh = dist.init_device_mesh(device, (world_size(),))
    model = empty_model(read_config(path))
    state = read_tensors(path, model, dtype, device, own_rows)
    for name, parameter in model.named_parameters():
        shape, stride = parameter.shape, parameter.stride()
        state[name] = DTensor.from_local(state[name], mesh, [Shard(0)], shape=shape, stride=stride)
    return assign(model, state)


def own_rows(rows: int) -> slice:
    """This rank's rows of a tensor, as torch.chunk splits: the last ranks may hold fewer."""
    size = -(-rows // world_size())
    first = min(rows, size * rank())
    return slice(first, min(rows, first + size))


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; of a sharded one all ranks must call."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def copy_token_rows(model: Transformer, token: int, source: int) -> None:
    """Gives `token` the embedding and output row of `source`; the vocabulary grows if it must.

    This is how a new marker token starts: as a copy of eos (paper, section 4). Tied or untied
    heads; a sharded model as `load` makes it, before `shard`.
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


def shard(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The model that trains: FSDP2 on the sharded parameters of `model`; computes in `dtype`.

    Each layer is a unit that is gathered and freed by itself. Embedding, final norm and head belong
    to the root: the head is used outside of a forward. A model without shards is returned as it is.
    """
    if not isinstance(model.lm_head.weight, DTensor):
        return model
    mesh = model.lm_head.weight.device_mesh
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    sharded = empty_model(model.config)
    for unit in (*sharded.layers, sharded):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
        # Sums over the ranks, not means: the loss is divided by the questions of all ranks.
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    return assign(sharded, dict(model.named_parameters()))


@contextmanager
def gathered_view(model: Transformer) -> Iterator[Transformer]:
    """The whole parameters as a plain Transformer, for passes without gradients; freed at the end.

    `model` itself where it is whole. All ranks must enter; inside they run independently.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    if not units:
        yield model
        return
    for unit in units:
        unit.unshard()
    view = {name: parameter.detach() for name, parameter in model.named_parameters()}
    yield assign(empty_model(model.config), view)
    for unit in units:
        unit.reshard()
