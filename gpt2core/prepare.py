"""From text to token shards, restartable: each source file becomes a part, the parts together become the shards.

    list_sources -> tokenize_source (one a file, in parallel) -> assemble

Parts and shards appear whole or not at all, so a run that was killed goes on with what is missing. The result depends
on the sources and the options only, never on how many processes made it or how often they died.
"""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from gpt2core.config import DataConfig
from gpt2core.flags import Parser, add_settings, main_guard
from gpt2core.launch import die_with_parent, tie_to_parent
from gpt2core.shards import (
    MANIFEST,
    SHARD_NAME,
    Manifest,
    ShardRecord,
    SourceRecord,
    file_sha256,
    read_manifest,
    shard_name,
)
from gpt2core.storage import publish, write_json, write_text
from gpt2core.tokenizer import EOT, VOCAB_BPE_SHA256, encoding

# What `datasets` calls the reader of a file with this ending.
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".txt": "text", ".md": "text"}
COMPRESSION = (".gz", ".zst", ".xz", ".bz2")

PARTS = ".parts"  # folder of the parts, gone once the manifest is written
DOCUMENTS_PER_BATCH = 256
HUB_TIMEOUT_S = 10.0

Progress = Callable[[str], None]


def prepare(data: DataConfig, progress: Progress = print) -> Manifest:
    """Makes the dataset, or what is missing of it, and returns its manifest.

    Raises ValueError when the source or the folder will not do, naming it.
    """
    if manifest := complete(data):
        progress(f"{data.data_dir} is complete: {describe(manifest)}")
        return manifest
    sources = list_sources(data)
    begin(data, sources)
    for number, record in enumerate(_tokenize_all(data, sources), start=1):
        progress(f"[{number}/{len(sources)}] {record.url}: {record.documents:,} documents, {record.tokens:,} tokens")
    manifest = assemble(data, sources, progress)
    progress(f"{data.data_dir} is complete: {describe(manifest)}")
    return manifest


def _tokenize_all(data: DataConfig, sources: list[str]) -> Iterator[SourceRecord]:
    """The sources' records as they are done, worked on by one process a core."""
    workers = min(len(sources), data.num_workers or os.cpu_count() or 1)
    if workers == 1:
        yield from (tokenize_source(data, source) for source in sources)
        return
    # spawn, not fork: the caller may hold threads (Prefect's, fsspec's) that a fork would freeze
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=tie_to_parent, initargs=(os.getpid(),)
    ) as pool:
        try:
            yield from (
                done.result() for done in as_completed([pool.submit(tokenize_source, data, s) for s in sources])
            )
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def describe(manifest: Manifest) -> str:
    tokens = sum(shard.tokens for shard in manifest.shards)
    documents = sum(source.documents for source in manifest.sources)
    return f"{tokens:,} tokens of {documents:,} documents in {len(manifest.shards)} shards"


# --- sources ---------------------------------------------------------------------------------------------------------


def list_sources(data: DataConfig) -> list[str]:
    """URLs of the source's files, in order. Raises ValueError when there are none or they are of no known kind."""
    urls = _hub_files(data) if _is_hub_dataset(data.source) else _matching_files(data.source)
    for url in urls:
        _reader(url)
    return urls


def _is_hub_dataset(source: str) -> bool:
    """Whether this is `owner/name`, and not a path: it has no file ending, no glob, and nothing of that name is here."""
    return (
        bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and _ending(source) not in READERS and not Path(source).exists()
    )


def _hub_files(data: DataConfig) -> list[str]:
    import datasets
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(data.source, timeout=HUB_TIMEOUT_S)  # answers at once where load_dataset would keep trying
        builder = datasets.load_dataset_builder(data.source, data.hub_config())
    except Exception as error:  # the hub's client raises a dozen kinds, and each means the same to the user
        raise ValueError(
            f"{data.source} cannot be had from the Hugging Face hub ({type(error).__name__}: {_first_line(error)}); "
            f"check the name and the network, or give --source a path or URL"
        ) from None
    files = (builder.config.data_files or {}).get("train", [])
    if not files:
        raise ValueError(f"{data.source}: this dataset has no files of a 'train' split")
    return [str(file) for file in files]


