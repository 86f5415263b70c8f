"""Tokens/s of `gpt2 prepare` beside the method of build-nanogpt's fineweb.py and tiktoken alone, in one run.

python tests/benchmarks/tokenization.py corpus/*.parquet [--cores 2] [--repeat 1]

Each takes the same parquet files on the same number of processes. Ours counts everything from process start to the
manifest; the reference's time leaves out the start of its pool and the conversion of the files by `datasets`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from pyarrow import parquet

from gpt2core.shards import open_shards
from gpt2core.tokenizer import EOT, encoding

SHARD_SIZE = 10_000_000


def reference_tokens(document: dict[str, Any]) -> np.ndarray:
    tokens = np.array([EOT, *encoding().encode_ordinary(document["text"])])
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def reference(files: list[str], cores: int) -> tuple[float, np.ndarray]:
    """Documents to a pool, sixteen at a time, tokens back as arrays: seconds, and the tokens of all shards."""
    import datasets

    rows = datasets.load_dataset("parquet", data_files=files, split="train")
    stream, filled = np.empty(SHARD_SIZE, np.uint16), 0
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(cores) as pool:
        pool.map(reference_tokens, [{"text": "warm"}] * cores * 4)
        started, shards = time.perf_counter(), 0
        for tokens in pool.imap(reference_tokens, rows, chunksize=16):
            while tokens.size:
                taken = min(tokens.size, SHARD_SIZE - filled)
                stream[filled : filled + taken] = tokens[:taken]
                filled, tokens = filled + taken, tokens[taken:]
                if filled == SHARD_SIZE:
                    np.save(Path(folder) / f"{shards:06d}", stream)
                    shards, filled = shards + 1, 0
        np.save(Path(folder) / f"{shards:06d}", stream[:filled])
        seconds = time.perf_counter() - started
        return seconds, np.concatenate([np.load(path) for path in sorted(Path(folder).iterdir())])


def bare(files: list[str], number: int, barrier: Any, rates: Any) -> None:
    """tiktoken's own rate on texts that lie in memory, while the other processes do the same."""
    texts = parquet.read_table(files[number % len(files)], columns=["text"]).column(0).to_pylist()
    encode = encoding().encode_ordinary
    encode("warm")
    barrier.wait()
    started = time.perf_counter()
    tokens = sum(len(encode(text)) for text in texts)
    rates.put(tokens / (time.perf_counter() - started))


def bare_rate(files: list[str], cores: int) -> float:
    context = multiprocessing.get_context("spawn")
    barrier, rates = context.Barrier(cores), context.Queue()
    processes = [context.Process(target=bare, args=(files, number, barrier, rates)) for number in range(cores)]
    for process in processes:
        process.start()
    found = [rates.get() for _ in processes]
    for process in processes:
        process.join()
    return sum(found)


def ours(source: str, cores: int, encoder: str) -> tuple[float, np.ndarray]:
    with tempfile.TemporaryDirectory() as folder:
        options = [f"--source={source}", f"--data_dir={folder}", f"--shard_size={SHARD_SIZE}"]
        command = [sys.executable, "-m", "gpt2core.prepare", *options, f"--num_workers={cores}", f"--encoder={encoder}"]
        started = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        shards = [*open_shards(folder, "val"), *open_shards(folder, "train")]
        return seconds, np.concatenate([shard.tokens for shard in shards])


def lines(files: list[str], source: str, cores: int) -> Iterator[str]:
    alone, together = bare_rate(files, 1), bare_rate(files, cores)
    yield f"tiktoken alone, 1 process: {alone:,.0f} tokens/s; {cores} processes at once: {together:,.0f} tokens/s"
    reference_s, wanted = reference(files, cores)
    yield f"reference: {reference_s:.1f} s, {wanted.size / reference_s:,.0f} tokens/s"
    for encoder in ("tiktoken", "riptoken"):
        seconds, tokens = ours(source, cores, encoder)
        rate = tokens.size / seconds
        yield (
            f"gpt2 prepare, {encoder}: {seconds:.1f} s, {rate:,.0f} tokens/s, {reference_s / seconds:.2f} x the reference, "
            f"{rate / together:.2f} of tiktoken alone; same tokens: {np.array_equal(tokens, wanted)}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, help="parquet files with a text column")
    parser.add_argument("--cores", type=int, default=os.cpu_count())
    parser.add_argument("--repeat", type=int, default=1, help="take each file so many times")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number, path in enumerate(arguments.files * arguments.repeat):
            (Path(folder) / f"{number:04d}.parquet").symlink_to(path.resolve())
        files = [str(path) for path in sorted(Path(folder).iterdir())]
        for line in lines(files, f"{folder}/*.parquet", arguments.cores):
            print(line, flush=True)


if __name__ == "__main__":
    main()
