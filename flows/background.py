"""Processes that outlive the command that started them. Each holds the lock of its own file, which names it.

The kernel frees the lock with the process, so a file that a crash or a reboot left says nothing wrong, and a process id
that another process has got since is never taken for ours.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

GRACE_S = 30.0  # between SIGTERM and SIGKILL


@dataclass(frozen=True)
class Running:
    """A process as it was started."""

    pid: int
    command: list[str]
    remark: str


@dataclass(frozen=True)
class Background:
    """One process to be: what it is called, how it is started, and where its lock and log files lie."""

    name: str
    command: list[str]
    folder: Path  # to start it in
    state_dir: Path
    settings: dict[str, str] = field(default_factory=dict)  # environment variables on top of this process's
    without: frozenset[str] = frozenset()  # variables of this process that it does not get
    remark: str = ""  # what else tells one start from another, such as the database; no secret

    @property
    def lock_file(self) -> Path:
        return self.state_dir / f"{self.name}.pid"

    @property
    def log_file(self) -> Path:
        return self.state_dir / f"{self.name}.log"

    def start(self) -> subprocess.Popen[bytes]:
        """Starts it. Raises ValueError when it runs already."""
        with self.lock_file.open("a+", encoding="utf-8") as lock, self.log_file.open("ab") as log:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f"the {self.name} is being started by another command") from None
            lock.truncate(0)
            process = subprocess.Popen(
                self.command,
                cwd=self.folder,
                env={name: value for name, value in os.environ.items() if name not in self.without} | self.settings,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl+C in this terminal is not meant for it
                pass_fds=[lock.fileno()],  # with which it holds the lock
            )
            json.dump({"pid": process.pid, "command": self.command, "remark": self.remark}, lock)
        return process

    def running(self) -> Running | None:
        """The one that runs."""
        with suppress(FileNotFoundError), self.lock_file.open("r", encoding="utf-8") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if said := lock.read():
                    return Running(**json.loads(said))
                raise ValueError(f"the {self.name} is being started by another command") from None
        return None

    def stop(self) -> int | None:
        """Ends it, by SIGKILL when SIGTERM does not within GRACE_S; returns its process id, None when it did not run."""
        if (found := self.running()) is None:
            return None
        pid = found.pid
        with self.lock_file.open("r+", encoding="utf-8") as lock, suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
            insist = threading.Timer(GRACE_S, os.kill, (pid, signal.SIGKILL))
            insist.start()
            fcntl.flock(lock, fcntl.LOCK_EX)  # waits for its end
            insist.cancel()
        return pid

    def last_started(self) -> Running | None:
        """The one that was started last, whether it runs or not."""
        with suppress(FileNotFoundError, ValueError, TypeError):  # a file that another version or a crash left
            return Running(**json.loads(self.lock_file.read_text(encoding="utf-8")))
        return None
