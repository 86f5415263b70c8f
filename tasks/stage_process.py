"""Runs a module of gpt2core in processes of its own, with its output in the task's log."""

from __future__ import annotations

import logging
import multiprocessing
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.logging import get_run_logger

from gpt2core import launch
from gpt2core.watchdog import Watchdog

SECONDS_BETWEEN_STEP_LINES = 5.0  # of the lines that every step writes; all others are handed on at once
TIMESTAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # the log has its own
STEP_LINE = re.compile(r" step=\d+ loss=")
TAIL_LINES = 12
TRACEBACK_LINES = 60
# A frame of the traceback that a rank writes because another one failed; its last line, the error, is none.
FRAME = re.compile(r"^\[rank\d+\]:($|  |Traceback | Traceback )")
TORCHRUN_LINE = re.compile(r"^[IWE]\d{4} \d\d:\d\d:\d\d\.")  # of its agent's own log
# as gpt2core.flags.main_guard and its Parser print what trying again would not help
REFUSAL = re.compile(r"^python -m [\w.]+: error: (.*)")


class StageError(RuntimeError):
    """A stage's process crashed; the message carries the end of its output."""

    @property
    def sentence(self) -> str:
        """What ended, and the last that it said of it: the steps and events of its log are no cause."""
        first, *said = [line for line in str(self).splitlines() if line.strip()]
        causes = [line.strip() for line in said if not TIMESTAMP.match(line) or "WARNING" in line]
        return f"{first} {causes[-1]}" if causes else first.removesuffix(":")


class StageRefusedError(ValueError):
    """A stage's process said in one sentence what is wrong; trying again would not help."""


def worth_a_retry(task: Any, task_run: Any, state: Any) -> bool:
    """A crash is; a ValueError says that the configuration or the data is wrong, and no retry cures that."""
    failure = state.result(raise_on_failure=False)
    return not isinstance(failure, ValueError) and not launch.is_stopping()


def die_with_the_flow() -> None:
    """In a process of a pool: SIGTERM comes when the flow's process dies. A pool's idle process would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        launch.tie_to_parent(parent.pid or 0)


@contextmanager
def stages_stopped_on_the_way_out() -> Iterator[None]:
    """Ends the processes of the stages in other threads and pools when a cancel or Ctrl+C ends the block.

    Prefect waits for its task runners' tasks, and those for their processes.
    """
    launch.allow_starts()
    try:
        yield
    except Exception:
        raise  # of a task that failed; the others have ended, too
    except BaseException:
        launch.stop_all()
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def run_stage(
    module: str,
    arguments: list[str],
    nproc: int = 1,
    torchrun_flags: Sequence[str] = (),
    look: Callable[[str], None] | None = None,
    watchdog: Watchdog | None = None,
    output_file: Path | None = None,
) -> None:
    """Runs `python -m module arguments`, under torchrun when there are flags for it; `look` is called with each line,
    and all of them are appended to `output_file`: the task's log has what a person reads.

    Raises StageRefusedError or StageError when it fails or the watchdog kills it. Whatever ends this task (a cancel, too) first lets the process save and end.
    """
    logger = get_run_logger()
    tail: list[str] = []
    last_step_line = 0.0
    refusal: str | None = None
    has_failed = False
    whole = _Appended(output_file)

    def on_line(line: str) -> None:
        nonlocal last_step_line, refusal, has_failed
        if match := REFUSAL.match(line):
            refusal = match[1]
        if line.startswith(launch.FIRST_TO_FAIL):  # from here on it is that rank's own traceback
            has_failed = True
            tail.clear()
        if line.strip() and not FRAME.match(line):
            tail.append(line)
        del tail[: -TRACEBACK_LINES if has_failed else -TAIL_LINES]
        whole.add(line)
        if look:
            look(line)
        if has_failed or FRAME.match(line) or TORCHRUN_LINE.match(line):
            return
        if STEP_LINE.search(line):
            if time.monotonic() - last_step_line < SECONDS_BETWEEN_STEP_LINES:
                return
            last_step_line = time.monotonic()
        logger.log(logging.WARNING if "WARNING" in line else logging.INFO, TIMESTAMP.sub("", line))

    exit_code = launch.run(launch.python_command(module, arguments, torchrun_flags), on_line, nproc, watchdog)
    if has_failed:
        logger.error("\n".join(tail))
    if watchdog and watchdog.hung:
        raise StageError(f"python -m {module} made {watchdog.hung}")
    if exit_code and refusal:
        raise StageRefusedError(refusal)
    if exit_code:
        ended = (
            f"was killed by {signal.Signals(-exit_code).name}" if exit_code < 0 else f"ended with exit code {exit_code}"
        )
        raise StageError(f"python -m {module} {ended}:\n" + "\n".join(tail))


class _Appended:
    """A file that lines are appended to. One that cannot be written is left out: the work matters more."""

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def add(self, line: str) -> None:
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as opened:
                opened.write(line + "\n")
        except OSError as error:
            get_run_logger().warning(f"the output is kept no longer: {error}")
            self.file = None
