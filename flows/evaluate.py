"""Evaluation of any checkpoint of a run, as a deployment of its own, by hand or on a schedule."""

from __future__ import annotations

from typing import Annotated, Literal

from prefect import flow
from pydantic import Field

from gpt2core.config import RecoveryConfig, RunName
from gpt2core.credentials import LocalFolder, PathOrUrl
from gpt2core.lock import IfBusy
from gpt2core.records import Stage
from tasks.evaluate_checkpoint import evaluate_checkpoint, is_there


@flow(name="evaluate", flow_run_name="evaluate {checkpoint} ({run_name})")
def evaluate(
    run_name: RunName = "gpt2_124m",
    artifacts_dir: LocalFolder = "artifacts",
    checkpoint: PathOrUrl = "latest",
    hellaswag: PathOrUrl | None = None,
    hellaswag_convention: Literal["build-nanogpt", "lm-eval", "both"] | None = None,
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto",
    force: bool = False,
    if_there: bool = False,
    if_gpu_busy: IfBusy = "wait",
    hang_timeout_s: Annotated[float, Field(ge=0)] = RecoveryConfig().start_timeout_s,
) -> Stage:
    """Measures a checkpoint: validation loss and HellaSwag.

    Args:
        run_name: Name of the run whose checkpoint it is.
        artifacts_dir: Folder under which each run has a folder of its own.
        checkpoint: latest, best, a name in the run's checkpoints such as epoch_00003, a path or URL, or a folder that
            transformers loads.
        hellaswag: HellaSwag's jsonl file, path or URL, or a hub dataset; without one that of the run.
        hellaswag_convention: How to read and to count it; without one as the run's settings say.
        device: Where to compute; auto takes a GPU if there is one.
        force: Measure again what was measured before.
        if_there: Do nothing, and call that well done, when there is no such checkpoint yet; for a schedule.
        if_gpu_busy: What to do while a training or another evaluation has each GPU: wait for one, compute on the CPU,
            or refuse. An evaluation never shares a GPU.
        hang_timeout_s: Longest time in seconds without progress, which is a batch or the wait for a GPU, before it counts
            as hung and is killed to be tried again; 0 for never.
    """
    if if_there and not is_there(artifacts_dir, run_name, checkpoint):
        return Stage(stage=f"evaluate {checkpoint}", duration_s=0.0, note="there is no such checkpoint yet")
    return evaluate_checkpoint(
        artifacts_dir,
        run_name,
        checkpoint,
        hellaswag=hellaswag,
        hellaswag_convention=hellaswag_convention,
        device=device,
        force=force,
        if_gpu_busy=if_gpu_busy,
        hang_timeout_s=hang_timeout_s,
    )
