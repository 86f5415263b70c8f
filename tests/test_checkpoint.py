"""Checkpoint files: what is written, what survives damage, and what is refused."""

from __future__ import annotations

import errno
import hashlib
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt2core.checkpoint import check_same_model, damage, load, load_newest, save
from gpt2core.checkpoint_folder import FORMAT, CheckpointFolder, Summary
from gpt2core.listing import print_checkpoints


def state(step: int, **more: Any) -> dict[str, Any]:
    weights = {"w": torch.full((4096,), float(step))}
    return {"format": FORMAT, "step": step, "epoch": 0, "train_loss": 2.0, "val_loss": None, "model": weights} | more


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    """Checkpoints of steps 1, 2 and 3; step 2 ended an epoch."""
    folder = CheckpointFolder(tmp_path / "checkpoints")
    for step in (1, 2, 3):
        save(folder, state(step), names=["epoch_00001"] if step == 2 else [], keep=10)
    return folder


def test_one_file_has_all_its_names(folder: CheckpointFolder) -> None:
    inode = {path.stem: path.stat().st_ino for path in Path(folder.location).glob("*.pt")}
    assert inode["latest"] == inode["rolling_step_000003"]
    assert inode["latest_backup"] == inode["rolling_step_000002"] == inode["epoch_00001"]
    assert len(set(inode.values())) == 3
    size = Path(folder.file("latest")).stat().st_size
    assert size * 2.9 < folder.disk_bytes() < size * 3.1  # six names, three files


def test_each_name_loads_what_it_stands_for(folder: CheckpointFolder) -> None:
    steps = {found.name: load(found.location, found.sidecar)["step"] for found in folder.all()}
    assert steps == {
        "latest": 3,
        "rolling_step_000003": 3,
        "latest_backup": 2,
        "rolling_step_000002": 2,
        "epoch_00001": 2,
        "rolling_step_000001": 1,
    }
    assert torch.equal(load(folder.file("latest"))["model"]["w"], torch.full((4096,), 3.0))


def test_saving_a_step_again_keeps_the_backup_of_the_step_before(folder: CheckpointFolder) -> None:
    save(folder, state(3), names=["best_model"], keep=10)
    backup, best = folder.find("latest_backup"), folder.find("best_model")
    assert backup and backup.sidecar.step == 2
    assert best and best.sidecar.step == 3


def test_rolling_checkpoints_are_pruned_to_keep_and_the_other_tiers_stay(folder: CheckpointFolder) -> None:
    save(folder, state(4), names=[], keep=1)
    assert {path.name for path in Path(folder.location).iterdir()} == {
        f"{name}.{ending}"
        for name in ("latest", "latest_backup", "epoch_00001", "rolling_step_000004")
        for ending in ("pt", "json")
    }
    assert load(folder.file("epoch_00001"))["step"] == 2


def test_prune_goes_by_step_and_not_by_spelling(folder: CheckpointFolder) -> None:
    for step in (999_998, 999_999, 1_000_000):
        save(folder, state(step), names=[], keep=2)
    assert {path.stem for path in Path(folder.location).glob("rolling_*.pt")} == {
        "rolling_step_999999",
        "rolling_step_1000000",
    }


def test_a_checkpoint_just_written_is_not_pruned_when_training_went_back(folder: CheckpointFolder) -> None:
    """--resume rolling_step_000001 with later ones still there: the new line of checkpoints must survive."""
    saved = save(folder, state(2, train_loss=9.0), names=[], keep=1)
    assert Path(saved.location).exists()


def flip_a_byte(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))