def _matching_files(source: str) -> list[str]:
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(source)
        if filesystem.isfile(path):
            files = [path]
        else:
            found = filesystem.ls(path, detail=False) if filesystem.isdir(path) else filesystem.glob(path)
            files = [name for name in sorted(found) if _ending(name) in READERS and filesystem.isfile(name)]
        sizes = [filesystem.size(name) for name in files]
    except FileNotFoundError:
        files, sizes = [], []
    except (ImportError, ValueError, OSError) as error:
        raise ValueError(f"source {source}: {_first_line(error)}") from None
    if not files:
        raise ValueError(
            f"source {source}: there is no such file, nor a match for it; give a path, a glob or an fsspec URL"
        )
    if empty := [name for name, size in zip(files, sizes, strict=True) if size == 0]:
        raise ValueError(f"source {empty[0]} is empty: there is no text in it")
    return [filesystem.unstrip_protocol(name) if "://" in source else name for name in files]


def _ending(url: str) -> str:
    path = Path(url)
    return Path(path.stem).suffix if path.suffix in COMPRESSION else path.suffix


def _reader(url: str) -> str:
    try:
        return READERS[_ending(url)]
    except KeyError:
        raise ValueError(f"source {url}: cannot tell its format; known endings are {', '.join(READERS)}") from None


def iter_documents(url: str, text_column: str) -> Iterator[list[str | None]]:
    """The texts of one source file, batch by batch. Raises ValueError, naming the file, when it cannot be read."""
    import datasets
    import fsspec
    from pyarrow import parquet

    reader = _reader(url)
    options: dict[str, Any] = {"sample_by": "document"} if reader == "text" else {}
    if reader == "parquet":
        options["columns"] = [text_column]
    column = "text" if reader == "text" else text_column
    row = 0
    try:
        if reader == "parquet":
            with fsspec.open(url, "rb") as file:
                _require_column(column, parquet.read_schema(file).names)
        rows = datasets.load_dataset(reader, data_files=[glob.escape(url)], split="train", streaming=True, **options)
        for batch in rows.iter(DOCUMENTS_PER_BATCH):
            _require_column(column, batch)
            if bad := [text for text in batch[column] if not (text is None or isinstance(text, str))]:
                raise TypeError(f"column '{column}' holds {type(bad[0]).__name__} and not text")
            yield batch[column]
            row += len(batch[column])
    except Exception as error:  # every reader has its own errors; the file and the row are what helps
        raise ValueError(f"source {url}, after row {row}: {_first_line(error)}") from error


def _require_column(column: str, columns: Iterable[str]) -> None:
    if column not in columns:
        raise KeyError(f"it has no column '{column}' but {', '.join(columns)}; name it with --text_column")


def _first_line(error: BaseException) -> str:
    root = error.args[0] if isinstance(error, KeyError) and error.args else error
    return str(root).strip().split("\n")[0] or type(error).__name__


# --- parts -----------------------------------------------------------------------------------------------------------


def complete(data: DataConfig) -> Manifest | None:
    """The manifest of the dataset if it is there, made from this source with these options; the source is not asked.

    Raises ValueError when the folder holds a dataset made from something else.
    """
    manifest = read_manifest(Path(data.data_dir))
    if manifest is None:
        return None
    wanted = _options(data)
    made_of = manifest.model_dump(include=set(wanted))
    if made_of != wanted:
        raise ValueError(
            f"{data.data_dir} holds another dataset ({_difference(made_of, wanted)}): give another --data_dir or remove it"
        )
    return manifest


def is_ready_made(data: DataConfig) -> bool:
    """Whether the folder holds shards that were made elsewhere, as build-nanogpt makes them: no manifest, no parts."""
    folder = Path(data.data_dir)
    if not folder.is_dir() or (folder / MANIFEST).exists() or (folder / PARTS).exists():
        return False
    splits = {match["split"] for path in folder.iterdir() if (match := SHARD_NAME.match(path.name))}
    return splits == {"train", "val"}


def begin(data: DataConfig, sources: list[str]) -> None:
    """Makes the folder ready for parts.

    Raises ValueError when the folder holds something else, which stays as it is.
    """
    folder = Path(data.data_dir)
    wanted = _options(data) | {"sources": sources}
    plan = folder / PARTS / "plan.json"
    if plan.exists():
        begun = json.loads(plan.read_text(encoding="utf-8"))
        has_parts = any(path != plan for path in plan.parent.glob("*.json"))
        if has_parts and begun != wanted | {"shard_size": begun["shard_size"]}:  # a part does not depend on it
            raise ValueError(
                f"{folder} holds another dataset, half made ({_difference(begun, wanted)}): "
                f"give another --data_dir or remove it"
            )
        write_json(plan, wanted)
    elif folder.exists() and any(SHARD_NAME.match(path.name) for path in folder.iterdir()):
        raise ValueError(
            f"{folder} holds shards without a {MANIFEST}: train on them as they are (nothing to prepare), "
            f"or give another --data_dir"
        )
    else:
        write_json(plan, wanted)


