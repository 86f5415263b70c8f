"""What must be right before a long run starts, checked in seconds."""

from __future__ import annotations

import shutil

from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.config import LaunchConfig, RunConfig
from gpt2core.launch import num_processes
from gpt2core.run_folder import RunFolder
from gpt2core.shards import SPLITS, cache_of, check_cache_room, open_shards
from gpt2core.storage import is_remote, local_path


def claim_run(config: RunConfig, launched: LaunchConfig, force: bool = False) -> None:
    """Writes the run's config.json, after the checks that need no data: before hours of preparation, not after.

    Raises ValueError when the batch does not divide, a GPU is not there, or, without `force`, the folder holds a run
    with other settings.
    """
    config.grad_accum_steps(launched.nnodes * num_processes(launched.nproc_per_node, config.train.device))
    RunFolder.of(config).claim(config, force)


def preflight(config: RunConfig, world_size: int) -> list[str]:
    """Lines that say what was found. Raises ValueError at the first thing that would stop the run."""
    config.grad_accum_steps(world_size)
    train = config.train
    found = [f"model: {config.model.num_parameters() / 1e6:.1f}M parameters, context {config.model.context_length}"]
    opened = {split: open_shards(config.data.data_dir, split, cache_of(config.data)) for split in SPLITS}
    check_cache_room(opened["train"], opened["val"], train.shuffle)
    for split, shards in opened.items():
        found.append(f"{split} data: {sum(shard.num_tokens for shard in shards):,} tokens in {len(shards)} shards")
    found.append(_disk_space(config))
    return found


def _disk_space(config: RunConfig) -> str:
    """Room for every tier: the rolling checkpoints (latest and its backup are among them), one an epoch, the best, and
    the one being written."""
    location = RunFolder.of(config).checkpoints
    if is_remote(location):
        return f"checkpoints: {location}"
    folder = local_path(location)
    folder.mkdir(parents=True, exist_ok=True)
    files = config.train.keep_checkpoints + config.train.num_epochs + 2
    needed = max(0, files * config.checkpoint_bytes() - CheckpointFolder(location).disk_bytes())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"{folder} has {free / 1e9:.1f} GB free, and the run's checkpoints need {needed / 1e9:.1f} GB more "
            f"({files} of {config.checkpoint_bytes() / 1e9:.2f} GB): free some space or lower --keep_checkpoints"
        )
    return f"disk: {free / 1e9:.0f} GB free, checkpoints need up to {needed / 1e9:.1f} GB"
