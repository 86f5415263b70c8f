"""The flags of training, and what they are refused for before a trainer starts.

No torch in here: `gpt2 train` answers without the second that it takes to load, and waits for its trainer without its memory.
"""

from __future__ import annotations

import argparse

from gpt2core.checkpoint_folder import CheckpointFolder
from gpt2core.config import RunConfig
from gpt2core.flags import add_recipe, add_settings
from gpt2core.run_folder import RunFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `python -m gpt2core.train` and of `gpt2 train`."""
    parser.add_argument(
        "--resume",
        metavar="latest|NAME|PATH",
        help="checkpoint to go on from; 'latest' starts afresh where there is none",
    )
    parser.add_argument("--force", action="store_true", help="resume although settings that shape the run have changed")
    parser.add_argument(
        "--accept_changed_data", action="store_true", help="resume although the shards are not those it was trained on"
    )
    parser.add_argument("--stop_epoch", type=int, metavar="N", help="stop at the end of epoch N, counted from 1")
    parser.add_argument("--list_checkpoints", action="store_true", help="show the run's checkpoints and exit")
    add_recipe(parser)
    add_settings(parser, RunConfig)


def list_checkpoints(config: RunConfig) -> None:
    """Prints the run's checkpoints, wherever it has them."""
    from gpt2core.listing import print_checkpoints

    begun = RunFolder(config.artifacts_dir, config.run_name)  # its config.json says where they lie
    folder = begun if begun.config_file.exists() else RunFolder.of(config)
    print_checkpoints(CheckpointFolder(folder.checkpoints))


def refuse_silent_overwrite(config: RunConfig, resume: str | None) -> None:
    """Raises ValueError when the run folder holds checkpoints and it was not said what to do with them."""
    folder = RunFolder.of(config)
    begun_in = RunFolder(config.artifacts_dir, config.run_name).checkpoints  # as config.json has it
    if begun_in != folder.checkpoints and CheckpointFolder(begun_in).names():
        raise ValueError(
            f"the checkpoints of {folder.path} lie in {begun_in}, and --checkpoint_dir says {folder.checkpoints}: "
            f"give the same --checkpoint_dir, move them there, or start another run with --run_name"
        )
    if resume is None and CheckpointFolder(folder.checkpoints).names():
        raise ValueError(
            f"{folder.path} already holds checkpoints: go on from them with --resume latest, "
            f"or start another run with --run_name"
        )
