"""Promotion of a run's best measured model, as a deployment of its own."""

from __future__ import annotations

from prefect import flow

from gpt2core.config import RunName
from gpt2core.credentials import LocalFolder
from gpt2core.records import Stage
from tasks.promote_best import promote_best


@flow(name="promote", flow_run_name="promote ({run_name})")
def promote(run_name: RunName = "gpt2_124m", artifacts_dir: LocalFolder = "artifacts") -> Stage:
    """Moves artifacts/best/ to the run's best measured checkpoint, if that is strictly better.

    Args:
        run_name: Name of the run that has the candidate.
        artifacts_dir: Folder under which each run has a folder of its own, and the promoted model.
    """
    return promote_best(artifacts_dir, run_name)
