"""The end of a run in one look: a table of its epochs, and its loss curves as a picture."""

from __future__ import annotations

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
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = folder.metrics()
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, label, style in [("loss", "train", "-"), ("val_loss", "validation", "o-")]:
        points = sorted({line["step"]: line[name] for line in lines if name in line}.items())
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, markersize=4, linewidth=1.2)
    for row in epoch_rows(folder):
        axes.axvline(row["step"], color="gray", linewidth=0.6, linestyle=":")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=f"{folder.path.name}: loss")
    axes.grid(alpha=0.3)
    axes.legend()
    path = folder.reports / "loss.png"
    with publish(path) as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
    return path
