"""The checkpoint folder of a run: the user's tiers, one write under several names, sidecars as commit marks. No torch.

    latest.pt            to resume                      rolling_step_XXXXXX.pt   the last `keep` of them
    latest_backup.pt     the one before                 epoch_XXXXX.pt           the end of each epoch
    best_model.pt        lowest validation loss         <name>.json              sidecar, written last

The folder is a path or an fsspec URL. A name counts only when its sidecar matches the file. A commit writes one new file,
makes it durable, and then gives it its further names (hard links, or copies on the server), each of which loses its
sidecar before it moves and gets the new one after: at any moment of a crash at least one older or newer state is whole.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gpt2core.storage import (
    Location,
    alias,
    fetched,
    file_sizes,
    is_remote,
    is_running,
    join,
    local_path,
    publish,
    read_text,
    remove,
    size,
    write_text,
)

FORMAT = 1
LATEST, BACKUP, BEST = "latest", "latest_backup", "best_model"
ROLLING = re.compile(r"^rolling_step_(\d+)\.pt$")


def rolling_name(step: int) -> str:
    return f"rolling_step_{step:06d}"


def epoch_name(epoch: int) -> str:
    """Name of the checkpoint at the end of this epoch, counted from 1."""
    return f"epoch_{epoch:05d}"


class Summary(BaseModel):
    """What a checkpoint is, readable without torch."""

    model_config = ConfigDict(frozen=True)  # a newer version's further fields are no reason to distrust a file

    step: int
    epoch: int  # finished epochs
    steps_per_epoch: int | None = None
    train_loss: float | None
    val_loss: float | None
    best_val_loss: float | None = None
    tokens_seen: int | None = None
    train_seconds: float | None = None  # spent on training steps so far, over all attempts
    config_sha256: str | None = None
    torch_version: str | None = None

    @property
    def epochs_done(self) -> float:
        """Epochs and parts of one; infinite where an older version did not write how long one is."""
        return self.step / self.steps_per_epoch if self.steps_per_epoch else math.inf


class Sidecar(Summary):
    """The summary with the mark that the file is whole."""

    format: int = FORMAT
    bytes: int
    sha256: str
    saved_at: str  # UTC, ISO 8601
    save: int = 0  # number of the save in this folder: what is newest, also after training went back to an older step


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: the path or URL of its file, and its sidecar."""

    location: str
    sidecar: Sidecar

    @property
    def name(self) -> str:
        return Path(self.location).stem


