"""Shards on disk: build-nanogpt's files work as they are, and what is no whole shard is refused by name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from gpt2core.shards import Manifest, file_sha256, fingerprint, open_shards, read_manifest, shard_name


def save(path: Path, tokens: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, tokens)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50257, count).astype(np.uint16)


@pytest.fixture
def folder(tmp_path):
    """A validation shard and two train shards as build-nanogpt's fineweb.py leaves them, with no manifest."""
    for index, count in enumerate([5000, 5000, 3000]):
        np.save(tmp_path / f"edufineweb_{'val' if index == 0 else 'train'}_{index:06d}", tokens(count, index))
    return tmp_path


def manifest(folder: Path) -> dict:
    names = sorted(path.name for path in folder.glob("*.npy"))
    return {
        "format": 1,
        "source": "texts/*.txt",
        "source_config": None,
        "text_column": "text",
        "shard_size": 5000,
        "tokenizer": "gpt2",
        "tokenizer_sha256": "0" * 64,
        "eot_token": 50256,
        "sources": [{"url": "texts/a.txt", "documents": 3, "tokens": 13000, "empty_documents": 0}],
        "shards": [
            {"name": name, "tokens": int(np.load(folder / name).size), "sha256": file_sha256(folder / name)}
            for name in names
        ],
    }


def write_manifest(folder: Path, content: dict) -> None:
    (folder / "manifest.json").write_text(json.dumps(content))


def test_names_are_build_nanogpts():
    assert [shard_name(index) for index in (0, 1, 99)] == [
        "edufineweb_val_000000.npy",
        "edufineweb_train_000001.npy",
        "edufineweb_train_000099.npy",
    ]


def test_build_nanogpts_shards_work_without_a_manifest(folder):
    assert read_manifest(folder) is None
    train, val = open_shards(folder, "train"), open_shards(folder, "val")
    assert [shard.name for shard in train] == ["edufineweb_train_000001.npy", "edufineweb_train_000002.npy"]
    assert [shard.name for shard in val] == ["edufineweb_val_000000.npy"]
    np.testing.assert_array_equal(train[0].tokens, tokens(5000, 1))
    np.testing.assert_array_equal(train[1].tokens, tokens(3000, 2))
    np.testing.assert_array_equal(val[0].tokens, tokens(5000, 0))


def test_other_files_in_the_folder_are_no_shards(folder):
    (folder / "notes.txt").write_text("mine")
    save(folder / "evaluation.npy", np.zeros(3))
    (folder / ".edufineweb_train_000003.npy.123.tmp").write_bytes(b"half")
    assert len(open_shards(folder, "train")) == 2


def test_shards_come_in_the_order_of_their_numbers(tmp_path):
    for index in (10, 2, 1, 0):
        save(tmp_path / shard_name(index), tokens(10, index))
    names = [shard.name for shard in open_shards(tmp_path, "train")]
    assert names == [shard_name(1), shard_name(2), shard_name(10)]


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros(100, np.int32),
        np.zeros(100, ">u2"),
        np.zeros(100, np.float32),
        np.zeros((10, 10), np.uint16),
        np.zeros(1, np.uint16),
        np.zeros((), np.uint16),
        np.array([None, "x"], dtype=object),
    ],
    ids=["int32", "big-endian", "float", "2-D", "one token", "0-D", "objects"],
)
def test_an_array_that_is_no_row_of_tokens_is_refused_by_name(folder, wrong):
    with (folder / shard_name(2)).open("wb") as file:
        np.save(file, wrong, allow_pickle=True)
    with pytest.raises(ValueError, match=r"edufineweb_train_000002\.npy"):
        open_shards(folder, "train")
    assert len(open_shards(folder, "val")) == 1


@pytest.mark.parametrize("kept_bytes", [0, 5, 100, 128, 4001])
def test_a_truncated_file_is_refused_by_name(folder, kept_bytes):
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"edufineweb_train_000001\.npy is not a whole token shard"):
        open_shards(folder, "train")


