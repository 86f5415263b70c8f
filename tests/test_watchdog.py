"""A rank that hangs: noticed from outside, its peers' stacks shown, all of it killed, and the run resumes to the same bits."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from prefect.logging import disable_run_logger

from gpt2core import heartbeat, launch, lock
from gpt2core.checkpoint import Saver
from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.config import LaunchConfig, ModelConfig
from gpt2core.distributed import Ranks
from gpt2core.evaluation import validation_loss
from gpt2core.hellaswag import Questions, evaluate_hellaswag, load_hellaswag
from gpt2core.loader import Sequences
from gpt2core.model import GPT
from gpt2core.processes import Process
from gpt2core.run_folder import RunFolder
from gpt2core.shards import open_shards
from gpt2core.watchdog import Watchdog
from tasks import waiting

ALONE = Ranks(0, 1, torch.device("cpu"))
ENDLESS = {"steps_per_epoch": 100_000, "keep_checkpoints": 1, "eval_freq": 0}


def train(arguments: list[str], nproc: int, watchdog: Watchdog) -> tuple[int, list[str]]:
    """Trains under the watchdog; returns the exit code and the output."""
    lines: list[str] = []
    torchrun_flags = LaunchConfig(nproc_per_node=nproc).torchrun_flags(nproc, "tiny")
    code = launch.run(launch.python_command("gpt2core.train", arguments, torchrun_flags), lines.append, nproc, watchdog)
    return code, lines


def ranks_at_step(lab: Any, run: Path, step: int) -> list[Process]:
    lab.wait_until(lambda: any(line["step"] >= step and "loss" in line for line in lab.metrics(run)), f"step {step}")
    trainer = heartbeat.read(run / "heartbeat.json")
    assert trainer and trainer.is_under_way
    return [rank.process for rank in trainer.ranks]


@pytest.mark.slow
def test_a_stopped_rank_is_noticed_killed_and_the_run_resumes_to_the_same_bits(
    lab: Any, tmp_path: Path, straight_two_ranks: Path
) -> None:
    run = tmp_path / "tiny"
    flags = [*lab.flags(tmp_path), "--resume", "latest"]
    watchdog = Watchdog(run / "heartbeat.json", limit_s=lab.deadline_s, start_limit_s=lab.deadline_s)
    with ThreadPoolExecutor() as pool:
        attempt = pool.submit(train, flags, 2, watchdog)
        processes = ranks_at_step(lab, run, 5)
        os.kill(processes[1].pid, signal.SIGSTOP)
        watchdog.limit_s = 1.0
        code, lines = attempt.result(lab.deadline_s)
    output = "\n".join(lines)
    assert code != 0
    assert watchdog.hung and watchdog.hung.startswith("no progress for 1 s")
    assert re.search(r'File ".*trainer\.py", line \d+ in (train_step|fit)', output), output  # of rank 0, which could
    lab.wait_until(lambda: not any(process.is_alive() for process in processes), "the killed ranks to be gone")
    assert max(lab.logged(run, "loss")) < lab.max_steps
    watchdog = Watchdog(run / "heartbeat.json", limit_s=0, start_limit_s=0)
    assert train(flags, 2, watchdog)[0] == 0
    assert watchdog.hung is None
    lab.assert_same_run(run, straight_two_ranks)


@pytest.mark.slow
def test_a_trainer_that_hangs_before_its_first_step_has_the_longer_limit(lab: Any, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    watchdog = Watchdog(run / "heartbeat.json", limit_s=0.001, start_limit_s=lab.deadline_s)
    with ThreadPoolExecutor() as pool:
        attempt = pool.submit(train, lab.flags(tmp_path, **ENDLESS), 1, watchdog)
        trainer = lab.wait_until(lambda: heartbeat.read(run / "heartbeat.json"), "the heartbeat")
        os.kill(trainer.ranks[0].process.pid, signal.SIGSTOP)
        watchdog.start_limit_s = 1.0  # no earlier: imports take longer on a busy machine
        code, lines = attempt.result(lab.deadline_s)
    assert code == -signal.SIGKILL, lines
    assert watchdog.hung and watchdog.hung.startswith("no progress for 1 s")


@pytest.mark.slow
def test_the_next_attempt_waits_for_ranks_that_outlive_their_launcher_and_then_ends_them(
    lab: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "tiny"
    flags = ["train", "--nproc_per_node", "1", *lab.flags(tmp_path, **ENDLESS)]
    with lab.started(run, flags, module="gpt2core.cli") as gpt2:
        (rank,) = ranks_at_step(lab, run, 3)
        rank.send(signal.SIGSTOP)  # it will not hear the SIGTERM that its launcher's death brings
        gpt2.process.kill()
        gpt2.wait()
        trainer = heartbeat.read(run / "heartbeat.json")
        assert trainer and trainer.orphans() == [rank]
        monkeypatch.setattr(waiting, "GRACE_S", 2.0)
        with disable_run_logger():
            waiting.wait_for_trainers(RunFolder(tmp_path, "tiny"), [])
        assert not rank.is_alive()
        assert lock.holder(run / lock.LOCK_FILE) is None


@pytest.fixture
def beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A heartbeat file that is old; calling it says whether it was touched since."""
    file = tmp_path / "heartbeat.json"
    heartbeat.begin(file, [])
    monkeypatch.setattr(heartbeat, "SECONDS_BETWEEN_BEATS", 0.0)
    os.utime(file, (0, 0))
    yield lambda: file.stat().st_mtime > 0
    heartbeat._file = None


