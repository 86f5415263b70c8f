"""Parts, end to end, cut into shards."""

from __future__ import annotations

import hashlib
import io
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt2core.shards import SHARD_NAME, ShardRecord, shard_name
from gpt2core.storage import Location, file_sizes, is_remote, join, local_path, publish, read_bytes, remove

COPY_BYTES = 16 << 20


class Extent(NamedTuple):
    """Tokens `start` to `start + tokens` of a file of uint16 tokens."""

    location: str
    tokens: int
    start: int = 0


def write_shards(
    folder: Location, parts: list[Extent], shard_size: int, progress: Callable[[str], None]
) -> list[ShardRecord]:
    """Writes all shards, several at a time: copying and hashing leave Python's lock to the others.

    Shards that a dead run left go. Raises OSError when there is no room.
    """
    if not is_remote(folder):
        _make_room(local_path(folder), sum(part.tokens for part in parts))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        names = map(shard_name, itertools.count())
        records = []
        runs = zip(names, _cut(parts, shard_size), strict=False)
        for record in threads.map(lambda named: _write_shard(folder, *named), runs):
            progress(f"{record.name}: {record.tokens:,} tokens")
            records.append(record)
    for name in file_sizes(folder).keys() - {record.name for record in records}:
        if SHARD_NAME.match(name):
            remove(join(folder, name))
    return records


def _cut(parts: Iterable[Extent], size: int) -> Iterator[list[Extent]]:
    """The parts end to end, in runs of `size` tokens; the last may be shorter, but a lone token makes no sequence."""
    run, room = list[Extent](), size
    for location, tokens, _ in parts:
        start = 0
        while start < tokens:
            taken = min(room, tokens - start)
            run.append(Extent(location, taken, start))
            start, room = start + taken, room - taken
            if not room:
                yield run
                run, room = [], size
    if size - room > 1:
        yield run


def _write_shard(folder: Location, name: str, run: list[Extent]) -> ShardRecord:
    """One .npy file of uint16 tokens, as numpy.save writes it."""
    tokens, digest = sum(extent.tokens for extent in run), hashlib.sha256()
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<u2", "fortran_order": False, "shape": (tokens,)})
    with publish(join(folder, name)) as file:
        for block in itertools.chain([header.getvalue()], _blocks(run)):
            file.write(block)
            digest.update(block)
    return ShardRecord(name=name, tokens=tokens, sha256=digest.hexdigest())


def _blocks(run: list[Extent]) -> Iterator[bytes]:
    for location, tokens, start in run:
        for at in range(2 * start, 2 * (start + tokens), COPY_BYTES):
            yield read_bytes(location, at, min(at + COPY_BYTES, 2 * (start + tokens)))


def _make_room(folder: Path, tokens: int) -> None:
    """Removes what an attempt that died here left, and makes sure of room for the shards."""
    for path in folder.iterdir():
        if SHARD_NAME.match(path.name):
            path.unlink()
    free, needed = shutil.disk_usage(folder).free, 2 * tokens
    if free < needed:
        raise OSError(
            f"{folder} has {free / 1e9:.1f} GB free, and the shards need {needed / 1e9:.1f} GB: free some space"
        )
