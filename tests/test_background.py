"""Processes that outlive their starter: started once, ended alone, and never mistaken for another's."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import wait_until

from flows import background
from flows.background import Background, Running

SAYS_READY = "import signal, sys\n{prelude}\nprint('ready', flush=True)\nsignal.pause()"


@pytest.fixture
def sleeper(tmp_path: Path) -> Iterator[Background]:
    service = Background("sleeper", command(), tmp_path, tmp_path, {"GREETING": "hello"}, frozenset({"SECRET"}))
    yield service
    service.stop()


def command(prelude: str = "") -> list[str]:
    return [sys.executable, "-c", SAYS_READY.format(prelude=prelude)]


def wait_until_ready(service: Background) -> None:
    wait_until(lambda: "ready" in service.log_file.read_text(), f"{service.name} to be ready")


def test_it_outlives_its_starter_and_is_found_and_ended_by_another_process(sleeper: Background, tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from flows.background import Background\n"
        "here = Path(sys.argv[1]); s = Background('sleeper', eval(sys.argv[2]), here, here)\n"
        "print(s.start().pid)"
    )
    words = [sys.executable, "-c", code, str(tmp_path), repr(sleeper.command)]
    started = subprocess.run(words, capture_output=True, text=True, check=True)
    assert sleeper.running() == Running(int(started.stdout), sleeper.command, "")
    with pytest.raises(ValueError, match="sleeper is being started by another command"):
        sleeper.start()
    assert sleeper.stop() == int(started.stdout)
    assert sleeper.running() is None
    assert sleeper.stop() is None
    assert sleeper.last_started() == Running(int(started.stdout), sleeper.command, "")


def test_a_file_that_names_another_process_is_not_believed(sleeper: Background):
    bystander = subprocess.Popen(command())
    try:
        sleeper.lock_file.write_text(json.dumps({"pid": bystander.pid, "command": sleeper.command, "remark": ""}))
        assert sleeper.running() is None
        assert sleeper.stop() is None
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_it_can_be_started_again_after_it_was_killed(sleeper: Background):
    first = sleeper.start()
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert sleeper.running() is None
    second = sleeper.start()
    assert sleeper.running() == Running(second.pid, sleeper.command, "")


def test_what_does_not_end_by_sigterm_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(background, "GRACE_S", 0.2)
    deaf = Background("deaf", command("signal.signal(signal.SIGTERM, signal.SIG_IGN)"), tmp_path, tmp_path)
    process = deaf.start()
    wait_until_ready(deaf)
    assert deaf.stop() == process.pid
    assert process.wait() == -signal.SIGKILL


def test_its_environment_is_this_one_with_its_settings_and_without_what_is_not_meant_for_it(
    sleeper: Background, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SECRET", "word")
    monkeypatch.setenv("KEPT", "yes")
    process = sleeper.start()
    wait_until_ready(sleeper)
    environment = Path(f"/proc/{process.pid}/environ").read_text().split("\0")
    assert {"GREETING=hello", "KEPT=yes"} <= set(environment)
    assert "SECRET=word" not in environment
