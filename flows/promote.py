"""Promotion of a run's best measured model, as a deployment of its own."""

from __future__ import annotations

from prefect import flow

from gpt2core.credentials import PathOrUrl
from gpt2core.records import Stage
from tasks.promote_best import promote_best


@flow(name="promote", flow_run_name="promote ({run_name})")
def promote(run_name: str = "gpt2_124m", artifacts_dir: PathOrUrl = "artifacts") -> Stage:
    """Moves artifacts/best/ to the run's best measured checkpoint, if that is strictly better."""
    return promote_best(artifacts_dir, run_name)
