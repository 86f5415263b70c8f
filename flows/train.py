"""Training alone, one epoch or many, as a deployment of its own."""

from __future__ import annotations

from prefect import flow
from pydantic import PositiveInt

from gpt2core.config import DataConfig, EvalConfig, LaunchConfig, ModelConfig, RunConfig, TrainConfig
from gpt2core.credentials import PathOrUrl
from gpt2core.records import Stage
from tasks.train_epoch import train_epoch


@flow(name="train", flow_run_name="train ({run_name})")
def train(
    run_name: str = "gpt2_124m",
    artifacts_dir: PathOrUrl = "artifacts",
    model: ModelConfig = ModelConfig(),
    data: DataConfig = DataConfig(),
    train: TrainConfig = TrainConfig(),
    evaluation: EvalConfig = EvalConfig(),
    launch: LaunchConfig = LaunchConfig(),
    stop_epoch: PositiveInt | None = None,
) -> list[Stage]:
    """Trains from the latest checkpoint to the end of `stop_epoch`, or of the run."""
    config = RunConfig(
        run_name=run_name, artifacts_dir=artifacts_dir, model=model, data=data, train=train, evaluation=evaluation
    )
    last = min(stop_epoch or train.num_epochs, train.num_epochs)
    return [train_epoch(config, launch, epoch) for epoch in range(1, last + 1)]
