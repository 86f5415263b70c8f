"""Muon beside AdamW at equal data, batch and architecture: the steps and seconds that Muon needs to AdamW's final loss.

    python tests/benchmarks/optimizers.py --steps 600 --data_dir DIR [--seconds 540] [any flags of `gpt2 train`]

Each learning rate is first trained to the end with the first seed; the best of each optimizer then with the other seeds,
too. Runs are whole ones of `gpt2 train`, a folder each under --folder. What is done stays: with --seconds the run under
way is saved when the time is up, exit code 75 says that there is more to do, and the same command goes on. At the end
--folder holds optimizers.md (the tables) and optimizers.png (the curves).
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from gpt2core.flags import TRY_AGAIN, main_guard
from gpt2core.run_folder import RunFolder

OPTIMIZERS = ("adamw", "muon")
# evaluations are what is compared, so nothing else interrupts the steps
FIXED = "--num_epochs 1 --hellaswag_freq 0 --sample_freq 0 --histogram_freq 0 --log_freq 1 --keep_checkpoints 1 --no-use_tensorboard"


@dataclass(frozen=True)
class Contender:
    name: str  # of its runs
    label: str
    optimizer: str
    flags: dict[str, Any]  # of the learning rates; the last one follows from max_lr


def adamw(lr: float) -> Contender:
    return Contender(f"adamw_{lr:g}", f"AdamW {lr:g}", "adamw", {"max_lr": lr})


def muon(lr: float, max_lr: float, qkv: str) -> Contender:
    label = f"Muon {lr:g} (AdamW {max_lr:g}, qkv {qkv})"
    flags = {"max_lr": max_lr, "muon_lr": lr, "muon_qkv": qkv}
    return Contender(f"muon_{lr:g}_{max_lr:g}_{qkv}", label, "muon", flags)


class Curve:
    """A run as its metrics.jsonl has it."""

    def __init__(self, folder: Path, contender: Contender, seed: int) -> None:
        self.contender, self.seed = contender, seed
        self.run = RunFolder(folder, f"{contender.name}_seed{seed}")

    @property
    def val_losses(self) -> dict[int, float]:
        return {line["step"]: line["val_loss"] for line in self.run.metrics() if "val_loss" in line}

    def final(self, steps: int) -> float:
        return self.val_losses[steps]

    def seconds(self, step: int) -> float:
        """Of training steps up to this one, without evaluations and saves."""
        return sum(line["step_ms"] for line in self.run.metrics() if "step_ms" in line and line["step"] <= step) / 1000

    def first_step_at(self, loss: float) -> int | None:
        """Of the first evaluation that is no higher."""
        return next((step for step, value in self.val_losses.items() if value <= loss), None)


class Contest:
    def __init__(self, arguments: argparse.Namespace, train_flags: list[str]) -> None:
        self.arguments, self.train_flags = arguments, train_flags
        self.deadline = time.monotonic() + arguments.seconds if arguments.seconds else None
        contenders = [adamw(lr) for lr in arguments.adamw_lrs]
        contenders += [muon(*one) for one in product(arguments.muon_lrs, arguments.muon_max_lrs, arguments.muon_qkv)]
        self.tuned = [Curve(arguments.folder, contender, arguments.seeds[0]) for contender in contenders]

    def best(self, optimizer: str) -> Contender:
        """Of lowest final loss with the first seed."""
        own = [curve for curve in self.tuned if curve.contender.optimizer == optimizer]
        return min(own, key=lambda curve: curve.final(self.arguments.steps)).contender

    def pairs(self) -> list[tuple[Curve, Curve]]:
        """The best AdamW's and the best Muon's run of each seed."""
        best = [self.best(optimizer) for optimizer in OPTIMIZERS]
        curves = ([Curve(self.arguments.folder, one, seed) for seed in self.arguments.seeds] for one in best)
        return list(zip(*curves, strict=True))

    def run(self) -> bool:
        """Trains what is not trained yet; False when the time is up before the end."""
        return all(map(self.train, self.tuned)) and all(self.train(curve) for pair in self.pairs() for curve in pair)

    def train(self, curve: Curve) -> bool:
        steps = self.arguments.steps
        if steps in curve.val_losses:
            return True
        command = [sys.executable, "-m", "gpt2core.cli", "train", *FIXED.split(), *self.train_flags]
        min_lr = self.arguments.min_lr_ratio * curve.contender.flags["max_lr"]
        flags = curve.contender.flags | {"optimizer": curve.contender.optimizer, "min_lr": min_lr}
        command += [f"--{name}={value}" for name, value in flags.items()]
        command += [f"--steps_per_epoch={steps}", f"--seed={curve.seed}", "--resume=latest"]
        command += [f"--artifacts_dir={self.arguments.folder}", f"--run_name={curve.run.path.name}"]
        print(f"{curve.contender.label}, seed {curve.seed}", flush=True)
        with (self.arguments.folder / f"{curve.run.path.name}.txt").open("a") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
            try:
                code = process.wait(self.deadline and max(0.0, self.deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.terminate()  # it saves
                code = process.wait()
        if steps in curve.val_losses:
            shutil.rmtree(curve.run.checkpoints)
            return True
        if self.deadline and time.monotonic() >= self.deadline:
            return False
        raise ValueError(f"{' '.join(command)} ended with {code} before step {steps}: look at {output.name}")

    def tables(self) -> str:
        steps, pairs = self.arguments.steps, self.pairs()
        lines = ["| optimizer | seed | final validation loss |", "|---|---|---|"]
        further = [curve for pair in pairs[1:] for curve in pair]
        for curve in [*self.tuned, *further]:
            lines.append(f"| {curve.contender.label} | {curve.seed} | {curve.final(steps):.4f} |")
        columns = ["seed", "AdamW's final loss", "Muon's", "steps, AdamW", "Muon to AdamW's loss", "share"]
        columns += ["seconds, AdamW", "Muon to AdamW's loss", "share"]
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for base, other in pairs:
            losses = f"{base.final(steps):.4f} | {other.final(steps):.4f}"
            lines.append(f"| {base.seed} | {losses} | {steps} | {self.to_loss(base, other)} |")
        return "\n".join(lines) + "\n"

    def to_loss(self, base: Curve, other: Curve) -> str:
        steps = self.arguments.steps
        step, all_seconds = other.first_step_at(base.final(steps)), base.seconds(steps)
        if step is None:
            return f"not reached | | {all_seconds:.0f} | | "
        seconds = other.seconds(step)
        return f"{step} | {step / steps:.2f} | {all_seconds:.0f} | {seconds:.0f} | {seconds / all_seconds:.2f}"

    def draw(self, path: Path) -> None:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
        best = {optimizer: self.best(optimizer) for optimizer in OPTIMIZERS}
        others = [curve for curve in self.tuned if curve.contender not in best.values()]
        for curve in [*others, *(curve for pair in self.pairs() for curve in pair)]:
            is_best = curve.contender in best.values()
            first = curve.seed == self.arguments.seeds[0]
            points = {step: loss for step, loss in curve.val_losses.items() if step}
            axes.plot(
                list(points),
                list(points.values()),
                color="tab:blue" if curve.contender.optimizer == "adamw" else "tab:orange",
                linestyle="-" if first else "--",
                linewidth=1.6 if is_best else 0.6,
                alpha=1.0 if is_best else 0.5,
                label=f"{curve.contender.label}, seed {curve.seed}" if is_best else None,
            )
        axes.set(xlabel="step", ylabel="validation loss (nats a token)", title="thin: other learning rates")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("artifacts/optimizers"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--adamw_lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--muon_lrs", type=float, nargs="+", default=[0.02])
    parser.add_argument("--muon_qkv", nargs="+", choices=["whole", "split"], default=["whole"])
    parser.add_argument("--muon_max_lrs", type=float, nargs="+", default=[1e-3], help="of AdamW beside Muon")
    parser.add_argument("--min_lr_ratio", type=float, default=0.1, help="last learning rate, as a share of the highest")
    parser.add_argument(
        "--seconds", type=float, help="time after which the run under way is saved and the rest is left"
    )
    arguments, train_flags = parser.parse_known_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    contest = Contest(arguments, train_flags)
    if not contest.run():
        print("the time is up; the same command goes on")
        return TRY_AGAIN
    tables = contest.tables()
    (arguments.folder / "optimizers.md").write_text(tables)
    contest.draw(arguments.folder / "optimizers.png")
    print(tables)
    return 0


if __name__ == "__main__":
    main_guard(main)
