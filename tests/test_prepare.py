"""From text to shards: the exact tokens, whatever the format, the number of processes and the interruptions."""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gpt2core import lock
from gpt2core.config import DataConfig
from gpt2core.prepare import begin, is_ready_made, prepare, prepare_file
from gpt2core.shards import open_shards
from gpt2core.sources import SourceError
from gpt2core.tokenizer import VOCAB_BPE_SHA256, encoding

REPO = Path(__file__).parents[1]
SHAKESPEARE = REPO / "data" / "sample" / "tinyshakespeare.txt"
EOT = 50256
SHARD = 2048


def documents(count: int, start: int = 0) -> list[str]:
    """Different pieces of Shakespeare, with what makes tokenizers err mixed in."""
    text = SHAKESPEARE.read_text(encoding="utf-8")
    odd = ["", " 🙂 naïve café", "<|endoftext|>", "\n\n\ttabs  and   spaces\n", " 日本語"]
    return [text[3000 * n : 3000 * n + 1500 + 7 * n] + odd[n % 5] for n in range(start, start + count)]


def expected_tokens(texts: list[str]) -> np.ndarray:
    """The stream by the plainest code: 50256, then the document's tokens, document by document."""
    stream: list[int] = []
    for text in texts:
        stream += [EOT, *encoding().encode_ordinary(text)]
    return np.array(stream, np.uint16)


def all_tokens(folder: Path) -> np.ndarray:
    return np.concatenate([shard.tokens for shard in (*open_shards(folder, "val"), *open_shards(folder, "train"))])


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, columns: dict[str, list], **options) -> None:
    pq.write_table(pa.table(columns), path, **options)


def config(folder: Path, source: object, **options) -> DataConfig:
    return DataConfig(
        **{"data_dir": str(folder), "source": str(source), "shard_size": SHARD, "num_workers": 1} | options
    )


def make(folder: Path, source: object, **options):
    return prepare(config(folder, source, **options), quiet)


def quiet(line: str) -> None:
    """Progress that nobody watches."""


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in the folder but the lock file, whose presence says nothing."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def stamps(folder: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob(pattern)}


def refused(match: str, folder: Path, source: object, **options) -> str:
    """What is said when the dataset cannot be made: one line, and no shards and no manifest come of it."""
    before = contents(folder) if folder.exists() else {}
    with pytest.raises(ValueError, match=match) as caught:
        make(folder, source, **options)
    after = contents(folder) if folder.exists() else {}
    assert {name: data for name, data in after.items() if not name.startswith(".parts")} == {
        name: data for name, data in before.items() if not name.startswith(".parts")
    }
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Ten jsonl files of six documents; their names sort otherwise than they were written."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in reversed(range(10)):
        write_jsonl(folder / f"part-{number}.jsonl", [{"text": text} for text in documents(6, 6 * number)])
    return folder


@pytest.fixture(scope="module")
def dataset(corpus, tmp_path_factory):
    """The corpus, prepared in one go by one process: what every other way must equal byte for byte."""
    folder = tmp_path_factory.mktemp("made") / "dataset"
    make(folder, corpus)
    return folder


# --- the tokens ------------------------------------------------------------------------------------------------------


def test_the_stream_is_each_document_after_an_endoftext_in_the_order_of_the_files(dataset):
    np.testing.assert_array_equal(all_tokens(dataset), expected_tokens(documents(60)))
    assert np.count_nonzero(all_tokens(dataset) == EOT) == 60  # none of the texts that read <|endoftext|>


def test_the_first_shard_size_tokens_are_for_validation_and_the_rest_in_full_shards(dataset):
    val, train = open_shards(dataset, "val"), open_shards(dataset, "train")
    assert [shard.name for shard in val] == ["edufineweb_val_000000.npy"]
    assert [shard.name for shard in train] == [f"edufineweb_train_{n:06d}.npy" for n in range(1, len(train) + 1)]
    assert len(train) > 5
    sizes = [shard.tokens.size for shard in (*val, *train)]
    assert set(sizes[:-1]) == {SHARD}
    assert 2 <= sizes[-1] <= SHARD
    np.testing.assert_array_equal(val[0].tokens, expected_tokens(documents(60))[:SHARD])


