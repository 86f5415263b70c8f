"""Files at a path or at any fsspec URL (s3://, gs://, hf://, http://), which appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import fsspec

from gpt2core.credentials import without_credentials

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
    with _remote(location) as (filesystem, path):
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
    try:
        with _remote(folder) as (filesystem, path):
            found = filesystem.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {entry["name"].rstrip("/").rpartition("/")[2]: entry["size"] for entry in found if entry["type"] == "file"}


def size(location: Location) -> int:
    """Bytes of a file. Raises FileNotFoundError where there is none."""
    if not is_remote(location):
        return local_path(location).stat().st_size
    with _remote(location) as (filesystem, path):
        return int(filesystem.size(path))


def read_bytes(location: Location, start: int | None = None, end: int | None = None) -> bytes:
    """The bytes from start (from the front by default) up to end (to the last by default)."""
    if is_remote(location):
        with _remote(location) as (filesystem, path):
            return bytes(filesystem.cat_file(path, start=start, end=end))
    with local_path(location).open("rb") as file:
        file.seek(start or 0)
        return file.read(-1 if end is None else end - (start or 0))


def read_ranges(ranges: list[tuple[str, int, int]]) -> list[bytes]:
    """The bytes of each (URL, start, end) of one remote file system, asked for side by side where it can do that."""
    if not ranges:
        return []
    urls, starts, ends = zip(*ranges, strict=True)
    with _remote(urls[0]) as (filesystem, _):
        paths = [filesystem._strip_protocol(url) for url in urls]
        found = filesystem.cat_ranges(paths, list(starts), list(ends), on_error="raise")
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
        with _folder_in_passing() as folder:
            staged = folder / "file"
            with staged.open(mode, encoding=encoding) as file:
                yield file
            try:
                with _remote(location) as (filesystem, path_there):
                    filesystem.put_file(str(staged), path_there)
            except FileNotFoundError as error:  # of the bucket
                raise ValueError(f"{error}; make it, or name one that is there") from None
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
    fsync(path.parent)


@contextmanager
def fetched(location: Location) -> Iterator[Path]:
    """The file on this machine: itself, or a copy of a remote one, which goes at the end."""
    if not is_remote(location):
        yield local_path(location)
        return
    with _folder_in_passing() as folder:
        with _remote(location) as (filesystem, path_there):
            filesystem.get_file(path_there, str(folder / "file"))
        yield folder / "file"


@contextmanager
def _folder_in_passing() -> Iterator[Path]:
    """A temporary folder for files on their way to or from remote storage. Removes those of killed processes, too."""
    prefix = f"gpt2_transfer_{socket.gethostname()}_"
    for stale in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        pid = stale.name.removeprefix(prefix).split("_")[0]
        if pid.isdigit() and not is_running(int(pid)):
            shutil.rmtree(stale, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{prefix}{os.getpid()}_") as folder:
        yield Path(folder)


def is_running(pid: int) -> bool:
    """Whether a process of this machine has this id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


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
        with _remote(existing) as (filesystem, path):
            filesystem.cp_file(path, filesystem._strip_protocol(str(name)))
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
    temporary.unlink(missing_ok=True)  # rename leaves it when both already name one file
    fsync(target.parent)


def remove(location: Location) -> None:
    """Removes a file or a folder with all in it, if it is there."""
    if is_remote(location):
        with contextlib.suppress(FileNotFoundError), _remote(location) as (filesystem, path):
            filesystem.rm(path, recursive=True)
        return
    path_here = local_path(location)
    with contextlib.suppress(FileNotFoundError):
        fsspec.filesystem("file").rm(str(path_here), recursive=True)


def fsync(path: Path) -> None:
    """Puts a file's content, or the names in a folder, on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json_lines(path: Path, lenient: bool = False) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file; what a crash cut short is left out, with what was appended to it.

    Raises ValueError, naming the file and the line, when there is something else in it; `lenient` leaves that out, too.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                continue
            except UnicodeDecodeError:
                if lenient:
                    continue
                raise ValueError(f"{path}, line {number}: it is not UTF-8; take the line out") from None
            if isinstance(value, dict):
                yield value
            elif not lenient:
                raise ValueError(f"{path}, line {number}: {value!r:.80} is no JSON object; take the line out")


@contextmanager
def _remote(location: Location) -> Iterator[tuple[Any, str]]:
    """The file system and the path on it; what it remembers of earlier listings is forgotten, for others write too.

    What goes wrong with it in the block is raised as FileNotFoundError, or as remote_error has it.
    """
    without_credentials(str(location))
    try:
        filesystem, path = fsspec.url_to_fs(str(location))
        filesystem.invalidate_cache()
        yield filesystem, path
    except Exception as error:
        if is_gone(error):
            raise FileNotFoundError(f"{location}: {first_line(error)}") from None
        raise remote_error(str(location), error) from None


class UnreachableError(ConnectionError):
    """Remote storage does not answer as it should; trying again may help."""


# What trying again does not help, of the libraries behind fsspec: no credentials, no permission, no such repository.
PERMANENT = re.compile(r"Credential|Forbidden|Unauthorized|Permission|GatedRepo|RepositoryNotFound|ProfileNotFound")


def remote_error(location: str, error: Exception) -> Exception:
    """An error of a remote file system as one sentence that names the place: each of them has kinds of its own.

    ValueError for what the user must put right, UnreachableError for what may pass.
    """
    sentence = f"{location} cannot be used ({type(error).__name__}: {first_line(error)})"
    permanent = isinstance(error, ImportError | ValueError | PermissionError | TypeError | NotImplementedError)
    if permanent or PERMANENT.search(type(error).__name__):
        return ValueError(f"{sentence}; check the URL, what is installed and the credentials")
    return UnreachableError(sentence)


def is_gone(error: Exception) -> bool:
    """Whether there is no such file: the hub's client has a name of its own for that."""
    return isinstance(error, FileNotFoundError) or "EntryNotFound" in type(error).__name__


def first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
