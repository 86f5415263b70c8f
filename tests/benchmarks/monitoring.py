"""What a run costs around its steps: the wait for data, logs, TensorBoard, samples, histograms, the copy for a checkpoint.

    python tests/benchmarks/monitoring.py [--mini_batch_size 64]            GPT-2 124M at the default frequencies
    python tests/benchmarks/monitoring.py --tiny --device cpu               seconds, to see that it runs

One trainer makes both kinds of steps, some of each in turn, so that heat and neighbours meet both. `without` logs nothing,
and reads nothing off the device until all are done. What is due every so many steps (a sample, the histograms) is timed apart, and counts with its
share of a step; of a checkpoint, the time that training waits for it, at the default frequency. Validation and HellaSwag are
not measured here.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from gpt2core.board import Board
from gpt2core.checkpoint import Saver
from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from gpt2core.distributed import Ranks, pick_device
from gpt2core.generate import samples
from gpt2core.metrics import MetricsLog
from gpt2core.run_folder import RunFolder
from gpt2core.shards import shard_name
from gpt2core.trainer import Trainer

TINY = ModelConfig(context_length=32, num_layers=2, embd_size=64, num_heads=2)


class Watched:
    """A trainer, and what watches it."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.trainer = Trainer(config, Ranks(0, 1, device))
        folder = RunFolder.of(config)
        self.log = MetricsLog(folder, resume_at=0, board=Board(folder.tensorboard, config, 0))
        self.log.say = lambda message: _print_to_nowhere(self.log.note(message))  # type: ignore[method-assign,assignment]
        self.saver = Saver(CheckpointFolder(folder.checkpoints), 1, self.log.note)

    def without(self) -> None:
        self.trainer.train_step()
        self.trainer.step += 1

    def watched(self) -> None:
        result = self.trainer.train_step()
        self.trainer.step += 1
        self.trainer.step_log.add(self.trainer.step, result, self.log)

    def sample(self) -> None:
        self.log.samples(self.trainer.step, samples(self.trainer.raw_model))

    def histograms(self) -> None:
        self.log.histograms(self.trainer.step, self.trainer.raw_model)

    def save(self) -> None:
        self.trainer.save(self.saver)

    def seconds_to_save(self) -> float:
        """Until the next step may begin, where the file before is written: this one is written behind that step."""
        self.saver.finish()
        return self.seconds(self.save)

    def seconds(self, do: Callable[[], None], times: int = 1) -> float:
        """Of one, on average, all that the device has to do for it included."""
        self.trainer.now()
        started = time.perf_counter()
        for _ in range(times):
            do()
        self.trainer.step_log.catch_up(self.log)
        return (self.trainer.now() - started) / times


def _print_to_nowhere(line: str) -> None:
    with Path(os.devnull).open("w") as nowhere:
        print(line, file=nowhere, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mini_batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10, help="of each kind in a round")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and batch, to see that it runs")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    torch.set_float32_matmul_precision("high")
    model = TINY if arguments.tiny else ModelConfig()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            tokens = np.random.default_rng(number).integers(
                0, 50257, 20_000 if arguments.tiny else 20_000_000, np.uint16
            )
            np.save(Path(folder) / shard_name(number), tokens)
        config = RunConfig(
            run_name="benchmark",
            artifacts_dir=folder,
            model=model,
            data=DataConfig(data_dir=folder),
            train=TrainConfig(
                total_batch_size=8 * model.context_length if arguments.tiny else 524_288,
                mini_batch_size=4 if arguments.tiny else arguments.mini_batch_size,
                hellaswag_freq=0,
            ),
            evaluation=EvalConfig(val_tokens=model.context_length),
        )
        run = Watched(config, device)
        measure(run, arguments.rounds, arguments.steps)
        run.saver.finish()
        run.log.close()


def measure(run: Watched, rounds: int, steps: int) -> None:
    kinds = {"without": run.without, "watched": run.watched}
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    run.seconds(run.watched)  # which compiles and makes the moments
    waited_s = run.trainer.loader.wait_s
    for turn in range(rounds):
        for name in sorted(kinds, reverse=turn % 2 == 0):
            seconds[name].append(run.seconds(kinds[name], steps))
    data_wait = (run.trainer.loader.wait_s - waited_s) / (len(kinds) * rounds * steps)
    sample = statistics.median(run.seconds(run.sample) for _ in range(3))
    histograms = statistics.median(run.seconds(run.histograms) for _ in range(3))
    run.save()  # which makes the buffers
    save = statistics.median(run.seconds_to_save() for _ in range(3))
    train = run.trainer.config.train
    step = {name: statistics.median(values) for name, values in seconds.items()}
    shares = {
        f"each step: logs and scalars, median of {rounds} rounds of {steps} steps": step["watched"] - step["without"],
        f"each step: {1000 * data_wait:.3f} ms in which the host waits for data": data_wait,
        f"{1000 * sample:.0f} ms of samples every {train.sample_freq} steps": sample / train.sample_freq,
        f"{1000 * histograms:.0f} ms of histograms every {train.histogram_freq} steps": histograms
        / train.histogram_freq,
        f"{1000 * save:.0f} ms for a checkpoint every {train.checkpoint_freq} steps": save / train.checkpoint_freq,
    }
    device = run.trainer.ranks.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}; a step of {train.total_batch_size:,} tokens")
    print(f"without {1000 * step['without']:.3f} ms, watched {1000 * step['watched']:.3f} ms")
    for what, cost in shares.items():
        print(f"{cost / step['without']:>9.3%}  {what}")
    print(f"{sum(shares.values()) / step['without']:>9.3%}  together")


if __name__ == "__main__":
    main()
