"""`gpt2 data verify` and `gpt2 data show`: everything that is wrong with a dataset, and what it is made of."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from gpt2core.config import VOCAB_SIZE
from gpt2core.launch import tell
from gpt2core.listing import show, size, table
from gpt2core.shards import FRONT_BYTES, MANIFEST, SHARD_NAME, SPLITS, Manifest, layout, list_shards, read_manifest
from gpt2core.storage import Location, file_sizes, join, read_bytes
from gpt2core.tokenizer import EOT, VOCAB_BPE_SHA256

CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class ShardCheck:
    """What one shard holds, from its first byte to its last; None where it cannot be told."""

    name: str
    tokens: int | None = None
    documents: int | None = None  # tokens 50256
    sha256: str | None = None
    problem: str | None = None


def verify(data_dir: Location, progress: Callable[[str], None] = tell) -> list[str]:
    """Reads every byte of a dataset and returns what is wrong, a line each. Raises ValueError when there is none."""
    manifest, problems = _manifest(data_dir)
    if manifest is None and not problems:
        progress(f"{data_dir} has no {MANIFEST}: hashes, documents and totals cannot be checked, the shards can")
    for split in SPLITS:
        try:
            list_shards(data_dir, split)
        except ValueError as error:
            problems += [str(error)] if str(error) not in problems else []
    found = {name: size_bytes for name, size_bytes in sorted(file_sizes(data_dir).items()) if SHARD_NAME.match(name)}
    checks = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing and counting let other threads run
        for check in pool.map(lambda item: check_shard(data_dir, *item), found.items()):
            checks.append(check)
            tokens = "damaged" if check.tokens is None else f"{check.tokens:,} tokens"
            progress(f"[{len(checks)}/{len(found)}] {check.name}: {tokens}")
    problems += [check.problem for check in checks if check.problem]
    if manifest:
        problems += _against_manifest(data_dir, manifest, {check.name: check for check in checks})
    elif found:
        problems += _gaps(data_dir, sorted(found))
    return problems


def _manifest(data_dir: Location) -> tuple[Manifest | None, list[str]]:
    try:
        return read_manifest(data_dir), []
    except ValueError as error:
        return None, [str(error)]


def check_shard(data_dir: Location, name: str, size_bytes: int) -> ShardCheck:
    """Reads a whole shard; what is wrong with it, be it that it cannot be read, is in the answer."""
    location = join(data_dir, name)
    try:
        return _read_shard(location, name, size_bytes)
    except (ValueError, OSError) as error:
        return ShardCheck(name, problem=str(error))


def _read_shard(location: str, name: str, size_bytes: int) -> ShardCheck:
    header_bytes, num_tokens = layout(location, read_bytes(location, 0, min(FRONT_BYTES, size_bytes)), size_bytes)
    digest, documents, foreign, first_foreign = hashlib.sha256(), 0, 0, None
    for start in range(0, size_bytes, CHUNK_BYTES):
        chunk = read_bytes(location, start, min(start + CHUNK_BYTES, size_bytes))
        digest.update(chunk)
        skipped = min(
            max(0, header_bytes - start), len(chunk)
        )  # headers have an even number of bytes, and so has a chunk
        tokens = np.frombuffer(chunk, np.uint16, offset=skipped)
        documents += int((tokens == EOT).sum())
        if (bad := np.flatnonzero(tokens >= VOCAB_SIZE)).size:
            foreign += bad.size
            if first_foreign is None:
                first_foreign = int(bad[0]) + (start + skipped - header_bytes) // 2
    problem = None
    if foreign:
        problem = (
            f"{location}: {foreign:,} ids are {VOCAB_SIZE} or more, the first at token {first_foreign:,}; "
            f"GPT-2 has ids up to {VOCAB_SIZE - 1}"
        )
    return ShardCheck(name, num_tokens, documents, digest.hexdigest(), problem)


def _against_manifest(data_dir: Location, manifest: Manifest, checks: dict[str, ShardCheck]) -> Iterator[str]:
    where = join(data_dir, MANIFEST)
    records = {record.name: record for record in manifest.shards}
    for name in sorted(records.keys() - checks.keys()):
        yield f"{join(data_dir, name)} is missing: {where} has {records[name].tokens:,} tokens for it"
    for name in sorted(checks.keys() - records.keys()):
        yield f"{join(data_dir, name)} is one too many: {where} does not have it"
    for name in sorted(checks.keys() & records.keys()):
        check, record = checks[name], records[name]
        if check.tokens is not None and check.tokens != record.tokens:
            yield f"{join(data_dir, name)} has {check.tokens:,} tokens, in {where} are {record.tokens:,}"
        elif check.sha256 is not None and check.sha256 != record.sha256:
            yield f"{join(data_dir, name)} has sha256 {check.sha256}, in {where} is {record.sha256}"
    if manifest.tokenizer_sha256 != VOCAB_BPE_SHA256:
        yield f"{where}: tokenizer_sha256 is {manifest.tokenizer_sha256}, GPT-2's vocab.bpe has {VOCAB_BPE_SHA256}"
    if manifest.eot_token != EOT:
        yield f"{where}: eot_token is {manifest.eot_token}, GPT-2's <|endoftext|> is {EOT}"
    yield from _totals(where, manifest)
    documents = [check.documents for check in checks.values()]
    expected = sum(source.documents for source in manifest.sources)
    # where a shard is missing or damaged, that is the problem; the lone last token that the shards may lack is no EOT,
    # for a document's text follows it
    if checks.keys() == records.keys() and None not in documents and sum(filter(None, documents)) != expected:
        yield (
            f"{data_dir}: the shards hold {sum(filter(None, documents)):,} tokens {EOT}, one in front of each document, "
            f"and {where} has {expected:,} documents"
        )


def _totals(where: str, manifest: Manifest) -> Iterator[str]:
    """Shards are full but the last, and hold what the sources gave but for a lone last token, which makes no sequence."""
    of_sources = sum(source.tokens for source in manifest.sources)
    of_shards = sum(record.tokens for record in manifest.shards)
    if of_shards != of_sources - (of_sources % manifest.shard_size == 1):
        yield f"{where}: its sources have {of_sources:,} tokens together, its shards {of_shards:,}"
    for record in manifest.shards[:-1]:
        if record.tokens != manifest.shard_size:
            yield f"{where}: {record.name} has {record.tokens:,} tokens, shard_size is {manifest.shard_size:,}"


def _gaps(data_dir: Location, names: list[str]) -> Iterator[str]:
    """Numbers that no shard has though higher ones are there."""
    numbers = {int(name[-10:-4]) for name in names}
    for number in sorted(set(range(max(numbers))) - numbers):
        yield f"{data_dir} has no shard number {number:06d}, and has shards up to {max(numbers):06d}"


def print_problems(data_dir: Location) -> int:
    """Checks a dataset, prints each problem to stderr and returns how many there are."""
    problems = verify(data_dir)
    for problem in problems:
        print(problem, file=sys.stderr)
    tell(f"{data_dir}: {len(problems)} problems" if problems else f"{data_dir} is whole")
    return len(problems)


def print_dataset(data_dir: Location) -> None:
    """Prints what the manifest says, or, where there is none, what the names and sizes of the shards say."""
    manifest = read_manifest(data_dir)
    if manifest is None:
        found = {name: size_bytes for split in SPLITS for name, size_bytes in list_shards(data_dir, split).items()}
        rows = [(name, size(size_bytes)) for name, size_bytes in sorted(found.items())]
        print(f"{data_dir} has no {MANIFEST}")
        show(table(f"{len(found)} shards", ("shard", "size"), rows))
        return
    print(f"source {manifest.source}{f' ({manifest.source_config})' if manifest.source_config else ''}")
    print(f"revision {manifest.source_revision or 'not known'}, column {manifest.text_column}")
    print(f"tokenizer {manifest.tokenizer}, vocab.bpe {manifest.tokenizer_sha256[:12]}, EOT {manifest.eot_token}")
    sources = [
        (s.url, *(f"{n:,}" for n in (s.documents, s.tokens, s.empty_documents, s.damaged_documents)))
        for s in manifest.sources
    ]
    columns = ("source", "documents", "tokens", "empty", "damaged")
    show(table(_sum_of_sources(manifest), columns, sources))
    for damage in (damage for source in manifest.sources for damage in source.damage):
        print(f"damaged: {damage}")
    shards = [(record.name, f"{record.tokens:,}", record.sha256[:12]) for record in manifest.shards]
    tokens = sum(record.tokens for record in manifest.shards)
    show(table(f"{len(shards)} shards, {tokens:,} tokens", ("shard", "tokens", "sha256"), shards))


def _sum_of_sources(manifest: Manifest) -> str:
    documents, empty, damaged = (
        sum(getattr(source, name) for source in manifest.sources)
        for name in ("documents", "empty_documents", "damaged_documents")
    )
    return f"{len(manifest.sources)} sources, {documents:,} documents; left out: {empty:,} empty, {damaged:,} damaged"
