"""Stage: one epoch of training, from the latest checkpoint to the end of the epoch."""

from __future__ import annotations

import time

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt2core import launch
from gpt2core.checkpoint_folder import Checkpoint, CheckpointFolder, epoch_name
from gpt2core.config import LaunchConfig, RecoveryConfig, RunConfig
from gpt2core.preflight import preflight
from gpt2core.records import Stage
from gpt2core.report import epoch_rows
from gpt2core.run_folder import RunFolder
from gpt2core.watchdog import Watchdog
from tasks.artifacts import beside
from tasks.attempts import UNLIMITED, recorded_attempt, worth_another_attempt
from tasks.dashboard import Dashboard, show_run
from tasks.epoch_progress import EpochProgress
from tasks.stage_process import StageError, run_stage
from tasks.waiting import wait_for_trainers


def next_epoch(config: RunConfig, wanted: int | None) -> int:
    """The epoch to train next, or `wanted` when it is that one or done already. Raises ValueError for a later one."""
    folder = RunFolder.of(config)
    last = config.train.num_epochs
    unfinished = next((epoch for epoch in range(1, last + 1) if not _finished(folder, epoch)), last)
    if wanted is not None and wanted > unfinished:
        over = f"the run has {last} epochs" if wanted > last else f"epoch {unfinished} comes first"
        raise ValueError(f"epoch {wanted} cannot be trained now: {over}")
    return wanted or unfinished


@task(
    name="train-epoch",
    task_run_name="train-epoch-{epoch:05d} ({config.run_name})",
    retries=UNLIMITED,
    retry_delay_seconds=[5, 10, 20, 40, 80, 160, 300],
    retry_jitter_factor=0.5,
    retry_condition_fn=worth_another_attempt,
    cache_policy=NO_CACHE,
)
def train_epoch(
    config: RunConfig, launched: LaunchConfig, epoch: int, recovery: RecoveryConfig = RecoveryConfig()
) -> Stage:
    """Trains to the end of `epoch` (counted from 1) and no further; an epoch whose checkpoint is there is done.

    Raises ValueError for what only the user can put right or what was tried too often, StageError when training crashed.
    """
    started = time.perf_counter()
    folder = RunFolder.of(config)
    folder.claim(config)
    if done := _finished(folder, epoch):
        return _stage(folder, epoch, done, started, note="done before")
    places = launch.places(launched.nproc_per_node, config.train.device)
    preflight(config, launched.nnodes * len(places))
    wait_for_trainers(folder, [gpu for gpu in places if gpu])
    arguments = ["--config", str(folder.config_file), "--resume", "latest", "--stop_epoch", str(epoch)]
    watchdog = Watchdog(folder.heartbeat_file, recovery.hang_timeout_s, recovery.start_timeout_s)
    progress, dashboard = EpochProgress(config.run_name, epoch, config.train.num_epochs), Dashboard(folder)

    def look(line: str) -> None:
        progress.look(line)
        dashboard.look()

    with recorded_attempt(folder, recovery.max_attempts):
        torchrun_flags = launched.torchrun_flags(len(places), config.run_name)
        try:
            run_stage("gpt2core.train", arguments, len(places), torchrun_flags, look, watchdog, folder.output_file)
        except Exception:
            progress.finish(failed=True)
            raise
        if not (done := _finished(folder, epoch)):
            raise StageError(f"training ended before the end of epoch {epoch}: it was asked to stop")
    progress.finish()
    beside(lambda: show_run(folder))
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
