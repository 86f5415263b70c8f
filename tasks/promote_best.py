"""Stage: the best measured model of a run becomes artifacts/best/, if it beats what is there."""

from __future__ import annotations

import time
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt2core.records import Promotion, Stage
from gpt2core.run_folder import read_json_lines
from tasks.stage_process import run_stage


@task(
    name="promote-best",
    task_run_name="promote-best ({run_name})",
    retries=2,
    retry_delay_seconds=10,
    cache_policy=NO_CACHE,
)
def promote_best(artifacts_dir: str, run_name: str) -> Stage:
    """Promotes the run's candidate of lowest validation loss, or keeps what is best."""
    started = time.perf_counter()
    run_stage("gpt2core.promote", ["--artifacts_dir", artifacts_dir, "--run_name", run_name])
    history = list(read_json_lines(Path(artifacts_dir) / "promoted" / "history.jsonl"))
    decision = Promotion.model_validate(history[-1])
    return Stage(
        stage="promote best",
        duration_s=time.perf_counter() - started,
        note=("promoted, " if decision.promoted else "kept, ") + decision.reason,
        step=decision.candidate.step,
        val_loss=decision.candidate.val_loss,
    )
