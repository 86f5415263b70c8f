"""Runs a module of gpt2core in processes of its own, with its output in the task's log."""

from __future__ import annotations

import re
import time

from prefect.logging import get_run_logger

from gpt2core import launch

SECONDS_BETWEEN_STEP_LINES = 5.0  # of the lines that every step writes; all others are handed on at once
TIMESTAMP = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # the log has its own
STEP_LINE = re.compile(r" step=\d+ loss=")
TAIL_LINES = 12


class StageError(RuntimeError):
    """A stage's process ended with an error; the message carries the end of its output."""


def run_stage(module: str, arguments: list[str], nproc: int = 1) -> None:
    """Runs `python -m module arguments`, under torchrun for more than one process.

    Raises StageError when it fails. Whatever ends this task (a cancel, too) first lets the process save and end.
    """
    logger = get_run_logger()
    tail: list[str] = []
    last_step_line = 0.0

    def on_line(line: str) -> None:
        nonlocal last_step_line
        tail.append(line)
        del tail[:-TAIL_LINES]
        if STEP_LINE.search(line):
            if time.monotonic() - last_step_line < SECONDS_BETWEEN_STEP_LINES:
                return
            last_step_line = time.monotonic()
        logger.info(TIMESTAMP.sub("", line))

    exit_code = launch.run(launch.python_command(module, arguments, nproc), on_line, nproc)
    if exit_code:
        raise StageError(f"python -m {module} ended with exit code {exit_code}:\n" + "\n".join(tail))
