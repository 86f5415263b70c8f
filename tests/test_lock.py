"""One run at a time in a folder: the second is refused and changes nothing, a dead one is in nobody's way."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from conftest import wait_until

from gpt2core.flags import TRY_AGAIN

pytestmark = pytest.mark.slow  # each test starts trainers


def state(process: Path) -> str:
    """A letter, by proc(5)."""
    return (process / "stat").read_text().rpartition(")")[2].split()[0]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_on_a_folder_is_refused_and_a_killed_one_is_in_nobodys_way(lab: Any, tmp_path: Path) -> None:
    run = tmp_path / "tiny"
    endless = lab.flags(tmp_path, steps_per_epoch=100_000)
    resume = [*endless, "--resume", "latest"]
    with lab.started(run, endless) as holder:
        holder.wait_for_step(3)
        os.kill(holder.process.pid, signal.SIGSTOP)  # so that what changes now is the second one's doing
        threads = Path(f"/proc/{holder.process.pid}/task")
        wait_until(lambda: all(state(thread) == "T" for thread in threads.iterdir()), "all its threads to stop")
        before = contents(run)
        said = f"{run} is in use by process {holder.process.pid} on "
        alone = lab.run("gpt2core.train", resume)
        assert (alone.returncode, len(alone.stderr.splitlines())) == (TRY_AGAIN, 1), alone.stderr
        assert said in alone.stderr
        two = lab.run("gpt2core.cli", ["train", "--nproc_per_node", "2", *resume])
        assert two.returncode == TRY_AGAIN, two.stdout + two.stderr
        assert (two.stdout + two.stderr).count(said) == 1
        assert contents(run) == before
        os.kill(holder.process.pid, signal.SIGKILL)
        holder.wait()
    with lab.started(run, resume) as next_one:
        next_one.wait_for(lambda: "resumed from" in next_one.output, "it to resume")
        next_one.wait_for_step(max(lab.logged(run, "loss")) + 1)


def test_the_lock_is_free_while_the_run_rests(lab: Any, first_epoch: Path, tmp_path: Path, train_here: Any) -> None:
    """Within one process, too: the lock goes with the run, not with the process."""
    lab.copy_run(first_epoch, tmp_path)
    for _ in range(2):
        train_here([*lab.flags(tmp_path), "--resume", "latest", "--stop_epoch", "1"])


def test_a_setting_that_rank_0_refuses_ends_all_ranks_in_one_sentence(
    lab: Any, first_epoch_two_ranks: Path, tmp_path: Path
) -> None:
    lab.copy_run(first_epoch_two_ranks, tmp_path)
    flags = [*lab.flags(tmp_path, max_lr=2e-3), "--resume", "latest"]
    done = lab.run("gpt2core.cli", ["train", "--nproc_per_node", "2", *flags])
    assert done.returncode == 1
    said = done.stdout + done.stderr
    assert said.count("train.max_lr: 0.001 -> 0.002") == 1
    assert "Connection closed" not in said
