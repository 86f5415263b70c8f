"""Preparation under Prefect: one task run a file, on any task runner, with the same bytes as without."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import TaskRun
from prefect.settings import PREFECT_API_URL
from prefect.testing.utilities import prefect_test_harness

from flows.prepare_dataset import prepare_dataset, tokenize_files
from gpt2core.config import DataConfig, RunnerConfig
from gpt2core.prepare import begin, prepare
from gpt2core.records import Stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

REPOSITORY = Path(__file__).parents[1]
SHAKESPEARE = REPOSITORY / "data" / "sample" / "tinyshakespeare.txt"
FILES = 3


@pytest.fixture(scope="module", autouse=True)
def prefect_server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    text = SHAKESPEARE.read_text(encoding="utf-8")
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(FILES):
        rows = [
            json.dumps({"text": text[at : at + 2000]}) for at in range(20_000 * number, 20_000 * (number + 1), 2000)
        ]
        (folder / f"part-{number}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder


def config(folder: Path, corpus: Path) -> DataConfig:
    return DataConfig(data_dir=str(folder), source=f"{corpus}/*.jsonl", shard_size=2048)


def shards_and_manifest(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def tokenize_runs(folder: Path) -> dict[str, TaskRun]:
    """The task runs of the files of this folder, by name."""
    with get_client(sync_client=True) as client:
        flow_runs = {run.id for run in client.read_flow_runs() if run.name == f"tokenize-files ({folder})"}
        return {run.name: run for run in client.read_task_runs() if run.flow_run_id in flow_runs}


@pytest.mark.parametrize("runner", ["threads", "processes", "dask"])
def test_each_file_is_a_task_run_and_the_bytes_are_the_same(tmp_path: Path, corpus: Path, runner: str) -> None:
    prepare(config(tmp_path / "alone", corpus), lambda line: None)
    folder = tmp_path / "flow"
    stage = prepare_dataset(config(folder, corpus), RunnerConfig(task_runner=runner, files_at_once=2))
    assert isinstance(stage, Stage) and "tokens of 30 documents" in stage.note
    assert shards_and_manifest(folder) == shards_and_manifest(tmp_path / "alone")
    runs = tokenize_runs(folder)
    assert sorted(runs) == [f"tokenize part-{number}.jsonl" for number in range(FILES)]
    assert all(run.state and run.state.is_completed() for run in runs.values())
    with get_client(sync_client=True) as client:
        artifacts = [artifact for artifact in client.read_artifacts() if str(folder) in (artifact.description or "")]
        (table,) = [artifact for artifact in artifacts if artifact.type == "table"]
        assert [row["documents"] for row in json.loads(table.data)] == [10] * FILES
        bars = [artifact for artifact in client.read_artifacts() if artifact.type == "progress"]
        assert {run.id for run in runs.values()} <= {artifact.task_run_id for artifact in bars}
        assert {artifact.data for artifact in bars} == {100.0}

    again = prepare_dataset(config(folder, corpus), RunnerConfig())
    assert isinstance(again, Stage) and again.note.startswith("done before: ")
    assert tokenize_runs(folder).keys() == runs.keys()


def test_a_file_refused_fails_alone_and_at_once(tmp_path: Path, corpus: Path) -> None:
    (corpus / "part-1.jsonl").write_text('{"text": 1}\n')
    with pytest.raises(ValueError, match=r"part-1\.jsonl, line 1: column 'text' holds int and not text"):
        prepare_dataset(config(tmp_path / "flow", corpus))
    runs = tokenize_runs(tmp_path / "flow")
    states = {name: (run.state.type.value, run.run_count) for name, run in runs.items() if run.state}
    assert states == {
        "tokenize part-0.jsonl": ("COMPLETED", 1),
        "tokenize part-1.jsonl": ("FAILED", 1),
        "tokenize part-2.jsonl": ("COMPLETED", 1),
    }


def test_a_file_that_went_away_and_came_back_is_retried(tmp_path: Path, corpus: Path) -> None:
    data = config(tmp_path / "flow", corpus)
    plan = begin(data)
    assert plan
    files = [file.url for file in plan.files]
    away, over = tmp_path / "away", threading.Event()
    (corpus / "part-1.jsonl").rename(away)

    def bring_back_after_the_first_attempt() -> None:
        while not over.wait(0.2):
            run = tokenize_runs(tmp_path / "flow").get("tokenize part-1.jsonl")
            if run and run.state and run.state.name == "AwaitingRetry":
                away.replace(corpus / "part-1.jsonl")
                return

    thread = threading.Thread(target=bring_back_after_the_first_attempt)
    thread.start()
    try:
        tokenize_files(data, files)
    finally:
        over.set()
        thread.join()
    counts = {name: run.run_count for name, run in tokenize_runs(tmp_path / "flow").items()}
    assert counts == {"tokenize part-0.jsonl": 1, "tokenize part-1.jsonl": 2, "tokenize part-2.jsonl": 1}


@pytest.mark.parametrize("runner", ["threads", "processes"])
def test_a_cancel_in_the_middle_of_a_file_ends_the_flow_and_its_processes(
    lab: Any, tmp_path: Path, corpus: Path, runner: str
) -> None:
    row = json.dumps({"text": SHAKESPEARE.read_text(encoding="utf-8")[:100_000]}) + "\n"
    for path in corpus.iterdir():
        path.write_text(row * 1500, encoding="utf-8")  # minutes of work in all
    folder = tmp_path / "flow"
    code = (
        f"from flows.prepare_dataset import *; "
        f"prepare_dataset(DataConfig(data_dir={str(folder)!r}, source={str(corpus)!r}), "
        f"RunnerConfig(task_runner={runner!r}))"
    )
    environment = lab.environment() | {"PREFECT_API_URL": PREFECT_API_URL.value()}
    processes: list[int] = []
    with (tmp_path / "output").open("wb") as output:
        flow = subprocess.Popen(
            [sys.executable, "-c", code], cwd=REPOSITORY, env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        lab.wait_until(lambda: list((folder / ".parts").glob("*.tokens")), "the first part")
        processes = lab.descendants(flow.pid)
        assert processes
        flow.send_signal(signal.SIGTERM)
        flow.wait(60)
        lab.wait_until(lambda: not any(lab.is_alive(pid) for pid in processes), "its processes to end")
        assert len(list((folder / ".parts").glob("*.tokens"))) < 12  # of 15: they ended, and not because they were done
    finally:
        for pid in [flow.pid, *processes, *lab.descendants(flow.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        flow.wait()


IDLE_POOL = """
import os, signal
from prefect import flow, task
from flows.task_runners import task_runner
from gpt2core.config import RunnerConfig

@task
def own_pid():
    return os.getpid()

@flow(task_runner=task_runner(RunnerConfig(task_runner="processes"), 1))
def wait_with_an_idle_process():
    print(f"idle: {own_pid.submit().result()}", flush=True)
    signal.pause()

if __name__ == "__main__":
    wait_with_an_idle_process()
"""


def test_an_idle_process_of_the_pool_ends_with_a_killed_flow(lab: Any, tmp_path: Path) -> None:
    environment = lab.environment() | {"PREFECT_API_URL": PREFECT_API_URL.value()}
    pid = None
    with subprocess.Popen(
        [sys.executable, "-c", IDLE_POOL], cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, text=True
    ) as flow:
        try:
            assert flow.stdout
            pid = next(int(line.split()[1]) for line in flow.stdout if line.startswith("idle: "))
            assert lab.is_alive(pid)
            flow.kill()
            flow.wait()
            lab.wait_until(lambda: not lab.is_alive(pid), "the idle process to end", 30)
        finally:
            flow.kill()
            if pid and lab.is_alive(pid):
                os.kill(pid, signal.SIGKILL)
