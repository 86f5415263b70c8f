"""Progress for whoever watches: a bar on a terminal, plain lines in a pipe, a file or CI.

A trainer's output passes through its launcher, and only the process that has the terminal draws: it makes the bars out of
the lines that the others print.
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, TypeVar

from gpt2core import log_line

if TYPE_CHECKING:
    from rich.progress import TaskID

SECONDS_BETWEEN_LINES = 10.0  # of plain progress
COUNTED = re.compile(r"^(.+): ([\d,]+) of ([\d,]+)$")
TOKENIZED = re.compile(r"^tokenized ([\d.]+)%: (.*)$")

Item = TypeVar("Item")


def is_live() -> bool:
    """Whether standard output is a terminal that a bar can be drawn on."""
    return sys.stdout.isatty() and not os.environ.get("CI") and os.environ.get("TERM") not in ("dumb", "unknown")


def tell(line: str) -> None:
    """A line for whoever watches; on a terminal, one that tells of progress moves a bar instead."""
    if is_live():
        _screen().show(line)
    else:
        print(line + "\n", end="", flush=True)  # in one write, for threads tell things, too


def track(items: Sequence[Item], what: str) -> Iterator[Item]:
    """The items one by one; rank 0 tells how many are done, when they take long."""
    is_main = os.environ.get("RANK", "0") == "0"
    said = time.monotonic()
    for done, item in enumerate(items, start=1):
        yield item
        if is_main and (is_live() or time.monotonic() - said >= SECONDS_BETWEEN_LINES):
            said = time.monotonic()
            tell(f"{what}: {done:,} of {len(items):,}")


def close() -> None:
    """Leaves the terminal as it was; to be called by who ends a process without the interpreter's clean-up."""
    if _opened:
        _opened.pop().progress.stop()


def show_cursor() -> None:
    """For a signal handler, in the place of `close`: that takes locks, which the code that was interrupted may hold."""
    if _opened:
        with suppress(OSError):
            os.write(1, b"\x1b[?25h\n")


class Screen:
    """The terminal: bars below, and above them the lines that are no progress."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        columns = [TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:3.0f}%")]
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=Console())
        self.progress.start()
        self._bars: dict[str, TaskID] = {}
        self._lock = threading.Lock()

    def show(self, line: str) -> None:
        with self._lock:
            if (words := log_line.parse(line)) and "loss" in words and "of" in words:
                speed = f"{float(words['tokens_per_sec']):,.0f} tokens/s" if "tokens_per_sec" in words else ""
                note = f"step {words['step']} of {words['of']}, loss {words['loss']}, {speed}"
                self._move("training", int(words["step"]), int(words["of"]), f"{note}, {words.get('eta', '?')} left")
            elif match := TOKENIZED.match(line):
                self._move("tokenizing", float(match[1]), 100, match[2])
            elif match := COUNTED.match(line):
                done, total = (int(number.replace(",", "")) for number in match.groups()[1:])
                self._move(match[1], done, total, f"{match[2]} of {match[3]}")
            else:
                self.progress.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _move(self, what: str, done: float, total: float, note: str) -> None:
        if what not in self._bars:
            self._bars[what] = self.progress.add_task(what, total=total, note=note)
        self.progress.update(self._bars[what], completed=done, total=total, note=note)
        if done >= total and what != "training":
            self.progress.remove_task(self._bars.pop(what))


_opened: list[Screen] = []


def _screen() -> Screen:
    if not _opened:
        _opened.append(Screen())
        atexit.register(close)
    return _opened[0]
