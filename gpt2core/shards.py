"""Token shards: build-nanogpt's layout (uint16 .npy files, named by split and number), with a manifest.

    edufineweb_val_000000.npy, edufineweb_train_000001.npy, ..., manifest.json

Shards made by karpathy/build-nanogpt have no manifest and work as they are, and so do llm.c's .bin shards. The folder may
lie on remote storage: what must be known of a shard to open it comes in two small reads, and its tokens when they are
first looked at, by way of a local copy.
"""

from __future__ import annotations

import hashlib
import io
import math
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from gpt2core.config import VOCAB_SIZE, DataConfig, first_error
from gpt2core.shard_cache import RemoteFile, ShardCache
from gpt2core.storage import Location, file_sizes, is_remote, join, local_path, read_bytes, read_ranges, read_text

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")

SHARD_NAME = re.compile(r"^(?P<prefix>.*)_(?P<split>train|val)_(?P<index>\d{6})\.(?P<format>npy|bin)$")
MANIFEST = "manifest.json"
PROBED_TOKENS = 65_536  # checked for foreign ids, from the front and the back of a shard, when it is mapped
FINGERPRINT_TOKENS = 1024  # of either end
FRONT_BYTES = 4096  # of a file: its header and the first FINGERPRINT_TOKENS

# llm.c's header: 256 int32, of which magic, version and number of tokens are used (llm.c, dev/data/data_common.py).
LLMC_HEADER_BYTES, LLMC_MAGIC, LLMC_VERSION = 1024, 20240520, 1


def shard_name(index: int) -> str:
    """Name of the shard with this number; number 0 is the validation shard, as in build-nanogpt."""
    return f"edufineweb_{'val' if index == 0 else 'train'}_{index:06d}.npy"


class ShardRecord(BaseModel):
    """One shard as the manifest has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    tokens: int
    sha256: str  # of the whole file


class SourceRecord(BaseModel):
    """One source file as the manifest has it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    size_bytes: int | None = None  # of the file when it was read
    documents: int
    tokens: int  # with one <|endoftext|> a document
    empty_documents: int  # left out, for they hold no text
    damaged_documents: int = 0  # left out, for they could not be read; only with on_damage skip
    damage: list[str] = []  # the first of them, each with its place and what is wrong


class Manifest(BaseModel):
    """What a dataset was made from and what it holds; written last, so a dataset that has one is complete."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    source: str
    source_config: str | None
    source_revision: str | None = None  # commit of a hub dataset
    text_column: str
    shard_size: int
    tokenizer: Literal["gpt2"] = "gpt2"
    tokenizer_sha256: str  # of vocab.bpe
    eot_token: int
    sources: list[SourceRecord]
    shards: list[ShardRecord]


def read_manifest(data_dir: Location) -> Manifest | None:
    """The dataset's manifest, None where there is none. Raises ValueError when it cannot be read."""
    location = join(data_dir, MANIFEST)
    try:
        return Manifest.model_validate_json(read_text(location))
    except FileNotFoundError:
        return None
    except (ValidationError, UnicodeDecodeError) as error:
        what = first_error(error) if isinstance(error, ValidationError) else "it is not UTF-8"
        raise ValueError(f"{location}: {what}; make the dataset again with `gpt2 prepare`") from None


@dataclass(frozen=True)
class Shard:
    """A shard whose tokens are mapped into memory when they are first looked at."""

    location: str
    num_tokens: int
    head: np.ndarray  # (up to FINGERPRINT_TOKENS,) uint16, its first tokens
    tail: np.ndarray  # its last tokens
    header_bytes: int
    copy: RemoteFile | None = None  # where it lies on remote storage
    cache: ShardCache | None = None

    @property
    def name(self) -> str:
        return self.location.replace(os.sep, "/").rpartition("/")[2]

    @cached_property
    def tokens(self) -> np.ndarray:
        """All tokens, (num_tokens,) uint16. A local copy of a remote shard is kept as long as this process lives."""
        if self.copy is None:
            return self._map(local_path(self.location))
        assert self.cache is not None
        return self._map(self.cache.keep([self.copy])[0])

    @contextmanager
    def reading(self) -> Iterator[np.ndarray]:
        """All tokens, for the block only: after it, a local copy may make room for another shard's."""
        if self.copy is None or "tokens" in self.__dict__:
            yield self.tokens
            return
        assert self.cache is not None
        with self.cache.reading(self.copy) as path:
            yield self._map(path)

    def fetch_ahead(self) -> None:
        """Lets a remote shard be copied in the background."""
        if self.copy and "tokens" not in self.__dict__:
            assert self.cache is not None
            self.cache.fetch_ahead(self.copy)

    def _map(self, path: Path) -> np.ndarray:
        tokens = np.memmap(path, np.uint16, "r", self.header_bytes, (self.num_tokens,))
        if max(tokens[:PROBED_TOKENS].max(), tokens[-PROBED_TOKENS:].max()) >= VOCAB_SIZE:
            raise ValueError(
                f"{self.location} is no shard of GPT-2 tokens: it holds ids of {VOCAB_SIZE} and more, so it is foreign"
            )
        return tokens


