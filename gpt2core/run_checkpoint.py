"""A model out of a checkpoint that a person named: latest, best, epoch_00003, a path or a URL."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gpt2core.checkpoint import load
from gpt2core.checkpoint_folder import BEST, CheckpointFolder
from gpt2core.config import ModelConfig, RunConfig
from gpt2core.distributed import dtype_to_measure_in, pick_device
from gpt2core.flags import read_config
from gpt2core.import_weights import config_of, read_huggingface
from gpt2core.model import GPT
from gpt2core.records import published_at
from gpt2core.run_folder import RunFolder
from gpt2core.storage import exists, is_remote, join, read_text


@dataclass(frozen=True)
class NamedCheckpoint:
    """A loaded checkpoint, and which one it was."""

    name: str  # its name in the run's folder, else its path or URL
    state: dict[str, Any]
    sha256: str | None  # from the sidecar, None for one outside a run folder

    @property
    def is_of_a_run(self) -> bool:
        """Whether it lies among the checkpoints of the run that was named."""
        return self.sha256 is not None

    def weights_sha256(self) -> str:
        """What tells these weights from others, wherever they lie."""
        hashed = hashlib.sha256()
        for name, tensor in sorted(self.state["model"].items()):
            hashed.update(name.encode())
            hashed.update(tensor.contiguous().view(torch.uint8).numpy().data)
        return hashed.hexdigest()

    @property
    def config(self) -> RunConfig:
        """The configuration that it was trained with."""
        return RunConfig.model_validate(self.state["config"])

    def model(self, device: str | torch.device = "auto", precision: str = "auto") -> GPT:
        """The model on its device, to be measured and not trained: it holds its weights as they are computed with."""
        on = pick_device(device) if isinstance(device, str) else device
        model = GPT(ModelConfig.model_validate(self.state["config"]["model"]), dtype_to_measure_in(precision, on))
        model.load_state_dict(self.state["model"])
        model.to(on).eval().cast_weights()
        return model


def load_named(name: str, folder: RunFolder) -> NamedCheckpoint:
    """Loads `latest`, `best`, or another name in the run's folder; else a path, URL or folder as `load_at` takes it.

    Raises ValueError that names what is there when there is no such checkpoint.
    """
    checkpoints = CheckpointFolder(folder.checkpoints)
    in_run = BEST if name == "best" else name
    if found := checkpoints.find(in_run):
        return NamedCheckpoint(found.name, load(found.location, found.sidecar), found.sidecar.sha256)
    if at := load_at(name):
        return at
    if in_run in checkpoints.names():
        raise BlockingIOError(f"{checkpoints.file(in_run)} is just being written, or was never finished: try again")
    there = ", ".join(checkpoint.name for checkpoint in checkpoints.all()) or "none"
    raise ValueError(
        f"checkpoint {name}: there is no such file, nor one of that name in {folder.checkpoints} (there are: {there}); the promoted model is --checkpoint {folder.path.parent / 'best'}"
    )


def load_at(location: str) -> NamedCheckpoint | None:
    """Loads the checkpoint at a path or fsspec URL, the model in a transformers folder, or the one published there.

    None when nothing of that kind lies there.
    """
    if location.endswith(".pt") or Path(location).is_file():
        return NamedCheckpoint(location, load(location), None) if exists(location) else None
    published = published_at(location)
    folder = join(location, published.folder) if published else location
    if exists(join(folder, "config.json")):
        return _in_folder(folder)
    return NamedCheckpoint(location, load(location), None) if is_remote(location) and exists(location) else None


def _in_folder(folder: str) -> NamedCheckpoint:
    """A folder as transformers have it; one that was promoted here says what it was trained with."""
    weights, model = read_huggingface(folder)
    training, promotion = join(folder, "training_config.json"), join(folder, "promotion.json")
    config = config_of(model)
    if exists(training):
        config = read_config(training).model_copy(update={"model": model})  # the export has no padding
    step = json.loads(read_text(promotion))["candidate"]["step"] if exists(promotion) else 0
    state = {"model": weights, "config": config.model_dump(mode="json"), "step": step, "epoch": 0}
    return NamedCheckpoint(folder, state, None)
