"""Our training step on each GPU of a machine and on all of them, turn by turn: how much of each is left when they share a step.

    torchrun --standalone --nproc_per_node=2 tests/benchmarks/scaling.py [--mini_batch_size 64] [--precision fp8]
    torchrun --standalone --nproc_per_node=2 tests/benchmarks/scaling.py --tiny --device cpu     to see that it runs

Always the same total batch, with all that a run's step has (train_step.py). While one GPU is alone the others wait. A step of all
is compared with rank 0's GPU, with the mean of all, in tokens/s, and with the slowest, which sets its pace. With
--bucket_cap_mb 0 25 100 all together once for each of these, as `gpt2 train` has them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import NamedTuple

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
    parser.add_argument("--bucket_cap_mb", type=int, nargs="+", default=[None], help="instead of what a run would take")
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
            contender(
                f"all {ranks.world_size}{'' if size is None else f', --bucket_cap_mb {size}'}",
                ranks,
                bucket_cap_mb=size,
            )
            for size in arguments.bucket_cap_mb
        ]
        single = contender(f"rank {ranks.rank} alone", alone)
        for _ in range(arguments.rounds):
            for rank in range(ranks.world_size):
                settle(ranks)
                if ranks.rank == rank:
                    single.measure(ranks.device, arguments.steps)
            for one in together:
                settle(ranks)
                one.measure(ranks.device, arguments.steps)
        settle(ranks)
        singles = [Measured(*one) for one in ranks.gather(tuple(Measured.of(single)))]
        # with the memory of the GPU that takes most
        shared = [Measured.of(one)._replace(peak_bytes=max(ranks.gather(one.peak_bytes))) for one in together]
    if ranks.is_main:
        show(singles, shared, ranks, arguments.rounds * arguments.steps, config.train.total_batch_size)
    ranks.leave()


class Measured(NamedTuple):
    name: str
    seconds: float  # a step, in the median
    peak_bytes: int

    @classmethod
    def of(cls, contender: Contender) -> Measured:
        return cls(contender.name, statistics.median(contender.seconds), contender.peak_bytes)


def show(singles: list[Measured], together: list[Measured], ranks: Ranks, steps: int, tokens: int) -> None:
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ranks.device.type
    print(f"\n{device}, torch {torch.__version__}, {dist.get_backend()}; median of {steps} steps of {tokens:,} tokens")
    print(f"{'tokens/s':>10}{'ms':>9}{'times rank 0':>14}{'the mean':>10}{'the slowest':>13}{'peak GiB':>10}")
    times = [one.seconds for one in singles]
    first, mean, slowest = times[0], statistics.harmonic_mean(times), max(times)
    for name, seconds, peak_bytes in (*singles, *together):
        ratios = f"{first / seconds:>14.3f}{mean / seconds:>10.3f}{slowest / seconds:>13.3f}"
        print(f"{tokens / seconds:>10,.0f}{1000 * seconds:>9.1f}{ratios}{peak_bytes / 2**30:>10.2f}  {name}")


if __name__ == "__main__":
    main_guard(main)
