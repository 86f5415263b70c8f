"""Every fault for real, with the waits that a real recovery has, and a table at the end: `pytest -m soak tests/test_recovery_soak.py`.

The whole pipeline runs each time. All that brings it back is what a user has: the worker, the two automations, and the
reaper on its schedule.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from orchestration import Orchestration, kill_now, ranks

from flows.automations import ensure_automations
from gpt2core import attempts
from gpt2core.listing import show, table
from gpt2core.run_folder import RunFolder

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200)]

LENGTH = {"steps_per_epoch": 120, "eval_freq": 0, "checkpoint_freq": 25}
MAX_STEPS = 240
AT_STEP = 60
SERVER_AWAY_S = 40.0


class Victim:
    """A run of the pipeline, and how to hurt it."""

    def __init__(self, orchestration: Orchestration, lab: Any, artifacts: Path) -> None:
        self.orchestration, self.lab = orchestration, lab
        self.run = artifacts / "tiny"
        self.folder = RunFolder(artifacts, "tiny")
        parameters = lab.parameters(
            artifacts, **LENGTH, hellaswag=str(lab.examples(8)), source=str(lab.source), shard_size=32_768
        )
        parameters["recovery"] = {"hang_timeout_s": 10}
        self.flow_run = orchestration.start_run("pretrain/gpt2-124m", parameters)

    def steps(self) -> int:
        return max((line["step"] for line in self.lab.metrics(self.run) if "loss" in line), default=0)

    def wait_for_step(self, step: int) -> None:
        self.orchestration.wait_until(lambda: self.steps() >= step, f"step {step}")

    def kill_a_rank(self) -> None:
        kill_now(ranks(self.run)[1])

    def kill_torchrun(self) -> None:
        stat = Path(f"/proc/{ranks(self.run)[0]}/stat").read_text()
        kill_now(int(stat.rpartition(")")[2].split()[1]))

    def stop_a_rank(self) -> None:
        os.kill(ranks(self.run)[1], signal.SIGSTOP)

    def kill_flow(self) -> None:
        flow = self.orchestration.flow_process(self.flow_run)
        assert flow
        kill_now(flow)

    def kill_worker_and_flow(self) -> None:
        self.orchestration.kill_worker()
        self.kill_flow()
        self.orchestration.start_worker()

    def stop_worker(self) -> None:
        self.orchestration.kill_worker(signal.SIGTERM)
        self.orchestration.start_worker()

    def server_away(self) -> None:
        self.orchestration.kill_server()
        time.sleep(SERVER_AWAY_S)  # the fault itself
        self.orchestration.start_server()

    def restart_server_and_crash(self) -> None:
        self.orchestration.kill_server()
        self.orchestration.start_server()
        self.kill_worker_and_flow()

    def reboot(self) -> None:
        """All processes at the same moment; then what the service units do."""
        flow = self.orchestration.flow_process(self.flow_run)
        assert flow
        trainers = ranks(self.run)
        self.kill_torchrun()
        for pid in [flow, *trainers]:
            kill_now(pid)
        self.orchestration.kill_worker()
        self.orchestration.kill_server()
        self.orchestration.start_server()
        self.orchestration.start_worker()


FAULTS: list[tuple[str, Callable[[Victim], None]]] = [
    ("rank killed -9", Victim.kill_a_rank),
    ("torchrun killed -9", Victim.kill_torchrun),
    ("rank hangs (SIGSTOP), limit 10 s", Victim.stop_a_rank),
    ("flow process killed -9", Victim.kill_flow),
    ("worker and flow killed -9, new worker", Victim.kill_worker_and_flow),
    ("server killed -9, back after 40 s", Victim.server_away),
    ("server restarted, then worker and flow killed -9", Victim.restart_server_and_crash),
    ("worker stopped by SIGTERM, new worker", Victim.stop_worker),
    ("everything killed -9 at once (reboot)", Victim.reboot),
]


@pytest.fixture(scope="module")
def reference(lab: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happens to, without Prefect."""
    folder = tmp_path_factory.mktemp("reference")
    lab.train(lab.flags(folder, **LENGTH), nproc=2, deadline_s=600)
    return folder / "tiny"


@pytest.fixture(scope="module")
def rows() -> Iterator[list[tuple[Any, ...]]]:
    found: list[tuple[Any, ...]] = []
    yield found
    print()
    columns = ("fault", "times", "resumed after", "steps lost", "resumes", "weights equal")
    show(table("faults", columns, found))


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[name for name, _ in FAULTS])
def test_the_pipeline_survives(
    orchestration: Orchestration,
    lab: Any,
    tmp_path: Path,
    reference: Path,
    rows: list[tuple[Any, ...]],
    capsys: Any,
    name: str,
    fault: Callable[[Victim], None],
) -> None:
    with orchestration.client():
        ensure_automations()
    orchestration.start_worker()
    victim = Victim(orchestration, lab, tmp_path)
    victim.wait_for_step(AT_STEP)
    before = len(attempts.read(victim.folder))
    started = time.monotonic()
    fault(victim)

    def goes_on() -> bool:
        made = attempts.read(victim.folder)
        return len(made) > before and victim.steps() > made[before].from_step and made[before].outcome != "failed"

    orchestration.wait_until(goes_on, "a step after the fault")
    resumed_after_s = time.monotonic() - started
    orchestration.wait_for_state(victim.flow_run, "Completed")
    lab.assert_same_end(victim.run, reference, MAX_STEPS)  # the pipeline measures more than the reference
    resumes = attempts.resumes(victim.folder)
    lost = sum(resume.steps_lost for resume in resumes)
    rows.append((name, 1, f"{resumed_after_s:.0f} s" if resumes else "it did not stop", lost, len(resumes), "yes"))
    with capsys.disabled():
        print(f"\n{rows[-1]}; {[resume.why for resume in resumes]}")
    orchestration.kill_worker(signal.SIGTERM)
