"""attempts.json: what counts as progress, who was cut off, and when and why a run was resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2core import attempts
from gpt2core.checkpoint import save
from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.cli import run as gpt2
from gpt2core.run_folder import RunFolder
from tasks import waiting


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path, "tiny")


def save_step(folder: RunFolder, step: int) -> None:
    state = {"format": 1, "step": step, "epoch": 0, "model": {"w": torch.zeros(1)}}
    save(CheckpointFolder(folder.checkpoints), state, names=[], keep=1)


def log_steps(folder: RunFolder, last: int) -> None:
    folder.path.mkdir(exist_ok=True)
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(1, last + 1)]
    folder.metrics_file.write_text("".join(lines))


def fail(folder: RunFolder, error: str, flow_run: str = "a") -> None:
    attempts.begin(folder, flow_run)
    attempts.end(folder, "failed", error)


def test_attempts_without_a_new_checkpoint_are_counted_and_one_with_it_starts_anew(folder: RunFolder) -> None:
    for error in ("first", "second"):
        fail(folder, error)
    assert [attempt.error for attempt in attempts.without_progress(folder, "a")] == ["first", "second"]
    save_step(folder, 5)
    assert attempts.without_progress(folder, "a") == []
    for error in ("third", "fourth", "fifth"):
        fail(folder, error)
    failed = attempts.without_progress(folder, "a")
    assert [(attempt.error, attempt.from_step) for attempt in failed] == [("third", 5), ("fourth", 5), ("fifth", 5)]
    assert attempts.describe(failed).count("from step 5: ") == 3


def test_a_new_flow_run_has_all_its_attempts_before_it(folder: RunFolder) -> None:
    fail(folder, "first", "a")
    assert attempts.without_progress(folder, "b") == []
    fail(folder, "second", "b")
    assert [attempt.error for attempt in attempts.without_progress(folder, "b")] == ["second"]


def test_an_attempt_that_was_stopped_neither_counts_nor_ends_the_row(folder: RunFolder) -> None:
    fail(folder, "first")
    attempts.begin(folder, "a")
    attempts.end(folder, "stopped", "told to")
    fail(folder, "second")
    assert [attempt.error for attempt in attempts.without_progress(folder, "a")] == ["first", "second"]


def test_an_attempt_whose_process_died_is_closed_by_the_next_and_counts(folder: RunFolder) -> None:
    attempts.begin(folder, "a")
    attempts.begin(folder, "a")
    first, second = attempts.read(folder)
    assert (first.outcome, first.error, second.outcome) == ("failed", attempts.CUT_OFF, "running")
    attempts.end(folder, "failed", "crash")
    assert [attempt.error for attempt in attempts.without_progress(folder, "a")] == [attempts.CUT_OFF, "crash"]


def test_a_resume_says_where_why_and_what_was_lost(folder: RunFolder) -> None:
    attempts.begin(folder, "a")
    log_steps(folder, 12)
    save_step(folder, 10)
    attempts.end(folder, "failed", "rank 1 was killed")
    attempts.begin(folder, "a")
    attempts.end(folder, "done")
    attempts.begin(folder, "a")  # the next epoch is no resume
    (resume,) = attempts.resumes(folder)
    assert (resume.step, resume.steps_lost, resume.why) == (10, 2, "rank 1 was killed")


def test_a_damaged_file_is_named_in_one_sentence(folder: RunFolder) -> None:
    folder.path.mkdir()
    folder.attempts_file.write_text('[{"step": 1}]')
    with pytest.raises(ValueError, match=r"attempts\.json does not list attempts as it should"):
        attempts.begin(folder, "a")


def test_status_shows_how_often_and_why_a_run_was_resumed(
    lab: Any, first_epoch: Path, tmp_path: Path, capsys: Any
) -> None:
    run = lab.copy_run(first_epoch, tmp_path)
    folder = RunFolder(tmp_path, run.name)
    fail(folder, "rank 1 was killed by SIGKILL")
    attempts.begin(folder, "a")
    gpt2(["status", "--artifacts_dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert "tiny: resumed 1 time, 0 steps lost in all" in said
    assert "at step 12 (0 lost): rank 1 was killed by SIGKILL" in said


def test_starts_that_bring_nothing_are_counted_and_those_that_bring_something_start_anew(folder: RunFolder) -> None:
    assert [attempts.count_start(folder, "a") for _ in range(3)] == [1, 2, 3]
    assert attempts.count_start(folder, "b") == 1, "another flow run"
    save_step(folder, 5)
    assert [attempts.count_start(folder, "b") for _ in range(2)] == [1, 2]
    folder.evaluations.mkdir()
    (folder.evaluations / "step_000005.json").write_text("{}")
    assert [attempts.count_start(folder, "b") for _ in range(2)] == [1, 2]
    attempts.forget_starts(folder)
    assert attempts.count_start(folder, "b") == 1


def test_a_flow_run_that_is_killed_again_and_again_is_given_up(folder: RunFolder, monkeypatch: Any) -> None:
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", "a")  # Prefect's own way to say it in tests
    for _ in range(waiting.MAX_STARTS):
        attempts.count_start(folder, "a")  # and killed: what follows it in run_held never runs
    with pytest.raises(ValueError, match="killed 10 times in a row"), waiting.run_held(str(folder.path.parent), "tiny"):
        pass
    with waiting.run_held(str(folder.path.parent), "tiny"):
        assert folder.starts_file.exists()
    assert not folder.starts_file.exists()
