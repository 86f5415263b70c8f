"""The whole pipeline: real flows, a real server and worker, real kills."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from gpt2core.config import RECIPES, DataConfig, EvalConfig, LaunchConfig, ModelConfig, TrainConfig

ROOT = Path(__file__).parents[1]

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


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_deployments_run_on_a_worker_and_misspelt_parameters_are_refused(tmp_path, orchestration):
    listed = orchestration.prefect("deployment", "ls").stdout
    for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        flow = entry["entrypoint"].split(".")[-1].replace("_", "-")
        assert f"{flow}/{entry['name']}" in listed

    for wrong, named in [("trian={}", "trian"), ('train={"max_rl": 1}', "max_rl"), ('train={"max_lr": -1}', "max_lr")]:
        refused = orchestration.prefect("deployment", "run", "pretrain/demo", "--param", wrong)
        assert refused.returncode != 0
        assert named in refused.stdout + refused.stderr

    by_acc_norm = {"rule": "acc_norm", "margin": 0.0}
    parameters = tiny(tmp_path) | {"promotion": by_acc_norm}
    words = [word for name, value in parameters.items() for word in ("--param", f"{name}={json.dumps(value)}")]
    started = orchestration.prefect("deployment", "run", "pretrain/demo", *words)
    assert started.returncode == 0, started.stdout + started.stderr
    worked = orchestration.prefect("worker", "start", "--pool", "local", "--run-once")
    assert "Finished in state Completed" in worked.stdout + worked.stderr, worked.stdout + worked.stderr
    assert (tmp_path / "artifacts/best/model.safetensors").exists()
    assert json.loads((tmp_path / "artifacts/best/promotion.json").read_text())["rule"] == "acc_norm"

    run = {"run_name": "tiny", "artifacts_dir": str(tmp_path / "artifacts")}
    training = {name: value for name, value in tiny(tmp_path).items() if name != "runner"}
    single = {
        deployment: orchestration.start_run(deployment, parameters)
        for deployment, parameters in [
            ("evaluate/checkpoint", run | {"checkpoint": "epoch_00001", "force": True, "device": "cpu"}),
            ("evaluate/nightly", run | {"run_name": "not_begun", "if_there": True}),
            ("promote/best", run | by_acc_norm | {"publish_to": str(tmp_path / "published")}),
            ("report/run", run),
            ("train/gpt2-124m", training | {"stop_epoch": 1}),
            ("train-epoch/gpt2-124m", training | {"epoch": 2}),
            ("prepare-dataset/fineweb-edu", {"data": tiny(tmp_path)["data"]}),
        ]
    }
    changed = training | {"train": training["train"] | {"max_lr": 2e-3}}
    refused_run = orchestration.start_run("train-epoch/gpt2-124m", changed)
    too_late = orchestration.start_run("train-epoch/gpt2-124m", training | {"epoch": 3})
    worked = orchestration.prefect("worker", "start", "--pool", "local", "--run-once")
    for deployment, run_id in single.items():
        assert orchestration.state(run_id) == "Completed", f"{deployment}: {worked.stdout}{worked.stderr}"
    published = json.loads((tmp_path / "published/best.json").read_text())
    assert (tmp_path / "published" / published["folder"] / "model.safetensors").exists()
    for run_id, sentence in [
        (refused_run, "holds a run with other settings (train.max_lr: 0.001 -> 0.002)"),
        (too_late, "epoch 3 cannot be trained now: the run has 2 epochs"),
    ]:
        state = orchestration.run(run_id).state
        assert state.name == "Failed" and sentence in state.message


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
