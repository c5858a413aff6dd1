"""The Triton kernels, compiled for real GPUs on a machine without one.

Every configuration of kernels/logprob_triton.py is compiled for its architecture with the flags
that need the most registers (entropy, ragged V). The compiled code must fit the shared memory,
spill no register, and contain the instructions that make it fast. Two Tritons compile it: the
installed one, and the oldest one supported, 3.6.0, from .triton-3.6.0/ (filled by `make test`).
Each runs in its own process, without TRITON_INTERPRET. By hand, one JSON line per kernel:

    python tests/test_logprob_compile.py
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # of the process that compiles

OLDEST = ROOT / ".triton-3.6.0"

# Bytes of shared memory a program may use, by compute capability. A launch checks it, a
# compilation does not. The code for sm_80 stands for every GPU but Hopper: 99 KB is the least that
# one of them has (sm_86, sm_89, sm_120).
SHARED_LIMIT = {80: 101376, 90: 232448}

# Configuration, compute capability, dtype: each that `pick_config` can choose.
CASES = [
    ("OTHER", 80, "bf16"),
    ("FP32", 80, "fp32"),
    ("HOPPER", 90, "bf16"),
    ("HOPPER_FEW_ROWS", 90, "bf16"),
]
FLAGS = {"_dz_kernel": {}, "_partials_kernel": dict(ENTROPY=True, EVEN_V=False)}


# ---- the process that compiles
def compile_all() -> None:
    from kernels import logprob_triton

    for name, capability, dtype in CASES:
        for kernel, flags in FLAGS.items():
            config = getattr(logprob_triton, name)
            function = getattr(logprob_triton, kernel)
            compiled = compile_kernel(function, config, capability, dtype, flags)
            print(json.dumps(dict(case=[name, kernel]) | describe(compiled)), flush=True)


def compile_kernel(kernel, config, capability: int, dtype: str, flags: dict):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = dict(
        BM=config.bm,
        BN=config.bn,
        BK=config.bk,
        GROUP=config.group,
        PROGRAMS=132,
        TMA=config.tma,
        **flags,
    )
    types = dict(x_ptr="*" + dtype, w_ptr="*" + dtype, dz_ptr="*" + dtype, y_ptr="*i64")
    types |= dict(n="i32", vocab="i32", hidden_size="i32", scale="fp32")
    signature = {}
    divisible_by_16 = {}  # what a launch knows of its arguments; n and vocab are not specialized
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        signature[argument] = types.get(argument, "*fp32")
        if argument not in ("n", "vocab", "scale"):
            divisible_by_16[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=divisible_by_16),
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=True),
    )


def describe(compiled) -> dict:
    """Shared memory, registers and counts of instructions, from the disassembled code."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.check_output([tools / "cuobjdump", "-res-usage", file.name], text=True)
        code = subprocess.check_output([tools / "nvdisasm", "-c", file.name], text=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    row = dict(triton=triton.__version__, shared=compiled.metadata.shared)
    row |= dict(registers=int(registers), stack=int(stack))
    row["wide_stores"] = len(re.findall(r"\bSTG\.E\.128\b", code))
    for instruction in ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL", "ATOM", "RED"):
        row[instruction] = len(re.findall(rf"\b{instruction}\b", code))
    return row


# ---- the tests
@pytest.fixture(params=["installed", "3.6.0"])
def version(request) -> str:
    if request.param == "3.6.0" and not OLDEST.is_dir():
        command = "pip install --no-deps --target .triton-3.6.0 triton==3.6.0"
        reason = f"no .triton-3.6.0/ (make test installs it: {command})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return request.param


def test_every_kernel_fits_spills_nothing_and_uses_the_fast_instructions(version):
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if version != "installed":  # PYTHONPATH: of `make test-2.11`
        env["PYTHONPATH"] = os.pathsep.join([str(OLDEST), env.get("PYTHONPATH", "")])
    run = subprocess.run([sys.executable, __file__], env=env, stdout=subprocess.PIPE, text=True)
    rows = {tuple(row["case"]): row for row in map(json.loads, run.stdout.splitlines())}
    assert run.returncode == 0, f"failed to compile after {list(rows)[-1:]}"
    for name, capability, dtype in CASES:
        for kernel in FLAGS:
            row = rows[name, kernel]
            assert version in ("installed", row["triton"])
            assert faults(row, capability, dtype, kernel) == [], (name, kernel)


def faults(row: dict, capability: int, dtype: str, kernel: str) -> list[str]:
    """What a compiled kernel should be and is not."""
    tensor_cores = dtype != "fp32"  # a tensor-core product of fp32 would be TF32
    hopper = tensor_cores and capability == 90
    ampere = tensor_cores and capability == 80
    rules = {
        "fits the shared memory": row["shared"] <= SHARED_LIMIT[capability],
        "has no atomics, whose order could change": row["ATOM"] == row["RED"] == 0,
        "multiplies by WGMMA on Hopper alone": (row["HGMMA"] > 0) == hopper,
        "multiplies by MMA elsewhere": (row["HMMA"] > 0) == ampere,
        "loads by TMA alone on Hopper": not hopper or row["UTMALDG"] > 0 == row["LDGSTS"],
        "loads asynchronously elsewhere": not ampere or row["LDGSTS"] > 0,
        "stores dz 16 bytes at a time": kernel != "_dz_kernel" or row["wide_stores"] > 0,
        "spills no register": row["stack"] == row["LDL"] == row["STL"] == 0,
    }
    return [rule for rule, holds in rules.items() if not holds]


def test_every_configuration_of_the_table_is_compiled():
    from kernels import logprob_triton

    configs = vars(logprob_triton).items()
    table = {name for name, value in configs if isinstance(value, logprob_triton.Config)}
    assert table - {"INTERPRETER"} == {name for name, _, _ in CASES}


if __name__ == "__main__":
    compile_all()
