"""examples/one_step.py prints what examples/README.md shows, and its estimator is the gradient."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_it_prints_what_its_readme_shows_and_the_estimator_approaches_the_gradient_of_J():
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
