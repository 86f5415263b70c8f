"""Real kills, real signals and a real full disk, in the middle of a run: nothing is lost but the steps since the save."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SETTINGS
from servers import FileServer

from gpt2core.checkpoint import load, load_newest
from gpt2core.checkpoint_folder import CheckpointFolder

pytestmark = pytest.mark.slow

ENDLESS = {"steps_per_epoch": 100_000, "keep_checkpoints": 1, "eval_freq": 0}  # steps: until something stops it


def last_logged_step(lab: Any, run: Path) -> int:
    return max(line["step"] for line in lab.metrics(run) if "loss" in line)


def saved_step(run: Path) -> int:
    found = CheckpointFolder(run / "checkpoints").find("latest")
    assert found, "there is no whole latest.pt"
    return load(found.location, found.sidecar)["step"]


# --- one process -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_process(lab: Any) -> dict[str, Any]:
    """SIGTERM at about step 4, SIGINT at 9, SIGKILL at 14; each time `--resume latest` goes on, at last to the end."""
    artifacts = lab.root / "faults1"
    run = artifacts / "tiny"
    flags = [*lab.flags(artifacts), "--resume", "latest"]
    seen: dict[str, Any] = {"run": run}
    for number, at in [(signal.SIGTERM, 4), (signal.SIGINT, 9), (signal.SIGKILL, 14)]:
        with lab.started(run, flags) as trainer:
            trainer.wait_for_step(at)
            os.kill(trainer.process.pid, number)
            code = trainer.wait()
            seen[number.name] = (code, trainer.output, saved_step(run), last_logged_step(lab, run))
    lab.train(flags)
    return seen


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_saves_the_current_step_and_ends_well(one_process: dict[str, Any], lab: Any, name: str) -> None:
    code, output, saved, logged = one_process[name]
    assert code == 0, output
    assert saved == logged < lab.max_steps
    assert f"{name}: saved at step {saved}; go on with --resume latest" in output
    assert "Traceback" not in output


def test_a_kill_loses_only_what_came_after_the_last_checkpoint(one_process: dict[str, Any], lab: Any) -> None:
    code, _, saved, logged = one_process["SIGKILL"]
    assert code == -signal.SIGKILL
    assert 0 <= logged - saved <= 2  # checkpoint_freq
    assert logged < lab.max_steps


def test_after_three_stops_all_is_bit_identical(one_process: dict[str, Any], lab: Any, straight: Path) -> None:
    lab.assert_same_run(one_process["run"], straight)


def test_tensorboard_shows_each_step_once_after_three_stops(one_process: dict[str, Any], lab: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = one_process["run"]
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    events = board.Scalars("loss/train")
    assert [event.step for event in events] == list(range(1, lab.max_steps + 1))
    assert {event.step: event.value for event in events} == pytest.approx(lab.logged(run, "loss"), rel=1e-6)


# --- two ranks -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(lab: Any) -> dict[str, Any]:
    """Rank 1 killed at about step 4; `gpt2 train` told to stop at 9; everything killed at 14; then to the end."""
    artifacts = lab.root / "faults2"
    run = artifacts / "tiny"
    flags = [*lab.flags(artifacts), "--resume", "latest"]
    seen: dict[str, Any] = {"run": run}
    with lab.started(run, lab.flags(artifacts), nproc=2) as torchrun:
        torchrun.wait_for_step(4)
        os.kill(torchrun.rank(1), signal.SIGKILL)
        seen["rank killed"] = (torchrun.wait(), torchrun.output, saved_step(run), last_logged_step(lab, run))
    with lab.started(run, ["train", "--nproc_per_node", "2", *flags], module="gpt2core.cli") as gpt2:
        gpt2.wait_for_step(9)
        os.kill(gpt2.process.pid, signal.SIGTERM)
        seen["gpt2 stopped"] = (gpt2.wait(), gpt2.output, saved_step(run), last_logged_step(lab, run))
    with lab.started(run, flags, nproc=2) as torchrun:
        torchrun.wait_for_step(14)
        torchrun.kill_everything()
        seen["all killed"] = (torchrun.wait(), torchrun.output, saved_step(run), last_logged_step(lab, run))
    lab.train(flags, nproc=2)
    return seen


def test_a_killed_rank_fails_torchrun_and_leaves_a_whole_checkpoint(two_ranks: dict[str, Any], lab: Any) -> None:
    code, output, saved, logged = two_ranks["rank killed"]
    assert code != 0, output
    assert 2 <= saved <= logged < lab.max_steps


def test_sigterm_to_gpt2_train_saves_on_all_ranks_and_ends_well(two_ranks: dict[str, Any], lab: Any) -> None:
    code, output, saved, logged = two_ranks["gpt2 stopped"]
    assert code == 0, output
    assert saved == logged < lab.max_steps
    assert f"saved at step {saved}; go on with --resume latest" in output


def test_a_machine_gone_loses_only_what_came_after_the_last_checkpoint(two_ranks: dict[str, Any], lab: Any) -> None:
    code, _, saved, logged = two_ranks["all killed"]
    assert code == -signal.SIGKILL
    assert (
        0 <= logged - saved <= 2 * SETTINGS["checkpoint_freq"]
    )  # one may be on its way to the disk until the next is due
    assert logged < lab.max_steps


def test_after_three_faults_two_ranks_are_bit_identical(
    two_ranks: dict[str, Any], lab: Any, straight_two_ranks: Path
) -> None:
    lab.assert_same_run(two_ranks["run"], straight_two_ranks)


# --- a second signal -------------------------------------------------------------------------------------------------

STOPPABLE = """
import os, signal, sys, time
from gpt2core.distributed import StopRequest
StopRequest.SAME_SIGTERM_S = float(sys.argv[1])
stop = StopRequest()
signal.signal(signal.SIGRTMIN, lambda *_: os.write(1, b"goes on\\n"))  # print might interrupt itself
print("ready", flush=True)
while True:
    time.sleep(0.01)
    if stop.signal and time.monotonic() - stop.signalled_at > StopRequest.SAME_SIGTERM_S:
        print("time is over", flush=True)
        time.sleep(1000)
