"""A folder that one run at a time works in. The kernel frees the lock with its holder, however that one dies."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO

LOCK_FILE = ".lock"  # in a run's folder: of its trainer
FLOW_LOCK_FILE = ".flow.lock"  # in a run's folder: of the flow that works on it, over all its stages


def of_gpu(uuid: str) -> Path:
    """The lock of a GPU, for one user's trainers on this machine. Not in TMPDIR, which may be each job's own."""
    return Path(f"/tmp/gpt2_gpu_{uuid}_{os.getuid()}.lock")


@contextmanager
def hold(
    path: Path, *, shared: bool = False, on_wait: Callable[[str], None] | None = None, what: str | None = None
) -> Iterator[None]:
    """Holds the lock file at `path` for the length of the block, alone or together with others who share it.

    What it guards is the folder that it lies in, or `what`.

    While another process holds it: waits, after a call of `on_wait` with who that is; without `on_wait` raises
    BlockingIOError, which says who that is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, wanted | fcntl.LOCK_NB)
        except BlockingIOError:
            name = _name(file)
            if on_wait is None:
                raise BlockingIOError(f"{what or path.parent} is in use by {name}") from None
            on_wait(name)
            fcntl.flock(file, wanted)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        try:
            yield
        finally:
            if not shared:
                file.truncate(0)


def holder(path: Path) -> str | None:
    """Who holds the lock at `path`, None when nobody does. Looking takes a shared lock for an instant."""
    try:
        with path.open("r", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return _name(file)
    except FileNotFoundError:
        pass
    return None


def _name(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "a process that did not say its name"
