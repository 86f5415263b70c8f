"""Text to token shards, as a deployment of its own."""

from __future__ import annotations

from prefect import flow

from gpt2core.config import DataConfig
from gpt2core.records import Stage
from tasks.prepare_dataset import prepare_dataset as prepare_dataset_task


@flow(name="prepare-dataset", flow_run_name="prepare-dataset ({data.data_dir})")
def prepare_dataset(data: DataConfig = DataConfig()) -> Stage:
    """Tokenizes the source into data.data_dir; what is there already is not made again."""
    return prepare_dataset_task(data)
