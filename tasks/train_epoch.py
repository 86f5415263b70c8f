"""Stage: one epoch of training, from the latest checkpoint to the end of the epoch."""

from __future__ import annotations

import time

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from gpt2core import launch
from gpt2core.checkpoint_folder import Checkpoint, CheckpointFolder, epoch_name
from gpt2core.config import LaunchConfig, RunConfig
from gpt2core.preflight import preflight
from gpt2core.records import Stage
from gpt2core.report import epoch_rows
from gpt2core.run_folder import RunFolder
from tasks.stage_process import StageError, run_stage, worth_a_retry


@task(
    name="train-epoch",
    task_run_name="train-epoch-{epoch:05d} ({config.run_name})",
    retries=5,
    retry_delay_seconds=exponential_backoff(backoff_factor=5),
    retry_jitter_factor=0.5,
    retry_condition_fn=worth_a_retry,
    cache_policy=NO_CACHE,
)
def train_epoch(config: RunConfig, launched: LaunchConfig, epoch: int) -> Stage:
    """Trains to the end of `epoch` (counted from 1) and no further; an epoch whose checkpoint is there is done.

    Raises ValueError for what only the user can put right, StageError when training crashed.
    """
    started = time.perf_counter()
    folder = RunFolder.of(config)
    folder.claim(config)
    if done := _finished(folder, epoch):
        return _stage(folder, epoch, done, started, note="done before")
    nproc = launch.num_processes(launched.nproc_per_node, config.train.device)
    preflight(config, launched.nnodes * nproc)
    run_stage(
        "gpt2core.train",
        ["--config", str(folder.config_file), "--resume", "latest", "--stop_epoch", str(epoch)],
        nproc,
        launched.torchrun_flags(nproc, config.run_name),
    )
    if not (done := _finished(folder, epoch)):
        raise StageError(f"training ended before the end of epoch {epoch}: it was asked to stop")
    return _stage(folder, epoch, done, started)


def _finished(folder: RunFolder, epoch: int) -> Checkpoint | None:
    return CheckpointFolder(folder.checkpoints).find(epoch_name(epoch))


def _stage(folder: RunFolder, epoch: int, checkpoint: Checkpoint, started: float, note: str = "") -> Stage:
    row = epoch_rows(folder)[epoch - 1]
    return Stage(
        stage=f"train epoch {epoch}",
        duration_s=time.perf_counter() - started,
        note=note,
        step=checkpoint.sidecar.step,
        train_loss=checkpoint.sidecar.train_loss,
        val_loss=checkpoint.sidecar.val_loss,
        tokens_per_sec=row["tokens_per_sec"],
    )
