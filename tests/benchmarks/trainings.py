"""Whole runs of `gpt2 train` that benchmarks compare: a folder each, trained once, gone on with when the time was up."""

from __future__ import annotations

import argparse
import math
import os
import queue
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt2core.run_folder import RunFolder

# evaluations are what is compared, so nothing else interrupts the steps
FIXED = "--hellaswag_freq 0 --sample_freq 0 --histogram_freq 0 --log_freq 1 --keep_checkpoints 1 --no-keep_best --no-use_tensorboard"


def precision_flags(wanted: str) -> dict[str, str]:
    """Of a --precision with, behind colons, its --fp8_recipe and its --fp8_gradients: `fp8:delayed:e4m3`."""
    return dict(zip(("precision", "fp8_recipe", "fp8_gradients"), wanted.split(":", 2), strict=False))


@dataclass(frozen=True)
class Way:
    name: str  # of its runs
    label: str
    flags: dict[str, Any]  # in which it differs from the others
    stop: int | None = None  # the step to stop at, with the same schedule, before the others do


class Curve:
    """A run as its metrics.jsonl has it."""

    def __init__(self, folder: Path, way: Way, seed: int) -> None:
        self.way, self.seed = way, seed
        self.run = RunFolder(folder, f"{way.name}_seed{seed}")

    def logged(self, name: str) -> dict[int, float]:
        return {line["step"]: line[name] for line in self.run.metrics() if name in line}

    @property
    def val_losses(self) -> dict[int, float]:
        return self.logged("val_loss")

    def seconds(self, step: int) -> float:
        """Of training steps up to this one, without evaluations and saves."""
        return sum(ms for at, ms in self.logged("step_ms").items() if at <= step) / 1000


class Trainings:
    """Trains the runs, as far as the time goes. `train_flags` are those of all of them."""

    def __init__(self, arguments: argparse.Namespace, train_flags: list[str]) -> None:
        self.folder, self.steps, self.train_flags = arguments.folder, arguments.steps, train_flags
        self.steps_per_epoch = arguments.steps
        self.deadline = time.monotonic() + arguments.seconds if arguments.seconds else None
        self.at_once = arguments.at_once
        self.free_gpus: queue.SimpleQueue[str] = queue.SimpleQueue()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        for gpu in range(self.at_once):
            self.free_gpus.put(visible[gpu] if gpu < len(visible) and visible[gpu] else str(gpu))
        self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def add_arguments(parser: argparse.ArgumentParser, folder: str, steps: int) -> None:
        parser.add_argument("--folder", type=Path, default=Path(folder))
        parser.add_argument("--steps", type=int, default=steps)
        parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
        parser.add_argument("--at_once", type=int, default=1, help="runs at a time, each on a GPU of its own")
        parser.add_argument(
            "--seconds", type=float, help="time after which the run under way is saved and the rest is left"
        )

    def train_all(self, curves: Iterable[Curve]) -> bool:
        """Whether all runs are at their end."""
        curves = list(curves)
        # a run can stop at the end of an epoch
        self.steps_per_epoch = math.gcd(self.steps, *(curve.way.stop or 0 for curve in curves))
        with ThreadPoolExecutor(self.at_once) as pool:
            ended = list(pool.map(self.train, curves))
        if not all(ended):
            print("the time is up; the same command goes on")
        return all(ended)

    def train(self, curve: Curve) -> bool:
        """Whether the run is at its end, after some training where it was not; False when the time is up before."""
        stop = curve.way.stop or self.steps
        if stop in curve.val_losses:
            return True
        if self.deadline and time.monotonic() >= self.deadline:
            return False
        command = [sys.executable, "-m", "gpt2core.cli", "train", *FIXED.split(), *self.train_flags]
        command += [f"--{name}={value}" for name, value in curve.way.flags.items()]
        epochs = self.steps // self.steps_per_epoch
        command += [f"--num_epochs={epochs}", f"--steps_per_epoch={self.steps_per_epoch}"]
        command += [f"--stop_epoch={stop // self.steps_per_epoch}", f"--seed={curve.seed}", "--resume=latest"]
        command += [f"--artifacts_dir={self.folder}", f"--run_name={curve.run.path.name}"]
        print(f"{curve.way.label}, seed {curve.seed}", flush=True)
        gpu = self.free_gpus.get()
        own_gpu = {"CUDA_VISIBLE_DEVICES": gpu} if self.at_once > 1 else {}
        with (self.folder / f"{curve.run.path.name}.txt").open("a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | own_gpu)
            try:
                code = process.wait(self.deadline and max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()  # it saves
                code = process.wait()
            finally:
                self.free_gpus.put(gpu)
        if stop in curve.val_losses:
            shutil.rmtree(curve.run.checkpoints)
            return True
        if self.deadline and time.monotonic() >= self.deadline:
            return False
        raise ValueError(f"{' '.join(command)} ended with {code} before step {stop}: look at {output.name}")
