"""Stage: text to token shards."""

from __future__ import annotations

import time
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from gpt2core.config import DataConfig
from gpt2core.flags import as_flags
from gpt2core.prepare import describe, is_ready_made
from gpt2core.records import Stage
from gpt2core.shards import read_manifest
from tasks.stage_process import StageError, run_stage


@task(name="prepare-dataset", task_run_name="prepare-dataset ({data.data_dir})", cache_policy=NO_CACHE)
def prepare_dataset(data: DataConfig) -> Stage:
    """Makes the shards and their manifest in data.data_dir; what is there already is not made again."""
    started = time.perf_counter()
    if is_ready_made(data):
        note = "shards without a manifest, used as they are"
        return Stage(stage="prepare dataset", duration_s=time.perf_counter() - started, note=note)
    before = read_manifest(Path(data.data_dir))
    run_stage("gpt2core.prepare", as_flags(data))
    manifest = read_manifest(Path(data.data_dir))
    if manifest is None:
        raise StageError(f"{data.data_dir} has no manifest after it was prepared")
    note = ("done before: " if before else "") + describe(manifest)
    return Stage(stage="prepare dataset", duration_s=time.perf_counter() - started, note=note)
