"""A GPU's step is logged while the next one is under way; here a CPU plays the device that is behind its host."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2core import trainer
from gpt2core.step_log import Mark, StepLog

RUN: dict[str, Any] = {
    "num_epochs": 1,
    "steps_per_epoch": 9,
    "eval_freq": 4,
    "val_tokens": 128,
    "checkpoint_freq": 6,
    "keep_checkpoints": 9,
}
TIMES = ("tokens_per_sec", "step_ms", "data_wait_ms", "eta_s", "mfu")


class Behind(StepLog):
    """Of a device that works through what it was given in its own time."""

    handed_over = 0
    logged_when: dict[int, int]  # step -> how many steps had been handed over when it was logged

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.is_device_behind = True
        Behind.logged_when = {}

    def add(self, step: int, *arguments: Any) -> None:
        self.handed_over = step
        super().add(step, *arguments)

    def _log(self, measured: Any, *arguments: Any) -> None:
        self.logged_when[measured.step] = self.handed_over
        super()._log(measured, *arguments)


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def test_a_step_is_logged_while_the_next_is_under_way(
    lab: Any, tmp_path: Path, train_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here(lab.flags(tmp_path / "at_once", **RUN))
    monkeypatch.setattr(trainer, "StepLog", Behind)
    train_here(lab.flags(tmp_path / "behind", **RUN))
    at_once, behind = (lab.metrics(tmp_path / folder / "tiny") for folder in ("at_once", "behind"))
    assert without_times(behind) == without_times(at_once), "the same numbers in the same order"
    # before the evaluations after steps 4 and 8, the checkpoint of step 6 and the end nothing is left to be read
    assert Behind.logged_when == {1: 2, 2: 3, 3: 4, 4: 4, 5: 6, 6: 6, 7: 8, 8: 8, 9: 9}
    run = tmp_path / "behind" / "tiny"
    saved = lab.load(run / "checkpoints" / "rolling_step_000006.pt")
    assert saved["train_loss"] == lab.logged(run, "loss")[6]
    spent = sum(lab.logged(run, "step_ms").values()) / 1000
    assert lab.latest(run)["train_seconds"] == pytest.approx(spent)


def test_evaluations_are_no_training_time(
    lab: Any, tmp_path: Path, train_here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock by which each takes an hour, some of them after steps that have no line of their own."""
    clock, beside, validate = time.perf_counter, [0.0], trainer.Trainer.validate

    def slow_validate(self: trainer.Trainer, log: Any) -> bool:
        beside[0] += 3600
        return validate(self, log)

    monkeypatch.setattr(time, "perf_counter", lambda: clock() + beside[0])
    monkeypatch.setattr(trainer.Trainer, "validate", slow_validate)
    train_here(lab.flags(tmp_path, **RUN | {"log_freq": 3, "checkpoint_freq": 0}))
    run = tmp_path / "tiny"
    assert list(lab.logged(run, "val_loss")) == [0, 4, 8, 9]
    assert list(lab.logged(run, "loss")) == [3, 6, 9]
    spent = 3 * sum(lab.logged(run, "step_ms").values()) / 1000
    assert lab.latest(run)["train_seconds"] == pytest.approx(spent)
    assert spent < 3600


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_marks_tell_the_devices_time() -> None:
    device = torch.device("cuda", 0)
    marks = [Mark(device)]
    for _ in range(2):
        torch.cuda._sleep(10**9)  # clock cycles: 0.3 s and more on any GPU, and nothing for the host
        marks.append(Mark(device))
    marks[2].wait()
    parts = [marks[1].seconds_since(marks[0]), marks[2].seconds_since(marks[1])]
    assert sum(parts) == pytest.approx(marks[2].seconds_since(marks[0]))
    assert min(parts) > 0.3, "the device's time, not the host's"
