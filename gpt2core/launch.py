"""Starts training processes and owns their death: torchrun for several, plain python for one.

What is started here gets SIGTERM when the process that started it dies, so none is left holding a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, Literal

from gpt2core import terminal
from gpt2core.processes import descendants, kill

if TYPE_CHECKING:
    from gpt2core.watchdog import Watchdog

STARTED_BY = "GPT2_STARTED_BY"  # process id of the launcher, for die_with_parent
PR_SET_PDEATHSIG = 1  # linux/prctl.h
SECONDS_BETWEEN_LOOKS = 1.0  # for the parent, where the kernel does not tell
GRACE_S = 120.0  # time to end the step and save a checkpoint after SIGTERM, before SIGKILL; a step may take a minute
TORCHRUN_GRACE_S = 110  # the same, for the ranks under torchrun: it must have time left to kill those that hang
# When a rank dies, the others wait for it: under gloo they get an error, in NCCL they hang. torchrun gives them 30 s to
# end; so much is enough for rank 0 to finish the checkpoint that it may be writing.
GRACE_AFTER_FAILURE_S = 5

# glibc gives big blocks back to the kernel and faults them in anew each time; the logits of every micro-step are such
# blocks, and on the CPU that took nearly half the time (tests/benchmarks/cpu_malloc.py).
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(8 << 30), "MALLOC_TOP_PAD_": str(256 << 20)}

FIRST_TO_FAIL = "the first rank to fail was rank "  # begins the last that a failed torchrun says

_running: set[subprocess.Popen[str]] = set()
_stopping = Event()


def num_processes(wanted: int | Literal["auto"], device: str) -> int:
    """How many training processes to start. Raises ValueError for more than there are GPUs."""
    return len(places(wanted, device))


def places(wanted: int | Literal["auto"], device: str) -> list[str | None]:
    """One entry a training process: the UUID of the GPU that it will have, None for the CPU.

    Raises ValueError for more processes than there are GPUs.
    """
    uuids = [] if device in ("cpu", "mps") else visible_gpus()
    gpus = len(uuids)
    if device == "cuda" and not gpus:
        raise ValueError(
            "device cuda: this machine shows no GPU (torch.cuda.is_available() is False); use --device cpu"
        )
    count = max(1, gpus) if wanted == "auto" else wanted
    if gpus and count > gpus:
        raise ValueError(f"nproc_per_node {wanted}: this machine shows {gpus} GPUs; use at most {gpus}")
    return [*uuids[:count]] if gpus else [None] * count


def visible_gpus() -> list[str]:
    """UUIDs of the GPUs that a new process would see; asked of one, so that this process never touches them."""
    if version("torch").endswith("+cpu"):
        return []
    asked = [sys.executable, "-m", "gpt2core.cuda_driver"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()


def python_command(module: str, arguments: list[str], torchrun_flags: Sequence[str] = ()) -> list[str]:
    """The command that runs a module of this package, under torchrun when there are flags for it."""
    if not torchrun_flags:
        return [sys.executable, "-m", module, *arguments]
    return [sys.executable, "-m", "gpt2core.launch", *torchrun_flags, "-m", module, *arguments]


def run(
    command: list[str],
    on_line: Callable[[str], None] = print,
    nproc: int = 1,
    watchdog: Watchdog | None = None,
) -> int:
    """Runs a command to its end and hands on each line of its output; returns its exit code.

    Ctrl+C, SIGTERM or any other exception here first stops the command: SIGTERM, then after GRACE_S SIGKILL.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1", STARTED_BY: str(os.getpid())}
    environment.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(TORCHRUN_GRACE_S))
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // nproc)))
    for name, value in KEEP_FREED_MEMORY.items():
        environment.setdefault(name, value)
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=environment,
        start_new_session=True,  # Ctrl+C reaches it through us, once
    )
    assert process.stdout is not None
    _running.add(process)
    try:
        if _stopping.is_set():  # between a look at it and the start
            process.terminate()
        with watchdog.over(process, on_line) if watchdog else contextlib.nullcontext():
            for line in process.stdout:
                if watchdog:
                    watchdog.line_seen()
                on_line(line.rstrip("\n"))
            return process.wait()
    except KeyboardInterrupt:
        raise Stopped(stop(process, on_line)) from None
    except BaseException:
        stop(process, on_line)
        raise
    finally:
        _running.discard(process)


