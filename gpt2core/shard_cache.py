"""Local copies of files on remote storage, within a budget of disk, shared by all processes of a machine.

fsspec has caches of its own, but `simplecache` downloads to the final name and takes whatever lies there for whole, so a
download that was killed leaves a truncated file for good, and it never removes one. Here a copy appears by rename, and
who may write, read or remove it is settled by kernel locks, which end with their holder however that one dies:

    exclusive lock on a copy's name    while it is downloaded or removed
    shared lock on a copy's name       while it is read
    exclusive lock on `budget`         while room is made and taken

A lock on `budget` is asked for with a name's lock held; the other way round nobody waits. The room of a download is taken
at its start, for its temporary file has its full size from then on.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from gpt2core.lock import hold
from gpt2core.storage import publish, read_bytes

CHUNK_BYTES = 16 << 20  # of one request
DOWNLOADS_AT_ONCE = 4
ROOM_TIMEOUT_S = 60.0  # a reader of a batch holds a copy for milliseconds; one who holds it longer keeps it


@dataclass(frozen=True)
class RemoteFile:
    """A file on remote storage, and how it is told from one that takes its place."""

    url: str
    size_bytes: int
    probe: str  # hash of its first and last bytes

    @property
    def name(self) -> str:
        """Name of its local copy: another file at the same URL has another one."""
        identity = hashlib.sha256(f"{self.url}\n{self.size_bytes}\n{self.probe}".encode()).hexdigest()
        return f"{self.url.rpartition('/')[2].replace('.', '_')}_{identity[:16]}"  # no dots: see _final_name


class ShardCache:
    """A folder of copies, `max_bytes` large at most. `progress` gets a line for each download."""

    def __init__(self, folder: Path, max_bytes: int, progress: Callable[[str], None] = print) -> None:
        self.folder = folder / "shards"  # all in it is ours to remove
        self.max_bytes, self.progress = max_bytes, progress
        self._locks = ExitStack()  # of the copies that this process keeps
        self._kept: dict[str, Path] = {}
        self._ahead: dict[str, Thread] = {}

    @contextmanager
    def reading(self, file: RemoteFile) -> Iterator[Path]:
        """The path of a whole copy, downloaded if need be, which nobody removes until the block ends."""
        path = self.folder / file.name
        while True:
            with self._lock(file.name, shared=True):
                if path.exists():
                    os.utime(path)  # what is least recently used goes first
                    yield path
                    return
            self.fetch(file)

    def keep(self, files: list[RemoteFile]) -> list[Path]:
        """Paths of copies that nobody removes while this process lives; what is missing comes several at once."""

        def fetch_and_keep(file: RemoteFile) -> Path:
            if file.name not in self._kept:
                self._kept[file.name] = self._locks.enter_context(self.reading(file))
            return self._kept[file.name]

        missing = [file.size_bytes for file in files if not (self.folder / file.name).exists()]
        if missing:
            self.progress(f"{len(missing)} of {len(files)} shards to download, {sum(missing) / 1e9:,.3g} GB")
        with ThreadPoolExecutor(DOWNLOADS_AT_ONCE, thread_name_prefix="download") as pool:
            try:
                return [done.result() for done in [pool.submit(fetch_and_keep, file) for file in files]]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def fetch_ahead(self, file: RemoteFile) -> None:
        """Begins a download in the background, unless it has begun or is done. What goes wrong shows when it is read."""
        if file.name in self._ahead or (self.folder / file.name).exists():
            return

        def fetch() -> None:
            with suppress(Exception):
                self.fetch(file)
            self._ahead.pop(file.name)

        # a daemon, so that the end of the process need not wait for it; the next download sweeps up what it leaves
        thread = Thread(target=fetch, name="fetch_ahead", daemon=True)
        if self._ahead.setdefault(file.name, thread) is thread:  # two may ask at once
            thread.start()

    def fetch(self, file: RemoteFile) -> None:
        """Downloads a file, unless a copy is there; who asks meanwhile waits for that one download.

        Raises ValueError when there is no room for it, or what comes is not the whole file.
        """
        path = self.folder / file.name
        while not path.exists():
            try:
                with hold(self._lock_file(file.name)):
                    if not path.exists():
                        self._download(file, path)
            except BlockingIOError:
                # not to wait for a lock of our own: another process may download it, and keep it for good
                with self._lock(file.name, shared=True):
                    pass

    def _download(self, file: RemoteFile, path: Path) -> None:
        """With the lock of its name held."""
        self._sweep(file.name)
        started = time.perf_counter()
        with ExitStack() as stack:
            with self._lock("budget"):
                self._make_room(file)
                copy = stack.enter_context(publish(path))
                copy.truncate(file.size_bytes)
            for start in range(0, file.size_bytes, CHUNK_BYTES):
                copy.write(_read_chunk(file.url, start, min(start + CHUNK_BYTES, file.size_bytes)))
        seconds = time.perf_counter() - started
        self.progress(f"{file.url}: {file.size_bytes / 1e6:,.1f} MB here in {seconds:.1f} s")

    def used_bytes(self) -> int:
        return sum(size for _, size, _ in self._copies())

    def _make_room(self, file: RemoteFile) -> None:
        """Removes what was least recently used until the file fits. Raises ValueError when too much is in use."""
        if file.size_bytes > self.max_bytes:
            raise ValueError(
                f"{file.url} has {file.size_bytes / 1e9:,.3g} GB and its copy may not take more than "
                f"cache_gb {self.max_bytes / 1e9:,.3g}: give a larger --cache_gb"
            )
        deadline = time.monotonic() + ROOM_TIMEOUT_S
        while (used := self.used_bytes()) + file.size_bytes > self.max_bytes:
            if self._remove_oldest():
                continue
            if time.monotonic() > deadline:
                raise ValueError(
                    f"{self.folder} has no room for the {file.size_bytes / 1e9:,.3g} GB of {file.url}: {used / 1e9:,.3g} GB "
                    f"of cache_gb {self.max_bytes / 1e9:,.3g} are in use; give a larger --cache_gb or another --cache_dir"
                )
            time.sleep(0.01)

    def _remove_oldest(self) -> bool:
        """Removes one copy that nobody reads, or what a killed download left; False when all are in use."""
        for _, _, path in sorted(self._copies()):
            with suppress(BlockingIOError), hold(self._lock_file(_final_name(path))):
                path.unlink(missing_ok=True)
                return True
        return False

    def _sweep(self, name: str) -> None:
        """Removes what a killed download of this name left; its lock is ours, so nobody is writing there."""
        for path in self.folder.glob(f".{name}.*.tmp"):
            path.unlink(missing_ok=True)

    def _copies(self) -> list[tuple[float, int, Path]]:
        """When last used, size and path of each copy, whole or on its way."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            with suppress(FileNotFoundError):
                if path.is_file():
                    found.append((path.stat().st_mtime, path.stat().st_size, path))
        return found

    def _lock(self, name: str, shared: bool = False):  # type: ignore[no-untyped-def]
        return hold(self._lock_file(name), shared=shared, on_wait=lambda holder: None)

    def _lock_file(self, name: str) -> Path:
        return self.folder / "locks" / f"{name}.lock"


def _read_chunk(url: str, start: int, end: int) -> bytes:
    chunk = read_bytes(url, start, end)
    if len(chunk) != end - start:
        raise ValueError(
            f"{url}: {len(chunk)} bytes came for the {end - start} from byte {start} on; "
            f"the file changed, or its storage does not serve parts of files"
        )
    return chunk


def _final_name(path: Path) -> str:
    """The name that a copy has or, when it is storage.publish's `.NAME.HOST.PID.tmp`, will have."""
    return path.name.removeprefix(".").split(".")[0]