def test_the_manifest_is_what_is_on_disk(dataset, corpus):
    manifest = json.loads((dataset / "manifest.json").read_text())
    shards = sorted(dataset.glob("*.npy"), key=lambda path: path.name[-10:])
    assert manifest["shards"] == [
        {"name": path.name, "tokens": np.load(path).size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in shards
    ]
    assert manifest["sources"] == [
        {
            "url": str(corpus / f"part-{number}.jsonl"),
            "size_bytes": (corpus / f"part-{number}.jsonl").stat().st_size,
            "documents": 6,
            "tokens": expected_tokens(documents(6, 6 * number)).size,
            "empty_documents": 0,
            "damaged_documents": 0,
            "damage": [],
        }
        for number in range(10)
    ]
    assert manifest["source"] == str(corpus)
    assert (manifest["shard_size"], manifest["eot_token"], manifest["tokenizer"]) == (SHARD, EOT, "gpt2")
    assert manifest["tokenizer_sha256"] == VOCAB_BPE_SHA256
    assert sorted(contents(dataset)) == sorted([*(path.name for path in shards), "manifest.json"])  # and nothing else


def test_a_text_file_is_one_document(tmp_path):
    texts = documents(4)
    path = tmp_path / "play.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8", newline="")
    manifest = make(tmp_path / "out", path, shard_size=1024)
    np.testing.assert_array_equal(all_tokens(tmp_path / "out"), expected_tokens([path.read_text(encoding="utf-8")]))
    assert [source.documents for source in manifest.sources] == [1]


def test_the_bundled_text_gives_every_one_of_its_tokens(tmp_path):
    make(tmp_path, SHAKESPEARE, shard_size=32_768)
    tokens = all_tokens(tmp_path)
    assert tokens.size == 338_025 + 1
    assert encoding().decode(tokens[1:].tolist()) == SHAKESPEARE.read_text(encoding="utf-8")


@pytest.mark.parametrize("row_group_size", [1000, 3])
def test_parquet_with_a_text_column_of_another_name(tmp_path, row_group_size):
    texts = documents(10)
    columns = {"id": list(range(10)), "content": texts, "text": ["wrong column"] * 10}
    write_parquet(tmp_path / "a.parquet", columns, row_group_size=row_group_size)
    make(tmp_path / "out", tmp_path / "a.parquet", text_column="content")
    np.testing.assert_array_equal(all_tokens(tmp_path / "out"), expected_tokens(texts))


def test_jsonl_with_a_text_column_of_another_name(tmp_path):
    texts = documents(10)
    write_jsonl(tmp_path / "a.jsonl", [{"text": "wrong", "body": text, "n": n} for n, text in enumerate(texts)])
    make(tmp_path / "out", tmp_path / "a.jsonl", text_column="body")
    np.testing.assert_array_equal(all_tokens(tmp_path / "out"), expected_tokens(texts))


def test_more_documents_than_a_batch_keep_their_order(tmp_path):
    texts = [f"document number {n}, and a few words more" for n in range(1000)]
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    make(tmp_path / "out", tmp_path / "a.jsonl")
    np.testing.assert_array_equal(all_tokens(tmp_path / "out"), expected_tokens(texts))


def test_a_glob_takes_what_it_matches_and_a_folder_takes_all_text_files(tmp_path):
    texts = documents(9)
    sources = tmp_path / "texts"
    sources.mkdir()
    write_jsonl(sources / "c.jsonl", [{"text": text} for text in texts[6:]])
    write_jsonl(sources / "a.jsonl", [{"text": text} for text in texts[:3]])
    write_parquet(sources / "b.parquet", {"text": texts[3:6]})
    (sources / "picture.png").write_bytes(b"no text")
    make(tmp_path / "glob", f"{sources}/*.jsonl")
    np.testing.assert_array_equal(all_tokens(tmp_path / "glob"), expected_tokens(texts[:3] + texts[6:]))
    make(tmp_path / "folder", sources)
    np.testing.assert_array_equal(all_tokens(tmp_path / "folder"), expected_tokens(texts))
    make(tmp_path / "slash", f"{sources}/")
    np.testing.assert_array_equal(all_tokens(tmp_path / "slash"), expected_tokens(texts))
    make(tmp_path / "url", f"file://{sources}/*.jsonl")
    np.testing.assert_array_equal(all_tokens(tmp_path / "url"), expected_tokens(texts[:3] + texts[6:]))


def test_brackets_in_the_name_of_a_folder_are_no_glob(tmp_path):
    sources = tmp_path / "texts [2024]"
    sources.mkdir()
    write_jsonl(sources / "a.jsonl", [{"text": text} for text in documents(8)])
    make(tmp_path / "folder", sources)
    np.testing.assert_array_equal(all_tokens(tmp_path / "folder"), expected_tokens(documents(8)))
    make(tmp_path / "file", sources / "a.jsonl")
    np.testing.assert_array_equal(all_tokens(tmp_path / "file"), expected_tokens(documents(8)))


