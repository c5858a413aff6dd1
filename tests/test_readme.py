"""README.md shows the algorithm as it runs, and what `make train` prints; commands are accepted."""

import inspect
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import train
from support.args import check_args, parse_args

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_train_question_in_readme_is_the_one_that_runs():
    source = inspect.getsource(train.train_question)
    body = source.split('"""')[-1].removeprefix("\n")  # after the docstring
    assert f"```python\n{textwrap.dedent(body)}```" in README


SCRIPTS = [path.relative_to(ROOT) for path in sorted(ROOT.glob("examples/*.sh"))]


@pytest.mark.parametrize("document", ["README.md", "examples/README.md", *map(str, SCRIPTS)])
def test_train_commands_are_accepted(document, tmp_path, monkeypatch):
    """A shell runs what the document shows, with a Python that prints its arguments. The questions
    divide among as many processes as torchrun is told to start."""
    text = (ROOT / document).read_text()
    if document.endswith(".md"):
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        text = "\n".join(block for block in blocks if ".venv/bin/python train.py" in block)
    script = tmp_path / "examples" / "script.sh"  # a script goes to the folder above its own
    for file, content in (
        ("python", 'printf "%s\\t" "$@"; echo'),
        ("torchrun", '"${0%/*}/python" "$@"'),
    ):
        stub = tmp_path / ".venv" / "bin" / file
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f"#!/bin/bash\n{content}\n")
        stub.chmod(0o755)
    script.parent.mkdir()
    script.write_text(text)
    asked = {"MODEL": "DIR", "DATA": "rows", "OUT": "out", "HEAD": "host"}
    run = {"cwd": tmp_path, "env": os.environ | asked, "capture_output": True, "text": True}
    printed = subprocess.run(["bash", "-eu", script], **run)
    assert printed.returncode == 0, printed.stderr
    commands = re.findall(r"^(.*\t)?train\.py\t(.*)\t$", printed.stdout, re.MULTILINE)
    assert commands
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    for launcher, command in commands:
        processes = map(int, re.findall(r"--n(?:nodes|proc-per-node)\t(\d+)", launcher))
        monkeypatch.setenv("WORLD_SIZE", str(math.prod(processes)))
        check_args(parse_args([word for word in command.split("\t") if word != "..."], ""))


@pytest.mark.slow
def test_make_train_prints_the_three_result_lines_of_readme(tmp_path):
    copy = tmp_path / "copy"  # it overwrites the runs of an earlier `make train`
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs"))
    (copy / ".venv").symlink_to((ROOT / ".venv").resolve())
    command = ["make", "--no-print-directory", "--assume-old=.venv/ready", "train"]
    printed = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    results = [" ".join(line.split()) for line in printed.stdout.splitlines()[-3:]]
    shown = [" ".join(line.split()) for line in README.splitlines()]
    assert set(results) <= set(shown), results


@pytest.mark.slow
def test_one_step_prints_what_its_readme_shows_and_the_estimator_approaches_the_gradient_of_J():
    command = [sys.executable, "examples/one_step.py"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    shown = (ROOT / "examples/README.md").read_text()
    number = r"-?\d+\.\d+"  # its last digit is another machine's
    assert re.sub(number, "", printed) in re.sub(number, "", shown)
    *_, total = re.findall(r"probability ([\d.]+)", printed)
    assert float(total) == pytest.approx(1, abs=1e-5)
    shares = [float(share) for share in re.findall(r"along it ([\d.]+)", printed)]
    apart = [float(distance) for distance in re.findall(r"distance ([\d.]+)", printed)]
    assert shares[-1] == pytest.approx(1, abs=0.02) and apart == sorted(apart, reverse=True)
