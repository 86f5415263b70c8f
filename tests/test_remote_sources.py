"""The dataset from and to other machines: the hub, S3 and the web, their failures, and kills in the middle.

Everything runs as a user starts it, `gpt2 prepare` in a process of its own, against real servers on this machine.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from servers import Fault, FileServer, Hub
from test_prepare import SHARD, contents, documents, expected_tokens

from gpt2core import sources
from gpt2core.config import DataConfig
from gpt2core.flags import TRY_AGAIN

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parent.parent
DEADLINE_S = 120.0  # for any one process; only a hang comes near it
FINEWEB = "HuggingFaceFW/fineweb-edu"
TEXTS = documents(18)
FILES = 3
# The form of FineWeb-Edu's own README.
README = b"""---
license: odc-by
language:
- en
configs:
- config_name: default
  data_files:
  - split: train
    path: data/*/*
- config_name: sample-10BT
  data_files:
  - split: train
    path: sample/10BT/*
- config_name: sample-100BT
  data_files:
  - split: train
    path: sample/100BT/*
---
# FineWeb-Edu
"""


def texts_of(file: int) -> list[str]:
    return TEXTS[6 * file : 6 * file + 6]


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "id": list(range(len(texts))), "score": [3.5] * len(texts)}), buffer)
    return buffer.getvalue()


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def hub_file(file: int) -> str:
    return f"sample/10BT/{file:03d}_00000.parquet"


@pytest.fixture
def fineweb(hub: Hub) -> Hub:
    """The hub with a FineWeb-Edu of three small files, and what must not be taken from it."""
    hub.add(FINEWEB, "README.md", README)
    for file in range(FILES):
        hub.add(FINEWEB, hub_file(file), parquet(texts_of(file)))
    hub.add(FINEWEB, "data/CC-MAIN-2013-20/train-00000-of-00014.parquet", parquet(["not of this sample"]))
    hub.add(FINEWEB, "sample/100BT/000_00000.parquet", parquet(["not of this sample"]))
    return hub


@pytest.fixture(scope="module")
def local_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same texts in files of this machine."""
    folder = tmp_path_factory.mktemp("texts")
    for file in range(FILES):
        (folder / f"{file:03d}.parquet").write_bytes(parquet(texts_of(file)))
    return folder


@pytest.fixture(scope="module")
def local_dataset(local_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What is made of them on this machine: what is made on S3 must equal it byte for byte."""
    folder = tmp_path_factory.mktemp("made") / "dataset"
    succeed({}, folder, local_source)
    return contents(folder)


def command(data_dir: object, source: object = None, *flags: str) -> list[str]:
    of = [] if source is None else ["--source", str(source)]
    words = ["--data_dir", str(data_dir), "--shard_size", str(SHARD), "--num_workers", "1", *of, *flags]
    return [sys.executable, "-m", "gpt2core.cli", "prepare", *words]


def environment(additions: dict[str, str]) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "AWS_"))}
    return ours | additions


def prepare(
    variables: dict[str, str], data_dir: object, source: object = None, *flags: str
) -> subprocess.CompletedProcess[str]:
    """`gpt2 prepare` to its end; the source is FineWeb-Edu unless there is another."""
    return subprocess.run(
        command(data_dir, source, *flags),
        cwd=REPOSITORY,
        env=environment(variables),
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


def succeed(variables: dict[str, str], data_dir: object, source: object = None, *flags: str) -> str:
    done = prepare(variables, data_dir, source, *flags)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def fails(exit_code: int, variables: dict[str, str], data_dir: object, source: object = None, *flags: str) -> str:
    """The one sentence with which it ends."""
    done = prepare(variables, data_dir, source, *flags)
    assert done.returncode == exit_code, done.stdout + done.stderr
    assert_one_sentence(done)
    return done.stderr.strip()


def assert_one_sentence(done: subprocess.CompletedProcess[str]) -> None:
    assert done.stderr.count("\n") == 1 and "error" in done.stderr, done.stderr


@contextmanager
def started(
    folder: Path, variables: dict[str, str], data_dir: object, source: object = None, *flags: str
) -> Iterator[subprocess.Popen[bytes]]:
    """`gpt2 prepare` for as long as the block lasts, or until it is killed."""
    with (folder / "output.txt").open("wb") as output:
        process = subprocess.Popen(
            command(data_dir, source, *flags),
            cwd=REPOSITORY,
            env=environment(variables),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(DEADLINE_S)


def wait_for(held: Fault, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Waits until the process made the request that is held."""
    deadline = time.monotonic() + DEADLINE_S
    while not held.reached.wait(0.1):
        output = (folder / "output.txt").read_text()
        assert process.poll() is None, f"it ended before it asked for {held.path}:\n{output}"
        assert time.monotonic() < deadline, f"it did not ask for {held.path}:\n{output}"


def kill_at(held: Fault, process: subprocess.Popen[bytes], folder: Path) -> None:
    """Kills the process while it waits for the answer to the request that is held."""
    wait_for(held, process, folder)
    process.kill()
    assert process.wait(DEADLINE_S) == -signal.SIGKILL


def expected_shards(texts: list[str]) -> dict[str, bytes]:
    """The shard files by the plainest code."""
    tokens, files = expected_tokens(texts), {}
    for index, start in enumerate(range(0, tokens.size, SHARD)):
        buffer = io.BytesIO()
        np.save(buffer, tokens[start : start + SHARD])
        files[f"edufineweb_{'train' if index else 'val'}_{index:06d}.npy"] = buffer.getvalue()
    return files


def assert_dataset(found: dict[str, bytes], texts: list[str]) -> dict:
    """The files are exactly the shards of these texts and their manifest, which is returned."""
    wanted = expected_shards(texts)
    assert sorted(found) == sorted([*wanted, "manifest.json"])
    assert {name: found[name] for name in wanted} == wanted
    manifest = json.loads(found["manifest.json"])
    assert [(shard["name"], shard["sha256"]) for shard in manifest["shards"]] == [
        (name, hashlib.sha256(content).hexdigest()) for name, content in wanted.items()
    ]
    return manifest


def assert_fineweb(folder: Path, revision: str) -> None:
    """The folder holds FineWeb-Edu's sample as of this revision."""
    manifest = assert_dataset(contents(folder), TEXTS)
    assert (manifest["source"], manifest["source_config"]) == (FINEWEB, "sample-10BT")
    assert manifest["source_revision"] == revision
    urls = [f"hf://datasets/{FINEWEB}@{revision}/{hub_file(file)}" for file in range(FILES)]
    assert [source["url"] for source in manifest["sources"]] == urls
    assert [source["size_bytes"] for source in manifest["sources"]] == [
        len(parquet(texts_of(file))) for file in range(FILES)
    ]


def contents_read(server: FileServer) -> set[str]:
    """The data files of which something was read."""
    return {r.path.rpartition("/")[2] for r in server.faults.requests if r.method == "GET" and r.range}


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_the_default_source_gives_every_token_and_is_pinned_to_its_commit(fineweb, tmp_path):
    succeed(fineweb.environment, tmp_path / "out", None, "--num_workers", "2")
    assert_fineweb(tmp_path / "out", fineweb.revision(FINEWEB))
    assert contents_read(fineweb) == {Path(hub_file(file)).name for file in range(FILES)}
    fineweb.faults.clear()
    assert "is complete" in succeed(fineweb.environment, tmp_path / "out")
    assert fineweb.faults.requests == []  # a complete dataset does not ask the hub


def test_a_hub_dataset_without_configurations(hub, tmp_path):
    for file in range(FILES):
        hub.add("somebody/texts", f"data/train-{file:05d}-of-{FILES:05d}.parquet", parquet(texts_of(file)))
    hub.add("somebody/texts", "data/test-00000-of-00001.parquet", parquet(["not for training"]))
    succeed(hub.environment, tmp_path / "out", "somebody/texts")
    manifest = assert_dataset(contents(tmp_path / "out"), TEXTS)
    assert (manifest["source_config"], manifest["source_revision"]) == (None, hub.revision("somebody/texts"))


def test_a_hub_url_with_a_glob(fineweb, tmp_path):
    source = f"hf://datasets/{FINEWEB}/sample/10BT/*.parquet"
    succeed(fineweb.environment, tmp_path / "out", source)
    manifest = assert_dataset(contents(tmp_path / "out"), TEXTS)
    assert [Path(entry["url"]).name for entry in manifest["sources"]] == [
        Path(hub_file(file)).name for file in range(FILES)
    ]


def test_a_name_or_configuration_that_the_hub_does_not_have_is_refused(fineweb, tmp_path):
    assert "somebody/nothing" in fails(1, fineweb.environment, tmp_path / "out", "somebody/nothing")
    said = fails(1, fineweb.environment, tmp_path / "out", None, "--source_config", "sample-1BT")
    assert "sample-1BT" in said and "sample-10BT" in said
    assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == {}


def test_a_hub_that_is_not_there_is_one_sentence(hub, tmp_path):
    nowhere = hub.environment | {"HF_ENDPOINT": f"http://127.0.0.1:{closed_port()}"}
    said = fails(TRY_AGAIN, nowhere, tmp_path / "out")
    assert FINEWEB in said and "network" in said
    assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == {}


def test_a_hub_that_does_not_answer_is_given_up(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(sources, "HUB_TIMEOUT_S", 0.2)
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(sources.SourceError, match=f"{FINEWEB} cannot be had"):
            sources.list_sources(DataConfig())


def test_a_hub_that_answers_500_at_first_is_one_sentence(fineweb, tmp_path):
    fineweb.fail(f"/api/datasets/{FINEWEB}", times=1)
    assert "500" in fails(TRY_AGAIN, fineweb.environment, tmp_path / "out")
    succeed(fineweb.environment, tmp_path / "out")
    assert_fineweb(tmp_path / "out", fineweb.revision(FINEWEB))


def test_a_hub_that_answers_500_now_and_then_is_asked_again(fineweb, tmp_path):
    faults = [fineweb.fail(path, times=1) for path in ("README.md", "/sample/10BT", hub_file(1))]
    done = prepare(fineweb.environment, tmp_path / "out")
    assert done.returncode == 0, done.stderr  # on which the hub's client tells that it tries again
    assert all(fault.reached.is_set() for fault in faults)
    assert_fineweb(tmp_path / "out", fineweb.revision(FINEWEB))


def test_a_connection_that_breaks_in_the_middle_of_a_file_is_made_again(fineweb, tmp_path):
    of_footer, of_texts = fineweb.cut_off(hub_file(0)), fineweb.cut_off(hub_file(1), after=1)
    done = prepare(fineweb.environment, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert of_footer.reached.is_set() and of_texts.reached.is_set()
    assert_fineweb(tmp_path / "out", fineweb.revision(FINEWEB))


def test_a_file_that_vanishes_is_named_and_the_others_are_done(fineweb, tmp_path):
    fineweb.vanish(hub_file(1), after=1)  # its footer can still be read
    said = fails(TRY_AGAIN, fineweb.environment, tmp_path / "out")
    assert f"@{fineweb.revision(FINEWEB)}/{hub_file(1)}" in said
    assert not (tmp_path / "out" / "manifest.json").exists()
    fineweb.faults.clear()  # it is back
    succeed(fineweb.environment, tmp_path / "out")
    assert contents_read(fineweb) == {Path(hub_file(1)).name}
    assert_fineweb(tmp_path / "out", fineweb.revision(FINEWEB))


def test_a_file_that_vanishes_before_it_was_looked_at_is_named_and_the_others_are_done(fineweb, tmp_path):
    fineweb.vanish(hub_file(1))
    said = fails(TRY_AGAIN, fineweb.environment, tmp_path / "out")
    assert f"@{fineweb.revision(FINEWEB)}/{hub_file(1)}" in said
    fineweb.faults.clear()
    succeed(fineweb.environment, tmp_path / "out")
    assert contents_read(fineweb) == {Path(hub_file(1)).name}
    assert_fineweb(tmp_path / "out", fineweb.revision(FINEWEB))


def test_a_killed_run_goes_on_with_the_commit_it_began_with(fineweb, tmp_path):
    old = fineweb.revision(FINEWEB)
    held = fineweb.hold(hub_file(1), after=1)  # the first is tokenized, of the second only the footer was read
    with started(tmp_path, fineweb.environment, tmp_path / "out") as process:
        kill_at(held, process, tmp_path)
    fineweb.faults.clear()
    new = fineweb.new_revision(FINEWEB)
    for file in range(FILES):
        fineweb.add(FINEWEB, hub_file(file), parquet(documents(6, 100 + file)))
    succeed(fineweb.environment, tmp_path / "out")
    assert_fineweb(tmp_path / "out", old)
    assert contents_read(fineweb) == {Path(hub_file(file)).name for file in (1, 2)}  # the first was not read again
    assert not [request for request in fineweb.faults.requests if new in request.path]


# --- S3 as a source --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["*.parquet", "*"])
def test_sources_on_s3(s3, tmp_path, pattern):
    for file in range(FILES):
        s3.add(f"texts/{file}.parquet", parquet(texts_of(file)))
    s3.add("texts/3.jsonl", jsonl(documents(6, 50)))
    s3.add("texts/picture.png", b"no text")
    s3.add("texts/deeper/9.jsonl", jsonl(["not of this folder"]))
    source = f"{s3.bucket_url}/texts/{pattern}"
    succeed(s3.environment, tmp_path / "out", source)
    manifest = assert_dataset(contents(tmp_path / "out"), TEXTS + (documents(6, 50) if pattern == "*" else []))
    assert (manifest["source"], manifest["source_revision"]) == (source, None)
    names = ["0.parquet", "1.parquet", "2.parquet", "3.jsonl"][: 4 if pattern == "*" else 3]
    assert [entry["url"] for entry in manifest["sources"]] == [f"{s3.bucket_url}/texts/{name}" for name in names]


def test_what_is_not_on_s3_is_refused_by_name(s3, tmp_path):
    for source in (f"{s3.bucket_url}/none/*.parquet", "s3://no-such-bucket/a.jsonl"):
        assert f"source {source}: there is no such file" in fails(1, s3.environment, tmp_path / "out", source)


# --- S3 as the place of the dataset ----------------------------------------------------------------------------------


def test_a_dataset_on_s3_is_byte_for_byte_the_one_on_disk(s3, local_source, local_dataset):
    assert_dataset(local_dataset, TEXTS)
    succeed(s3.environment, f"{s3.bucket_url}/sets/out", local_source)
    assert s3.contents("sets/out") == local_dataset


def test_from_s3_to_s3_as_from_s3_to_disk(s3, tmp_path):
    for file in range(FILES):
        s3.add(f"texts/{file}.parquet", parquet(texts_of(file)))
    source = f"{s3.bucket_url}/texts/*.parquet"
    succeed(s3.environment, f"{s3.bucket_url}/out/", source)  # a slash at the end says the same
    succeed(s3.environment, tmp_path / "out", source)
    assert s3.contents("out") == contents(tmp_path / "out")
    assert_dataset(s3.contents("out"), TEXTS)


def test_from_the_hub_to_s3(fineweb, s3):
    succeed(fineweb.environment | s3.environment, f"{s3.bucket_url}/out")
    manifest = assert_dataset(s3.contents("out"), TEXTS)
    assert manifest["source_revision"] == fineweb.revision(FINEWEB)


def test_a_complete_dataset_on_s3_is_left_as_it_is(s3, local_source, local_dataset, tmp_path):
    for name, content in local_dataset.items():
        s3.add(f"out/{name}", content)
    s3.faults.clear()
    assert "is complete" in succeed(s3.environment, f"{s3.bucket_url}/out", local_source)
    said = fails(1, s3.environment, f"{s3.bucket_url}/out", local_source, "--shard_size", "4096")
    assert "holds another dataset" in said and "shard_size: 2048 there, 4096 wanted" in said
    assert s3.contents("out") == local_dataset
    assert not s3.requests("PUT") and not s3.requests("POST") and not s3.requests("DELETE")


# Each with what happens to the request under way: it still takes effect, or it never arrives.
KILLS = [
    ("/.parts/plan.json", "lost"),
    (".tokens", "lost"),
    (".tokens", "arrives"),  # tokens without their record
    ("val_000000.npy", "lost"),
    ("train_000002.npy", "arrives"),
    ("manifest.json", "lost"),
]


def assert_only_whole_files_appeared(seen: list[dict[str, str]], dataset: dict[str, bytes]) -> None:
    """At no time was anything in the folder but whole shards, and the manifest only beside all of them."""
    whole = {name: hashlib.md5(content).hexdigest() for name, content in dataset.items()}
    for listed in seen:
        assert listed.items() <= whole.items()
        assert "manifest.json" not in listed or listed == whole
    assert seen[-1] == whole
    assert len({len(listed) for listed in seen}) > 4  # it was looked at in between


def test_kills_at_any_moment_of_a_run_that_writes_to_s3(s3, local_source, local_dataset, tmp_path):
    """One dataset, killed again and again, each time later."""
    data_dir, seen = f"{s3.bucket_url}/out", s3.watch("out")
    for path, request in KILLS:
        held = s3.hold("PUT", path)
        with started(tmp_path, s3.environment, data_dir, local_source) as process:
            kill_at(held, process, tmp_path)
        held.release(drop=request == "lost")
        assert "manifest.json" not in s3.contents("out")
    s3.faults.clear()
    succeed(s3.environment, data_dir, local_source)
    assert s3.contents("out") == local_dataset
    assert not [path for path in s3.requests("PUT") if path.endswith(".tokens")]  # all were there
    assert_only_whole_files_appeared(seen, local_dataset)


def test_a_kill_of_a_run_of_two_processes_that_writes_to_s3(s3, local_source, local_dataset, tmp_path):
    data_dir, seen = f"{s3.bucket_url}/out", s3.watch("out")
    held = s3.hold("PUT", ".tokens", after=1)
    with started(tmp_path, s3.environment, data_dir, local_source, "--num_workers", "2") as process:
        kill_at(held, process, tmp_path)
    held.release(drop=True)
    succeed(s3.environment, data_dir, local_source, "--num_workers", "2")
    assert s3.contents("out") == local_dataset
    assert_only_whole_files_appeared(seen, local_dataset)


@pytest.mark.parametrize(
    ("method", "path", "request_under_way"),
    [("PUT", "out/manifest.json", "arrives"), ("POST", "", "lost")],
    ids=["manifest", "cleanup"],
)
def test_a_kill_at_the_very_end_leaves_nothing_behind(
    s3, local_source, local_dataset, tmp_path, method, path, request_under_way
):
    held = s3.hold(method, path)
    with started(tmp_path, s3.environment, f"{s3.bucket_url}/out", local_source) as process:
        kill_at(held, process, tmp_path)
    held.release(drop=request_under_way == "lost")
    succeed(s3.environment, f"{s3.bucket_url}/out", local_source)
    assert s3.contents("out") == local_dataset


def test_shards_of_another_size_that_a_killed_run_left_on_s3_are_gone_in_the_end(
    s3, local_source, local_dataset, tmp_path
):
    held = s3.hold("PUT", "manifest.json")
    flags = ["--shard_size", "1024"]  # more shards than there will be
    with started(tmp_path, s3.environment, f"{s3.bucket_url}/out", local_source, *flags) as process:
        kill_at(held, process, tmp_path)
    held.release(drop=True)
    succeed(s3.environment, f"{s3.bucket_url}/out", local_source)
    assert s3.contents("out") == local_dataset


def test_a_second_run_on_a_folder_on_s3_does_no_harm(s3, local_source, local_dataset, tmp_path):
    held = s3.hold("PUT", "train_000001.npy")
    with started(tmp_path, s3.environment, f"{s3.bucket_url}/out", local_source) as first:
        wait_for(held, first, tmp_path)
        succeed(s3.environment, f"{s3.bucket_url}/out", local_source)  # which takes the parts away
        assert s3.contents("out") == local_dataset
        held.release()
        first.wait(DEADLINE_S)
        output = (tmp_path / "output.txt").read_text()
    assert s3.contents("out") == local_dataset
    assert first.returncode == 0, output


def test_s3_that_is_overloaded_now_and_then_is_asked_again(s3, local_source, local_dataset):
    paths = ("plan.json", ".tokens", "train_000001.npy", "manifest.json")
    faults = [s3.fail("PUT", path, times=1) for path in paths]
    succeed(s3.environment, f"{s3.bucket_url}/out", local_source)
    assert all(fault.reached.is_set() for fault in faults)
    assert s3.contents("out") == local_dataset


def test_a_place_that_cannot_be_written_to_is_named_in_one_sentence(s3, local_source):
    data_dir = f"{s3.bucket_url}/out"
    assert "no-such-bucket" in fails(1, s3.environment, "s3://no-such-bucket/out", local_source)
    nameless = {name: value for name, value in s3.environment.items() if "KEY" not in name}
    assert data_dir in fails(1, nameless, data_dir, local_source)
    s3.fail("PUT", "plan.json", times=1 << 30, status=403)
    assert data_dir in fails(1, s3.environment, data_dir, local_source)
    assert "oci://" in fails(1, {}, "oci://bucket@namespace/out", local_source)  # its library is not installed


def test_a_place_that_does_not_answer_may_be_tried_again(s3, local_source):
    nowhere = s3.environment | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{closed_port()}"}
    assert f"{s3.bucket_url}/out" in fails(TRY_AGAIN, nowhere, f"{s3.bucket_url}/out", local_source)


def test_a_source_that_needs_a_login_is_refused(s3, tmp_path):
    source = s3.add("texts/a.jsonl", jsonl(TEXTS))
    nameless = {name: value for name, value in s3.environment.items() if "KEY" not in name}
    said = fails(1, nameless, tmp_path / "out", source)
    assert source in said and "credentials" in said


# --- the web ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["texts.parquet", "texts.jsonl.gz"])
def test_a_source_on_the_web(http_files, tmp_path, name):
    forms = {"texts.parquet": parquet(TEXTS), "texts.jsonl.gz": gzip.compress(jsonl(TEXTS))}
    (http_files.folder / name).write_bytes(forms[name])
    source = f"{http_files.url}/{name}"
    succeed({}, tmp_path / "out", source)
    manifest = assert_dataset(contents(tmp_path / "out"), TEXTS)
    assert [(entry["url"], entry["size_bytes"]) for entry in manifest["sources"]] == [(source, len(forms[name]))]


def test_what_the_web_does_not_have_is_one_sentence(http_files, tmp_path):
    source = f"{http_files.url}/none.parquet"
    assert source in fails(1, {}, tmp_path / "out", source)
    nowhere = f"http://127.0.0.1:{closed_port()}/a.parquet"
    assert nowhere in fails(TRY_AGAIN, {}, tmp_path / "out", nowhere)
    (http_files.folder / "a.parquet").write_bytes(parquet(TEXTS))
    http_files.fail("a.parquet", times=1 << 30)
    source = f"{http_files.url}/a.parquet"
    assert source in fails(TRY_AGAIN, {}, tmp_path / "out", source)


def test_a_file_that_changed_on_the_web_since_the_run_was_killed(http_files, tmp_path):
    (http_files.folder / "a.jsonl").write_bytes(jsonl(TEXTS[:9]))
    held = http_files.hold("a.jsonl")
    source = f"{http_files.url}/a.jsonl"
    with started(tmp_path, {}, tmp_path / "out", source) as process:
        kill_at(held, process, tmp_path)
    held.release()
    (http_files.folder / "a.jsonl").write_bytes(jsonl(TEXTS))
    succeed({}, tmp_path / "out", source)
    assert_dataset(contents(tmp_path / "out"), TEXTS)
