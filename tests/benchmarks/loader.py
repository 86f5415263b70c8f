"""Start-up and memory of the loader on 10B tokens, and its rate beside the method of build-nanogpt's loader.

    python tests/benchmarks/loader.py [--device cpu|cuda]

That method: a whole shard is read by np.load, turned into int32, then into a torch.long tensor, and batches are
contiguous slices of it, one after the other, copied to the device by the training loop itself. It is written anew here.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gpt2core.config import ModelConfig
from gpt2core.loader import Loader, Sequences
from gpt2core.model import GPT
from gpt2core.shards import open_shards, shard_name

CONTEXT_LENGTH, MINI_BATCH_SIZE = 1024, 32
TOKENS_PER_SEC = 517_000  # of training on one H200 (docs/results.md)


class WholeShards:
    """build-nanogpt's method."""

    def __init__(self, paths: list[Path], device: torch.device) -> None:
        self.paths, self.device = paths, device
        self.shard, self.position = 0, 0
        self.tokens = self.load(0)

    def load(self, shard: int) -> Tensor:
        return torch.tensor(np.load(self.paths[shard]).astype(np.int32), dtype=torch.long)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        size = MINI_BATCH_SIZE * CONTEXT_LENGTH
        piece = self.tokens[self.position : self.position + size + 1]
        inputs, targets = piece[:-1].view(MINI_BATCH_SIZE, -1), piece[1:].view(MINI_BATCH_SIZE, -1)
        self.position += size
        if self.position + size + 1 > len(self.tokens):
            self.shard, self.position = (self.shard + 1) % len(self.paths), 0
            self.tokens = self.load(self.shard)
        return inputs.to(self.device), targets.to(self.device)


def make_loader(folder: Path, device: torch.device) -> Loader:
    return Loader(
        Sequences(open_shards(folder, "train"), CONTEXT_LENGTH),
        sequences_per_step=512,
        mini_batch_size=MINI_BATCH_SIZE,
        rank=0,
        world_size=1,
        shuffle="sequences",
        seed=1337,
        device=device,
    )


def private_bytes() -> int:
    """Memory of this process but for the pages of mapped files, which the kernel takes back when it likes."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) * 1024


def start_up(folder: Path, device: torch.device) -> None:
    """100 sparse shards of 100M tokens each: opened, shuffled, and the first batch taken."""
    for index in range(1, 101):
        with (folder / shard_name(index)).open("wb") as file:
            np.lib.format.write_array_header_1_0(
                file, {"descr": "<u2", "fortran_order": False, "shape": (100_000_000,)}
            )
            file.truncate(file.tell() + 200_000_000)
    torch.ones(1, device=device)
    before, started = private_bytes(), time.perf_counter()
    loader = make_loader(folder, device)
    opened = time.perf_counter()
    loader.next_batch()
    first = time.perf_counter()
    orders = [loader._order(epoch).nbytes for epoch in (0, 1)]  # the next epoch's is made ahead
    print(f"10B tokens, {len(loader.sequences):,} sequences of {CONTEXT_LENGTH} in 100 shards:")
    print(f"  opened after {opened - started:.2f} s, first batch after {first - started:.2f} s (target: under 5 s)")
    print(f"  permutations of this and the next epoch {sum(orders) / 1e6:.0f} MB (target: under 200 MB)")
    print(f"  memory of the process grew by {(private_bytes() - before) / 1e6:.0f} MB")
    loader.close()


def rates(folder: Path, device: torch.device) -> None:
    rng = np.random.default_rng(0)
    paths = [folder / shard_name(index) for index in (1, 2, 3)]
    for path in paths:
        np.save(path, rng.integers(0, 50257, 100_000_000).astype(np.uint16))
    for path in paths:
        path.read_bytes()  # into the page cache, for both
    batches = 3 * 100_000_000 // (MINI_BATCH_SIZE * CONTEXT_LENGTH)
    theirs = measure("whole shards", WholeShards(paths, device).next_batch, batches, device)
    before = private_bytes()
    loader = make_loader(folder, device)
    ours = measure("ours", loader.next_batch, batches, device)
    print(f"  ratio of batches/s {ours / theirs:.2f}, private memory of ours {(private_bytes() - before) / 1e6:.0f} MB")
    at_training_speed("ours", loader.next_batch, device)
    loader.close()
    reference = WholeShards(paths, device)
    reference.position = 99_000_000  # a shard ends after some 30 batches
    at_training_speed("whole shards", reference.next_batch, device)
    if device.type == "cuda":
        training(folder)


def measure(name: str, next_batch: Callable[[], tuple[Tensor, Tensor]], batches: int, device: torch.device) -> float:
    """Batches a second taken as fast as they come, over an epoch."""
    next_batch()
    waits = []
    started = time.perf_counter()
    for _ in range(batches):
        asked = time.perf_counter()
        next_batch()
        waits.append(time.perf_counter() - asked)
    if device.type == "cuda":
        torch.cuda.synchronize()
    rate = batches / (time.perf_counter() - started)
    tokens = rate * MINI_BATCH_SIZE * CONTEXT_LENGTH
    print(f"{name}: {rate:,.0f} batches/s ({tokens / 1e6:,.0f}M tokens/s), longest wait {1000 * max(waits):,.1f} ms")
    return rate


def at_training_speed(name: str, next_batch: Callable[[], tuple[Tensor, Tensor]], device: torch.device) -> None:
    """What a training loop waits for data that takes as long for a batch as an H200 does."""
    compute_s = MINI_BATCH_SIZE * CONTEXT_LENGTH / TOKENS_PER_SEC
    next_batch()
    waits = []
    for _ in range(100):
        time.sleep(compute_s)
        asked = time.perf_counter()
        next_batch()
        waits.append(time.perf_counter() - asked)
    share = float(np.median(waits)) / (compute_s + float(np.median(waits)))
    print(
        f"  {name}, {1000 * compute_s:.0f} ms of compute a batch: in next_batch {1000 * np.median(waits):.2f} ms "
        f"({100 * share:.2f}%) in the median, longest {1000 * max(waits):,.1f} ms"
    )


def training(folder: Path) -> None:
    """GPT-2 124M, compiled, in bf16: micro-steps on the loader's batches beside micro-steps on one batch over and over."""
    model = GPT(ModelConfig(), torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    compiled = torch.compile(model.to("cuda"), dynamic=False)
    loader = make_loader(folder, torch.device("cuda"))
    batch = loader.next_batch()

    def micro_steps_s(next_batch: Callable[[], tuple[Tensor, Tensor]], count: int = 100) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            compiled(*next_batch()).backward()
            model.zero_grad()
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / count

    micro_steps_s(lambda: batch, 10)
    without, with_loader = zip(
        *[(micro_steps_s(lambda: batch), micro_steps_s(loader.next_batch)) for _ in range(5)], strict=True
    )
    share = np.median(with_loader) / np.median(without) - 1
    print(
        f"training, a micro-step of {MINI_BATCH_SIZE} x {CONTEXT_LENGTH} tokens: {1000 * np.median(with_loader):.2f} ms with "
        f"the loader, {1000 * np.median(without):.2f} ms on one batch ({100 * share:+.2f}%; target: under 0.5%)"
    )
    loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = torch.device(parser.parse_args().device)
    for part in (start_up, rates):
        with tempfile.TemporaryDirectory() as folder:
            part(Path(folder), device)


if __name__ == "__main__":
    main()
