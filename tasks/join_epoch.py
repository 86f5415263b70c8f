"""Stage: this machine's share of an epoch that a flow on another machine leads."""

from __future__ import annotations

from datetime import datetime

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt2core import launch
from gpt2core.checkpoint_folder import CheckpointFolder, epoch_name
from gpt2core.config import LaunchConfig, RecoveryConfig
from gpt2core.flags import read_config
from gpt2core.run_folder import RunFolder
from gpt2core.watchdog import Watchdog
from tasks.attempts import UNLIMITED
from tasks.stage_process import run_stage, worth_a_retry
from tasks.waiting import refuse_when_left


@task(
    name="join-epoch",
    task_run_name="join-epoch ({run_name})",
    retries=UNLIMITED,  # the leading flow counts the attempts
    retry_delay_seconds=[5, 10, 20, 40],
    retry_jitter_factor=0.5,
    retry_condition_fn=worth_a_retry,
    cache_policy=NO_CACHE,
)
def join_epoch(
    artifacts_dir: str,
    run_name: str,
    launched: LaunchConfig,
    recovery: RecoveryConfig,
    wait_s: float,
    joined_at: datetime,
) -> bool:
    """Trains until the leading flow's epoch ends; True when there is none left.

    Where the epoch ends, and which checkpoint it begins with, the ranks agree on among themselves. The leading flow may be
    without an attempt at training for wait_s seconds after joined_at.
    """
    folder = RunFolder(artifacts_dir, run_name)
    if not folder.config_file.exists():
        raise ValueError(f"{folder.config_file} is gone: the run was removed")
    config = read_config(folder.config_file)
    if CheckpointFolder(folder.checkpoints).find(epoch_name(config.train.num_epochs)):
        return True
    refuse_when_left(folder, wait_s, joined_at)
    nproc = launch.num_processes(launched.nproc_per_node, config.train.device)
    run_stage(
        "gpt2core.train",
        ["--config", str(folder.config_file), "--resume", "latest"],
        nproc,
        launched.torchrun_flags(nproc, run_name),
        watchdog=Watchdog(folder.heartbeat_file, recovery.hang_timeout_s, recovery.start_timeout_s),
    )
    return False
