"""A run's pages in TensorBoard, as its own server answers for them."""

from __future__ import annotations

import json
import os
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

from gpt2core.board import FRONT_PAGE, LIVE_METRICS, Board, write_evaluations
from gpt2core.config import RunConfig
from gpt2core.records import Evaluation, HellaSwagScore
from gpt2core.run_folder import RunFolder

pytestmark = pytest.mark.slow  # starts trainers and TensorBoard

RUN, BY_TOKENS, OF_CHECKPOINTS = "tiny/tensorboard", "tiny/tensorboard/over_tokens", "tiny/tensorboard/evaluation"
TOKENS_PER_STEP = 256


def measured(step: int, val_loss: float, acc_norm: float) -> Evaluation:
    score = HellaSwagScore(source="x", examples=100, acc=0.3, acc_stderr=0.04, acc_norm=acc_norm, acc_norm_stderr=0.05)
    return Evaluation(
        run_name="tiny",
        checkpoint=f"rolling_step_{step:06d}",
        sha256=None,
        step=step,
        epoch=1,
        val_loss=val_loss,
        perplexity=1.0,
        val_tokens=64,
        val_fingerprint="",
        hellaswag=score,
        duration_s=1.0,
        measured_at="2026-11-23T08:00:00+00:00",
    )


@pytest.fixture(scope="module")
def killed_and_resumed(lab: Any) -> Path:
    """A run that was killed in the middle of an epoch, and went on to its end."""
    changes = {"hellaswag_freq": 12, "hellaswag": lab.examples(3), "checkpoint_freq": 4, "eval_freq": 3}
    flags = [*lab.flags(lab.root / "board", **changes), "--resume", "latest"]
    run = lab.root / "board" / "tiny"
    with lab.started(run, flags) as trainer:
        trainer.wait_for_step(15)
        os.kill(trainer.process.pid, signal.SIGKILL)
        trainer.wait()
    lab.train(flags)
    return run


def scalars(multiplexer: EventMultiplexer, run: str, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in multiplexer.Scalars(run, tag)]


def test_curves_go_on_after_a_kill_with_each_point_once(killed_and_resumed: Path, lab: Any) -> None:
    found = EventMultiplexer(size_guidance={"scalars": 0}).AddRunsFromDirectory(str(killed_and_resumed.parent))
    found.Reload()
    steps = list(range(1, lab.max_steps + 1))
    for tag, name in [("loss/train", "loss"), ("loss/val", "val_loss"), ("hellaswag/acc_norm", "acc_norm")]:
        logged = lab.logged(killed_and_resumed, name)
        points = scalars(found, RUN, tag)
        assert [step for step, _ in points] == sorted(logged)
        assert dict(points) == pytest.approx(logged, rel=1e-6)
        by_tokens = scalars(found, BY_TOKENS, f"over_tokens/{tag.replace('/', '_')}")
        assert by_tokens == [(step * TOKENS_PER_STEP, value) for step, value in points]
    for tag in ("train/grad_norm", "speed/data_wait_ms", "speed/step_ms_p50", "speed/step_ms_p99"):
        assert [step for step, _ in scalars(found, RUN, tag)] == steps, tag
    errors = dict(scalars(found, RUN, "hellaswag/acc_norm_stderr"))
    upper = dict(scalars(found, RUN, "hellaswag/acc_norm_upper"))
    for step, value in scalars(found, RUN, "hellaswag/acc_norm"):
        assert upper[step] == pytest.approx(value + errors[step], rel=1e-5)


def test_evaluations_show_in_the_order_of_their_steps_each_once(tmp_path: Path) -> None:
    """To a reader that was there before, too: it is what `tensorboard --load_fast=false` reads with."""
    folder = RunFolder(tmp_path, "tiny")
    write_evaluations(folder.tensorboard, [measured(20, 3.0, 0.26), measured(40, 2.5, 0.28)])
    reading = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    reading.Reload()
    assert [step for step, _ in scalars(reading, OF_CHECKPOINTS, "loss/val")] == [20, 40]
    write_evaluations(folder.tensorboard, [measured(40, 2.5, 0.28), measured(20, 2.9, 0.27), measured(10, 3.5, 0.25)])
    for found in (reading, EventMultiplexer().AddRunsFromDirectory(str(tmp_path))):
        found.Reload()
        points = scalars(found, OF_CHECKPOINTS, "loss/val")
        assert [step for step, _ in points] == [10, 20, 40]
        assert [value for _, value in points] == pytest.approx([3.5, 2.9, 2.5])
        assert [step for step, _ in scalars(found, OF_CHECKPOINTS, "hellaswag/acc_norm_lower")] == [10, 20, 40]


