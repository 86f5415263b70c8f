"""The whole pipeline: dataset, then epoch by epoch training, evaluation and promotion, then a report.

python -m flows.pretrain --recipe demo                  here and now, with Prefect's embedded server
prefect deployment run pretrain/gpt2-124m               on a worker
"""

from __future__ import annotations

from prefect import flow

from flows.prepare_dataset import prepare_dataset
from gpt2core.config import (
    DataConfig,
    EvalConfig,
    LaunchConfig,
    ModelConfig,
    PromotionConfig,
    RecoveryConfig,
    RunConfig,
    RunName,
    RunnerConfig,
    TrainConfig,
)
from gpt2core.credentials import LocalFolder
from gpt2core.preflight import claim_run
from gpt2core.records import Stage
from tasks.evaluate_checkpoint import candidates, evaluate_checkpoint
from tasks.promote_best import promote_best
from tasks.train_epoch import train_epoch
from tasks.waiting import run_held
from tasks.write_report import write_report


@flow(name="pretrain", flow_run_name="pretrain ({run_name})")
def pretrain(
    run_name: RunName = "gpt2_124m",
    artifacts_dir: LocalFolder = "artifacts",
    model: ModelConfig = ModelConfig(),
    data: DataConfig = DataConfig(),
    train: TrainConfig = TrainConfig(),
    evaluation: EvalConfig = EvalConfig(),
    promotion: PromotionConfig = PromotionConfig(),
    launch: LaunchConfig = LaunchConfig(),
    runner: RunnerConfig = RunnerConfig(),
    recovery: RecoveryConfig = RecoveryConfig(),
    force: bool = False,
) -> list[Stage]:
    """Pretrains GPT-2 from text to a promoted model. Stages that lie done on disk are not done again.

    Args:
        run_name: Name of the run and of its folder. A name that is there already goes on where that run stopped.
        artifacts_dir: Folder under which each run has a folder of its own.
        force: Go on with a run although settings that shape it have changed.
    """
    config = RunConfig(
        run_name=run_name, artifacts_dir=artifacts_dir, model=model, data=data, train=train, evaluation=evaluation
    )
    with run_held(artifacts_dir, run_name):
        claim_run(config, launch, force)
        stages = [prepare_dataset(data, runner)]
        for epoch in range(1, train.num_epochs + 1):
            stages.append(train_epoch(config, launch, epoch, recovery))
            for name in candidates(artifacts_dir, run_name, epoch):
                stages.append(
                    evaluate_checkpoint(
                        artifacts_dir, run_name, name, device=train.device, hang_timeout_s=recovery.start_timeout_s
                    )
                )
            stages.append(promote_best(artifacts_dir, run_name, promotion))
        write_report(artifacts_dir, run_name, stages)
    return stages


if __name__ == "__main__":
    from flows.command_line import main

    main(pretrain)
