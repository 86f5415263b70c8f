"""Progress in the UI: with a server that does not answer, the work goes on."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

STAGE = """
import sys
from prefect.logging import disable_run_logger
from prefect.settings import PREFECT_API_URL, temporary_settings
from tasks.artifacts import LiveProgress

with temporary_settings({PREFECT_API_URL: sys.argv[1]}), disable_run_logger():
    bar = LiveProgress("stage", "a stage")
    for percent in range(100):
        if bar.due():
            bar.show(percent, "working")
    print("the work is done", flush=True)
    sys.stdin.readline()
    print("still sending" if bar.is_sending() else "sent", flush=True)
"""


def test_a_stage_does_not_wait_for_a_server_that_does_not_answer():
    with socket.socket() as server:  # takes connections, and never says a word
        server.bind(("127.0.0.1", 0))
        server.listen()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/api"
        stage = subprocess.Popen(
            [sys.executable, "-c", STAGE, url], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert stage.stdin and stage.stdout
        try:
            assert stage.stdout.readline() == "the work is done\n"
            connection, _ = server.accept()
            with connection:
                assert connection.recv(1) != b""  # the request, which is left without an answer
                stage.stdin.write("\n")
                stage.stdin.flush()
                assert stage.stdout.readline() == "still sending\n"
            server.close()
            assert stage.wait(120) == 0
        finally:
            stage.kill()
            stage.wait()
