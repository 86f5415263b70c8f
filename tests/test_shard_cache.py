"""Shards on remote storage, a real S3 server on localhost: copied once, whole or not at all, within their budget."""

from __future__ import annotations

import functools
import io
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from servers import S3

from gpt2core.config import DataConfig, RunConfig
from gpt2core.dataset_check import verify
from gpt2core.loader import Loader, Sequences
from gpt2core.preflight import preflight
from gpt2core.shard_cache import RemoteFile, ShardCache
from gpt2core.shards import fingerprint, keep_here, open_shards, shard_name

CPU = torch.device("cpu")
SIZES = [3000, 5000, 4000, 5000, 4500]  # tokens of the val shard and of four train shards
FILE_BYTES = [128 + 2 * size for size in SIZES]


class Bucket:
    """A folder of shards on the server, and the requests that came for them."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.files = fsspec.filesystem("s3")

    def put(self, name: str, content: bytes) -> None:
        self.files.pipe_file(f"{self.url}/{name}", content)

    def put_folder(self, folder: Path) -> None:
        for path in folder.iterdir():
            self.put(path.name, path.read_bytes())


@pytest.fixture
def bucket(s3: S3) -> Bucket:
    """An empty folder; processes that a test starts find the server through the environment too."""
    return Bucket(s3.bucket_url)


@pytest.fixture
def local(tmp_path: Path) -> Path:
    """Shards in which no token comes twice, so that a token tells where it is from."""
    folder = tmp_path / "local"
    folder.mkdir()
    start = 0
    for index, size in enumerate(SIZES):
        np.save(folder / shard_name(index), np.arange(start, start + size).astype(np.uint16))
        start += size
    return folder


@pytest.fixture
def remote(bucket: Bucket, local: Path) -> Bucket:
    bucket.put_folder(local)
    return bucket


def remote_file(bucket: Bucket, name: str, size_bytes: int) -> RemoteFile:
    return RemoteFile(f"{bucket.url}/{name}", size_bytes, probe="")


def on_disk(cache: ShardCache) -> set[str]:
    """The shards that have a copy, by the stems of their names."""
    return {path.name.rpartition("_npy_")[0] for path in cache.folder.iterdir() if path.is_file()}


# --- what is read ----------------------------------------------------------------------------------------------------


def test_remote_shards_are_the_local_ones(remote: Bucket, local: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10**6)
    here, there = open_shards(local, "train"), open_shards(remote.url, "train", cache)
    assert fingerprint(there) == fingerprint(here)
    assert [shard.name for shard in there] == [shard.name for shard in here]
    assert [shard.num_tokens for shard in there] == [shard.num_tokens for shard in here]
    assert cache.used_bytes() == 0  # nothing was copied for that
    keep_here(there)
    for mine, other in zip(there, here, strict=True):
        np.testing.assert_array_equal(mine.tokens, other.tokens)


def test_llmc_shards_on_remote_storage(bucket: Bucket, tmp_path: Path) -> None:
    tokens = np.arange(3000, dtype=np.uint16)
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, tokens.size
    content = header.tobytes() + tokens.tobytes()
    bucket.put("fineweb_train_000001.bin", content)
    (tmp_path / "fineweb_train_000001.bin").write_bytes(content)
    (there,) = open_shards(bucket.url, "train", ShardCache(tmp_path / "cache", 10**6))
    np.testing.assert_array_equal(there.tokens, tokens)
    assert fingerprint([there]) == fingerprint(open_shards(tmp_path, "train"))


def test_a_truncated_remote_shard_is_refused_before_it_is_copied(remote: Bucket, local: Path, tmp_path: Path) -> None:
    remote.put(shard_name(2), (local / shard_name(2)).read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"edufineweb_train_000002\.npy is not a whole token shard.*8,128.*8,118"):
        open_shards(remote.url, "train", ShardCache(tmp_path / "cache", 10**6))


def test_foreign_ids_in_a_remote_shard_are_refused(bucket: Bucket, tmp_path: Path) -> None:
    content = io.BytesIO()
    np.save(content, np.full(100, 50257, np.uint16))
    bucket.put(shard_name(1), content.getvalue())
    (shard,) = open_shards(bucket.url, "train", ShardCache(tmp_path / "cache", 10**6))
    with pytest.raises(ValueError, match=r"s3://.*000001\.npy is no shard of GPT-2 tokens"):
        _ = shard.tokens


def test_a_manifest_on_remote_storage_is_checked(remote: Bucket, tmp_path: Path) -> None:
    remote.put("manifest.json", b'{"format": 2}')
    with pytest.raises(ValueError, match=r"s3://.*/manifest\.json.*gpt2 prepare"):
        open_shards(remote.url, "train", ShardCache(tmp_path / "cache", 10**6))


def test_an_empty_folder_and_a_server_that_is_gone_are_said_in_a_sentence(
    bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = ShardCache(tmp_path / "cache", 10**6)
    with pytest.raises(ValueError, match=r"s3://.* holds no train shards"):
        open_shards(bucket.url, "train", cache)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port, where nobody listens
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(OSError, match=r"s3://.* cannot be used \(EndpointConnectionError") as caught:
        open_shards(bucket.url, "train", cache)
    assert len(str(caught.value).splitlines()) == 1
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_listing_without_sizes_is_refused_with_a_way_out(local: Path, tmp_path: Path) -> None:
    """As a plain web server gives one."""
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(local))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        Thread(target=web.serve_forever, daemon=True).start()
        with pytest.raises(
            ValueError, match=r"does not say how large edufineweb_train_000001\.npy is; copy the shards"
        ):
            open_shards(f"http://127.0.0.1:{web.server_port}", "train", ShardCache(tmp_path / "cache", 10**6))
        web.shutdown()


# --- copies ----------------------------------------------------------------------------------------------------------


def test_many_readers_at_once_make_one_download(remote: Bucket, tmp_path: Path) -> None:
    said: list[str] = []
    caches = [ShardCache(tmp_path / "cache", 10**6, said.append) for _ in range(8)]  # as eight processes would have
    shards = [open_shards(remote.url, "train", cache) for cache in caches]
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(lambda shard: int(shard[1].tokens.sum()), shards))
    assert sums == [sum(range(8000, 12000))] * 8
    assert len([line for line in said if "MB here" in line]) == 1


def test_a_changed_remote_file_of_the_same_size_is_copied_anew(remote: Bucket, local: Path, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10**6)
    keep_here(open_shards(remote.url, "val", cache))
    content = bytearray((local / shard_name(0)).read_bytes())
    content[-2:] = b"\x07\x00"
    remote.put(shard_name(0), bytes(content))
    assert open_shards(remote.url, "val", cache)[0].tokens[-1] == 7


def test_a_file_that_shrank_since_it_was_listed_leaves_no_copy(remote: Bucket, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 10**6)
    (shard,) = open_shards(remote.url, "val", cache)
    remote.put(shard_name(0), b"short")
    with pytest.raises(ValueError, match=r"5 bytes came for the 6128"):
        _ = shard.tokens
    assert cache.used_bytes() == 0


FETCH = """
import sys
from pathlib import Path
from gpt2core import shard_cache
shard_cache.CHUNK_BYTES = 1000
url, size, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
read_chunk, chunks = shard_cache._read_chunk, []
def pause_after_three(url, start, end):
    if len(chunks) == 3:
        print("half", flush=True)
        sys.stdin.read()
    chunks.append(start)
    return read_chunk(url, start, end)
