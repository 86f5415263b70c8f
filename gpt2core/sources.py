"""The text: which files a source has, the spans that they divide into, and the documents of a span.

A span is what one process reads in one go: row groups of a parquet file, bytes of a jsonl file, or a whole file.
"""

from __future__ import annotations

import codecs
import functools
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NoReturn

from pydantic import BaseModel, ConfigDict

from gpt2core.config import DataConfig
from gpt2core.storage import UnreachableError, first_line, is_gone, is_remote, local_path, remote_error

if TYPE_CHECKING:
    import pyarrow

FORMATS = {".parquet": "parquet", ".jsonl": "jsonl", ".json": "jsonl", ".txt": "text", ".md": "text"}
COMPRESSION = (".gz", ".zst", ".xz", ".bz2")

SPAN_BYTES = 32 << 20  # of text; about two seconds of work, which is what a kill can cost
BATCH_BYTES = 8 << 20  # of text, read at a time
CHUNK_BYTES = 1 << 20  # of a text file, decoded at a time
HUB_TIMEOUT_S = 10.0
DAMAGE_LISTED = 20  # places that are kept by name; all are counted


class SourceError(UnreachableError):
    """A source cannot be reached, or went away while it was read; trying again may help."""


class DamagedDocumentError(ValueError):
    """A document that comes in chunks turned out to be unreadable."""


