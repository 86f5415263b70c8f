"""Pictures of one or more runs, drawn from their metrics.jsonl and evaluations. Safe in threads: pyplot is not used."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gpt2core.config import RunConfig
from gpt2core.flags import read_config
from gpt2core.report import epoch_rows, evaluations
from gpt2core.run_folder import RunFolder

POINTS = 800  # of a curve at most; more cannot be seen
GPT2_ACC_NORM = 0.2955  # of OpenAI's 124M, measured as build-nanogpt does
HELLASWAG_EXPECTED = (0.30, 0.35)  # acc_norm expected after the last of 5 epochs
LOSS_EXPECTED = {1: (3.5, 4.0), 5: (2.8, 3.2)}  # of 124M on FineWeb-Edu, after these epochs

Points = list[tuple[float, float]]


def loss(axes: Axes, runs: Sequence[RunFolder]) -> None:
    """Training loss as the mean over neighbouring steps, validation loss as points."""
    for color, run in enumerate(runs):
        name = f"{run.path.name} " if len(runs) > 1 else ""
        _draw(axes, averaged(_logged(run, "loss")), f"{name}train", f"C{color}", alpha=0.6)
        own = f"C{color}" if len(runs) > 1 else "C1"
        _draw(axes, _logged(run, "val_loss"), f"{name}validation", own, marker="o")
    for epoch, (low, high) in LOSS_EXPECTED.items():
        if steps := _steps_of_124m(runs, epoch):
            axes.errorbar(
                steps,
                (low + high) / 2,
                (high - low) / 2,
                color="gray",
                capsize=4,
                label=f"expected after epoch {epoch}",
            )
    axes.set(ylabel="loss (nats a token)", title="loss")


def hellaswag(axes: Axes, runs: Sequence[RunFolder]) -> None:
    for color, run in enumerate(runs):
        points = {step: (value, 0.0) for step, value in _logged(run, "acc_norm")}
        for step, measured in evaluations(run).items():
            if score := measured.hellaswag:
                points[step] = (score.acc_norm, score.acc_norm_stderr)
        points |= {
            step: (points[step][0], stderr) for step, stderr in _logged(run, "acc_norm_stderr") if step in points
        }
        if points:
            steps, values = zip(*sorted(points.items()), strict=True)
            accuracies, errors = zip(*values, strict=True)
            axes.errorbar(steps, accuracies, errors, fmt="o-", color=f"C{color}", capsize=2, ms=3, label=run.path.name)
    axes.axhline(GPT2_ACC_NORM, color="gray", ls="--", lw=1, label=f"OpenAI's GPT-2 124M, {GPT2_ACC_NORM:.2%}")
    axes.axhspan(*HELLASWAG_EXPECTED, color="green", alpha=0.1, label="expected after epoch 5")
    axes.set(ylabel="acc_norm", title="HellaSwag")


def speed(axes: Axes, runs: Sequence[RunFolder]) -> None:
    for color, run in enumerate(runs):
        _draw(axes, averaged(_logged(run, "tokens_per_sec")), run.path.name, f"C{color}")
    axes.set(ylabel="tokens/s", title="speed")
    axes.set_ylim(bottom=0)


def grad_norm(axes: Axes, runs: Sequence[RunFolder]) -> None:
    for color, run in enumerate(runs):
        _draw(axes, averaged(_logged(run, "grad_norm")), run.path.name, f"C{color}")
    axes.set(ylabel="gradient norm before clipping", title="gradient norm")


def learning_rate(axes: Axes, runs: Sequence[RunFolder]) -> None:
    for color, run in enumerate(runs):
        _draw(axes, averaged(_logged(run, "lr")), run.path.name, f"C{color}")
    axes.set(ylabel="learning rate", title="learning rate")


Curve = Callable[[Axes, Sequence[RunFolder]], None]
ALL: tuple[Curve, ...] = (loss, hellaswag, speed, grad_norm, learning_rate)


def picture(
    curve: Curve, runs: Sequence[RunFolder], dpi: int = 100, file_format: Literal["png", "svg"] = "png"
) -> bytes:
    """The curve of these runs as a file, 7 by 3.6 inches."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    curve(axes, runs)
    if len(runs) == 1:
        for step in _epoch_ends(runs[0]):
            axes.axvline(step, color="gray", lw=0.6, ls=":")
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format=file_format, dpi=dpi)
    return content.getvalue()


def averaged(points: Points) -> Points:
    """At most POINTS points, each the mean of neighbours."""
    if len(points) <= POINTS:
        return points
    return [tuple(chunk.mean(0)) for chunk in np.array_split(np.array(points), POINTS)]


def _logged(run: RunFolder, name: str) -> Points:
    """(step, value) in the order of steps; the last one counts where a step was measured twice."""
    found = {line["step"]: line[name] for line in run.metrics() if name in line}
    return [(step, value) for step, value in sorted(found.items()) if math.isfinite(value)]


def _draw(axes: Axes, points: Points, label: str, color: str, marker: str | None = None, alpha: float = 1.0) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker, ms=3, lw=1.2, alpha=alpha)


def _epoch_ends(run: RunFolder) -> list[int]:
    return [row["step"] for row in epoch_rows(run) if row["step"] <= run.last_step]


def _steps_of_124m(runs: Sequence[RunFolder], epoch: int) -> int | None:
    """The step at which this epoch ends, when the first run is one that the expectations are of."""
    config = read_config(runs[0].config_file)
    steps, gpt2 = config.train.steps_per_epoch, RunConfig().model
    if config.model != gpt2 or steps == "auto" or epoch > config.train.num_epochs:
        return None
    return epoch * steps
