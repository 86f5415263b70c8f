"""The benchmarks run: a tiny size on the CPU, so that they do not rot."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import DEADLINE_S, REPOSITORY


@pytest.mark.slow
def test_the_training_step_beside_its_peers() -> None:
    command = [
        sys.executable,
        "tests/benchmarks/train_step.py",
        "--tiny",
        "--device",
        "cpu",
        "--rounds",
        "1",
        "--steps",
        "1",
    ]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.endswith(tuple("0123456789"))}
    assert {"ours", "plain", "transformers"} <= rows.keys()
    for row in (rows[name] for name in ("ours", "plain", "transformers")):
        assert float(row[1].replace(",", "")) > 0 and float(row[-1]) == pytest.approx(10.8, abs=0.5)  # near ln(50304)


@pytest.mark.slow
def test_what_watching_costs() -> None:
    command = [sys.executable, "tests/benchmarks/monitoring.py", "--tiny", "--device", "cpu", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--steps", "2"], cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S
    )
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^ *-?[\d.]+%  (?:each step|\d+ ms of|together)", done.stdout, re.MULTILINE)) == 4, (
        done.stdout
    )