class SourceFile(BaseModel):
    """One file of the source as it was when preparation began."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    url: str
    size_bytes: int
    version: str | None = None  # its ETag or its time of change; a hub file's is its commit, in its URL


@dataclass(frozen=True)
class Span:
    """Part of a file: row groups or bytes start to end, the last not included."""

    file: SourceFile
    start: int
    end: int
    text_bytes: int  # about how much text that is


@dataclass
class Damage:
    """What could not be read: raised at once, or counted."""

    skip: bool
    documents: int = 0
    places: list[str] = field(default_factory=list)
    here: Callable[[], str] = str  # place of the document that was handed out last

    def found(self, what: str, place: str = "", documents: int = 1) -> None:
        place = place or self.here()
        if not self.skip:
            raise ValueError(f"source {place}: {what}; mend it, or leave such documents out with --on_damage skip")
        self.documents += documents
        if len(self.places) < DAMAGE_LISTED:
            self.places.append(f"{place}: {what}")


# --- files -----------------------------------------------------------------------------------------------------------


def list_sources(data: DataConfig) -> tuple[list[SourceFile], str | None]:
    """The source's files in order, and the commit they are of when they lie on the hub.

    Raises ValueError when there are none or they are of no known kind, SourceError when the hub cannot be reached.
    """
    files, revision = (
        _hub_files(data) if is_hub_dataset(data.source) else (_matching_files(data.source, data.data_dir), None)
    )
    for file in files:
        _format(file.url)
    return files, revision


def is_hub_dataset(source: str) -> bool:
    """Whether this is `owner/name`, and not a path: it has no file ending, no glob, and nothing of that name is here."""
    return (
        bool(re.fullmatch(r"[\w.-]+/[\w.-]+", source)) and _ending(source) not in FORMATS and not Path(source).exists()
    )


def _hub_files(data: DataConfig) -> tuple[list[SourceFile], str | None]:
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = HfApi().dataset_info(data.source, timeout=HUB_TIMEOUT_S)  # answers where load_dataset would keep trying
        builder = datasets.load_dataset_builder(data.source, data.hub_config(), revision=info.sha)
        urls = [str(url) for url in (builder.config.data_files or {}).get("train", [])]
        sizes = _listed_sizes(urls)
    except Exception as error:  # the hub's client raises a dozen kinds, and each means the same to the user
        sentence = (
            f"{data.source} cannot be had from the Hugging Face hub ({type(error).__name__}: {first_line(error)}); "
            f"check the name and the network, or give --source a path or URL"
        )
        raise (ValueError if isinstance(error, RepositoryNotFoundError | ValueError) else SourceError)(
            sentence
        ) from None
    if not urls:
        raise ValueError(f"{data.source}: this dataset has no files of a 'train' split")
    return [SourceFile(url=url, size_bytes=sizes[url]) for url in urls], info.sha


def _listed_sizes(urls: list[str]) -> dict[str, int]:
    """Bytes of each file, by one listing a folder: asking file by file would take minutes."""
    import fsspec

    sizes: dict[str, int] = {}
    for folder in sorted({url.rpartition("/")[0] for url in urls}):
        filesystem, path = fsspec.url_to_fs(folder)
        for entry in filesystem.ls(path, detail=True):
            sizes[f"{folder}/{entry['name'].rpartition('/')[2]}"] = entry["size"]
    return sizes


def _matching_files(source: str, data_dir: str) -> list[SourceFile]:
    import fsspec

    try:
        filesystem, path = fsspec.url_to_fs(source)
        filesystem.invalidate_cache()
        if filesystem.isfile(path):
            names = [path]
        else:
            found = filesystem.ls(path, detail=False) if filesystem.isdir(path) else filesystem.glob(path)
            names = [name for name in sorted(found) if _ending(name) in FORMATS and filesystem.isfile(name)]
            if not is_remote(source):  # a ** may reach what we make
                own = Path(data_dir).resolve()
                names = [name for name in names if own not in Path(name).resolve().parents]
        infos = [filesystem.info(name) for name in names]
        if any(info["size"] is None for info in infos):
            raise ValueError("its server does not tell its size")
    except FileNotFoundError:
        names, infos = [], []
    except Exception as error:
        raise remote_error(f"source {source}", error) from None
    if not names:
        kind = (
            f"that folder has no files that end in {', '.join(FORMATS)}"
            if not is_remote(source) and Path(source).is_dir()
            else "there is no such file, nor a match for it"
        )
        raise ValueError(f"source {source}: {kind}; give a path, a glob or an fsspec URL")
    urls = [filesystem.unstrip_protocol(name) if "://" in source else name for name in names]
    files = [
        SourceFile(url=url, size_bytes=info["size"], version=_version(info))
        for url, info in zip(urls, infos, strict=True)
    ]
    if empty := [file.url for file in files if file.size_bytes == 0]:
        raise ValueError(f"source {empty[0]} is empty: there is no text in it")
    return files


def _version(info: dict[str, Any]) -> str | None:
    """What tells a file from another one of its name and size; the file systems of fsspec each have a name for it."""
    names = ("ETag", "etag", "mtime", "LastModified", "last_modified", "updated")
    return next((str(info[name]) for name in names if info.get(name)), None)


def _ending(url: str) -> str:
    path = Path(url)
    return (Path(path.stem).suffix if path.suffix in COMPRESSION else path.suffix).lower()


def _format(url: str) -> str:
    known = FORMATS.get(_ending(url))
    if known is None or (known == "parquet" and url.endswith(COMPRESSION)):
        raise ValueError(f"source {url}: cannot tell its format; known endings are {', '.join(FORMATS)}")
    return known


# --- spans -----------------------------------------------------------------------------------------------------------


def spans(file: SourceFile, text_column: str) -> list[Span]:
    """The spans of a file, in order.

    Raises ValueError when the file is not what its ending says or has no such column, SourceError when it is gone.
    """
    if _format(file.url) == "parquet":
        return _row_group_spans(file, text_column)
    if _format(file.url) == "jsonl" and not file.url.endswith(COMPRESSION):
        starts = range(0, file.size_bytes, SPAN_BYTES)
        ends = (min(start + SPAN_BYTES, file.size_bytes) for start in starts)
        return [Span(file, start, end, end - start) for start, end in zip(starts, ends, strict=True)]
    return [Span(file, 0, 1, file.size_bytes)]


def _row_group_spans(file: SourceFile, text_column: str) -> list[Span]:
    metadata = _parquet_metadata(file, text_column)
    column = [metadata.schema.column(i).path for i in range(metadata.num_columns)].index(text_column)
    found, start, filled = [], 0, 0
    for group in range(metadata.num_row_groups):
        filled += metadata.row_group(group).column(column).total_uncompressed_size
        if filled >= SPAN_BYTES or group == metadata.num_row_groups - 1:
            found.append(Span(file, start, group + 1, filled))
            start, filled = group + 1, 0
    return found


@functools.lru_cache(maxsize=8)
def _parquet_metadata(file: SourceFile, text_column: str) -> Any:
    """The footer. Raises ValueError when it is not one, or the column is not there or holds no text."""
    import pyarrow
    from pyarrow import parquet

    with _open(file) as stream:
        try:
            opened = parquet.ParquetFile(stream)
        except (pyarrow.ArrowException, OSError) as error:
            _raise_if_lost(error, file)
            raise ValueError(f"source {file.url} is not a whole parquet file: {first_line(error)}") from None
    schema = opened.schema_arrow
    if schema.names.count(text_column) > 1:
        raise ValueError(f"source {file.url} has several columns '{text_column}'")
    if text_column not in schema.names:
        raise ValueError(f"source {file.url} {_no_column(text_column, schema.names)}")
    kind = schema.field(text_column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not any(is_text(kind) for is_text in _text_types()):
        raise ValueError(f"source {file.url}: column '{text_column}' holds {kind} and not text")
    return opened.metadata


def _text_types() -> Iterable[Any]:
    from pyarrow import types

    return types.is_string, types.is_large_string, types.is_string_view, types.is_binary, types.is_large_binary


def _no_column(column: str, columns: Iterable[str]) -> str:
    return f"has no column '{column}' but {', '.join(columns)}; name it with --text_column"


# --- documents -------------------------------------------------------------------------------------------------------

# A document's text: in chunks when it is a whole text file, empty when there is none.
Document = str | Iterator[str]


def documents(span: Span, text_column: str, damage: Damage) -> Iterator[Document]:
    """The documents of a span, in order; what cannot be read goes to `damage`.

    Raises SourceError when the file changed or is gone. The chunks of a text file may raise DamagedDocumentError.
    """
    with _open(span.file) as stream:
        match _format(span.file.url):
            case "parquet":
                yield from _parquet_documents(stream, span, text_column, damage)
            case "jsonl":
                yield from _jsonl_documents(stream, span, text_column, damage)
            case "text":
                damage.here = lambda: span.file.url
                yield _text_chunks(stream, span.file)


def _parquet_documents(stream: IO[bytes], span: Span, text_column: str, damage: Damage) -> Iterator[Document]:
    from pyarrow import parquet

    metadata = _parquet_metadata(span.file, text_column)
    # pre_buffer would hold a whole row group in memory
    opened = parquet.ParquetFile(stream, metadata=metadata, pre_buffer=False, buffer_size=CHUNK_BYTES)
    row = sum(metadata.row_group(group).num_rows for group in range(span.start))
    damage.here = lambda: f"{span.file.url}, row {row}"
    for group in range(span.start, span.end):
        rows = metadata.row_group(group).num_rows
        # a dictionary-encoded column may be far larger than its chunk, so a batch is never many rows
        batch_size = max(1, min(64, rows * BATCH_BYTES // max(1, metadata.row_group(group).total_byte_size)))
        batches = opened.iter_batches(batch_size, row_groups=[group], columns=[text_column])
        next_group = row + rows
        while row < next_group:
            try:
                texts = _texts(next(batches).column(0))
            except Exception as error:  # StopIteration, too: fewer rows than the footer says
                _raise_if_lost(error, span.file)
                place = f"{span.file.url}, row group {group}, rows {row} to {next_group - 1}"
                damage.found(f"they cannot be read ({first_line(error)})", place, next_group - row)
                row = next_group
                break
            for text in texts:
                if isinstance(text, UnicodeDecodeError):
                    damage.found(f"it is not UTF-8 ({text.reason})")
                else:
                    yield text
                row += 1


def _texts(column: pyarrow.Array) -> list[str | UnicodeDecodeError]:
    try:
        texts = column.to_pylist()
        if not any(isinstance(text, bytes) for text in texts):
            return [text or "" for text in texts]
    except UnicodeDecodeError:
        pass
    return [_text(value) for value in column]


def _text(value: pyarrow.Scalar) -> str | UnicodeDecodeError:
    try:
        text = value.as_py()
        return text.decode("utf-8") if isinstance(text, bytes) else text or ""
    except UnicodeDecodeError as error:
        return error


def _jsonl_documents(stream: IO[bytes], span: Span, text_column: str, damage: Damage) -> Iterator[Document]:
    """The documents of the lines that begin in the span."""
    url, whole = span.file.url, span.file.url.endswith(COMPRESSION)
    position, line_number = span.start, 0
    if span.start:
        stream.seek(span.start - 1)
        position += len(stream.readline()) - 1
    first_line_at = position
    lines_before = functools.cache(lambda: _count_lines(span.file, first_line_at))
    damage.here = lambda: f"{url}, line {lines_before() + line_number}"
    while whole or position < span.end:
        try:
            line = stream.readline()
        except Exception as error:
            _raise_if_lost(error, span.file)
            damage.found(f"the rest cannot be read ({first_line(error)})", f"{url}, after line {line_number}")
            return
        if not line:
            return
        first, position, line_number = position == 0, position + len(line), line_number + 1
        if not line.strip():
            continue
        try:
            text = _json_text(line, text_column, first)
        except ValueError as error:
            if first and str(error).startswith("has no column"):
                raise ValueError(f"source {url} {error}") from None
            what = f"it is not UTF-8 ({error.reason})" if isinstance(error, UnicodeDecodeError) else first_line(error)
            damage.found(what)
            continue
        yield text


def _json_text(line: bytes, text_column: str, first: bool) -> str:
    """The text in a line of JSON. Raises ValueError with what is wrong with it."""
    text = line.decode("utf-8-sig" if first else "utf-8")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it is a JSON {type(value).__name__} and not an object; one object a line is what is read")
    if text_column not in value:
        raise ValueError(_no_column(text_column, value))
    found = value[text_column]
    if not (found is None or isinstance(found, str)):
        raise ValueError(f"column '{text_column}' holds {type(found).__name__} and not text")
    return found or ""


def _count_lines(file: SourceFile, end: int) -> int:
    """Lines of the file before byte `end`: only asked for when there is an error to place."""
    count, left = 0, end
    with _open(file) as stream:
        while left and (chunk := stream.read(min(left, 16 * CHUNK_BYTES))):
            count, left = count + chunk.count(b"\n"), left - len(chunk)
    return count


def _text_chunks(stream: IO[bytes], file: SourceFile) -> Iterator[str]:
    decoder, at_end = codecs.getincrementaldecoder("utf-8-sig")(), False
    while not at_end:
        try:
            chunk = stream.read(CHUNK_BYTES)
            at_end = not chunk
            text = decoder.decode(chunk, final=at_end)
        except UnicodeDecodeError as error:
            raise DamagedDocumentError(f"it is not UTF-8 ({error.reason})") from None
        except Exception as error:
            _raise_if_lost(error, file)
            raise DamagedDocumentError(f"it cannot be read ({first_line(error)})") from None
        yield text


def _open(file: SourceFile) -> Any:
    """The file, decompressed, after a look whether it is still what it was. Raises SourceError if not."""
    import fsspec

    try:
        # a local name may hold what fsspec reads as a chain of protocols
        if is_remote(file.url):
            filesystem, path = fsspec.url_to_fs(file.url)
        else:
            filesystem, path = fsspec.filesystem("file"), str(local_path(file.url))
        info = filesystem.info(path)
        if file.url.endswith(COMPRESSION):  # buffered, for zstandard's own reader knows no lines
            opened = io.BufferedReader(filesystem.open(path, "rb", compression="infer"))
        else:
            opened = filesystem.open(path, "rb")
    except Exception as error:
        _lost(error, file)
    if info["size"] != file.size_bytes or (file.version and _version(info) != file.version):
        raise SourceError(
            f"source {file.url} changed: it had {file.size_bytes:,} bytes when this began, now {info['size']:,}, "
            f"and is of another time; run again to make its part anew"
        )
    return opened


def _raise_if_lost(error: Exception, file: SourceFile) -> None:
    """Passes on an error that is not one of what readers raise at bad content: the way to the file is broken."""
    import gzip
    import lzma
    import zlib

    from pyarrow import ArrowException

    bad_content = (ArrowException, ValueError, EOFError, StopIteration, zlib.error, lzma.LZMAError)
    # pyarrow and bz2 say a bare OSError without a number of bad bytes; the system numbers its own
    unnumbered = type(error) in (OSError, gzip.BadGzipFile) and getattr(error, "errno", None) is None
    if not (isinstance(error, bad_content) or unnumbered or type(error).__name__ == "ZstdError"):
        _lost(error, file)


def _lost(error: Exception, file: SourceFile) -> NoReturn:
    if is_gone(error):
        raise SourceError(f"source {file.url} cannot be read: it is gone") from None
    told = remote_error(f"source {file.url}", error)
    raise (SourceError(str(told)) if isinstance(told, UnreachableError) else told) from None
