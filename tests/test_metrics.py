"""The logs of a run: what a resume drops, and what an evaluation beside a running trainer leaves alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from gpt2core.board import histogram
from gpt2core.metrics import MetricsLog
from gpt2core.run_folder import RunFolder
from gpt2core.status import print_status


def steps(folder: RunFolder) -> list[int]:
    return [line["step"] for line in folder.metrics()]


def test_an_evaluation_beside_a_running_trainer_loses_none_of_its_lines(tmp_path):
    folder = RunFolder(tmp_path, "run")
    trainer = MetricsLog(folder, resume_at=0)
    trainer.numbers(1, loss=3.0)
    evaluation = MetricsLog(folder, resume_at=None)
    evaluation.numbers(1, val_loss=3.5)
    evaluation.close()
    trainer.numbers(2, loss=2.0)
    trainer.close()
    assert steps(folder) == [1, 1, 2]


def test_a_resume_drops_what_was_logged_beyond_its_checkpoint_and_what_was_cut_short(tmp_path):
    folder = RunFolder(tmp_path, "run")
    folder.path.mkdir()
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    folder.metrics_file.write_text("\n".join(lines) + '\n{"step": 4, "lo', encoding="utf-8")
    log = MetricsLog(folder, resume_at=2)
    log.numbers(3, loss=0.5)
    log.close()
    assert [(line["step"], line["loss"]) for line in folder.metrics()] == [(1, 1.0), (2, 1.0), (3, 0.5)]


def test_a_run_that_starts_afresh_after_a_crash_has_step_0_once(tmp_path):
    folder = RunFolder(tmp_path, "run")
    for val_loss in (10.8, 10.9):  # the first died before its first checkpoint
        log = MetricsLog(folder, resume_at=0)
        log.numbers(0, val_loss=val_loss)
        log.numbers(1, loss=10.0)
        log.close()
    assert [line.get("val_loss") for line in folder.metrics()] == [10.9, None]


def test_status_shows_the_newest_step_and_takes_the_promoted_model_for_no_run(tmp_path, capsys):
    from gpt2core.config import RECIPES

    folder = RunFolder(tmp_path, "demo")
    folder.claim(RECIPES["demo"])
    Path(folder.checkpoints).mkdir()
    lines = [
        {"step": 80, "loss": 6.1},
        {"step": 40, "val_loss": 6.5},
    ]  # an evaluation of an older checkpoint came later
    folder.metrics_file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"]}', encoding="utf-8")
    (tmp_path / "best" / "model.safetensors").touch()
    print_status(tmp_path)
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "demo" in line and "80" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")][1:4] == ["done", "80", "80"]
    assert "unreadable" not in shown


@pytest.mark.parametrize("kind", ["normal", "constant", "one"])
def test_a_histogram_counts_what_numpy_counts(kind: str) -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 0.02
    values = {"normal": values, "constant": torch.zeros(7), "one": values[:1]}[kind]
    counted = histogram(values)
    assert counted
    low, high, number, total, squares, limits, counts = counted
    exact = values.double().numpy()
    assert (low, high, number) == (exact.min(), exact.max(), len(exact))
    assert total == pytest.approx(exact.sum(), abs=1e-9) and squares == pytest.approx((exact**2).sum(), rel=1e-5)
    edges = np.array([min(low, limits[0] - 1), *limits])
    edges[-1] = max(edges[-1], high)
    expected, _ = np.histogram(exact, edges)
    assert sum(counts) == number and len(limits) == len(counts)
    assert np.abs(np.cumsum(counts) - np.cumsum(expected)).max() <= 1, "one on an edge may fall on either side"


def test_a_histogram_of_what_is_not_finite_is_left_out() -> None:
    for bad in (float("nan"), float("inf")):
        assert histogram(torch.tensor([0.0, bad, 1.0])) is None
