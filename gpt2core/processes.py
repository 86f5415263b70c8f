"""Processes of this machine, told apart from later ones that got the same number. Linux's /proc; elsewhere none is known."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

from gpt2core.records import Record


class Process(Record):
    """A process by its number and the moment it started, in clock ticks since boot (proc(5), field 22 of stat)."""

    pid: int
    started: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this number now, if it runs; one that ended and was not reaped does not."""
        fields = _stat(pid)
        return cls(pid=pid, started=int(fields[19])) if fields and fields[0] not in "ZX" else None

    def is_alive(self) -> bool:
        return Process.of(self.pid) == self

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, unless the process has ended."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


def own_age_s() -> float | None:
    """Seconds since this process was started."""
    own = Process.of(os.getpid())
    return time.clock_gettime(time.CLOCK_BOOTTIME) - own.started / os.sysconf("SC_CLK_TCK") if own else None


def descendants(pid: int) -> list[Process]:
    """Children, their children and so on."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        if fields := _stat(int(folder.name)):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found, parents = [], [pid]
    while parents:
        below = children.get(parents.pop(), [])
        found += [process for child in below if (process := Process.of(child))]
        parents += below
    return found


def kill(processes: Iterable[Process]) -> None:
    for process in processes:
        process.send(signal.SIGKILL)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/<pid>/stat from the state on; the name before it may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