def cache_of(data: DataConfig, progress: Callable[[str], None] = print) -> ShardCache:
    """The local copies of shards that lie on remote storage."""
    return ShardCache(Path(data.cache_dir), int(data.cache_gb * 1e9), progress)


def open_shards(data_dir: Location, split: Split, cache: ShardCache | None = None) -> list[Shard]:
    """All shards of a split in the order of their numbers, checked against the manifest if there is one.

    Shards at a URL need a cache. Raises ValueError when the folder holds none of this split, or one is damaged or not a
    shard.
    """
    sizes = list_shards(data_dir, split)
    if is_remote(data_dir):
        shards = _open_remote(data_dir, sizes, cache or cache_of(DataConfig()))
    else:
        shards = [_open_local(data_dir, name, size_bytes) for name, size_bytes in sizes.items()]
    if manifest := read_manifest(data_dir):
        _check_against(manifest, shards, split, data_dir)
    return shards


def list_shards(data_dir: Location, split: Split) -> dict[str, int]:
    """Name and bytes of each shard of a split, in the order of their numbers. Raises ValueError when there are none."""
    found = file_sizes(data_dir)
    if not found and not (is_remote(data_dir) or local_path(data_dir).is_dir()):
        raise ValueError(f"{data_dir}: there is no such data folder; make it with `gpt2 prepare --data_dir {data_dir}`")
    matches = [match for name in sorted(found) if (match := SHARD_NAME.match(name)) and match["split"] == split]
    if not matches:
        raise ValueError(
            f"{data_dir} holds no {split} shards (*_{split}_000000.npy); "
            f"make them with `gpt2 prepare --data_dir {data_dir}`"
        )
    in_npy, in_bin = ({match["index"]: match[0] for match in matches if match["format"] == f} for f in ("npy", "bin"))
    if both := sorted(in_npy.keys() & in_bin.keys()):
        raise ValueError(
            f"{data_dir} holds {split} shard {both[0]} twice, as {in_npy[both[0]]} and {in_bin[both[0]]}: "
            f"keep one of the two formats"
        )
    if unknown := [match[0] for match in matches if found[match[0]] is None]:  # a web server's listing may lack sizes
        raise ValueError(
            f"{data_dir}: the storage does not say how large {unknown[0]} is; copy the shards to a local folder"
        )
    return {match[0]: found[match[0]] for match in matches}


def _open_local(data_dir: Location, name: str, size_bytes: int) -> Shard:
    location = join(data_dir, name)
    header_bytes, num_tokens = layout(location, read_bytes(location, 0, FRONT_BYTES), size_bytes)
    shard = Shard(location, num_tokens, np.empty(0), np.empty(0), header_bytes)
    return replace(shard, head=shard.tokens[:FINGERPRINT_TOKENS], tail=shard.tokens[-FINGERPRINT_TOKENS:])


def _open_remote(data_dir: Location, sizes: dict[str, int], cache: ShardCache) -> list[Shard]:
    urls = {join(data_dir, name): size_bytes for name, size_bytes in sizes.items()}
    fronts = read_ranges([(url, 0, min(FRONT_BYTES, size_bytes)) for url, size_bytes in urls.items()])
    layouts = [layout(url, front, urls[url]) for url, front in zip(urls, fronts, strict=True)]
    backs = read_ranges(
        [
            (url, urls[url] - 2 * min(FINGERPRINT_TOKENS, num_tokens), urls[url])
            for url, (_, num_tokens) in zip(urls, layouts, strict=True)
        ]
    )
    shards = []
    for url, front, back, (header_bytes, num_tokens) in zip(urls, fronts, backs, layouts, strict=True):
        copy = RemoteFile(url, urls[url], hashlib.sha256(front + back).hexdigest())
        head = np.frombuffer(front[header_bytes : header_bytes + 2 * FINGERPRINT_TOKENS], np.uint16)
        shards.append(Shard(url, num_tokens, head, np.frombuffer(back, np.uint16), header_bytes, copy, cache))
    return shards


def layout(location: str, front: bytes, size_bytes: int) -> tuple[int, int]:
    """Bytes of the header and number of tokens of a shard, from its first FRONT_BYTES.

    Raises ValueError when it is no shard or not a whole one.
    """
    header_bytes, num_tokens = (_llmc_layout if location.endswith(".bin") else _npy_layout)(location, front)
    expected_bytes = header_bytes + 2 * num_tokens
    if size_bytes != expected_bytes:
        raise ValueError(
            f"{location} is not a whole token shard: its header promises {num_tokens:,} tokens, which are "
            f"{expected_bytes:,} bytes, and it has {size_bytes:,}; make it again or copy it anew"
        )
    if num_tokens < 2:
        raise ValueError(f"{location} is not a token shard: it holds {num_tokens} tokens, and a shard has at least two")
    return header_bytes, num_tokens


