"""What runs on this machine for the pipeline: Prefect's server, a worker, TensorBoard. `make up` and `make down`.

python -m flows.services up           starts what does not run, and makes what the server lacks
python -m flows.services deploy       work pool, deployments and automations alone
python -m flows.services units DIR    the same services as systemd units
python -m flows.services down         ends what `up` started, and nothing else
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import Field

from flows.background import Background
from flows.units import write_units
from gpt2core.config import RunConfig, Settings
from gpt2core.flags import Parser, add_settings, main_guard, settings_of
from gpt2core.ports import taken

FOLDER = Path(__file__).resolve().parents[1]  # of the installation
HOST = "127.0.0.1"
POOL = "local"  # as in prefect.yaml
START_S = 180.0  # longest wait for a service; the first start of a server takes over half a minute
PYTHON = [sys.executable, "-m"]

# A limit on concurrent runs would else end healthy ones minutes after the server was restarted.
LEASES_ON_DISK = {"PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem"}
OF_THE_SERVER_ALONE = frozenset(  # credentials that no other process needs
    {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL",
        "PREFECT_API_DATABASE_CONNECTION_URL",
        "PREFECT_SERVER_API_AUTH_STRING",
    }
)


class ServicesConfig(Settings):
    """Where the services listen and keep their state."""

    port: int = Field(4200, ge=1, le=65535, description=f"Port of the Prefect server and its UI on {HOST}.")
    tensorboard_port: int = Field(6006, ge=1, le=65535, description=f"Port of TensorBoard on {HOST}.")
    artifacts_dir: str = Field(RunConfig().artifacts_dir, description="Folder of the runs that TensorBoard shows.")
    state_dir: str = Field(".services", description="Folder of the services' process ids and logs.")

    def api_url(self) -> str:
        return f"http://{HOST}:{self.port}/api"


def services(config: ServicesConfig) -> list[Background]:
    """In the order in which they start."""
    server = [*PYTHON, "prefect", "server", "start", "--host", HOST, "--port", str(config.port)]
    worker = [*PYTHON, "prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", worker_name()]
    board = [*PYTHON, "tensorboard.main", "--logdir", config.artifacts_dir]
    board += ["--host", HOST, "--port", str(config.tensorboard_port)]
    state_dir = FOLDER / config.state_dir
    home = {name: value for name, value in os.environ.items() if name == "PREFECT_HOME"}
    client = home | {"PREFECT_API_URL": config.api_url()}
    client["GPT2_TENSORBOARD_URL"] = f"http://{HOST}:{config.tensorboard_port}"  # which the runs' pages link to
    return [
        Background("server", server, FOLDER, state_dir, home | LEASES_ON_DISK),
        Background("tensorboard", board, FOLDER, state_dir, without=OF_THE_SERVER_ALONE),
        Background("worker", worker, FOLDER, state_dir, client, without=OF_THE_SERVER_ALONE),
    ]


def worker_name() -> str:
    return socket.gethostname()


def up(config: ServicesConfig) -> None:
    """Starts what does not run and waits until it works.

    Raises ValueError when it does not, and before anything is started when a port is taken; `down` ends what was started.
    """
    check_auth()
    server, board, worker = services(config)
    server = replace(server, remark=f"data in {database()}")
    running = {service.name: _is_running(service) for service in (server, board, worker)}
    for service, port in ((server, config.port), (board, config.tensorboard_port)):
        if not running[service.name]:
            _check_port(service.name, port)
    for folder in (server.state_dir, FOLDER / config.artifacts_dir):
        folder.mkdir(parents=True, exist_ok=True)

    last = server.last_started()
    since = datetime.now(UTC)
    started = {service.name: service.start() for service in (server, board) if not running[service.name]}
    _wait_for_server(config, started.get(server.name))
    deploy(only_if_needed=True)
    if not running[worker.name]:
        started[worker.name] = worker.start()
        _wait(worker, started[worker.name], lambda: _is_online(since))
    _wait(board, started.get(board.name), lambda: _answers(f"http://{HOST}:{config.tensorboard_port}"))
    for service in (server, board, worker):
        state = "started" if service.name in started else "runs already"
        found = service.running()
        print(f"{service.name:<12} {state}, process {found.pid}" if found else f"{service.name:<12} has ended again")
    _tell_addresses(config, server)
    if last and last.remark != server.remark:
        print(f"\nWARNING: {server.remark}; when it was last started here it was {last.remark}, with other runs")


def _tell_addresses(config: ServicesConfig, server: Background) -> None:
    print(
        f"\nPrefect UI   http://{HOST}:{config.port}        {server.remark}\n"
        f"TensorBoard  http://{HOST}:{config.tensorboard_port}/#custom_scalars\n"
        f"logs         {server.state_dir}/*.log\n"
        f"from another machine: ssh -N -L {config.port}:{HOST}:{config.port} "
        f"-L {config.tensorboard_port}:{HOST}:{config.tensorboard_port} {socket.gethostname()}\n\n"
        f"Next, from {FOLDER}:\n\n"
        f"    export PREFECT_API_URL={config.api_url()}\n"
        f"    .venv/bin/prefect deployment run pretrain/demo --watch\n\n"
        f"`make down` ends it all.",
        flush=True,
    )


def down(config: ServicesConfig) -> None:
    for service in reversed(services(config)):
        pid = service.stop()
        print(f"{service.name:<12} " + (f"process {pid} ended" if pid else "did not run"), flush=True)


def deploy(only_if_needed: bool = False) -> None:
    """Makes the work pool, the deployments and the automations: flows.deployments and flows.automations say how.

    Has the reaper look once at what a reboot may have left.
    """
    from prefect.deployments import run_deployment

    from flows.automations import ensure_automations
    from flows.deployments import ensure_deployments

    ensure_deployments(FOLDER, POOL, only_if_needed)
    ensure_automations()
    # after a reboot, runs that nobody saw die are given back now and not at the reaper's next turn
    settled = {"dead_for_s": 30}
    run_deployment("reaper/every-five-minutes", parameters=settled, timeout=0, as_subflow=False)


def check_auth() -> None:
    """Raises ValueError when the server would ask for a password that its own worker does not have."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_SERVER_API_AUTH_STRING

    if PREFECT_SERVER_API_AUTH_STRING.value() and not PREFECT_API_AUTH_STRING.value():
        raise ValueError(
            "PREFECT_SERVER_API_AUTH_STRING is set and PREFECT_API_AUTH_STRING is not: "
            "the worker and you need the same value there"
        )


