"""Evaluation of any checkpoint of a run, as a deployment of its own."""

from __future__ import annotations

from typing import Literal

from prefect import flow

from gpt2core.credentials import PathOrUrl
from gpt2core.records import Stage
from tasks.evaluate_checkpoint import evaluate_checkpoint


@flow(name="evaluate", flow_run_name="evaluate {checkpoint} ({run_name})")
def evaluate(
    run_name: str = "gpt2_124m",
    artifacts_dir: PathOrUrl = "artifacts",
    checkpoint: PathOrUrl = "latest",
    hellaswag: PathOrUrl | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    force: bool = False,
) -> Stage:
    """Measures latest, best or a checkpoint by name (epoch_00003); a stored result is used unless `force`."""
    return evaluate_checkpoint(artifacts_dir, run_name, checkpoint, hellaswag=hellaswag, device=device, force=force)
