"""What is looked at before a run: what would stop it later is said at once."""

from __future__ import annotations

import re
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
@pytest.mark.parametrize(
    ("choice", "refusal"),
    [
        ({"precision": "fp8"}, "precision fp8: it needs an NVIDIA GPU .* use --precision bf16"),
        ({"kernels": "fused"}, "kernels fused: they are for bf16 on an NVIDIA GPU, .* use --kernels auto"),
    ],
)
def test_kernels_that_cannot_be_had_are_found_before_the_data_is_prepared(
    choice: dict[str, str], refusal: str, tmp_path: Path, capsys: Any
) -> None:
    demo = RECIPES["demo"]
    train = demo.train.model_copy(update={"device": "cpu", **choice})
    config = demo.model_copy(update={"artifacts_dir": str(tmp_path), "train": train})
    with pytest.raises(ValueError, match=refusal):
        claim_run(config, LaunchConfig(nproc_per_node=1))
    assert list(tmp_path.iterdir()) == []
    flags = [word for name, value in choice.items() for word in (f"--{name}", value)]
    gpt2(["preflight", "--recipe", "demo", "--artifacts_dir", str(tmp_path), "--device", "cpu", *flags])
    assert re.search(f"error   kernels   {refusal}", capsys.readouterr().out)


@pytest.mark.slow
def test_fp8_that_is_emulated_can_be_had_anywhere(tmp_path: Path, capsys: Any) -> None:
    words = ["preflight", "--recipe", "demo", "--artifacts_dir", str(tmp_path), "--device", "cpu"]
    gpt2([*words, "--precision", "fp8", "--kernels", "plain"])
    assert "ok      kernels   precision fp8, kernels plain: can be had" in capsys.readouterr().out
