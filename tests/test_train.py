"""Whole tiny runs: what they leave where, that resuming is exact, and what is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gpt2core.checkpoint import load
from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.config import LaunchConfig, ModelConfig, RunConfig
from gpt2core.flags import read_config
from gpt2core.generate import SAMPLE_PROMPTS
from gpt2core.model import GPT
from gpt2core.optim import learning_rate
from gpt2core.preflight import claim_run

pytestmark = pytest.mark.slow  # each test starts trainers or other processes

# --- what a run leaves -----------------------------------------------------------------------------------------------


def test_files_lie_where_the_contract_says(straight: Path) -> None:
    names = {path.name for path in (straight / "checkpoints").glob("*.pt")}
    tiers = {"latest.pt", "latest_backup.pt", "best_model.pt", "epoch_00001.pt", "epoch_00002.pt"}
    assert tiers <= names
    assert all(re.fullmatch(r"rolling_step_\d{6}\.pt", name) for name in names - tiers)
    assert (straight / "logs" / "log.txt").stat().st_size > 0
    assert list((straight / "tensorboard").glob("events.out.tfevents.*"))
    assert not list(straight.rglob("*.tmp"))


def test_config_json_is_the_whole_configuration(straight: Path, lab: Any) -> None:
    config = RunConfig.model_validate_json((straight / "config.json").read_text())
    assert config.run_name == "tiny"
    assert config.model == ModelConfig(context_length=32, num_layers=2, embd_size=32, num_heads=2)
    assert (config.train.num_epochs, config.train.steps_per_epoch, config.train.max_lr) == (2, 12, 1e-3)
    assert config.data.data_dir == str(lab.data_dir)
    saved = json.loads((straight / "config.json").read_text())
    assert saved.keys() == RunConfig.model_fields.keys()


def test_losses_start_at_ln_of_the_vocabulary_and_fall(straight: Path, lab: Any) -> None:
    loss, val_loss = lab.logged(straight, "loss"), lab.logged(straight, "val_loss")
    assert 10.7 < val_loss[0] < 10.95  # ln 50304 = 10.83
    assert 10.7 < loss[1] < 10.95
    assert loss[lab.max_steps] < loss[1] - 0.2
    assert val_loss[lab.max_steps] < val_loss[0] - 0.2


def test_metrics_have_each_step_once_with_its_numbers(straight: Path, lab: Any) -> None:
    steps = list(range(1, lab.max_steps + 1))
    for name in ("loss", "lr", "grad_norm", "tokens_per_sec"):
        values = lab.logged(straight, name)
        assert list(values) == steps, name
        assert all(math.isfinite(value) and value > 0 for value in values.values()), name
    assert list(lab.logged(straight, "val_loss")) == list(range(0, lab.max_steps + 1, 3))
    train = RunConfig.model_validate_json((straight / "config.json").read_text()).train
    lrs = lab.logged(straight, "lr")
    assert lrs == {step: learning_rate(step - 1, lab.max_steps, train) for step in steps}


def test_tensorboard_and_the_text_log_have_the_same_numbers(straight: Path, lab: Any) -> None:
    board = EventAccumulator(str(straight / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    tags = {"loss/train": "loss", "loss/val": "val_loss", "train/learning_rate": "lr", "train/grad_norm": "grad_norm"}
    tags["speed/tokens_per_sec"] = "tokens_per_sec"
    text = (straight / "logs" / "log.txt").read_text()
    for tag, name in tags.items():
        logged = lab.logged(straight, name)
        shown = {event.step: event.value for event in board.Scalars(tag)}
        assert shown == pytest.approx(logged, rel=1e-6), tag
    for step, loss in lab.logged(straight, "loss").items():
        assert f"step={step} loss={loss:.5g} " in text
    assert "final/val_loss" in board.Tags()["scalars"]


def test_a_checkpoint_is_a_plain_and_complete_dict(straight: Path, lab: Any) -> None:
    checkpoint = lab.load(straight / "checkpoints" / "latest.pt")  # weights_only=True
    promised = {"format", "step", "epoch", "steps_per_epoch", "tokens_seen", "train_seconds", "train_loss", "val_loss"}
    promised |= {"best_val_loss", "config", "model", "optimizer", "data", "rng"}
    assert promised <= checkpoint.keys()
    assert checkpoint["step"] == lab.max_steps
    assert checkpoint["epoch"] == 2
    assert checkpoint["tokens_seen"] == lab.max_steps * 256
    assert checkpoint["data"]["consumed"] == lab.max_steps * 8  # sequences
    (rng,) = checkpoint["rng"]
    assert {"torch", "cuda", "numpy", "python"} == rng.keys()
    assert rng["torch"].dtype == torch.uint8
    assert rng["numpy"][1].shape == (624,)
    assert len(rng["python"][1]) == 625
    assert RunConfig.model_validate(checkpoint["config"]).run_name == "tiny"
    model = GPT(ModelConfig.model_validate(checkpoint["config"]["model"]))
    model.load_state_dict(checkpoint["model"])  # strict: plain names, no `module.` or `_orig_mod.`
    assert len(checkpoint["optimizer"]["state"]) == len(list(model.parameters()))


def test_two_ranks_save_plain_names_and_a_generator_state_each(straight_two_ranks: Path, lab: Any) -> None:
    checkpoint = lab.load(straight_two_ranks / "checkpoints" / "latest.pt")
    GPT(ModelConfig.model_validate(checkpoint["config"]["model"])).load_state_dict(checkpoint["model"])
    assert len(checkpoint["rng"]) == 2
    assert not torch.equal(checkpoint["rng"][0]["torch"], checkpoint["rng"][1]["torch"])


def test_rolling_checkpoints_are_the_last_three_saved(straight: Path) -> None:
    saved = re.findall(r"saved (rolling_step_\d+)\.pt", (straight / "logs" / "log.txt").read_text())
    assert len(saved) > 10
    there = sorted(path.stem for path in (straight / "checkpoints").glob("rolling_*.pt"))
    assert there == saved[-3:]


def test_names_are_hard_links_to_few_files(straight: Path) -> None:
    folder = CheckpointFolder(straight / "checkpoints")
    inode = {path.stem: path.stat().st_ino for path in Path(folder.location).glob("*.pt")}
    assert inode["latest"] == inode["rolling_step_000024"] == inode["epoch_00002"]
    assert inode["latest"] != inode["latest_backup"]
    assert len(set(inode.values())) < len(inode)
    sizes = {path.stat().st_ino: path.stat().st_size for path in Path(folder.location).glob("*.pt")}
    assert folder.disk_bytes() == sum(sizes.values())


def test_each_tier_holds_the_step_it_stands_for(straight: Path, lab: Any) -> None:
    folder = CheckpointFolder(straight / "checkpoints")
    val_loss = lab.logged(straight, "val_loss")
    best_step = min((step for step in val_loss if step), key=val_loss.__getitem__)
    expected = {"latest": 24, "epoch_00001": 12, "epoch_00002": 24, "best_model": best_step}
    for name, step in expected.items():
        found = folder.find(name)
        assert found, name
        state = load(found.location, found.sidecar)
        assert (state["step"], found.sidecar.step) == (step, step), name
        assert state["val_loss"] == val_loss[step // 3 * 3], name
    best = load(folder.file("best_model"))
    assert best["val_loss"] == best["best_val_loss"] == min(value for step, value in val_loss.items() if step)


def test_list_checkpoints_names_all_and_trains_nothing(straight: Path, lab: Any, train_here: Any, capsys: Any) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    train_here([*lab.flags(straight.parent), "--list_checkpoints"])
    shown = capsys.readouterr().out
    for path in (straight / "checkpoints").glob("*.pt"):
        assert path.stem in shown
    assert (straight / "metrics.jsonl").read_bytes() == before


# --- exactness -------------------------------------------------------------------------------------------------------


def test_resuming_is_bit_identical(lab: Any, straight: Path, first_epoch: Path, tmp_path: Path) -> None:
    resumed = lab.copy_run(first_epoch, tmp_path)
    assert lab.load(resumed / "checkpoints" / "latest.pt")["step"] == lab.steps_per_epoch
    assert list(lab.logged(resumed, "loss")) == list(range(1, lab.steps_per_epoch + 1))
    done = lab.train([*lab.flags(tmp_path), "--resume", "latest"])
    assert f"at step {lab.steps_per_epoch} of {lab.max_steps}" in done.stdout
    lab.assert_same_run(resumed, straight)


def test_resuming_on_two_ranks_is_bit_identical(
    lab: Any, straight_two_ranks: Path, first_epoch_two_ranks: Path, tmp_path: Path
) -> None:
    resumed = lab.copy_run(first_epoch_two_ranks, tmp_path)
    lab.train([*lab.flags(tmp_path), "--resume", "latest"], nproc=2)
    lab.assert_same_run(resumed, straight_two_ranks)


def test_with_two_ranks_an_exchange_in_buckets_changes_no_bit(
    lab: Any, first_epoch_two_ranks: Path, tmp_path: Path
) -> None:
    done = lab.train([*lab.flags(tmp_path), "--stop_epoch", "1", "--bucket_cap_mb", "1"], nproc=2)
    assert "gradients: exchanged in buckets of 1 MiB, during the backward pass" in done.stdout
    log = (first_epoch_two_ranks / "logs" / "log.txt").read_text()
    assert "gradients: exchanged all at once, after the last micro-step" in log
    lab.assert_same_run(tmp_path / "tiny", first_epoch_two_ranks, lab.steps_per_epoch)


@pytest.mark.slow
def test_resuming_on_three_ranks_is_bit_identical(lab: Any, tmp_path: Path) -> None:
    """The sum of three numbers depends on the order, and so would that of gradients in buckets, which DDP fills in another one
    from its second step on."""
    run = {"total_batch_size": 192, "embd_size": 128, "steps_per_epoch": 2, "eval_freq": 0, "checkpoint_freq": 0}
    lab.train(lab.flags(tmp_path / "straight", **run), nproc=3)
    resumed = lab.copy_run(tmp_path / "straight" / "tiny", tmp_path)
    lab.train([*lab.flags(tmp_path, **run), "--resume", "epoch_00001"], nproc=3)
    lab.assert_same_run(resumed, tmp_path / "straight" / "tiny", max_steps=4)


def test_two_ranks_train_as_one_process_does(lab: Any, straight: Path, straight_two_ranks: Path) -> None:
    assert lab.logged(straight_two_ranks, "loss") == pytest.approx(lab.logged(straight, "loss"), abs=1e-4)
    val_loss, of_two = lab.logged(straight, "val_loss"), lab.logged(straight_two_ranks, "val_loss")
    assert of_two[0] == val_loss[0]  # the same weights: the same number, to the last bit
    assert of_two == pytest.approx(val_loss, abs=1e-4)
    data = [lab.load(run / "checkpoints" / "latest.pt")["data"] for run in (straight, straight_two_ranks)]
    assert data[0] == data[1]


def test_a_run_of_two_ranks_goes_on_in_one_process(
    lab: Any, straight: Path, first_epoch_two_ranks: Path, tmp_path: Path, train_here: Any
) -> None:
    """The token order stays the same, so the losses do, to rounding."""
    resumed = lab.copy_run(first_epoch_two_ranks, tmp_path)
    train_here([*lab.flags(tmp_path), "--resume", "latest"])
    assert lab.logged(resumed, "loss") == pytest.approx(lab.logged(straight, "loss"), abs=1e-4)
    one, other = (lab.load(run / "checkpoints" / "latest.pt") for run in (resumed, straight))
    assert one["data"] == other["data"]


@pytest.mark.parametrize(("mini_batch_size", "nproc"), [(1, 1), (4, 1), (1, 2)])
def test_accumulation_does_not_change_the_losses(
    lab: Any, straight: Path, tmp_path: Path, mini_batch_size: int, nproc: int
) -> None:
    flags = [*lab.flags(tmp_path, mini_batch_size=mini_batch_size, checkpoint_freq=0), "--stop_epoch", "1"]
    lab.train(flags, nproc=nproc)
    mine = lab.logged(tmp_path / "tiny", "loss")
    expected = {step: loss for step, loss in lab.logged(straight, "loss").items() if step <= lab.steps_per_epoch}
    assert mine == pytest.approx(expected, abs=1e-4)
    norms = {step: norm for step, norm in lab.logged(straight, "grad_norm").items() if step <= lab.steps_per_epoch}
    assert lab.logged(tmp_path / "tiny", "grad_norm") == pytest.approx(norms, rel=1e-3)


def test_checkpoints_by_the_clock(lab: Any, first_epoch_two_ranks: Path, tmp_path: Path) -> None:
    """An interval shorter than a step is over at each one, on all ranks; saving that often changes no number."""
    flags = lab.flags(tmp_path, checkpoint_freq=0, checkpoint_interval_s=0.001, keep_checkpoints=100)
    lab.train([*flags, "--stop_epoch", "1"], nproc=2)
    run = tmp_path / "tiny"
    saved = [found.sidecar.step for found in CheckpointFolder(run / "checkpoints").all() if "rolling" in found.name]
    assert saved == list(range(lab.steps_per_epoch, 0, -1))
    lab.assert_same_run(run, first_epoch_two_ranks, lab.steps_per_epoch)


def test_without_a_frequency_or_an_interval_only_the_end_of_an_epoch_and_the_best_are_saved(
    lab: Any, tmp_path: Path, train_here: Any
) -> None:
    train_here(lab.flags(tmp_path, checkpoint_freq=0, checkpoint_interval_s=3600, keep_checkpoints=100, eval_freq=0))
    folder = CheckpointFolder(tmp_path / "tiny" / "checkpoints")
    assert [found.sidecar.step for found in folder.all() if "rolling" in found.name] == [24, 12]


def test_the_best_is_not_kept_where_nobody_wants_it(lab: Any, tmp_path: Path, train_here: Any) -> None:
    changes = {"checkpoint_freq": 0, "eval_freq": 3, "steps_per_epoch": 12, "num_epochs": 1}
    train_here([*lab.flags(tmp_path, **changes), "--no-keep_best"])
    run = tmp_path / "tiny"
    assert len(lab.logged(run, "val_loss")) == 5  # at 0, 3, 6, 9 and 12
    assert CheckpointFolder(run / "checkpoints").names() == ["epoch_00001", "latest", "rolling_step_000012"]


# --- resume rules ----------------------------------------------------------------------------------------------------


def test_a_run_with_checkpoints_is_refused_without_resume_in_one_sentence(lab: Any, straight: Path) -> None:
    before = (straight / "metrics.jsonl").read_bytes()
    done = lab.run("gpt2core.train", lab.flags(straight.parent))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "--resume latest" in done.stderr and "--run_name" in done.stderr
    assert (straight / "metrics.jsonl").read_bytes() == before


def test_resume_latest_without_checkpoints_starts_afresh_and_says_so(
    lab: Any, tmp_path: Path, train_here: Any, capsys: Any
) -> None:
    train_here([*lab.flags(tmp_path, steps_per_epoch=2, num_epochs=1), "--resume", "latest"])
    assert "starting afresh" in capsys.readouterr().out
    assert list(lab.logged(tmp_path / "tiny", "loss")) == [1, 2]


def test_a_run_says_how_long_its_process_took_to_be_ready(straight: Path) -> None:
    (ready, loaded), *_ = re.findall(
        r"start: ready ([\d.]+) s after the process began, ([\d.]+) s of them to load",
        (straight / "logs" / "log.txt").read_text(),
    )
    assert 0 < float(loaded) < float(ready) < 600


def test_resuming_a_finished_run_trains_nothing(lab: Any, straight: Path, tmp_path: Path, train_here: Any) -> None:
    run = lab.copy_run(straight, tmp_path)
    train_here([*lab.flags(tmp_path), "--resume", "latest"])
    lab.assert_same_run(run, straight)


def test_resume_takes_a_name_or_a_path(
    lab: Any, straight: Path, first_epoch: Path, tmp_path: Path, train_here: Any
) -> None:
    """From an older checkpoint than the newest: what was logged beyond it goes, and is trained anew."""
    run = lab.copy_run(straight, tmp_path / "by_name")
    train_here([*lab.flags(tmp_path / "by_name"), "--resume", "epoch_00001", "--stop_epoch", "1"])
    assert list(lab.logged(run, "loss")) == list(range(1, lab.steps_per_epoch + 1))
    path = first_epoch / "checkpoints" / "epoch_00001.pt"
    train_here([*lab.flags(tmp_path / "by_path", checkpoint_freq=0), "--resume", path])
    expected = {step: loss for step, loss in lab.logged(straight, "loss").items() if step > lab.steps_per_epoch}
    assert lab.logged(tmp_path / "by_path" / "tiny", "loss") == pytest.approx(expected, abs=1e-4)


def test_resume_of_a_missing_file_is_an_error(lab: Any, tmp_path: Path, train_here: Any) -> None:
    with pytest.raises(ValueError, match=r"--resume missing\.pt: there is no such file"):
        train_here([*lab.flags(tmp_path), "--resume", "missing.pt"])
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_resume_of_another_model_size_names_it(lab: Any, first_epoch: Path, tmp_path: Path, train_here: Any) -> None:
    lab.copy_run(first_epoch, tmp_path)
    for force in ([], ["--force"]):
        with pytest.raises(ValueError, match="embd_size 32 in it, 64 asked for"):
            train_here([*lab.flags(tmp_path, embd_size=64), "--resume", "latest", *force])


def test_a_changed_setting_is_refused_with_the_difference_and_accepted_with_force(
    lab: Any, first_epoch: Path, tmp_path: Path, train_here: Any
) -> None:
    run = lab.copy_run(first_epoch, tmp_path)
    before = (run / "config.json").read_bytes(), (run / "metrics.jsonl").read_bytes()
    flags = [*lab.flags(tmp_path, max_lr=2e-3), "--resume", "latest"]
    with pytest.raises(ValueError, match=r"train\.max_lr: 0\.001 -> 0\.002") as caught:
        train_here(flags)
    assert "--force" in str(caught.value)
    assert ((run / "config.json").read_bytes(), (run / "metrics.jsonl").read_bytes()) == before
    train_here([*flags, "--force"])
    config = RunConfig.model_validate_json((run / "config.json").read_text())
    assert config.train.max_lr == 2e-3
    lrs = lab.logged(run, "lr")
    assert lrs[13] == learning_rate(12, lab.max_steps, config.train) > 1e-3


def test_the_pipeline_refuses_a_changed_setting_and_takes_it_when_forced(
    lab: Any, first_epoch: Path, tmp_path: Path
) -> None:
    run = lab.copy_run(first_epoch, tmp_path)
    groups = read_config(run / "config.json").model_dump() | {"artifacts_dir": str(tmp_path)}
    groups["train"]["max_lr"] = 2e-3
    changed, launched = RunConfig(**groups), LaunchConfig(nproc_per_node=1)
    with pytest.raises(ValueError, match=r"train\.max_lr: 0\.001 -> 0\.002"):
        claim_run(changed, launched)
    assert read_config(run / "config.json").train.max_lr == 1e-3
    claim_run(changed, launched, force=True)
    assert read_config(run / "config.json") == changed


def test_settings_that_do_not_shape_the_run_may_change(
    lab: Any, first_epoch: Path, tmp_path: Path, train_here: Any
) -> None:
    run = lab.copy_run(first_epoch, tmp_path)
    changes = {"keep_checkpoints": 1, "mini_batch_size": 4, "checkpoint_freq": 0, "eval_freq": 0}
    train_here([*lab.flags(tmp_path, **changes), "--resume", "latest"])
    assert [path.stem for path in (run / "checkpoints").glob("rolling_*.pt")] == ["rolling_step_000024"]


def test_another_dataset_is_refused(
    lab: Any, first_epoch: Path, other_data_dir: Path, tmp_path: Path, train_here: Any
) -> None:
    run = lab.copy_run(first_epoch, tmp_path)
    with pytest.raises(ValueError, match=r"another data order.*fingerprint"):
        train_here([*lab.flags(tmp_path, data_dir=other_data_dir), "--resume", "latest", "--force"])
    assert lab.load(run / "checkpoints" / "latest.pt")["step"] == lab.steps_per_epoch


def test_another_dataset_is_taken_loudly_when_that_is_accepted(
    lab: Any, first_epoch: Path, other_data_dir: Path, tmp_path: Path, train_here: Any, capsys: Any
) -> None:
    run = lab.copy_run(first_epoch, tmp_path)
    flags = [*lab.flags(tmp_path, data_dir=other_data_dir), "--resume", "latest"]
    with pytest.raises(ValueError, match="--accept_changed_data"):
        train_here(flags)
    train_here([*flags, "--accept_changed_data"])
    for said in (capsys.readouterr().out, (run / "logs" / "log.txt").read_text()):
        assert re.search(r"resumed from .* at step 12 .*WARNING: on other data than before, as accepted", said)
    assert list(lab.logged(run, "loss")) == list(range(1, lab.max_steps + 1))
    before, after = (lab.load(path / "checkpoints" / "latest.pt")["data"] for path in (first_epoch, run))
    assert before["fingerprint"] != after["fingerprint"]
    assert after["consumed"] == 2 * before["consumed"]


def test_the_same_dataset_may_move(lab: Any, first_epoch: Path, tmp_path: Path, train_here: Any) -> None:
    lab.copy_run(first_epoch, tmp_path)
    moved = shutil.copytree(lab.data_dir, tmp_path / "moved")
    train_here([*lab.flags(tmp_path, data_dir=moved), "--resume", "latest", "--stop_epoch", "1"])


def test_a_damaged_latest_is_resumed_around_and_ends_the_same(
    lab: Any, straight: Path, first_epoch: Path, tmp_path: Path, train_here: Any, capsys: Any
) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(first_epoch, run)  # real copies, for one is damaged
    latest = run / "checkpoints" / "latest.pt"
    latest.write_bytes(latest.read_bytes()[:-1000])
    (run / "checkpoints" / "rolling_step_000012.json").unlink()
    (run / "checkpoints" / "epoch_00001.json").unlink()
    (run / "checkpoints" / "best_model.json").unlink()
    train_here([*lab.flags(tmp_path), "--resume", "latest"])
    shown = capsys.readouterr().out
    assert re.search(r"WARNING: skipped .*latest\.pt", shown)
    assert re.search(r"WARNING: skipped .*latest\.pt", (run / "logs" / "log.txt").read_text(encoding="utf-8"))
    assert "at step 10 of 24" in shown
    assert lab.logged(run, "loss") == pytest.approx(lab.logged(straight, "loss"), abs=1e-4)


def test_all_checkpoints_damaged_stops_the_run(lab: Any, first_epoch: Path, tmp_path: Path, train_here: Any) -> None:
    run = tmp_path / "tiny"
    shutil.copytree(first_epoch, run)
    for path in (run / "checkpoints").glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(ValueError, match="none of them is whole"):
        train_here([*lab.flags(tmp_path), "--resume", "latest"])


# --- what would stop a run, said before it starts --------------------------------------------------------------------


def test_a_batch_that_does_not_divide_is_refused_with_numbers_that_do(
    lab: Any, tmp_path: Path, train_here: Any
) -> None:
    with pytest.raises(ValueError, match="mini_batch_size 2 or 4") as caught:
        train_here(lab.flags(tmp_path, mini_batch_size=3))
    assert "256 tokens does not divide" in str(caught.value)


def test_missing_data_is_refused_with_the_command_that_makes_it(lab: Any, tmp_path: Path, train_here: Any) -> None:
    with pytest.raises(ValueError, match="gpt2 prepare --data_dir"):
        train_here(lab.flags(tmp_path, data_dir=tmp_path / "none"))


def test_too_little_disk_is_refused_before_a_step_is_trained(lab: Any, tmp_path: Path, train_here: Any) -> None:
    with pytest.raises(ValueError, match=r"GB free.*lower --keep_checkpoints"):
        train_here(lab.flags(tmp_path, keep_checkpoints=10_000_000, steps_per_epoch=10_000_000))
    assert not (tmp_path / "tiny" / "metrics.jsonl").exists()


def test_steps_per_epoch_auto_is_one_pass_over_the_data(
    lab: Any, other_data_dir: Path, tmp_path: Path, train_here: Any
) -> None:
    """8191 // 32 = 255 sequences, 64 a step: 3 steps an epoch."""
    flags = lab.flags(tmp_path, data_dir=other_data_dir, steps_per_epoch="auto", num_epochs=1, total_batch_size=2048)
    train_here(flags)
    checkpoint = lab.load(tmp_path / "tiny" / "checkpoints" / "epoch_00001.pt")
    assert (checkpoint["step"], checkpoint["steps_per_epoch"]) == (3, 3)


