"""Runs whose length is open (lr_schedule wsd): longer or shorter while in the stable phase, and branches that decay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gpt2core import cli
from gpt2core.config import LaunchConfig, RunConfig
from gpt2core.flags import read_config
from gpt2core.optim import learning_rate
from gpt2core.preflight import claim_run

pytestmark = pytest.mark.slow

RUN = {
    "lr_schedule": "wsd",
    "num_layers": 1,
    "total_batch_size": 128,
    "steps_per_epoch": 4,
    "eval_freq": 0,
    "checkpoint_freq": 0,
}


def lengthened(run: Path, num_epochs: int) -> RunConfig:
    begun = read_config(run / "config.json")
    changed = {"artifacts_dir": str(run.parent), "train": begun.train.model_copy(update={"num_epochs": num_epochs})}
    return begun.model_copy(update=changed)


def lrs_of(config: RunConfig, first: int, last: int) -> dict[int, float]:
    steps = config.train.num_epochs * 4
    return {step: learning_rate(step - 1, steps, config.train) for step in range(first, last + 1)}


def test_a_run_in_its_stable_phase_may_become_longer_and_is_what_it_would_have_been(
    lab: Any, tmp_path: Path, train_here: Any
) -> None:
    train_here(lab.flags(tmp_path / "straight", **RUN, num_epochs=3))
    straight, run = tmp_path / "straight" / "tiny", tmp_path / "longer" / "tiny"
    train_here([*lab.flags(run.parent, **RUN, num_epochs=2), "--stop_epoch", "1"])
    train_here([*lab.flags(run.parent, **RUN, num_epochs=3), "--resume", "latest"])
    lab.assert_same_run(run, straight, max_steps=12)
    lrs = lab.logged(straight, "lr")
    assert lrs == lrs_of(read_config(straight / "config.json"), 1, 12)
    assert {lrs[step] for step in range(3, 10)} == {1e-3}  # warmup of 2; the first update of the decay is at its top
    assert lrs[9] > lrs[10] > lrs[11] > lrs[12] > 1e-4


@pytest.fixture
def decayed(lab: Any, tmp_path: Path, train_here: Any) -> Path:
    """Two epochs, the second of them the decay."""
    train_here(lab.flags(tmp_path, **RUN, num_epochs=2))
    return tmp_path / "tiny"


def test_a_run_in_its_decay_keeps_its_length_unless_it_goes_back(
    lab: Any, decayed: Path, tmp_path: Path, train_here: Any
) -> None:
    longer = lab.flags(tmp_path, **RUN, num_epochs=4)
    with pytest.raises(ValueError, match=r"train\.num_epochs: 2 -> 4"):
        train_here([*longer, "--resume", "latest"])
    with pytest.raises(ValueError, match=r"train\.num_epochs: 2 -> 4"):
        claim_run(lengthened(decayed, 4), LaunchConfig(nproc_per_node=1))
    with pytest.raises(ValueError, match=r"train\.max_lr: 0\.001 -> 0\.002"):  # that would be another past
        train_here([*lab.flags(tmp_path, **RUN, max_lr=2e-3, num_epochs=4), "--resume", "epoch_00001"])
    train_here([*longer, "--resume", "epoch_00001", "--stop_epoch", "2"])
    assert {lr for step, lr in lab.logged(decayed, "lr").items() if step > 2} == {1e-3}
    claim_run(lengthened(decayed, 5), LaunchConfig(nproc_per_node=1))  # the pipeline's way, from the latest checkpoint
    assert read_config(decayed / "config.json").train.num_epochs == 5


def test_a_checkpoint_of_the_stable_phase_is_decayed_and_promoted_as_a_run_of_its_own(
    lab: Any, tmp_path: Path, train_here: Any
) -> None:
    """While the first run is still in its stable phase, as if it went on without end."""
    train_here([*lab.flags(tmp_path, **RUN, num_epochs=100), "--stop_epoch", "1"])
    run, branch = tmp_path / "tiny", tmp_path / "branch"
    before = {path.name: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()}
    from_stable = ["--resume", run / "checkpoints" / "epoch_00001.pt"]
    train_here([*lab.flags(tmp_path, **RUN, run_name="branch", num_epochs=2), *from_stable])
    lrs = lab.logged(branch, "lr")
    assert lrs == lrs_of(read_config(branch / "config.json"), 5, 8)
    assert lrs[5] == 1e-3 and lrs[8] < 6e-4
    assert lab.latest(branch)["step"] == 8 and (branch / "checkpoints" / "epoch_00002.pt").exists()
    named = ["--run_name", "branch", "--artifacts_dir", str(tmp_path)]
    cli.evaluate([*named, "--checkpoint", "best", "--hellaswag", str(lab.examples(4))])
    cli.promote(named)
    promoted = json.loads((tmp_path / "best" / "promotion.json").read_text(encoding="utf-8"))["candidate"]
    assert (promoted["run_name"], promoted["step"]) == ("branch", 8)
    assert {path.name: path.stat().st_mtime_ns for path in (run / "checkpoints").iterdir()} == before
    train_here([*lab.flags(tmp_path, **RUN, num_epochs=100), "--resume", "latest", "--stop_epoch", "2"])
    assert set(list(lab.logged(run, "lr").values())[2:]) == {1e-3}


def test_a_cosine_run_keeps_its_length(lab: Any, first_epoch: Path, tmp_path: Path) -> None:
    run = lab.copy_run(first_epoch, tmp_path)
    with pytest.raises(ValueError, match=r"train\.num_epochs: 2 -> 3"):
        claim_run(lengthened(run, 3), LaunchConfig(nproc_per_node=1))
