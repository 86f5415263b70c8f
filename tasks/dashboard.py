"""A run in the Prefect UI: one page with its state, curves and tables, and each table as an artifact of its own.

The keys stay the same over all runs of a flow, so that the UI keeps the history of each under `/artifacts`.
"""

from __future__ import annotations

import base64
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact

from gpt2core.attempts import resumes
from gpt2core.listing import size
from gpt2core.log_line import short_duration
from gpt2core.records import Promotion, current_best
from gpt2core.report import cell, epoch_rows
from gpt2core.run_folder import RunFolder
from gpt2core.status import RunStatus, promoted_line, status_of
from gpt2core.storage import read_json_lines
from tasks.artifacts import artifact_key, beside

SECONDS_TO_FIRST = 60.0
SECONDS_BETWEEN = 3600.0  # each one is kept, with about 80 kB of pictures: 65 MB over 34 days
DPI = 80


class Dashboard:
    """The page of a run that is being trained, made anew from time to time; the training never waits for it."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self._next = time.monotonic() + SECONDS_TO_FIRST

    def look(self) -> None:
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + SECONDS_BETWEEN
            beside(lambda: show_page(self.folder))


def show_run(folder: RunFolder, is_end_of_flow: bool = False) -> None:
    """All that the UI has of a run; at the end of its flow that flow still holds the run's lock."""
    name = folder.path.name
    show_page(folder, is_end_of_flow)
    if rows := epoch_rows(folder):
        create_table_artifact(rows, key=artifact_key("epochs", name), description=f"Epochs of {name}")
    if promotions := _promotions(folder.path.parent):
        create_table_artifact(promotions, key="promotions", description="Every decision on what artifacts/best holds")
    create_link_artifact(
        tensorboard_url(), "TensorBoard", key=artifact_key("tensorboard", name), description=f"Curves of {name}"
    )


def show_page(folder: RunFolder, is_end_of_flow: bool = False) -> None:
    name = folder.path.name
    create_markdown_artifact(
        page(folder, is_end_of_flow), key=artifact_key("dashboard", name), description=f"{name} in one look"
    )


def tensorboard_url() -> str:
    """Where the services of this machine have it."""
    return os.environ.get("GPT2_TENSORBOARD_URL", "http://127.0.0.1:6006") + "/#custom_scalars"


def page(folder: RunFolder, is_end_of_flow: bool = False) -> str:
    """Markdown, with the curves inside it."""
    from gpt2core import curves

    run = status_of(folder, is_end_of_flow)
    parts = [f"# {run.run_name}: {headline(run)}", markdown_table(("run", run.run_name), _facts(run))]
    for curve in (curves.loss, curves.hellaswag, curves.speed):
        inline = base64.b64encode(curves.picture(curve, [folder], dpi=DPI)).decode()
        parts.append(f"![{curve.__name__}](data:image/png;base64,{inline})")
    stages = [(one.stage, "yes" if one.done else "no", one.note) for one in run.stages]
    parts += ["## Stages", markdown_table(("stage", "done", "on disk"), stages)]
    if rows := epoch_rows(folder):
        parts += ["## Epochs", markdown_table(rows[0], ([cell(value) for value in row.values()] for row in rows))]
    if resumed := resumes(folder):
        lines = [(one.at, one.step, one.steps_lost, one.why) for one in reversed(resumed[-10:])]
        parts += ["## Resumes, the last first", markdown_table(("at", "step", "steps lost", "why"), lines)]
    if run.warnings:
        parts += [f"## The last of {run.num_warnings} warnings", *(f"- {warning}" for warning in run.warnings)]
    parts.append(f"{promoted_line(current_best(folder.path.parent))}. All curves: [TensorBoard]({tensorboard_url()})")
    return "\n\n".join(parts)


def headline(run: RunStatus) -> str:
    if not run.max_steps or run.step is None:
        return run.state
    done = f"{run.state}, {run.step / run.max_steps:.0%}"
    return (
        done
        if run.done_at is None
        else f"{done}, done about {run.done_at.replace('T', ' ').removesuffix('+00:00')} UTC"
    )


def _facts(run: RunStatus) -> list[tuple[str, str]]:
    """What there is to say, left out where it is not known."""
    speed = f"{run.tokens_per_sec:,.0f} tokens/s" if run.tokens_per_sec else ""
    saved = f"step {run.saved_step:,}, {short_duration(run.saved_s_ago or 0)} ago" if run.saved_step is not None else ""
    error = f" ± {run.acc_norm_stderr:.4f}" if run.acc_norm_stderr else ""
    facts = {
        "alive": run.alive or "",
        "step": f"{run.step:,} of {run.max_steps:,}, epoch {run.epoch} of {run.num_epochs}"
        if run.max_steps and run.step is not None
        else "",
        "loss": cell(run.loss) if run.loss else "",
        "validation loss": f"{cell(run.val_loss)}, best {cell(run.best_val_loss)}" if run.val_loss else "",
        "HellaSwag acc_norm": f"{run.acc_norm:.4f}{error}" if run.acc_norm else "",
        "speed": speed + (f", MFU {run.mfu:.1%}" if run.mfu else ""),
        "to go": short_duration(run.eta_s) if run.eta_s and run.alive else "",
        "last checkpoint": saved,
        "disk": f"{size(run.checkpoint_bytes)} of checkpoints, {size(run.free_bytes)} free"
        if run.checkpoint_bytes is not None and run.free_bytes is not None
        else "",
        "resumes": f"{run.resumes}, {run.steps_lost} steps lost in all" if run.resumes else "",
    }
    return [(name, value) for name, value in facts.items() if value]


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = [list(columns)]
    lines += [["---"] * len(lines[0]), *([str(value).replace("|", "\\|") for value in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _promotions(artifacts: Path) -> list[dict[str, Any]]:
    decisions = [Promotion.model_validate(line) for line in read_json_lines(artifacts / "promoted" / "history.jsonl")]
    return [
        {
            "decided_at": one.decided_at,
            "promoted": one.promoted,
            "run": one.candidate.run_name,
            "step": one.candidate.step,
            "val_loss": one.candidate.val_loss,
            "reason": one.reason,
        }
        for one in reversed(decisions[-100:])
    ]
