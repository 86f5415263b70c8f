"""A commit killed at any of its steps: what is found afterwards is whole, and no older than the checkpoint before."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2core.checkpoint import load, load_newest, save
from gpt2core.checkpoint_folder import FORMAT, CheckpointFolder

SCENARIOS: dict[str, tuple[int, float, list[str], int]] = {  # step, weight, names, keep
    "next step": (4, 4.0, [], 2),
    "end of an epoch, best so far": (4, 4.0, ["epoch_00002", "best_model"], 2),
    "the same step again": (3, 3.5, ["epoch_00001"], 3),
    "an earlier step again": (2, 2.5, ["best_model"], 10),
}

# Commits in children, of which the Nth is killed right before its Nth call that changes a folder, until one survives.
KILLER = """
import os, signal, subprocess, sys
import torch
from gpt2core.checkpoint import save
from gpt2core.checkpoint_folder import CheckpointFolder

sys.path.insert(0, sys.argv[1])
from test_commit import SCENARIOS, state

before, work, scenario = sys.argv[2:]
step, weight, names, keep = SCENARIOS[scenario]

def dying(call):
    def count(*arguments, **options):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*arguments, **options)
    return count

for kill_at in range(1, 1000):
    folder = f"{work}/killed_at_{kill_at}"
    subprocess.run(["cp", "-a", before, folder], check=True)  # names of one file still share one
    child = os.fork()
    if child == 0:
        left = kill_at
        for name in ("replace", "link", "unlink", "remove", "fsync"):
            setattr(os, name, dying(getattr(os, name)))
        save(CheckpointFolder(folder), state(step, weight), names=names, keep=keep)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != -signal.SIGKILL:
        sys.exit(status)
"""


def state(step: int, weight: float) -> dict[str, Any]:
    """Of the same size in bytes for every step and weight."""
    weights = {"w": torch.full((64,), weight)}
    return {"format": FORMAT, "step": step, "epoch": 0, "train_loss": 2.0, "val_loss": None, "model": weights}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 1, 2 and 3; step 2 ended an epoch and was the best."""
    folder = tmp_path_factory.mktemp("before")
    for step in (1, 2, 3):
        names = ["epoch_00001", "best_model"] if step == 2 else []
        save(CheckpointFolder(folder), state(step, float(step)), names=names, keep=10)
    return folder


@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(name, marks=[] if "same step" in name or "epoch" in name else [pytest.mark.soak])
        for name in SCENARIOS
    ],
)
def test_a_commit_killed_at_any_step_leaves_a_whole_newest_or_previous_state(
    before: Path, tmp_path: Path, scenario: str
) -> None:
    step, weight, names, keep = SCENARIOS[scenario]
    killer = [sys.executable, "-c", KILLER, Path(__file__).parent, before, tmp_path, scenario]
    done = subprocess.run([str(word) for word in killer], check=False, timeout=200, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folders = [tmp_path / f"killed_at_{kill_at + 1}" for kill_at in range(len(list(tmp_path.iterdir())))]
    assert len(folders) > 20
    seen = {check(CheckpointFolder(folder), {(3, 3.0), (step, weight)}) for folder in folders}
    assert seen == {(3, 3.0), (step, weight)}, "killed before the new one counted, and after"
    for folder in folders:  # as a run does next: it saves again
        save(CheckpointFolder(folder), state(5, 5.0), names=names, keep=keep)
        check(CheckpointFolder(folder), {(5, 5.0)})
        assert not list(folder.glob(".*")), "the killed one left nothing for good"


def check(folder: CheckpointFolder, allowed: set[tuple[int, float]]) -> tuple[int, float]:
    """The newest is whole and one of the allowed; every name that counts as whole loads, as its sidecar says."""
    warnings: list[str] = []
    newest = load_newest(folder, warnings.append)
    assert newest, warnings
    which = newest["step"], float(newest["model"]["w"][0])
    assert which in allowed, (folder.location, which, warnings)
    for found in folder.all():
        assert load(found.location, found.sidecar)["step"] == found.sidecar.step
    return which
