"""The services as systemd units: started at boot, and again whenever they end."""

from __future__ import annotations

import getpass
import sys
from pathlib import Path

from flows.background import Background

UNIT = """\
[Unit]
Description=GPT-2 pipeline: {description}
After=network-online.target postgresql.service{after}
Wants=network-online.target{wants}
StartLimitIntervalSec=0

[Service]
User={user}
WorkingDirectory={folder}
{environment}ExecStart={command}
{life}

[Install]
WantedBy=multi-user.target
"""

FOR_EVER = "Restart=always\nRestartSec=5"
# A rank that runs out of memory is the pipeline's own to resume; and what trains is given time to save.
WITH_TRAINERS = f"{FOR_EVER}\nOOMPolicy=continue\nTimeoutStopSec=120"
ONCE = "Type=oneshot\nRemainAfterExit=yes\nRestart=on-failure\nRestartSec=5"
AFTER_THE_SERVER = " gpt2-server.service"

DESCRIPTIONS = {
    "server": "Prefect server and UI",
    "worker": "Prefect worker, which runs the flows",
    "tensorboard": "TensorBoard",
    "deploy": "work pool, deployments and automations",
}


def write_units(folder: Path, services: list[Background], port: int) -> list[Path]:
    """Writes gpt2-<service>.service files for this installation and this user; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    install_folder = services[0].folder
    deploy = [sys.executable, "-m", "flows.services", "deploy", "--port", str(port)]
    units = [(service.name, service.command, service.settings) for service in services]
    written = []
    for name, command, settings in [*units, ("deploy", deploy, {})]:
        needs_server = AFTER_THE_SERVER if name in ("worker", "deploy") else ""
        text = UNIT.format(
            description=DESCRIPTIONS[name],
            after=needs_server,
            wants=needs_server,
            user=getpass.getuser(),
            folder=str(install_folder).replace("%", "%%"),
            environment="".join(f"Environment={quote(f'{key}={value}')}\n" for key, value in settings.items()),
            command=" ".join(quote(word).replace("$", "$$") for word in command),
            life={"worker": WITH_TRAINERS, "deploy": ONCE}.get(name, FOR_EVER),
        )
        written.append(folder / f"gpt2-{name}.service")
        written[-1].write_text(text, encoding="utf-8")
    return written


def quote(word: str) -> str:
    """The word as a unit file has it (systemd.syntax(7)): % begins a specifier there, and a space ends a word."""
    word = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{word}"' if any(sign in word for sign in " \t\"'\\;") else word