def _options(data: DataConfig) -> dict[str, Any]:
    """What the shards depend on, beside the source's files."""
    return {
        "source": data.source,
        "source_config": data.hub_config(),
        "text_column": data.text_column,
        "shard_size": data.shard_size,
        "tokenizer_sha256": VOCAB_BPE_SHA256,
    }


def _difference(there: dict[str, Any], wanted: dict[str, Any]) -> str:
    return "; ".join(
        f"{name}: {there.get(name)} there, {wanted[name]} wanted" for name in wanted if there.get(name) != wanted[name]
    )


def _part_files(data: DataConfig, index: int) -> tuple[Path, Path]:
    stem = Path(data.data_dir) / PARTS / f"{index:06d}"
    return stem.with_suffix(".tokens"), stem.with_suffix(".json")


def tokenize_source(data: DataConfig, source: str) -> SourceRecord:
    """Writes one source's tokens as a part, each document preceded by EOT; returns at once when that is done."""
    index = _planned_sources(data).index(source)
    tokens_file, record_file = _part_files(data, index)
    if record_file.exists():
        return SourceRecord.model_validate_json(record_file.read_text(encoding="utf-8"))
    encode = encoding().encode_to_numpy
    documents = tokens = empty = 0
    with publish(tokens_file) as part:
        for texts in iter_documents(source, data.text_column):
            for text in texts:
                if not text:
                    empty += 1
                    continue
                ids = encode(text, disallowed_special=()).astype(np.uint16)
                part.write(np.uint16(EOT).tobytes())
                part.write(ids.tobytes())
                documents += 1
                tokens += 1 + ids.size
    record = SourceRecord(url=source, documents=documents, tokens=tokens, empty_documents=empty)
    write_text(record_file, record.model_dump_json())
    return record


def _planned_sources(data: DataConfig) -> list[str]:
    return json.loads((Path(data.data_dir) / PARTS / "plan.json").read_text(encoding="utf-8"))["sources"]


# --- shards ----------------------------------------------------------------------------------------------------------


def assemble(data: DataConfig, sources: list[str], progress: Progress = print) -> Manifest:
    """Cuts the parts, in source order, into shards of shard_size tokens, and writes the manifest last.

    Raises ValueError when the text gives no train shard beside the validation shard.
    """
    folder = Path(data.data_dir)
    records = [
        SourceRecord.model_validate_json(_part_files(data, i)[1].read_text(encoding="utf-8"))
        for i in range(len(sources))
    ]
    total = sum(record.tokens for record in records)
    if total <= data.shard_size + 1:
        raise ValueError(
            f"source {data.source} gives {total:,} tokens, and the first shard_size {data.shard_size:,} are for validation: "
            f"none are left to train on; give more text or a smaller --shard_size"
        )
    _require_space(folder, 2 * total)
    parts = [np.memmap(_part_files(data, i)[0], np.uint16, "r") for i, record in enumerate(records) if record.tokens]
    for left_over in [*folder.glob("*.npy"), *folder.glob(".*.npy.*.tmp")]:  # of an attempt that died here
        left_over.unlink()
    shards = []
    for index, tokens in enumerate(_cut(parts, data.shard_size)):
        path = folder / shard_name(index)
        if tokens.size < 2:  # a lone last token makes no sequence
            continue
        with publish(path) as file:
            np.save(file, tokens)
        shards.append(ShardRecord(name=path.name, tokens=tokens.size, sha256=file_sha256(path)))
        progress(f"{path.name}: {tokens.size:,} tokens")
    manifest = Manifest(**_options(data) | {"sources": records, "shards": shards, "eot_token": EOT})
    write_text(folder / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    shutil.rmtree(folder / PARTS)
    return manifest


def _cut(parts: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The parts' tokens, end to end, in pieces of `size` tokens; the last piece may be shorter."""
    piece, filled = np.empty(size, np.uint16), 0
    for part in parts:
        start = 0
        while start < part.size:
            taken = min(size - filled, part.size - start)
            piece[filled : filled + taken] = part[start : start + taken]
            filled, start = filled + taken, start + taken
            if filled == size:
                yield piece
                filled = 0
    if filled:
        yield piece[:filled]


def _require_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free and the shards need {needed_bytes / 1e9:.1f} GB: free some space"
        )


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m gpt2core.prepare", description="Tokenize text into shards.")
    add_settings(parser, DataConfig)
    die_with_parent()
    prepare(DataConfig(**vars(parser.parse_args(argv))), progress=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main_guard(main)
