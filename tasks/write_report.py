"""Stage: the run in one look, as a table and a loss curve, on disk and in the Prefect UI."""

from __future__ import annotations

import base64

from prefect import task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from gpt2core.records import Stage
from gpt2core.report import draw_losses
from gpt2core.run_folder import RunFolder
from gpt2core.storage import write_text
from tasks.artifacts import artifact_key


@task(
    name="write-report",
    task_run_name="write-report ({run_name})",
    retries=2,
    retry_delay_seconds=10,
    cache_policy=NO_CACHE,
)
def write_report(artifacts_dir: str, run_name: str, stages: list[Stage]) -> str:
    """Writes reports/loss.png and reports/stages.jsonl in the run's folder; returns the picture's path."""
    folder = RunFolder(artifacts_dir, run_name)
    picture = draw_losses(folder)
    rows = [stage.model_dump() for stage in stages]
    write_text(folder.reports / "stages.jsonl", "".join(stage.model_dump_json() + "\n" for stage in stages))
    create_table_artifact(rows, key=artifact_key("stages", run_name), description=f"Stages of {run_name}")
    inline = base64.b64encode(picture.read_bytes()).decode()
    create_markdown_artifact(
        f"![loss](data:image/png;base64,{inline})",
        key=artifact_key("loss", run_name),
        description=f"Loss of {run_name}",
    )
    return str(picture)
