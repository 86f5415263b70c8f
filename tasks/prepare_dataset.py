"""Stage: text to token shards. One task lists the source, one a file tokenizes, one cuts the shards."""

from __future__ import annotations

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.logging import get_run_logger
from prefect.runtime import task_run
from prefect.tasks import exponential_backoff

from gpt2core.config import DataConfig
from gpt2core.flags import as_flags
from gpt2core.prepare import begin, complete, describe, is_ready_made, read_progress, read_record
from gpt2core.shards import Manifest, SourceRecord, read_manifest
from tasks.artifacts import LiveProgress, artifact_key
from tasks.stage_process import StageError, die_with_the_flow, run_stage, worth_a_retry

RETRIES = {  # of a source that cannot be reached, or a process that was killed
    "retries": 5,
    "retry_delay_seconds": exponential_backoff(backoff_factor=5),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": worth_a_retry,
    "cache_policy": NO_CACHE,
}


@task(name="list-source", task_run_name="list-source ({data.source})", **RETRIES)
def list_source(data: DataConfig) -> list[str]:
    """URLs of the files to tokenize: none when the dataset is complete, or consists of shards made elsewhere."""
    plan = None if is_ready_made(data) else begin(data, get_run_logger().info)
    return [file.url for file in plan.files] if plan else []


@task(name="tokenize-file", task_run_name=lambda: f"tokenize {_file_name()}", **RETRIES)
def tokenize_file(data: DataConfig, url: str) -> SourceRecord:
    """Tokenizes what is missing of one file; its progress and rate are live in the UI."""
    die_with_the_flow()  # in a Dask worker; one of a process pool has done so when it started
    bar = LiveProgress(artifact_key("tokenize", url), f"tokenize {url}")

    def look(line: str) -> None:
        if bar.due() and (seen := read_progress(data, url)):
            bar.show(100 * seen.fraction, f"{url}: {seen.tokens:,} tokens, {seen.tokens_per_sec:,.0f} tokens/s")

    run_stage("gpt2core.prepare", [*as_flags(data), f"--only={url}"], look=look)
    record = read_record(data, url)
    if record is None:
        raise StageError(f"{url} has no record after it was tokenized")
    bar.finish(100, f"{url}: {record.tokens:,} tokens of {record.documents:,} documents")
    return record


def _file_name() -> str:
    return task_run.parameters["url"].rpartition("/")[2]


@task(name="assemble-shards", task_run_name="assemble-shards ({data.data_dir})", **RETRIES)
def assemble_shards(data: DataConfig) -> str:
    """Cuts the tokens of all files into shards and writes the manifest; returns what the dataset holds, in a line."""
    if is_ready_made(data):
        return "shards without a manifest, used as they are"
    done_before = complete(data)
    if done_before is None:
        run_stage("gpt2core.prepare", as_flags(data))
    manifest = read_manifest(data.data_dir)
    if manifest is None:
        raise StageError(f"{data.data_dir} has no manifest after it was prepared")
    _show(data, manifest)
    return ("done before: " if done_before else "") + describe(manifest)


def _show(data: DataConfig, manifest: Manifest) -> None:
    rows = [source.model_dump(exclude={"damage"}) for source in manifest.sources]
    description = f"{data.data_dir}: {describe(manifest)}"
    create_table_artifact(rows, key=artifact_key("dataset", data.data_dir), description=description)
