"""What the stages show in the Prefect UI."""

from __future__ import annotations

import time
from contextvars import copy_context
from threading import Thread
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

SECONDS_BETWEEN_UPDATES = 5.0
LAST_UPDATE_S = 5.0


def artifact_key(kind: str, name: str) -> str:
    """A key under which the UI keeps an artifact's history: lower-case letters, digits and dashes."""
    return f"{kind}-" + "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in name.lower())


class LiveProgress:
    """A progress bar in the UI, updated at a rate the server does not feel.

    A thread talks to the server: one that is slow or away costs the stage nothing but the picture.
    """

    def __init__(self, key: str, description: str) -> None:
        self.key, self.description = key, description
        self.artifact: UUID | None = None
        self.updated = -SECONDS_BETWEEN_UPDATES
        self._sending: Thread | None = None

    def due(self) -> bool:
        return time.monotonic() - self.updated >= SECONDS_BETWEEN_UPDATES and not self.is_sending()

    def is_sending(self) -> bool:
        return self._sending is not None and self._sending.is_alive()

    def show(self, percent: float, description: str) -> None:
        """Sends it on its way; left out when the one before has not arrived yet."""
        if self.is_sending():
            return
        self.updated = time.monotonic()
        in_this_run = copy_context().run  # the artifact belongs to the task run that the context names
        self._sending = Thread(target=in_this_run, args=(self._send, percent, description), daemon=True)
        self._sending.start()

    def finish(self, percent: float, description: str) -> None:
        """The last one, which is worth a short wait."""
        for _ in range(2):
            if self._sending:
                self._sending.join(LAST_UPDATE_S / 2)
            self.show(percent, description)
        assert self._sending
        self._sending.join(LAST_UPDATE_S / 2)

    def _send(self, percent: float, description: str) -> None:
        try:
            if self.artifact is None:
                self.artifact = create_progress_artifact(percent, key=self.key, description=description)
            else:
                update_progress_artifact(self.artifact, percent, description)
        except Exception as error:  # whatever the way to the server throws: the work matters more than its picture
            get_run_logger().warning(f"progress not shown in the UI: {error}")
