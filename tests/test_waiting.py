"""Who must wait says for what, in the flow run's state, and not for ever."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from orchestration import DEADLINE_S, ROOT, Orchestration
from prefect import flow
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName
from prefect.runtime import flow_run

from flows.join_training import join_training
from gpt2core import attempts
from gpt2core.config import LaunchConfig, RunConfig
from gpt2core.lock import WAITING
from gpt2core.processes import descendants
from gpt2core.run_folder import RunFolder
from tasks.waiting import QueueShown, refuse_when_left, wait_for_start

pytestmark = pytest.mark.slow  # there is a server behind it

HANG_S = 20  # longer than a busy machine takes to load torch


def states(orchestration: Orchestration, name: str) -> list[tuple[str, str]]:
    """Name and message of each state that the flow run has had, but for those at its start."""
    with orchestration.client() as client:
        found = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[name])))
        every = client.read_flow_run_states(found[0].id) if found else []
    return [(state.name or "", state.message or "") for state in every if state.name != "Pending"]


def test_a_run_that_nobody_begins_is_told_from_those_there_are_and_not_waited_for_for_ever(
    orchestration: Orchestration, tmp_path: Path
) -> None:
    for name in ("tiny", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    launch = LaunchConfig(nnodes=2, rdzv_endpoint="node0:29500")
    said = (
        rf"there is no run tinny in {tmp_path} \(there are: other, tiny\); waited 1s for its start: give the run_name"
    )
    with orchestration.client(), pytest.raises(ValueError, match=said):
        join_training("tinny", str(tmp_path), launch, wait_s=1)
    running, queued, failed = states(orchestration, "join-training (tinny)")
    assert queued[0] == "Queued"
    assert f"there is no run tinny in {tmp_path} (there are: other, tiny); waiting up to 1s for its start" in queued[1]
    assert (running[0], failed[0]) == ("Running", "Failed")
    with orchestration.client(), pytest.raises(ValueError, match=rf"no run tiny, nor a folder {tmp_path}/nowhere;"):
        join_training("tiny", f"{tmp_path}/nowhere", launch, wait_s=0)


def test_a_run_that_is_begun_while_it_is_waited_for_is_joined(orchestration: Orchestration, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "tiny")
    folder.path.mkdir()

    @flow(flow_run_name=f"waits in {tmp_path}")
    def waits() -> str:
        wait_for_start(folder, DEADLINE_S)
        return "begun"

    def begin() -> None:
        orchestration.wait_until(lambda: "Queued" in dict(states(orchestration, f"waits in {tmp_path}")), "it to wait")
        folder.config_file.write_text("{}")

    with ThreadPoolExecutor() as pool:
        begun = pool.submit(begin)
        with orchestration.client():
            assert waits() == "begun"
        begun.result()
    seen = states(orchestration, f"waits in {tmp_path}")
    assert [name for name, _ in seen] == ["Running", "Queued", "Running", "Completed"]
    assert f"{folder.path} has no config.json yet; waiting up to" in dict(seen)["Queued"]


def test_a_run_whose_leading_flow_gave_up_is_left(orchestration: Orchestration, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "tiny")
    folder.path.mkdir()
    folder.config_file.write_text(RunConfig(run_name="tiny", artifacts_dir=str(tmp_path)).model_dump_json())
    attempts.begin(folder, "leading")
    long_ago = datetime(2020, 1, 1, tzinfo=UTC)
    refuse_when_left(folder, 0, long_ago)  # it has an attempt under way
    attempts.end(folder, "failed", "python -m gpt2core.train ended with 1")
    refuse_when_left(folder, 60, long_ago)  # it may begin another one
    said = f"the flow that leads {folder.path} has begun no attempt at training for 0s (the last one ended at "
    with orchestration.client(), pytest.raises(ValueError, match=re.escape(said)) as refusal:
        join_training("tiny", str(tmp_path), LaunchConfig(nnodes=2, rdzv_endpoint="node0:29500"), wait_s=0)
    assert "failed, python -m gpt2core.train ended with 1): start it again, and join" in str(refusal.value)


def test_an_evaluation_that_hangs_is_killed_and_tried_again(
    orchestration: Orchestration, lab: Any, first_epoch: Path, tmp_path: Path
) -> None:
    lab.copy_run(first_epoch, tmp_path)
    settings = {"run_name": "tiny", "artifacts_dir": str(tmp_path), "checkpoint": "epoch_00001", "device": "cpu"}
    code = f"from flows.evaluate import evaluate; evaluate(**{settings}, hang_timeout_s={HANG_S})"
    environment = lab.environment() | orchestration.environment
    command = [sys.executable, "-c", code]
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as flow_process:

        def evaluation() -> int | None:
            """Its process, once its heart has begun to beat."""
            for child in descendants(flow_process.pid):
                words = Path(f"/proc/{child.pid}/cmdline").read_text().split("\0")
                if "gpt2core.evaluate" in words and Path(words[words.index("--heartbeat") + 1]).exists():
                    return child.pid
            return None

        os.kill(lab.wait_until(evaluation, "the evaluation to begin"), signal.SIGSTOP)
        output, _ = flow_process.communicate(timeout=lab.deadline_s)
    assert flow_process.returncode == 0, output
    assert output.count(f"watchdog: no progress for {HANG_S} s") == 1
    assert "epoch_00001 (step 12): val_loss" in output


def test_a_stage_whose_process_waits_for_a_gpu_is_queued(orchestration: Orchestration) -> None:
    holder = f"GPU a is in use by process {os.getpid()} on here (training tiny)"

    @flow(flow_run_name=f"evaluates {os.getpid()}")
    def evaluates() -> str:
        shown = QueueShown()
        for line in ("best: loaded", WAITING + holder, "best: validation loss ...", "done"):
            shown.look(line)
        return str(flow_run.name)

    with orchestration.client():
        name = evaluates()
    seen = states(orchestration, name)
    assert [name for name, _ in seen] == ["Running", "Queued", "Running", "Completed"]
    assert dict(seen)["Queued"] == f"Waits: {holder}."
