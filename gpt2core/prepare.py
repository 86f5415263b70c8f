"""From text to token shards, restartable: each span of a source file becomes a part, the parts become the shards.

    begin (which files) -> parts.tokenize_span (in parallel) -> shard_writer.write_shards -> manifest

Parts and shards appear whole or not at all, so a run that was killed goes on with what is missing. The result depends
on the sources and the options only, never on how many processes made it or how often they died. Processes hand each
other file names and counts, never documents or tokens.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from gpt2core import lock
from gpt2core.config import DataConfig
from gpt2core.flags import Parser, add_settings, main_guard
from gpt2core.launch import die_with_parent, end_on_sigterm, tell, tie_to_parent
from gpt2core.parts import NO_SPACE, PARTS, Part, disk_full, part_file, part_key, tokenize_span
from gpt2core.shard_writer import Extent, write_shards
from gpt2core.shards import MANIFEST, SHARD_NAME, Manifest, SourceRecord, read_manifest
from gpt2core.sources import DAMAGE_LISTED, SourceError, SourceFile, Span, list_sources, spans
from gpt2core.storage import exists, file_sizes, is_remote, join, local_path, read_text, remove, write_text
from gpt2core.tokenizer import EOT, VOCAB_BPE_SHA256

PLAN = "plan.json"
SECONDS_BETWEEN_LINES = 2.0

Progress = Callable[[str], None]


class Plan(BaseModel):
    """What is being made: the options that the shards depend on, and the files as they were at the start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    options: dict[str, Any]
    revision: str | None
    files: list[SourceFile]


