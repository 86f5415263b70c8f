"""Training state to and from checkpoint files. Nothing in one can run code: it loads with weights_only=True."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any, BinaryIO

import torch
from torch import Tensor

from gpt2core import heartbeat
from gpt2core.checkpoint_folder import FORMAT, LATEST, Checkpoint, CheckpointFolder, Sidecar, Summary, sidecar_beside
from gpt2core.storage import fetched

SECONDS_TO_RETRY = 30.0


def save(folder: CheckpointFolder, state: dict[str, Any], *, names: list[str], keep: int) -> Checkpoint:
    """Commits a state under its rolling name, `latest` and `names`. OSError leaves the older checkpoints as they were."""
    return folder.commit(lambda file: torch.save(state, file), _summary(state), names=names, keep=keep)


def save_alone(folder: CheckpointFolder, state: dict[str, Any], name: str) -> Checkpoint:
    """Commits a state under this name and no other: weights that nobody shall resume from."""
    return folder.commit_alone(lambda file: torch.save(state, file), _summary(state), name)


def _summary(state: dict[str, Any]) -> Summary:
    config = json.dumps(state.get("config"), sort_keys=True).encode()
    return Summary(
        **{name: state.get(name) for name in Summary.model_fields if name not in ("config_sha256", "torch_version")},
        config_sha256=hashlib.sha256(config).hexdigest(),
        torch_version=torch.__version__,
    )


class Saver:
    """Writes checkpoints behind the training's back, one at a time.

    `begin` takes a copy of the state in host memory, on a GPU into pinned memory and in the order of its stream, so that
    the next update may be queued at once; a thread writes it. A write that fails is reported and tried again until it
    succeeds or a newer state takes its place.
    """

    def __init__(
        self,
        folder: CheckpointFolder,
        keep: int,
        report: Callable[[str], None],
        retry_after_s: float = SECONDS_TO_RETRY,
    ) -> None:
        self.folder, self.keep, self.report, self.retry_after_s = folder, keep, report, retry_after_s
        self.saved_step: int | None = None
        self.error: Exception | None = None  # of the last attempt
        self._staged = StagedState()
        self._thread: Thread | None = None
        self._hurry = Event()

    def begin(self, state: dict[str, Any], names: list[str]) -> None:
        """Takes the state as it is now; waits first for a write that is still under way, so that none is lost."""
        started = time.perf_counter()
        self.finish()
        staged, wait_for_copy = self._staged.take(state)
        stall_ms = 1000 * (time.perf_counter() - started)
        self._hurry.clear()
        # no daemon: a process that ends in order writes its last checkpoint to the end
        self._thread = Thread(target=self._write, args=(staged, names, wait_for_copy, stall_ms), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Waits for the write under way; one that failed before and waits to be tried again gets a last attempt."""
        if self._thread:
            self._hurry.set()
            while self._thread.is_alive():
                self._thread.join(heartbeat.SECONDS_BETWEEN_BEATS)
                heartbeat.beat()  # a slow write is no hang
            self._thread = None

    def _write(
        self, state: dict[str, Any], names: list[str], wait_for_copy: Callable[[], None], stall_ms: float
    ) -> None:
        step = state["step"]
        while True:
            was_last = self._hurry.is_set()
            started = time.perf_counter()
            try:
                wait_for_copy()
                saved = save(self.folder, state, names=names, keep=self.keep)
                self.saved_step, self.error = step, None
                self.report(
                    f"step={step} saved {saved.name}.pt as latest.pt{''.join(f', {name}.pt' for name in names)} "
                    f"({saved.sidecar.bytes / 1e6:.0f} MB in {time.perf_counter() - started:.1f} s, "
                    f"training waited {stall_ms:.0f} ms)"
                )
                return
            except Exception as error:  # remote storage has errors of its own, and none of them may end the training
                self.error = error
                self.report(
                    f"step={step} WARNING: checkpoint not written ({type(error).__name__}: {error}); "
                    f"going on, the older ones are intact, and this one is {'given up' if was_last else 'tried again'}"
                )
            if was_last:
                return
            self._hurry.wait(self.retry_after_s)


