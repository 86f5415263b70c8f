"""Token shards on disk: build-nanogpt's layout (uint16 .npy files, named by split and number), with a manifest.

    edufineweb_val_000000.npy, edufineweb_train_000001.npy, ..., manifest.json

Shards made by karpathy/build-nanogpt have no manifest and work as they are.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from gpt2core.config import VOCAB_SIZE, first_error

Split = Literal["train", "val"]

SHARD_NAME = re.compile(r"^(?P<prefix>.*)_(?P<split>train|val)_(?P<index>\d{6})\.npy$")
MANIFEST = "manifest.json"
PROBED_TOKENS = 65_536  # looked at, from the front and the back of a shard, when it is opened


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


def read_manifest(data_dir: Path) -> Manifest | None:
    """The dataset's manifest, None where there is none. Raises ValueError when it cannot be read."""
    path = data_dir / MANIFEST
    if not path.exists():
        return None
    try:
        return Manifest.model_validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        raise ValueError(f"{path}: {first_error(error)}; make the dataset again with `gpt2 prepare`") from None


@dataclass(frozen=True)
class Shard:
    """A memory-mapped shard."""

    path: Path
    tokens: np.ndarray  # (number of tokens,) uint16


def open_shards(data_dir: Path, split: Split) -> list[Shard]:
    """All shards of a split in the order of their numbers, checked against the manifest if there is one.

    Raises ValueError when the folder holds none of this split, or one is damaged or not a shard.
    """
    if not data_dir.is_dir():
        raise ValueError(f"{data_dir}: there is no such data folder; make it with `gpt2 prepare --data_dir {data_dir}`")
    paths = sorted(path for path in data_dir.glob("*.npy") if _split_of(path) == split)
    if not paths:
        raise ValueError(
            f"{data_dir} holds no {split} shards (*_{split}_000000.npy); "
            f"make them with `gpt2 prepare --data_dir {data_dir}`"
        )
    shards = [Shard(path, _map_tokens(path)) for path in paths]
    if manifest := read_manifest(data_dir):
        _check_against(manifest, shards, split, data_dir)
    return shards


def _split_of(path: Path) -> str | None:
    match = SHARD_NAME.match(path.name)
    return match["split"] if match else None


def _map_tokens(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a whole token shard ({error}); make it again or copy it anew") from None
    if not isinstance(tokens, np.ndarray):
        raise ValueError(f"{path} is not a token shard but an archive of arrays")
    if tokens.dtype != np.uint16 or tokens.ndim != 1 or tokens.size < 2:
        raise ValueError(
            f"{path} is not a token shard: it holds {tokens.dtype} of shape {tokens.shape}, "
            f"and a shard is one row of at least two uint16 tokens"
        )
    if max(tokens[:PROBED_TOKENS].max(), tokens[-PROBED_TOKENS:].max()) >= VOCAB_SIZE:
        raise ValueError(f"{path} is no shard of GPT-2 tokens: it holds ids of {VOCAB_SIZE} and more, so it is foreign")
    return tokens


def _check_against(manifest: Manifest, shards: list[Shard], split: Split, data_dir: Path) -> None:
    expected = {record.name: record.tokens for record in manifest.shards if f"_{split}_" in record.name}
    found = {shard.path.name: shard.tokens.size for shard in shards}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ValueError(
                f"{data_dir / name}: {data_dir / MANIFEST} has {expected.get(name, 0)} tokens for it, "
                f"on disk are {found.get(name, 0)}; make the dataset again or copy it anew"
            )


def fingerprint(shards: list[Shard]) -> str:
    """Tells one dataset from another at the cost of two small reads a shard: names, sizes, first and last tokens."""
    digest = hashlib.sha256()
    for shard in shards:
        digest.update(f"{shard.path.name}:{shard.tokens.size}\n".encode())
        digest.update(shard.tokens[:1024].tobytes())
        digest.update(shard.tokens[-1024:].tobytes())
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
