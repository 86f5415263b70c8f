"""The checkpoint folder of a run: the user's tiers, one write linked to each name, sidecars as commit marks. No torch.

    latest.pt            to resume                      rolling_step_XXXXXX.pt   the last `keep` of them
    latest_backup.pt     the one before                 epoch_XXXXX.pt           the end of each epoch
    best_model.pt        lowest validation loss         <name>.json              sidecar, written last

A name counts only when its sidecar matches the file. A commit writes one new file, makes it durable, and then moves each
name to it by rename, so at any moment of a crash at least one older or newer state is whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gpt2core.storage import fsync_folder, publish, write_text

FORMAT = 1
LATEST, BACKUP, BEST = "latest", "latest_backup", "best_model"


def rolling_name(step: int) -> str:
    return f"rolling_step_{step:06d}"


def epoch_name(epoch: int) -> str:
    """Name of the checkpoint at the end of this epoch, counted from 1."""
    return f"epoch_{epoch:05d}"


class Sidecar(BaseModel):
    """What a checkpoint is, readable without torch, and the mark that it is whole."""

    model_config = ConfigDict(frozen=True)  # a newer version's further fields are no reason to distrust a file

    format: int = FORMAT
    step: int
    epoch: int  # finished epochs
    train_loss: float | None
    val_loss: float | None
    bytes: int
    sha256: str
    saved_at: str  # UTC, ISO 8601


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its file and its sidecar."""

    path: Path
    sidecar: Sidecar

    @property
    def name(self) -> str:
        return self.path.stem


class CheckpointFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def commit(
        self,
        write: Callable[[IO[bytes]], object],
        *,
        step: int,
        epoch: int,
        train_loss: float | None,
        val_loss: float | None,
        names: list[str],
        keep: int,
    ) -> Checkpoint:
        """Takes the content from `write`, once, and gives it its rolling name, `latest` and the further `names`.

        Rolling checkpoints beyond `keep` are removed. An OSError, such as a full disk, leaves the older ones as they
        were.
        """
        rolling = self.file(rolling_name(step))
        with publish(rolling) as file:
            hashing = _HashingWriter(file)
            try:
                write(hashing)  # type: ignore[arg-type]
            except RuntimeError:  # torch's writer covers a full disk with an error of its own
                raise hashing.error or RuntimeError(f"{rolling} could not be written") from None
        sidecar = Sidecar(
            step=step,
            epoch=epoch,
            train_loss=train_loss,
            val_loss=val_loss,
            bytes=rolling.stat().st_size,
            sha256=hashing.hexdigest(),
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        saved = Checkpoint(rolling, sidecar)
        _write_sidecar(saved)
        if (latest := self.find(LATEST)) and latest.sidecar.step != step:
            self._point(BACKUP, latest)
        for name in [LATEST, *names]:
            self._point(name, saved)
        self.prune(keep, spare=rolling)
        return saved

    def find(self, name: str) -> Checkpoint | None:
        """The checkpoint of this name if it is committed: its sidecar is there and the file has its size."""
        path = self.file(name)
        try:
            sidecar = Sidecar.model_validate_json(path.with_suffix(".json").read_text(encoding="utf-8"))
            whole = path.stat().st_size == sidecar.bytes
        except (FileNotFoundError, ValidationError):
            return None
        return Checkpoint(path, sidecar) if whole else None

    def all(self) -> list[Checkpoint]:
        """Every committed checkpoint, newest step first."""
        found = [checkpoint for path in self.path.glob("*.pt") if (checkpoint := self.find(path.stem))]
        return sorted(found, key=lambda checkpoint: (-checkpoint.sidecar.step, checkpoint.name))

    def has_any(self) -> bool:
        """Whether any checkpoint file lies here, whole or not."""
        return any(self.path.glob("*.pt"))

    def disk_bytes(self) -> int:
        """Bytes that the checkpoints take; names of one file count once."""
        sizes = {}
        for path in self.path.glob("*.pt"):
            with contextlib.suppress(FileNotFoundError):  # a trainer may remove it just now
                sizes[path.stat().st_ino] = path.stat().st_size
        return sum(sizes.values())

    def file(self, name: str) -> Path:
        return self.path / f"{name}.pt"

    def prune(self, keep: int, spare: Path | None = None) -> list[Path]:
        """Removes rolling checkpoints but the newest `keep` and `spare`, and what killed processes left; returns what
        went."""
        by_step = sorted(self.path.glob("rolling_step_*.pt"), key=lambda path: int(path.stem.rpartition("_")[2]))
        removed = [path for path in by_step[:-keep] if path != spare]
        for path in removed:
            path.with_suffix(".json").unlink(missing_ok=True)
            path.unlink()
        strays = [stray for stray in self.path.glob(".*.tmp") if not _writer_lives(stray)]
        for stray in strays:
            stray.unlink(missing_ok=True)
        fsync_folder(self.path)
        return removed + strays

    def _point(self, name: str, checkpoint: Checkpoint) -> None:
        """Makes `name` the same file as the checkpoint: a hard link, put in place by rename."""
        target = self.file(name)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        os.link(checkpoint.path, temporary)
        temporary.replace(target)
        _write_sidecar(Checkpoint(target, checkpoint.sidecar))


def _write_sidecar(checkpoint: Checkpoint) -> None:
    write_text(checkpoint.path.with_suffix(".json"), checkpoint.sidecar.model_dump_json(indent=2) + "\n")


def _writer_lives(temporary: Path) -> bool:
    match = re.search(r"\.(\d+)\.tmp$", temporary.name)
    return match is not None and Path(f"/proc/{match[1]}").exists()


class _HashingWriter:
    """Passes writes on to a file and hashes them on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._hash.update(data)
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