def database() -> str:
    """The server's database without its password."""
    from prefect.settings import get_current_settings
    from sqlalchemy import make_url

    url = get_current_settings().server.database.connection_url
    if url is None:
        return f"SQLite in {get_current_settings().home}"
    return make_url(url.get_secret_value()).set(query={}).render_as_string(hide_password=True)


def _is_running(service: Background) -> bool:
    """Raises ValueError when it runs with other settings."""
    if (found := service.running()) is None:
        return False
    if (found.command, found.remark) != (service.command, service.remark):
        raise ValueError(
            f"the {service.name} runs already with other settings (process {found.pid}: {' '.join(found.command)}"
            f"{found.remark and ', '}{found.remark}): `make down` first, or give the same"
        )
    return True


def _check_port(name: str, port: int) -> None:
    if why := taken(HOST, port):
        setting = "PORT" if name == "server" else "TENSORBOARD_PORT"
        raise ValueError(
            f"the {name} cannot listen on {HOST}:{port} ({why}): "
            f"choose another port, such as make up {setting}={port + 1 if port < 65535 else 4200}"
        )


def _wait_for_server(config: ServicesConfig, process: subprocess.Popen[bytes] | None = None) -> None:
    _wait(services(config)[0], process, lambda: _answers(f"{config.api_url()}/health"))


def _wait(service: Background, process: subprocess.Popen[bytes] | None, ready: Callable[[], bool]) -> None:
    """Raises ValueError when the service ends, or is not ready in START_S."""
    deadline = time.monotonic() + START_S
    while not ready():
        if process and (code := process.poll()) is not None:
            raise ValueError(f"the {service.name} ended with exit code {code}: {service.log_file} says why")
        if time.monotonic() > deadline:
            raise ValueError(f"the {service.name} did not answer within {START_S:.0f} s: look at {service.log_file}")
        time.sleep(0.2)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def _is_online(since: datetime) -> bool:
    """Whether this machine's worker has reported to the server."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        beats = [w.last_heartbeat_time for w in client.read_workers_for_work_pool(POOL) if w.name == worker_name()]
    return any(beat is not None and beat >= since for beat in beats)


def main() -> None:
    parser = Parser(prog="python -m flows.services", description="Start, end and set up what runs on this machine.")
    parser.add_argument("action", choices=["up", "down", "deploy", "units"], help="what to do")
    parser.add_argument("folder", nargs="?", metavar="DIR", help="where units are written to")
    add_settings(parser, ServicesConfig)
    arguments = parser.parse_args()
    config = settings_of(ServicesConfig, arguments)
    # before Prefect is imported, which reads it then; what a shell has there may be another server
    os.environ["PREFECT_API_URL"] = config.api_url()
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a script's background job; it would be inherited
        signal.signal(signal.SIGINT, signal.default_int_handler)
    match arguments.action:
        case "up":
            up(config)
        case "down":
            down(config)
        case "deploy":
            _wait_for_server(config)
            deploy()
        case "units":
            if not arguments.folder:
                raise ValueError("units: give the folder to write them to")
            for file in write_units(Path(arguments.folder), services(config), config.port):
                print(file)


if __name__ == "__main__":
    main_guard(main)
