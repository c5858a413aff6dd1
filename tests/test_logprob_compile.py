"""The Triton kernels compiled for real GPUs without one: they fit, nothing spills, and the instructions that make them fast are there.

Every configuration in the table of kernels/logprob_triton.py is compiled for its architecture with the flags that need most registers
(entropy, kept exponentials, ragged V), by the installed Triton and by the oldest one supported, 3.6.0, from the side folder that
`make test` fills. Each Triton compiles in a process of its own, which never sees TRITON_INTERPRET. The same process by hand:

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
SHARED_LIMIT = {80: 166912, 90: 232448}  # bytes one program may use; what a launch checks and a compilation does not
EVERY_GPU = 101376  # the smallest limit since Ampere (sm_86, sm_89, sm_120)

ENTROPY = [("_partials_kernel", dict(ENTROPY=True, EVEN_V=False)), ("_dz_kernel", dict(ENTROPY=True))]
KEEP_EXP = [("_partials_kernel", dict(KEEP_EXP=True, EVEN_V=False))]
USUAL = [("_partials_kernel", dict()), ("_dz_kernel", dict())]
CASES = {  # configuration of the table -> architecture, dtype, what to compile
    "HOPPER": (90, "bf16", ENTROPY + KEEP_EXP + USUAL),
    "HOPPER_FEW_ROWS": (90, "bf16", ENTROPY),
    "AMPERE": (80, "bf16", ENTROPY + KEEP_EXP),
    "AMPERE_FEW_ROWS": (80, "fp16", ENTROPY),
    "OTHER": (80, "bf16", ENTROPY),  # sm_80 code stands for every GPU that the table does not name
    "FP32": (80, "fp32", ENTROPY),
}
NAMES = [f"{config}-{kernel}-{'+'.join(k for k, v in flags.items() if v) or '-'.join(flags) or 'usual'}"
         for config, (_, _, kernels) in CASES.items() for kernel, flags in kernels] + ["finish-_finish_rows_kernel-usual"]  # fmt: skip


# ---- in the process that compiles ------------------------------------------------------------------------------------------------


def compile_all() -> None:
    import triton

    from kernels import logprob_triton as module

    names = iter(NAMES)
    for config_name, (capability, dtype, kernels) in CASES.items():
        config = getattr(module, config_name)
        for kernel, flags in kernels:
            constants = dict(
                BM=config.bm, BN=config.bn, BK=config.bk, GROUP=config.group, PROGRAMS=132, TMA=config.tma, FLATTEN=config.flatten,
                SPECIALIZE=config.specialize, UPCAST=False, EVEN_V=True, ENTROPY=False, KEEP_EXP=False,
            )  # fmt: skip
            report(next(names), triton, getattr(module, kernel), capability, dtype, constants | flags, config.warps, config.stages)
    report(next(names), triton, module._finish_rows_kernel, 90, "bf16", dict(BN=256, TILES=8), 8, 3)


def report(name, triton, kernel, capability, dtype, constants, warps, stages) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    if not constants.get("ENTROPY", True):  # the launcher passes None for what is not wanted
        constants |= {k: None for k in ("t_ptr", "b_ptr") if k in kernel.arg_names}
    if not constants.get("KEEP_EXP", True):
        constants["e_ptr"] = None
    types = {"x_ptr": "*" + dtype, "w_ptr": "*" + dtype, "e_ptr": "*" + dtype, "dz_ptr": "*" + dtype, "y_ptr": "*i64", "scale": "fp32"}
    signature = {a: "constexpr" if a in constants else types.get(a, "*fp32" if a.endswith("_ptr") else "i32") for a in kernel.arg_names}
    ragged = {"n", "vocab", "scale"}
    aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if a not in constants and a not in ragged}
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options=dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True),
    )
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        usage = subprocess.run([tools / "cuobjdump", "-res-usage", f.name], capture_output=True, text=True, check=True).stdout
        code = subprocess.run([tools / "nvdisasm", "-c", f.name], capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()
    count = {op: len(re.findall(rf"\b{op}\b", code)) for op in ("HGMMA", "HMMA", "UTMALDG", "LDGSTS", "LDL", "STL", "ATOM", "RED")}
    wide_stores = len(re.findall(r"\bSTG\.E\.128\b", code))
    print(
        json.dumps(
            dict(name=name, triton=triton.__version__, capability=capability, shared=compiled.metadata.shared, stack=int(stack),
                 warps=compiled.metadata.num_warps, registers=int(registers), wide_stores=wide_stores, **count)
        ),
        flush=True,
    )  # fmt: skip


# ---- the tests -----------------------------------------------------------------------------------------------------------------------


@functools.cache
def compilers() -> dict[str, subprocess.Popen]:
    """Both Tritons at work at the same time."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    processes = {}
    for version, folder in {"installed": None, "3.6.0": OLDEST}.items():
        if folder is None or folder.is_dir():
            path = os.pathsep.join(str(p) for p in (folder, ROOT) if p)
            command = [sys.executable, __file__]
            processes[version] = subprocess.Popen(command, env=env | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    return processes


@functools.cache
def compiled(version: str) -> dict[str, dict]:
    out, _ = compilers()[version].communicate()
    assert compilers()[version].returncode == 0, f"Triton {version} failed to compile the kernel after {out.splitlines()[-1:]}"
    return {row["name"]: row for row in map(json.loads, out.splitlines())}


@pytest.fixture(params=["installed", "3.6.0"])
def version(request) -> str:
    if request.param == "3.6.0" and not OLDEST.is_dir():
        reason = "no .triton-3.6.0/ (make test installs it: pip install --no-deps --target .triton-3.6.0 triton==3.6.0)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return request.param


def test_every_configuration_of_the_table_is_compiled_here(version):
    import kernels.logprob_triton as module

    table = {name for name, value in vars(module).items() if isinstance(value, module.Config)}
    assert table - {"INTERPRETER"} == set(CASES)
    assert set(compiled(version)) == set(NAMES)
    if version != "installed":
        assert all(row["triton"] == version for row in compiled(version).values())


@pytest.mark.parametrize("name", NAMES)
def test_kernel_fits_spills_nothing_and_uses_the_fast_instructions(version, name):
    row = compiled(version)[name]
    config = name.split("-")[0]
    assert row["shared"] <= SHARED_LIMIT[row["capability"]]
    if config in ("AMPERE", "AMPERE_FEW_ROWS", "OTHER", "FP32"):
        assert row["shared"] <= EVERY_GPU
    assert row["stack"] == row["LDL"] == row["STL"] == 0  # a spilled register shows as stack
    assert row["ATOM"] == row["RED"] == 0  # nothing whose order could change from run to run
    if config.startswith("HOPPER"):
        assert row["HGMMA"] > 0 and row["UTMALDG"] > 0 and row["HMMA"] == row["LDGSTS"] == 0
    if config in ("AMPERE", "AMPERE_FEW_ROWS", "OTHER"):
        assert row["HMMA"] > 0 and row["LDGSTS"] > 0
    if "_dz_kernel" in name or "KEEP_EXP" in name or config == "finish":
        assert row["wide_stores"] > 0  # dz leaves in 16-byte stores
    if config == "FP32":
        assert row["HMMA"] == 0  # TF32 would show as a tensor-core product


if __name__ == "__main__":
    compile_all()
