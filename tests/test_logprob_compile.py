"""The Triton kernels, compiled for real GPUs on a machine without one.

Every configuration of kernels/logprob_triton.py is compiled for its architecture with the flags
that need the most registers (entropy, ragged V). The compiled code must fit the shared memory,
spill no register, and contain the instructions that make it fast. Two Tritons compile it: the
installed one, and the oldest one supported, 3.6.0, from .triton-3.6.0/ (filled by `make test`).
Each runs in its own process, without TRITON_INTERPRET. `make check` compiles the kernels for every
dtype and all flags, and the configurations that `bench/logprob.py --variants` compares. By hand:

    python tests/test_logprob_compile.py                       # one JSON line per compiled kernel
    PYTHONPATH=.triton-3.6.0 python tests/test_logprob_compile.py
    python tests/test_logprob_compile.py all                   # those of `make check`
"""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from bench.logprob import VARIANTS  # noqa: E402

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
# name of the case: (configuration, compute capability, dtype, kernel, flags)
CASES = {}
HARDEST = dict(ENTROPY=True, EVEN_V=False)
EASIEST = dict(ENTROPY=False, EVEN_V=True)
for _config, _target in CONFIGS.items():
    CASES[f"{_config}-partials-entropy"] = (_config, *_target, "_partials_kernel", HARDEST)
    CASES[f"{_config}-dz"] = (_config, *_target, "_dz_kernel", dict())
CASES["HOPPER-partials"] = ("HOPPER", 90, "bf16", "_partials_kernel", EASIEST)

# All that `pick_config` can choose on the two architectures, and the variants of HOPPER.
CHOICES = {
    (80, "bf16"): ("AMPERE", "AMPERE_FEW_ROWS", "OTHER"),
    (80, "fp16"): ("AMPERE", "AMPERE_FEW_ROWS", "OTHER"),
    (80, "fp32"): ("FP32",),
    (90, "bf16"): ("HOPPER", "HOPPER_FEW_ROWS", *VARIANTS),
    (90, "fp16"): ("HOPPER", "HOPPER_FEW_ROWS"),
    (90, "fp32"): ("FP32",),
}
ALL_CASES = {}
for _target, _configs in CHOICES.items():
    for _config in _configs:
        _name = f"{_config}-sm_{_target[0]}-{_target[1]}"
        ALL_CASES[f"{_name}-dz"] = (_config, *_target, "_dz_kernel", dict())
        for _entropy, _even in itertools.product((False, True), repeat=2):
            _case = f"{_name}-partials{_entropy * '-entropy'}{_even * '-even'}"
            _flags = dict(ENTROPY=_entropy, EVEN_V=_even)
            ALL_CASES[_case] = (_config, *_target, "_partials_kernel", _flags)


# ---- the process that compiles


def compile_all(cases: dict) -> None:
    from kernels import logprob_triton

    for name, (config_name, capability, dtype, kernel_name, flags) in cases.items():
        if config_name in VARIANTS:
            config = replace(logprob_triton.HOPPER, **VARIANTS[config_name])
        else:
            config = getattr(logprob_triton, config_name)
        kernel = getattr(logprob_triton, kernel_name)
        compiled = compile_kernel(kernel, config, capability, dtype, flags)
        print(json.dumps(dict(name=name) | describe(compiled)), flush=True)


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
def compilers(which: str) -> dict[str, subprocess.Popen]:
    """One process per Triton; both compile at the same time. which: "all" or "" for CASES."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    inherited = [env["PYTHONPATH"]] if env.get("PYTHONPATH") else []  # of `make test-2.11`
    paths = {"installed": inherited}
    if OLDEST.is_dir():
        paths["3.6.0"] = [str(OLDEST), *inherited]
    processes = {}
    for version, path in paths.items():
        processes[version] = subprocess.Popen(
            [sys.executable, __file__, which],
            env=env | {"PYTHONPATH": os.pathsep.join(path)},
            stdout=subprocess.PIPE,
            text=True,
        )
    return processes


@functools.cache
def compiled_rows(version: str, which: str = "") -> dict[str, dict]:
    process = compilers(which)[version]
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


def check(row: dict, case: tuple) -> None:
    config, capability, dtype, kernel, _ = case
    assert row["shared"] <= SHARED_LIMIT[capability]
    if capability == 80:
        assert row["shared"] <= SMALLEST_SHARED_LIMIT
    if config not in VARIANTS:  # three of them spill some registers; their time shows the cost
        assert row["stack"] == row["LDL"] == row["STL"] == 0  # a spilled register is on the stack
    if config == "specialize":
        assert row["warps"] == 12  # four warps that load are added
    assert row["ATOM"] == row["RED"] == 0  # their order could change from run to run
    if dtype == "fp32":
        assert row["HMMA"] == row["HGMMA"] == 0  # a tensor-core product would be TF32
    elif capability == 90:
        assert row["HGMMA"] > 0 and row["UTMALDG"] > 0
        assert row["HMMA"] == row["LDGSTS"] == 0
    else:
        assert row["HMMA"] > 0 and row["LDGSTS"] > 0
    if kernel == "_dz_kernel":
        assert row["wide_stores"] > 0  # dz is stored 16 bytes at a time


@pytest.mark.parametrize("name", CASES)
def test_a_kernel_fits_spills_nothing_and_uses_the_fast_instructions(version, name):
    check(compiled_rows(version)[name], CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL_CASES)
def test_every_kernel_that_can_be_launched_compiles_as_well_and_the_variants_fit(version, name):
    check(compiled_rows(version, "all")[name], ALL_CASES[name])


if __name__ == "__main__":
    compile_all(ALL_CASES if "all" in sys.argv[1:] else CASES)
