"""A Prefect of the tests' own: server, worker and deployments as real processes, which can be killed and started again."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling

from gpt2core import heartbeat
from gpt2core.processes import Process

ROOT = Path(__file__).resolve().parent.parent
PREFECT = [sys.executable, "-m", "prefect"]
DEADLINE_S = 400.0  # for any one event; only a hang comes near it


def prefect_environment(home: Path) -> dict[str, str]:
    """The environment of a Prefect that keeps all it has in this folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    own = {"PREFECT_HOME": str(home), "PREFECT_WORKER_QUERY_SECONDS": "2"}
    return kept | own | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}


class Orchestration:
    """Server, worker and deployments; everything that is started here ends with `end`."""

    def __init__(self, home: Path) -> None:
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/api"
        self.environment = prefect_environment(home / "prefect") | {"PREFECT_API_URL": self.url}
        self.server: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None

    # --- processes ---

    def start_server(self) -> None:
        self.server = self._start("server", ["server", "start", "--host", "127.0.0.1", "--port", str(self.port)])
        self.wait_until(self._answers, "the server to answer")

    def start_worker(self, *options: str) -> None:
        self.worker = self._start("worker", ["worker", "start", "--pool", "local", *options])

    def prefect(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Runs a command of Prefect's own to its end."""
        return subprocess.run(
            [*PREFECT, *arguments],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=DEADLINE_S,
            check=False,
        )

    def deploy(self) -> None:
        for command in (["work-pool", "create", "--type", "process", "local"], ["deploy", "--all"]):
            done = self.prefect(*command)
            assert done.returncode == 0, done.stdout + done.stderr

    def kill_server(self) -> None:
        """The server and the processes that it may have started."""
        assert self.server
        for process in [*self._below(self.server), self.server]:
            kill_now(process.pid)
        self.server.wait()

    def kill_worker(self, number: signal.Signals = signal.SIGKILL) -> None:
        assert self.worker
        self.worker.send_signal(number)
        self.worker.wait(DEADLINE_S)

    def end(self) -> None:
        for process in (self.worker, self.server):
            if process and process.poll() is None:
                below = self._below(process)
                for pid in [process.pid, *(one.pid for one in below)]:
                    kill_now(pid)
                process.wait()

    def _start(self, name: str, arguments: list[str]) -> subprocess.Popen[bytes]:
        with (self.home / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*PREFECT, *arguments],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @staticmethod
    def _below(process: subprocess.Popen[bytes]) -> list[Process]:
        from gpt2core.processes import descendants

        return descendants(process.pid)

    def _answers(self) -> bool:
        assert self.server and self.server.poll() is None, self.log("server")
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except OSError:
            return False

    def log(self, name: str) -> str:
        file = self.home / f"{name}.log"
        return file.read_text(errors="replace")[-5000:] if file.exists() else ""

    # --- flow runs ---

    @contextmanager
    def client(self) -> Iterator[SyncPrefectClient]:
        with temporary_settings({PREFECT_API_URL: self.url}), get_client(sync_client=True) as client:
            yield client

    def start_run(self, deployment: str, parameters: dict[str, Any]) -> UUID:
        with self.client() as client:
            found = client.read_deployment_by_name(deployment)
            return client.create_flow_run_from_deployment(found.id, parameters=parameters).id

    def run(self, run_id: UUID) -> FlowRun:
        with self.client() as client:
            return client.read_flow_run(run_id)

    def state(self, run_id: UUID) -> str:
        state = self.run(run_id).state
        return state.name if state else "none"

    def cancel(self, run_id: UUID) -> None:
        with self.client() as client:
            client.set_flow_run_state(run_id, Cancelling())

    def wait_for_state(self, run_id: UUID, *names: str) -> str:
        """Waits for one of these states; another one from which a run does not go on by itself fails the test."""
        final = {"Completed", "Failed", "Cancelled"} - set(names)

        def there() -> str | None:
            state = self.run(run_id).state
            assert state and state.name not in final, f"{state}\n{self.log('worker')}"
            return state.name if state.name in names else None

        return self.wait_until(there, f"the state {' or '.join(names)}")

    def flow_process(self, run_id: UUID) -> int | None:
        """Process id of the flow run's engine."""
        marker = f"PREFECT__FLOW_RUN_ID={run_id}"
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (folder / "cmdline").read_text()
                if "prefect" in command and marker in (folder / "environ").read_text().split("\0"):
                    return int(folder.name)
        return None

    def wait_until(self, happened: Callable[[], Any], what: str) -> Any:
        deadline = time.monotonic() + DEADLINE_S
        while not (value := happened()):
            assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s for {what}\n{self.log('worker')}"
            time.sleep(0.05)
        return value


def ranks(run: Path) -> list[int]:
    """Process ids of the ranks that the run's last trainer had, alive or not."""
    trainer = heartbeat.read(run / "heartbeat.json")
    return [rank.process.pid for rank in trainer.ranks] if trainer else []


def kill_now(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
