"""A stage's process: what it refuses in one sentence is told from a crash, which alone is worth a retry."""

from __future__ import annotations

import pytest
from prefect.logging import disable_run_logger

from tasks.stage_process import StageError, StageRefusedError, run_stage


def test_a_refusal_is_a_value_error_with_the_sentence(tmp_path):
    with disable_run_logger(), pytest.raises(StageRefusedError, match=r"^source no/such\.txt: there is no such file"):
        run_stage("gpt2core.prepare", ["--source=no/such.txt", f"--data_dir={tmp_path}"])
    assert issubclass(StageRefusedError, ValueError)  # what tasks do not retry


def test_a_flag_that_is_not_there_is_a_refusal():
    with disable_run_logger(), pytest.raises(StageRefusedError, match=r"^unrecognized arguments: --sorce"):
        run_stage("gpt2core.prepare", ["--sorce=no/such.txt"])


def test_a_crash_is_a_stage_error_with_the_end_of_the_output():
    with disable_run_logger(), pytest.raises(StageError, match=r"exit code 1:\n.*No module named gpt2core\.nosuch"):
        run_stage("gpt2core.nosuch", [])
