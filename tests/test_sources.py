"""Reading text: every document of a file exactly once whatever the spans, and what cannot be read is placed and counted."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpt2core import sources
from gpt2core.config import DataConfig
from gpt2core.sources import Damage, SourceError, SourceFile, documents, list_sources, spans


def source_file(path: Path) -> SourceFile:
    return SourceFile(url=str(path), size_bytes=path.stat().st_size)


def read(path: Path, damage: Damage | None = None, column: str = "text") -> list[list[str]]:
    """The documents of the file, span by span."""
    file, damage = source_file(path), damage or Damage(skip=False)
    found = []
    for span in spans(file, column):
        of_span = documents(span, column, damage)
        found.append([text if isinstance(text, str) else "".join(text) for text in of_span])
    return found


def flat(of_spans: list[list[str]]) -> list[str]:
    return list(itertools.chain(*of_spans))


def broken_parquet(path: Path, rows_broken: slice, rows: int = 12, group: int = 4) -> list[str]:
    """A parquet file in which some of the texts are not UTF-8; returns the others."""
    texts = [f"text {row} " * 5 for row in range(rows)]
    raw = [text.encode() for text in texts]
    raw[rows_broken] = [b"caf\xe9 au lait"] * len(raw[rows_broken])
    column = pa.array(raw, pa.binary()).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), path, row_group_size=group)
    del texts[rows_broken]
    return texts


# --- spans -----------------------------------------------------------------------------------------------------------


@given(
    lines=st.lists(st.text(alphabet="aé🙂\u2028\x85 ", max_size=12), max_size=12),
    span_bytes=st.integers(1, 60),
    last_line_ends=st.booleans(),
    blank_lines=st.booleans(),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_line_is_in_one_span_and_in_order(tmp_path, monkeypatch, lines, span_bytes, last_line_ends, blank_lines):
    monkeypatch.setattr(sources, "SPAN_BYTES", span_bytes)
    ends = "\n\n" if blank_lines else "\n"
    content = ends.join(json.dumps({"text": line}, ensure_ascii=False) for line in lines)
    path = tmp_path / "a.jsonl"
    path.write_bytes((content + ends * last_line_ends).encode())
    assert flat(read(path)) == lines


@pytest.mark.parametrize("span_bytes", [1, 200, 10_000])
def test_row_groups_are_in_one_span_and_in_order(tmp_path, monkeypatch, span_bytes):
    monkeypatch.setattr(sources, "SPAN_BYTES", span_bytes)
    texts = [f"text {row} " * 10 for row in range(50)]
    pq.write_table(pa.table({"other": range(50), "text": texts}), tmp_path / "a.parquet", row_group_size=7)
    read_spans = read(tmp_path / "a.parquet")
    assert flat(read_spans) == texts
    assert len(read_spans) == {1: 8, 200: 8, 10_000: 1}[span_bytes]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view(), pa.binary(), "dictionary"])
def test_every_way_to_store_text_in_parquet_is_read(tmp_path, kind):
    texts = ["one", None, "", "naïve 日本語 🙂", "\0null\0"]
    column = pa.array(texts).dictionary_encode() if kind == "dictionary" else pa.array(texts).cast(kind)
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert flat(read(tmp_path / "a.parquet")) == [text or "" for text in texts]


def test_a_row_group_is_read_in_batches_of_bounded_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 100_000)
    texts = [chr(ord("a") + row) * 50_000 for row in range(20)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    sizes = []
    monkeypatch.setattr(sources, "_texts", lambda column: sizes.append(len(column)) or column.to_pylist())
    assert flat(read(tmp_path / "a.parquet")) == texts
    assert max(sizes) <= 2


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_are_read(tmp_path, ending):
    import bz2
    import lzma

    import zstandard

    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}[ending]
    texts = [f"text {n}" for n in range(1000)]
    lines = tmp_path / f"a.jsonl{ending}"
    lines.write_bytes(compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    assert flat(read(lines)) == texts
    whole = tmp_path / f"b.txt{ending}"
    whole.write_bytes(compress(b"one document"))
    assert flat(read(whole)) == ["one document"]


def test_text_is_taken_byte_for_byte_but_for_a_byte_order_mark(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffwindows\r\nlines\r\n\0 and a \ufeff within".encode())
    assert flat(read(tmp_path / "a.txt")) == ["windows\r\nlines\r\n\0 and a \ufeff within"]
    (tmp_path / "a.jsonl").write_bytes('\ufeff{"text": "a"}\r\n{"text": "b"}\r\n'.encode())
    assert flat(read(tmp_path / "a.jsonl")) == ["a", "b"]


def test_a_character_on_the_edge_of_a_chunk_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CHUNK_BYTES", 5)
    (tmp_path / "a.txt").write_text("🙂é日" * 20, encoding="utf-8")
    assert flat(read(tmp_path / "a.txt")) == ["🙂é日" * 20]


# --- damage ----------------------------------------------------------------------------------------------------------


def test_rows_that_are_not_utf8_are_placed_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "SPAN_BYTES", 1)
    path = tmp_path / "a.parquet"
    others = broken_parquet(path, slice(5, 7))
    with pytest.raises(ValueError, match=rf"source {path}, row 5: it is not UTF-8 .*--on_damage skip"):
        read(path)
    damage = Damage(skip=True)
    assert flat(read(path, damage)) == others
    assert damage.documents == 2
    assert [place.partition(":")[0] for place in damage.places] == [f"{path}, row 5", f"{path}, row 6"]


def corrupt_second_group(path: Path) -> list[str]:
    texts = [f"text {row} " * 30 for row in range(12)]
    pq.write_table(pa.table({"text": texts}), path, row_group_size=4, use_dictionary=False, compression="zstd")
    column = pq.read_metadata(path).row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = column.data_page_offset + 20
    content[start : column.data_page_offset + column.total_compressed_size] = bytes(column.total_compressed_size - 20)
    path.write_bytes(content)
    return texts[:4] + texts[8:]


def test_a_corrupt_row_group_is_placed_and_counted(tmp_path):
    path = tmp_path / "a.parquet"
    others = corrupt_second_group(path)
    with pytest.raises(ValueError, match=rf"source {path}, row group 1, rows 4 to 7: they cannot be read"):
        read(path)
    damage = Damage(skip=True)
    assert flat(read(path, damage)) == others
    assert damage.documents == 4


@pytest.mark.parametrize("span_bytes", [1, 40, 10_000])
@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"text": "caf\xe9"}', "it is not UTF-8"),
        (b'{"text": "half', "Invalid control character"),
        (b'["text"]', "it is a JSON list and not an object"),
        (b'{"text": 3}', "column 'text' holds int and not text"),
        (b'{"body": "x"}', "has no column 'text' but body"),
        (b"[" * 50_000, "nested too deeply"),
    ],
)
def test_lines_that_cannot_be_read_are_placed_and_counted(tmp_path, monkeypatch, span_bytes, line, what):
    monkeypatch.setattr(sources, "SPAN_BYTES", span_bytes)
    path = tmp_path / "a.jsonl"
    good = [json.dumps({"text": f"text {n}"}).encode() for n in range(7)]
    path.write_bytes(b"\n".join([*good[:4], b"", line, *good[4:], line]))
    with pytest.raises(ValueError, match=rf"source {path}, line 6: .*{what}"):
        read(path)
    damage = Damage(skip=True)
    assert flat(read(path, damage)) == [f"text {n}" for n in range(7)]
    assert damage.documents == 2
    assert [place.partition(":")[0] for place in damage.places] == [f"{path}, line 6", f"{path}, line 10"]


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_compressed_file_cut_short_is_placed_and_counted(tmp_path, ending):
    import fsspec

    path = tmp_path / f"a.jsonl{ending}"
    with fsspec.open(path, "wb", compression="infer") as file:
        for n in range(20_000):
            file.write(json.dumps({"text": f"text number {n * n}"}).encode() + b"\n")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"source {path}, (after line \d+: the rest cannot be read|line \d+: )"):
        read(path)
    damage = Damage(skip=True)
    assert len(flat(read(path, damage))) < 20_000
    assert damage.documents == 1


def test_no_more_places_are_kept_than_a_person_reads(tmp_path):
    damage = Damage(skip=True)
    broken_parquet(tmp_path / "a.parquet", slice(0, 100), rows=100)
    assert flat(read(tmp_path / "a.parquet", damage)) == []
    assert (damage.documents, len(damage.places)) == (100, 20)


# --- files that are not there, or no longer ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_a_file_that_changed_or_went_away_is_named(tmp_path, name):
    path = tmp_path / name
    if name == "a.parquet":
        pq.write_table(pa.table({"text": ["a", "b"]}), path)
    else:
        path.write_text('{"text": "a"}\n')
    file = source_file(path)
    planned = spans(file, "text")
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(SourceError, match=rf"source {path} changed: it had \d+ bytes when this began, now \d+"):
        [list(documents(span, "text", Damage(skip=True))) for span in planned]
    path.unlink()
    with pytest.raises(SourceError, match=rf"source {path} cannot be read: it is gone"):
        [list(documents(span, "text", Damage(skip=True))) for span in planned]


def test_a_column_that_holds_no_text_is_refused_with_its_type(tmp_path):
    pq.write_table(pa.table({"text": [1, 2], "body": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet: column 'text' holds int64 and not text"):
        read(tmp_path / "a.parquet")


def test_two_columns_of_one_name_are_refused(tmp_path):
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a\.parquet has several columns 'text'"):
        read(tmp_path / "a.parquet")


def test_a_name_that_looks_like_a_chain_of_protocols_is_a_name(tmp_path):
    path = tmp_path / "x::y.TXT"
    path.write_text("one document")
    assert flat(read(path)) == ["one document"]
    (found,) = list_sources(DataConfig(source=str(tmp_path)))[0]
    assert found.url == str(path)


def test_what_is_no_parquet_is_refused_by_name(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing of the kind")
    with pytest.raises(ValueError, match=r"a\.parquet is not a whole parquet file"):
        read(tmp_path / "a.parquet")


def test_a_url_of_an_unknown_protocol_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"source nosuch://bucket/a\.parquet cannot be used .*nosuch"):
        list_sources(DataConfig(source="nosuch://bucket/a.parquet"))
