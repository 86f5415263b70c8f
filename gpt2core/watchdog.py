"""Ends a process that makes no progress any more: a rank that hangs makes all others wait for it, for ever."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gpt2core import heartbeat
from gpt2core.processes import Process, descendants, kill

STACKS_SIGNAL = signal.SIGUSR1  # on which a rank writes the stacks of its threads to stderr, also when it hangs in C
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_WRITE_STACKS = 1.0
STDERR = 2  # the descriptor: a test may have put something else in the place of sys.stderr


def show_stacks_when_asked() -> None:
    """To be called by what a watchdog looks at."""
    faulthandler.register(STACKS_SIGNAL, file=STDERR)


def end_orphans(parent: int, heartbeat_file: Path, grace_s: float) -> None:
    """Kills all ranks of this trainer, itself among them, when they still run so long after the process that started this
    one has died: a hung rank does not hear the SIGTERM that the kernel sends it then, and would hold its GPU for ever.

    Looks from a thread, since a rank that hangs does so in its main one.
    """

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        time.sleep(grace_s)
        trainer = heartbeat.read(heartbeat_file)
        own = Process.of(os.getpid())
        others = [rank.process for rank in trainer.ranks if rank.process != own] if trainer else []
        kill([*others, *([own] if own else [])])

    threading.Thread(target=look, name="end-orphans", daemon=True).start()


class Watchdog:
    """Looks at a process's heartbeat and output from outside; `hung` says afterwards why it was killed, if it was."""

    def __init__(self, heartbeat_file: Path, limit_s: float, start_limit_s: float) -> None:
        """`limit_s` bounds the time without progress, `start_limit_s` that before the first step is done."""
        self.heartbeat_file, self.limit_s, self.start_limit_s = heartbeat_file, limit_s, start_limit_s
        self.hung: str | None = None
        self._progress_at = 0.0  # of our clock: that of the file may be another machine's
        self._touched: int | None = None

    def line_seen(self) -> None:
        """A line of output is progress, too: of what happens before the first heartbeat."""
        self._progress_at = time.monotonic()

    @contextmanager
    def over(self, process: subprocess.Popen[str], on_line: Callable[[str], None]) -> Iterator[None]:
        """Watches the process and those below it for the length of the block."""
        ended = threading.Event()
        self._progress_at, self._touched = time.monotonic(), self._mtime()
        before = self._touched
        thread = threading.Thread(target=self._watch, args=(process, before, on_line, ended), name="watchdog")
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _watch(
        self,
        process: subprocess.Popen[str],
        before: int | None,
        on_line: Callable[[str], None],
        ended: threading.Event,
    ) -> None:
        while not ended.wait(SECONDS_BETWEEN_LOOKS):
            if (touched := self._mtime()) != self._touched:
                self._touched, self._progress_at = touched, time.monotonic()
            trainer = heartbeat.read(self.heartbeat_file) if self._touched != before else None
            limit_s = self.limit_s if trainer and trainer.is_under_way else self.start_limit_s
            if limit_s and time.monotonic() - self._progress_at > limit_s:
                self.hung = (
                    f"no progress for {limit_s:g} s: the stacks of its processes are in the log, then it was killed"
                )
                on_line(f"watchdog: no progress for {limit_s:g} s; stacks of the ranks that can still write them:")
                self._end(process, trainer, ended)
                return

    def _mtime(self) -> int | None:
        try:
            return self.heartbeat_file.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    def _end(self, process: subprocess.Popen[str], trainer: heartbeat.Trainer | None, ended: threading.Event) -> None:
        ranks = [rank.process for rank in trainer.ranks] if trainer else []
        for rank in ranks:  # only these have a handler: others would die of the signal
            rank.send(STACKS_SIGNAL)
            ended.wait(SECONDS_TO_WRITE_STACKS)  # one after the other, for they share the output
        top = Process.of(process.pid)
        kill([*ranks, *descendants(process.pid), *([top] if top else [])])
