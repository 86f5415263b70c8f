"""Promotion of a run's best measured model, as a deployment of its own."""

from __future__ import annotations

from typing import Annotated

from prefect import flow
from pydantic import Field

from gpt2core.config import PromotionConfig, Rule, RunName
from gpt2core.credentials import LocalFolder, PathOrUrl
from gpt2core.records import Stage
from tasks.promote_best import promote_best


@flow(name="promote", flow_run_name="promote ({run_name})")
def promote(
    run_name: RunName = "gpt2_124m",
    artifacts_dir: LocalFolder = "artifacts",
    rule: Rule = "val_loss",
    margin: Annotated[float, Field(ge=0)] = 1.0,
    publish_to: PathOrUrl | None = None,
    force: bool = False,
) -> Stage:
    """Moves artifacts/best/ to the run's best measured checkpoint, if that is strictly better.

    Args:
        run_name: Name of the run that has the candidate.
        artifacts_dir: Folder under which each run has a folder of its own, and the promoted model.
        rule: Number that decides: val_loss, or HellaSwag's acc_norm.
        margin: By how many standard errors of the difference acc_norm must be higher.
        publish_to: Folder or fsspec URL that gets a copy of the promoted model.
        force: Replace a model that was measured on other data.
    """
    promotion = PromotionConfig(rule=rule, margin=margin, publish_to=publish_to)
    return promote_best(artifacts_dir, run_name, promotion, force)
