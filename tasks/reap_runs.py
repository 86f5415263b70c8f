"""Finds flow runs whose process is gone, and has them scheduled again.

Automations do that within two minutes, from events; those of before a restart of the server they may have forgotten.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.logging import get_run_logger
from prefect.states import AwaitingRetry, Crashed, Failed

from gpt2core import lock
from gpt2core.config import RunConfig

HOLDERS = ["pretrain", "train", "train-epoch"]  # flows that have their run's folder (tasks.waiting.run_held)
SECONDS_TO_START = 900  # that a run may be Pending: a container may have to be fetched


@task(name="reap-runs", cache_policy=NO_CACHE)
def reap_runs(tag: str, dead_for_s: int, max_crashes: int) -> list[str]:
    """Gives runs with this tag that are dead back to the workers, or fails those that crash again and again."""
    done = []
    with get_client(sync_client=True) as client:
        holders = {flow.id for flow in client.read_flows(flow_filter=FlowFilter(name=FlowFilterName(any_=HOLDERS)))}
        for run in _unfinished(client, tag):
            if _fail_when_hopeless(client, run, max_crashes):
                done.append(f"{run.name}: failed after {max_crashes} crashes before it ran")
            elif why := _why_dead(run, dead_for_s, holds_folder=run.flow_id in holders):
                done.append(f"{run.name}: {why}; {_give_back(client, run, why)}")
    for line in done:
        get_run_logger().warning(line)
    return done


def _unfinished(client: SyncPrefectClient, tag: str) -> list[FlowRun]:
    states = [StateType.CRASHED, StateType.RUNNING, StateType.PENDING, StateType.SCHEDULED]
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            tags=FlowRunFilterTags(all_=[tag]),
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=states)),
        )
    )


def _why_dead(run: FlowRun, dead_for_s: int, holds_folder: bool) -> str | None:
    """Why the run will not go on by itself, None when it may."""
    state = run.state
    if state is None or run.deployment_id is None:
        return None
    age_s = (datetime.now(UTC) - state.timestamp).total_seconds()
    if state.is_crashed() and age_s > dead_for_s:
        return f"Crashed for {age_s:.0f} s"
    if state.is_running() and age_s > dead_for_s and holds_folder and _is_abandoned(run.parameters):
        return f"Running for {age_s:.0f} s, and no process has its folder"
    if state.is_pending() and age_s > max(dead_for_s, SECONDS_TO_START):
        return f"Pending for {age_s:.0f} s"
    return None


def _is_abandoned(parameters: dict[str, Any]) -> bool:
    """Whether a flow once had the run's folder and none has it now. Of a folder that is not here nothing is known."""
    named = {name: parameters.get(name, RunConfig.model_fields[name].default) for name in ("artifacts_dir", "run_name")}
    file = Path(named["artifacts_dir"]) / named["run_name"] / lock.FLOW_LOCK_FILE
    return file.exists() and lock.holder(file) is None


def _fail_when_hopeless(client: SyncPrefectClient, run: FlowRun, max_crashes: int) -> bool:
    """Fails a run that crashed so often before it ran; the automations alone would give it back for ever."""
    if not run.state or not (run.state.is_crashed() or run.state.name == AwaitingRetry().name):
        return False
    if _crashes_in_a_row(client.read_flow_run_states(run.id)) < max_crashes:
        return False
    message = f"crashed {max_crashes} times or more without Running in between: see the worker's log."
    client.set_flow_run_state(run.id, Failed(message=message), force=True)
    return True


def _give_back(client: SyncPrefectClient, run: FlowRun, why: str) -> str:
    if not (run.state and run.state.is_crashed()):  # for the history: it did not wait of its own accord
        client.set_flow_run_state(run.id, Crashed(message=f"{why}."), force=True)
    client.set_flow_run_state(run.id, AwaitingRetry(message=f"{why}: the next free worker resumes it."), force=True)
    return "waits for a worker"


def _crashes_in_a_row(states: list[State]) -> int:
    """Times that the run was given to a worker and crashed since it last ran."""
    crashes = 0
    in_order = sorted(states, key=lambda state: state.timestamp)
    for before, state in zip([None, *in_order], in_order, strict=False):
        if state.is_running():
            crashes = 0
        elif state.is_crashed() and not (before and before.is_crashed()):  # often reported twice
            crashes += 1
    return crashes
