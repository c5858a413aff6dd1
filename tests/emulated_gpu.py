"""Runs commands on a GPU. If there is none: on tensors that say they are on cuda:0, and are not.

    python tests/emulated_gpu.py "train.py --device cuda ..." "sample.py --device cuda ..."

An operation on tensors of both devices is refused, as by CUDA; an index on the CPU as well, which
CUDA would copy and wait for. FlashAttention is chosen as on a GPU (conftest.py); Triton's kernels
are not, as on one older than Ampere: they would read its memory.
"""

import runpy
import shlex
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.distributed as dist
from conftest import flash_attention_forward
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_param
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import model

aten = torch.ops.aten
# 16-bit matrices, fp32 product.
ONLY_ON_GPU = {
    aten.mm.dtype: lambda a, b, dtype: a.to(dtype) @ b.to(dtype),
    aten.mm.dtype_out: lambda a, b, dtype, out: out.copy_(a.to(dtype) @ b.to(dtype)),
    aten.addmm.dtype_out: lambda c, a, b, dtype, out: out.copy_(c + a.to(dtype) @ b.to(dtype)),
}
BETWEEN_DEVICES = {aten._to_copy.default, aten.copy_.default}


class OnGPU(Tensor):
    """For torch's C++ it is on a device of its own, which a CPU build knows; for Python on cuda:0.

    held: the same tensor on the CPU.
    """

    device = torch.device("cuda:0")
    is_cuda = True

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnGPU":
        made = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="emulated:0",
        )
        made.held = held
        return made

    def tolist(self) -> list:  # torch refuses it to every subclass
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class EmulatedGPU(TorchDispatchMode):
    """For operations without a tensor among their arguments, torch.zeros(..., device="cuda:0")."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class CurrentGPU(TorchFunctionMode):
    """For a build without CUDA, which cannot ask for the current GPU: "cuda" is cuda:0."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs = kwargs | {"device": "cuda:0"}
        return function(*args, **kwargs)


def compute(operation: Callable, args: tuple, kwargs: dict) -> object:
    """The operation on what its tensors hold. Its results are on the GPU as they would be."""
    if operation is aten._fused_sdp_choice.default:
        return 0  # attention by its definition: products, softmax
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    if any(isinstance(x, DTensor) for x in tensors):
        return operation(*args, **kwargs)  # comes back with the parts of this rank
    inside = [x for x in tensors if isinstance(x, OnGPU)]
    outside = [x for x in tensors if not isinstance(x, OnGPU) and x.dim() > 0]
    if inside and outside and operation not in BETWEEN_DEVICES:
        raise RuntimeError(f"{operation}: tensors on cuda:0 and on the CPU")

    def take(x: object) -> object:
        if isinstance(x, OnGPU):
            return x.held
        return torch.device("cpu") if names_gpu(x) else x

    run = ONLY_ON_GPU.get(operation, operation)
    out = run(*tree_map(take, args), **tree_map(take, kwargs))
    device = kwargs.get("device")
    on_gpu = bool(inside) if device is None else names_gpu(device)
    if operation is aten.copy_.default:
        on_gpu = isinstance(args[0], OnGPU)
    known = {id(x.held): x for x in inside}  # what is written in place is returned as it came

    def put(x: object) -> object:
        if not on_gpu or not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else OnGPU(x)

    return tree_map(put, out)


def names_gpu(x: object) -> bool:
    return isinstance(x, torch.device) and x.type in ("cuda", "emulated")


class Stream:
    """A stream or an event of a GPU that has computed all it was given."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def wait(self, *args) -> "Stream":
        return self

    wait_stream = wait_event = record = record_event = synchronize = wait


def emulate() -> None:
    """Puts the emulated GPU where torch asks for a GPU."""
    # Here: it imports Triton, which test_logprob.py has to import first, for its interpreter.
    from torch.nn.attention import bias

    # Before any backward pass: autograd counts the devices once.
    _setup_privateuseone_for_python_backend("emulated")
    torch.emulated.is_available = lambda: False  # or torch.distributed.checkpoint wants its streams
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) comes to EmulatedGPU
    torch.cuda._lazy_init = lambda: None
    torch.cuda.mem_get_info = lambda device: (10**9, 10**9)
    torch.cuda.get_device_capability = lambda device: (7, 5)
    # Attention
    model.can_use_flash_attention = lambda parameters: parameters.query.element_size() == 2
    aten._flash_attention_forward = flash_attention_forward
    bias.causal_lower_right = _disable_current_modes()(bias.causal_lower_right)
    # FSDP2 in one process
    start = dist.init_process_group
    dist.init_process_group = lambda _, **kwargs: start("cpu:gloo,cuda:gloo", **kwargs)
    torch.cuda.current_device = lambda: 0
    torch.cuda.Stream = torch.cuda.Event = torch.cuda.current_stream = Stream
    torch.cuda.stream = nullcontext
    _fsdp_param.alloc_storage = _fsdp_param.free_storage = lambda tensor: None  # it has no storage


def main() -> None:
    if torch.cuda.is_available():
        return run_commands(sys.argv[1:])
    emulate()
    with CurrentGPU(), EmulatedGPU():
        run_commands(sys.argv[1:])


def run_commands(commands: list[str]) -> None:
    for command in commands:
        sys.argv = shlex.split(command)
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