@pytest.mark.parametrize("kind", ["text", "zip"])
def test_a_file_of_another_kind_is_refused_by_name(folder, kind):
    path = folder / shard_name(1)
    if kind == "text":
        path.write_text("these are words, not tokens" * 20)
    else:
        with path.open("wb") as file:
            np.savez(file, tokens=tokens(100))
    with pytest.raises(ValueError, match=r"edufineweb_train_000001\.npy"):
        open_shards(folder, "train")


def test_a_missing_split_and_a_missing_folder_are_refused_by_name(tmp_path):
    save(tmp_path / shard_name(0), tokens(10))
    with pytest.raises(ValueError, match=r"holds no train shards.*gpt2 prepare") as caught:
        open_shards(tmp_path, "train")
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match=r"no such data folder.*gpt2 prepare") as caught:
        open_shards(tmp_path / "nowhere", "train")
    assert str(tmp_path / "nowhere") in str(caught.value)


def test_a_manifest_is_read_and_shards_that_match_it_open(folder):
    content = manifest(folder)
    write_manifest(folder, content)
    assert read_manifest(folder) == Manifest.model_validate(content)
    assert [shard.tokens.size for shard in open_shards(folder, "train")] == [5000, 3000]


def test_a_shard_shorter_than_the_manifest_says_is_refused_by_name(folder):
    write_manifest(folder, manifest(folder))
    save(folder / shard_name(2), tokens(2999, 2))
    with pytest.raises(ValueError, match=r"edufineweb_train_000002\.npy.*3000.*2999"):
        open_shards(folder, "train")
    assert len(open_shards(folder, "val")) == 1


def test_a_shard_lost_and_a_shard_too_many_are_refused_by_name(folder):
    write_manifest(folder, manifest(folder))
    save(folder / shard_name(3), tokens(10))
    with pytest.raises(ValueError, match=r"edufineweb_train_000003\.npy.*has 0 tokens for it, on disk are 10"):
        open_shards(folder, "train")
    (folder / shard_name(3)).unlink()
    (folder / shard_name(1)).unlink()
    with pytest.raises(ValueError, match=r"edufineweb_train_000001\.npy.*5000 tokens for it, on disk are 0"):
        open_shards(folder, "train")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', '{"shards": "none"}'])
def test_a_manifest_that_cannot_be_read_is_refused_by_name(folder, content):
    (folder / "manifest.json").write_text(content)
    with pytest.raises(ValueError, match=r"manifest\.json.*gpt2 prepare"):
        open_shards(folder, "train")


