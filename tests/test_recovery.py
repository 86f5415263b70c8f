"""Crash means resume: training on a real server and worker, killed in every way, ends Completed and with the same bits.

The suite has a kill of worker and flow, a cancel, a queue and the bounds on attempts. All faults, with the waits that a
real recovery has, are in test_recovery_soak.py.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from orchestration import Orchestration, kill_now, ranks
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId
from prefect.logging import disable_run_logger
from prefect.states import AwaitingRetry, Cancelled, Crashed, Pending, Running

from flows.automations import AUTOMATIONS, TAG, ensure_automations
from gpt2core import attempts, lock
from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.run_folder import RunFolder
from tasks.reap_runs import reap_runs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TRAIN = "train/gpt2-124m"
ENDLESS = {"steps_per_epoch": 100_000, "eval_freq": 0, "checkpoint_freq": 0}


def last_logged(lab: Any, run: Path) -> int:
    return max((line["step"] for line in lab.metrics(run) if "loss" in line), default=0)


def wait_for_step(orchestration: Orchestration, lab: Any, run: Path, step: int) -> None:
    orchestration.wait_until(lambda: last_logged(lab, run) >= step, f"step {step} of {run}")


def saved_step(run: Path) -> int:
    found = CheckpointFolder(run / "checkpoints").find("latest")
    assert found
    return found.sidecar.step


def test_automations_are_made_once_and_put_right(orchestration: Orchestration) -> None:
    with orchestration.client() as client:
        assert set(ensure_automations().values()) <= {"made", "left as it is"}
        before = {one.name: one.id for one in client.read_automations()}
        assert before.keys() >= {one.name for one in AUTOMATIONS}
        assert set(ensure_automations().values()) == {"left as it is"}
        zombie = client.read_automations_by_name("gpt2-zombie")[0]
        changed = {"description": "another", "enabled": False}
        client.update_automation(zombie.id, AUTOMATIONS[0].model_copy(update=changed))
        assert ensure_automations() == {"gpt2-zombie": "corrected", "gpt2-retry": "left as it is"}
        assert ensure_automations()["gpt2-zombie"] == "left as it is, switched off"
        assert {one.name: one.id for one in client.read_automations()} == before
        client.resume_automation(zombie.id)


def test_the_schedules_make_runs(orchestration: Orchestration) -> None:
    with orchestration.client() as client:
        for name in ("reaper/every-five-minutes", "evaluate/nightly"):
            of_it = DeploymentFilter(id=DeploymentFilterId(any_=[client.read_deployment_by_name(name).id]))
            orchestration.wait_until(
                lambda of_it=of_it: client.read_flow_runs(deployment_filter=of_it), f"a run of {name}"
            )


def test_a_run_that_crashes_again_and_again_before_it_runs_is_failed(
    orchestration: Orchestration, lab: Any, tmp_path: Path
) -> None:
    flow_run = orchestration.start_run(TRAIN, lab.parameters(tmp_path))  # there is no worker
    with orchestration.client() as client:
        for state in [
            Pending(),
            Crashed(),
            AwaitingRetry(),
            Pending(),
            Crashed(),
            AwaitingRetry(),
        ]:  # the last by automation
            client.set_flow_run_state(flow_run, state, force=True)
        with disable_run_logger():
            (line,) = orchestration.wait_until(lambda: reap_runs.fn(TAG, 120, 2), "the reaper to find the run")
            assert "failed after 2 crashes before it ran" in line
            assert reap_runs.fn(TAG, 120, 2) == []
    assert orchestration.state(flow_run) == "Failed"


def test_the_reaper_knows_which_flows_hold_the_folder_of_their_run(
    orchestration: Orchestration, lab: Any, tmp_path: Path
) -> None:
    """One that prepares data, or joins a run that another leads, is alive though nobody holds the folder."""
    with lock.hold(tmp_path / "tiny" / lock.FLOW_LOCK_FILE):
        pass
    training = lab.parameters(tmp_path)
    names = {name: training[name] for name in ("run_name", "artifacts_dir")}
    launch = {"launch": {"nnodes": 2, "rdzv_endpoint": "node0:29500"}}
    alive = orchestration.start_run("join-training/node", names | launch)
    dead = orchestration.start_run(TRAIN, training)
    with orchestration.client() as client:
        for run in (alive, dead):  # there is no worker
            client.set_flow_run_state(run, Running(), force=True)
        with disable_run_logger():
            orchestration.wait_until(lambda: reap_runs.fn(TAG, 1, 5), "the reaper to find the run")
        assert orchestration.state(dead) == "AwaitingRetry"
        assert orchestration.state(alive) == "Running"
        for run in (alive, dead):
            client.set_flow_run_state(run, Cancelled(), force=True)


def test_a_cancel_saves_a_queue_shows_and_attempts_have_a_bound(
    orchestration: Orchestration, lab: Any, tmp_path: Path
) -> None:
    endless, busy, doomed = (
        lab.parameters(tmp_path, name, **ENDLESS) | {"launch": {"nproc_per_node": 1}, "recovery": {"max_attempts": 2}}
        for name in ("endless", "busy", "doomed")
    )
    orchestration.start_worker()
    with lock.hold(tmp_path / "busy" / lock.FLOW_LOCK_FILE):
        cancelled = orchestration.start_run(TRAIN, endless)
        queued = orchestration.start_run(TRAIN, busy)
        failed = orchestration.start_run(TRAIN, doomed)

        orchestration.wait_for_state(queued, "Queued")
        state = orchestration.run(queued).state
        assert state and f"in use by the flow of process {os.getpid()} on " in (state.message or "")
        orchestration.cancel(queued)

        wait_for_step(orchestration, lab, tmp_path / "endless", 3)
        orchestration.cancel(cancelled)
        for run in (queued, cancelled):
            orchestration.wait_for_state(run, "Cancelled")
    assert saved_step(tmp_path / "endless") == last_logged(lab, tmp_path / "endless")
    assert [attempt.outcome for attempt in attempts.read(RunFolder(tmp_path, "endless"))] == ["stopped"]

    killed: set[int] = set()

    def killed_again() -> bool:
        for pid in set(ranks(tmp_path / "doomed")) - killed:
            kill_now(pid)
            killed.add(pid)
        return orchestration.state(failed) == "Failed"

    orchestration.wait_until(killed_again, "the run to be given up")
    state = orchestration.run(failed).state
    assert state and "given up after 2 attempts in a row without a new checkpoint" in (state.message or "")
    assert (state.message or "").count("was killed by SIGKILL") == 2
    assert orchestration.state(cancelled) == "Cancelled"
    assert orchestration.run(cancelled).run_count == 1
    orchestration.kill_worker()


def test_a_run_whose_worker_and_flow_are_killed_goes_on_to_the_same_bits(
    orchestration: Orchestration, lab: Any, tmp_path: Path, straight_two_ranks: Path
) -> None:
    """As a machine that goes down while no automation sees it: the reaper finds the run, a new worker resumes it."""
    run = tmp_path / "tiny"
    orchestration.start_worker()
    flow_run = orchestration.start_run(TRAIN, lab.parameters(tmp_path))
    wait_for_step(orchestration, lab, run, 3)
    flow, trainers = orchestration.flow_process(flow_run), ranks(run)
    assert flow
    orchestration.kill_worker()
    kill_now(flow)
    orchestration.wait_until(lambda: not any(map(lab.is_alive, trainers)), "the trainer to end by itself")
    assert 3 <= saved_step(run) == last_logged(lab, run) < lab.max_steps
    assert orchestration.state(flow_run) == "Running"  # nobody has told the server
    orchestration.start_worker()
    while orchestration.state(flow_run) == "Running":
        reaping = orchestration.start_run("reaper/every-five-minutes", {"dead_for_s": 1})
        orchestration.wait_for_state(reaping, "Completed", "Cancelled")  # when the schedule's own is at work
    orchestration.wait_for_state(flow_run, "Completed")
    lab.assert_same_run(run, straight_two_ranks)
    (resume,) = attempts.resumes(RunFolder(tmp_path, "tiny"))
    assert resume.step >= 3
    assert (resume.steps_lost, resume.why) == (0, attempts.CUT_OFF)
    orchestration.kill_worker()
