"""Removes whole runs: what test runs leave adds up, for each has a checkpoint of its own."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path

from gpt2core import heartbeat, lock
from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.listing import size
from gpt2core.records import current_best
from gpt2core.run_folder import RunFolder
from gpt2core.storage import file_sizes, is_remote, join, remove


def clean(artifacts: Path, names: list[str], really: bool) -> list[str]:
    """What of each run is removed, or would be without `really`: a line a run.

    Raises ValueError, before anything is removed, for a name that is no run here, a run that is alive, and the one that
    the promoted model came from.
    """
    folders = [RunFolder(artifacts, name) for name in names]
    best = current_best(artifacts)
    for folder in folders:
        if folder.path.parent != artifacts or not folder.config_file.exists():
            raise ValueError(f"{folder.path} holds no run: there is no {folder.config_file.name} in it")
        if best and best.run_name == folder.path.name:
            raise ValueError(
                f"{folder.path} is the run that {artifacts / 'best'} came from (step {best.step}): promote another first"
            )
    with ExitStack() as held:
        for folder in folders:
            _hold(folder, held)
        return [_remove(folder, really) for folder in folders]


def _hold(folder: RunFolder, held: ExitStack) -> None:
    trainer = heartbeat.read(folder.heartbeat_file)
    alive = [rank.process.pid for rank in trainer.ranks if rank.process.is_alive()] if trainer else []
    if alive:
        raise ValueError(f"{folder.path} is alive: process {alive[0]} trains it; end that first")
    for name in (lock.FLOW_LOCK_FILE, lock.LOCK_FILE):
        try:
            held.enter_context(lock.hold(folder.path / name))
        except BlockingIOError as error:
            raise ValueError(f"{folder.path} is alive: {error}; end that first") from None


def _remove(folder: RunFolder, really: bool) -> str:
    files = [path for path in folder.path.rglob("*") if path.is_file()]
    by_inode = {stat.st_ino: stat.st_size for path in files if (stat := path.lstat())}
    checkpoints = folder.checkpoints
    line = f"{folder.path}: {len(files)} files, {size(sum(by_inode.values()))}"
    if is_remote(checkpoints) or not Path(checkpoints).is_relative_to(folder.path):
        line += f", and {checkpoints}: {size(CheckpointFolder(checkpoints).disk_bytes())}"
        for name in file_sizes(checkpoints) if really else ():
            remove(join(checkpoints, name))
    if really:
        shutil.rmtree(folder.path)
    return ("removed " if really else "would remove ") + line
