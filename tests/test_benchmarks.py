"""The benchmarks run: a tiny size on the CPU, so that they do not rot."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from conftest import DEADLINE_S, REPOSITORY


def run(benchmark: str, *flags: str) -> str:
    command = [sys.executable, f"tests/benchmarks/{benchmark}.py", "--device", "cpu", "--rounds", "1", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_training_step_beside_its_peers() -> None:
    lines = run("train_step", "--tiny", "--steps", "1", "--precision", "fp8:rowwise", "--profile").splitlines()
    rows = {line.split()[0]: line.split() for line in lines if line.endswith(tuple("0123456789"))}
    names = ("ours", "fp8:rowwise", "plain", "transformers")
    assert "fp8:rowwise: " in "\n".join(lines) and any(line.endswith("ms  all else") for line in lines)
    for row in (rows[name] for name in names):
        assert float(row[1].replace(",", "")) > 0 and float(row[-1]) == pytest.approx(10.8, abs=0.5)  # near ln(50304)


@pytest.mark.slow
def test_hellaswag_beside_one_example_at_a_time() -> None:
    *_, last = run("hellaswag", "--size", "tiny", "--examples", "8", "--beside", "4").splitlines()
    assert float(last.removeprefix("ratio ")) > 0


@pytest.mark.soak
def test_what_watching_costs() -> None:
    out = run("monitoring", "--tiny", "--steps", "2")
    shares = re.findall(r"^ *-?[\d.]+%  (each step|\d+ ms of|\d+ ms for a checkpoint|together)", out, re.MULTILINE)
    assert len(shares) == 6, out


def test_the_kernels_of_fp8() -> None:
    rounding, products = run("fp8_kernels", "--size", "tiny").split("\n\n")
    rates = [line.split()[-1] for part in (rounding, products) for line in part.strip().splitlines()[1:]]
    assert len(rates) == 7 + 15 and all(float(rate) >= 0 for rate in rates)
