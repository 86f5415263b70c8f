"""`make up` and `make down`, for real: server, worker, TensorBoard, with a password on the server."""

from __future__ import annotations

import base64
import functools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import descendants, is_alive, wait_until

from flows.deployments import PACKAGES, fingerprint

ROOT = Path(__file__).parents[1]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
SAMPLE = ROOT / "data" / "sample" / "tinyshakespeare.txt"
RECOVERY_S = 600.0  # until a run is known to be dead, given back, and done
SERVICES = ("server", "tensorboard", "worker")
PASSWORD = "admin:correct-horse-battery-staple"


def free_ports(count: int) -> list[int]:
    with ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in sockets]


class Installation:
    """An installation's services with ports, a Prefect home and a state folder of their own."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.folder, self.state_dir, self.artifacts_dir = folder, folder / "services", folder / "artifacts"
        self.port, self.tensorboard_port = free_ports(2)
        self.api_url = f"http://127.0.0.1:{self.port}/api"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.environment = kept | {"PREFECT_HOME": str(folder / "prefect"), "COLUMNS": "200"} | settings

    def flags(self) -> list[str]:
        flags = {"port": self.port, "tensorboard_port": self.tensorboard_port}
        flags |= {"state_dir": self.state_dir, "artifacts_dir": self.artifacts_dir}
        return [word for name, value in flags.items() for word in (f"--{name}", str(value))]

    def call(self, *words: str, **changed: str) -> subprocess.CompletedProcess[str]:
        """`python -m flows.services ...`"""
        return self._run(["flows.services", *words, *self.flags()], self.environment | changed)

    def prefect(self, *words: str) -> str:
        done = self._run(["prefect", *words], self.environment | {"PREFECT_API_URL": self.api_url})
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _run(self, words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *words],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    def pids(self) -> dict[str, int]:
        return {name: json.loads((self.state_dir / f"{name}.pid").read_text())["pid"] for name in SERVICES}

    def api(self, path: str, body: Any = None, password: str | None = PASSWORD, method: str | None = None) -> Any:
        headers = {"Content-Type": "application/json"}
        if password:
            headers["Authorization"] = f"Basic {base64.b64encode(password.encode()).decode()}"
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(f"{self.api_url}{path}", data, headers, method=method)
        with urllib.request.urlopen(asked) as answer:
            return json.loads(answer.read() or "null")

    def logs(self) -> str:
        return "".join(file.read_text() for file in self.state_dir.glob("*.log"))

    def assert_is_down(self) -> None:
        for port in (self.port, self.tensorboard_port):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))


def prepare(data_dir: Path, source: object = SAMPLE) -> list[str]:
    """The deployment that tokenizes the sample, and its parameters."""
    data = {"source": str(source), "data_dir": str(data_dir), "shard_size": 32768}
    return ["prepare-dataset/fineweb-edu", "--param", f"data={json.dumps(data)}"]


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """One that is up, with a password on its server."""
    passwords = {"PREFECT_SERVER_API_AUTH_STRING": PASSWORD, "PREFECT_API_AUTH_STRING": PASSWORD}
    installation = Installation(tmp_path_factory.mktemp("installation"), **passwords)
    up = installation.call("up")
    try:
        assert up.returncode == 0, up.stdout + up.stderr + installation.logs()
        for told in (f"http://127.0.0.1:{installation.port}", f"http://127.0.0.1:{installation.tensorboard_port}"):
            assert told in up.stdout
        assert "prefect deployment run pretrain/demo" in up.stdout
        assert up.stdout.count("started") == 3
        yield installation
    finally:
        down = installation.call("down")
        print(down.stdout, down.stderr)


@pytest.mark.slow
def test_a_second_up_starts_nothing_and_makes_nothing_anew(installation: Installation):
    before, automations = installation.pids(), installation.api("/automations/filter", {})
    deployments = deployed(installation)
    again = installation.call("up")
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("runs already") == 3
    assert installation.pids() == before
    elsewhere = installation.call(
        "up", PREFECT_SERVER_DATABASE_CONNECTION_URL="postgresql+asyncpg://me:word@db/prefect"
    )
    assert elsewhere.returncode == 1
    assert "the server runs already with other settings" in elsewhere.stderr
    assert "word" not in elsewhere.stderr
    assert automations and installation.api("/automations/filter", {}) == automations
    assert sorted(name for name, _, _ in deployments) == sorted(entry["name"] for entry in DEPLOYMENTS)
    assert deployed(installation) == deployments, "a deploy would have replaced the schedules"
    reaper = {"flows": {"name": {"any_": ["reaper"]}}, "flow_runs": {"state": {"type": {"any_": ["COMPLETED"]}}}}
    wait_until(lambda: installation.api("/flow_runs/count", reaper), "the reaper's look at what was left")


def deployed(installation: Installation) -> list[tuple[str, str, list[str]]]:
    """Name, version, and the ids of the schedules of each deployment."""
    found = installation.api("/deployments/filter", {})
    return sorted((one["name"], one["version"], [plan["id"] for plan in one["schedules"]]) for one in found)


def test_deployments_are_made_anew_after_any_change_of_what_they_are_made_from(tmp_path: Path, monkeypatch: Any):
    installation = tmp_path / "installation"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, installation / package, ignore=shutil.ignore_patterns("__pycache__"))
    yaml_file = Path(shutil.copy(ROOT / "prefect.yaml", installation))
    seen = [fingerprint(installation)]
    (installation / "gpt2core" / "__pycache__").mkdir()
    (installation / "docs.md").write_text("more")
    assert fingerprint(installation) == seen[0]
    for changed in (yaml_file, *(installation / package / "__init__.py" for package in PACKAGES)):
        changed.write_text(changed.read_text() + "\n")
        seen.append(fingerprint(installation))
    (installation / "tasks" / "new.py").touch()
    seen.append(fingerprint(installation))
    seen.append(fingerprint(installation.rename(tmp_path / "elsewhere")))
    yaml_file = tmp_path / "elsewhere" / "prefect.yaml"
    yaml_file.write_text(yaml_file.read_text() + '# "{{ $GPT2_POOL }}"\n')
    for pool in ("one", "another"):
        monkeypatch.setenv("GPT2_POOL", pool)
        seen.append(fingerprint(tmp_path / "elsewhere"))
    assert len(set(seen)) == len(seen) and all(seen)
    yaml_file.write_text(yaml_file.read_text() + '# "{{ prefect.variables.pool }}"\n')
    assert fingerprint(tmp_path / "elsewhere") is None, "who knows what that will be"


@pytest.mark.slow
def test_the_server_answers_only_who_has_the_password_and_tells_nobody(installation: Installation, tmp_path: Path):
    for password in (None, "admin:guess"):
        with pytest.raises(urllib.error.HTTPError) as refused:
            installation.api("/flow_runs/filter", {}, password)
        assert refused.value.code == 401

    assert "Completed" in installation.prefect("deployment", "run", *prepare(tmp_path / "data"), "--watch")
    assert (tmp_path / "data" / "manifest.json").exists()

    stored = installation.api("/flow_runs/count", {})
    with pytest.raises(AssertionError, match=r"data\.source"):
        installation.prefect("deployment", "run", *prepare(tmp_path / "data", "https://me:hunter2@host/x.txt"))
    assert installation.api("/flow_runs/count", {}) == stored
    assert "hunter2" not in installation.logs()

    secret = PASSWORD.partition(":")[2]
    for table in ("logs", "artifacts", "flow_runs", "deployments", "block_documents"):
        assert secret not in json.dumps(installation.api(f"/{table}/filter", {}))
    assert secret not in installation.logs()
    assert secret not in "".join(file.read_text() for file in installation.state_dir.glob("*.pid"))


@pytest.mark.slow
@pytest.mark.soak
def test_a_worker_in_a_slurm_allocation_ends_when_told_and_the_job_is_queued_again(
    installation: Installation, tmp_path: Path
):
    (tmp_path / "scontrol").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')  # stands in for Slurm's
    (tmp_path / "scontrol").chmod(0o755)
    (tmp_path / ".venv").symlink_to(Path(sys.executable).parents[1])
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", "PREFECT_API_URL": installation.api_url}
    job = subprocess.Popen(
        ["bash", ROOT / "pools" / "slurm-worker.sbatch", "allocation"],
        cwd=tmp_path,
        env=installation.environment | path,
    )
    wait_until(lambda: online(installation, "allocation") == ["slurm-7"], "the worker to be online")
    job.send_signal(signal.SIGTERM)
    job.wait(60)
    assert (tmp_path / "asked").read_text() == "requeue 7\n"


def online(installation: Installation, pool: str) -> list[str]:
    try:
        return [worker["name"] for worker in installation.api(f"/work_pools/{pool}/workers/filter", {})]
    except urllib.error.HTTPError:  # the pool is not there yet
        return []


@pytest.mark.slow
def test_down_ends_what_up_started_and_nothing_else_and_up_brings_back_what_died(installation: Installation):
    os.kill(installation.pids()["worker"], signal.SIGKILL)
    wait_until(lambda: not is_alive(installation.pids()["worker"]), "the worker's end")
    before, deployments = installation.pids(), deployed(installation)
    nightly = next(one["id"] for one in installation.api("/deployments/filter", {}) if one["name"] == "nightly")
    installation.api(f"/deployments/{nightly}", method="DELETE")
    again = installation.call("up")
    assert again.returncode == 0, again.stdout + again.stderr
    assert [one[:2] for one in deployed(installation)] == [one[:2] for one in deployments]
    after = installation.pids()
    assert after["worker"] != before["worker"]
    assert {name: after[name] for name in ("server", "tensorboard")} == {
        name: before[name] for name in ("server", "tensorboard")
    }

    bystander = subprocess.Popen([sys.executable, "-m", "http.server", "0", "--bind", "127.0.0.1"])
    try:
        down = installation.call("down")
        assert down.returncode == 0, down.stdout + down.stderr
        assert down.stdout.count("ended") == 3
        assert not [pid for pid in after.values() if is_alive(pid)]
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()
    installation.assert_is_down()
    assert installation.call("down").stdout.count("did not run") == 3


def test_an_occupied_port_is_one_sentence_and_nothing_is_started(tmp_path: Path):
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        installation = Installation(tmp_path)
        installation.tensorboard_port = occupant.getsockname()[1]
        refused = installation.call("up")
    assert refused.returncode == 1
    assert re.fullmatch(
        r"python -m flows.services: error: the tensorboard cannot listen on 127.0.0.1:\d+ \(.*\): choose another port, .*\n",
        refused.stderr,
    )
    assert not installation.state_dir.exists()


def test_a_password_that_the_worker_lacks_is_one_sentence(tmp_path: Path):
    refused = Installation(tmp_path).call("up", PREFECT_SERVER_API_AUTH_STRING=PASSWORD)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert "PREFECT_API_AUTH_STRING is not" in refused.stderr
    assert PASSWORD not in refused.stderr


def test_make_hands_ports_and_database_on_without_showing_the_password():
    words = ["make", "--dry-run", "up", "PORT=4300", "TENSORBOARD_PORT=6007"]
    shown = subprocess.run(
        [*words, "DATABASE_URL=postgresql+asyncpg://me:secret@db/prefect"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "flows.services up --port 4300 --tensorboard_port 6007" in shown
    assert "secret" not in shown


# --- systemd units -----------------------------------------------------------------------------------------------------


def test_units_say_how_to_start_each_service_for_ever(tmp_path: Path):
    units = tmp_path / "units"
    made = Installation(tmp_path).call("units", str(units))
    assert made.returncode == 0, made.stderr
    assert {Path(line) for line in made.stdout.splitlines()} == set(units.iterdir())
    for name in SERVICES:
        text = (units / f"gpt2-{name}.service").read_text()
        assert "Restart=always" in text
        assert f"WorkingDirectory={ROOT}" in text
        assert re.search(r"^User=\w+", text, re.MULTILINE)
        assert "127.0.0.1" in text
    if shutil.which("systemd-analyze"):
        verified = subprocess.run(
            ["systemd-analyze", "verify", *map(str, units.iterdir())], capture_output=True, text=True, check=False
        )
        assert (verified.returncode, verified.stderr) == (0, "")


# --- PostgreSQL, and a reboot ------------------------------------------------------------------------------------------


class Postgres:
    """A PostgreSQL server of our own, under a user that is not root, which it refuses."""

    PASSWORD = "tr0ub4dor"

    def __init__(self, folder: Path) -> None:
        self.folder, self.data = folder, folder / "data"
        (self.port,) = free_ports(1)
        self.user = "nobody" if os.geteuid() == 0 else None
        if self.user:
            shutil.chown(folder, self.user)
        self.url = f"postgresql+asyncpg://prefect:{self.PASSWORD}@127.0.0.1:{self.port}/postgres"

    def run(self, *words: str) -> str:
        done = subprocess.run(
            words,
            user=self.user,
            cwd=self.folder,
            env=os.environ | {"PGPASSWORD": self.PASSWORD},
            stdout=(log := (self.folder / f"{Path(words[0]).name}.log").open("w+")),  # pg_ctl's server keeps it open
            stderr=subprocess.STDOUT,
            check=False,
        )
        log.seek(0)
        output = log.read()
        assert done.returncode == 0, output
        return output

    def start(self) -> None:
        password = self.folder / "password"
        password.write_text(self.PASSWORD)
        password.chmod(0o644)
        self.run("initdb", "-D", str(self.data), "-U", "prefect", "-A", "scram-sha-256", f"--pwfile={password}")
        options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1"
        self.run("pg_ctl", "-D", str(self.data), "-o", options, "-w", "start")

    def query(self, sql: str) -> str:
        return self.run(
            "psql", "-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect", "-d", "postgres", "-Atc", sql
        ).strip()


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    if missing := [program for program in ("initdb", "pg_ctl", "psql") if not shutil.which(program)]:
        pytest.skip(f"PostgreSQL is not installed: {', '.join(missing)} not found")
    with tempfile.TemporaryDirectory(prefix="gpt2_postgres_") as folder:
        server = Postgres(Path(folder))
        server.start()
        try:
            yield server
        finally:
            server.run("pg_ctl", "-D", str(server.data), "-m", "fast", "-w", "stop")


def exec_start(unit: Path) -> tuple[list[str], dict[str, str], str]:
    """Command, environment and folder of a unit, as systemd reads them."""
    lines = [line.partition("=") for line in unit.read_text().splitlines() if "=" in line]
    environment = dict(shlex.split(value)[0].split("=", 1) for key, _, value in lines if key == "Environment")
    (command,) = (value for key, _, value in lines if key == "ExecStart")
    (folder,) = (value for key, _, value in lines if key == "WorkingDirectory")
    return [word.replace("$$", "$").replace("%%", "%") for word in shlex.split(command)], environment, folder


@pytest.mark.slow
@pytest.mark.soak
@pytest.mark.timeout(900)
def test_on_postgresql_a_training_that_a_reboot_cut_off_is_finished_by_the_units(
    lab: Any, straight_two_ranks: Path, postgres: Postgres, tmp_path: Path
):
    run = tmp_path / "artifacts" / "tiny"
    installation = Installation(tmp_path, PREFECT_SERVER_DATABASE_CONNECTION_URL=postgres.url)
    up = installation.call("up")
    try:
        assert up.returncode == 0, up.stdout + up.stderr + installation.logs()
        assert f"postgresql+asyncpg://prefect:***@127.0.0.1:{postgres.port}/postgres" in up.stdout
        parameters = lab.parameters(tmp_path / "artifacts").items()
        words = [word for name, value in parameters for word in ("--param", f"{name}={json.dumps(value)}")]
        installation.prefect("deployment", "run", "train/gpt2-124m", *words)
        wait_until(lambda: any(line["step"] >= 6 for line in lab.metrics(run)), "step 6")
        services = installation.pids().values()
        everything = [pid for service in services for pid in [*descendants(service), service]]
        for pid in everything:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not any(is_alive(pid) for pid in everything), "all to be gone")
    finally:
        installation.call("down")

    assert installation.call("units", str(tmp_path / "units")).returncode == 0
    booted = []
    try:
        for name in ("worker", "tensorboard", "server"):  # the worker first: it may not need the order
            command, settings, folder = exec_start(tmp_path / "units" / f"gpt2-{name}.service")
            booted.append(Restarted(command, installation.environment | settings, folder, tmp_path / f"{name}.log"))
        state = "select state_type from flow_run join flow on flow.id = flow_id where flow.name = 'train'"
        wait_until(lambda: postgres.query(state) == "COMPLETED", "the run to be completed", RECOVERY_S)
    finally:
        for service in booted:
            service.stop()
    lab.assert_same_run(run, straight_two_ranks)
    assert postgres.query("select count(*) from deployment") == str(len(DEPLOYMENTS))
    assert not list((tmp_path / "prefect").glob("*.db"))
    assert Postgres.PASSWORD not in up.stdout + installation.logs()
    assert Postgres.PASSWORD not in "".join(file.read_text() for file in tmp_path.glob("*.log"))


class Restarted:
    """A process with systemd's Restart=always."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: str, log: Path) -> None:
        self._start = functools.partial(
            subprocess.Popen,
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log.open("ab"),
            stderr=subprocess.STDOUT,
        )
        self.process = self._start()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._keep_running)
        self._thread.start()

    def _keep_running(self) -> None:
        while self.process.wait() is not None and not self._stopped.is_set():
            self.process = self._start()

    def stop(self) -> None:
        self._stopped.set()
        self.process.terminate()
        self._thread.join()