def test_a_sample_has_the_lines_of_its_text(tmp_path: Path) -> None:
    board = Board(tmp_path, RunConfig(), resume_at=0)
    board.samples(1, ["one\u2028and\r\ntwo\r\x85\n"])
    board.close()
    found = EventMultiplexer().AddRunsFromDirectory(str(tmp_path))
    found.Reload()
    (event,) = found.Tensors(".", "sample/1/text_summary")
    assert event.tensor_proto.string_val[0].decode() == "    one\u2028and\n    two\n    \x85\n    "


@pytest.fixture(scope="module")
def answer(killed_and_resumed: Path, lab: Any) -> Iterator[Callable[[str], Any]]:
    """What `gpt2 tensorboard` answers to a path below /data."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    artifacts = killed_and_resumed.parent
    words = ["tensorboard", "--artifacts_dir", str(artifacts), "--port", str(port)]
    with lab.started(killed_and_resumed, words, module="gpt2core.cli") as board:

        def ask(path: str, body: dict[str, Any] | None = None) -> Any:
            data = None if body is None else json.dumps(body).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/data/{path}", data, {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.load(reply)

        def loaded() -> bool:
            try:
                return "loss/train" in ask("plugin/scalars/tags").get(RUN, {})
            except (urllib.error.URLError, ConnectionError):
                return False

        board.wait_for(loaded, "TensorBoard to show the run")
        assert f"ssh -N -L {port}:127.0.0.1:{port}" in board.output and f":{port}/#custom_scalars" in board.output
        yield ask
        for pid in board.children():
            os.kill(pid, signal.SIGTERM)


def test_the_hparams_page_has_the_run_with_its_settings_and_final_metrics(
    answer: Any, killed_and_resumed: Path
) -> None:
    experiment = answer("plugin/hparams/experiment", {"experimentName": ""})
    assert {info["name"] for info in experiment["hparamInfos"]} >= {"train.max_lr", "model.num_layers", "data.data_dir"}
    metrics = [info["name"]["tag"] for info in experiment["metricInfos"]]
    assert metrics == [*LIVE_METRICS, "final/loss", "final/val_loss", "final/best_val_loss"]
    asked = {
        "experimentName": "",
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
        "colParams": [{"metric": {"tag": tag, "group": ""}} for tag in metrics],
        "startIndex": 0,
        "sliceSize": 10,
    }
    (group,) = answer("plugin/hparams/session_groups", asked)["sessionGroups"]
    assert group["hparams"]["train.max_lr"] == 1e-3
    values = {value["name"]["tag"]: value["value"] for value in group["metricValues"]}
    lines = [json.loads(line) for line in (killed_and_resumed / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for line in lines for name, value in line.items()}
    assert values["loss/train"] == values["final/loss"] == pytest.approx(last["loss"], rel=1e-6)
    assert values["final/val_loss"] == pytest.approx(last["val_loss"], rel=1e-6)
    assert values["hellaswag/acc_norm"] == pytest.approx(last["acc_norm"], rel=1e-6)
    assert all(session["status"] == "STATUS_SUCCESS" for session in group["sessions"])


def test_the_front_page_has_its_charts_and_each_finds_its_curves(answer: Any) -> None:
    layout = answer("plugin/custom_scalars/layout")
    charts = {chart["title"]: chart for category in layout["category"] for chart in category["chart"]}
    assert [category["title"] for category in layout["category"]] == list(FRONT_PAGE)
    assert charts.keys() == {title for charts in FRONT_PAGE.values() for title in charts}
    known = answer("plugin/scalars/tags")
    tags = {tag for run in (RUN, BY_TOKENS) for tag in known[run]}
    series = charts["HellaSwag acc_norm, with its standard error"]["margin"]["series"][0]
    shown = {*series.values()}
    for title, chart in charts.items():
        if "multiline" in chart and "MFU" not in title:  # whose peak is known of GPUs only
            shown |= set(chart["multiline"]["tag"])
    assert shown <= tags


def test_an_older_step_of_an_attempt_that_died_is_not_shown_by_the_server(answer: Any, lab: Any) -> None:
    """The server reads events with a reader of its own."""
    points = answer(f"plugin/scalars/scalars?run={RUN}&tag=loss%2Ftrain")
    assert [step for _, step, _ in points] == list(range(1, lab.max_steps + 1))