def test_the_fingerprint_is_the_same_for_the_same_data_in_another_place(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for path in folder.glob("*.npy"):
        (elsewhere / path.name).write_bytes(path.read_bytes())
    assert fingerprint(open_shards(folder, "train")) == fingerprint(open_shards(elsewhere, "train"))


@pytest.mark.parametrize("position", [0, 1023, -1, -1024])
def test_the_fingerprint_changes_with_the_tokens_at_either_end(folder, position):
    before = fingerprint(open_shards(folder, "train"))
    changed = tokens(3000, 2)
    changed[position] ^= 1
    save(folder / shard_name(2), changed)
    assert fingerprint(open_shards(folder, "train")) != before


def test_the_fingerprint_changes_with_names_sizes_and_number_of_shards(folder):
    seen = {fingerprint(open_shards(folder, "train")), fingerprint(open_shards(folder, "val"))}
    (folder / shard_name(2)).rename(folder / shard_name(3))
    seen.add(fingerprint(open_shards(folder, "train")))
    (folder / shard_name(3)).unlink()
    seen.add(fingerprint(open_shards(folder, "train")))
    middle_cut = np.concatenate([tokens(5000, 1)[:2000], tokens(5000, 1)[2001:]])  # both ends as they were
    save(folder / shard_name(1), middle_cut)
    seen.add(fingerprint(open_shards(folder, "train")))
    assert len(seen) == 5


def test_file_sha256_is_of_the_whole_file(folder):
    path = folder / shard_name(0)
    assert file_sha256(path) == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("place", [0, -1])
def test_ids_that_gpt2_does_not_have_are_foreign(folder, place):
    path = folder / "edufineweb_train_000001.npy"
    foreign = tokens(5000, 1)
    foreign[place] = 50257
    save(path, foreign)
    with pytest.raises(ValueError, match=r"edufineweb_train_000001\.npy is no shard of GPT-2 tokens"):
        open_shards(folder, "train")


# --- llm.c's format --------------------------------------------------------------------------------------------------


def save_llmc(
    path: Path, tokens: np.ndarray, magic: int = 20240520, version: int = 1, promised: int | None = None
) -> None:
    """As llm.c's dev/data/data_common.py lays it out."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, tokens.size if promised is None else promised
    path.write_bytes(header.tobytes() + tokens.astype(np.uint16).tobytes())


@pytest.fixture
def llmc_folder(tmp_path):
    for index, count in enumerate([5000, 5000, 3000]):
        save_llmc(tmp_path / f"fineweb_{'val' if index == 0 else 'train'}_{index:06d}.bin", tokens(count, index))
    return tmp_path


def test_llmcs_shards_are_read_where_they_lie(llmc_folder):
    train, (val,) = open_shards(llmc_folder, "train"), open_shards(llmc_folder, "val")
    assert [shard.name for shard in train] == ["fineweb_train_000001.bin", "fineweb_train_000002.bin"]
    np.testing.assert_array_equal(train[0].tokens, tokens(5000, 1))
    np.testing.assert_array_equal(train[1].tokens, tokens(3000, 2))
    np.testing.assert_array_equal(val.tokens, tokens(5000, 0))
    assert all(isinstance(shard.tokens, np.memmap) for shard in (*train, val))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"magic": 20240801}, "its first int32 is 20240801, not 20240520"),
        ({"version": 7}, "version 7 of llm.c's format; version 1, of uint16 tokens, can be read"),
        ({"promised": 3001}, "promises 3,001 tokens, which are 7,026 bytes, and it has 7,024"),
        ({"promised": 2999}, "promises 2,999 tokens, which are 7,022 bytes, and it has 7,024"),
        ({"promised": 1}, "is not a whole token shard"),
    ],
    ids=["magic", "version", "too few", "too many", "far too many"],
)
def test_a_bin_file_that_is_no_shard_is_refused_with_what_is_wrong(llmc_folder, wrong, words):
    save_llmc(llmc_folder / "fineweb_train_000002.bin", tokens(3000, 2), **wrong)
    with pytest.raises(ValueError, match=r"fineweb_train_000002\.bin") as caught:
        open_shards(llmc_folder, "train")
    assert words in str(caught.value)
    assert len(open_shards(llmc_folder, "val")) == 1


@pytest.mark.parametrize("kept_bytes", [0, 3, 1000, 1024, 4001])
def test_a_truncated_bin_file_is_refused_by_name(llmc_folder, kept_bytes):
    path = llmc_folder / "fineweb_train_000001.bin"
    path.write_bytes(path.read_bytes()[:kept_bytes])
    with pytest.raises(ValueError, match=r"fineweb_train_000001\.bin is not a whole token shard"):
        open_shards(llmc_folder, "train")


def test_one_shard_in_two_formats_is_refused(llmc_folder):
    save(llmc_folder / shard_name(3), tokens(100))
    assert len(open_shards(llmc_folder, "train")) == 3
    save(llmc_folder / shard_name(2), tokens(100))
    with pytest.raises(ValueError, match=r"train shard 000002 twice, as edufineweb.*\.npy and fineweb.*\.bin"):
        open_shards(llmc_folder, "train")
    assert len(open_shards(llmc_folder, "val")) == 1
