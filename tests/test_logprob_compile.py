"""The Triton kernels, compiled for real GPUs on a machine without one.

Every configuration of kernels/logprob_triton.py is compiled for its architecture with the flags
that need the most registers (entropy, ragged V). The compiled code must fit the shared memory,
spill no register, and contain the instructions that make it fast. Two Tritons compile it: the
installed one, and the oldest one supported, 3.6.0, from .triton-3.6.0/ (filled by `make test`).
Each runs in its own process, without TRITON_INTERPRET. By hand:

    python tests/test_logprob_compile.py                       # one JSON line per compiled kernel
    PYTHONPATH=.triton-3.6.0 python tests/test_logprob_compile.py
"""

import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OLDEST = ROOT / ".triton-3.6.0"

# Bytes of shared memory a program may use, by compute capability. A launch checks it, a
# compilation does not.
SHARED_LIMIT = {80: 166912, 90: 232448}
SMALLEST_SHARED_LIMIT = 101376  # of all GPUs since Ampere (sm_86, sm_89, sm_120)

# configuration: (compute capability, dtype). The code for sm_80 stands for every GPU that the table
# does not name.
CONFIGS = {
    "HOPPER": (90, "bf16"),
    "HOPPER_FEW_ROWS": (90, "bf16"),
    "AMPERE": (80, "bf16"),
    "AMPERE_FEW_ROWS": (80, "fp16"),
    "OTHER": (80, "bf16"),
    "FP32": (80, "fp32"),
}
# name of the case: (configuration, kernel, flags)
CASES = {}
HARDEST = dict(ENTROPY=True, EVEN_V=False)
for _config in CONFIGS:
    CASES[f"{_config}-partials-entropy"] = (_config, "_partials_kernel", HARDEST)
    CASES[f"{_config}-dz"] = (_config, "_dz_kernel", dict())
CASES["HOPPER-partials"] = ("HOPPER", "_partials_kernel", dict(ENTROPY=False, EVEN_V=True))


# ---- the process that compiles


def compile_all() -> None:
    from kernels import logprob_triton

    for name, (config_name, kernel_name, flags) in CASES.items():
        capability, dtype = CONFIGS[config_name]
        config = getattr(logprob_triton, config_name)
        kernel = getattr(logprob_triton, kernel_name)
        compiled = compile_kernel(kernel, config, capability, dtype, flags)
        print(json.dumps(dict(name=name, capability=capability) | describe(compiled)), flush=True)


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
        FLATTEN=config.flatten,
        SPECIALIZE=config.specialize,
        UPCAST=False,
        **flags,
    )
    if flags.get("ENTROPY") is False:
        constants["t_ptr"] = None  # as `partials` passes it
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
    row = dict(triton=triton.__version__, warps=compiled.metadata.num_warps)
    row |= dict(shared=compiled.metadata.shared, registers=int(registers), stack=int(stack))
    row["wide_stores"] = len(re.findall(r"\bSTG\.E\.128\b", code))
    for instruction in ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL", "ATOM", "RED"):
        row[instruction] = len(re.findall(rf"\b{instruction}\b", code))
    return row


# ---- the tests


@functools.cache
def compilers() -> dict[str, subprocess.Popen]:
    """One process per Triton; both compile at the same time."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = {"installed": str(ROOT)}
    if OLDEST.is_dir():
        paths["3.6.0"] = os.pathsep.join([str(OLDEST), str(ROOT)])
    processes = {}
    for version, path in paths.items():
        processes[version] = subprocess.Popen(
            [sys.executable, __file__],
            env=env | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
    return processes


@functools.cache
def compiled_rows(version: str) -> dict[str, dict]:
    process = compilers()[version]
    out, _ = process.communicate()
    rows = [json.loads(line) for line in out.splitlines()]
    last = rows[-1]["name"] if rows else "none"
    assert process.returncode == 0, f"Triton {version} failed to compile the kernel after {last}"
    return {row["name"]: row for row in rows}


@pytest.fixture(params=["installed", "3.6.0"])
def version(request) -> str:
    if request.param == "3.6.0" and not OLDEST.is_dir():
        command = "pip install --no-deps --target .triton-3.6.0 triton==3.6.0"
        reason = f"no .triton-3.6.0/ (make test installs it: {command})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return request.param


def test_every_configuration_of_the_table_is_compiled(version):
    from kernels import logprob_triton

    table = {
        name
        for name, value in vars(logprob_triton).items()
        if isinstance(value, logprob_triton.Config)
    }
    assert table - {"INTERPRETER"} == set(CONFIGS)
    rows = compiled_rows(version)
    assert set(rows) == set(CASES)
    if version != "installed":
        assert all(row["triton"] == version for row in rows.values())


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_fits_spills_nothing_and_uses_the_fast_instructions(version, name):
    row = compiled_rows(version)[name]
    config, kernel, _ = CASES[name]
    assert row["shared"] <= SHARED_LIMIT[row["capability"]]
    if row["capability"] == 80:
        assert row["shared"] <= SMALLEST_SHARED_LIMIT
    assert row["stack"] == row["LDL"] == row["STL"] == 0  # a spilled register is on the stack
    assert row["ATOM"] == row["RED"] == 0  # their order could change from run to run
    if row["capability"] == 90:
        assert row["HGMMA"] > 0 and row["UTMALDG"] > 0
        assert row["HMMA"] == row["LDGSTS"] == 0
    elif config == "FP32":
        assert row["HMMA"] == 0  # a tensor-core product would be TF32
    else:
        assert row["HMMA"] > 0 and row["LDGSTS"] > 0
    if kernel == "_dz_kernel":
        assert row["wide_stores"] > 0  # dz is stored 16 bytes at a time


if __name__ == "__main__":
    compile_all()
