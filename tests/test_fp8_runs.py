"""Whole runs in FP8, emulated: as exact as others, in and out of it, and refused where it cannot be had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2core.config import RECIPES, ModelConfig
from gpt2core.distributed import Ranks
from gpt2core.export import export_huggingface
from gpt2core.fp8_scaling import HISTORY
from gpt2core.trainer import Trainer

pytestmark = pytest.mark.slow

RUN: dict[str, Any] = {
    "precision": "fp8",
    "kernels": "plain",
    "total_batch_size": 128,
    "mini_batch_size": 2,
    "context_length": 16,
    "steps_per_epoch": 2,
    "eval_freq": 0,
    "checkpoint_freq": 0,
    "val_tokens": 128,
}


@pytest.fixture(scope="module")
def two_ranks(lab: Any) -> Path:
    """Two epochs in FP8 in two processes; there is a checkpoint of the first."""
    done = lab.train(lab.flags(lab.root / "fp8", **RUN), nproc=2)
    assert (
        "precision: the blocks' linear layers and the head in FP8 (delayed scaling, gradients in e4m3), EMULATED; all else"
        in done.stdout
    )
    return lab.root / "fp8" / "tiny"


def test_resuming_on_two_ranks_is_bit_identical(lab: Any, two_ranks: Path, tmp_path: Path) -> None:
    resumed = lab.copy_run(two_ranks, tmp_path)
    lab.train([*lab.flags(tmp_path, **RUN), "--resume", "epoch_00001"], nproc=2)
    lab.assert_same_run(resumed, two_ranks, max_steps=4)
    lab.assert_same(lab.latest(resumed)["fp8"], lab.latest(two_ranks)["fp8"])
    assert set(lab.logged(two_ranks, "fp8_saturated").values()) == {0}


def test_a_run_of_two_ranks_goes_on_in_one_process(lab: Any, two_ranks: Path, tmp_path: Path, train_here: Any) -> None:
    gone_on = lab.copy_run(two_ranks, tmp_path)
    train_here([*lab.flags(tmp_path, **RUN), "--resume", "epoch_00001"])
    assert lab.logged(gone_on, "loss") == pytest.approx(lab.logged(two_ranks, "loss"), abs=5e-3)


def test_a_run_in_bf16_goes_on_in_fp8_and_back(lab: Any, tmp_path: Path, train_here: Any) -> None:
    run = RUN | {"num_epochs": 3, "steps_per_epoch": 1}
    bf16 = lab.flags(tmp_path, **run | {"precision": "bf16"})
    fp8 = [*lab.flags(tmp_path, **run), "--resume", "latest"]
    train_here([*bf16, "--stop_epoch", 1])
    with pytest.raises(ValueError, match=r"train\.precision: bf16 -> fp8.*--force to go on"):
        train_here([*fp8, "--stop_epoch", 2])
    train_here([*fp8, "--stop_epoch", 2, "--force"])
    state = lab.latest(tmp_path / "tiny")
    assert state["step"] == 2 and state["fp8"]["history"].shape == (HISTORY, 16)
    train_here([*bf16, "--resume", "latest", "--force"])
    state = lab.latest(tmp_path / "tiny")
    assert state["step"] == 3 and "fp8" not in state
    log = (tmp_path / "tiny" / "logs" / "log.txt").read_text()
    for change in ("bf16 -> fp8 (delayed, gradients in e4m3)", "fp8 (delayed, gradients in e4m3) -> bf16"):
        assert f"WARNING: with another precision than before, as forced: {change}" in log
    assert log.count("precision: activations in bf16") == 2
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {3.0}


def test_a_run_from_before_gradients_had_a_choice_goes_on_with_e5m2(lab: Any, tmp_path: Path, train_here: Any) -> None:
    flags = lab.flags(tmp_path, **RUN | {"steps_per_epoch": 1})
    train_here([*flags, "--fp8_gradients", "e5m2", "--stop_epoch", 1])
    config = tmp_path / "tiny" / "config.json"
    stored = json.loads(config.read_text())
    del stored["train"]["fp8_gradients"]
    config.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"train\.fp8_gradients: e5m2 -> e4m3"):
        train_here([*flags, "--resume", "latest"])
    train_here([*flags, "--fp8_gradients", "e5m2", "--resume", "latest"])
    assert lab.latest(tmp_path / "tiny")["step"] == 2


def test_muon_in_fp8_resumes_bit_for_bit_and_is_exported(lab: Any, tmp_path: Path, train_here: Any) -> None:
    run = RUN | {"optimizer": "muon"}
    train_here(lab.flags(tmp_path / "straight", **run))
    straight = tmp_path / "straight" / "tiny"
    resumed = lab.copy_run(straight, tmp_path)
    train_here([*lab.flags(tmp_path, **run), "--resume", "epoch_00001"])
    lab.assert_same_run(resumed, straight, max_steps=4)
    assert list((resumed / "tensorboard").glob("events.*"))
    state = lab.latest(resumed)
    export_huggingface(state["model"], ModelConfig(**state["config"]["model"]), tmp_path / "exported", resumed)
    assert (tmp_path / "exported" / "model.safetensors").is_file()


@pytest.mark.parametrize("way", [{"fp8_recipe": "tensorwise"}, {"fp8_recipe": "rowwise"}, {"precision": "fp8_head"}])
def test_the_other_ways_resume_bit_for_bit(lab: Any, tmp_path: Path, train_here: Any, way: dict[str, str]) -> None:
    run = RUN | {"steps_per_epoch": 1} | way
    train_here(lab.flags(tmp_path / "straight", **run))
    straight = tmp_path / "straight" / "tiny"
    resumed = lab.copy_run(straight, tmp_path)
    train_here([*lab.flags(tmp_path, **run), "--resume", "epoch_00001"])
    lab.assert_same_run(resumed, straight, max_steps=2)


def test_gradients_are_calibrated_at_the_size_that_they_have_in_a_step(lab: Any, tmp_path: Path) -> None:
    """By 4 of the 8 sequences of one of two micro-steps."""
    shape = {"context_length": 16, "num_layers": 2, "embd_size": 32, "num_heads": 2}
    changes = {"total_batch_size": 256, "mini_batch_size": 8, "device": "cpu", "hellaswag_freq": 0}
    config = RECIPES["demo"].model_copy(
        update={
            "artifacts_dir": str(tmp_path),
            "model": ModelConfig(**shape),
            "data": RECIPES["demo"].data.model_copy(update={"data_dir": str(lab.data_dir)}),
            "train": RECIPES["demo"].train.model_copy(update=changes | {"precision": "fp8", "kernels": "plain"}),
        }
    )
    trainer = Trainer(config, Ranks(0, 1, torch.device("cpu")))
    assert trainer.accum_steps == 2
    trainer.train_step()
    assert trainer.fp8 and trainer.fp8.scaling
    of_step, by_calibration, *_ = trainer.fp8.scaling.history
    ratios = of_step / by_calibration
    assert ((ratios > 0.5) & (ratios < 2)).all()


def test_a_run_is_refused_fp8_in_one_sentence(lab: Any, tmp_path: Path) -> None:
    done = lab.run("gpt2core.train", lab.flags(tmp_path, **RUN | {"kernels": "auto"}), nproc=2)
    assert done.returncode != 0
    assert done.stderr.count("precision fp8: it needs an NVIDIA GPU") == 1
    assert not (tmp_path / "tiny" / "checkpoints").exists() or not list((tmp_path / "tiny" / "checkpoints").iterdir())