"""


@contextlib.contextmanager
def stoppable(same_sigterm_s: float) -> Iterator[tuple[subprocess.Popen[str], Callable[[str], None]]]:
    """A process with a StopRequest, and a function that waits for it to say something."""
    command = [sys.executable, "-c", STOPPABLE, str(same_sigterm_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout

    def wait_for(line: str) -> None:
        assert process.stdout and process.stdout.readline() == line + "\n"

    try:
        wait_for("ready")
        yield process, wait_for
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM])
def test_a_sigterm_soon_after_the_first_signal_is_the_same_one_and_a_second_sigint_ends_at_once(
    first: signal.Signals,
) -> None:
    with stoppable(1000) as (process, wait_for):
        for number in (first, signal.SIGTERM):
            process.send_signal(number)
            process.send_signal(signal.SIGRTMIN)  # of several signals that wait, the lowest number is heard first
            wait_for("goes on")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 128 + signal.SIGINT


def test_a_sigterm_long_after_the_first_signal_ends_at_once() -> None:
    with stoppable(0.1) as (process, wait_for):
        process.send_signal(signal.SIGINT)
        wait_for("time is over")
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 128 + signal.SIGTERM


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_signal_before_the_first_step_ends_the_run_there(
    lab: Any, http_files: FileServer, tmp_path: Path, nproc: int
) -> None:
    """The last rank gets it while all wait for HellaSwag's examples; afterwards the same command trains."""
    shutil.copy(lab.examples(2), http_files.folder / "hellaswag.jsonl")
    held = [http_files.hold("hellaswag.jsonl") for _ in range(nproc)]
    source = f"{http_files.url}/hellaswag.jsonl"
    flags = [*lab.flags(tmp_path, hellaswag_freq=1000, hellaswag=source, num_epochs=1), "--resume", "latest"]
    run = tmp_path / "tiny"
    with lab.started(run, flags, nproc=nproc) as started:
        for fault in held:
            started.wait_for(fault.reached.is_set, "the request for the examples")
        os.kill(started.rank(1) if nproc == 2 else started.process.pid, signal.SIGTERM)
        for fault in held:
            fault.release()
        assert started.wait() == 0, started.output
        by = "a signal to another rank" if nproc == 2 else "SIGTERM"
        assert f"{by}: ended before a step was made" in started.output
    assert lab.logged(run, "loss") == {} == lab.logged(run, "val_loss")
    lab.train(flags)
    assert list(lab.logged(run, "loss")) == list(range(1, lab.steps_per_epoch + 1))


# --- a launcher that is killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("nproc", [1, 2])
def test_trainers_of_a_killed_gpt2_train_save_and_end_by_themselves(lab: Any, tmp_path: Path, nproc: int) -> None:
    run = tmp_path / "tiny"
    flags = lab.flags(tmp_path, **ENDLESS, checkpoint_freq=0)  # so that a checkpoint is there only if the end made it
    with lab.started(run, ["train", "--nproc_per_node", str(nproc), *flags], module="gpt2core.cli") as gpt2:
        gpt2.wait_for_step(3)
        trainers = gpt2.children()
        assert len(trainers) == (1 if nproc == 1 else 1 + nproc)  # torchrun and its ranks
        assert not (run / "checkpoints" / "latest.pt").exists()
        os.kill(gpt2.process.pid, signal.SIGKILL)
        lab.wait_until(lambda: not any(lab.is_alive(pid) for pid in trainers), "the trainers to end")
    assert saved_step(run) == last_logged_step(lab, run)


