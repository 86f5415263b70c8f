"""A folder that one run at a time works in, a GPU that one process has. The kernel frees a lock with its holder, however
that one dies.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Literal

from gpt2core import heartbeat
from gpt2core.launch import tell

LOCK_FILE = ".lock"  # in a run's folder: of its trainer
FLOW_LOCK_FILE = ".flow.lock"  # in a run's folder: of the flow that works on it, over all its stages
SECONDS_BETWEEN_LOOKS = 0.5

IfBusy = Literal["wait", "cpu", "refuse"]  # what an evaluation does while others have the GPUs
WAITING = "WARNING: waiting for a GPU: "  # begins the line that says for whom


def of_gpu(uuid: str) -> Path:
    """The lock of a GPU, for one user's trainers and evaluations on this machine. Not in TMPDIR, which may be each job's own,
    and not by number: CUDA_VISIBLE_DEVICES may change that."""
    return Path(f"/tmp/gpt2_gpu_{uuid}_{os.getuid()}.lock")


@contextmanager
def hold(
    path: Path,
    *,
    shared: bool = False,
    on_wait: Callable[[str], None] | None = None,
    what: str | None = None,
    doing: str = "",
) -> Iterator[None]:
    """Holds the lock file at `path` for the length of the block, alone or together with others who share it.

    What it guards is the folder that it lies in, or `what`; others are told who has it, and that it is `doing` something.

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
        since = f"since {datetime.now():%Y-%m-%d %H:%M:%S}"
        file.write(f"process {os.getpid()} on {socket.gethostname()} {since}{doing and f' ({doing})'}\n")
        file.flush()
        try:
            yield
        finally:
            if not shared:
                file.truncate(0)


@contextmanager
def hold_first(
    locks: Mapping[str, Path], *, on_wait: Callable[[str], None] | None = None, doing: str = ""
) -> Iterator[str]:
    """Holds the first of these locks that is free, alone, and gives the name of what it guards.

    While none is: waits, after a call of `on_wait` with who has them, and another when that changes; without `on_wait`
    raises BlockingIOError, which says who that is.
    """
    told = ""
    with ExitStack() as held:
        while True:
            refusals = []
            for what, path in locks.items():
                try:
                    held.enter_context(hold(path, what=what, doing=doing))
                except BlockingIOError as error:
                    refusals.append(str(error))
                else:
                    yield what
                    return
            if on_wait is None:
                raise BlockingIOError("; ".join(refusals))
            if told != (told := "; ".join(refusals)):
                on_wait(told)
            heartbeat.beat()  # to wait is no hang
            time.sleep(SECONDS_BETWEEN_LOOKS)


def take_gpu(uuids: list[str], if_busy: IfBusy, held: ExitStack, doing: str) -> int | None:
    """Takes the lock of the first GPU that is free, and returns its place in the list; None for the CPU.

    Raises BlockingIOError, saying who has them, when none is free and that is to be refused.
    """
    locks = {f"GPU {uuid}": of_gpu(uuid) for uuid in uuids}

    def say(who: str) -> None:
        tell(WAITING + who)

    try:
        taken = held.enter_context(hold_first(locks, on_wait=say if if_busy == "wait" else None, doing=doing))
    except BlockingIOError as error:
        if if_busy == "refuse":
            raise
        tell(f"WARNING: computing on the CPU, for {error}")
        return None
    return [*locks].index(taken)


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
