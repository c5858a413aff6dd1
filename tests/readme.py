"""Executes README.md in a fresh clone and compares what it prints: `make readme`, 25 minutes.

    python tests/readme.py           clones HEAD into a temporary folder
    python tests/readme.py FOLDER    in a folder that is a clone already

Its commands are the lines of ``` blocks that start with make or .venv/bin/ ("$ " before it or not),
and `...` in the text that starts with .venv/bin/python. They run in the order of the text. Every
other line of a block is expected in what the commands before it have printed; of a line that ends
with "...", what stands before the dots. A ```python block becomes my_file.py.

A command of the reader's own model and data runs on the embedded ones, for two steps (SUBSTITUTES).
lm_eval runs where it is installed already. Figures are those of one machine: on another CPU the
last digits may differ, and then the differing lines are what this program is for.
"""

import difflib
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PROGRAMS = ("make ", ".venv/bin/")
# What stands in README, and what makes it runnable without a model and data of one's own.
SUBSTITUTES = {
    "--model DIR ...": "--model DIR --data pairs.jsonl --out runs/two-ranks --steps 800",
    "--nproc-per-node 8": "--nproc-per-node 2",
    "--model DIR": "--model examples/hops/base",
    "--data pairs.jsonl": "--data examples/hops/train.jsonl",
    "-data held-out.jsonl": "-data examples/hops/test.jsonl",
    "--max-trace 2048": "--max-trace 48",
    "--questions 64": "--questions 4",
    "--steps 800": "--steps 2",
}


@dataclass
class Part:
    """A command, a line that commands should have printed, or a file to write."""

    kind: str  # "command", "output" or "file"
    text: str
    line: int  # of README


def read_parts(text: str) -> list[Part]:
    """The parts of README in its order."""
    parts = []
    # ``` language, block ```  or  `inline`
    pattern = r"^```(\w*)\n(.*?)^```$|`([^`\n]+)`"
    for match in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        language, block, inline = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        if inline:
            if inline.startswith(".venv/bin/python"):
                parts.append(Part("command", inline, line))
        elif language:
            parts.append(Part("file", block, line))
        else:
            parts += parts_of_block(block, line + 1)
    return parts


def parts_of_block(block: str, line: int) -> list[Part]:
    parts = []
    for text in block.replace("\\\n", "").splitlines():
        words = text.removeprefix("$ ")
        if words.startswith(PROGRAMS):
            command = re.sub(r"\s{2,}# .*", "", words)  # without its comment
            parts.append(Part("command", command.strip(), line))
        elif text.strip():
            parts.append(Part("output", text, line))
    return parts


def runnable(command: str) -> str:
    for ours, substitute in SUBSTITUTES.items():
        command = command.replace(ours, substitute)
    return command


def is_printed(expected: str, printed: str) -> bool:
    """Whether a line of README stands in the output, whatever its spaces."""
    wanted = " ".join(expected.removesuffix("...").split())
    return any(wanted in " ".join(line.split()) for line in printed.splitlines())


def nearest(expected: str, printed: str) -> str:
    """The printed line that is most like the expected one, for the report."""
    return "".join(difflib.get_close_matches(expected, printed.splitlines(), n=1, cutoff=0.3))


def run(command: str, folder: Path) -> tuple[int, str]:
    """-> exit code, output."""
    began = time.monotonic()
    print(f"$ {command}", flush=True)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(f"  exit code {done.returncode}, {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode:
        print(done.stdout[-2000:])
    return done.returncode, done.stdout


def main() -> None:
    if sys.argv[1:]:
        folder = Path(sys.argv[1])
    else:
        folder = Path(tempfile.mkdtemp(prefix="readme-"))
        subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    print(f"in {folder}")
    printed, faults = "", []
    for part in read_parts((folder / "README.md").read_text()):
        where = f"README.md:{part.line}"
        if part.kind == "file":
            (folder / "my_file.py").write_text(part.text)
        elif part.kind == "output":
            if not is_printed(part.text, printed):
                near = nearest(part.text, printed)
                faults.append(f"{where}: not printed: {part.text}\n  but: {near}")
        elif "lm_eval" in part.text and not (folder / ".venv/bin/lm_eval").exists():
            print(f"left out, lm_eval is not installed: {part.text}")
        else:
            code, output = run(runnable(part.text), folder)
            printed += output
            if code:
                faults.append(f"{where}: exit code {code}: {part.text}")
    print("\n".join(faults) or "README.md does what it says")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
