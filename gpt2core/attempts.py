"""attempts.json in a run's folder: every attempt at training, from which step, and how it ended.

It is what bounds retries across processes and machines, and what tells a person when and why a run was resumed.
"""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise, takewhile
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from gpt2core.checkpoint_folder import LATEST, CheckpointFolder
from gpt2core.records import Record
from gpt2core.run_folder import RunFolder
from gpt2core.storage import write_text

CUT_OFF = "the process that ran it ended without a word: killed, or its machine went down"


class Attempt(Record):
    """One start of the trainer under the pipeline."""

    flow_run: str  # which asked for it: a new one has all its attempts before it
    began_at: str  # UTC, ISO 8601
    from_step: int  # of the checkpoint that it resumed from; 0 where there was none
    steps_lost: int  # trained and logged before, and in no checkpoint
    ended_at: str | None = None
    outcome: Literal["running", "done", "stopped", "failed"] = "running"
    error: str | None = None  # why it was stopped or failed, in a sentence


Attempts = TypeAdapter(list[Attempt])


def read(folder: RunFolder) -> list[Attempt]:
    """All attempts, oldest first. Raises ValueError, naming the file, when something else lies in its place."""
    file = folder.attempts_file
    try:
        return Attempts.validate_json(file.read_bytes())
    except FileNotFoundError:
        return []
    except ValidationError:
        raise ValueError(f"{file} does not list attempts as it should: restore it, or move it away") from None


def begin(folder: RunFolder, flow_run: str) -> Attempt:
    """Records that an attempt begins; one that is still open was cut off, for its process would have closed it."""
    end(folder, "failed", CUT_OFF)
    saved = CheckpointFolder(folder.checkpoints).find(LATEST)
    from_step = saved.sidecar.step if saved else 0
    trained = max((line["step"] for line in folder.metrics() if "loss" in line), default=0)
    attempt = Attempt(flow_run=flow_run, began_at=_now(), from_step=from_step, steps_lost=max(0, trained - from_step))
    _write(folder, [*read(folder), attempt])
    return attempt


def end(folder: RunFolder, outcome: Literal["done", "stopped", "failed"], error: str | None = None) -> None:
    """Closes the open attempt, if there is one."""
    attempts = read(folder)
    if attempts and attempts[-1].outcome == "running":
        closed = attempts[-1].model_copy(update={"outcome": outcome, "error": error, "ended_at": _now()})
        _write(folder, [*attempts[:-1], closed])


def without_progress(folder: RunFolder, flow_run: str) -> list[Attempt]:
    """The last attempts of this flow run that failed with no newer checkpoint, oldest first.

    One that someone stopped is none of them, and does not end the row either.
    """
    saved = CheckpointFolder(folder.checkpoints).find(LATEST)
    step = saved.sidecar.step if saved else 0
    own = [attempt for attempt in read(folder) if attempt.flow_run == flow_run and attempt.outcome != "stopped"]
    row = takewhile(lambda attempt: attempt.outcome == "failed" and attempt.from_step == step, reversed(own))
    return list(row)[::-1]


def describe(attempts: list[Attempt]) -> str:
    """A line an attempt: when it ended, and why."""
    return "\n".join(f"  {attempt.ended_at}, from step {attempt.from_step}: {attempt.error}" for attempt in attempts)


class Starts(Record):
    """How often a flow run was started on the folder without anything new in it, its process killed each time."""

    flow_run: str
    found: str  # what lay there at the start: the newest step, the evaluations
    count: int


def count_start(folder: RunFolder, flow_run: str) -> int:
    """Records that a flow run starts; returns how often in a row it did so and found the same as the time before."""
    saved = CheckpointFolder(folder.checkpoints).find(LATEST)
    found = f"{saved and saved.sidecar.step} {len(list(folder.evaluations.glob('*')))}"
    before = Starts.model_validate_json(folder.starts_file.read_bytes()) if folder.starts_file.exists() else None
    again = before is not None and (before.flow_run, before.found) == (flow_run, found)
    starts = Starts(flow_run=flow_run, found=found, count=before.count + 1 if before and again else 1)
    write_text(folder.starts_file, starts.model_dump_json() + "\n")
    return starts.count


def forget_starts(folder: RunFolder) -> None:
    """To be called when a flow run ends of its own accord, well or not."""
    folder.starts_file.unlink(missing_ok=True)


class Resume(Record):
    """One time that training went on after it had been interrupted."""

    at: str  # UTC, ISO 8601
    step: int
    steps_lost: int
    why: str


def resumes(folder: RunFolder) -> list[Resume]:
    """Every time that an attempt followed one that did not end well, oldest first."""
    return [
        Resume(at=later.began_at, step=later.from_step, steps_lost=later.steps_lost, why=earlier.error or "unknown")
        for earlier, later in pairwise(read(folder))
        if earlier.outcome in ("stopped", "failed")
    ]


def _write(folder: RunFolder, attempts: list[Attempt]) -> None:
    write_text(folder.attempts_file, Attempts.dump_json(attempts, indent=2).decode() + "\n")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
