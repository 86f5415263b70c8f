"""Files at a path or at any fsspec URL (s3://, gs://, hf://, http://), which appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

Location = str | Path


def is_remote(location: Location) -> bool:
    """Whether this is a URL of another file system than the local one."""
    return "://" in str(location) and not str(location).startswith(("file://", "local://"))


def local_path(location: Location) -> Path:
    """The path of a location that is not remote."""
    assert not is_remote(location)
    return Path(str(location).removeprefix("file://").removeprefix("local://"))


def join(folder: Location, name: str) -> str:
    return f"{str(folder).rstrip('/')}/{name}" if is_remote(folder) else str(local_path(folder) / name)


def exists(location: Location) -> bool:
    if not is_remote(location):
        return local_path(location).exists()
    filesystem, path = _remote(location)
    return bool(filesystem.exists(path))


def file_sizes(folder: Location) -> dict[str, int]:
    """Name and bytes of each file right in the folder; none where there is no such folder."""
    if not is_remote(folder):
        sizes = {}
        for file in local_path(folder).iterdir() if local_path(folder).is_dir() else ():
            with contextlib.suppress(FileNotFoundError):  # another process may remove it just now
                if file.is_file():
                    sizes[file.name] = file.stat().st_size
        return sizes
    filesystem, path_there = _remote(folder)
    try:
        found = filesystem.ls(path_there, detail=True)
    except FileNotFoundError:
        return {}
    return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in found if entry["type"] == "file"}


def size(location: Location) -> int:
    """Bytes of a file. Raises FileNotFoundError where there is none."""
    if not is_remote(location):
        return local_path(location).stat().st_size
    filesystem, path = _remote(location)
    return int(filesystem.size(path))


def read_bytes(location: Location, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes from start (from the front by default) up to end (to the last by default)."""
    if is_remote(location):
        filesystem, path = _remote(location)
        return bytes(filesystem.cat_file(path, start=start, end=end))
    with local_path(location).open("rb") as file:
        file.seek(start or 0)
        return file.read(-1 if end is None else end - (start or 0))


def read_ranges(ranges: list[tuple[str, int, int]]) -> list[bytes]:
    """The bytes of each (URL, start, end) of one remote file system, asked for side by side where it can do that."""
    if not ranges:
        return []
    filesystem, _ = _remote(ranges[0][0])
    paths = [filesystem._strip_protocol(url) for url, _, _ in ranges]
    found = filesystem.cat_ranges(
        paths, [start for _, start, _ in ranges], [end for _, _, end in ranges], on_error="raise"
    )
    return [bytes(content) for content in found]


def read_text(location: Location) -> str:
    return read_bytes(location).decode("utf-8")


@contextmanager
def publish(location: Location, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a file that appears under its name only when complete and on disk; an error leaves what was there.

    On the local file system it is written to a temporary name beside it, fsynced, renamed, and the folder fsynced.
    Elsewhere it is written to a local temporary file and then put in its place in one request.
    """
    encoding = None if "b" in mode else "utf-8"
    if is_remote(location):
        with tempfile.TemporaryDirectory(prefix="gpt2_upload_") as folder:
            staged = Path(folder) / "file"
            with staged.open(mode, encoding=encoding) as file:
                yield file
            filesystem, there = _remote(location)
            filesystem.put_file(str(staged), there)
        return
    path = local_path(location)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with temporary.open(mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_folder(path.parent)


def write_text(location: Location, text: str) -> None:
    with publish(location, "w") as file:
        file.write(text)


def write_json(location: Location, value: Any) -> None:
    write_text(location, json.dumps(value, indent=2) + "\n")


def alias(existing: Location, name: Location) -> None:
    """Gives a file a second name, in place of what has it; the bytes are not sent again.

    A hard link where the file system has them, a copy on the server on remote storage, else a local copy.
    """
    if is_remote(existing):
        filesystem, path = _remote(existing)
        filesystem.cp_file(path, _remote(name)[1])
        return
    here, target = local_path(existing), local_path(name)
    temporary = target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(here, temporary)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.EXDEV):
            raise
        with here.open("rb") as source, publish(target) as copy:
            shutil.copyfileobj(source, copy, 16 << 20)
        return
    temporary.replace(target)
    fsync_folder(target.parent)


def remove(location: Location) -> None:
    """Removes a file or a folder with all in it, if it is there."""
    if is_remote(location):
        filesystem, path = _remote(location)
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm(path, recursive=True)
        return
    path_here = local_path(location)
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("file").rm(str(path_here), recursive=True)


def fsync_folder(path: Path) -> None:
    """Puts a rename in this folder on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; what a crash cut short is left out, with what was appended to it."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)


def _remote(location: Location) -> tuple[Any, str]:
    """The file system and the path on it; what it remembers of earlier listings is forgotten, for others write too."""
    filesystem, path = fsspec.url_to_fs(str(location))
    filesystem.invalidate_cache()
    return filesystem, path