DAMAGES = {
    "flipped byte": (
        flip_a_byte,
        2,
        "does not have the hash in its sidecar",
    ),  # the damage is in the one file that latest and rolling_step_000003 share
    "cut short": (
        lambda path: os.truncate(path, path.stat().st_size - 100),
        2,
        "its sidecar is missing or does not fit",
    ),
    "zero length": (lambda path: os.truncate(path, 0), 2, "its sidecar is missing or does not fit"),
    "no sidecar": (lambda path: path.with_suffix(".json").unlink(), 3, "its sidecar is missing or does not fit"),
    "sidecar cut short": (
        lambda path: os.truncate(path.with_suffix(".json"), 20),
        3,
        "its sidecar is missing or does not fit",
    ),
    "replaced by an empty file": (
        lambda path: (path.unlink(), path.touch()),
        3,
        "its sidecar is missing or does not fit",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_latest_is_skipped_aloud_for_the_newest_whole_one(folder: CheckpointFolder, damage: str) -> None:
    harm, expected_step, reason = DAMAGES[damage]
    harm(Path(folder.file("latest")))
    warnings: list[str] = []
    found = load_newest(folder, warnings.append)
    assert found and found["step"] == expected_step
    assert torch.equal(found["model"]["w"], torch.full((4096,), float(expected_step)))
    (warning,) = [warning for warning in warnings if "latest.pt" in warning]
    assert warning.startswith("skipped ") and reason in warning


def test_after_going_back_the_new_line_counts_and_not_the_later_steps_of_the_old(folder: CheckpointFolder) -> None:
    for step in (4, 5):
        save(folder, state(step), names=[], keep=10)
    going_on = CheckpointFolder(folder.location)  # of a process that resumed step 2
    save(going_on, state(3, train_loss=9.0), names=[], keep=10)
    Path(folder.file("latest")).with_suffix(".json").unlink()
    found = load_newest(going_on, lambda _: None)
    assert found and (found["step"], found["train_loss"]) == (3, 9.0)
    going_on.prune(2)
    rolling = {path.stem for path in Path(folder.location).glob("rolling_*.pt")}
    assert rolling == {"rolling_step_000003", "rolling_step_000005"}


def test_a_latest_that_went_bad_does_not_take_the_place_of_its_backup(folder: CheckpointFolder) -> None:
    flip_a_byte(Path(folder.file("latest")))
    going_on = CheckpointFolder(folder.location)
    save(going_on, state(4), names=[], keep=10)
    assert damage(going_on, "latest") is None
    assert damage(going_on, "latest_backup") is None
    assert load(folder.file("latest_backup"))["step"] == 2


def test_a_file_named_by_its_path_is_verified_against_the_sidecar_beside_it(folder: CheckpointFolder) -> None:
    path = Path(folder.file("rolling_step_000001"))
    assert load(path)["step"] == 1
    flip_a_byte(path)
    with pytest.raises(ValueError, match="does not have the hash in its sidecar"):
        load(path)
    path.with_suffix(".json").unlink()
    assert load(path)["step"] == 1  # nothing to verify it against: a file copied alone


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, which is Linux's")
def test_what_is_loaded_lies_in_memory_that_processes_share(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    save(folder, state(1, big=torch.ones(2**24)), names=[], keep=1)  # 64 MiB

    def own_bytes() -> int:
        (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")]
        return 1024 * int(line.split()[1])

    before = own_bytes()
    loaded = load(folder.file("latest"))
    assert loaded["big"].sum() == 2**24
    assert own_bytes() - before < 16 * 2**20
    loaded["big"].zero_()
    assert load(folder.file("latest"))["big"].sum() == 2**24  # who changes it changes a copy


def test_what_is_read_is_the_file_that_was_verified(folder: CheckpointFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another takes its name after it was hashed."""
    digest = hashlib.file_digest

    def then_replaced(file: Any, name: str) -> Any:
        found = digest(file, name)
        monkeypatch.setattr(hashlib, "file_digest", digest)
        save(folder, state(4), names=[], keep=10)
        return found

    monkeypatch.setattr(hashlib, "file_digest", then_replaced)
    assert load(folder.file("latest"))["step"] == 3
    assert load(folder.file("latest"))["step"] == 4


def test_a_whole_latest_is_taken_without_a_word(folder: CheckpointFolder) -> None:
    warnings: list[str] = []
    found = load_newest(folder, warnings.append)
    assert found and found["step"] == 3
    assert warnings == []


def test_all_damaged_is_an_error_and_not_a_fresh_start(folder: CheckpointFolder) -> None:
    for path in Path(folder.location).glob("*.pt"):
        os.truncate(path, 10)
    with pytest.raises(ValueError, match="none of them is whole"):
        load_newest(folder, lambda _: None)


def test_flipped_bytes_in_all_are_an_error_too(folder: CheckpointFolder) -> None:
    for path in {path.stat().st_ino: path for path in Path(folder.location).glob("*.pt")}.values():
        flip_a_byte(path)
    with pytest.raises(ValueError, match="none of them is whole"):
        load_newest(folder, lambda _: None)


def test_no_checkpoint_at_all_is_none(tmp_path: Path) -> None:
    assert load_newest(CheckpointFolder(tmp_path / "nothing"), lambda _: None) is None


def test_a_write_that_fails_leaves_everything_as_it_was(folder: CheckpointFolder) -> None:
    before = contents(Path(folder.location))

    def write(file: Any) -> None:
        file.write(b"some of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        summary = Summary(step=4, epoch=0, train_loss=None, val_loss=None)
        folder.commit(write, summary, names=["best_model"], keep=1)
    assert contents(Path(folder.location)) == before


def test_a_disk_that_refuses_large_files_fails_as_oserror_and_leaves_everything(tmp_path: Path) -> None:
    """torch.save on a file that fails for real: in a process of its own whose files may not grow beyond 100 kB."""
    program = """
import resource, sys, torch
from pathlib import Path
from gpt2core.checkpoint import save
from gpt2core.checkpoint_folder import CheckpointFolder
folder = CheckpointFolder(Path(sys.argv[1]))
state = lambda step, size: dict(format=1, step=step, epoch=0, train_loss=None, val_loss=None, model=dict(w=torch.ones(size)))
save(folder, state(1, 10), names=[], keep=2)
before = {path.name: path.read_bytes() for path in Path(folder.location).iterdir()}
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(folder, state(2, 10_000_000), names=[], keep=2)
except OSError as error:
    print("OSError", error)
assert {path.name: path.read_bytes() for path in Path(folder.location).iterdir()} == before
"""
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("OSError")


@pytest.mark.parametrize("year", [1970, 2199])
def test_a_clock_that_was_wrong_does_not_matter(folder: CheckpointFolder, year: int) -> None:
    """Steps say what is new; the time in a sidecar is for people."""
    for path in Path(folder.location).glob("*.json"):
        path.write_text(re.sub(r'"saved_at": "\d+', f'"saved_at": "{year}', path.read_text()))
        os.utime(path.with_suffix(".pt"), (0, 0) if year < 2000 else (2**32, 2**32))
    assert [found.sidecar.step for found in folder.all()] == [3, 3, 2, 2, 2, 1]
    print_checkpoints(folder)
    save(folder, state(4), names=[], keep=2)
    assert [name for name in folder.names() if "rolling" in name] == ["rolling_step_000003", "rolling_step_000004"]
    Path(folder.file("latest")).unlink()
    newest = load_newest(folder, lambda _: None)
    assert newest and newest["step"] == 4


def test_a_folder_that_takes_no_file_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file"):
        CheckpointFolder(tmp_path / "file").check_writable()
    CheckpointFolder(tmp_path / "folder").check_writable()
    assert list((tmp_path / "folder").iterdir()) == []


class RunsCode:
    """What a hostile pickle looks like."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.touched,))


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value, protocol=2))])
def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path: Path, write: Any) -> None:
    touched, path = tmp_path / "touched", tmp_path / "bad.pt"
    write(state(1, rng=RunsCode(touched)), path)
    with pytest.raises(ValueError, match=r"bad\.pt is not a readable checkpoint"):
        load(path)
    assert not touched.exists()
    torch.load(path, weights_only=False) if write is torch.save else pickle.loads(path.read_bytes())
    assert touched.exists(), "the file does hold code that an unsafe load runs"


