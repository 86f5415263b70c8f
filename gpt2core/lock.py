"""A folder that one run at a time works in. The kernel frees the lock with its holder, however that one dies."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

LOCK_FILE = ".lock"


@contextmanager
def hold(path: Path, *, shared: bool = False, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Holds the lock file at `path` for the length of the block, alone or together with others who share it.

    While another process holds it: waits, after a call of `on_wait` with who that is; without `on_wait` raises
    BlockingIOError, which says who that is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, wanted | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "a process that did not say its name"
            if on_wait is None:
                raise BlockingIOError(f"{path.parent} is in use by {holder}") from None
            on_wait(holder)
            fcntl.flock(file, wanted)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        file.flush()
        try:
            yield
        finally:
            if not shared:
                file.truncate(0)
