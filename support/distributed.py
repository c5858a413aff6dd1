"""More than one process: weights split over the ranks, and the whole copy that computes.

torchrun starts W processes of the same program ("ranks"). Each holds 1/W of the fp32 weights and of AdamW's moments (the rows of every
tensor, as DTensors, what FSDP2 is made of), and a whole copy to compute with, in the dtype of --dtype:

    gather      all ranks' rows -> the whole copy             once per update; half the traffic in bf16
    ...         sampling, scoring, backward on own questions  a plain Transformer: no hooks, no communication, nobody waits for anybody
    reduce      the copies' gradients, summed -> fp32 rows    once per update

FSDP2's own `fully_shard` does the same with hooks around every layer's forward, which would then run at every decoded token and find
nothing to do. Memory per rank, P parameters: 16 P/W bytes of weights, gradients and moments, the copy's 2 P in bf16 (4 P in fp32), its
fp32 gradient sums 4 P. The same two functions serve one process in bf16, whose copy keeps it from losing its training: with 8 bits,
1 + 2e-6 is 1.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard

from model import Transformer
from support.errors import InputError
from support.weights import assign, whole


# ---------------------------------------------------------------------------------------------------------------- ranks
def launched() -> bool:
    """Whether torchrun started this process (others set RANK and WORLD_SIZE, too, and mean something else)."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    return int(os.environ["RANK"]) if launched() else 0


def world_size() -> int:
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def restarted() -> bool:
    """Whether torchrun has started this process again. Machines count for themselves: one may say yes while another says no."""
    return launched() and os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"


def start(device: str) -> DeviceMesh | None:
    """Joins the processes that torchrun has started -> the mesh of them all; None for a process that was started alone."""
    if not launched():
        return None
    if device == "cuda":
        local = int(os.environ["LOCAL_RANK"])
        if local >= torch.cuda.device_count():
            raise InputError(
                f"--nproc-per-node is more than the {torch.cuda.device_count()} GPU(s) of this machine"
            )
        torch.cuda.set_device(local)
    dist.init_process_group(store=meeting_place(), rank=rank(), world_size=world_size())
    return dist.init_device_mesh(device, (world_size(),))


def meeting_place() -> dist.Store:
    """Where the processes find each other's addresses. The store that torchrun offers outlives a restart, and with it the addresses of
    processes that are gone (torch 2.13): whoever reads one waits for it half an hour. So every start has its own names in it."""
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ["TORCHELASTIC_USE_AGENT_STORE"] == "False":
        return store  # a new one at every start
    if int(os.environ["GROUP_WORLD_SIZE"]) > 1 and int(os.environ["TORCHELASTIC_MAX_RESTARTS"]) > 0:
        # every machine counts its own restarts, so that they would not agree on a name
        raise InputError(
            "--max-restarts on several machines: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment of torchrun"
        )
    return dist.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)


def stop() -> None:
    """Ends a process of several, once all is written. At once: the process group's threads may still run when their destructors are called,
    which has been seen to abort a run that had finished."""
    if dist.is_initialized():
        dist.barrier()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def from_all(value: object) -> list:
    """What every rank holds, in the order of the ranks; all of them must call."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def own_share(count: int) -> slice:
    """This rank's part of `count` things that divide evenly."""
    each = count // world_size()
    return slice(rank() * each, (rank() + 1) * each)


# ---------------------------------------------------------------------------------------------------------------- weights
def compute_copy(model: Transformer, dtype: torch.dtype) -> Transformer:
    """The whole weights in `dtype`: what samples, scores and collects gradients. `model` itself if it is just that."""
    if dtype == torch.float32 and not isinstance(model.lm_head.weight, DTensor):
        return model
    with torch.device("meta"):
        policy = Transformer(model.config)
    policy = assign(
        policy,
        {name: whole(p.detach()).to(dtype, copy=True) for name, p in model.named_parameters()},
    )
    for low in policy.parameters():
        low.main_grad = None
        low.register_post_accumulate_grad_hook(add_to_main_grad)
    return policy


def add_to_main_grad(low: Tensor) -> None:
    """Gradients add up in fp32: 64 questions' worth do not add up in 8 bits."""
    low.main_grad = low.grad.float() if low.main_grad is None else low.main_grad.add_(low.grad)
    low.grad = None


@torch.no_grad()
def gather(model: Transformer, policy: Transformer) -> None:
    """After an update: the copy takes the new weights."""
    if policy is not model:
        for full, low in zip(model.parameters(), policy.parameters(), strict=True):
            low.copy_(whole(full.to(low.dtype)))


def reduce_gradients(model: Transformer, policy: Transformer) -> None:
    """The copies' gradients, summed over the ranks, become the .grad of the fp32 weights. The copies' are empty afterwards."""
    if policy is model:
        return
    for full, low in zip(model.parameters(), policy.parameters(), strict=True):
        grad, low.main_grad = low.main_grad, None
        if isinstance(full, DTensor):
            grad = (
                torch.zeros_like(low, dtype=torch.float32) if grad is None else grad
            )  # every rank takes part in the sum
            grad = DTensor.from_local(
                grad, full.device_mesh, [Partial()], run_check=False
            ).redistribute(placements=[Shard(0)])
        full.grad = grad
