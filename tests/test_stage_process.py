"""A stage's process: what it refuses in one sentence is told from a crash, which alone is worth a retry."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
import torch
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


@pytest.mark.slow
def test_a_rank_that_breaks_leaves_its_own_traceback(lab, first_epoch, tmp_path):
    """A checkpoint that is whole, and lacks what the code expects of one: no sentence was prepared for that."""
    run = lab.copy_run(first_epoch, tmp_path)
    for path in (run / "checkpoints").glob("*.pt"):
        if path.stem != "latest":
            path.unlink()
    latest, sidecar = run / "checkpoints" / "latest.pt", run / "checkpoints" / "latest.json"
    state = lab.load(latest)
    del state["best_val_loss"]
    latest.unlink()  # it shares its file with the run it was copied from
    torch.save(state, latest)
    content = latest.read_bytes()
    said = json.loads(sidecar.read_text()) | {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    sidecar.write_text(json.dumps(said))
    arguments = [*lab.flags(tmp_path), "--resume", "latest"]
    with disable_run_logger(), pytest.raises(StageError) as failed:
        run_stage("gpt2core.train", arguments, 2, ["--standalone", "--nproc_per_node=2"])
    first, rank, begin, *frames, last = str(failed.value).splitlines()
    assert first == "python -m gpt2core.train ended with exit code 1:"
    assert re.fullmatch(r"the first rank to fail was rank [01]: it ended with exit code 1", rank)
    assert begin == "Traceback (most recent call last):" and last == "KeyError: 'best_val_loss'"
    assert any("load_state_dict" in frame for frame in frames)
    assert failed.value.sentence == f"{first} KeyError: 'best_val_loss'"