def test_empty_documents_are_counted_and_left_out(tmp_path):
    texts = documents(8)
    write_parquet(tmp_path / "a.parquet", {"text": [None, *texts[:4], "", "", *texts[4:], None]})
    manifest = make(tmp_path / "out", tmp_path / "a.parquet")
    assert (manifest.sources[0].documents, manifest.sources[0].empty_documents) == (8, 4)
    np.testing.assert_array_equal(all_tokens(tmp_path / "out"), expected_tokens(texts))


def test_a_file_of_empty_documents_among_others_gives_nothing(tmp_path):
    sources = tmp_path / "texts"
    sources.mkdir()
    write_jsonl(sources / "a.jsonl", [{"text": ""}, {"text": ""}])
    write_jsonl(sources / "b.jsonl", [{"text": text} for text in documents(8)])
    manifest = make(tmp_path / "out", sources)
    assert [source.documents for source in manifest.sources] == [0, 8]
    assert [source.empty_documents for source in manifest.sources] == [2, 0]
    np.testing.assert_array_equal(all_tokens(tmp_path / "out"), expected_tokens(documents(8)))


def test_a_lone_last_token_makes_no_shard(tmp_path):
    text = " word" * (2 * 1024)  # one token a word: 2049 with the endoftext, so one is left over
    (tmp_path / "a.txt").write_text(text)
    assert expected_tokens([text]).size == 2049
    manifest = make(tmp_path / "out", tmp_path / "a.txt", shard_size=1024)
    assert [shard.tokens for shard in manifest.shards] == [1024, 1024]
    assert [shard.tokens.size for shard in open_shards(tmp_path / "out", "train")] == [1024]


# --- processes and interruptions -------------------------------------------------------------------------------------


def test_two_processes_make_the_same_bytes_as_one(dataset, corpus, tmp_path):
    make(tmp_path / "two", corpus, num_workers=2)
    assert contents(tmp_path / "two") == contents(dataset)


def test_a_second_run_does_nothing(dataset, corpus):
    before, said = stamps(dataset, "*"), list[str]()
    manifest = prepare(config(dataset, corpus), said.append)
    assert stamps(dataset, "*") == before
    assert len(said) == 1
    assert said[0].startswith(f"{dataset} is complete: {sum(shard.tokens for shard in manifest.shards):,} tokens of 60")


def command(folder: Path, source: Path, workers: int) -> list[str]:
    return [
        *(sys.executable, "-m", "gpt2core.prepare"),
        *("--data_dir", str(folder), "--source", str(source)),
        *("--shard_size", str(SHARD), "--num_workers", str(workers)),
    ]


def wait_for_the_first_part(process: subprocess.Popen[str]) -> None:
    """Of ten; on a slow machine it is not the first that is said."""
    assert process.stdout is not None
    assert any(line.startswith("[1/10]") for line in process.stdout)


def test_a_run_that_was_killed_goes_on_with_what_is_missing(dataset, corpus, tmp_path):
    folder = tmp_path / "killed"
    process = subprocess.Popen(command(folder, corpus, 1), cwd=REPO, stdout=subprocess.PIPE, text=True)
    wait_for_the_first_part(process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / "manifest.json").exists()
    with pytest.raises(ValueError, match="holds no train shards"):
        open_shards(folder, "train")  # half a dataset is none
    before = stamps(folder / ".parts", "*.tokens")
    assert before
    data = config(folder, corpus)
    prepare_file(data, begin(data).files[0].url, quiet)
    assert stamps(folder / ".parts", "*.tokens").items() >= before.items()  # not made a second time
    make(folder, corpus)
    assert contents(folder) == contents(dataset)


@pytest.mark.parametrize("done", [[3], [9, 0], list(range(10))])
def test_parts_made_in_any_order_are_gone_on_from(dataset, corpus, tmp_path, done):
    data = config(tmp_path, corpus)
    files = begin(data).files
    for number in done:
        prepare_file(data, files[number].url, quiet)
    for record in (tmp_path / ".parts").glob("*.json"):
        if len(done) == 2 and record.name != "plan.json":
            record.unlink()  # what has no record does not count, be it whole or not
            tokens = record.with_suffix(".tokens")
            tokens.write_bytes(tokens.read_bytes()[:100] if tokens.exists() else b"")
    make(tmp_path, corpus)
    assert contents(tmp_path) == contents(dataset)