shard_cache._read_chunk = pause_after_three
shard_cache.ShardCache(folder, 10**6).fetch(shard_cache.RemoteFile(url, size, ""))
"""


def test_a_killed_download_leaves_nothing_that_is_taken_for_a_copy(remote: Bucket, local: Path, tmp_path: Path) -> None:
    """The process is held in the middle of a download, then killed; the next one downloads, and sweeps up."""
    file = remote_file(remote, shard_name(1), FILE_BYTES[1])
    command = [sys.executable, "-c", FETCH, file.url, str(file.size_bytes), str(tmp_path / "cache")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "half\n"
    cache = ShardCache(tmp_path / "cache", 10**6)
    (left_over,) = [path for path in cache.folder.iterdir() if path.is_file()]
    assert left_over.name.startswith(f".{file.name}.")
    assert cache.used_bytes() == file.size_bytes  # its room is taken from the start
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdin.close()
    process.stdout.close()
    with cache.reading(file) as path:
        assert path.read_bytes() == (local / shard_name(1)).read_bytes()
    assert not left_over.exists()
    assert cache.used_bytes() == file.size_bytes


def test_what_a_killed_download_left_makes_room_for_another(remote: Bucket, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", 12_000)
    file = remote_file(remote, shard_name(1), FILE_BYTES[1])
    cache.folder.mkdir(parents=True)
    (cache.folder / f".{file.name}.a.host.of.many.dots.4711.tmp").write_bytes(bytes(file.size_bytes))
    cache.fetch(remote_file(remote, shard_name(2), FILE_BYTES[2]))
    assert on_disk(cache) == {"edufineweb_train_000002"}


# --- the budget ------------------------------------------------------------------------------------------------------


def test_what_was_least_recently_used_makes_room(remote: Bucket, tmp_path: Path) -> None:
    files = [remote_file(remote, shard_name(index), FILE_BYTES[index]) for index in range(5)]
    cache = ShardCache(tmp_path / "cache", FILE_BYTES[1] + FILE_BYTES[2] + FILE_BYTES[3])
    for age, file in zip((30, 20, 10), files[1:4], strict=True):
        cache.fetch(file)
        os.utime(cache.folder / file.name, (age, age))  # 10 seconds after 1970 is longest ago
    with cache.reading(files[3]):  # it was the oldest, and is now used again
        pass
    cache.fetch(files[0])
    assert on_disk(cache) == {"edufineweb_train_000001", "edufineweb_train_000003", "edufineweb_val_000000"}
    assert cache.used_bytes() <= cache.max_bytes


def test_a_copy_in_use_stays(remote: Bucket, local: Path, tmp_path: Path) -> None:
    cache, other = (ShardCache(tmp_path / "cache", 21_000) for _ in range(2))
    files = [remote_file(remote, shard_name(index), FILE_BYTES[index]) for index in range(5)]
    with cache.reading(files[1]) as path:
        os.utime(path, (1, 1))
        other.fetch(files[2])
        other.fetch(files[3])
        assert on_disk(cache) == {"edufineweb_train_000001", "edufineweb_train_000003"}
        assert path.read_bytes() == (local / shard_name(1)).read_bytes()


def test_no_room_beside_what_is_in_use_is_refused(
    remote: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2core.shard_cache.ROOM_TIMEOUT_S", 0.0)
    cache = ShardCache(tmp_path / "cache", 15_000)
    cache.keep([remote_file(remote, shard_name(1), FILE_BYTES[1])])
    with pytest.raises(ValueError, match=r"has no room for .*000002\.npy.*in use; give a larger --cache_gb"):
        cache.fetch(remote_file(remote, shard_name(2), FILE_BYTES[2]))
    assert cache.used_bytes() == FILE_BYTES[1]


def test_a_shard_larger_than_the_budget_is_refused(remote: Bucket, tmp_path: Path) -> None:
    (shard,) = open_shards(remote.url, "val", ShardCache(tmp_path / "cache", 6_000))
    with pytest.raises(ValueError, match=r"has 6\.13e-06 GB .* cache_gb 6e-06: give a larger --cache_gb"):
        _ = shard.tokens


@pytest.mark.parametrize(
    ("shuffle", "cache_bytes", "refused"),
    [
        ("sequences", sum(FILE_BYTES), None),
        ("sequences", sum(FILE_BYTES) - 1, r"4\.36e-05 GB.*--cache_gb 4\.37e-05 or more, or --shuffle shards"),
        ("shards", FILE_BYTES[0] + FILE_BYTES[1] + FILE_BYTES[3], None),
        (
            "shards",
            FILE_BYTES[0] + FILE_BYTES[1] + FILE_BYTES[3] - 1,
            r"two train shards.*--cache_gb 2\.64e-05 or more",
        ),
    ],
)
def test_preflight_says_what_does_not_fit_and_both_ways_out(
    remote: Bucket, tmp_path: Path, shuffle: Any, cache_bytes: int, refused: str | None
) -> None:
    settings = RunConfig().model_dump()
    settings["artifacts_dir"] = str(tmp_path / "artifacts")
    settings["model"] |= {"context_length": 8, "num_layers": 1, "embd_size": 8, "num_heads": 1}
    settings["train"] |= {"total_batch_size": 64, "mini_batch_size": 8, "shuffle": shuffle, "device": "cpu"}
    data = DataConfig(data_dir=remote.url, cache_dir=str(tmp_path / "cache"), cache_gb=cache_bytes / 1e9)
    config = RunConfig.model_validate(settings | {"data": data.model_dump()})
    if refused is None:
        assert any("18,500 tokens in 4 shards" in line for line in preflight(config, 1))
    else:
        with pytest.raises(ValueError, match=refused):
            preflight(config, 1)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("shuffle", ["shards", "none"])
def test_two_shards_at_a_time_give_the_stream_of_all(
    remote: Bucket, local: Path, tmp_path: Path, world_size: int, shuffle: Any
) -> None:
    """Three epochs through a cache with room for two of the four shards: the same batches, never more on disk."""
    cache = ShardCache(tmp_path / "cache", FILE_BYTES[1] + FILE_BYTES[3], lambda line: None)
    there = Sequences(open_shards(remote.url, "train", cache), 16)
    here = Sequences(open_shards(local, "train"), 16)
    options: dict[str, Any] = {
        "sequences_per_step": 16,
        "mini_batch_size": 8,
        "world_size": world_size,
        "shuffle": shuffle,
        "seed": 1,
        "device": CPU,
    }
    loaders = [[Loader(of, rank=rank, **options) for rank in range(world_size)] for of in (there, here)]
    for _ in range(3 * len(here) // 8 // world_size):
        for mine, other in zip(*loaders, strict=True):
            for got, expected in zip(mine.next_batch(), other.next_batch(), strict=True):
                assert torch.equal(got, expected)
            assert cache.used_bytes() <= cache.max_bytes
    assert len(on_disk(cache)) == 2
    for loader in [*loaders[0], *loaders[1]]:
        loader.close()


@pytest.mark.timeout(60)
def test_a_copy_that_another_process_keeps_is_no_reason_to_wait(remote: Bucket, tmp_path: Path) -> None:
    """Two ranks find it missing; one downloads and keeps it before the other comes to its own download."""
    file = remote_file(remote, shard_name(1), FILE_BYTES[1])
    first, second = (ShardCache(tmp_path / "cache", 10**6) for _ in range(2))
    first.keep([file])
    second.fetch(file)
    assert on_disk(second) == {"edufineweb_train_000001"}


def test_the_next_shard_comes_before_it_is_needed(remote: Bucket, lab: Any, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", sum(FILE_BYTES), lambda line: None)
    sequences = Sequences(open_shards(remote.url, "train", cache), 16)
    loader = Loader(
        sequences, sequences_per_step=8, mini_batch_size=8, rank=0, world_size=1, shuffle="none", seed=1, device=CPU
    )
    for _ in range(10):  # of the 39 batches in the first shard
        loader.next_batch()
    lab.wait_until(lambda: on_disk(cache) == {"edufineweb_train_000001", "edufineweb_train_000002"}, "the second shard")
    loader.close()


def test_data_verify_reads_remote_shards(remote: Bucket, local: Path) -> None:
    assert verify(remote.url, lambda line: None) == []
    content = bytearray((local / shard_name(1)).read_bytes())
    content[200:202] = b"\xff\xff"
    remote.put(shard_name(1), bytes(content))
    (problem,) = verify(remote.url, lambda line: None)
    assert problem.startswith(
        f"{remote.url}/edufineweb_train_000001.npy: 1 ids are 50257 or more, the first at token 36;"
    )


# --- whole runs ------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote_flags(bucket: Bucket, lab: Any, tmp_path: Path) -> Any:
    bucket.put_folder(lab.data_dir)

    def flags(**changes: Any) -> list[str]:
        places = {"data_dir": bucket.url, "cache_dir": tmp_path / "cache"}
        return lab.flags(tmp_path / "runs", **places, **changes)

    return flags


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_a_run_on_remote_shards_is_the_run_on_local_ones(
    lab: Any, remote_flags: Any, tmp_path: Path, nproc: int, request: pytest.FixtureRequest
) -> None:
    done = lab.train([*remote_flags(), "--stop_epoch", "1"], nproc=nproc)
    local = request.getfixturevalue("first_epoch_two_ranks" if nproc == 2 else "first_epoch")
    lab.assert_same_run(tmp_path / "runs" / "tiny", local, lab.steps_per_epoch)
    downloads = [line for line in done.stdout.splitlines() if " MB here in " in line]
    assert len(downloads) == len(set(downloads)) == len(list(lab.data_dir.glob("*.npy")))  # once, by whichever rank


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [pytest.param(1, marks=pytest.mark.soak), 2])
def test_a_run_with_room_for_two_shards_keeps_to_it(bucket: Bucket, lab: Any, tmp_path: Path, nproc: int) -> None:
    """As many steps as take it through four shards; another run reads the same shards from a local folder."""
    folder = tmp_path / "small"
    folder.mkdir()
    tokens = open_shards(lab.data_dir, "train")[0].tokens
    for index in range(5):
        np.save(folder / shard_name(index), tokens[750 * index : 750 * (index + 1)])
    bucket.put_folder(folder)
    changes = {"shuffle": "shards", "num_epochs": 1, "steps_per_epoch": 12, "checkpoint_freq": 0, "eval_freq": 0}
    lab.train(lab.flags(tmp_path / "local", data_dir=folder, **changes), nproc=nproc)
    room = 3 * (128 + 2 * 750)  # the val shard and two more
    cache = ShardCache(tmp_path / "cache", room)
    places = {"data_dir": bucket.url, "cache_dir": tmp_path / "cache", "cache_gb": room / 1e9}
    with lab.started(tmp_path, lab.flags(tmp_path / "runs", **places, **changes), nproc=nproc) as run:

        def ended_within_the_budget() -> bool:
            assert cache.used_bytes() <= room
            return run.process.poll() is not None

        lab.wait_until(ended_within_the_budget, "the end of the run")
        assert run.wait() == 0, run.output
        downloaded = {line.split()[0] for line in run.output.splitlines() if " MB here in " in line}
    assert len(downloaded) == 5, run.output
    losses = [lab.logged(tmp_path / place / "tiny", "loss") for place in ("runs", "local")]
    assert losses[0] == losses[1] and len(losses[0]) == 12


@pytest.mark.slow
def test_a_run_killed_while_it_downloads_is_started_again(
    bucket: Bucket, lab: Any, tmp_path: Path, train_here: Any
) -> None:
    content = io.BytesIO()
    np.save(content, np.zeros(50_000_000, np.uint16))  # large enough to be met on its way
    bucket.put(shard_name(1), content.getvalue())
    bucket.put(shard_name(0), (lab.data_dir / shard_name(0)).read_bytes())
    changes = {"data_dir": bucket.url, "cache_dir": tmp_path / "cache", "num_epochs": 1, "steps_per_epoch": 2}
    flags = [*lab.flags(tmp_path / "runs", **changes), "--resume", "latest"]
    folder = ShardCache(tmp_path / "cache", 10**9).folder
    on_its_way = ".edufineweb_train_000001_npy_*.tmp"
    with lab.started(tmp_path / "runs" / "tiny", flags) as run:
        (left_over,) = run.wait_for(lambda: list(folder.glob(on_its_way)), "the download to begin")
        run.kill_everything()
    assert left_over.exists()
    assert not list(folder.glob("edufineweb_train_*"))
    train_here(flags)
    assert list(lab.logged(tmp_path / "runs" / "tiny", "loss")) == [1, 2]
    (copy,) = folder.glob("edufineweb_train_*")
    assert copy.read_bytes() == content.getvalue()
    assert not list(folder.glob(".*"))


@pytest.mark.slow
def test_evaluation_reads_remote_shards(
    lab: Any, straight: Path, remote_flags: Any, bucket: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.copy_run(straight, tmp_path)
    monkeypatch.chdir(tmp_path)  # the run's own cache_dir is data/cache
    from gpt2core.cli import run

    flags = [
        "--run_name",
        "tiny",
        "--artifacts_dir",
        str(tmp_path),
        "--hellaswag",
        str(lab.examples(2)),
        "--device",
        "cpu",
    ]
    assert run(["evaluate", "--data_dir", bucket.url, *flags]) == 0
    (result,) = (tmp_path / "tiny" / "evaluations").glob("*.json")
    assert f'"val_loss": {lab.logged(straight, "val_loss")[24]}' in result.read_text()
    assert (tmp_path / "data" / "cache" / "shards").is_dir()
