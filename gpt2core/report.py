"""The end of a run in one look: a table of its epochs, and its loss curves as a picture."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gpt2core.checkpoint_folder import CheckpointFolder, epoch_name
from gpt2core.records import Evaluation
from gpt2core.run_folder import RunFolder
from gpt2core.storage import publish


def evaluations(folder: RunFolder) -> dict[int, Evaluation]:
    """The run's measurement of each step: that with its own settings, else one on other data."""
    ad_hoc_first = sorted(folder.evaluations.glob("*.json"), key=lambda path: (path.stem.count("_") == 1, path))
    found = [Evaluation.model_validate_json(path.read_text("utf-8")) for path in ad_hoc_first]
    return {evaluation.step: evaluation for evaluation in found}


def epoch_rows(folder: RunFolder) -> list[dict[str, Any]]:
    """One row an epoch that is finished: its step, losses, HellaSwag accuracies and training speed."""
    measured = evaluations(folder)
    speeds = {line["step"]: line["tokens_per_sec"] for line in folder.metrics() if "tokens_per_sec" in line}
    rows: list[dict[str, Any]] = []
    first_step = 0
    checkpoints = CheckpointFolder(folder.checkpoints)
    epoch = 1
    while checkpoint := checkpoints.find(epoch_name(epoch)):
        step = checkpoint.sidecar.step
        inside = [speed for at, speed in speeds.items() if first_step < at <= step]
        score = measured[step].hellaswag if step in measured else None
        rows.append(
            {
                "epoch": epoch,
                "step": step,
                "train_loss": checkpoint.sidecar.train_loss,
                "val_loss": measured[step].val_loss if step in measured else checkpoint.sidecar.val_loss,
                "acc": score and score.acc,
                "acc_norm": score and score.acc_norm,
                "tokens_per_sec": sum(inside) / len(inside) if inside else None,
            }
        )
        first_step, epoch = step, epoch + 1
    return rows


def draw_losses(folder: RunFolder) -> Path:
    """Writes reports/loss.png: training and validation loss by step, and where each epoch ended."""
    path = folder.reports / "loss.png"
    ends = [row["step"] for row in epoch_rows(folder)]
    _draw(path, folder.metrics(), LOSSES, "loss (nats a token)", f"{folder.path.name}: loss", ends)
    return path


def draw_curves(target: Path, metrics: list[dict[str, Any]], run_name: str) -> list[Path]:
    """Writes loss.png and hellaswag.png into the target folder, each if there are numbers for it; returns the paths."""
    drawn = []
    for name, series, unit in (("loss", LOSSES, "nats a token"), ("hellaswag", ACCURACIES, "share right")):
        if any(key in line for line in metrics for key, _, _ in series):
            drawn.append(target / f"{name}.png")
            _draw(drawn[-1], metrics, series, f"{name} ({unit})", f"{run_name}: {name}")
    return drawn


# number in metrics.jsonl, label, style
LOSSES = [("loss", "train", "-"), ("val_loss", "validation", "o-")]
ACCURACIES = [("acc", "acc", "o-"), ("acc_norm", "acc_norm", "o-")]


def _draw(
    path: Path,
    lines: list[dict[str, Any]],
    series: list[tuple[str, str, str]],
    ylabel: str,
    title: str,
    ends_of_epochs: Iterable[int] = (),
) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label, style in series:
        points = sorted({line["step"]: line[name] for line in lines if name in line}.items())
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    for step in ends_of_epochs:
        axes.axvline(step, color="gray", linewidth=0.6, linestyle=":")
    axes.set(xlabel="step", ylabel=ylabel, title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with publish(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
