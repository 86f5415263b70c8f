"""The report of a run, as a deployment of its own."""

from __future__ import annotations

from prefect import flow

from gpt2core.config import RunName
from gpt2core.credentials import LocalFolder
from tasks.write_report import write_report


@flow(name="report", flow_run_name="report ({run_name})")
def report(run_name: RunName = "gpt2_124m", artifacts_dir: LocalFolder = "artifacts") -> str:
    """Draws the loss curve anew, and shows it with the run's stages and resumes.

    Args:
        run_name: Name of the run to report on.
        artifacts_dir: Folder under which each run has a folder of its own.
    """
    return write_report(artifacts_dir, run_name)
