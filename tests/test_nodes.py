"""Two machines train one run: network namespaces, a wire between them, and torchrun's own rendezvous over it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from gpt2core.config import LaunchConfig
from gpt2core.flags import as_flags

ROOT = Path(__file__).parents[1]
PORT = 29501

pytestmark = pytest.mark.slow


def ip(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *map(str, words)], capture_output=True, text=True, check=False)


class Node:
    """A machine: network interfaces of its own, and all the processes that were started in there."""

    def __init__(self, name: str, address: str, wire: str) -> None:
        self.name, self.address, self.wire = name, address, wire
        self.started: list[subprocess.Popen[bytes]] = []

    def run(self, command: list[str], environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
        with output.open("ab") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.name, *command],
                cwd=ROOT,
                env=environment | {"GLOO_SOCKET_IFNAME": self.wire},  # the host name is the same on both
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return process

    def kill(self) -> None:
        """SIGKILL to all that runs on it, until nothing does."""
        while pids := ip("netns", "pids", self.name).stdout.split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            for process in self.started:
                process.wait(60)

    def unplug(self) -> None:
        ip("-n", self.name, "link", "set", self.wire, "down")

    def plug_in(self) -> None:
        ip("-n", self.name, "link", "set", self.wire, "up")


@pytest.fixture
def nodes() -> Iterator[list[Node]]:
    if not shutil.which("ip"):
        pytest.skip("ip (iproute2) is not installed")
    mark = f"gpt2{os.getpid()}"
    made = [Node(f"{mark}n{number}", f"10.231.0.{number + 1}", f"w{os.getpid()}n{number}") for number in range(2)]
    try:
        for node in made:
            if (done := ip("netns", "add", node.name)).returncode:
                pytest.skip(f"network namespaces are not permitted here: {done.stderr.strip()}")
        assert ip("link", "add", made[0].wire, "type", "veth", "peer", "name", made[1].wire).returncode == 0
        for node in made:
            for words in (
                ("link", "set", node.wire, "netns", node.name),
                ("-n", node.name, "addr", "add", f"{node.address}/24", "dev", node.wire),
                ("-n", node.name, "link", "set", node.wire, "up"),
                ("-n", node.name, "link", "set", "lo", "up"),
            ):
                done = ip(*words)
                assert done.returncode == 0, done.stderr
        yield made
    finally:
        for node in made:
            node.kill()
            ip("netns", "del", node.name)


class Job:
    """The same run on both machines; what fails is started again, as a service or a Prefect retry would."""

    def __init__(self, lab: Any, nodes: list[Node], artifacts: Path) -> None:
        self.lab, self.nodes, self.run = lab, nodes, artifacts / "tiny"
        self.flags = [*lab.flags(artifacts), "--resume", "latest"]

    def launch(self, node: Node) -> LaunchConfig:
        endpoint = f"{self.nodes[0].address}:{PORT}"
        return LaunchConfig(
            nnodes=2, nproc_per_node=1, rdzv_endpoint=endpoint, local_addr=node.address, rdzv_timeout_s=120
        )

    def start(self, node: Node) -> subprocess.Popen[bytes]:
        train = [sys.executable, "-m", "gpt2core.cli", "train", *as_flags(self.launch(node)), *self.flags]
        again = ["bash", "-c", 'until "$@"; do echo "-- again --"; done', "until", *train]
        return node.run(again, self.lab.environment(), self.output(node))

    def output(self, node: Node) -> Path:
        return self.run.parent.parent / f"output_{self.nodes.index(node)}.txt"

    def outputs(self) -> str:
        return "".join(f"--- {node.name}\n{self.output(node).read_text()}" for node in self.nodes)

    def wait_for_step(self, step: int) -> None:
        def reached() -> bool:
            return any(line["step"] >= step and "loss" in line for line in self.lab.metrics(self.run))

        try:
            self.lab.wait_until(reached, f"step {step}")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.outputs()}") from None


def test_one_of_two_machines_dies_and_comes_back(lab: Any, straight_two_ranks: Path, nodes: list[Node], tmp_path: Path):
    job = Job(lab, nodes, tmp_path / "artifacts")
    first, second = (job.start(node) for node in nodes)
    job.wait_for_step(6)
    nodes[1].kill()
    assert second.poll() is not None
    second = job.start(nodes[1])
    for process in (first, second):
        assert process.wait(240) == 0, job.outputs()
    assert "-- again --" in job.output(nodes[0]).read_text()
    lab.assert_same_run(job.run, straight_two_ranks)


@pytest.mark.soak
def test_a_machine_that_vanishes_from_the_network_and_comes_back(
    lab: Any, straight_two_ranks: Path, nodes: list[Node], tmp_path: Path
):
    """No connection of the other is closed by its death."""
    job = Job(lab, nodes, tmp_path / "artifacts")
    first = job.start(nodes[0])
    job.start(nodes[1])
    job.wait_for_step(6)
    nodes[1].unplug()
    nodes[1].kill()
    nodes[1].plug_in()
    second = job.start(nodes[1])
    for process in (first, second):
        assert process.wait(240) == 0, job.outputs()
    lab.assert_same_run(job.run, straight_two_ranks)


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_the_pipeline_leads_on_one_machine_and_another_joins_it_though_it_dies(
    lab: Any, straight_two_ranks: Path, nodes: list[Node], tmp_path: Path
):
    job = Job(lab, nodes, tmp_path / "artifacts")
    prefect = [{"PREFECT_HOME": str(tmp_path / node.name)} for node in nodes]
    flags = [*lab.flags(tmp_path / "artifacts"), "--hellaswag", str(lab.hellaswag), *as_flags(job.launch(nodes[0]))]
    lead = [sys.executable, "-m", "flows.pretrain", "--source", str(lab.source), "--shard_size", "32768", *flags]
    code = (
        "from flows.join_training import join_training; from gpt2core.config import LaunchConfig; import sys\n"
        "join_training('tiny', sys.argv[1], LaunchConfig.model_validate_json(sys.argv[2]))"
    )
    join = [sys.executable, "-c", code, str(tmp_path / "artifacts"), job.launch(nodes[1]).model_dump_json()]
    first = nodes[0].run(lead, lab.environment() | prefect[0], job.output(nodes[0]))
    nodes[1].run(join, lab.environment() | prefect[1], job.output(nodes[1]))
    job.wait_for_step(6)
    nodes[1].kill()
    second = nodes[1].run(join, lab.environment() | prefect[1], job.output(nodes[1]))
    for process in (first, second):
        assert process.wait(400) == 0, job.outputs()
    mine, others = lab.latest(job.run), lab.latest(straight_two_ranks)
    for name in ("step", "train_loss", "val_loss", "model", "optimizer", "rng", "data"):
        lab.assert_same(mine[name], others[name], name)
    assert lab.logged(job.run, "loss") == lab.logged(straight_two_ranks, "loss")
    assert (tmp_path / "artifacts" / "best" / "model.safetensors").exists()
