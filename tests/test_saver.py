"""Saving behind training's back: what is written is the step's state, no save is lost, and no failure is silent."""

from __future__ import annotations

import os
import queue
import resource
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import DEADLINE_S, S3

from gpt2core.checkpoint import Saver, load, load_newest
from gpt2core.checkpoint_folder import FORMAT, CheckpointFolder
from gpt2core.config import ModelConfig, TrainConfig
from gpt2core.model import GPT
from gpt2core.optim import build_optimizer

MODEL = ModelConfig(context_length=8, num_layers=1, embd_size=4, num_heads=1)


class Training:
    """A small model that can be trained on."""

    def __init__(self) -> None:
        self.model = GPT(MODEL)
        self.model.init_weights(torch.Generator().manual_seed(0))
        self.optimizer = build_optimizer(self.model, TrainConfig())
        self.step = 0

    def train(self) -> None:
        tokens = torch.randint(0, 50257, (1, 8), generator=torch.Generator().manual_seed(self.step))
        self.model(tokens, tokens).backward()
        self.optimizer.step()
        self.step += 1

    def state(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": self.step,
            "epoch": 0,
            "model": dict(self.model.state_dict()),
            "optimizer": self.optimizer.state_dict(),
        }


class Said:
    """What a saver reports, one thing after another."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self._queue: queue.Queue[str] = queue.Queue()

    def __call__(self, line: str) -> None:
        self.lines.append(line)
        self._queue.put(line)

    def wait_for(self, words: str) -> None:
        while words not in self._queue.get(timeout=DEADLINE_S):
            pass


@pytest.fixture
def training() -> Training:
    training = Training()
    training.train()
    return training


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def room() -> Iterator[Callable[[bool], None]]:
    """`room(False)` lets every file of this process that grows beyond 2 MB fail, as on a full disk; True lifts it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def room(there: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft if there else 2_000_000, hard))

    yield room
    room(True)


def assert_saved(lab: Any, folder: CheckpointFolder, step: int, expected: dict[str, Any]) -> None:
    found = folder.find(f"rolling_step_{step:06d}")
    assert found, f"step {step} is not there"
    lab.assert_same(load(found.location, found.sidecar), expected)


def copy_of(training: Training, path: Path) -> dict[str, Any]:
    """The state as it is now, by way of a file."""
    torch.save(training.state(), path)
    return torch.load(path, weights_only=True)


def test_the_file_has_the_state_of_its_step_though_training_went_on(
    training: Training, said: Said, s3: S3, lab: Any, tmp_path: Path
) -> None:
    """The server holds the upload of step 1 while steps 2 and 3 are trained and step 3 is saved, into the same buffers."""
    folder = CheckpointFolder(f"{s3.bucket_url}/run")
    saver = Saver(folder, keep=5, report=said)
    held = s3.hold("PUT", "rolling_step_000001.pt")
    first = copy_of(training, tmp_path / "1.pt")
    saver.begin(training.state(), [])
    assert held.reached.wait(DEADLINE_S)
    training.train()
    training.train()
    third = copy_of(training, tmp_path / "3.pt")
    next_save = threading.Thread(target=saver.begin, args=(training.state(), ["epoch_00001"]))
    next_save.start()
    assert "run/rolling_step_000003.pt" not in s3.requests("PUT"), "one write at a time"
    held.release()
    next_save.join(DEADLINE_S)
    training.train()
    saver.finish()
    assert_saved(lab, folder, 1, first)
    assert_saved(lab, folder, 3, third)
    assert {found.name: found.sidecar.step for found in folder.all()} == {
        "rolling_step_000001": 1,
        "latest_backup": 1,
        "rolling_step_000003": 3,
        "latest": 3,
        "epoch_00001": 3,
    }
    assert saver.saved_step == 3 and saver.error is None


