"""A run in one look: a table of its epochs, its loss curves as a picture, and an HTML page that compares runs."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gpt2core.checkpoint_folder import CheckpointFolder, epoch_name
from gpt2core.launch import tell
from gpt2core.records import Evaluation
from gpt2core.run_folder import RunFolder
from gpt2core.storage import publish, write_text


def evaluations(folder: RunFolder) -> dict[int, Evaluation]:
    """The run's measurement of each step: that with its own settings, else one on other data."""
    ad_hoc_first = sorted(folder.evaluations.glob("*.json"), key=lambda path: (path.stem.count("_") == 1, path))
    found = [evaluation for path in ad_hoc_first if (evaluation := _read(path))]
    return {evaluation.step: evaluation for evaluation in found if evaluation.step <= folder.last_step}


def _read(path: Path) -> Evaluation | None:
    try:
        return Evaluation.model_validate_json(path.read_text("utf-8"))
    except (ValidationError, UnicodeDecodeError):
        tell(f"WARNING: {path} is no evaluation, and is left out: remove it and evaluate again")
        return None


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
    from gpt2core import curves

    path = folder.reports / "loss.png"
    with publish(path) as file:
        file.write(curves.picture(curves.loss, [folder], dpi=120))
    return path


def write_html(runs: list[RunFolder], path: Path) -> None:
    """Writes one HTML file that needs nothing beside it: the curves of the runs together, then what each came to."""
    from gpt2core import curves
    from gpt2core.status import details, status_of

    told = [status_of(run) for run in runs]
    readable = [run for run, status in zip(runs, told, strict=True) if status.state != "unreadable"]
    pictures = [curves.picture(curve, readable, file_format="svg").decode() for curve in curves.ALL]
    parts = [svg[svg.index("<svg") :] for svg in pictures]
    for run, status in zip(runs, told, strict=True):
        parts.append(f"<h2>{html.escape(run.path.name)}</h2>")
        parts.append("<ul>" + "".join(f"<li>{html.escape(line)}</li>" for line in details(status)) + "</ul>")
        if run in readable:
            parts.append(_html_table(epoch_rows(run)))
            parts.append(f"<pre>{html.escape(run.config_file.read_text(encoding='utf-8'))}</pre>")
    title = html.escape(", ".join(run.path.name for run in runs))
    write_text(path, HTML.format(title=title, body="\n".join(parts)))


HTML = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 15px/1.4 system-ui, sans-serif; max-width: 1500px; margin: 2em auto; padding: 0 1em }}
svg {{ width: 48%; height: auto; min-width: 420px }}
table {{ border-collapse: collapse }}
th, td {{ border: 1px solid #ccc; padding: 3px 8px; text-align: right }}
pre {{ background: #f6f6f6; padding: 1em; max-height: 20em; overflow: auto }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def _html_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "<p>no epoch is finished yet</p>"
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    tags = ["th", *["td"] * len(rows)]
    shown = [
        "".join(f"<{tag}>{html.escape(text)}</{tag}>" for text in line) for tag, line in zip(tags, lines, strict=True)
    ]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in shown) + "</table>"


def cell(value: float | None) -> str:
    """A number as a table for people has it."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else f"{value:.4f}"
