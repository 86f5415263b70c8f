"""The tokens of a span of a source file, as a file of their own beside the dataset: a part.

A part is named by what it is made of, so that other content or options never meet it, and counts once its record is there.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Iterable
from typing import IO

import numpy as np
from pydantic import BaseModel, ConfigDict

from gpt2core.config import DataConfig
from gpt2core.sources import Damage, DamagedDocumentError, Document, SourceFile, Span, documents
from gpt2core.storage import exists, join, publish, read_text, write_text
from gpt2core.tokenizer import EOT, PIECE_CHARACTERS, VOCAB_BPE_SHA256, Encode, UncuttableTextError, encoder, pieces

PARTS = ".parts"  # folder of the parts, gone once the manifest is written
EOT_BYTES = np.uint16(EOT).tobytes()
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
DOCUMENTS_CHECKED = 16  # of each span, encoded by both libraries when it is not tiktoken's own


class Part(BaseModel):
    """The record of a tokenized span, written after its tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    documents: int
    tokens: int
    empty_documents: int
    damaged_documents: int
    damage: list[str]


def part_file(data: DataConfig, name: str) -> str:
    return join(join(data.data_dir, PARTS), name)


def part_key(data: DataConfig, file: SourceFile, span: Span | None = None) -> str:
    """Name of what a file or a span of it becomes: other content, other name."""
    of = [file.url, file.size_bytes, file.version, data.text_column, VOCAB_BPE_SHA256]
    return hashlib.sha256(json.dumps(of + ([span.start, span.end] if span else [])).encode()).hexdigest()[:24]


def tokenize_span(data: DataConfig, span: Span) -> Part:
    """Writes one span's tokens as a part, each document preceded by EOT; returns at once when that is done."""
    key = part_key(data, span.file, span)
    record, skip = part_file(data, f"{key}.json"), data.on_damage == "skip"
    if exists(record):
        part = Part.model_validate_json(read_text(record))
        if skip or not part.damaged_documents:
            return part
    damage = Damage(skip)
    try:
        with publish(part_file(data, f"{key}.tokens")) as file:
            part = _write_documents(file, data, span, damage)
        write_text(record, part.model_dump_json())
    except OSError as error:
        raise disk_full(data.data_dir, error) if error.errno in NO_SPACE else error from None
    return part


def _write_documents(file: IO[bytes], data: DataConfig, span: Span, damage: Damage) -> Part:
    encode = _encoder(data)
    count = empty = position = 0
    for document in documents(span, data.text_column, damage):
        tokens = 0
        file.write(EOT_BYTES)
        try:
            for text in pieces(_chunks(document)):
                ids = encode(text)
                file.write(ids.data)
                tokens += ids.size
        except (DamagedDocumentError, UncuttableTextError) as error:
            damage.found(str(error))
            tokens = 0
        else:
            empty += tokens == 0
        if tokens:
            count, position = count + 1, position + 2 * (1 + tokens)
        else:  # neither an empty document nor a damaged one leaves a trace
            file.seek(position)
            file.truncate()
    return Part(
        documents=count,
        tokens=position // 2,
        empty_documents=empty,
        damaged_documents=damage.documents,
        damage=damage.places,
    )


def _chunks(document: Document) -> Iterable[str]:
    if not isinstance(document, str):
        return document
    if len(document) <= PIECE_CHARACTERS:
        return (document,)
    return (document[at : at + PIECE_CHARACTERS] for at in range(0, len(document), PIECE_CHARACTERS))


def _encoder(data: DataConfig) -> Encode:
    """The library that was asked for; another than tiktoken has to agree with it on the first documents of each span."""
    tiktoken = encoder()
    if data.encoder == "tiktoken":
        return tiktoken
    other, unchecked = encoder(data.encoder), DOCUMENTS_CHECKED

    def encode(text: str) -> np.ndarray:
        nonlocal unchecked
        ids = other(text)
        if unchecked:
            unchecked -= 1
            if not np.array_equal(ids, tiktoken(text)):
                raise ValueError(f"{data.encoder} gives other tokens than tiktoken: use --encoder tiktoken")
        return ids

    return encode


def disk_full(folder: str, error: OSError) -> OSError:
    return OSError(f"{folder}: {error.strerror}; what is finished stays: make room and run again to go on")
