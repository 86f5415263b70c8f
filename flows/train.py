"""Training alone, without evaluation and promotion in between: the whole run, or one epoch of it."""

from __future__ import annotations

from prefect import flow
from pydantic import PositiveInt

from gpt2core.config import (
    DataConfig,
    EvalConfig,
    LaunchConfig,
    ModelConfig,
    RecoveryConfig,
    RunConfig,
    RunName,
    TrainConfig,
)
from gpt2core.credentials import LocalFolder
from gpt2core.preflight import claim_run
from gpt2core.records import Stage
from tasks.train_epoch import next_epoch
from tasks.train_epoch import train_epoch as train_epoch_task
from tasks.waiting import run_held


@flow(name="train", flow_run_name="train ({run_name})")
def train(
    run_name: RunName = "gpt2_124m",
    artifacts_dir: LocalFolder = "artifacts",
    model: ModelConfig = ModelConfig(),
    data: DataConfig = DataConfig(),
    train: TrainConfig = TrainConfig(),
    evaluation: EvalConfig = EvalConfig(),
    launch: LaunchConfig = LaunchConfig(),
    recovery: RecoveryConfig = RecoveryConfig(),
    stop_epoch: PositiveInt | None = None,
    force: bool = False,
) -> list[Stage]:
    """Trains from the latest checkpoint to the end of `stop_epoch`, or of the run.

    Args:
        run_name: Name of the run and of its folder.
        artifacts_dir: Folder under which each run has a folder of its own.
        stop_epoch: Last epoch to train, counted from 1; without one the run is trained to its end.
        force: Go on with a run although settings that shape it have changed.
    """
    config = RunConfig(
        run_name=run_name, artifacts_dir=artifacts_dir, model=model, data=data, train=train, evaluation=evaluation
    )
    with run_held(artifacts_dir, run_name):
        claim_run(config, launch, force)
        last = min(stop_epoch or train.num_epochs, train.num_epochs)
        return [train_epoch_task(config, launch, epoch, recovery) for epoch in range(1, last + 1)]


@flow(name="train-epoch", flow_run_name="train-epoch ({run_name})")
def train_epoch(
    run_name: RunName = "gpt2_124m",
    artifacts_dir: LocalFolder = "artifacts",
    model: ModelConfig = ModelConfig(),
    data: DataConfig = DataConfig(),
    train: TrainConfig = TrainConfig(),
    evaluation: EvalConfig = EvalConfig(),
    launch: LaunchConfig = LaunchConfig(),
    recovery: RecoveryConfig = RecoveryConfig(),
    epoch: PositiveInt | None = None,
    force: bool = False,
) -> Stage:
    """Trains one epoch, from the latest checkpoint.

    Args:
        run_name: Name of the run and of its folder.
        artifacts_dir: Folder under which each run has a folder of its own.
        epoch: Epoch to train, counted from 1, when those before it are done; without one the first that is not done.
        force: Go on with a run although settings that shape it have changed.
    """
    config = RunConfig(
        run_name=run_name, artifacts_dir=artifacts_dir, model=model, data=data, train=train, evaluation=evaluation
    )
    with run_held(artifacts_dir, run_name):
        claim_run(config, launch, force)
        return train_epoch_task(config, launch, next_epoch(config, epoch), recovery)
