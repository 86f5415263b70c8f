"""A run that dies again and again, at random moments: it ends as the one that never died, bit for bit.

The small one is part of the suite; the long one, of over fifty kills, takes ten minutes: `pytest -m soak`.
"""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpt2core.checkpoint_folder import CheckpointFolder

pytestmark = pytest.mark.slow

KINDS_OF_ONE = ["kill rank 0 in a write", "kill rank 0 in a commit"] * 2 + ["kill rank 0", "SIGTERM"]
KINDS_OF_TWO = [*KINDS_OF_ONE, "kill rank 1", "kill torchrun", "kill all"]
LONGEST_RUN_S = 900.0  # of hundreds of steps, on a machine that has other work
LONGEST_DELAY_S = 0.05  # a few steps of the tiny model


def being_written(names: set[str]) -> set[str]:
    """Temporary files of checkpoints."""
    return {name for name in names if name.startswith(".rolling") and ".pt." in name}


def being_committed(names: set[str]) -> set[str]:
    """Checkpoints without a sidecar."""
    return {name for name in names if name.endswith(".pt") and name.removesuffix(".pt") + ".json" not in names}


class Soak:
    """Runs `--resume latest` with a fault each time, then to the end; counts what that cost."""

    def __init__(self, lab: Any, run: Path, flags: list[str], nproc: int, seed: int) -> None:
        self.lab, self.run, self.nproc = lab, run, nproc
        self.flags = [*flags, "--resume", "latest"]
        self.random = random.Random(seed)
        self.faults: list[str] = []
        self.mid_write = self.mid_commit = 0  # kills that hit a file half written, or names half moved
        self.steps_lost: list[int] = []
        self.seconds_to_next_step: list[float] = []
        self._faulted_at: float | None = None

    def go(self, kinds: list[str], max_steps_between: int) -> None:
        for kind in kinds:
            self._attempt(kind, self.random.randint(1, max_steps_between))
        with self.lab.started(self.run, self.flags, self.nproc) as trainer:
            self._wait_for_progress(trainer, 1)
            assert trainer.wait(LONGEST_RUN_S) == 0, trainer.output

    def _attempt(self, kind: str, steps: int) -> None:
        with self.lab.started(self.run, self.flags, self.nproc) as trainer:
            self._wait_for_progress(trainer, 1)
            self._wait_for_progress(trainer, steps)
            rank = trainer.rank if self.nproc > 1 else lambda _: trainer.process.pid
            pids = [rank(number) for number in range(self.nproc)]
            if kind == "kill rank 0 in a write":
                self._wait_for_files(trainer, being_written)
            elif kind == "kill rank 0 in a commit":
                self._wait_for_files(trainer, being_committed)
            else:
                time.sleep(self.random.uniform(0, LONGEST_DELAY_S))  # a random moment is what is tested
            victims = {"kill rank 1": pids[-1:], "kill torchrun": [trainer.process.pid], "kill all": pids}
            for pid in victims.get(kind, pids[:1]):
                assert self.lab.is_alive(pid), f"it ended before the fault:\n{trainer.output}"
                os.kill(pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
            self._faulted_at = time.monotonic()
            trainer.wait()
            self.lab.wait_until(lambda: not any(map(self.lab.is_alive, pids)), "all ranks to end")
        self._count(kind)

    def _wait_for_progress(self, trainer: Any, steps: int) -> None:
        """Waits until this attempt has logged so many steps; after a fault, takes the time to the first."""
        trainer.wait_for_step(self._resumed_at(trainer) + steps)
        if self._faulted_at is not None:
            self.seconds_to_next_step.append(time.monotonic() - self._faulted_at)
            self._faulted_at = None

    def _resumed_at(self, trainer: Any) -> int:
        """The step that this attempt says it starts at."""
        pattern = re.compile(r"starting afresh|resumed from .* at step (\d+) of")
        said = trainer.wait_for(lambda: pattern.search(trainer.output), "it to resume")
        return int(said[1] or 0)

    def _wait_for_files(self, trainer: Any, are_there: Callable[[set[str]], set[str]]) -> None:
        """Looks at the names in the checkpoint folder without a pause, for what it waits for lasts milliseconds."""
        folder = self.run / "checkpoints"
        deadline = time.monotonic() + 120

        def names() -> set[str]:
            return are_there({path.name for path in folder.iterdir()})

        left_by_the_last_kill = names()
        while not names() - left_by_the_last_kill:
            assert trainer.process.poll() is None and time.monotonic() < deadline, trainer.output

    def _count(self, kind: str) -> None:
        self.faults.append(kind)
        folder = CheckpointFolder(self.run / "checkpoints")
        self.mid_write += any(Path(folder.location).glob(".*.tmp"))
        self.mid_commit += any(folder.find(name) is None for name in folder.names())
        logged = max((line["step"] for line in self.lab.metrics(self.run) if "loss" in line), default=0)
        found = folder.all()
        self.steps_lost.append(logged - (found[0].sidecar.step if found else 0))

    def summary(self) -> str:
        kinds = ", ".join(f"{self.faults.count(kind)} {kind}" for kind in dict.fromkeys(sorted(self.faults)))
        lost, seconds = sorted(self.steps_lost), sorted(self.seconds_to_next_step)
        return (
            f"{self.nproc} rank(s): {len(self.faults)} faults ({kinds}); {self.mid_write} hit a half written file, "
            f"{self.mid_commit} a half done commit; steps lost: {sum(lost)} in all, median {lost[len(lost) // 2]}, "
            f"most {lost[-1]}; seconds to the next step: median {seconds[len(seconds) // 2]:.1f}, most {seconds[-1]:.1f}"
        )


def test_four_kills_in_a_save_change_nothing(lab: Any, straight: Path, tmp_path: Path, capsys: Any) -> None:
    soak = Soak(lab, tmp_path / "tiny", lab.flags(tmp_path, checkpoint_freq=1), nproc=1, seed=0)
    soak.go(["kill rank 0 in a write", "kill rank 0 in a commit"] * 2, max_steps_between=2)
    lab.assert_same_run(soak.run, straight)
    with capsys.disabled():
        print(f"\n{soak.summary()}")


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("nproc", "times", "kinds"), [(1, 6, KINDS_OF_ONE), (2, 3, KINDS_OF_TWO)])
def test_over_fifty_kills_change_nothing(
    lab: Any, tmp_path: Path, capsys: Any, nproc: int, times: int, kinds: list[str]
) -> None:
    steps = {"steps_per_epoch": 140, "eval_freq": 20}
    straight, run = tmp_path / "straight" / "tiny", tmp_path / "soak" / "tiny"
    lab.train(lab.flags(straight.parent, **steps, checkpoint_freq=0), nproc, LONGEST_RUN_S)
    soak = Soak(lab, run, lab.flags(run.parent, **steps), nproc, seed=nproc)
    order = kinds * times
    soak.random.shuffle(order)
    soak.go(order, max_steps_between=6)
    lab.assert_same_run(run, straight, max_steps=280)
    with capsys.disabled():
        print(f"\n{soak.summary()}")