@pytest.mark.parametrize("cut_off", ["a shard", "the manifest"])
def test_a_run_that_died_while_cutting_shards_makes_them_again(dataset, corpus, tmp_path, cut_off):
    data = config(tmp_path, corpus)
    for file in begin(data).files:
        prepare_file(data, file.url, quiet)
    shards = sorted(dataset.glob("*.npy"))
    for path in shards[:3] if cut_off == "a shard" else shards:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    if cut_off == "a shard":  # what a kill leaves of a file not yet published
        (tmp_path / f".{shards[3].name}.99999999.tmp").write_bytes(shards[3].read_bytes()[:100])
    make(tmp_path, corpus)
    assert contents(tmp_path) == contents(dataset)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="pidfd is Linux's")
def test_no_worker_outlives_a_killed_run(corpus, tmp_path):
    process = subprocess.Popen(command(tmp_path / "killed", corpus, 2), cwd=REPO, stdout=subprocess.PIPE, text=True)
    wait_for_the_first_part(process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    handles = [os.pidfd_open(int(child)) for child in children]
    assert len(handles) >= 2
    process.kill()
    process.wait()
    process.stdout.close()
    alive, deadline = set(handles), time.monotonic() + 10
    try:
        while alive and (left := deadline - time.monotonic()) > 0:
            alive -= set(select.select(alive, [], [], left)[0])  # a handle is readable once its process has ended
        assert not alive, f"{len(alive)} of {len(handles)} processes still run 10 s after the one that started them"
    finally:
        for handle in handles:
            if handle in alive:
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)


SIGTERM_IN_THE_QUEUE = """
import concurrent.futures, os, queue, signal, sys
from gpt2core.prepare import main

handed_over = 0

def look(frame, event, argument):
    global handed_over
    put = frame.f_back
    if (
        frame.f_code.co_name == "__exit__"
        and put.f_code is queue.Queue.put.__code__
        and put.f_back.f_code is concurrent.futures.ProcessPoolExecutor.submit.__code__
    ):
        handed_over += 1
        if handed_over == 2:  # the pool's thread runs by now
            sys.settrace(None)
            os.kill(os.getpid(), signal.SIGTERM)

sys.settrace(look)
main(sys.argv[1:])
"""


