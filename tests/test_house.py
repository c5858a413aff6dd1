"""The house: imports run one way, in the order of the data, and files stay readable."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Which module may import which, in the order of reading. Nothing imports train.py; model.py,
# reward.py, aggregate.py and kernels/ take nothing from support/.
MAY_IMPORT = {
    "model": "",
    "kernels.logprob_triton": "",
    "kernels.logprob": "kernels.logprob_triton",
    "aggregate": "",
    "support.errors": "",
    "support.files": "support.errors",
    "support.weights": "model support.errors support.files",
    "support.distributed": "model support.errors support.weights",
    "support.chat": "support.errors support.files",
    "support.tokenizer": "support.errors support.files",
    "data": "support.chat support.errors support.files support.tokenizer",
    "support.command": "data model support.errors support.weights",
    "sample": "data kernels.logprob model support.command support.errors",
    "reward": "kernels.logprob model sample",
    "preflight": "aggregate data model reward sample",
    "evaluate": "data model preflight reward sample support.command support.distributed "
    "support.errors",
    "support.args": "aggregate model support.distributed support.errors support.files "
    "support.weights",
    "support.run": "data model support.args support.distributed support.errors "
    "support.files support.weights",
    "support.collapse": "support.errors",
    "support.metrics": "aggregate data reward sample support.collapse support.distributed "
    "support.errors support.files",
    "train": "aggregate data evaluate model reward sample support.args support.run "
    "support.distributed support.errors support.metrics support.weights",
}
# Imports of installed packages, by module; every module may use the standard library.
PACKAGES = {
    "model": "torch",
    "data": "numpy tokenizers",
    "support.tokenizer": "tokenizers",
    "support.weights": "safetensors torch",
    "support.run": "safetensors torch",
    "support.metrics": "torch",
    "kernels.logprob_triton": "torch triton",
}
# The only modules that know ranks, process groups and DTensors.
OF_RANKS = ("support.distributed", "support.run")


def file_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def imports(module: str) -> set[str]:
    """Names of all modules that `module` imports anywhere; of a package: its submodules."""
    found = set()
    for node in ast.walk(ast.parse(file_of(module).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            if node.module in ("support", "kernels"):
                found.remove(node.module)
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_the_table_names_every_module():
    files = [*ROOT.glob("*.py"), *ROOT.glob("support/*.py"), *ROOT.glob("kernels/*.py")]
    modules = {str(file.relative_to(ROOT))[:-3].replace("/", ".") for file in files}
    assert modules - {"support.__init__", "kernels.__init__"} == set(MAY_IMPORT)


@pytest.mark.parametrize("module", MAY_IMPORT)
def test_a_module_imports_only_what_the_table_allows(module):
    own = {name for name in imports(module) if name in MAY_IMPORT}
    assert own <= set(MAY_IMPORT[module].split())


@pytest.mark.parametrize("module", PACKAGES)
def test_a_module_imports_only_the_packages_it_names(module):
    top = {name.split(".")[0] for name in imports(module)}
    packages = top & {"torch", "numpy", "tokenizers", "safetensors", "triton"}
    assert packages == set(PACKAGES[module].split())


def test_the_table_has_no_circle():
    order = TopologicalSorter({module: names.split() for module, names in MAY_IMPORT.items()})
    assert list(order.static_order())[-1] == "train"


def test_only_the_distributed_files_know_of_ranks_and_sharded_tensors():
    for module in set(MAY_IMPORT) - set(OF_RANKS):
        assert not any(name.startswith("torch.distributed") for name in imports(module)), module


def test_the_commands_start_without_triton():
    """It is imported only when used: by the kernels, and with torch's compiler."""
    command = "import sys, evaluate, train; print('triton' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True)
    assert printed.stdout.strip() == b"False"
