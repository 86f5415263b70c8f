"""`gpt2 data`: verify finds each kind of damage and names it, show tells what the manifest says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt2core.cli import run
from gpt2core.config import DataConfig
from gpt2core.dataset_check import check_shard, verify
from gpt2core.prepare import prepare
from gpt2core.shards import read_manifest, shard_name

WORDS = [f"document {number} of " + "many words " * number for number in range(60)]


def quiet(line: str) -> None:
    pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of three shards made by `prepare`, with an empty document left out."""
    folder = tmp_path_factory.mktemp("whole")
    lines = [json.dumps({"text": text}) for text in [*WORDS, ""]]
    (folder / "texts.jsonl").write_text("\n".join(lines))
    data = folder / "data"
    prepare(DataConfig(source=str(folder / "texts.jsonl"), data_dir=str(data), shard_size=1500, num_workers=1), quiet)
    assert len(list(data.glob("*.npy"))) == 3
    return data


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "data"))


def tokens_of(path: Path) -> np.ndarray:
    return np.load(path)


def save(path: Path, tokens: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, tokens)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_whole_dataset_has_no_problems(folder: Path) -> None:
    said: list[str] = []
    assert verify(folder, said.append) == []
    assert [line.split()[0] for line in said] == ["[1/3]", "[2/3]", "[3/3]"]


def test_a_lone_last_token_that_the_shards_lack_is_no_problem(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello " * 2049)  # with the EOT, 2 * 1025 + 1 tokens
    data = DataConfig(source=str(tmp_path / "a.txt"), data_dir=str(tmp_path / "data"), shard_size=1025, num_workers=1)
    manifest = prepare(data, quiet)
    assert sum(shard.tokens for shard in manifest.shards) == manifest.sources[0].tokens - 1
    assert verify(data.data_dir, quiet) == []


def test_every_kind_of_damage_is_one_line_that_names_it(folder: Path) -> None:
    (folder / shard_name(0)).unlink()
    path = folder / shard_name(1)
    path.write_bytes(path.read_bytes()[:-6])
    save(folder / shard_name(7), np.zeros(10, np.uint16))
    flipped = tokens_of(folder / shard_name(2))
    flipped[5] ^= 1
    save(folder / shard_name(2), flipped)
    missing_val, truncated, missing, extra, changed = verify(folder, quiet)
    assert "holds no val shards" in missing_val
    assert "000001.npy is not a whole token shard" in truncated and "3,128 bytes, and it has 3,122" in truncated
    assert "val_000000.npy is missing" in missing
    assert "000007.npy is one too many" in extra
    assert "000002.npy has sha256" in changed


def test_ids_out_of_the_vocabulary_are_counted_and_placed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2core.dataset_check.CHUNK_BYTES", 100)  # many chunks, the first of them all header
    tokens = tokens_of(folder / shard_name(1))
    tokens[[700, 701, 1499]] = 50257, 50303, 65535
    save(folder / shard_name(1), tokens)
    foreign, changed = verify(folder, quiet)
    assert "000001.npy: 3 ids are 50257 or more, the first at token 700;" in foreign
    assert "sha256" in changed


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(tokenizer_sha256="0" * 64), "tokenizer_sha256 is 000"),
        (lambda m: m.update(eot_token=0), "eot_token is 0"),
        (lambda m: m["sources"][0].update(documents=59), "hold 60 tokens 50256.*has 59 documents"),
        (lambda m: m["sources"][0].update(tokens=1), "its sources have 1 tokens together, its shards 3,"),
        (lambda m: m["shards"][2].update(tokens=2), r"000002\.npy has .* tokens, in .* are 2"),
        (lambda m: m.update(shard_size=1400), "tokens, shard_size is 1,400"),
        (lambda m: m.update(format=2), r"manifest\.json: format.*gpt2 prepare"),
    ],
    ids=["tokenizer", "eot", "documents", "source tokens", "shard tokens", "shard size", "format"],
)
def test_a_manifest_that_says_something_else_is_a_problem(
    folder: Path, change: Callable[[dict[str, Any]], None], words: str
) -> None:
    change_manifest(folder, change)
    problems = verify(folder, quiet)
    assert problems
    with pytest.raises(AssertionError, match=words):
        raise AssertionError("\n".join(problems).replace("\n", " | "))


def test_shards_without_a_manifest_are_checked_as_far_as_can_be(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    said: list[str] = []
    assert verify(folder, said.append) == []
    assert "has no manifest.json" in said[0]
    (folder / shard_name(1)).unlink()
    tokens = tokens_of(folder / shard_name(2))
    tokens[3] = 60000
    save(folder / shard_name(2), tokens)
    foreign, gap = verify(folder, quiet)
    assert "1 ids are 50257 or more, the first at token 3" in foreign
    assert "has no shard number 000001, and has shards up to 000002" in gap


def test_the_command_fails_when_something_is_wrong(folder: Path, capsys: Any) -> None:
    assert run(["data", "verify", "--data_dir", str(folder)]) == 0
    assert f"{folder} is whole" in capsys.readouterr().out
    (folder / shard_name(2)).unlink()
    assert run(["data", "verify", "--data_dir", str(folder)]) == 1
    shown = capsys.readouterr()
    assert len(shown.err.splitlines()) == 1 and "000002.npy is missing" in shown.err
    assert "1 problems" in shown.out


def test_a_shard_that_cannot_be_read_is_a_problem_and_no_end(folder: Path) -> None:
    """It was there when the folder was listed."""
    check = check_shard(folder, shard_name(9), 1000)
    assert check.tokens is None
    assert check.problem is not None and re.search(r"No such file .*000009\.npy", check.problem)


def test_two_formats_of_one_shard_are_a_problem(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    header = np.array([20240520, 1, 2, *[0] * 253], np.int32)
    (folder / "edufineweb_train_000001.bin").write_bytes(header.tobytes() + bytes(4))
    (twice,) = verify(folder, quiet)
    assert "holds train shard 000001 twice" in twice


def test_no_dataset_at_all_is_a_problem(tmp_path: Path, capsys: Any) -> None:
    assert run(["data", "verify", "--data_dir", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.count("no such data folder") == 1


def test_show_tells_what_the_manifest_says(folder: Path, capsys: Any) -> None:
    assert run(["data", "show", "--data_dir", str(folder)]) == 0
    shown = capsys.readouterr().out
    manifest = read_manifest(folder)
    assert manifest is not None
    assert "60 documents; left out: 1 empty, 0 damaged" in shown
    assert "texts.jsonl" in shown and "revision not known" in shown
    for record in manifest.shards:
        assert record.name in shown and f"{record.tokens:,}" in shown and record.sha256[:12] in shown
    (folder / "manifest.json").unlink()
    assert run(["data", "show", "--data_dir", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "has no manifest.json" in shown and "3 shards" in shown
