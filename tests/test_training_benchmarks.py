"""The benchmarks of whole trainings run: a tiny size on the CPU, so that they do not rot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gpt2core.flags import TRY_AGAIN

pytestmark = pytest.mark.slow

TINY = "--context_length 8 --num_layers 1 --embd_size 16 --num_heads 1 --device cpu --total_batch_size 64 --mini_batch_size 8"


def run(lab: Any, *words: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, of which several may be in one string."""
    done: subprocess.CompletedProcess[str] = lab.run_command([sys.executable, *" ".join(words).split()])
    return done


def test_the_optimizers_beside_each_other(lab: Any, tmp_path: Path) -> None:
    """In two calls, the first of which has no time: what the tables say is what the runs logged."""
    options = f"--folder {tmp_path} --steps 4 --seeds 1 --adamw_lrs 1e-3 3e-3 --muon_lrs 0.02 --muon_max_lrs 3e-3"
    flags = f"--at_once 2 --data_dir {lab.data_dir} {TINY} --warmup_steps 1 --eval_freq 1 --val_tokens 64"
    assert run(lab, "tests/benchmarks/optimizers.py", options, flags, "--seconds 0.01").returncode == TRY_AGAIN
    done = run(lab, "tests/benchmarks/optimizers.py", options, flags)
    assert done.returncode == 0, done.stderr
    finals = {
        name: lab.logged(tmp_path / f"{name}_seed1", "val_loss")[4]
        for name in ("adamw_0.001", "adamw_0.003", "muon_0.02_0.003_split")
    }
    tables = (tmp_path / "optimizers.md").read_text()
    assert tables in done.stdout
    for label, loss in zip(
        ("AdamW 0.001", "AdamW 0.003", "Muon 0.02 (AdamW 0.003, qkv split)"), finals.values(), strict=True
    ):
        assert f"| {label} | 1 | {loss:.4f} |" in tables
    best, muon = min(list(finals.values())[:2]), finals["muon_0.02_0.003_split"]
    assert f"| 1 | {best:.4f} | {muon:.4f} | 4 |" in tables
    reached = [
        step for step, loss in lab.logged(tmp_path / "muon_0.02_0.003_split_seed1", "val_loss").items() if loss <= best
    ]
    assert f"| 4 | {reached[0]} | {reached[0] / 4:.2f} |" in tables if reached else "| not reached |" in tables
    assert (tmp_path / "optimizers.png").stat().st_size > 10_000


def test_the_cost_of_an_update(lab: Any) -> None:
    done = run(lab, "tests/benchmarks/optimizer_step.py", "--tiny --rounds 1 --device cpu")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.endswith(" ms")]
    assert [" ".join(row[:-2]) for row in rows] == ["AdamW", "Muon", "Muon, qkv split", "PyTorch's Muon"]
    assert all(float(row[-2]) > 0 for row in rows)


def test_a_precision_beside_another(lab: Any, tmp_path: Path) -> None:
    options = f"--folder {tmp_path} --steps 3 --seeds 1 --ways bf16 fp8:tensorwise@2"
    flags = f"--data_dir {lab.data_dir} {TINY} --warmup_steps 1 --eval_freq 1 --val_tokens 64 --kernels plain"
    done = run(lab, "tests/benchmarks/precision.py", options, flags)
    assert done.returncode == 0, done.stderr
    bf16, fp8 = (lab.logged(tmp_path / f"{name}_seed1", "val_loss") for name in ("bf16", "fp8_tensorwise_to_2"))
    assert list(fp8) == [0, 1, 2], "it stops there"
    assert f"| bf16 | 1 | 3 | {bf16[3]:.4f} | +0.0000 |" in done.stdout
    assert f"| fp8, tensorwise | 1 | 2 | {fp8[2]:.4f} | {fp8[2] - bf16[2]:+.4f} |" in done.stdout
    assert (tmp_path / "precision.png").stat().st_size > 10_000


def test_ways_that_cannot_be_compared_are_refused_before_anything_is_trained(lab: Any, tmp_path: Path) -> None:
    flags = f"--folder {tmp_path} --steps 3 --data_dir {lab.data_dir} {TINY}"
    for ways, refusal in {"bf16@2 fp8": "must go to the end", "bf16 fp9": "precision"}.items():
        done = run(lab, "tests/benchmarks/precision.py", flags, f"--ways {ways}")
        assert done.returncode == 1 and refusal in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("*_seed1"))
    alone = run(lab, "tests/benchmarks/scaling.py --tiny --device cpu")
    assert alone.returncode == 1 and "start it with torchrun" in alone.stderr


def test_the_gradients_beside_those_of_fp32(lab: Any) -> None:
    done = run(
        lab,
        "tests/benchmarks/gradients.py",
        "--ways fp32 bf16 fp8 --after 0 2",
        f"--data_dir {lab.data_dir} {TINY} --kernels plain",
    )
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "%" in line]
    errors = {(way, int(step)): [float(cell.split("%")[0]) for cell in cells] for way, step, *cells in rows}
    assert list(errors) == [(way, step) for step in (0, 2) for way in ("fp32", "bf16", "fp8")]
    for (way, _), of_groups in errors.items():
        low, high = {"fp32": (0, 0.01), "bf16": (0.01, 3), "fp8": (1, 15)}[way]
        assert len(of_groups) == 9 and all(low <= error <= high for error in of_groups), (way, of_groups)


def test_one_rank_beside_two(lab: Any) -> None:
    torchrun = "-m torch.distributed.run --standalone --nproc_per_node=2"
    done = run(
        lab, torchrun, "tests/benchmarks/scaling.py --tiny --device cpu --rounds 1 --steps 1 --bucket_cap_mb 0 25"
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split(maxsplit=6) for line in done.stdout.splitlines()[-4:]]
    names = ["rank 0 alone", "rank 1 alone", "all 2, --bucket_cap_mb 0", "all 2, --bucket_cap_mb 25"]
    assert [row[6] for row in rows] == names
    assert rows[0][2] == "1.000" and "1.000" in (rows[0][4], rows[1][4])
    assert all(0 < float(row[3]) <= float(row[4]) and float(row[2]) <= float(row[4]) for row in rows)
