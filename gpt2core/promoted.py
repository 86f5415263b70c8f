"""The promoted models: which one is best, those before it, and every decision about them. No torch in here.

artifacts/best -> promoted/0002_demo_step_000080     switched by renaming a link: readers see the old or the new
artifacts/promoted/0001_demo_step_000040/            the one before, to go back to
artifacts/promoted/history.jsonl                     every decision, one JSON object a line
artifacts/promoted/pending.json                      a switch under way; what a killed one left is put right by the next
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from gpt2core import lock
from gpt2core.launch import tell
from gpt2core.listing import number, show, table
from gpt2core.records import PUBLISHED, Contender, Promotion, Published, published_at
from gpt2core.storage import Location, fsync, join, publish, read_json_lines, write_text

RECORD = "promotion.json"  # in a version's folder: the decision that made it best


class PromotedModels:
    def __init__(self, artifacts_dir: str | Path) -> None:
        self.artifacts = Path(artifacts_dir)
        self.link = self.artifacts / "best"
        self.versions = self.artifacts / "promoted"
        self.history_file = self.versions / "history.jsonl"
        self.pending_file = self.versions / "pending.json"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Alone with them for the length of the block; waits for another promotion. Puts right what a killed one left."""
        if self.link.exists() and not self.link.is_symlink():
            raise ValueError(f"{self.link} is no link into {self.versions}, so it was not promoted: move it away")
        if self.link.is_symlink() and not self.link.exists():
            raise ValueError(
                f"{self.link} leads to {self.link.readlink()}, which is not there: restore it, or remove the link to begin anew"
            )
        with lock.hold(self.versions / lock.LOCK_FILE, on_wait=lambda who: tell(f"{self.versions}: waiting for {who}")):
            self._put_right()
            yield

    def current(self) -> Promotion | None:
        """The record of what is best, None when nothing was promoted yet."""
        return _read(self.link / RECORD) if self.link.exists() else None

    def history(self) -> list[Promotion]:
        """Every decision, the oldest first; what a crash cut short is left out."""
        try:
            return [Promotion.model_validate(line) for line in read_json_lines(self.history_file)]
        except ValidationError:
            raise ValueError(
                f"{self.history_file} has a line that is no decision: restore it or move it away"
            ) from None

    # --- changes, to be made while they are held ---

    def next_version(self, candidate: Contender) -> str:
        number = 1 + max((int(path.name[:4]) for path in self.versions.glob("[0-9][0-9][0-9][0-9]_*")), default=0)
        return f"{number:04d}_{candidate.run_name}_step_{candidate.step:06d}"

    def add(self, decision: Promotion, build: Callable[[Path], None]) -> None:
        """Builds the decision's version beside the others, whole, and makes it best."""
        assert decision.version is not None
        building = self.versions / f".{decision.version}.building"
        build(building)
        write_text(building / RECORD, _to_json(decision))
        write_text(self.pending_file, _to_json(decision))
        building.rename(self.versions / decision.version)
        fsync(self.versions)
        self._switch(decision)

    def roll_back(self) -> Promotion:
        """Makes the version before this one best again. Raises ValueError when there is none."""
        current = self.current()
        if current is None:
            raise ValueError(f"{self.link}: nothing was promoted yet, so there is nothing to go back from")
        if current.replaced is None or current.version is None:
            raise ValueError(f"{self.link} holds the first model that was promoted: there is none before it")
        before = _read(self.versions / current.replaced / RECORD)
        undone = current.candidate
        decision = before.model_copy(
            update={
                "action": "rollback",
                "reason": f"rolled back from {undone.run_name} step {undone.step}",
                "beaten": undone,
                "better_by": None,
                "stderr": None,
                "paired": None,
                "replaced": current.version,
                "decided_at": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        write_text(self.pending_file, _to_json(decision))
        self._switch(decision)
        return decision

    def remember(self, decision: Promotion) -> None:
        """Appends to the history, but for a refusal that only repeats the last decision."""
        last = list(read_json_lines(self.history_file))[-1:]
        repeats = [line["candidate"] for line in last] == [decision.candidate.model_dump()]
        if decision.promoted or not repeats:
            self._append(decision)

    def _switch(self, decision: Promotion) -> None:
        assert decision.version is not None
        link = self.artifacts / ".best.new"
        link.unlink(missing_ok=True)
        link.symlink_to(Path("promoted") / decision.version)
        link.replace(self.link)
        fsync(self.artifacts)
        self._append(decision)
        self.pending_file.unlink()

    def _append(self, decision: Promotion) -> None:
        with self.history_file.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # cut short by a crash
                    file.write(b"\n")
            file.write(decision.model_dump_json().encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _put_right(self) -> None:
        """Ends or undoes the switch that a killed process had begun, and removes what it was building."""
        for stray in self.versions.glob(".[0-9]*.building"):
            shutil.rmtree(stray)
        if not self.pending_file.exists():
            return
        pending = _read(self.pending_file)
        assert pending.version is not None
        if self.link.is_symlink() and self.link.readlink().name == pending.version:
            if self.history()[-1:] != [pending]:
                self._append(pending)
        elif pending.action == "promote":
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(self.versions / pending.version)
        self.pending_file.unlink()

    # --- elsewhere ---

    def publish(self, location: Location) -> str:
        """Copies what is best to a path or URL, unless it lies there already, and says in a line what was done.

        The folder goes first and best.json, which names it, last: readers see the old model or the new one.
        """
        current = self.current()
        if current is None:
            raise ValueError(f"{self.link}: nothing was promoted yet, so there is nothing to publish")
        # other promoters may publish to the same place, and number theirs alike
        digest = hashlib.sha256((self.link / RECORD).read_bytes()).hexdigest()[:8]
        folder = f"{self.link.readlink().name}_{digest}"
        there = published_at(location)
        if there and there.folder == folder:
            return f"published already: {join(location, folder)}"
        for path in sorted(self.link.iterdir()):
            with path.open("rb") as source, publish(join(join(location, folder), path.name)) as copy:
                shutil.copyfileobj(source, copy, 16 << 20)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        pointer = Published(folder=folder, candidate=current.candidate, published_at=now)
        write_text(join(location, PUBLISHED), pointer.model_dump_json(indent=2) + "\n")
        return f"published: {join(location, folder)}"


def _read(file: Path) -> Promotion:
    try:
        return Promotion.model_validate_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file} is not there: restore it") from None
    except (ValidationError, UnicodeDecodeError):
        raise ValueError(f"{file} is no promotion record: restore it, or move its folder away") from None


def _to_json(decision: Promotion) -> str:
    return decision.model_dump_json(indent=2) + "\n"


def print_history(models: PromotedModels) -> None:
    """Every decision as a table; the version that is best now is marked."""
    decisions, current = models.history(), models.current()
    if not decisions:
        print(f"{models.history_file}: nothing was decided yet")
        return
    rows = [
        (
            decision.decided_at[:19].replace("T", " "),
            "rolled back to" if decision.action == "rollback" else "promoted" if decision.promoted else "kept",
            f"{found.run_name} {found.step}",
            number(found.val_loss),
            number(found.number("acc_norm")),
            decision.rule,
            decision.beaten and f"{decision.beaten.run_name} {decision.beaten.step}",
            number(decision.better_by),
            decision.version and decision.version[:4],
        )
        for decision in decisions
        for found in [decision.candidate]
    ]
    columns = (
        "decided at (UTC)",
        "decision",
        "run, step",
        "val loss",
        "acc_norm",
        "rule",
        "against",
        "better by",
        "no.",
    )
    show(table(str(models.history_file), columns, rows))
    best = models.link.readlink().name if current else "nothing"
    print(f"best is {best}")
