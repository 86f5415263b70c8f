"""Training state to and from checkpoint files. Nothing in one can run code: it loads with weights_only=True."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import torch

from gpt2core.checkpoint_folder import FORMAT, LATEST, Checkpoint, CheckpointFolder, Sidecar


def save(folder: CheckpointFolder, state: dict[str, Any], *, names: list[str], keep: int) -> Checkpoint:
    """Commits a state under its rolling name, `latest` and `names`. OSError leaves the older checkpoints as they were."""
    return folder.commit(
        lambda file: torch.save(state, file),
        step=state["step"],
        epoch=state["epoch"],
        train_loss=state["train_loss"],
        val_loss=state["val_loss"],
        names=names,
        keep=keep,
    )


def load_newest(folder: CheckpointFolder, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The state to resume from: latest, else the one of the newest step that is whole.

    None when the folder holds no checkpoint at all; ValueError when it holds some and none is whole.
    """
    if folder.file(LATEST).exists() and not folder.find(LATEST):
        warn(f"skipped {folder.file(LATEST)}: its sidecar is missing or does not fit, so it was never finished")
    for checkpoint in sorted(folder.all(), key=lambda found: found.name != LATEST):
        try:
            return load(checkpoint.path, checkpoint.sidecar)
        except ValueError as error:
            warn(f"skipped {error}")
    if folder.has_any():
        raise ValueError(f"{folder.path} holds checkpoints, but none of them is whole: look at the warnings above")
    return None


def load(path: Path | str, sidecar: Sidecar | None = None) -> dict[str, Any]:
    """Reads a checkpoint, at a path or fsspec URL, onto the CPU; nothing in it can run code.

    With its sidecar the content is verified first.

    Raises ValueError, naming the file, when it is damaged or not one of ours.
    """
    try:
        with fsspec.open(str(path), "rb") as file:
            content = file.read()
    except (OSError, ImportError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    if sidecar and hashlib.sha256(content).hexdigest() != sidecar.sha256:
        raise ValueError(f"{path}: its content does not have the hash in its sidecar, so it is damaged")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise whatever the bytes lead them to
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None
    if not isinstance(state, dict) or not {"format", "model", "step"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of this project: it has no format, model and step")
    if state["format"] > FORMAT:
        raise ValueError(f"{path} was written by a newer version (format {state['format']}, this one reads {FORMAT})")
    return state


def check_same_model(path: object, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError, naming what differs, when a checkpoint is of another model size."""
    different = [
        f"{name} {saved.get(name)} in it, {wanted[name]} asked for"
        for name in wanted
        if saved.get(name) != wanted[name]
    ]
    if different:
        raise ValueError(f"{path} is of another model ({'; '.join(different)}): give the settings it was made with")