class CheckpointFolder:
    def __init__(self, location: Location) -> None:
        self.location = str(location)
        self._saves: int | None = None  # so far, once known
        self._own: set[str] = set()  # hashes of what was written here by us, or read back and found right

    def commit(
        self, write: Callable[[IO[bytes]], object], summary: Summary, *, names: list[str], keep: int
    ) -> Checkpoint:
        """Takes the content from `write`, once, and gives it its rolling name, `latest` and the further `names`.

        Rolling checkpoints beyond `keep` are removed. An OSError, such as a full disk, leaves the older ones as they
        were.
        """
        saved = self.commit_alone(write, summary, rolling_name(summary.step))
        latest = self.find(LATEST)
        if latest and latest.sidecar.step != summary.step and self._is_right(latest):
            self._point(BACKUP, latest)
        self._own = {saved.sidecar.sha256}
        for name in [LATEST, *names]:
            self._point(name, saved)
        self.prune(keep, spare=saved.name)
        return saved

    def commit_alone(self, write: Callable[[IO[bytes]], object], summary: Summary, name: str) -> Checkpoint:
        """Takes the content from `write` and gives it this one name."""
        location = self.file(name)
        with publish(location) as file:
            hashing = _HashingWriter(file)
            try:
                write(hashing)  # type: ignore[arg-type]
            except RuntimeError:  # torch's writer covers a full disk with an error of its own
                raise hashing.error or RuntimeError(f"{location} could not be written") from None
            remove(_sidecar_of(location))  # of the same step, when it is trained and saved again
        sidecar = Sidecar(
            **summary.model_dump(include=set(Summary.model_fields)),
            bytes=hashing.num_bytes,
            sha256=hashing.hexdigest(),
            saved_at=datetime.now(UTC).isoformat(timespec="seconds"),
            save=self._next_save(),
        )
        saved = Checkpoint(location, sidecar)
        _write_sidecar(saved)
        return saved

    def _next_save(self) -> int:
        if self._saves is None:
            self._saves = max((checkpoint.sidecar.save for checkpoint in self.all()), default=0)
        self._saves += 1
        return self._saves

    def _is_right(self, checkpoint: Checkpoint) -> bool:
        """Whether the content has the sidecar's hash: a latest.pt that went bad must not take the place of its backup."""
        wanted = checkpoint.sidecar.sha256
        if wanted in self._own:
            return True
        with fetched(checkpoint.location) as here, here.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == wanted

    def check_writable(self) -> None:
        """Raises OSError or, of remote storage, ValueError when nothing can be written here."""
        probe = join(self.location, f".writable.{socket.gethostname()}.{os.getpid()}.tmp")
        write_text(probe, "")
        remove(probe)

    def find(self, name: str) -> Checkpoint | None:
        """The checkpoint of this name if it is committed: its sidecar is there and the file has its size."""
        if "/" in name:  # a path, and perhaps into another run's folder
            return None
        location = self.file(name)
        try:
            sidecar = Sidecar.model_validate_json(read_text(_sidecar_of(location)))
            whole = size(location) == sidecar.bytes
        except (FileNotFoundError, ValidationError, UnicodeDecodeError):
            return None
        return Checkpoint(location, sidecar) if whole else None

    def all(self) -> list[Checkpoint]:
        """Every committed checkpoint, the one saved last first."""
        found = [checkpoint for name in self.names() if (checkpoint := self.find(name))]
        return sorted(found, key=lambda found: (-found.sidecar.save, -found.sidecar.step, found.name))

    def names(self) -> list[str]:
        """Names of all checkpoint files, whole or not."""
        return sorted(name.removesuffix(".pt") for name in file_sizes(self.location) if name.endswith(".pt"))

    def disk_bytes(self) -> int:
        """Bytes that the checkpoints take; names of one file count once."""
        sizes = {name: count for name, count in file_sizes(self.location).items() if name.endswith(".pt")}
        if is_remote(self.location):
            return sum(sizes.values())
        folder, by_file = local_path(self.location), {}
        for name in sizes:
            try:
                stat = (folder / name).stat()
            except FileNotFoundError:  # a trainer may remove it just now
                continue
            by_file[stat.st_ino] = stat.st_size
        return sum(by_file.values())

    def file(self, name: str) -> str:
        return join(self.location, f"{name}.pt")

    def prune(self, keep: int, spare: str | None = None) -> list[str]:
        """Removes rolling checkpoints but the `keep` saved last and `spare`, and what killed processes left; returns the
        names of the files that went."""
        steps = {name: int(match[1]) for name in file_sizes(self.location) if (match := ROLLING.match(name))}
        saves = {f"{checkpoint.name}.pt": checkpoint.sidecar.save for checkpoint in self.all()}
        in_order = sorted(steps, key=lambda name: (saves.get(name, 0), steps[name]))
        removed = [name for name in in_order[:-keep] if name != f"{spare}.pt"]
        for name in removed:
            remove(_sidecar_of(join(self.location, name)))
            remove(join(self.location, name))
        return removed + self._remove_strays()

    def _remove_strays(self) -> list[str]:
        if is_remote(self.location):
            return []
        strays = [path for path in local_path(self.location).glob(".*.tmp") if not _writer_lives(path)]
        for stray in strays:
            stray.unlink(missing_ok=True)
        return [stray.name for stray in strays]

    def _point(self, name: str, checkpoint: Checkpoint) -> None:
        """Makes `name` the same file as the checkpoint, never to be taken for whole with another file's sidecar."""
        location = self.file(name)
        remove(_sidecar_of(location))
        alias(checkpoint.location, location)
        _write_sidecar(Checkpoint(location, checkpoint.sidecar))


def sidecar_beside(location: str) -> Sidecar | None:
    """The sidecar of a checkpoint file wherever it lies, None when there is none."""
    try:
        return Sidecar.model_validate_json(read_text(_sidecar_of(location)))
    except (FileNotFoundError, ValidationError, UnicodeDecodeError):
        return None


def _sidecar_of(location: str) -> str:
    return location.removesuffix(".pt") + ".json"


def _write_sidecar(checkpoint: Checkpoint) -> None:
    write_text(_sidecar_of(checkpoint.location), checkpoint.sidecar.model_dump_json(indent=2) + "\n")


def _writer_lives(temporary: Path) -> bool:
    """Whether another process writes it. What has our own process id is of one before us, as in a container."""
    match = re.search(r"\.(\d+)\.tmp$", temporary.name)
    return match is not None and int(match[1]) != os.getpid() and is_running(int(match[1]))


class _HashingWriter:
    """Passes writes on to a file, hashes and counts them on the way."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._hash = hashlib.sha256()
        self.num_bytes = 0
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        self._hash.update(data)
        try:
            written = self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.num_bytes += written
        return written

    def flush(self) -> None:
        self._file.flush()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
