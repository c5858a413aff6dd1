"""The house: imports run one way, in the order of reading, and every file can be read."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A module imports only those before it, and nothing imports train.
ORDER = """
    kernels.logprob_triton kernels.logprob model aggregate support.errors support.tokenizer data
    reward support.weights support.distributed support.args sample support.metrics evaluate
    support.run train preflight
""".split()
RUNTIME = {"torch", "numpy", "tokenizers", "safetensors", "triton", *sys.stdlib_module_names}


def imports(module: str) -> dict[str, bool]:
    """The modules that `module` imports -> whether at its top level, so that they are required."""
    tree = ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module not in ("support", "kernels"):
            found[node.module] = node in tree.body
        elif isinstance(node, ast.Import | ast.ImportFrom):
            parent = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found |= {f"{parent}{alias.name}": node in tree.body for alias in node.names}
    return found


def test_imports_run_one_way():
    for place, module in enumerate(ORDER):
        found = imports(module)
        own = {name for name in found if name in ORDER}
        assert own <= set(ORDER[:place]) - {"train"}, module
        required = {name.split(".")[0] for name, top in found.items() if top and name not in own}
        assert required <= RUNTIME | {"support"}, module
        if module.startswith(("model", "reward", "aggregate", "kernels")):
            assert not any(name.startswith("support") for name in own), module
        if module not in ("support.distributed", "support.run"):  # the others know no ranks
            assert not any(name.startswith("torch.distributed") for name in found), module


def test_nothing_that_is_loaded_is_a_pickle():
    for module in ORDER:
        text = (ROOT / (module.replace(".", "/") + ".py")).read_text()
        assert "import pickle" not in text and "torch.load" not in text, module


def test_lines_are_short():
    """100 characters at most. 56 on average: over a room; in a file, indentation not counted."""
    for room in ("", "kernels", "support", "tests", "bench", "examples"):
        together = []
        for file in (ROOT / room).glob("*.py"):
            lines = [line for line in file.read_text().splitlines() if line.strip()]
            assert all(len(line) <= 100 for line in lines), file
            assert sum(len(line.strip()) for line in lines) <= 56 * len(lines), file
            together += lines
        assert sum(map(len, together)) <= 56 * len(together), room


def test_the_commands_start_without_triton():
    """It is imported only when used: by the kernels, and with torch's compiler."""
    command = "import sys, evaluate, train; print('triton' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True)
    assert printed.stdout.strip() == b"False"
