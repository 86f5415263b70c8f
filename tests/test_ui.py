"""The Prefect UI and TensorBoard as a person sees them, in a real browser: a pipeline in which a rank was killed.

GPT2_IMAGES=docs/images pytest -m soak tests/test_ui.py       makes the pictures of the guide anew
"""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from browser import CHROMIUM, browser
from orchestration import Orchestration, ranks
from test_pipeline import ROOT, logged_step, tiny

pytestmark = [
    pytest.mark.soak,
    pytest.mark.timeout(900),
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]
IMAGES = os.environ.get("GPT2_IMAGES")


@pytest.mark.parametrize("for_the_guide", [bool(IMAGES)])
def test_what_the_browser_shows_of_a_run(
    orchestration: Orchestration, lab: Any, tmp_path: Path, for_the_guide: bool
) -> None:
    name, images, artifacts = "small", tmp_path, tmp_path / "artifacts"
    parameters: dict[str, Any] = tiny(tmp_path, name)
    parameters["train"] = parameters["train"] | {"eval_freq": 5, "hellaswag_freq": 15, "max_lr": 5e-3, "min_lr": 5e-4}
    if for_the_guide:  # no path of this machine in the pictures
        images, artifacts = ROOT / str(IMAGES), ROOT / "artifacts"
        parameters |= {"artifacts_dir": "artifacts"}
        parameters["data"] |= {"source": "data/sample/tinyshakespeare.txt", "data_dir": "data/small"}
        parameters["evaluation"] |= {"hellaswag": "data/sample/hellaswag_sample.jsonl"}
        flags = [f"--{key}={value}" for key, value in parameters["data"].items()]
        assert lab.run("gpt2core.cli", ["prepare", *flags]).returncode == 0
    run = artifacts / name
    run_id = orchestration.start_run("pretrain/demo", parameters)
    ui = orchestration.url.removesuffix("/api")
    with browser() as page:
        orchestration.start_worker()
        orchestration.wait_until(lambda: logged_step(run / "metrics.jsonl", 12), "step 12")
        os.kill(ranks(run)[1], signal.SIGKILL)
        orchestration.wait_until(lambda: artifact_of(orchestration, run_id, "resumes"), "the resume to show")
        orchestration.wait_for_state(run_id, "Completed")

        shown = page.open(f"{ui}/runs/flow-run/{run_id}", "Completed", "Artifacts", "pull step", height=760)
        assert f"pretrain ({name})" in shown
        page.screenshot(images / "run.png")

        names = {one.name for one in tasks_of(orchestration, run_id)}
        assert names >= {f"train-epoch-0000{epoch} ({name})" for epoch in (1, 2)} | {f"promote-best ({name})"}
        epoch = next(one for one in tasks_of(orchestration, run_id) if one.name.startswith("train-epoch-00001"))
        killed, resumed = "the first rank to fail was rank 1: it was killed by SIGKILL", "resuming at step"
        shown = page.open(f"{ui}/runs/task-run/{epoch.id}", killed, resumed, "of=", "eta=", height=900)
        page.scroll_to(killed)
        assert "[rank0]: Traceback" not in shown and "closing signal" not in shown and "train_step" not in shown, (
            "what follows from it is left out"
        )
        page.screenshot(images / "log.png")
        assert "train_step" in (run / "logs" / "output.txt").read_text(), "and kept in the run's folder"

        shown = page.open(f"{ui}/artifacts", f"dashboard-{name}", f"training-{name}", f"resumes-{name}", height=620)
        assert {f"epochs-{name}", f"stages-{name}", f"tensorboard-{name}", "promotions"} <= set(shown.split())
        page.screenshot(images / "artifacts.png")

        dashboard = artifact_of(orchestration, run_id, "dashboard")
        shown = page.open(f"{ui}/artifacts/artifact/{dashboard.id}", "Epochs", "Resumes", "TensorBoard", height=1900)
        assert f"{name}: done, 100%" in shown and "was killed by SIGKILL" in shown
        widths = page.evaluate("[...document.images].map(image => image.naturalWidth)")
        assert [width for width in widths if width == 560] == [560] * 3, "the curves are pictures that load"
        page.screenshot(images / "dashboard.png")

        progress = artifact_of(orchestration, run_id, "training")
        shown = page.open(f"{ui}/artifacts/artifact/{progress.id}", "epoch 2 of 2", height=420)
        assert progress.data == 100.0 and "tokens/s" in shown and "val_loss" in shown
        page.screenshot(images / "progress.png")

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        words = ["tensorboard", "--artifacts_dir", parameters["artifacts_dir"], "--port", str(port)]
        with lab.started(run, words, module="gpt2core.cli") as board:
            board.wait_for(lambda: answers(port), "TensorBoard to answer")
            address = f"http://127.0.0.1:{port}/#custom_scalars"
            page.open(address, "How good", "loss by tokens seen", f"{name}/tensorboard", width=1400)
            page.screenshot(images / "tensorboard.png")
            for pid in board.children():
                os.kill(pid, signal.SIGTERM)


def tasks_of(orchestration: Orchestration, run_id: Any) -> Any:
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    with orchestration.client() as client:
        return client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id])))


def artifact_of(orchestration: Orchestration, run_id: Any, kind: str) -> Any:
    """The newest artifact of this kind that the run made, None while there is none."""
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
    from prefect.client.schemas.sorting import ArtifactSort

    wanted = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]), key=ArtifactFilterKey(like_=f"{kind}-%")
    )
    with orchestration.client() as client:
        return next(iter(client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.CREATED_DESC)), None)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
