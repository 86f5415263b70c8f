"""How each start of the trainer went, read off log.txt: a run that no pipeline started has no attempts.json."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from itertools import pairwise

from gpt2core.attempts import CUT_OFF, Resume
from gpt2core.log_line import ENDED_BY, parse
from gpt2core.records import Record
from gpt2core.run_folder import RunFolder

LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (.*)")
BEGIN = re.compile(
    r"resumed from .* at step (?P<step>\d+) of \d+|(no checkpoint in .* yet: )?starting (afresh|from the weights in )"
)
STOPPED = re.compile(r"(\w+|a signal to another rank): saved at step \d+")
END = re.compile(r"at step \d+ of \d+$")


class Start(Record):
    """One start of the trainer, as far as log.txt tells."""

    at: str  # UTC, ISO 8601
    from_step: int
    last_step: int  # the highest that was logged
    has_ended: bool = False
    error: str | None = None  # why it ended before it was done

    @property
    def failure(self) -> str | None:
        """Why it ended before it was done; of one that still runs, what is to be said when it is gone."""
        return self.error or (None if self.has_ended else CUT_OFF)


def starts(folder: RunFolder) -> list[Start]:
    """All starts of the trainer, oldest first."""
    found: list[Start] = []
    if not folder.log_file.exists():
        return found
    with folder.log_file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if not (match := LINE.match(line)):
                continue
            moment, said = match.groups()
            if begin := BEGIN.match(said):
                at = datetime.fromisoformat(moment).astimezone(UTC).isoformat(timespec="seconds")
                step = int(begin["step"] or 0)
                found.append(Start(at=at, from_step=step, last_step=step))
            elif found and (changes := _changes(said, found[-1].last_step)):
                found[-1] = found[-1].model_copy(update=changes)
    return found


def _changes(said: str, last_step: int) -> dict[str, object]:
    """What a line says of the start that wrote it."""
    if said.startswith("step="):
        return {"last_step": max(last_step, int(parse(said).get("step", 0)))} if " loss=" in said else {}
    if said.startswith(ENDED_BY):
        return {"has_ended": True, "error": said.removeprefix(ENDED_BY)}
    if stopped := STOPPED.match(said):
        return {"has_ended": True, "error": f"it was told to stop ({stopped[1]})"}
    return {"has_ended": True} if END.match(said) else {}


def resumes(every: list[Start]) -> list[Resume]:
    """Every time that a start went on after one that had ended before it was done, oldest first."""
    return [
        Resume(
            at=later.at,
            step=later.from_step,
            steps_lost=max(0, earlier.last_step - later.from_step),
            why=earlier.failure,
        )
        for earlier, later in pairwise(every)
        if earlier.failure
    ]
