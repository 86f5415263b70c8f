"""What Prefect costs: the demo's two epochs on a server and worker, and the same processes one after the other without.

python tests/benchmarks/orchestration.py [--repeat 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import datetime
from pathlib import Path

from gpt2core import launch
from gpt2core.config import RECIPES, RunConfig
from gpt2core.flags import as_flags

ROOT = Path(__file__).resolve().parents[2]
PORT, TENSORBOARD_PORT = 4297, 6097
NPROC = 2
EPOCHS = RECIPES["demo"].train.num_epochs
API = f"http://127.0.0.1:{PORT}/api"


def demo(folder: Path) -> RunConfig:
    recipe = RECIPES["demo"]
    data = recipe.data.model_copy(update={"data_dir": str(folder / "data")})
    return recipe.model_copy(update={"artifacts_dir": str(folder / "artifacts"), "data": data})


def without_prefect(config: RunConfig) -> float:
    """The processes that the tasks start, started here; returns seconds."""
    file = Path(config.artifacts_dir) / "demo_config.json"
    file.parent.mkdir(parents=True)
    file.write_text(config.model_dump_json())
    run = ["--artifacts_dir", config.artifacts_dir, "--run_name", config.run_name]
    stages: list[tuple[str, list[str], list[str]]] = [("prepare", as_flags(config.data), [])]
    for epoch in range(1, config.train.num_epochs + 1):
        train = ["--config", str(file), "--resume", "latest", "--stop_epoch", str(epoch)]
        stages.append(("train", train, ["--standalone", f"--nproc_per_node={NPROC}"]))
        stages.append(("evaluate", [*run, "--checkpoint", f"epoch_{epoch:05d}", "--device", "cpu"], []))
        stages.append(("promote", run, []))
    started = time.perf_counter()
    for module, arguments, torchrun_flags in stages:
        nproc = NPROC if torchrun_flags else 1
        command = launch.python_command(f"gpt2core.{module}", arguments, torchrun_flags)
        assert launch.run(command, lambda line: None, nproc) == 0, command
    return time.perf_counter() - started


def with_prefect(config: RunConfig) -> tuple[float, float]:
    """Seconds from the flow's start to its end, and from the request to the start."""
    given = {
        "artifacts_dir": config.artifacts_dir,
        "data": config.data.model_dump(),
        "launch": {"nproc_per_node": NPROC},
    }
    words = [word for name, value in given.items() for word in ("--param", f"{name}={json.dumps(value)}")]
    command = [sys.executable, "-m", "prefect", "deployment", "run", "pretrain/demo", *words, "--watch"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PREFECT_API_URL": API}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    query = json.dumps({"flows": {"name": {"any_": ["pretrain"]}}, "sort": "START_TIME_DESC", "limit": 1}).encode()
    request = urllib.request.Request(f"{API}/flow_runs/filter", query, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        (run,) = json.load(answer)
    assert run["state_type"] == "COMPLETED", run["state"]
    asked, began, ended = (datetime.fromisoformat(run[name]) for name in ("created", "start_time", "end_time"))
    return (ended - began).total_seconds(), (began - asked).total_seconds()


def seconds_in_stages(folder: Path) -> float:
    """What the tasks themselves took, their processes included."""
    stages = (folder / "artifacts" / "demo" / "reports" / "stages.jsonl").read_text().splitlines()
    return sum(json.loads(stage)["duration_s"] for stage in stages)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=2)
    repeat = parser.parse_args().repeat
    os.chdir(ROOT)  # the recipe's paths
    with tempfile.TemporaryDirectory(prefix="orchestration_") as name:
        folder = Path(name)
        os.environ["PREFECT_HOME"] = str(folder / "prefect")
        services = [sys.executable, "-m", "flows.services"]
        flags = ["--port", str(PORT), "--tensorboard_port", str(TENSORBOARD_PORT), "--state_dir", str(folder / "state")]
        subprocess.run([*services, "up", *flags], check=True)
        try:
            differences = []
            for number in range(repeat):
                bare = without_prefect(demo(folder / f"bare{number}"))
                flow, waited = with_prefect(demo(folder / f"flow{number}"))
                in_stages = seconds_in_stages(folder / f"flow{number}")
                differences.append((flow - bare) / EPOCHS)
                print(
                    f"without Prefect {bare:.1f} s, with it {flow:.1f} s: {differences[-1]:.1f} s an epoch; "
                    f"{(flow - in_stages) / EPOCHS:.1f} s an epoch between the stages; "
                    f"{waited:.1f} s from the request to the start",
                    flush=True,
                )
            print(f"median {statistics.median(differences):.1f} s an epoch")
        finally:
            subprocess.run([*services, "down", *flags], check=True)


if __name__ == "__main__":
    main()
