"""Bounds the attempts at training: as many as bring a new checkpoint, and so many in a row that do not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from gpt2core import attempts
from gpt2core.run_folder import RunFolder
from tasks.artifacts import beside, show_resumes
from tasks.stage_process import StageError, worth_a_retry

UNLIMITED = 1_000_000  # retries for Prefect's counter, which knows nothing of progress
UNRECORDED_RETRIES = 5  # of what goes wrong where no attempt is recorded, such as a file server that is away


class AttemptsExhaustedError(ValueError):
    """So many attempts in a row brought no new checkpoint; the message says how each ended. No retry follows."""


def worth_another_attempt(task: Any, task_run: Any, state: Any) -> bool:
    """As `worth_a_retry`; what was not recorded as an attempt is bounded by Prefect's own count."""
    failure = state.result(raise_on_failure=False)
    return worth_a_retry(task, task_run, state) and (
        isinstance(failure, StageError) or task_run.run_count <= UNRECORDED_RETRIES
    )


@contextmanager
def recorded_attempt(folder: RunFolder, max_attempts: int) -> Iterator[None]:
    """Records in the run's folder that an attempt begins and how it ends, which the next one reports as a resume."""
    run = str(flow_run.id or "")
    attempts.end(folder, "failed", attempts.CUT_OFF)
    _refuse_when_exhausted(folder, run, max_attempts)
    attempts.begin(folder, run)
    _tell_of_resume(folder)
    try:
        yield
    except StageError as error:
        attempts.end(folder, "failed", error.sentence)
        _refuse_when_exhausted(folder, run, max_attempts)
        raise
    except Exception as error:
        attempts.end(folder, "failed", str(error))
        raise
    except BaseException as error:  # a cancel, Ctrl+C
        attempts.end(folder, "stopped", f"it was told to stop ({type(error).__name__})")
        raise
    attempts.end(folder, "done")


def _refuse_when_exhausted(folder: RunFolder, run: str, max_attempts: int) -> None:
    failed = attempts.without_progress(folder, run)
    if len(failed) >= max_attempts:
        raise AttemptsExhaustedError(
            f"given up after {len(failed)} attempts in a row without a new checkpoint in {folder.path}; "
            f"how each ended:\n{attempts.describe(failed)}"
        )


def _tell_of_resume(folder: RunFolder) -> None:
    every = attempts.read(folder)
    if len(every) < 2 or every[-2].outcome == "done":
        return
    last = attempts.resumes(folder)[-1]
    get_run_logger().warning(f"resuming at step {last.step}, {last.steps_lost} steps lost: {last.why}")
    beside(lambda: show_resumes(folder))
