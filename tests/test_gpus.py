"""One process at a time has a GPU: an evaluation takes a free one, or waits and says for whom. Real locks, no GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import torch
from conftest import wait_until

from gpt2core import heartbeat, lock
from gpt2core.cuda_driver import visible_gpus
from gpt2core.flags import TRY_AGAIN

ROOT = Path(__file__).parents[1]

EVALUATION = """
import sys
from contextlib import ExitStack
from gpt2core import lock
from gpt2core.flags import main_guard

def main():
    with ExitStack() as held:
        number = lock.take_gpu(sys.argv[3:], sys.argv[1], held, f"evaluating {sys.argv[2]}")
        print(f"on {number}", flush=True)
        sys.stdin.read()

main_guard(main)
"""


class Evaluation:
    """A process that takes one of the GPUs, and has it until it is ended."""

    def __init__(self, name: str, gpus: list[str], if_busy: str = "wait") -> None:
        command = [sys.executable, "-c", EVALUATION, if_busy, name, *gpus]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        self.says = f"process {self.process.pid} on "

    def line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().rstrip("\n")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def gpus() -> Iterator[list[str]]:
    """Two that no other process knows."""
    uuids = [f"test-{uuid4()}" for _ in range(2)]
    yield uuids
    for uuid in uuids:
        lock.of_gpu(uuid).unlink(missing_ok=True)


@pytest.fixture
def start() -> Iterator[Any]:
    started: list[Evaluation] = []

    def start(*arguments: Any) -> Evaluation:
        started.append(Evaluation(*arguments))
        return started[-1]

    yield start
    for evaluation in started:
        evaluation.end()


def test_an_evaluation_takes_a_free_gpu_and_waits_when_there_is_none(gpus: list[str], start: Any) -> None:
    with ExitStack() as training:
        training.enter_context(lock.hold(lock.of_gpu(gpus[0]), doing="training tiny"))
        on_the_other = start("best", gpus)
        assert on_the_other.line() == "on 1"
        waiting = start("latest", gpus)
        told = waiting.line()
        assert told.startswith(f"{lock.WAITING}GPU {gpus[0]} is in use by process ")
        assert "(training tiny); GPU" in told
        assert f"GPU {gpus[1]} is in use by {on_the_other.says}" in told and told.endswith("(evaluating best)")
        on_the_other.end()  # SIGKILL
        assert waiting.line() == "on 1"
        next_one = start("epoch_00001", gpus)
        assert f"GPU {gpus[1]} is in use by {waiting.says}" in next_one.line()
    assert next_one.line() == "on 0", "what the training had"
    assert "(evaluating epoch_00001)" in (lock.holder(lock.of_gpu(gpus[0])) or ""), "for whom a training waits now"


def test_an_evaluation_that_shall_not_wait_is_refused_or_goes_to_the_cpu(gpus: list[str], start: Any) -> None:
    with lock.hold(lock.of_gpu(gpus[0]), doing="training tiny"):
        on_the_cpu = start("best", gpus[:1], "cpu")
        told = on_the_cpu.line()
        assert told.startswith(f"WARNING: computing on the CPU, for GPU {gpus[0]} is in use by process ")
        assert on_the_cpu.line() == "on None"
        _, error = (refused := start("best", gpus[:1], "refuse")).process.communicate()
        assert refused.process.returncode == TRY_AGAIN
        assert error.count("\n") == 1 and f"GPU {gpus[0]} is in use by process " in error
    assert start("best", gpus[:1], "refuse").line() == "on 0"


def test_who_waits_for_a_gpu_gives_a_sign_of_life(
    gpus: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_file", None)  # as it was, when the test is over
    holder, file = Evaluation("another", gpus), tmp_path / "heartbeat.json"
    assert holder.line() == "on 0"
    own = heartbeat.Rank.own(None)
    assert own
    heartbeat.begin(file, [own])
    began = file.stat().st_mtime_ns
    with ExitStack() as held, ThreadPoolExecutor() as pool:
        waits = pool.submit(lock.take_gpu, gpus[:1], "wait", held, "a test")
        wait_until(lambda: file.stat().st_mtime_ns > began, "a heartbeat")
        holder.end()
        assert waits.result() == 0


DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return %(error)d; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int number) { *device = 7 + number; return 0; }
int cuDeviceGetUuid(unsigned char *uuid, int device) {
    for (int i = 0; i < 16; i++) uuid[i] = 16 * device + i;
    return 0;
}
"""


def gpus_of_driver(folder: Path, error: int) -> str:
    """What a process sees with a driver that has two GPUs, or whose start fails."""
    subprocess.run(
        ["gcc", "-shared", "-x", "c", "-", "-o", folder / "libcuda.so.1"],
        input=DRIVER % {"error": error},
        text=True,
        check=True,
    )
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-m", "gpt2core.cuda_driver"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout


@pytest.mark.skipif(not shutil.which("gcc"), reason="builds a stand-in of the CUDA driver with gcc")
def test_gpus_are_known_by_their_uuids_without_torch(tmp_path: Path) -> None:
    assert gpus_of_driver(tmp_path, error=0).split() == [
        "70717273-7475-7677-7879-7a7b7c7d7e7f",
        "80818283-8485-8687-8889-8a8b8c8d8e8f",
    ]
    assert gpus_of_driver(tmp_path, error=100).split() == []  # CUDA_ERROR_NO_DEVICE


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch's own answer is what is compared")
def test_torch_sees_the_same_gpus() -> None:
    assert visible_gpus() == [
        str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(torch.cuda.device_count())
    ]
