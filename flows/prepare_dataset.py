"""Text to token shards, as a deployment of its own: one task run a source file."""

from __future__ import annotations

import time

from prefect import flow, unmapped

from flows.task_runners import task_runner
from gpt2core.config import DataConfig, RunnerConfig
from gpt2core.records import Stage
from tasks.prepare_dataset import assemble_shards, list_source, tokenize_file
from tasks.stage_process import stages_stopped_on_the_way_out


@flow(name="prepare-dataset", flow_run_name="prepare-dataset ({data.data_dir})")
def prepare_dataset(data: DataConfig = DataConfig(), runner: RunnerConfig = RunnerConfig()) -> Stage:
    """Tokenizes the source into data.data_dir; what is there already is not made again."""
    started = time.perf_counter()
    if files := list_source(data):
        at_once, processes = runner.division(len(files), data.num_workers)
        per_file = data.model_copy(update={"num_workers": processes})
        tokenize_files.with_options(task_runner=task_runner(runner, at_once))(per_file, files)
    note = assemble_shards(data)
    return Stage(stage="prepare dataset", duration_s=time.perf_counter() - started, note=note)


@flow(name="tokenize-files", flow_run_name="tokenize-files ({data.data_dir})")
def tokenize_files(data: DataConfig, files: list[str]) -> None:
    """One task run a file; one that fails for good does not stop the others."""
    with stages_stopped_on_the_way_out():
        runs = tokenize_file.map(unmapped(data), files)
        runs.wait()
        runs.result()
