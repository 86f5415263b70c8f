"""Contenders and measurements for the tests of promotion, without a measurement."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.records import Contender, Evaluation, HellaSwagScore, pack
from gpt2core.run_folder import RunFolder
from gpt2core.storage import read_json_lines


def contender(val_loss: float, fingerprint: str = "same", **changes: Any) -> Contender:
    fields = {"run_name": "a", "checkpoint": "latest", "step": 1, "val_loss": val_loss, "val_fingerprint": fingerprint}
    return Contender.model_validate(fields | {"val_tokens": 1024} | changes)


def score(acc_norm: float, **changes: Any) -> HellaSwagScore:
    fields = {"source": "few.jsonl", "examples": 400, "acc": 0.25, "acc_stderr": 0.02, "acc_norm_stderr": 0.03}
    return HellaSwagScore.model_validate(fields | {"acc_norm": acc_norm} | changes)


def answered(answers: list[bool], **changes: Any) -> HellaSwagScore:
    """The score of these answers, as an evaluation keeps it."""
    share = sum(answers) / len(answers)
    stderr = math.sqrt(share * (1 - share) / len(answers))
    kept = {"examples": len(answers), "acc_norm_stderr": stderr, "right_by_acc_norm": pack(answers)}
    return score(share, **kept | changes)


def record(run: Path, checkpoint: str, val_loss: float, file: str | None = None, **changes: Any) -> None:
    """Writes the measurement of a checkpoint as the evaluate stage does."""
    found = CheckpointFolder(RunFolder(run.parent, run.name).checkpoints).find(checkpoint)
    assert found
    evaluation = Evaluation(
        run_name=run.name,
        checkpoint=checkpoint,
        sha256=found.sidecar.sha256,
        step=found.sidecar.step,
        epoch=found.sidecar.epoch,
        val_loss=val_loss,
        perplexity=1.0,
        val_tokens=1024,
        val_fingerprint="same",
        hellaswag=None,
        duration_s=1.0,
        measured_at="2026-01-01T00:00:00+00:00",
    ).model_copy(update=changes)
    folder = run / "evaluations"
    folder.mkdir(exist_ok=True)
    (folder / (file or f"step_{evaluation.step:06d}.json")).write_text(json.dumps(evaluation.model_dump()))


def history(artifacts: Path) -> list[dict[str, Any]]:
    return list(read_json_lines(artifacts / "promoted" / "history.jsonl"))


def without_metrics(run: Path) -> Path:
    """Drawing their curves would take most of a promotion's time."""
    (run / "metrics.jsonl").unlink()
    return run