@pytest.mark.parametrize("phase", ["validation", "HellaSwag", "a checkpoint"])
def test_long_phases_are_progress(lab: Any, tmp_path: Path, beats: Any, phase: str) -> None:
    model = GPT(ModelConfig(context_length=32, num_layers=1, embd_size=32, num_heads=2))
    if phase == "validation":
        sequences = Sequences(open_shards(str(lab.data_dir), "val"), 32)
        validation_loss(lambda *batch: model(*batch, reduction="none"), sequences, 1024, 4, ALONE)
    elif phase == "HellaSwag":
        evaluate_hellaswag(model, Questions.of(load_hellaswag(str(lab.hellaswag))[:2], "build-nanogpt", 32), ALONE)
    else:
        saver = Saver(CheckpointFolder(tmp_path / "checkpoints"), 1, print)
        saver.begin({"step": 1, "epoch": 0, "weights": torch.zeros(3_000_000)}, [])
        saver.finish()
    assert beats()


TIED = """
import os, sys, threading
from gpt2core import launch

sys.platform = sys.argv[1]
launch.tie_to_parent(os.getppid())
print(os.getpid(), flush=True)
threading.Event().wait()
"""


@pytest.mark.parametrize("platform", [sys.platform, "without a signal from the kernel"])
def test_a_process_tied_to_its_parent_ends_with_it(lab: Any, platform: str) -> None:
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {TIED!r}, {platform!r}])"
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        tied = int(process.stdout.readline())
        try:
            assert lab.is_alive(tied)
            process.kill()
            lab.wait_until(lambda: not lab.is_alive(tied), "the process to end", 30)
        finally:
            process.kill()
            if lab.is_alive(tied):
                os.kill(tied, signal.SIGKILL)


HUNG = """
import os, signal, subprocess, sys, threading
from pathlib import Path
from gpt2core import heartbeat
from gpt2core.processes import Process
from gpt2core.watchdog import end_orphans

signal.signal(signal.SIGTERM, lambda *_: None)
stopped = subprocess.Popen(["sleep", "1000"], start_new_session=True)
stopped.send_signal(signal.SIGSTOP)
file = Path(sys.argv[1])
ranks = [heartbeat.Rank(process=Process.of(pid), parent=None) for pid in (os.getpid(), stopped.pid)]
heartbeat.begin(file, ranks)
end_orphans(os.getppid(), file, 0.1)
print("hangs", flush=True)
threading.Lock().acquire() and threading.Event().wait()
"""


def test_hung_ranks_whose_launcher_was_killed_end_by_themselves(lab: Any, tmp_path: Path) -> None:
    """As after a cancel that did not help: Prefect kills the flow and torchrun, and nobody is left to kill the ranks."""
    file = tmp_path / "heartbeat.json"
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HUNG!r}, {str(file)!r}])"
    with subprocess.Popen([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "hangs\n"
        trainer = heartbeat.read(file)
        assert trainer and all(rank.process.is_alive() for rank in trainer.ranks)
        process.kill()
        lab.wait_until(lambda: not any(rank.process.is_alive() for rank in trainer.ranks), "the ranks to end")
        assert process.stdout.read() == ""
