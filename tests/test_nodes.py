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

    def start(self, node: Node) -> subprocess.Popen[bytes]:
        launch = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_endpoint", f"{self.nodes[0].address}:{PORT}"]
        launch += ["--local_addr", node.address, "--rdzv_timeout_s", "120"]
        train = [sys.executable, "-m", "gpt2core.cli", "train", *launch, *self.flags]
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
    assert "resumed from" in job.outputs()
    lab.assert_same_run(job.run, straight_two_ranks)
