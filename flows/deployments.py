"""The server's work pool and the deployments of prefect.yaml, made anew only when something that they are made from changed.

A deploy replaces every schedule, those that were switched off in the UI too, and the runs that they have planned.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import DeploymentUpdate, WorkPoolCreate
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import PREFECT_API_URL
from prefect.workers.process import ProcessWorker

from gpt2core import __version__

PACKAGES = ("flows", "tasks", "gpt2core")  # which the parameters of the flows come from


def ensure_deployments(folder: Path, pool: str, only_if_needed: bool = False) -> None:
    """Makes the work pool, and the deployments of the installation in `folder`.

    With `only_if_needed` they are left alone when each of them is there, in this pool, and was made from what lies in
    the folder now.

    Raises ValueError when they cannot be made, ConnectionError when the server does not answer.
    """
    try:
        with get_client(sync_client=True) as client:
            with suppress(ObjectAlreadyExists):
                template = ProcessWorker.get_default_base_job_template()
                client.create_work_pool(WorkPoolCreate(name=pool, type=ProcessWorker.type, base_job_template=template))
            made_from = fingerprint(folder)
            if not (only_if_needed and made_from and _are_right(client, folder, pool, made_from)):
                _deploy_all(folder)
                for found in _deployed(client, folder).values():  # whoever deploys in another way overwrites it
                    client.update_deployment(found.id, DeploymentUpdate(version=made_from))
    except httpx.HTTPError as error:
        what = f"{type(error).__name__}: {error}"
        raise ConnectionError(f"{PREFECT_API_URL.value()} does not do what it was asked ({what})") from None


def fingerprint(folder: Path) -> str | None:
    """Changes with whatever the deployments are made from; it is the version that they have on the server.

    None when prefect.yaml takes something from where it cannot be seen, such as the server's variables.
    """
    file = folder / "prefect.yaml"
    made_from = [str(folder), platform.python_version(), version("prefect"), version("pydantic")]
    for template in sorted(set(re.findall(r"{{(.*?)}}", file.read_text(encoding="utf-8")))):
        name = template.strip().removeprefix("$")
        if name == template.strip():
            return None
        if name != "PWD":  # which is the folder
            made_from.append(f"{name}={os.environ.get(name)}")
    hashed = hashlib.sha256("\0".join(made_from).encode())
    for source in [file, *(path for package in PACKAGES for path in sorted((folder / package).rglob("*.py")))]:
        hashed.update(f"\0{source.relative_to(folder)}\0".encode() + source.read_bytes())
    return f"{__version__}+{hashed.hexdigest()[:16]}"


def _are_right(client: SyncPrefectClient, folder: Path, pool: str, made_from: str) -> bool:
    found = _deployed(client, folder)
    right = [one for one in found.values() if (one.version, one.work_pool_name) == (made_from, pool)]
    return len(right) == len(_wanted(folder))


def _deployed(client: SyncPrefectClient, folder: Path) -> dict[tuple[str, str], DeploymentResponse]:
    """What the server has of the deployments in prefect.yaml, by entrypoint and name."""
    wanted = _wanted(folder)
    named = DeploymentFilter(name=DeploymentFilterName(any_=sorted({name for _, name in wanted})))
    found = {(one.entrypoint or "", one.name): one for one in client.read_deployments(deployment_filter=named)}
    return {key: one for key, one in found.items() if key in wanted}


def _wanted(folder: Path) -> set[tuple[str, str]]:
    deployments = yaml.safe_load((folder / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    return {(entry["entrypoint"], entry["name"]) for entry in deployments}


def _deploy_all(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "deploy", "--all"],
        cwd=folder,
        env=os.environ | {"PWD": str(folder)},  # which prefect.yaml takes for the folder to run in
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"`prefect deploy --all` failed: {(done.stdout + done.stderr).strip()}")