def test_samples_and_histograms_reach_tensorboard_and_leave_the_training_alone(
    lab: Any, straight: Path, tmp_path: Path, train_here: Any
) -> None:
    flags = lab.flags(tmp_path, sample_freq=6, histogram_freq=6, hellaswag_freq=0, checkpoint_freq=0)
    train_here([*flags, "--stop_epoch", "1"])
    run = tmp_path / "tiny"
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"histograms": 0, "tensors": 0})
    board.Reload()
    assert "parameters/transformer.wte.weight" in board.Tags()["histograms"]
    assert "gradients/transformer.wte.weight" in board.Tags()["histograms"]
    for number in range(1, len(SAMPLE_PROMPTS) + 1):
        assert len(board.Tensors(f"sample/{number}/text_summary")) == 2
    assert "sample: \"Hello, I'm a language model," in (run / "logs" / "log.txt").read_text()
    expected = {step: loss for step, loss in lab.logged(straight, "loss").items() if step <= lab.steps_per_epoch}
    assert lab.logged(run, "loss") == pytest.approx(expected, abs=1e-4)


def test_what_is_done_between_steps_compiles_the_model_once_and_never_again(
    lab: Any, tmp_path: Path, monkeypatch: Any, train_here: Any
) -> None:
    """Validation needs a graph of its own; HellaSwag and samples none, and the next steps have theirs already."""
    compile_model, graphs = torch.compile, []

    def counted(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda model, **options: compile_model(model, backend=counted, **options))
    torch._dynamo.reset()
    between = {"eval_freq": 2, "hellaswag_freq": 3, "sample_freq": 2, "hellaswag": lab.examples(3)}
    train_here([*lab.flags(tmp_path, **between, steps_per_epoch=8, num_epochs=1), "--compile", "on"])
    assert list(lab.logged(tmp_path / "tiny", "acc_norm")) == [3, 6]
    assert len(graphs) == 2


def test_gradients_that_are_not_finite_end_the_run_in_one_sentence(lab: Any, tmp_path: Path) -> None:
    """Weights blown up by an absurd learning rate give NaN for good; the run gives up instead of going on."""
    done = lab.run("gpt2core.train", lab.flags(tmp_path, max_lr=1e38, min_lr=0, grad_clip=1e30))
    assert done.returncode != 0
    assert "not finite" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_run_is_not_begun_anew_in_another_checkpoint_folder(
    lab: Any, first_epoch: Path, tmp_path: Path, train_here: Any
) -> None:
    run = lab.copy_run(first_epoch, tmp_path)
    with pytest.raises(ValueError, match=rf"lie in {run}/checkpoints, and --checkpoint_dir says {tmp_path}/elsewhere"):
        train_here([*lab.flags(tmp_path), "--resume", "latest", "--checkpoint_dir", f"{tmp_path}/elsewhere"])
    assert not (tmp_path / "elsewhere").exists()
