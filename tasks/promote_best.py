"""Stage: the best measured model of a run becomes artifacts/best/, if it beats what is there."""

from __future__ import annotations

import time

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt2core.config import PromotionConfig
from gpt2core.flags import as_flags
from gpt2core.records import Promotion, Stage
from gpt2core.run_folder import RunFolder
from tasks.artifacts import LAST_UPDATE_S, beside
from tasks.dashboard import show_run
from tasks.stage_process import run_stage, worth_a_retry


@task(
    name="promote-best",
    task_run_name="promote-best ({run_name})",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=worth_a_retry,
    cache_policy=NO_CACHE,
)
def promote_best(
    artifacts_dir: str, run_name: str, promotion: PromotionConfig = PromotionConfig(), force: bool = False
) -> Stage:
    """Promotes the run's best candidate by the rule, or keeps what is best."""
    started = time.perf_counter()
    arguments = ["--artifacts_dir", artifacts_dir, "--run_name", run_name, *as_flags(promotion)]
    run_stage("gpt2core.promote", [*arguments, "--force"] if force else arguments)
    folder = RunFolder(artifacts_dir, run_name)
    decision = Promotion.model_validate_json(folder.promotion_file.read_text("utf-8"))
    score = decision.candidate.hellaswag
    beside(lambda: show_run(folder)).join(LAST_UPDATE_S)  # what the report shows comes after it
    return Stage(
        stage="promote best",
        duration_s=time.perf_counter() - started,
        note=("promoted, " if decision.promoted else "kept, ") + decision.reason,
        step=decision.candidate.step,
        val_loss=decision.candidate.val_loss,
        acc=score and score.acc,
        acc_norm=score and score.acc_norm,
    )