def _npy_layout(location: str, front: bytes) -> tuple[int, int]:
    stream = io.BytesIO(front)
    if front.startswith(b"PK"):
        raise ValueError(f"{location} is not a token shard but an archive of arrays")
    try:
        version = np.lib.format.read_magic(stream)
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[
            version
        ]
        shape, _, dtype = read_header(stream)
    except (ValueError, EOFError, KeyError) as error:
        raise ValueError(f"{location} is not a whole token shard ({error}); make it again or copy it anew") from None
    if dtype != np.uint16 or len(shape) != 1:
        raise ValueError(
            f"{location} is not a token shard: it holds {dtype} of shape {shape}, "
            f"and a shard is one row of at least two uint16 tokens"
        )
    if stream.tell() + 2 * FINGERPRINT_TOKENS > FRONT_BYTES:
        raise ValueError(
            f"{location} is not a token shard: its header has {stream.tell():,} bytes, numpy's own has 128"
        )
    return stream.tell(), shape[0]


def _llmc_layout(location: str, front: bytes) -> tuple[int, int]:
    if len(front) < LLMC_HEADER_BYTES:
        raise ValueError(
            f"{location} is not a whole token shard: llm.c's header alone has {LLMC_HEADER_BYTES} bytes, and the file "
            f"has {len(front)}; make it again or copy it anew"
        )
    magic, version, num_tokens = (int(number) for number in np.frombuffer(front[:12], "<i4"))
    if magic != LLMC_MAGIC:
        raise ValueError(f"{location} is not a token shard of llm.c: its first int32 is {magic}, not {LLMC_MAGIC}")
    if version != LLMC_VERSION:
        raise ValueError(
            f"{location} is of version {version} of llm.c's format; version {LLMC_VERSION}, of uint16 tokens, can be read"
        )
    return LLMC_HEADER_BYTES, num_tokens


def _check_against(manifest: Manifest, shards: list[Shard], split: Split, data_dir: Location) -> None:
    expected = {record.name: record.tokens for record in manifest.shards if f"_{split}_" in record.name}
    found = {shard.name: shard.num_tokens for shard in shards}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{join(data_dir, name)}: {join(data_dir, MANIFEST)} has {expected.get(name, 0)} tokens for it, "
                f"on disk are {found.get(name, 0)}; make the dataset again or copy it anew"
            )


def keep_here(shards: list[Shard]) -> None:
    """Copies the shards that lie on remote storage, several at once, and keeps the copies while this process lives."""
    if remote := [shard for shard in shards if shard.copy]:
        assert remote[0].cache is not None
        remote[0].cache.keep([shard.copy for shard in remote if shard.copy])
        for shard in remote:
            _ = shard.tokens


def check_cache_room(train: list[Shard], val: list[Shard], shuffle: str) -> None:
    """Raises ValueError when the copies of remote shards that training needs at once are more than the cache may hold."""
    if train[0].copy is None or train[0].cache is None:
        return
    sizes = sorted(shard.copy.size_bytes for shard in train if shard.copy)
    val_bytes, max_bytes = sum(shard.copy.size_bytes for shard in val if shard.copy), train[0].cache.max_bytes
    all_bytes, two_bytes = val_bytes + sum(sizes), val_bytes + sum(sizes[-2:])
    where = train[0].location.rpartition("/")[0]
    if shuffle == "sequences" and all_bytes > max_bytes:
        raise ValueError(
            f"{where} has {all_bytes / 1e9:,.3g} GB, which --shuffle sequences needs here at once, and the local copies may "
            f"take cache_gb {max_bytes / 1e9:,.3g}: give --cache_gb {_round_up(all_bytes)} or more, or "
            f"--shuffle shards, which needs {two_bytes / 1e9:,.3g} GB"
        )
    if two_bytes > max_bytes:
        raise ValueError(
            f"{where}: the validation shards and two train shards have {two_bytes / 1e9:,.3g} GB, and the local copies may "
            f"take cache_gb {max_bytes / 1e9:,.3g}: give --cache_gb {_round_up(two_bytes)} or more"
        )


def fingerprint(shards: list[Shard]) -> str:
    """Tells one dataset from another at the cost of two small reads a shard: names, sizes, first and last tokens."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.name}:{shard.num_tokens}\n".encode())
        digest.update(shard.head.tobytes())
        digest.update(shard.tail.tobytes())
    return digest.hexdigest()


def _round_up(size_bytes: int) -> float:
    """In GB, to three digits, and no less."""
    unit = 10.0 ** (math.floor(math.log10(size_bytes)) - 2)
    return float(f"{math.ceil(size_bytes / unit) * unit / 1e9:.3g}")


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