class Tokenized(BaseModel):
    """The record of a tokenized file, written when all its parts are there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    parts: list[str]  # names of the parts, in order
    tokens_of_parts: list[int]
    record: SourceRecord


class FileProgress(BaseModel):
    """How far the tokenization of a file is; for whoever watches."""

    fraction: float
    tokens: int
    tokens_per_sec: float


def prepare(data: DataConfig, progress: Progress = print) -> Manifest:
    """Makes the dataset, or what is missing of it, and returns its manifest.

    A second run on the same folder waits for the first, and then goes on from what that one left.
    Raises ValueError when the source or the folder will not do, SourceError when the source cannot be reached.
    """
    manifest = complete(data)
    if manifest is None or exists(join(data.data_dir, PARTS)):
        with _folder_lock(data, progress):
            manifest = complete(data) or _make(data, progress)
            remove(join(data.data_dir, PARTS))  # of this run, or of one that was killed before it came to it
    progress(f"{data.data_dir} is complete: {describe(manifest)}")
    return manifest


def _make(data: DataConfig, progress: Progress) -> Manifest:
    plan = _begin(data)
    try:
        return _assemble(data, plan, _tokenize(data, plan.files, progress), progress)
    except FileNotFoundError:
        # remote storage knows no locks: another run may have finished, and removed the parts that we read
        if manifest := complete(data):
            return manifest
        raise


def prepare_file(data: DataConfig, url: str, progress: Progress = print) -> SourceRecord:
    """The part of `prepare` that concerns one file of a plan that was begun; several may run at once."""
    with _folder_lock(data, progress, shared=True):
        if record := read_record(data, url):
            return record
        plan = read_plan(data)
        files = [file for file in plan.files if file.url == url] if plan else []
        if not files:
            raise ValueError(f"{data.data_dir}: no dataset that was begun there has a file {url}")
        return _tokenize(data, files, progress)[0].record


@contextmanager
def _folder_lock(data: DataConfig, progress: Progress, shared: bool = False) -> Iterator[None]:
    """One run at a time on a local folder; on remote storage two runs write the same bytes, at twice the cost."""
    if is_remote(data.data_dir):
        yield
        return

    def on_wait(holder: str) -> None:
        progress(f"{data.data_dir} is being prepared by {holder}; waiting for it to end")

    folder = local_path(data.data_dir)
    with lock.hold(folder / lock.LOCK_FILE, shared=shared, on_wait=on_wait):
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [lock.LOCK_FILE]:  # what was refused leaves no trace
                shutil.rmtree(folder)


def describe(manifest: Manifest) -> str:
    tokens = sum(shard.tokens for shard in manifest.shards)
    documents = sum(source.documents for source in manifest.sources)
    empty = sum(source.empty_documents for source in manifest.sources)
    damaged = sum(source.damaged_documents for source in manifest.sources)
    left_out = f", left out: {empty:,} empty and {damaged:,} damaged" if empty or damaged else ""
    return f"{tokens:,} tokens of {documents:,} documents in {len(manifest.shards)} shards{left_out}"


# --- the plan --------------------------------------------------------------------------------------------------------


def complete(data: DataConfig) -> Manifest | None:
    """The manifest of the dataset if it is there, made from this source with these options; the source is not asked.

    Raises ValueError when the folder holds a dataset made from something else.
    """
    manifest = read_manifest(data.data_dir)
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
    names = file_sizes(data.data_dir)
    splits = {match["split"] for name in names if (match := SHARD_NAME.match(name))}
    return splits == {"train", "val"} and MANIFEST not in names and read_plan(data) is None


def read_plan(data: DataConfig) -> Plan | None:
    """The plan of a dataset half made, None where nothing was begun."""
    plan = part_file(data, PLAN)
    return Plan.model_validate_json(read_text(plan)) if exists(plan) else None


def begin(data: DataConfig, progress: Progress = print) -> Plan | None:
    """Lists the source for `prepare_file`; None when the dataset is complete. Raises as `prepare` does."""
    if complete(data):
        return None
    with _folder_lock(data, progress):
        return None if complete(data) else _begin(data)


def _begin(data: DataConfig) -> Plan:
    """Lists the source and writes down what is to be made of it.

    A hub dataset half made goes on with the commit it was begun with. Raises ValueError when the folder holds
    something else, which stays as it is.
    """
    options, begun = _options(data), read_plan(data)
    if begun is None:
        if any(SHARD_NAME.match(name) for name in file_sizes(data.data_dir)):
            raise ValueError(
                f"{data.data_dir} holds shards without a {MANIFEST}: train on them as they are (nothing to prepare), "
                f"or give another --data_dir"
            )
    elif begun.options != options | {"shard_size": begun.options["shard_size"]} and _has_parts(data):
        raise ValueError(  # parts do not depend on the shard size, but on all other options
            f"{data.data_dir} holds another dataset, half made ({_difference(begun.options, options)}): "
            f"give another --data_dir or remove it"
        )
    elif begun.revision:
        return _write_plan(data, begun.model_copy(update={"options": options}))
    files, revision = list_sources(data)
    return _write_plan(data, Plan(options=options, revision=revision, files=files))


def _write_plan(data: DataConfig, plan: Plan) -> Plan:
    if not is_remote(data.data_dir):
        _remove_left_overs(local_path(data.data_dir))
    write_text(part_file(data, PLAN), plan.model_dump_json(indent=2))
    return plan


def _remove_left_overs(folder: Path) -> None:
    """Removes what killed processes left half written of parts, shards and manifest, and nothing else of the folder."""
    for path in [*folder.glob(".*.tmp"), *(folder / PARTS).glob(".*.tmp")]:
        name = path.name.removeprefix(".")
        if (
            path.parent.name == PARTS
            or name.startswith(MANIFEST)
            or SHARD_NAME.match(name.partition(".npy")[0] + ".npy")
        ):
            path.unlink(missing_ok=True)


def _has_parts(data: DataConfig) -> bool:
    return any(name.endswith(".tokens") for name in file_sizes(join(data.data_dir, PARTS)))


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


# --- parts -----------------------------------------------------------------------------------------------------------


def _tokenize(data: DataConfig, files: list[SourceFile], progress: Progress) -> list[Tokenized]:
    """Makes the parts that are missing, all cores at work on spans of any file, and returns every file's record.

    What fails does not stop the rest: the first error is raised when all is done.
    """
    done, spans_of, errors = _find_work(data, files)
    for error in errors:
        progress(f"error, and the rest goes on: {error}")
    parts: dict[Span, Part] = {}
    tally = _Tally(data, [span for of_file in spans_of.values() for span in of_file], progress)

    def finish(file: SourceFile) -> None:
        if all(span in parts for span in spans_of[file]):
            done[file] = _write_tokenized(data, file, {span: parts[span] for span in spans_of[file]})
            progress(f"[{len(done)}/{len(files)}] {_describe_file(done[file].record)}")

    for file in [file for file, of_file in spans_of.items() if not of_file]:  # parquet without a row
        finish(file)
    for span, outcome in _work_on(data, tally.spans):
        if isinstance(outcome, Exception):
            errors.append(outcome)
            progress(f"error, and the rest goes on: {outcome}")
        else:
            parts[span] = outcome
            tally.add(span, outcome)
            finish(span.file)
    if errors:
        raise errors[0]
    return [done[file] for file in files]


def _find_work(
    data: DataConfig, files: list[SourceFile]
) -> tuple[dict[SourceFile, Tokenized], dict[SourceFile, list[Span]], list[Exception]]:
    """What is done, the spans of what is not, and the errors of what cannot be read; several files at a time, for each
    takes a request or two where the storage is far away."""
    with ThreadPoolExecutor(8) as threads:
        records = dict(zip(files, threads.map(lambda file: _read_tokenized(data, file), files), strict=True))
        todo = [file for file, record in records.items() if record is None]
        found = list(zip(todo, threads.map(lambda file: _spans_or_error(data, file), todo), strict=True))
    done = {file: record for file, record in records.items() if record}
    spans_of = {file: spans for file, spans in found if isinstance(spans, list)}
    return done, spans_of, [error for _, error in found if isinstance(error, Exception)]


def _spans_or_error(data: DataConfig, file: SourceFile) -> list[Span] | ValueError | OSError:
    try:
        return spans(file, data.text_column)
    except (ValueError, OSError) as error:
        return error


def _read_tokenized(data: DataConfig, file: SourceFile) -> Tokenized | None:
    path = part_file(data, f"{part_key(data, file)}.json")
    if not exists(path):
        return None
    tokenized = Tokenized.model_validate_json(read_text(path))
    return tokenized if data.on_damage == "skip" or not tokenized.record.damaged_documents else None


def read_record(data: DataConfig, url: str) -> SourceRecord | None:
    """The record of a file of the plan or of the finished dataset, None while it is not there."""
    manifest, plan = complete(data), read_plan(data)
    if manifest:
        return next((source for source in manifest.sources if source.url == url), None)
    file = next((file for file in plan.files if file.url == url), None) if plan else None
    tokenized = _read_tokenized(data, file) if file else None
    return tokenized.record if tokenized else None


def _write_tokenized(data: DataConfig, file: SourceFile, parts: dict[Span, Part]) -> Tokenized:
    record = SourceRecord(
        url=file.url,
        size_bytes=file.size_bytes,
        documents=sum(part.documents for part in parts.values()),
        tokens=sum(part.tokens for part in parts.values()),
        empty_documents=sum(part.empty_documents for part in parts.values()),
        damaged_documents=sum(part.damaged_documents for part in parts.values()),
        damage=[place for part in parts.values() for place in part.damage][:DAMAGE_LISTED],
    )
    keys = [part_key(data, file, span) for span in parts]
    tokenized = Tokenized(parts=keys, tokens_of_parts=[part.tokens for part in parts.values()], record=record)
    write_text(part_file(data, f"{part_key(data, file)}.json"), tokenized.model_dump_json())
    return tokenized


def _describe_file(record: SourceRecord) -> str:
    damaged = f", {record.damaged_documents:,} damaged left out" if record.damaged_documents else ""
    return f"{record.url}: {record.documents:,} documents, {record.tokens:,} tokens{damaged}"


class _Tally:
    """How far the tokenization is, said every few seconds and written beside the parts for whoever watches."""

    def __init__(self, data: DataConfig, todo: list[Span], progress: Progress) -> None:
        self.data, self.spans, self.progress = data, todo, progress
        self.text_bytes = sum(span.text_bytes for span in todo)
        self.done_bytes = self.tokens = self.done_spans = 0
        self.started = self.said = time.monotonic()

    def add(self, span: Span, part: Part) -> None:
        self.done_bytes += span.text_bytes
        self.tokens += part.tokens
        self.done_spans += 1
        now = time.monotonic()
        if now - self.said < SECONDS_BETWEEN_LINES and self.done_spans < len(self.spans):
            return
        self.said, seconds, fraction = now, now - self.started, self.done_bytes / max(1, self.text_bytes)
        left = timedelta(seconds=round(seconds / fraction - seconds)) if fraction else "unknown"
        rate = self.tokens / seconds
        self.progress(f"tokenized {fraction:.1%}: {self.tokens:,} tokens, {rate:,.0f} tokens/s, {left} left")
        written = FileProgress(fraction=fraction, tokens=self.tokens, tokens_per_sec=rate)
        write_text(part_file(self.data, f"{part_key(self.data, span.file)}.progress.json"), written.model_dump_json())


def read_progress(data: DataConfig, url: str) -> FileProgress | None:
    """How far `prepare_file` is, None while there is nothing to say."""
    plan = read_plan(data)
    file = next((file for file in plan.files if file.url == url), None) if plan else None
    written = part_file(data, f"{part_key(data, file)}.progress.json") if file else None
    return FileProgress.model_validate_json(read_text(written)) if written and exists(written) else None


def _work_on(data: DataConfig, todo: list[Span]) -> Iterator[tuple[Span, Part | Exception]]:
    """Each span with its part or its error, as they come, from one process a core.

    A file that cannot be reached is asked for once, not for each of its spans: the libraries try for minutes.
    """
    lost: set[SourceFile] = set()
    for span, outcome in _outcomes(data, todo, lost):
        if isinstance(outcome, SourceError):
            if span.file in lost:
                continue
            lost.add(span.file)
        yield span, outcome


def _outcomes(data: DataConfig, todo: list[Span], lost: set[SourceFile]) -> Iterator[tuple[Span, Part | Exception]]:
    workers = min(len(todo), data.num_workers or os.cpu_count() or 1)
    if workers <= 1:
        for span in todo:
            if span.file not in lost:
                yield span, _tokenize_or_error(data, span)
        return
    others = set(active_children())
    # spawn, not fork: the caller may hold threads (Prefect's, fsspec's) that a fork would freeze
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(os.getpid(),)
    ) as pool:
        try:
            futures = {pool.submit(_tokenize_or_error, data, span): span for span in todo}
            for future in as_completed(futures):
                if not future.cancelled():
                    yield futures[future], future.result()
                for other, span in futures.items() if futures[future].file in lost else ():
                    if span.file in lost:
                        other.cancel()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a tokenizing process was killed, perhaps for want of memory: "
                "run again to go on, with a smaller --num_workers if it happens again"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - others:  # a part appears whole or not at all
                process.terminate()
            raise


def _start_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl+C reaches all of a terminal's processes; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    tie_to_parent(parent)


def _tokenize_or_error(data: DataConfig, span: Span) -> Part | ValueError | OSError:
    try:
        return tokenize_span(data, span)
    except (ValueError, OSError) as error:
        return error


# --- shards ----------------------------------------------------------------------------------------------------------


def _assemble(data: DataConfig, plan: Plan, files: list[Tokenized], progress: Progress) -> Manifest:
    """Cuts the parts, in source order, into shards of shard_size tokens, and writes the manifest last.

    Raises ValueError when the text gives no train shard beside the validation shard, OSError when the disk is full.
    """
    parts = [
        Extent(part_file(data, f"{key}.tokens"), tokens)
        for file in files
        for key, tokens in zip(file.parts, file.tokens_of_parts, strict=True)
    ]
    total = sum(part.tokens for part in parts)
    if total <= data.shard_size + 1:
        raise ValueError(
            f"source {data.source} gives {total:,} tokens, and the first shard_size {data.shard_size:,} are for validation: "
            f"none are left to train on; give more text or a smaller --shard_size"
        )
    try:
        shards = write_shards(data.data_dir, parts, data.shard_size, progress)
    except OSError as error:
        raise disk_full(data.data_dir, error) if error.errno in NO_SPACE else error from None
    manifest = Manifest(
        **plan.options,
        source_revision=plan.revision,
        eot_token=EOT,
        sources=[file.record for file in files],
        shards=shards,
    )
    write_text(join(data.data_dir, MANIFEST), manifest.model_dump_json(indent=2) + "\n")
    return manifest


def main(argv: list[str] | None = None) -> None:
    end_on_sigterm()  # a part appears whole or not at all
    die_with_parent()
    parser = Parser(prog="python -m gpt2core.prepare", description=(__doc__ or "").splitlines()[0])
    add_settings(parser, DataConfig)
    parser.add_argument("--only", metavar="URL", help="tokenize this file of a dataset that was begun, and no more")
    arguments = vars(parser.parse_args(argv))
    only = arguments.pop("only")
    data = DataConfig(**arguments)
    if only:
        prepare_file(data, only, tell)
    else:
        prepare(data, tell)


if __name__ == "__main__":
    main_guard(main)
