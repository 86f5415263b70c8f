"""The whole pipeline: real flows, a real server and worker, real kills."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpt2core.config import RECIPES, DataConfig, EvalConfig, LaunchConfig, ModelConfig, TrainConfig

ROOT = Path(__file__).parents[1]
PREFECT = [sys.executable, "-m", "prefect"]

TINY = {
    "model": {"context_length": 32, "num_layers": 2, "embd_size": 32, "num_heads": 2},
    "data": {"source": str(ROOT / "data/sample/tinyshakespeare.txt"), "shard_size": 32768},
    "train": {
        "total_batch_size": 512,
        "mini_batch_size": 4,
        "warmup_steps": 2,
        "num_epochs": 2,
        "steps_per_epoch": 30,
        "eval_freq": 0,
        "hellaswag_freq": 0,
        "sample_freq": 0,
        "histogram_freq": 0,
        "checkpoint_freq": 5,
        "device": "cpu",
    },
    "evaluation": {"val_tokens": 1024},
}


def tiny(tmp_path: Path, run_name: str = "tiny") -> dict[str, object]:
    """Parameters of a pipeline that takes seconds, with everything it writes under tmp_path."""
    hellaswag = tmp_path / "hellaswag.jsonl"
    sample = (ROOT / "data/sample/hellaswag_sample.jsonl").read_text(encoding="utf-8")
    hellaswag.write_text("".join(sample.splitlines(keepends=True)[:8]), encoding="utf-8")
    return {
        "run_name": run_name,
        "artifacts_dir": str(tmp_path / "artifacts"),
        "model": TINY["model"],
        "data": TINY["data"] | {"data_dir": str(tmp_path / "data")},
        "train": TINY["train"],
        "evaluation": TINY["evaluation"] | {"hellaswag": str(hellaswag)},
        "launch": {"nproc_per_node": 2},
    }


def flags(parameters: dict[str, object]) -> list[str]:
    found: list[str] = []
    for name, value in parameters.items():
        found += flags(value) if isinstance(value, dict) else [f"--{name}", str(value)]
    return found


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str] | None = None, seconds: float = 120) -> Any:
    """What the call returns once it is not None; fails when the deadline or the process ends first."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (found := what()) is not None:
            return found
        assert process is None or process.poll() is None, "the process ended before what was waited for"
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def logged_step(metrics: Path, step: int) -> bool | None:
    return True if metrics.exists() and f'{{"step": {step}, "loss"' in metrics.read_text(encoding="utf-8") else None


