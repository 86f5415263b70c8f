"""Muon beside AdamW at equal data, batch and architecture: the steps and seconds that Muon needs to AdamW's final loss.

    python tests/benchmarks/optimizers.py --steps 600 --data_dir DIR [--seconds 540] [--at_once 8] [any flags of `gpt2 train`]

Each learning rate is first trained to the end with the first seed; the best of each optimizer then with the other seeds,
too. Runs are whole ones of `gpt2 train`, a folder each under --folder. What is done stays: with --seconds the run under
way is saved when the time is up, exit code 75 says that there is more to do, and the same command goes on. At the end
--folder holds optimizers.md (the tables) and optimizers.png (the curves).
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path

from trainings import Curve, Trainings, Way

from gpt2core.flags import TRY_AGAIN, main_guard

OPTIMIZERS = ("adamw", "muon")


def adamw(lr: float, min_lr_ratio: float) -> Way:
    flags = {"optimizer": "adamw", "max_lr": lr, "min_lr": min_lr_ratio * lr}
    return Way(f"adamw_{lr:g}", f"AdamW {lr:g}", flags)


def muon(lr: float, max_lr: float, qkv: str, min_lr_ratio: float) -> Way:
    label = f"Muon {lr:g} (AdamW {max_lr:g}, qkv {qkv})"
    flags = {"optimizer": "muon", "max_lr": max_lr, "muon_lr": lr, "muon_qkv": qkv, "min_lr": min_lr_ratio * max_lr}
    return Way(f"muon_{lr:g}_{max_lr:g}_{qkv}", label, flags)


def first_step_at(curve: Curve, loss: float) -> int | None:
    """Of the first evaluation that is no higher."""
    return next((step for step, value in curve.val_losses.items() if value <= loss), None)


class Contest:
    def __init__(self, arguments: argparse.Namespace, train_flags: list[str]) -> None:
        self.arguments, self.trainings = arguments, Trainings(arguments, train_flags)
        rates = product(arguments.muon_lrs, arguments.muon_max_lrs, arguments.muon_qkv)
        ways = [adamw(lr, arguments.min_lr_ratio) for lr in arguments.adamw_lrs]
        ways += [muon(*one, arguments.min_lr_ratio) for one in rates]
        self.tuned = [Curve(arguments.folder, way, arguments.seeds[0]) for way in ways]

    def best(self, optimizer: str) -> Way:
        """Of lowest final loss with the first seed."""
        own = [curve for curve in self.tuned if curve.way.flags["optimizer"] == optimizer]
        return min(own, key=lambda curve: self.final(curve)).way

    def pairs(self) -> list[tuple[Curve, Curve]]:
        """The best AdamW's and the best Muon's run of each seed."""
        best = [self.best(optimizer) for optimizer in OPTIMIZERS]
        curves = ([Curve(self.arguments.folder, one, seed) for seed in self.arguments.seeds] for one in best)
        return list(zip(*curves, strict=True))

    def run(self) -> bool:
        """Trains what is not trained yet; False when the time is up before the end."""
        train_all = self.trainings.train_all
        return train_all(self.tuned) and train_all(curve for pair in self.pairs() for curve in pair)

    def final(self, curve: Curve) -> float:
        return curve.val_losses[self.arguments.steps]

    def tables(self) -> str:
        steps, pairs = self.arguments.steps, self.pairs()
        lines = ["| optimizer | seed | final validation loss |", "|---|---|---|"]
        further = [curve for pair in pairs[1:] for curve in pair]
        for curve in [*self.tuned, *further]:
            lines.append(f"| {curve.way.label} | {curve.seed} | {self.final(curve):.4f} |")
        columns = ["seed", "AdamW's final loss", "Muon's", "steps, AdamW", "Muon to AdamW's loss", "share"]
        columns += ["seconds, AdamW", "Muon to AdamW's loss", "share"]
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for base, other in pairs:
            losses = f"{self.final(base):.4f} | {self.final(other):.4f}"
            lines.append(f"| {base.seed} | {losses} | {steps} | {self.to_loss(base, other)} |")
        return "\n".join(lines) + "\n"

    def to_loss(self, base: Curve, other: Curve) -> str:
        steps = self.arguments.steps
        step, all_seconds = first_step_at(other, self.final(base)), base.seconds(steps)
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
        others = [curve for curve in self.tuned if curve.way not in best.values()]
        for curve in [*others, *(curve for pair in self.pairs() for curve in pair)]:
            is_best = curve.way in best.values()
            first = curve.seed == self.arguments.seeds[0]
            points = {step: loss for step, loss in curve.val_losses.items() if step}
            axes.plot(
                list(points),
                list(points.values()),
                color="tab:blue" if curve.way.flags["optimizer"] == "adamw" else "tab:orange",
                linestyle="-" if first else "--",
                linewidth=1.6 if is_best else 0.6,
                alpha=1.0 if is_best else 0.5,
                label=f"{curve.way.label}, seed {curve.seed}" if is_best else None,
            )
        axes.set(xlabel="step", ylabel="validation loss (nats a token)", title="thin: the other settings")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Trainings.add_arguments(parser, "artifacts/optimizers", steps=600)
    parser.add_argument("--adamw_lrs", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    parser.add_argument("--muon_lrs", type=float, nargs="+", default=[0.02])
    parser.add_argument("--muon_qkv", nargs="+", choices=["whole", "split"], default=["split"])
    parser.add_argument("--muon_max_lrs", type=float, nargs="+", default=[1e-3], help="of AdamW beside Muon")
    parser.add_argument("--min_lr_ratio", type=float, default=0.1, help="last learning rate, as a share of the highest")
    arguments, train_flags = parser.parse_known_args()
    contest = Contest(arguments, train_flags)
    if not contest.run():
        return TRY_AGAIN
    tables = contest.tables()
    (arguments.folder / "optimizers.md").write_text(tables)
    contest.draw(arguments.folder / "optimizers.png")
    print(tables)
    return 0


if __name__ == "__main__":
    main_guard(main)
