"""Stage: validation loss and HellaSwag of one checkpoint."""

from __future__ import annotations

import time

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt2core.checkpoint_folder import BEST, CheckpointFolder
from gpt2core.records import Stage
from gpt2core.report import evaluations
from gpt2core.run_folder import RunFolder
from tasks.stage_process import StageError, run_stage, worth_a_retry


def is_there(artifacts_dir: str, run_name: str, checkpoint: str) -> bool:
    """Whether the run has a whole checkpoint of this name."""
    name = BEST if checkpoint == "best" else checkpoint
    return CheckpointFolder(RunFolder(artifacts_dir, run_name).checkpoints).find(name) is not None


@task(
    name="evaluate-checkpoint",
    task_run_name="evaluate-{checkpoint} ({run_name})",
    retries=2,
    retry_delay_seconds=10,
    retry_condition_fn=worth_a_retry,
    cache_policy=NO_CACHE,
)
def evaluate_checkpoint(
    artifacts_dir: str,
    run_name: str,
    checkpoint: str,
    hellaswag: str | None = None,
    device: str = "auto",
    force: bool = False,
) -> Stage:
    """Measures a checkpoint of the run by name (latest, best, epoch_00003); a stored result is used unless `force`."""
    started = time.perf_counter()
    folder = RunFolder(artifacts_dir, run_name)
    arguments = [
        "--artifacts_dir",
        artifacts_dir,
        "--run_name",
        run_name,
        "--checkpoint",
        checkpoint,
        "--device",
        device,
    ]
    arguments += ["--hellaswag", hellaswag] if hellaswag else []
    arguments += ["--force"] if force else []
    found = CheckpointFolder(folder.checkpoints).find(BEST if checkpoint == "best" else checkpoint)
    before = evaluations(folder)
    run_stage("gpt2core.evaluate", arguments)
    if found is None or (result := evaluations(folder).get(found.sidecar.step)) is None:
        raise StageError(f"{folder.evaluations} has no result for {checkpoint}")
    score = result.hellaswag
    return Stage(
        stage=f"evaluate {checkpoint}",
        duration_s=time.perf_counter() - started,
        note="done before" if before.get(result.step) == result else "",
        step=result.step,
        val_loss=result.val_loss,
        acc=score and score.acc,
        acc_norm=score and score.acc_norm,
    )
