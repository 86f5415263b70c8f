"""A further machine of a run on several, as a deployment of its own."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from prefect import flow
from pydantic import Field

from gpt2core.config import LaunchConfig, RecoveryConfig, RunName
from gpt2core.credentials import LocalFolder
from gpt2core.run_folder import RunFolder
from tasks.join_epoch import join_epoch
from tasks.waiting import wait_for_start


@flow(name="join-training", flow_run_name="join-training ({run_name})")
def join_training(
    run_name: RunName = "gpt2_124m",
    artifacts_dir: LocalFolder = "artifacts",
    launch: LaunchConfig = LaunchConfig(),
    recovery: RecoveryConfig = RecoveryConfig(),
    wait_s: Annotated[float, Field(ge=0)] = 1800.0,
) -> None:
    """Takes part in the epochs of a run that `pretrain` or `train` leads on another machine, until all are done.

    Args:
        run_name: Name of the run, as the leading flow has it.
        artifacts_dir: Folder of the runs, which the machines share.
        wait_s: Longest wait in seconds for the leading flow to begin the run, and later for an attempt of it.
    """
    if launch.nnodes == 1:
        raise ValueError("launch.nnodes is 1: to join a run give nnodes and rdzv_endpoint as the leading flow has them")
    joined_at = datetime.now(UTC)
    wait_for_start(RunFolder(artifacts_dir, run_name), wait_s)
    while not join_epoch(artifacts_dir, run_name, launch, recovery, wait_s, joined_at):
        pass
