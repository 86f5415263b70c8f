"""Prefect's task runners by name: where the tasks of a mapped stage run."""

from __future__ import annotations

from typing import Any

from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from gpt2core.config import RunnerConfig
from tasks.stage_process import die_with_the_flow


def task_runner(config: RunnerConfig, tasks_at_once: int) -> TaskRunner[Any]:
    """A task runner for so many tasks at a time. Raises ValueError when its integration is not installed."""
    address = config.task_runner_address
    try:
        match config.task_runner:
            case "threads":
                return ThreadPoolTaskRunner(max_workers=tasks_at_once)
            case "processes":
                return ProcessPoolTaskRunner(max_workers=tasks_at_once, initializer=die_with_the_flow)
            case "dask":
                from prefect_dask import DaskTaskRunner

                local = {"n_workers": tasks_at_once, "threads_per_worker": 1, "dashboard_address": None}
                return DaskTaskRunner(address) if address else DaskTaskRunner(cluster_kwargs=local)
            case "ray":
                from prefect_ray import RayTaskRunner

                return RayTaskRunner(address) if address else RayTaskRunner(init_kwargs={"num_cpus": tasks_at_once})
    except ImportError:
        extra = config.task_runner
        raise ValueError(f"task_runner {extra}: not installed; pip install 'gpt2-pipeline[{extra}]'") from None