class Stopped(KeyboardInterrupt):
    """A signal ended `run`; its command was asked to end, and did so with this exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(exit_code)
        self.exit_code = exit_code


def stop_all() -> None:
    """Asks every process that `run` waits for, in any thread, to end; none is worth starting again."""
    _stopping.set()
    for process in list(_running):
        with contextlib.suppress(ProcessLookupError):
            process.terminate()


def allow_starts() -> None:
    """Takes back what `stop_all` said, for work that begins after it."""
    _stopping.clear()


def is_stopping() -> bool:
    return _stopping.is_set()


def stop(process: subprocess.Popen[str], on_line: Callable[[str], None] = print) -> int:
    """Ends a process: SIGTERM, its last lines handed on, and SIGKILL to its session after GRACE_S.

    Ctrl+C while it waits kills the session at once and ends this process, too.
    """
    with contextlib.suppress(ProcessLookupError):
        process.terminate()
    try:
        rest, _ = process.communicate(timeout=GRACE_S)
        for line in (rest or "").splitlines():
            on_line(line)
    except subprocess.TimeoutExpired:
        _kill(process)
    except KeyboardInterrupt:
        _kill(process)
        sys.exit(128 + signal.SIGINT)
    return process.wait()


def _kill(process: subprocess.Popen[str]) -> None:
    """Kills a process, its session, and those below it: torchrun's ranks have sessions of their own."""
    below = descendants(process.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    kill(below)


def run_in_foreground(
    command: list[str], nproc: int, under_torchrun: bool, next_command: Callable[[int], list[str] | None]
) -> int:
    """Runs a trainer for a person at a terminal: Ctrl+C or SIGTERM lets it save, and then counts as a clean end.

    When it has ended by itself, `next_command` may give another command for its exit code.
    """

    def leave(number: int, frame: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # one that follows must not cut the saving short
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, leave)
    try:
        while True:
            code = run(command, tell, nproc)
            if (again := next_command(code)) is None:
                return code
            command = again
    except Stopped as stopped:
        if stopped.exit_code == -signal.SIGKILL:
            tell(
                f"it did not end within {GRACE_S:.0f} s and was killed: the last checkpoint is what `gpt2 checkpoints` lists"
            )
            return 1
        if under_torchrun:
            return 0  # torchrun's own code after a signal says nothing of the ranks
        return stopped.exit_code if stopped.exit_code >= 0 else 128 - stopped.exit_code  # as a shell has it
    except KeyboardInterrupt:
        return 0


def exit_on_sigterm() -> None:
    """Lets SIGTERM unwind the stack, as Ctrl+C does, so that what was started is ended and nothing is left behind.

    Not for a process with a pool: see `end_on_sigterm`.
    """

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def end_on_sigterm() -> None:
    """Lets SIGTERM end this process where it stands; what it started has to be tied to it.

    An exception out of a signal handler may come between the taking of a lock and its release. In a pool's queue it left
    the lock held for ever, with the pool's thread waiting for the lock and the end of the process for that thread.
    """

    def leave(number: int, frame: object) -> None:
        terminal.show_cursor()
        os._exit(128 + number)

    # multiprocessing's tracker frees a pool's semaphores after such an end; this keeps it from saying that they leaked
    sys.warnoptions.append("ignore:resource_tracker")
    signal.signal(signal.SIGTERM, leave)


def tell(line: str) -> None:
    """A line for whoever watches; when the watcher is gone, the work goes on without one."""
    try:
        terminal.tell(line)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def die_with_parent() -> int | None:
    """Has this process get SIGTERM when its parent dies, if the parent is our launcher or torchrun.

    Returns the process id of that parent. A trainer that a person started from a shell is left alone, and has none: it
    may outlive the shell on purpose.
    """
    started_by, by_torchrun = os.environ.pop(STARTED_BY, None), "TORCHELASTIC_RUN_ID" in os.environ
    if not by_torchrun and not started_by:
        return None
    parent = os.getppid() if by_torchrun else int(started_by or 0)
    tie_to_parent(parent)
    return parent


def tie_to_parent(parent: int) -> None:
    """Has this process get SIGTERM when its parent, with this process id, dies: on Linux from the kernel, which goes by the
    thread that started it, and elsewhere from a thread that looks every second."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    else:
        _end_after(parent)
    if os.getppid() != parent:  # it died before we asked
        os._exit(128 + signal.SIGTERM)


@functools.cache  # a process of a pool asks again with each task
def _end_after(parent: int) -> None:
    def look() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=look, name="end-after-parent", daemon=True).start()


def _torchrun() -> None:
    """torchrun, tied to the life of its parent, and saying in one line which rank was the first to fail."""
    from torch.distributed.elastic.multiprocessing import PContext
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main

    from gpt2core.flags import NON_FINITE, TRY_AGAIN

    # The default timeout of its `close` is what torchrun uses after a failure, and no option of it says otherwise.
    PContext.close.__defaults__ = (None, GRACE_AFTER_FAILURE_S)
    try:
        main()
    except ChildFailedError as failed:  # its own exit code would be 1 whatever a rank meant to say
        tell(_first_to_fail(failed.failures))
        codes = {failure.exitcode for failure in failed.failures.values()}
        sys.exit(max(codes & {NON_FINITE, TRY_AGAIN}, default=1))


def _first_to_fail(failures: Mapping[int, Any]) -> str:
    """The rank that the others followed, with its traceback if it left one; of those that ended in the same second, one
    that a signal killed, but for SIGTERM, with which torchrun ends the others."""
    soonest = min(failure.timestamp for failure in failures.values())

    def order(failure: Any) -> tuple[bool, bool, bool]:
        return failure.timestamp > soonest + 1, failure.exitcode == -signal.SIGTERM, failure.exitcode >= 0

    rank, first = min(failures.items(), key=lambda item: order(item[1]))
    ended = f"was killed by {first.signal_name()}" if first.exitcode < 0 else f"ended with exit code {first.exitcode}"
    sentence = f"{FIRST_TO_FAIL}{rank}: it {ended}"
    if isinstance(first.message, dict):  # as `record` in the rank's main wrote it
        sentence += "\n" + str(first.message["extraInfo"]["py_callstack"]).rstrip()
    return sentence


if __name__ == "__main__":
    die_with_parent()
    _torchrun()