class StagedState:
    """A copy of a state in host memory; its buffers serve again at the next one."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, state: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]]:
        """The copy, and what to call before it is read: the GPU may still be writing it."""
        copies: dict[tuple[Any, ...], Tensor] = {}
        staged = self._copy(state, copies)
        self._buffers = copies
        if not torch.cuda.is_initialized():
            return staged, lambda: None
        copied = torch.cuda.Event()
        copied.record()
        return staged, copied.synchronize

    def _copy(self, value: Any, copies: dict[tuple[Any, ...], Tensor]) -> Any:
        if isinstance(value, Tensor):
            return self._copy_tensor(value.detach(), copies)
        if isinstance(value, dict):
            return {key: self._copy(item, copies) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return type(value)(self._copy(item, copies) for item in value)
        return value

    def _copy_tensor(self, tensor: Tensor, copies: dict[tuple[Any, ...], Tensor]) -> Tensor:
        """Tensors that share memory, as the head and the token embedding do, share their copy."""
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device))
        if key not in copies:
            on_gpu = tensor.device.type == "cuda"
            buffer = self._buffers.get(key)
            if buffer is None:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=on_gpu)
            copies[key] = buffer.copy_(tensor, non_blocking=on_gpu)
        return copies[key]


def load_newest(folder: CheckpointFolder, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The state to resume from: latest, else the whole one that was saved last.

    None when the folder holds no checkpoint at all; ValueError when it holds some and none is whole.
    """
    whole = folder.all()
    for name in sorted(set(folder.names()) - {checkpoint.name for checkpoint in whole}):
        warn(f"skipped {folder.file(name)}: its sidecar is missing or does not fit, so it was never finished")
    for checkpoint in sorted(whole, key=lambda found: found.name != LATEST):
        try:
            return load(checkpoint.location, checkpoint.sidecar)
        except ValueError as error:
            warn(f"skipped {error}")
    if folder.names():
        raise ValueError(f"{folder.location} holds checkpoints, but none of them is whole: look at the warnings above")
    return None


def load(path: Path | str, sidecar: Sidecar | None = None) -> dict[str, Any]:
    """Reads a checkpoint, at a path or fsspec URL, onto the CPU; nothing in it can run code.

    The content is verified first against its sidecar, which is looked for beside it when none is given. On Linux
    tensors are mapped from the file, so that the ranks of a machine share the memory in which they lie.

    Raises ValueError, naming the file, when it is damaged or not one of ours; ConnectionError when remote storage does
    not answer, which says nothing about the file.
    """
    sidecar = sidecar or (sidecar_beside(str(path)) if str(path).endswith(".pt") else None)
    try:
        with fetched(path) as here, here.open("rb") as file:
            if sidecar and hashlib.file_digest(file, "sha256").hexdigest() != sidecar.sha256:
                raise ValueError(f"{path}: its content does not have the hash in its sidecar, so it is damaged")
            state = _unpickled(file, path)
    except ConnectionError:
        raise
    except FileNotFoundError:
        raise ValueError(f"{path} cannot be read: there is no such file") from None
    except (OSError, ImportError) as error:
        raise ValueError(f"{path} cannot be read ({error})") from None
    if not isinstance(state, dict) or not {"format", "model", "step"} <= state.keys():
        raise ValueError(f"{path} is no checkpoint of this project: it has no format, model and step")
    if state["format"] > FORMAT:
        raise ValueError(f"{path} was written by a newer version (format {state['format']}, this one reads {FORMAT})")
    return state


def _unpickled(file: BinaryIO, path: object) -> Any:
    """What the open file holds, whatever takes its name meanwhile."""
    opened = Path(f"/proc/self/fd/{file.fileno()}")
    file.seek(0)
    try:
        if opened.exists():
            return torch.load(opened, map_location="cpu", weights_only=True, mmap=True)
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler and the zip reader raise whatever the bytes lead them to
        raise ValueError(f"{path} is not a readable checkpoint ({type(error).__name__})") from None


def damage(folder: CheckpointFolder, name: str) -> str | None:
    """What is wrong with a checkpoint, None when it is whole: its sidecar, its content, and that it loads."""
    checkpoint = folder.find(name)
    if checkpoint is None:
        there = name in folder.names()
        return "its sidecar is missing or does not fit" if there else f"there is none in {folder.location}"
    try:
        load(checkpoint.location, checkpoint.sidecar)
    except ValueError as error:
        return str(error)
    return None


def check_same_model(path: object, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raises ValueError, naming what differs, when a checkpoint is of another model size."""
    different = [
        f"{name} {saved.get(name)} in it, {wanted[name]} asked for"
        for name in wanted
        if saved.get(name) != wanted[name]
    ]
    if different:
        raise ValueError(f"{path} is of another model ({'; '.join(different)}): give the settings it was made with")