def test_tensors_that_share_memory_are_staged_and_written_once(training: Training, said: Said, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    saver = Saver(folder, keep=5, report=said)
    for _ in range(2):  # the second time into the buffers of the first
        saver.begin(training.state(), [])
        saver.finish()
        weights = load(folder.file("latest"))["model"]
        assert weights["lm_head.weight"].data_ptr() == weights["transformer.wte.weight"].data_ptr()
        assert torch.equal(weights["lm_head.weight"], training.model.lm_head.weight)
        found = folder.find("latest")
        once = training.model.lm_head.weight.nbytes
        assert found and 3 * once < found.sidecar.bytes < 3.5 * once  # the weights and AdamW's two moments
        training.train()


def test_a_write_that_fails_is_tried_again_until_there_is_room(
    training: Training, said: Said, room: Callable[[bool], None], lab: Any, tmp_path: Path
) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    saver = Saver(folder, keep=5, report=said, retry_after_s=0.01)
    expected = copy_of(training, tmp_path / "expected.pt")
    room(False)
    saver.begin(training.state(), [])
    for _ in range(2):
        said.wait_for("step=1 WARNING: checkpoint not written (OSError: [Errno 27] File too large)")
    training.train()
    assert folder.names() == []
    room(True)
    said.wait_for("step=1 saved rolling_step_000001.pt as latest.pt")
    saver.finish()
    assert_saved(lab, folder, 1, expected)
    assert saver.error is None
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_newer_state_takes_the_place_of_one_that_cannot_be_written(
    training: Training, said: Said, room: Callable[[bool], None], tmp_path: Path
) -> None:
    folder = CheckpointFolder(tmp_path / "checkpoints")
    saver = Saver(folder, keep=5, report=said, retry_after_s=DEADLINE_S)
    room(False)
    saver.begin(training.state(), ["epoch_00001"])
    said.wait_for("tried again")
    training.train()
    saver.begin(training.state(), [])  # gives the first a last attempt at once, not after the pause
    assert any("step=1" in line and "given up" in line for line in said.lines)
    said.wait_for("step=2 WARNING")
    room(True)
    saver.finish()
    assert (saver.saved_step, saver.error) == (2, None)
    assert folder.names() == ["latest", "rolling_step_000002"]


def test_storage_that_is_away_is_an_error_of_the_save_and_not_of_training(
    training: Training, said: Said, s3: S3, lab: Any, tmp_path: Path
) -> None:
    folder = CheckpointFolder(f"{s3.bucket_url}/run")
    saver = Saver(folder, keep=5, report=said, retry_after_s=0.01)
    away = s3.fail("PUT", "rolling_step_000001.pt", times=1 << 30)
    expected = copy_of(training, tmp_path / "1.pt")
    saver.begin(training.state(), [])
    said.wait_for("step=1 WARNING: checkpoint not written")
    training.train()
    away.times = 0  # it is back
    said.wait_for("step=1 saved")
    saver.finish()
    assert_saved(lab, folder, 1, expected)


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_last_save_failing_is_an_error_on_all_ranks(lab: Any, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    flags = lab.flags(tmp_path, steps_per_epoch=100_000, eval_freq=0)
    with lab.started(run, flags, nproc=2) as torchrun:
        torchrun.wait_for(lambda: CheckpointFolder(run / "checkpoints").find("latest"), "the first checkpoint")
        ranks = [torchrun.rank(0), torchrun.rank(1)]
        resource.prlimit(ranks[0], resource.RLIMIT_FSIZE, (2_000_000, resource.RLIM_INFINITY))
        torchrun.wait_for(lambda: "checkpoint not written" in torchrun.output, "the warning")
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
        assert torchrun.wait() != 0
        output = torchrun.output
    assert "could not be written ([Errno 27] File too large)" in output  # rank 0 says why, rank 1 where to look
    assert "error: rank 0: the checkpoint of step" in output
    warnings: list[str] = []
    assert load_newest(CheckpointFolder(run / "checkpoints"), warnings.append) and not warnings


@pytest.mark.slow
def test_a_process_ends_when_training_gives_up_while_a_checkpoint_cannot_be_written(lab: Any, tmp_path: Path) -> None:
    """The thread that would try again for ever does not keep it alive."""
    flags = lab.flags(tmp_path, max_lr=1e38, min_lr=0, grad_clip=1e30, checkpoint_freq=1, eval_freq=0)
    run = tmp_path / "tiny"
    (run / "checkpoints").mkdir(parents=True)
    with lab.started(run, flags, limit_file_bytes=2_000_000) as trainer:
        assert trainer.wait() == 3, trainer.output
        output = trainer.output
    assert "step=1 WARNING: checkpoint not written" in output
    assert "not finite" in output.splitlines()[-1]
    assert CheckpointFolder(run / "checkpoints").names() == []
