"""Stage: validation loss and HellaSwag of one checkpoint."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from gpt2core.checkpoint_folder import BEST, CheckpointFolder, epoch_name
from gpt2core.config import RecoveryConfig
from gpt2core.lock import IfBusy
from gpt2core.records import Evaluation, Stage
from gpt2core.run_folder import RunFolder
from gpt2core.watchdog import Watchdog
from tasks.artifacts import LAST_UPDATE_S, artifact_key, beside
from tasks.stage_process import run_stage, worth_a_retry
from tasks.waiting import QueueShown


def is_there(artifacts_dir: str, run_name: str, checkpoint: str) -> bool:
    """Whether the run has a whole checkpoint of this name."""
    name = BEST if checkpoint == "best" else checkpoint
    return CheckpointFolder(RunFolder(artifacts_dir, run_name).checkpoints).find(name) is not None


def candidates(artifacts_dir: str, run_name: str, epoch: int) -> list[str]:
    """What the end of an epoch adds to measure for promotion: its checkpoint, and the best one when that is an earlier."""
    checkpoints = CheckpointFolder(RunFolder(artifacts_dir, run_name).checkpoints)
    of_epoch, best = checkpoints.find(epoch_name(epoch)), checkpoints.find(BEST)
    is_earlier = of_epoch and best and best.sidecar.step < of_epoch.sidecar.step
    return [epoch_name(epoch), *["best"] * bool(is_earlier)]


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
    hellaswag_convention: str | None = None,
    device: str = "auto",
    force: bool = False,
    if_gpu_busy: IfBusy = "wait",
    hang_timeout_s: float = RecoveryConfig().start_timeout_s,
) -> Stage:
    """Measures a checkpoint: the run's by name (latest, best, epoch_00003), or one at a path or URL; a stored result is used
    unless `force`. Without progress for so many seconds the process is killed, which is worth a retry."""
    started, began = time.perf_counter(), datetime.now(UTC).isoformat(timespec="seconds")
    where = ["--artifacts_dir", artifacts_dir, "--run_name", run_name, "--checkpoint", checkpoint]
    settings = {"--device": device, "--hellaswag": hellaswag, "--hellaswag_convention": hellaswag_convention}
    settings |= {"--if_gpu_busy": if_gpu_busy}
    asked = [word for flag, value in settings.items() if value for word in (flag, value)]
    with TemporaryDirectory() as scratch:
        result_file = Path(scratch) / "result.json"
        heartbeat_file = Path(scratch) / "heartbeat.json"
        files = ["--result", str(result_file), "--heartbeat", str(heartbeat_file)]
        watchdog = Watchdog(heartbeat_file, hang_timeout_s, hang_timeout_s)
        arguments = [*where, *asked, *["--force"] * force, *files]
        run_stage("gpt2core.evaluate", arguments, look=QueueShown().look, watchdog=watchdog)
        result = Evaluation.model_validate_json(result_file.read_text(encoding="utf-8"))
    beside(lambda: show_evaluation(run_name, result)).join(LAST_UPDATE_S)
    score = result.hellaswag
    return Stage(
        stage=f"evaluate {checkpoint}",
        duration_s=time.perf_counter() - started,
        note="done before" if result.measured_at < began else "",
        step=result.step,
        val_loss=result.val_loss,
        acc=score and score.acc,
        acc_norm=score and score.acc_norm,
    )


def show_evaluation(run_name: str, result: Evaluation) -> None:
    """The measurement as a table in the UI; those before it are the artifact's history."""
    rows: list[dict[str, Any]] = [
        {"measure": "validation loss, nats a token", "value": result.val_loss, "stderr": result.val_loss_stderr},
        {"measure": "perplexity", "value": result.perplexity},
        {"measure": "bits a byte", "value": result.bits_per_byte},
    ]
    for score in (result.hellaswag, result.hellaswag_lm_eval):
        if score:
            title = f"HellaSwag by {score.convention}'s convention, {score.examples} examples"
            rows += [
                {"measure": f"{title}: acc", "value": score.acc, "stderr": score.acc_stderr},
                {"measure": f"{title}: acc_norm", "value": score.acc_norm, "stderr": score.acc_norm_stderr},
            ]
    create_table_artifact(
        rows,
        key=artifact_key("evaluation", run_name),
        description=f"{result.checkpoint} of {run_name}, step {result.step}, measured at {result.measured_at}",
    )