def test_sigterm_while_the_pool_s_queue_is_locked_ends_the_process(corpus, tmp_path):
    arguments = command(tmp_path / "out", corpus, 2)[3:]
    with subprocess.Popen(
        [sys.executable, "-c", SIGTERM_IN_THE_QUEUE, *arguments], cwd=REPO, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            _, errors = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert not errors


@pytest.fixture(scope="module")
def big_corpus(tmp_path_factory):
    """Parquet of many spans and jsonl of several, so that a kill meets files half done."""
    folder = tmp_path_factory.mktemp("big")
    texts = documents(60)
    for number in range(3):
        write_parquet(folder / f"part-{number}.parquet", {"text": texts[20 * number :][:20] * 20}, row_group_size=20)
    write_jsonl(folder / "part-3.jsonl", [{"text": text} for text in texts * 6])
    return folder


SMALL_SPANS = "import gpt2core.sources as s; s.SPAN_BYTES = 30_000; "


def start_with_small_spans(folder: Path, source: Path, **options: object) -> subprocess.Popen[str]:
    """A run of one process in which each file has dozens of spans, so that there is much to lose."""
    data = {"data_dir": str(folder), "source": str(source), "shard_size": 50_000, "num_workers": 1} | options
    code = f"from gpt2core.prepare import *; prepare(DataConfig(**{data!r}), tell)"
    return subprocess.Popen(
        [sys.executable, "-c", SMALL_SPANS + code],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_kills_at_any_moment_leave_the_same_bytes_and_lose_only_the_span_at_work(big_corpus, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    output, _ = start_with_small_spans(whole, big_corpus).communicate(timeout=120)
    assert "is complete" in output
    parts = folder / ".parts"
    for wanted in [0, 1, 2, 3, 5, 10, 20, 40]:  # parts that are there when the kill comes
        recorded = {path.stem for path in parts.glob("*.json")}
        before = {path: stamp for path, stamp in stamps(parts, "*.tokens").items() if path.stem in recorded}
        process = start_with_small_spans(folder, big_corpus)
        while len(list(parts.glob("*.tokens"))) < len(before) + wanted and process.poll() is None:
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert stamps(parts, "*.tokens").items() >= before.items()  # none was made a second time
        assert not (folder / "manifest.json").exists()
        assert not list(folder.glob("*.npy"))
    output, _ = start_with_small_spans(folder, big_corpus).communicate(timeout=120)
    assert "is complete" in output
    assert contents(folder) == contents(whole)


@pytest.mark.slow
def test_a_kill_while_shards_are_written_shows_no_partial_shard(big_corpus, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    start_with_small_spans(whole, big_corpus, shard_size=1024).communicate(timeout=120)
    process = start_with_small_spans(folder, big_corpus, shard_size=1024)
    while len(list(folder.glob("*.npy"))) < 5 and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not (folder / "manifest.json").exists()
    for shard in folder.glob("*.npy"):
        assert shard.read_bytes() == (whole / shard.name).read_bytes()
    start_with_small_spans(folder, big_corpus, shard_size=1024).communicate(timeout=120)
    assert contents(folder) == contents(whole)


@pytest.mark.slow
def test_two_runs_on_one_folder_both_end_well(big_corpus, tmp_path):
    whole, folder = tmp_path / "whole", tmp_path / "both"
    start_with_small_spans(whole, big_corpus).communicate(timeout=120)
    runs = [start_with_small_spans(folder, big_corpus) for _ in range(2)]
    outputs = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert any("is being prepared by process" in output for output in outputs)
    assert contents(folder) == contents(whole)


def test_a_run_waits_for_the_one_that_holds_the_folder(dataset, corpus, tmp_path):
    folder = tmp_path / "busy"
    with lock.hold(folder / ".lock"):
        process = subprocess.Popen(command(folder, corpus, 1), cwd=REPO, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"{folder} is being prepared by process {os.getpid()} on ")
        assert process.poll() is None
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert contents(folder) == contents(dataset)


def test_a_file_that_fails_leaves_the_others_work_and_is_all_that_is_missing(corpus, dataset, tmp_path):
    sources = tmp_path / "texts"
    sources.mkdir()
    for path in corpus.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    (sources / "part-4.jsonl").write_text('{"text": 4}')
    refused(r"part-4\.jsonl, line 1: column 'text' holds int", tmp_path / "out", sources)
    before = stamps(tmp_path / "out" / ".parts", "*.tokens")
    assert len(before) == 9
    (sources / "part-4.jsonl").write_bytes((corpus / "part-4.jsonl").read_bytes())
    data = config(tmp_path / "out", sources)
    prepare_file(data, begin(data).files[4].url, quiet)
    after = stamps(tmp_path / "out" / ".parts", "*.tokens")
    assert after.items() >= before.items() and len(after) == 10  # only the one that failed was made
    make(tmp_path / "out", sources)
    assert all_tokens(tmp_path / "out").tolist() == all_tokens(dataset).tolist()


def test_a_file_that_vanishes_is_named_and_the_rest_goes_on(corpus, dataset, tmp_path):
    sources = tmp_path / "texts"
    sources.mkdir()
    for path in corpus.iterdir():
        (sources / path.name).write_bytes(path.read_bytes())
    data = config(tmp_path / "out", sources)
    plan = begin(data)
    (sources / "part-0.jsonl").rename(tmp_path / "away")
    with pytest.raises(SourceError, match=r"part-0\.jsonl cannot be read: it is gone"):
        prepare_file(data, plan.files[0].url, quiet)
    (tmp_path / "away").rename(sources / "part-0.jsonl")
    make(tmp_path / "out", sources)
    assert all_tokens(tmp_path / "out").tolist() == all_tokens(dataset).tolist()


def test_a_file_of_the_same_size_and_other_content_is_made_anew(tmp_path):
    sources = tmp_path / "texts"
    sources.mkdir()
    for name, word in [("a", "apple"), ("b", "peach")]:
        write_jsonl(sources / f"{name}.jsonl", [{"text": f" {word}" * 700}] * 3)
    data = config(tmp_path / "out", sources)
    prepare_file(data, begin(data).files[0].url, quiet)
    write_jsonl(sources / "a.jsonl", [{"text": " melon" * 700}] * 3)
    make(tmp_path / "out", sources)
    np.testing.assert_array_equal(
        all_tokens(tmp_path / "out"), expected_tokens([" melon" * 700] * 3 + [" peach" * 700] * 3)
    )


def test_other_files_in_the_folder_stay(corpus, tmp_path):
    np.save(tmp_path / "my_embeddings.npy", np.arange(3))
    make(tmp_path, corpus)
    assert np.load(tmp_path / "my_embeddings.npy").tolist() == [0, 1, 2]


def test_a_source_that_reaches_into_the_dataset_takes_nothing_of_it(corpus, dataset, tmp_path):
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    data = config(tmp_path / "dataset", f"{tmp_path}/**/*.json*")
    prepare_file(data, begin(data).files[0].url, quiet)
    make(tmp_path / "dataset", f"{tmp_path}/**/*.json*")
    assert all_tokens(tmp_path / "dataset").tolist() == all_tokens(dataset).tolist()


def test_what_killed_processes_left_goes_when_the_next_begins(corpus, tmp_path):
    data = config(tmp_path, corpus)
    begin(data)
    left_over = tmp_path / ".parts" / ".0123.tokens.host.99999999.tmp"
    shard = tmp_path / ".edufineweb_train_000003.npy.host.99999999.tmp"
    checkpoint = tmp_path / "runs" / ".rolling_step_000009.pt.host.1.tmp"
    mine = tmp_path / ".notes.tmp"
    checkpoint.parent.mkdir()
    for path in (left_over, shard, checkpoint, mine):
        path.write_bytes(b"half")
    begin(data)
    assert not left_over.exists() and not shard.exists()
    assert checkpoint.exists() and mine.exists()  # of others, who may be at work


def test_a_second_run_with_other_options_does_not_touch_the_first(corpus, tmp_path):
    data = config(tmp_path, corpus)
    prepare_file(data, begin(data).files[0].url, quiet)
    plan = (tmp_path / ".parts" / "plan.json").read_bytes()
    with lock.hold(tmp_path / ".lock"):
        process = subprocess.Popen(
            [*command(tmp_path, corpus, 1), "--text_column=body"],
            cwd=REPO,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert "is being prepared by process" in process.stdout.readline()
        assert (tmp_path / ".parts" / "plan.json").read_bytes() == plan
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "text_column: text there, body wanted" in errors
    assert (tmp_path / ".parts" / "plan.json").read_bytes() == plan


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_without_a_traceback_and_the_next_goes_on(dataset, corpus, tmp_path, number):
    process = subprocess.Popen(
        command(tmp_path, corpus, 2), cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_the_first_part(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (128 + number, 0)  # 0 when it was done before
    assert "Traceback" not in errors
    make(tmp_path, corpus)
    assert contents(tmp_path) == contents(dataset)


def test_what_is_skipped_is_counted_in_the_manifest_and_said(tmp_path):
    texts = documents(8)
    write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts[:4]] + [{"text": 1}] + [{"text": texts[4]}])
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in texts[5:]] + [{"text": ""}])
    refused("line 5: .*--on_damage skip", tmp_path / "out", tmp_path / "*.jsonl")
    said: list[str] = []
    manifest = prepare(config(tmp_path / "out", tmp_path / "*.jsonl", on_damage="skip"), said.append)
    assert [source.damaged_documents for source in manifest.sources] == [1, 0]
    assert manifest.sources[0].damage == [f"{tmp_path / 'a.jsonl'}, line 5: column 'text' holds int and not text"]
    assert "left out: 1 empty and 1 damaged" in said[-1]
    np.testing.assert_array_equal(all_tokens(tmp_path / "out"), expected_tokens(texts))


def test_parts_made_while_skipping_do_not_count_without(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"text": 1}] + [{"text": text} for text in documents(8)])
    skipping = config(tmp_path / "out", tmp_path / "a.jsonl", on_damage="skip")
    prepare_file(skipping, begin(skipping).files[0].url, quiet)
    refused("line 1: column 'text' holds int", tmp_path / "out", tmp_path / "a.jsonl")


def test_a_text_file_damaged_in_its_middle_leaves_no_trace(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"some words " * 300_000 + b"caf\xe9")
    write_jsonl(tmp_path / "b.jsonl", [{"text": text} for text in documents(8)])
    manifest = make(tmp_path / "out", tmp_path, on_damage="skip")
    assert [source.damaged_documents for source in manifest.sources] == [1, 0]
    np.testing.assert_array_equal(all_tokens(tmp_path / "out"), expected_tokens(documents(8)))


def test_riptoken_makes_the_same_bytes_and_is_checked(dataset, corpus, tmp_path, monkeypatch):
    make(tmp_path / "quick", corpus, encoder="riptoken")
    assert contents(tmp_path / "quick") == contents(dataset)

    class Wrong:
        def __init__(self, *arguments: object) -> None:
            pass

        def encode_ordinary(self, text: str) -> list[int]:
            return [1, 2, 3]

    monkeypatch.setattr("riptoken.CoreBPE", Wrong)
    refused("riptoken gives other tokens than tiktoken", tmp_path / "wrong", corpus, encoder="riptoken")


@pytest.mark.soak
def test_huge_documents_and_files_stay_under_a_gigabyte_a_process(tmp_path):
    """100 MB in one document of each format: the tokens are those of its parts, for it is cut between words only."""
    sentence = "The quick brown fox, naïve as ever, jumps over 12 lazy dogs.\n"
    text = sentence * (100_000_000 // len(sentence.encode()))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    write_jsonl(tmp_path / "b.jsonl", [{"text": text}])
    write_parquet(tmp_path / "c.parquet", {"text": ["small", text, "small"]})
    data = {"data_dir": str(tmp_path / "out"), "source": str(tmp_path), "num_workers": 1, "shard_size": 10_000_000}
    code = f"from gpt2core.prepare import *; prepare(DataConfig(**{data!r}), tell); print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stdout)
    assert peak and int(peak[1]) < 1 << 20
    of_text = np.concatenate([[EOT], np.tile(encoding().encode_ordinary(sentence), text.count("\n"))])
    small = np.array([EOT, *encoding().encode_ordinary("small")])
    expected = np.concatenate([of_text, of_text, small, of_text, small]).astype(np.uint16)
    np.testing.assert_array_equal(all_tokens(tmp_path / "out"), expected)


@pytest.mark.parametrize("when", ["tokens", "shards"])
def test_a_full_disk_is_said_in_one_sentence_and_loses_nothing(dataset, corpus, tmp_path, when):
    """The largest file that a process may write stands in for the disk: the system refuses the write the same way."""
    limit = 3000 if when == "tokens" else None
    folder = tmp_path / "full"
    if when == "shards":
        for file in begin(config(folder, corpus)).files:
            prepare_file(config(folder, corpus), file.url, quiet)
        limit = 3500  # a record fits, a shard of 2048 tokens does not
    done = subprocess.run(
        command(folder, corpus, 1),
        cwd=REPO,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: (
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN),
        ),
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"{folder}: File too large; what is finished stays: make room and run again" in done.stderr
    assert not (folder / "manifest.json").exists()
    shards = [np.load(shard) for shard in folder.glob("*.npy")]
    assert not shards or (when == "shards" and max(map(len, shards)) < 2048)  # the last one, which the limit lets pass
    make(folder, corpus)
    assert contents(folder) == contents(dataset)


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_missing_source_is_refused_by_name(tmp_path):
    out = tmp_path / "out"
    assert str(tmp_path / "none.txt") in refused("no such file", out, tmp_path / "none.txt")
    assert "*.parquet" in refused("no such file", out, f"{tmp_path}/*.parquet")
    (tmp_path / "bare").mkdir()
    refused("that folder has no files that end in .parquet", out, tmp_path / "bare")
    assert not out.exists()


def test_a_source_of_unknown_kind_is_refused_with_the_known_ones(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"PK")
    said = refused(r"a\.docx: cannot tell its format", tmp_path / "out", tmp_path / "a.docx")
    assert ".parquet" in said and ".jsonl" in said and ".txt" in said
    assert not (tmp_path / "out").exists()


def test_an_existing_source_of_unknown_kind_is_not_called_missing_when_its_path_is_relative(tmp_path, monkeypatch):
    (tmp_path / "a.docx").write_bytes(b"PK")
    monkeypatch.chdir(tmp_path)
    refused(r"a\.docx: cannot tell its format", tmp_path / "out", "./a.docx")


def test_an_empty_source_file_is_refused_by_name(tmp_path):
    sources = tmp_path / "texts"
    sources.mkdir()
    write_jsonl(sources / "a.jsonl", [{"text": text} for text in documents(8)])
    (sources / "b.txt").write_text("")
    refused(r"b\.txt is empty", tmp_path / "out", sources)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_wrong_column_is_refused_with_the_columns_there_are(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    rows = [{"id": n, "body": text} for n, text in enumerate(documents(8))]
    if kind == "jsonl":
        write_jsonl(path, rows)
    else:
        write_parquet(path, {name: [row[name] for row in rows] for name in rows[0]})
    said = refused("text", tmp_path / "out", path)
    assert path.name in said
    assert "body" in said and "id" in said
    assert "--text_column" in said


@pytest.mark.parametrize("num_workers", [1, 2])
def test_after_a_wrong_column_the_right_one_works_in_the_same_folder(tmp_path, num_workers):
    sources = tmp_path / "texts"
    sources.mkdir()
    write_jsonl(sources / "a.jsonl", [{"body": text} for text in documents(4)])
    write_jsonl(sources / "b.jsonl", [{"body": text} for text in documents(4, 4)])
    refused("--text_column", tmp_path / "out", sources, num_workers=num_workers)
    make(tmp_path / "out", sources, text_column="body")  # as the message says
    np.testing.assert_array_equal(all_tokens(tmp_path / "out"), expected_tokens(documents(8)))


def test_too_few_tokens_are_refused_with_their_number(tmp_path):
    (tmp_path / "a.txt").write_text(" word" * 1024)
    said = refused("none are left to train on", tmp_path / "out", tmp_path / "a.txt", shard_size=1024)
    assert "1,025 tokens" in said and "1,024" in said


def test_after_too_few_tokens_a_smaller_shard_size_works_in_the_same_folder(tmp_path):
    (tmp_path / "a.txt").write_text(" word" * 4000)
    said = refused("smaller --shard_size", tmp_path / "out", tmp_path / "a.txt", shard_size=100_000)
    assert "4,001 tokens" in said
    manifest = make(tmp_path / "out", tmp_path / "a.txt", shard_size=1024)  # as the message says
    assert sum(shard.tokens for shard in manifest.shards) == 4001


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("numbers.jsonl", b'{"text": 1}\n{"text": 2}\n'),
        ("lists.jsonl", b'{"text": ["a"]}\n{"text": ["b"]}\n'),
        ("broken.jsonl", b'{"text": "a"}\n{"text": \n'),
        ("broken.parquet", b"PAR1 and then nothing of the kind"),
        ("latin.txt", "naïve café".encode("latin-1") * 1000),
        ("broken.jsonl.gz", b"no gzip"),
    ],
    ids=["numbers", "lists", "half a line", "no parquet", "no utf-8", "no gzip"],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    refused(re.escape(name), tmp_path / "out", tmp_path / name)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"shard_size": 4096}, "shard_size: 2048 there, 4096 wanted"),
        ({"text_column": "body"}, "text_column: text there"),
    ],
)
def test_a_folder_with_a_dataset_of_other_options_is_left_alone(dataset, corpus, change, said):
    assert said in refused("holds another dataset", dataset, corpus, **change)


