"""Runs the pipeline from a terminal and shows at the end what came of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from gpt2core.config import LaunchConfig, PromotionConfig, RecoveryConfig, RunConfig, RunnerConfig
from gpt2core.flags import Parser, add_recipe, add_settings, main_guard, run_config, settings_of
from gpt2core.listing import duration, number, show, table
from gpt2core.records import Stage
from gpt2core.run_folder import RunFolder


def main(pretrain: Callable[..., list[Stage]]) -> None:
    main_guard(lambda: _run(pretrain))


def _run(pretrain: Callable[..., list[Stage]]) -> None:
    parser = Parser(prog="python -m flows.pretrain", description="Run the whole pipeline here and now.")
    add_recipe(parser)
    add_settings(parser, RunConfig)
    add_settings(parser, PromotionConfig)
    add_settings(parser, LaunchConfig)
    add_settings(parser, RunnerConfig)
    add_settings(parser, RecoveryConfig)
    parser.add_argument("--force", action="store_true", help="go on although settings that shape the run have changed")
    arguments = parser.parse_args()
    config = run_config(arguments)
    stages = pretrain(
        run_name=config.run_name,
        artifacts_dir=config.artifacts_dir,
        model=config.model,
        data=config.data,
        train=config.train,
        evaluation=config.evaluation,
        promotion=settings_of(PromotionConfig, arguments),
        launch=settings_of(LaunchConfig, arguments),
        runner=settings_of(RunnerConfig, arguments),
        recovery=settings_of(RecoveryConfig, arguments),
        force=arguments.force,
    )
    _show(config, stages)


def _show(config: RunConfig, stages: list[Stage]) -> None:
    rows = [
        (
            stage.stage,
            stage.step,
            number(stage.train_loss),
            number(stage.val_loss),
            number(stage.acc),
            number(stage.acc_norm),
            None if stage.tokens_per_sec is None else f"{stage.tokens_per_sec:,.0f}",
            duration(stage.duration_s),
        )
        for stage in stages
    ]
    columns = ("stage", "step", "train loss", "val loss", "acc", "acc_norm", "tokens/s", "time")
    print()
    show(table(f"{config.run_name}: stages", columns, rows))
    for stage in stages:
        if stage.note:
            print(f"{stage.stage}{'' if stage.step is None else f' (step {stage.step})'}: {stage.note}")
    folder = RunFolder.of(config)
    best = Path(config.artifacts_dir) / "best"
    command = [sys.executable, "-m", "gpt2core.cli"]
    print(f"\nA sample from the promoted model ({best}):\n", flush=True)
    subprocess.run([*command, "generate", "--checkpoint", str(best), "--device", config.train.device], check=True)
    print(
        f"\nloss curve    {folder.reports / 'loss.png'}\n"
        f"curves        gpt2 tensorboard --artifacts_dir {config.artifacts_dir}    then http://127.0.0.1:6006\n"
        f"stage history prefect server start    then http://127.0.0.1:4200\n"
        f"checkpoints   gpt2 checkpoints --run_name {config.run_name}\n"
        f"more text     gpt2 generate --checkpoint {best} 'Once upon a time'\n"
        f"(put .venv/bin on the PATH for these: source .venv/bin/activate)",
        flush=True,
    )
