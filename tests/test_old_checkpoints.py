"""Checkpoints written by earlier versions: each still loads, and training goes on from it as it did then.

tests/fixtures/checkpoint_v1.pt is rolling_step_000004 of a run of 8 steps, of the smallest model with GPT-2's vocabulary.
To add one of a later format: raise VERSION, run `python tests/test_old_checkpoints.py` and keep the older ones.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2core.checkpoint import load
from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.train import main as train

FIXTURES = Path(__file__).parent / "fixtures"
VERSION = 1
SETTINGS = {
    "run_name": "old",
    "context_length": 8,
    "num_layers": 1,
    "embd_size": 2,
    "num_heads": 1,
    "total_batch_size": 64,
    "mini_batch_size": 4,
    "num_epochs": 1,
    "steps_per_epoch": 8,
    "warmup_steps": 2,
    "max_lr": 0.01,
    "min_lr": 0.001,
    "eval_freq": 0,
    "checkpoint_freq": 4,
    "hellaswag_freq": 0,
    "sample_freq": 0,
    "histogram_freq": 0,
    "val_tokens": 64,
    "device": "cpu",
}


def write_data(folder: Path) -> Path:
    """Shards whose tokens need no generator that might change."""
    folder.mkdir(parents=True)
    for name, start in (("edufineweb_val_000000.npy", 1), ("edufineweb_train_000001.npy", 2)):
        tokens = (np.arange(start, start + 1025, dtype=np.int64) ** 2 * 7919) % 50257
        np.save(folder / name, tokens.astype(np.uint16))
    return folder


def flags(folder: Path, *more: str) -> list[str]:
    settings = {"data_dir": folder / "data", "artifacts_dir": folder} | SETTINGS
    return [*(word for name, value in settings.items() for word in (f"--{name}", str(value))), *more]


def losses(folder: Path) -> dict[int, float]:
    lines = map(json.loads, (folder / "old" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


@pytest.mark.parametrize("version", range(1, VERSION + 1))
def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(version: int, tmp_path: Path, train_here: Any) -> None:
    write_data(tmp_path / "data")
    checkpoints = tmp_path / "old" / "checkpoints"
    checkpoints.mkdir(parents=True)
    for ending in ("pt", "json"):
        shutil.copy(FIXTURES / f"checkpoint_v{version}.{ending}", checkpoints / f"latest.{ending}")
    found = CheckpointFolder(checkpoints).find("latest")
    assert found and load(found.location, found.sidecar)["step"] == found.sidecar.step == 4
    train_here(flags(tmp_path, "--resume", "latest"))
    expected = json.loads((FIXTURES / f"checkpoint_v{version}_losses.json").read_text())
    # fp32 sums in another order, as on another CPU, move these losses by some 1e-7 of them; lost moments move them by over 1e-5
    assert losses(tmp_path) == pytest.approx({int(step): loss for step, loss in expected.items()}, rel=1e-6)
    assert CheckpointFolder(checkpoints).find("epoch_00001")


def write_fixture() -> None:
    """The checkpoint after step 4, and the losses of the steps after it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder / "data")
        train(flags(folder))
        for ending in ("pt", "json"):
            shutil.copy(
                folder / f"old/checkpoints/rolling_step_000004.{ending}", FIXTURES / f"checkpoint_v{VERSION}.{ending}"
            )
        after = {step: loss for step, loss in losses(folder).items() if step > 4}
        (FIXTURES / f"checkpoint_v{VERSION}_losses.json").write_text(json.dumps(after, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(write_fixture())
