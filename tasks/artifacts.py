"""What the stages show in the Prefect UI."""

from __future__ import annotations

import contextvars
import hashlib
import re
import threading
import time
from collections.abc import Callable
from uuid import UUID

from prefect.artifacts import create_progress_artifact, create_table_artifact, update_progress_artifact
from prefect.logging import get_run_logger

from gpt2core.attempts import resumes
from gpt2core.run_folder import RunFolder

SECONDS_BETWEEN_UPDATES = 5.0
LONGEST_NAME = 100  # characters of a key
LAST_UPDATE_S = 5.0  # longest wait for the update that ends a stage


def artifact_key(kind: str, name: str) -> str:
    """A key under which the UI keeps an artifact's history: lower-case letters, digits and dashes.

    A name that had to be changed for that has a digest behind it: another may have been changed to the same.
    """
    dashed = re.sub("[^a-z0-9]", "-", name.lower())[-LONGEST_NAME:].strip("-")
    if dashed == name:
        return f"{kind}-{name}"
    return f"{kind}-{dashed}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def show_resumes(folder: RunFolder) -> None:
    """A table of the run's resumes: when, at which step, how many steps were lost, and why."""
    rows = [resume.model_dump() for resume in resumes(folder)]
    name = folder.path.name
    create_table_artifact(rows, key=artifact_key("resumes", name), description=f"Resumes of {name}")


def beside(show: Callable[[], object]) -> threading.Thread:
    """Does it in a thread of its own: with the server away a call takes over a minute, and training shall not wait."""
    logger = get_run_logger()

    def attempt() -> None:
        try:
            show()
        except Exception as error:  # whatever the way to the server throws: the work matters more than its picture
            logger.warning(f"not shown in the UI: {error}")

    # the artifact belongs to the task run that the context names
    thread = threading.Thread(target=contextvars.copy_context().run, args=(attempt,), daemon=True)
    thread.start()
    return thread


class LiveProgress:
    """A progress bar in the UI, updated at a rate the server does not feel; the stage never waits for its updates."""

    def __init__(self, key: str, description: str, every_s: float = SECONDS_BETWEEN_UPDATES) -> None:
        self.key, self.description, self.every_s = key, description, every_s
        self.artifact: UUID | None = None
        self.updated = -every_s
        self._sending: threading.Thread | None = None

    def due(self) -> bool:
        return time.monotonic() - self.updated >= self.every_s and not self.is_sending()

    def is_sending(self) -> bool:
        return self._sending is not None and self._sending.is_alive()

    def show(self, percent: float, description: str) -> None:
        """Sends it on its way; left out when the one before has not arrived yet."""
        if self.is_sending():
            return
        self.updated = time.monotonic()
        self._sending = beside(lambda: self._send(percent, description))

    def finish(self, percent: float, description: str) -> None:
        """The last one, which is worth a short wait."""
        for _ in range(2):
            if self._sending:
                self._sending.join(LAST_UPDATE_S / 2)
            self.show(percent, description)
        assert self._sending
        self._sending.join(LAST_UPDATE_S / 2)

    def _send(self, percent: float, description: str) -> None:
        if self.artifact is None:
            self.artifact = create_progress_artifact(percent, key=self.key, description=description)
        else:
            update_progress_artifact(self.artifact, percent, description)
