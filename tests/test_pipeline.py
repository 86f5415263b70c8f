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
import yaml
from prefect.exceptions import PrefectHTTPStatusError

from gpt2core.config import RECIPES, DataConfig, EvalConfig, LaunchConfig, ModelConfig, TrainConfig
from gpt2core.flags import read_config
from tasks.train_epoch import next_epoch

ROOT = Path(__file__).parents[1]


def tiny(lab: Any, folder: Path, **changes: Any) -> dict[str, Any]:
    """Parameters of a pipeline that takes seconds, with everything it writes in this folder."""
    own = {"source": str(lab.source), "shard_size": 32_768, "data_dir": str(folder / "data")}
    return lab.parameters(folder / "artifacts", **own, hellaswag=str(lab.examples(8)), **changes)


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


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """With a Prefect of this module's own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    return kept | {"PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")), "COLUMNS": "200"}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_pipeline_survives_a_killed_rank_and_a_second_run_skips_what_is_done(
    lab, tmp_path, environment, straight_two_ranks
):
    command = [sys.executable, "-m", "flows.pretrain", *flags(tiny(lab, tmp_path))]
    run = tmp_path / "artifacts" / "tiny"
    pipeline = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    wait_for(lambda: logged_step(run / "metrics.jsonl", 7), pipeline, 200)
    os.kill(wait_for(lambda: rank_process(str(run), 1), pipeline), signal.SIGKILL)
    output, _ = pipeline.communicate(timeout=300)
    assert pipeline.returncode == 0, output
    assert "resumed from" in output
    assert "promoted" in output
    assert "acc_norm" in output
    lab.assert_same_end(run, straight_two_ranks)
    assert (run / "reports" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "artifacts" / "best" / "model.safetensors").exists()
    evaluated = json.loads((run / "evaluations" / "step_000024.json").read_text())
    assert evaluated["hellaswag"]["examples"] == 8

    before = (run / "checkpoints" / "latest.pt").stat().st_ino
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
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
def test_what_no_retry_can_cure_fails_at_once_with_a_sentence(lab, tmp_path, environment, wrong, sentence):
    failed = subprocess.run(
        [sys.executable, "-m", "flows.pretrain", *flags(tiny(lab, tmp_path) | wrong)],
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
def test_deployments_run_on_a_worker_and_misspelt_parameters_are_refused(lab, tmp_path, orchestration):
    listed = orchestration.prefect("deployment", "ls").stdout
    for entry in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]:
        flow = entry["entrypoint"].split(".")[-1].replace("_", "-")
        assert f"{flow}/{entry['name']}" in listed

    refused = orchestration.prefect("deployment", "run", "pretrain/demo", "--param", "trian={}")
    assert refused.returncode != 0
    assert "trian" in refused.stdout + refused.stderr
    for wrong, named in [({"max_rl": 1}, "max_rl"), ({"max_lr": -1}, "max_lr")]:
        with pytest.raises(PrefectHTTPStatusError, match=named):
            orchestration.start_run("pretrain/demo", {"train": wrong})

    by_acc_norm = {"rule": "acc_norm", "margin": 0.0}
    training = tiny(lab, tmp_path, steps_per_epoch=2) | {"launch": {"nproc_per_node": 1}}
    parameters = training | {"promotion": by_acc_norm}
    words = [word for name, value in parameters.items() for word in ("--param", f"{name}={json.dumps(value)}")]
    started = orchestration.prefect("deployment", "run", "pretrain/demo", *words)
    assert started.returncode == 0, started.stdout + started.stderr
    worked = orchestration.prefect("worker", "start", "--pool", "local", "--run-once")
    assert "Finished in state Completed" in worked.stdout + worked.stderr, worked.stdout + worked.stderr
    assert (tmp_path / "artifacts/best/model.safetensors").exists()
    assert json.loads((tmp_path / "artifacts/best/promotion.json").read_text())["rule"] == "acc_norm"

    run = {"run_name": "tiny", "artifacts_dir": str(tmp_path / "artifacts")}
    single = {
        deployment: orchestration.start_run(deployment, parameters)
        for deployment, parameters in [
            ("evaluate/checkpoint", run | {"checkpoint": "epoch_00001", "force": True, "device": "cpu"}),
            ("evaluate/nightly", run | {"run_name": "not_begun", "if_there": True}),
            ("promote/best", run | by_acc_norm | {"publish_to": str(tmp_path / "published")}),
            ("report/run", run),
            ("train-epoch/gpt2-124m", training | {"epoch": 2}),
        ]
    }
    changed = training | {"train": training["train"] | {"max_lr": 2e-3}}
    refused_run = orchestration.start_run("train-epoch/gpt2-124m", changed)
    worked = orchestration.prefect("worker", "start", "--pool", "local", "--run-once")
    for deployment, run_id in single.items():
        assert orchestration.state(run_id) == "Completed", f"{deployment}: {worked.stdout}{worked.stderr}"
    published = json.loads((tmp_path / "published/best.json").read_text())
    assert (tmp_path / "published" / published["folder"] / "model.safetensors").exists()
    state = orchestration.run(refused_run).state
    assert state.name == "Failed"
    assert "holds a run with other settings (train.max_lr: 0.001 -> 0.002)" in state.message


def test_an_epoch_is_trained_when_those_before_it_are_done(lab, straight, first_epoch):
    of_runs = [read_config(run / "config.json") for run in (straight, first_epoch)]
    assert [next_epoch(config, None) for config in of_runs] == [2, 2]
    assert [next_epoch(config, 1) for config in of_runs] == [1, 1]
    with pytest.raises(ValueError, match="epoch 3 cannot be trained now: the run has 2 epochs"):
        next_epoch(of_runs[0], 3)
    begun = of_runs[1].model_copy(update={"run_name": "not_begun"})
    with pytest.raises(ValueError, match="epoch 2 cannot be trained now: epoch 1 comes first"):
        next_epoch(begun, 2)


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