def test_a_folder_with_a_dataset_of_another_source_is_left_alone(dataset):
    assert "source: " in refused("holds another dataset", dataset, SHAKESPEARE)


def test_a_folder_with_another_dataset_half_made_is_left_alone(corpus, tmp_path):
    data = config(tmp_path, corpus)
    prepare_file(data, begin(data).files[0].url, quiet)
    before = contents(tmp_path)
    assert str(tmp_path) in refused("half made.*source: ", tmp_path, SHAKESPEARE)
    assert contents(tmp_path) == before


def test_a_folder_of_shards_without_a_manifest_is_left_alone(corpus, tmp_path):
    np.save(tmp_path / "edufineweb_val_000000", np.zeros(10, np.uint16))
    np.save(tmp_path / "edufineweb_train_000001", np.zeros(10, np.uint16))
    before = contents(tmp_path)
    assert "train on them as they are" in refused("shards without a manifest", tmp_path, corpus)
    assert contents(tmp_path) == before


def test_the_command_ends_with_1_and_a_sentence(tmp_path):
    answer = subprocess.run(
        command(tmp_path / "out", tmp_path / "none.txt", 1), cwd=REPO, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert answer.stderr.count("\n") == 1
    assert "none.txt: there is no such file" in answer.stderr


def test_shards_made_elsewhere_are_told_from_a_dataset_half_made(tmp_path):
    data = DataConfig(data_dir=str(tmp_path))
    assert not is_ready_made(data)
    np.save(tmp_path / "edufineweb_val_000000.npy", np.arange(10, dtype=np.uint16))
    assert not is_ready_made(data)
    np.save(tmp_path / "edufineweb_train_000001.npy", np.arange(10, dtype=np.uint16))
    assert is_ready_made(data)
    (tmp_path / "manifest.json").write_text("{}")
    assert not is_ready_made(data)