def test_files_that_are_no_checkpoint_of_ours_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"weights": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"x\.pt is no checkpoint of this project"):
        load(path)
    torch.save(state(1, format=FORMAT + 1), path)
    with pytest.raises(ValueError, match="newer version"):
        load(path)
    with pytest.raises(ValueError, match=r"missing\.pt cannot be read"):
        load(tmp_path / "missing.pt")


def test_what_a_killed_writer_left_goes_and_what_a_live_one_writes_stays(folder: CheckpointFolder) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    stale = Path(folder.location) / f".rolling_step_000009.pt.{ended.pid}.tmp"
    namesake = Path(folder.location) / f".rolling_step_000009.pt.{os.getpid()}.tmp"  # in a container started anew
    live = Path(folder.location) / f".rolling_step_000009.pt.{os.getppid()}.tmp"
    for path in (stale, namesake, live):
        path.write_bytes(b"half")
    save(folder, state(4), names=[], keep=10)
    assert not stale.exists() and not namesake.exists()
    assert live.exists()


def test_another_model_is_named_by_what_differs() -> None:
    with pytest.raises(ValueError, match="embd_size 32 in it, 64 asked for") as caught:
        check_same_model("x.pt", {"embd_size": 32, "num_layers": 2}, {"embd_size": 64, "num_layers": 2})
    assert "num_layers" not in str(caught.value)
    check_same_model("x.pt", {"embd_size": 32}, {"embd_size": 32})