# --- a full disk -----------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system of its own with room for few checkpoints, that can be filled; where mounting is not permitted,
    a limit on the size of the files that the trainer may write."""

    def __init__(self, path: Path, mounted: bool) -> None:
        self.path, self.mounted = path, mounted
        self.filler = path / "filler"

    def fill(self, pid: int, leave_bytes: int) -> None:
        if not self.mounted:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (max(leave_bytes, 1), resource.RLIM_INFINITY))
            return
        with self.filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(b"\0" * 65536)
            except OSError:
                file.truncate(max(0, file.tell() - leave_bytes))
        free = os.statvfs(self.path)
        assert free.f_bavail * free.f_frsize <= leave_bytes + 65536


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=130m", "tmpfs", str(path)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    yield SmallDisk(path, mounted)
    if mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def wait_for_a_checkpoint(trainer: Any, run: Path) -> None:
    trainer.wait_for(lambda: CheckpointFolder(run / "checkpoints").find("latest"), "the first checkpoint")


def test_a_failed_save_is_a_warning_and_a_failed_last_save_an_error(lab: Any, small_disk: SmallDisk) -> None:
    run = small_disk.path / "tiny"
    with lab.started(run, lab.flags(small_disk.path, **ENDLESS)) as trainer:
        wait_for_a_checkpoint(trainer, run)
        small_disk.fill(trainer.process.pid, leave_bytes=1_000_000)  # room for the logs, not for a checkpoint
        trainer.wait_for(lambda: "checkpoint not written" in trainer.output, "the warning")
        failed_at = last_logged_step(lab, run)
        trainer.wait_for_step(failed_at + 2)  # it goes on
        os.kill(trainer.process.pid, signal.SIGTERM)
        code, output = trainer.wait(), trainer.output
    assert code == 1, output
    assert "could not be written" in output.splitlines()[-1]
    assert "Traceback" not in output
    warnings: list[str] = []
    state = load_newest(CheckpointFolder(run / "checkpoints"), warnings.append)
    assert state and state["step"] <= failed_at
    assert warnings == []
    assert not list((run / "checkpoints").glob(".*.tmp"))
    (small_disk.filler).unlink(missing_ok=True)
    flags = [*lab.flags(small_disk.path, **ENDLESS), "--resume", "latest"]
    with lab.started(run, flags) as trainer:  # with room again it goes on
        kept = CheckpointFolder(run / "checkpoints")  # in which latest.pt is not whole while it changes
        trainer.wait_for(lambda: any(one.sidecar.step > state["step"] for one in kept.all()), "a newer checkpoint")


def test_a_disk_full_to_the_last_byte_ends_in_one_sentence_and_the_checkpoint_stays(
    lab: Any, small_disk: SmallDisk
) -> None:
    """Not even the logs can be written: the run may go on or end, but in a sentence, and with the checkpoint whole."""
    run = small_disk.path / "tiny"
    with lab.started(run, lab.flags(small_disk.path, **ENDLESS)) as trainer:
        wait_for_a_checkpoint(trainer, run)
        small_disk.fill(trainer.process.pid, leave_bytes=0)
        lab.wait_until(lambda: trainer.process.poll() is not None or "step=60 " in trainer.output, "step 60 or the end")
        with contextlib.suppress(ProcessLookupError):
            os.kill(trainer.process.pid, signal.SIGTERM)
        code, output = trainer.wait(), trainer.output
    state = load_newest(CheckpointFolder(run / "checkpoints"), lambda _: None)
    assert state and state["step"] >= 2
    assert code == 1, output
    assert "error: " in output.splitlines()[-1], output
    assert "main_guard" not in output, "a traceback"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that nothing can be written to: a file system mounted so, or, where that is not permitted, a file."""
    path = tmp_path / "read_only"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(path)]
    mounted = shutil.which("mount") and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    if not mounted:
        path.rmdir()
        path.touch()
    yield path
    if mounted:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("setting", ["artifacts_dir", "checkpoint_dir"])
def test_a_read_only_folder_is_refused_at_the_start_in_one_sentence(
    lab: Any, tmp_path: Path, read_only: Path, setting: str, nproc: int
) -> None:
    folders = {"artifacts_dir": tmp_path / "artifacts"} | {setting: read_only}
    flags = lab.flags(**folders)
    done = lab.run("gpt2core.cli", ["train", "--nproc_per_node", str(nproc), *flags])
    assert done.returncode == 1
    (said,) = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line]
    assert str(read_only) in said
    assert not (tmp_path / "artifacts" / "tiny" / "metrics.jsonl").exists()


def test_logs_cut_short_by_a_crash_do_not_keep_the_run_from_going_on(
    lab: Any, first_epoch: Path, tmp_path: Path, train_here: Callable[[list[str]], None]
) -> None:
    run = lab.copy_run(first_epoch, tmp_path)
    with (run / "metrics.jsonl").open("ab") as file:  # and blocks that the disk never got
        file.write(b'{"step": 13, "loss": 10.1}\n\xff\xfe\n5\n{}\n{"step": 14, "lo')
    train_here([*lab.flags(tmp_path), "--resume", "latest"])
    assert list(lab.logged(run, "loss")) == list(range(1, lab.max_steps + 1))
