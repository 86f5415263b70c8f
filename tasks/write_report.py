"""Stage: the run in one look, as a loss curve and a table of its stages on disk, and as its page in the Prefect UI."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from gpt2core.records import Stage
from gpt2core.report import draw_losses
from gpt2core.run_folder import RunFolder
from gpt2core.storage import read_json_lines, write_text
from tasks.artifacts import artifact_key, show_resumes
from tasks.dashboard import show_run
from tasks.stage_process import worth_a_retry


@task(
    name="write-report",
    task_run_name="write-report ({run_name})",
    retries=10,  # the server may be away for a while
    retry_delay_seconds=exponential_backoff(backoff_factor=5),
    retry_condition_fn=worth_a_retry,
    cache_policy=NO_CACHE,
)
def write_report(artifacts_dir: str, run_name: str, stages: list[Stage] | None = None) -> str:
    """Writes reports/loss.png and reports/stages.jsonl in the run's folder; returns the picture's path.

    Without `stages`, those that the last pipeline run wrote are shown. Raises ValueError when there is no such run.
    """
    folder = RunFolder(artifacts_dir, run_name)
    if not folder.config_file.exists():
        raise ValueError(f"{folder.path} holds no run: there is no {folder.config_file.name} in it")
    picture = draw_losses(folder)
    file = folder.reports / "stages.jsonl"
    if stages is not None:
        write_text(file, "".join(stage.model_dump_json() + "\n" for stage in stages))
    rows = list(read_json_lines(file))
    create_table_artifact(rows, key=artifact_key("stages", run_name), description=f"Stages of {run_name}")
    show_resumes(folder)
    show_run(folder, is_end_of_flow=stages is not None)
    return str(picture)
