"""Our training step on one GPU and on all of a machine, turn by turn: how much of each GPU is left when they share a step.

    torchrun --standalone --nproc_per_node=2 tests/benchmarks/scaling.py [--mini_batch_size 64] [--precision fp8]
    torchrun --standalone --nproc_per_node=2 tests/benchmarks/scaling.py --tiny --device cpu     to see that it runs

The same total batch in both, with all that a run's step has (train_step.py). While rank 0 is alone the others wait. With
--bucket_cap_mb 25 100 1000 together once for each of these sizes of DDP's buckets.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from train_step import Contender, built, configuration, ours

from gpt2core.distributed import Ranks
from gpt2core.flags import main_guard


def settle(ranks: Ranks) -> None:
    """Until all ranks are here and their GPUs have done what they were given."""
    if ranks.device.type == "cuda":
        torch.cuda.synchronize(ranks.device)
    ranks.any(True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mini_batch_size", type=int, default=64)
    parser.add_argument("--precision", help="instead of bf16, its recipe behind a colon")
    parser.add_argument("--bucket_cap_mb", type=int, nargs="+", default=[None], help="instead of DDP's own buckets")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8, help="measured a round")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and batch, to see that it runs")
    arguments = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        raise ValueError(
            "one process has nothing to be compared with: start it with torchrun --nproc_per_node=2 or more"
        )
    torch.set_float32_matmul_precision("high")
    ranks = Ranks.join(arguments.device)
    alone = Ranks(0, 1, ranks.device)
    with tempfile.TemporaryDirectory() as folder:  # each rank has its own copy of the shards
        config = configuration(Path(folder), ranks.device, arguments.tiny, arguments.mini_batch_size)

        def contender(name: str, ranks: Ranks, **changed: int | None) -> Contender:
            train = config.train.model_copy(update=changed)
            own = config.model_copy(update={"run_name": name, "train": train})
            made = built(partial(ours, own, ranks, arguments.precision), ranks.device)
            made.name = name
            return made

        together = [
            contender(f"buckets of {size} MiB" if size else "together", ranks, bucket_cap_mb=size)
            for size in arguments.bucket_cap_mb
        ]
        single = contender("alone", alone) if ranks.is_main else None
        for _ in range(arguments.rounds):
            settle(ranks)
            if single:
                single.measure(ranks.device, arguments.steps)
            for one in together:
                settle(ranks)
                one.measure(ranks.device, arguments.steps)
        settle(ranks)
        for one in together:
            one.peak_bytes = max(ranks.gather(one.peak_bytes))
    if single:
        show(single, together, ranks, config.train.total_batch_size)
    ranks.leave()


def show(single: Contender, together: list[Contender], ranks: Ranks, tokens: int) -> None:
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type
    print(
        f"\n{name}, torch {torch.__version__}, {dist.get_backend()}; median of {len(single.seconds)} steps of {tokens:,} tokens"
    )
    print(f"{'ranks':>5}{'tokens/s':>12}{'ms':>9}{'times one':>11}{'peak GiB':>10}")
    one_s = statistics.median(single.seconds)
    for count, contender in ((1, single), *((ranks.world_size, one) for one in together)):
        seconds = statistics.median(contender.seconds)
        peak_gib = contender.peak_bytes / 2**30  # of the GPU that takes most
        print(
            f"{count:>5}{tokens / seconds:>12,.0f}{1000 * seconds:>9.1f}{one_s / seconds:>11.3f}{peak_gib:>10.2f}"
            f"  {contender.name}"
        )


if __name__ == "__main__":
    main_guard(main)
