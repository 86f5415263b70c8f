"""What is looked at before a run: what would stop it later is said at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2core.cli import run as gpt2
from gpt2core.config import RECIPES, LaunchConfig, RunConfig
from gpt2core.preflight import claim_run, examine


def config_with(tmp_path: Path, hellaswag: str) -> RunConfig:
    demo = RECIPES["demo"]
    evaluation = demo.evaluation.model_copy(update={"hellaswag": hellaswag})
    return demo.model_copy(update={"artifacts_dir": str(tmp_path), "evaluation": evaluation})


def test_a_hellaswag_file_that_is_not_there_is_found_before_the_first_epoch(tmp_path: Path) -> None:
    config = config_with(tmp_path, "no/such.jsonl")
    with pytest.raises(ValueError, match=r"HellaSwag no/such\.jsonl: cannot be read"):
        claim_run(config, LaunchConfig(nproc_per_node=1))
    assert list(tmp_path.iterdir()) == []
    (found,) = [finding for finding in examine(config, 1) if finding.what == "HellaSwag"]
    assert found.verdict == "error"
    (found,) = [finding for finding in examine(RECIPES["demo"], 1) if finding.what == "HellaSwag"]
    assert (found.verdict, found.text) == ("ok", "200 examples of data/sample/hellaswag_sample.jsonl")


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_a_machine_without_a_gpu_is_a_warning_and_hides_nothing_else(tmp_path: Path, capsys: Any) -> None:
    words = ["preflight", "--recipe", "demo", "--artifacts_dir", str(tmp_path)]
    gpt2([*words, "--device", "auto"])
    automatic = capsys.readouterr().out
    gpt2([*words, "--device", "cuda"])
    insisting = capsys.readouterr().out
    assert "warning GPUs      none is visible" in automatic
    assert "error   GPUs      device cuda: this machine shows no GPU" in insisting
    for what in ("batch", "data", "HellaSwag", "folders", "disk", "clock"):
        assert any(line.split()[1] == what for line in insisting.splitlines()), what


@pytest.mark.slow
def test_fp8_that_cannot_be_had_is_found_before_the_data_is_prepared(tmp_path: Path, capsys: Any) -> None:
    demo = RECIPES["demo"]
    train = demo.train.model_copy(update={"precision": "fp8", "device": "cpu"})
    config = demo.model_copy(update={"artifacts_dir": str(tmp_path), "train": train})
    with pytest.raises(ValueError, match=r"precision fp8: it needs an NVIDIA GPU .* use --precision bf16"):
        claim_run(config, LaunchConfig(nproc_per_node=1))
    assert list(tmp_path.iterdir()) == []
    words = ["preflight", "--recipe", "demo", "--artifacts_dir", str(tmp_path), "--device", "cpu", "--precision", "fp8"]
    gpt2(words)
    assert "error   FP8       precision fp8: it needs an NVIDIA GPU" in capsys.readouterr().out
    gpt2([*words, "--kernels", "plain"])
    assert "ok      FP8       fp8 can be had" in capsys.readouterr().out
