"""What other ways to compute do to the loss: the same seeds, data and settings, trained in each of them.

    python tests/benchmarks/precision.py --steps 500 --data_dir DIR [--seconds 540] [--at_once 4] [any flags of `gpt2 train`]
    python tests/benchmarks/precision.py --ways bf16 plain ...      the fused kernels beside PyTorch's own

A way is a --precision, with its --fp8_recipe and --fp8_gradients behind colons, or `plain` for bf16 with --kernels plain;
`plain@300` stops at step 300 of the same schedule. The first one, which goes to the end, is what the others are compared with.
What is done stays: with --seconds the run under way is saved when the time is up, exit code 75 says that there is more to do,
and the same command goes on. At the end --folder holds precision.md (the table) and precision.png (losses and gradient norms).
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from trainings import Curve, Trainings, Way, precision_flags

from gpt2core.config import TrainConfig
from gpt2core.flags import TRY_AGAIN, main_guard


def way(wanted: str) -> Way:
    """Raises ValueError when it is none."""
    name, _, stop = wanted.partition("@")
    flags, label = {"precision": "bf16", "kernels": "plain"}, "bf16, PyTorch's own kernels"
    if name != "plain":
        flags, label = precision_flags(name), name.replace(":", ", ")
    TrainConfig.model_validate(flags)
    file_name = wanted.replace(":", "_").replace("@", "_to_")
    return Way(file_name, label, flags, int(stop) if stop else None)


def differences(mine: dict[int, float], others: dict[int, float], after: int) -> list[float]:
    return [mine[step] - others[step] for step in mine if step in others and step > after]


def table(curves: list[list[Curve]], steps: int) -> str:
    """A row a run; `curves` has a list for each way, a run a seed in it. The last third is of the run's own steps."""
    columns = [
        "way",
        "seed",
        "steps",
        "validation loss",
        "more than the first's",
        "largest difference at an evaluation",
    ]
    columns += ["mean difference in training, last third", "mean gradient norm, last third", "tensors cut", "ms a step"]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for runs in curves:
        for run, base in zip(runs, curves[0], strict=True):
            end = run.way.stop or steps
            late = 2 * end // 3
            val = differences(run.val_losses, base.val_losses, after=0)
            train = differences(run.logged("loss"), base.logged("loss"), after=late)
            norms = [norm for step, norm in run.logged("grad_norm").items() if step > late]
            cells = [run.way.label, run.seed, end, f"{run.val_losses[end]:.4f}", f"{val[-1]:+.4f}"]
            cells += [f"{max(val, key=abs):+.4f}", f"{statistics.mean(train):+.4f}", f"{statistics.mean(norms):.3f}"]
            cells += [int(sum(run.logged("fp8_saturated").values()))]
            cells += [f"{statistics.median(run.logged('step_ms').values()):.1f}"]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def draw(curves: list[list[Curve]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, norms) = pyplot.subplots(1, 2, figsize=(13, 4), layout="constrained")
    for number, runs in enumerate(curves):
        for run, base in zip(runs, curves[0], strict=True):
            look = {"color": f"C{number}", "linestyle": "-" if run is runs[0] else "--"}
            steps = [step for step in run.val_losses if step and step in base.val_losses]
            apart = [run.val_losses[step] - base.val_losses[step] for step in steps]
            losses.plot(steps, apart, label=f"{run.way.label}, seed {run.seed}", **look)
            norms.plot(*zip(*run.logged("grad_norm").items(), strict=True), linewidth=0.6, alpha=0.7, **look)
    losses.set(xlabel="step", ylabel="nats a token", title=f"validation loss above {curves[0][0].way.label}'s")
    norms.set(xlabel="step", title="gradient norm", yscale="log")
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    Trainings.add_arguments(parser, "artifacts/precision", steps=500)
    parser.add_argument("--ways", nargs="+", default=["bf16", "fp8"])
    arguments, train_flags = parser.parse_known_args()
    trainings = Trainings(arguments, train_flags)
    ways = [way(wanted) for wanted in arguments.ways]
    if ways[0].stop:
        raise ValueError(
            f"--ways {arguments.ways[0]}: the others are compared with the first, which must go to the end"
        )
    curves = [[Curve(arguments.folder, one, seed) for seed in arguments.seeds] for one in ways]
    if not trainings.train_all(run for of_a_seed in zip(*curves, strict=True) for run in of_a_seed):
        return TRY_AGAIN
    found = table(curves, arguments.steps)
    (arguments.folder / "precision.md").write_text(found)
    draw(curves, arguments.folder / "precision.png")
    print(found)
    return 0


if __name__ == "__main__":
    main_guard(main)