def rank_process(run_marker: str, rank: int) -> int | None:
    """Process id of this rank of the trainer whose command line holds the marker."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            is_ours = (
                run_marker in (entry / "cmdline").read_text() and "gpt2core.train" in (entry / "cmdline").read_text()
            )
            if is_ours and f"LOCAL_RANK={rank}" in (entry / "environ").read_text().split("\0"):
                return int(entry.name)
        except OSError:
            continue
    return None


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A Prefect of its own, so that no test sees another's runs."""
    home = tmp_path / "prefect"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return kept | {"PREFECT_HOME": str(home), "COLUMNS": "200"}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_pipeline_survives_a_killed_rank_and_a_second_run_skips_what_is_done(tmp_path, environment):
    parameters = tiny(tmp_path)
    run = tmp_path / "artifacts" / "tiny"
    pipeline = subprocess.Popen(
        [sys.executable, "-m", "flows.pretrain", *flags(parameters)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(lambda: logged_step(run / "metrics.jsonl", 12), pipeline, 200)
    os.kill(wait_for(lambda: rank_process(str(run), 1), pipeline), signal.SIGKILL)
    output, _ = pipeline.communicate(timeout=300)
    assert pipeline.returncode == 0, output
    assert "resumed from" in output
    assert "promoted" in output
    assert "acc_norm" in output

    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").open() if '"loss"' in line]
    assert steps == list(range(1, 61))
    assert (run / "reports" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "artifacts" / "best" / "model.safetensors").exists()
    evaluated = json.loads((run / "evaluations" / "step_000060.json").read_text())
    assert evaluated["hellaswag"]["examples"] == 8

    alone = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            "-m",
            "gpt2core.train",
            *flags(tiny(tmp_path, "alone") | {"launch": {}}),
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert alone.returncode == 0, alone.stderr
    for name in ("model", "optimizer"):
        ours = torch.load(run / "checkpoints/latest.pt", weights_only=True)[name]
        theirs = torch.load(tmp_path / "artifacts/alone/checkpoints/latest.pt", weights_only=True)[name]
        assert repr(ours) == repr(theirs) if name == "optimizer" else all(torch.equal(ours[k], theirs[k]) for k in ours)

    before = (run / "checkpoints" / "latest.pt").stat().st_ino
    again = subprocess.run(
        [sys.executable, "-m", "flows.pretrain", *flags(parameters)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert again.stdout.count("done before") == 5  # the dataset, two epochs and their evaluations
    assert (run / "checkpoints" / "latest.pt").stat().st_ino == before


@pytest.mark.slow
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"mini_batch_size": 3}, "does not divide into mini_batch_size 3"),
        ({"source": "no/such/text.txt"}, "source no/such/text.txt: there is no such file"),
    ],
)
def test_what_no_retry_can_cure_fails_at_once_with_a_sentence(tmp_path, environment, wrong, sentence):
    failed = subprocess.run(
        [sys.executable, "-m", "flows.pretrain", *flags(tiny(tmp_path) | wrong)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert failed.returncode == 1
    assert [line for line in failed.stderr.splitlines() if "error: " in line and sentence in line]
    assert "AwaitingRetry" not in failed.stdout + failed.stderr
    assert not (tmp_path / "artifacts" / "tiny" / "metrics.jsonl").exists()


@pytest.fixture
def server(tmp_path: Path, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """A Prefect server on a free local port; yields the environment of its clients."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path / "server.log").open("w")
    process = subprocess.Popen(
        [*PREFECT, "server", "start", "--host", "127.0.0.1", "--port", str(port)],
        cwd=ROOT,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )
    url = f"http://127.0.0.1:{port}/api"

    def answers() -> bool | None:
        try:
            return urllib.request.urlopen(f"{url}/health", timeout=5).status == 200 or None
        except OSError:
            return None

    try:
        wait_for(answers, process, 120)
        yield environment | {"PREFECT_API_URL": url}
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def prefect(arguments: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*PREFECT, *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_deployments_run_on_a_worker_and_misspelt_parameters_are_refused(tmp_path, server):
    assert prefect(["work-pool", "create", "--type", "process", "local"], server).returncode == 0
    deployed = prefect(["deploy", "--all"], server)
    assert deployed.returncode == 0, deployed.stdout + deployed.stderr
    listed = prefect(["deployment", "ls"], server).stdout
    for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        flow = entry["entrypoint"].split(".")[1].replace("_", "-")
        assert f"{flow}/{entry['name']}" in listed

    for wrong, named in [("trian={}", "trian"), ('train={"max_rl": 1}', "max_rl"), ('train={"max_lr": -1}', "max_lr")]:
        refused = prefect(["deployment", "run", "pretrain/demo", "--param", wrong], server)
        assert refused.returncode != 0
        assert named in refused.stdout + refused.stderr

    parameters = [f"{name}={json.dumps(value)}" for name, value in tiny(tmp_path).items()]
    started = prefect(
        ["deployment", "run", "pretrain/demo", *(word for p in parameters for word in ("--param", p))], server
    )
    assert started.returncode == 0, started.stdout + started.stderr
    worked = prefect(["worker", "start", "--pool", "local", "--run-once"], server)
    assert "Finished in state Completed" in worked.stdout + worked.stderr, worked.stdout + worked.stderr
    assert (tmp_path / "artifacts/best/model.safetensors").exists()

    run = {"run_name": "tiny", "artifacts_dir": str(tmp_path / "artifacts")}
    single = [
        ("evaluate/checkpoint", run | {"checkpoint": "epoch_00001", "force": True, "device": "cpu"}),
        ("promote/best", run),
        ("train/gpt2-124m", tiny(tmp_path) | {"stop_epoch": 1}),
        ("prepare-dataset/fineweb-edu", {"data": tiny(tmp_path)["data"]}),
    ]
    for deployment, given in single:
        words = [word for name, value in given.items() for word in ("--param", f"{name}={json.dumps(value)}")]
        started = prefect(["deployment", "run", deployment, *words], server)
        assert started.returncode == 0, started.stdout + started.stderr
    worked = prefect(["worker", "start", "--pool", "local", "--run-once"], server)
    completed = re.findall(r"Flow run '(\S+).*Finished in state Completed", worked.stdout + worked.stderr)
    assert sorted(completed) == ["evaluate", "prepare-dataset", "promote", "train"], worked.stdout + worked.stderr


def test_the_demo_deployment_is_the_demo_recipe():
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    parameters = next(entry["parameters"] for entry in deployments if entry["name"] == "demo")
    recipe = RECIPES["demo"]
    assert parameters["run_name"] == recipe.run_name
    assert ModelConfig(**parameters["model"]) == recipe.model
    assert DataConfig(**parameters["data"]) == recipe.data
    assert TrainConfig(**parameters["train"]) == recipe.train
    assert EvalConfig(**parameters["evaluation"]) == recipe.evaluation
    assert LaunchConfig(**parameters["launch"]).nproc_per_node == 2


@pytest.mark.parametrize(
    ("folder", "banned"),
    [
        ("gpt2core", "prefect"),
        ("gpt2core", "tasks.train_epoch"),
        ("tasks", "flows.train"),
        ("tasks", "torch"),
        ("flows", "torch"),
    ],
)
def test_the_import_wall_stands(folder, banned):
    linted = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", f"{folder}/probe.py", "-"],
        cwd=ROOT,
        input=f"import {banned}\n",
        capture_output=True,
        text=True,
    )
    assert linted.returncode == 1
    assert "TID251" in linted.stdout
