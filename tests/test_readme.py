"""README.md shows the algorithm as it runs, and what `make train` prints."""

import inspect
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_train_question_in_readme_is_the_one_that_runs():
    source = inspect.getsource(train.train_question)
    body = source.split('"""')[-1].removeprefix("\n")  # after the docstring
    assert f"```python\n{textwrap.dedent(body)}```" in README


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
