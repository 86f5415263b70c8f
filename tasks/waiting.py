"""One trainer at a time in a run's folder and on a GPU; who must wait says for what, in its log and its state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.exceptions import TerminationSignal
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Cancelled, Running

from gpt2core import attempts, heartbeat, lock
from gpt2core.launch import GRACE_S
from gpt2core.lock import WAITING
from gpt2core.log_line import short_duration
from gpt2core.processes import Process, kill
from gpt2core.run_folder import RunFolder
from gpt2core.status import find_runs

SECONDS_BETWEEN_LOOKS = 1.0
MAX_STARTS = 10  # of one flow run, killed each time, with nothing new in the run's folder


@contextmanager
def run_held(artifacts_dir: str, run_name: str) -> Iterator[None]:
    """Has the run's folder for this flow alone for the length of the block; waits while another flow has it.

    The kernel frees the lock when this process dies: that is how the reaper knows.
    """
    folder = RunFolder(artifacts_dir, run_name)
    waited = False

    def on_wait(holder: str) -> None:
        nonlocal waited
        waited = True
        _say_waiting(f"{folder.path} is in use by the flow of {holder}")

    try:
        with lock.hold(folder.path / lock.FLOW_LOCK_FILE, on_wait=on_wait):
            if waited:
                _say_going_on()
            _refuse_when_killed_too_often(folder)
            try:
                yield
            finally:  # which a kill leaves out
                attempts.forget_starts(folder)
    except TerminationSignal:
        _say_cancelled()
        raise


def _refuse_when_killed_too_often(folder: RunFolder) -> None:
    """Raises ValueError when this flow run was killed again and again and nothing came of it. Kills in training count as
    attempts, too, and have a lower bound of their own."""
    starts = attempts.count_start(folder, str(flow_run.id or ""))
    if flow_run.id and starts > MAX_STARTS:
        attempts.forget_starts(folder)  # a retry by hand has all its starts before it
        raise ValueError(
            f"given up: this flow run was killed {starts - 1} times in a row without a new checkpoint or evaluation in "
            f"{folder.path}; the worker's log and the kernel's (out of memory?) may say why"
        )


def wait_for_start(folder: RunFolder, longest_s: float) -> None:
    """Returns when the run's leading flow has begun it, which is when its config.json is there.

    Raises ValueError, naming the runs that there are, when that takes longer than so many seconds.
    """
    started, told = time.monotonic(), ""
    while not folder.config_file.exists():
        why = _why_not_begun(folder)
        if time.monotonic() - started >= longest_s:
            waited = f"waited {short_duration(longest_s)} for its start"
            raise ValueError(f"{why}; {waited}: give the run_name and artifacts_dir of the flow that leads it")
        if why != told:
            _say_waiting(f"{why}; waiting up to {short_duration(longest_s)} for its start")
            told = why
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if told:
        _say_going_on()


def refuse_when_left(folder: RunFolder, longest_s: float, joined_at: datetime) -> None:
    """Raises ValueError when the run's leading flow has had no attempt under way for so many seconds since it was joined."""
    every = attempts.read(folder)
    if not every or every[-1].outcome == "running" or not every[-1].ended_at:
        return
    idle_s = (datetime.now(UTC) - max(joined_at, datetime.fromisoformat(every[-1].ended_at))).total_seconds()
    if idle_s >= longest_s:
        last = f"the last one ended at {every[-1].ended_at}: {every[-1].outcome}"
        raise ValueError(
            f"the flow that leads {folder.path} has begun no attempt at training for {short_duration(idle_s)} ({last}"
            f"{f', {every[-1].error}' if every[-1].error else ''}): start it again, and join-training with it"
        )


def _why_not_begun(folder: RunFolder) -> str:
    if folder.path.exists():
        return f"{folder.path} has no {folder.config_file.name} yet"
    artifacts = folder.path.parent
    if not artifacts.is_dir():
        return f"there is no run {folder.path.name}, nor a folder {artifacts}"
    there = ", ".join(run.path.name for run in find_runs(artifacts))
    return f"there is no run {folder.path.name} in {artifacts} (there are: {there or 'none'})"


def wait_for_trainers(folder: RunFolder, gpus: list[str]) -> None:
    """Returns when no other trainer has the run's folder or one of these GPUs.

    Ranks of an earlier attempt that outlive what started them are saving; they get as long as after a SIGTERM, and are
    killed then.
    """
    started, told = time.monotonic(), ""
    while why := _in_use(folder, gpus):
        if why != told:
            _say_waiting(why)
            told = why
        if (orphans := _orphans(folder)) and time.monotonic() - started > GRACE_S:
            get_run_logger().warning(f"killing ranks that an earlier attempt left: {[one.pid for one in orphans]}")
            kill(orphans)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    if told:
        _say_going_on()


def _in_use(folder: RunFolder, gpus: list[str]) -> str | None:
    locks: dict[str, Path] = {str(folder.path): folder.path / lock.LOCK_FILE}
    locks |= {f"GPU {uuid}": lock.of_gpu(uuid) for uuid in gpus}
    for what, path in locks.items():
        if holder := lock.holder(path):
            return f"{what} is in use by {holder}"
    if orphans := _orphans(folder):
        return f"an earlier attempt at {folder.path} still has process {orphans[0].pid}"
    return None


def _orphans(folder: RunFolder) -> list[Process]:
    trainer = heartbeat.read(folder.heartbeat_file)
    return trainer.orphans() if trainer else []


class QueueShown:
    """The flow run's state while a stage's process waits for a GPU, out of the lines that it prints."""

    def __init__(self) -> None:
        self._is_queued = False

    def look(self, line: str) -> None:
        if line.startswith(WAITING):
            _name_state("Queued", f"Waits: {line.removeprefix(WAITING)}.")
        elif self._is_queued:
            _name_state("Running", "")
        self._is_queued = line.startswith(WAITING)


def _say_waiting(why: str) -> None:
    get_run_logger().warning(f"queued: {why}")
    _name_state("Queued", f"Waits: {why}.")


def _say_going_on() -> None:
    get_run_logger().info("no longer queued")
    _name_state("Running", "")


def _say_cancelled() -> None:
    """Ends a cancel as soon as all is saved. The worker says the same, but seconds later: it looks for the end of this
    process every three, and then for hooks."""
    if not flow_run.id:
        return
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(flow_run.id).state
            if state and state.is_cancelling():
                client.set_flow_run_state(flow_run.id, Cancelled(message="Cancelled, and its processes have ended."))
    except Exception as error:
        get_run_logger().warning(f"the end of the cancel is left to the worker: {error}")


def _name_state(name: str, message: str) -> None:
    if not flow_run.id:
        return
    try:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(flow_run.id, Running(name=name, message=message))
    except Exception as error:  # whatever the way to the server throws: the log has said it
        get_run_logger().warning(f"state not shown in the UI: {error}")
