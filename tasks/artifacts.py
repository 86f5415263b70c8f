"""What the stages show in the Prefect UI."""

from __future__ import annotations

import time
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger

SECONDS_BETWEEN_UPDATES = 5.0


def artifact_key(kind: str, name: str) -> str:
    """A key under which the UI keeps an artifact's history: lower-case letters, digits and dashes."""
    return f"{kind}-" + "".join(sign if sign.isascii() and sign.isalnum() else "-" for sign in name.lower())


class LiveProgress:
    """A progress bar in the UI, updated at a rate the server does not feel; a server that is away is no error."""

    def __init__(self, key: str, description: str) -> None:
        self.key, self.description = key, description
        self.artifact: UUID | None = None
        self.updated = -SECONDS_BETWEEN_UPDATES

    def due(self) -> bool:
        return time.monotonic() - self.updated >= SECONDS_BETWEEN_UPDATES

    def show(self, percent: float, description: str) -> None:
        try:
            if self.artifact is None:
                self.artifact = create_progress_artifact(percent, key=self.key, description=description)
            else:
                update_progress_artifact(self.artifact, percent, description)
        except Exception as error:  # whatever the way to the server throws: the work matters more than its picture
            get_run_logger().warning(f"progress not shown in the UI: {error}")
        self.updated = time.monotonic()
