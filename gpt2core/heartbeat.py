"""A sign of life: heartbeat.json in the run's folder says who trains, and is touched at every progress. An evaluation that
is asked for one has its own.

A micro-step, a batch of an evaluation, a checkpoint being written are progress. The watchdog of whoever started the
trainer looks at it from outside; a later attempt finds in it what an earlier one left behind.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from pydantic import ValidationError

from gpt2core.processes import Process
from gpt2core.records import Record
from gpt2core.storage import write_text

SECONDS_BETWEEN_BEATS = 1.0

_file: Path | None = None
_trainer: Trainer | None = None
_beaten_at = 0.0


class Rank(Record):
    """One process of a trainer, and the one whose death is to end it, if there is one."""

    process: Process
    parent: Process | None

    @classmethod
    def own(cls, parent: int | None) -> Rank | None:
        """This process; None where there is no /proc."""
        process = Process.of(os.getpid())
        return cls(process=process, parent=Process.of(parent) if parent else None) if process else None


class Trainer(Record):
    """Who trains, and whether the first step is done, before which there is compiling and loading."""

    host: str
    ranks: list[Rank]
    is_under_way: bool = False

    def orphans(self) -> list[Process]:
        """Ranks that still run on this machine though the process that they belong to has died."""
        if self.host != socket.gethostname():
            return []
        alive = [rank for rank in self.ranks if rank.process.is_alive()]
        return [rank.process for rank in alive if rank.parent and not rank.parent.is_alive()]


def begin(file: Path, ranks: list[Rank]) -> None:
    """To be called by rank 0, once it has the run's folder for itself."""
    global _file, _trainer
    _file, _trainer = file, Trainer(host=socket.gethostname(), ranks=ranks)
    write_text(file, _trainer.model_dump_json() + "\n")


def beat() -> None:
    """Says that there is progress. Costs nothing worth measuring; does nothing in a process that did not begin."""
    global _beaten_at
    if _file and time.monotonic() - _beaten_at >= SECONDS_BETWEEN_BEATS:
        _beaten_at = time.monotonic()
        with contextlib.suppress(OSError):  # a full or vanished disk is the checkpoint's business
            os.utime(_file)


def under_way() -> None:
    """Says that the first step is done; from here on the watchdog is less patient."""
    global _trainer
    if _file and _trainer and not _trainer.is_under_way:
        _trainer = _trainer.model_copy(update={"is_under_way": True})
        with contextlib.suppress(OSError):
            write_text(_file, _trainer.model_dump_json() + "\n")


def read(file: Path) -> Trainer | None:
    """What the last trainer of the run said of itself."""
    try:
        return Trainer.model_validate_json(file.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
