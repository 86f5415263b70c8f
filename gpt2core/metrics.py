"""What rank 0 writes while it trains: metrics.jsonl for programs, logs/log.txt for people, TensorBoard for curves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from gpt2core.config import RunConfig
from gpt2core.launch import tell
from gpt2core.run_folder import RunFolder
from gpt2core.storage import read_json_lines, write_text

BUCKETS = 64  # of a histogram

# Where TensorBoard shows each number.
TENSORBOARD_TAGS = {
    "loss": "loss/train",
    "val_loss": "loss/val",
    "lr": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "tokens_per_sec": "speed/tokens_per_sec",
    "step_ms": "speed/step_ms",
    "data_wait_ms": "speed/data_wait_ms",
    "memory_gib": "speed/memory_gib",
    "mfu": "speed/mfu",
    "acc": "hellaswag/acc",
    "acc_norm": "hellaswag/acc_norm",
}


class MetricsLog:
    """Appends to the three logs of a run. Opened to resume at a step, it drops what a crashed attempt logged beyond."""

    def __init__(self, folder: RunFolder, *, resume_at: int | None, use_tensorboard: bool) -> None:
        self._warned = False
        folder.log_file.parent.mkdir(parents=True, exist_ok=True)
        if resume_at is not None:  # else another process may be writing it: only append
            # a run that starts afresh measures step 0 again
            kept = [line for line in read_json_lines(folder.metrics_file) if line["step"] <= resume_at and resume_at]
            write_text(folder.metrics_file, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = folder.metrics_file.open("a", encoding="utf-8", buffering=1)
        self._text = folder.log_file.open("a", encoding="utf-8", buffering=1)
        purge_step = resume_at + 1 if resume_at else resume_at
        self._board = SummaryWriter(str(folder.tensorboard), purge_step=purge_step) if use_tensorboard else None

    def say(self, message: str) -> None:
        """One line to the terminal and to log.txt."""
        tell(self.note(message))

    def note(self, message: str) -> str:
        """One line to log.txt alone; returns it."""
        line = f"{datetime.now():%Y-%m-%d %H:%M:%S} {message}"
        self._keep_going(lambda: self._text.write(line + "\n"))
        return line

    def numbers(self, step: int, **values: float) -> None:
        """One measurement to all three: 'step=250 loss=3.2118 lr=0.00035', the same names in metrics.jsonl."""
        self._keep_going(lambda: self._metrics.write(json.dumps({"step": step, **values}) + "\n"))
        self.say(f"step={step} " + " ".join(f"{name}={_short(value)}" for name, value in values.items()))
        for name, value in values.items() if self._board else ():
            self._on_board("add_scalar", TENSORBOARD_TAGS.get(name, name), value, step)

    def sample(self, step: int, text: str) -> None:
        self.say(f"step={step} sample: {text!r}")
        self._on_board("add_text", "sample", text, step)

    def histograms(self, step: int, model: nn.Module) -> None:
        """Parameters and gradients of every tensor."""
        if not self._board:
            return
        for name, parameter in model.named_parameters():
            for kind, tensor in (("parameters", parameter.detach()), ("gradients", parameter.grad)):
                if tensor is not None and (counted := histogram(tensor)):
                    self._on_board("add_histogram_raw", f"{kind}/{name}", *counted, step)

    def hyperparameters(self, config: RunConfig, results: dict[str, float]) -> None:
        """Fills TensorBoard's HParams tab: the settings, and the metrics that they led to."""
        if not self._board:
            return
        settings = {
            f"{group}.{name}": value if isinstance(value, int | float | str | bool) else str(value)
            for group in ("model", "train", "data")
            for name, value in getattr(config, group).model_dump().items()
        }
        metrics: dict[str, Any] = {f"final/{name}": value for name, value in results.items()}
        for summary in hparams(settings, metrics):
            self._keep_going(partial(self._board._get_file_writer().add_summary, summary))
        for tag, value in metrics.items():
            self._on_board("add_scalar", tag, value)

    def close(self) -> None:
        for file in (self._metrics, self._text, self._board):
            if file:
                self._keep_going(file.close)

    def _on_board(self, method: str, *values: Any) -> None:
        """Calls a method of TensorBoard's writer, if there is one."""
        if self._board:
            self._keep_going(lambda: getattr(self._board, method)(*values))

    def _keep_going(self, write: Callable[[], object]) -> None:
        """A log that cannot be written (a full disk) is a warning, once, and no reason to stop training."""
        try:
            write()
        except OSError as error:
            if not self._warned:
                tell(f"WARNING: the logs cannot be written ({error}): training goes on without them")
            self._warned = True


def _short(value: float) -> str:
    return f"{value:.5g}" if abs(value) < 1000 else f"{value:.0f}"


def histogram(tensor: Tensor) -> tuple[Any, ...] | None:
    """What TensorBoard's add_histogram_raw wants to know of a tensor: minimum, maximum, number, sum, sum of squares, upper
    limits of the buckets and what is in them. None when not all of it is finite.

    Counted on the tensor's own device: a GPU takes milliseconds for what takes seconds on the host.
    """
    values = tensor.float().flatten()
    exact = torch.float32 if tensor.device.type == "mps" else torch.float64
    low, high = values.aminmax()
    width = torch.where(high > low, high - low, 1e-6) / BUCKETS
    limits = low + width * torch.arange(1, BUCKETS + 1, device=values.device)
    counts = torch.bincount(torch.bucketize(values, limits[:-1], out_int32=True), minlength=BUCKETS)
    sums = torch.stack([values.sum(dtype=exact), values.square().sum(dtype=exact)])
    bounds = [low.item(), high.item()]
    if not all(map(math.isfinite, bounds)):
        return None
    return *bounds, values.numel(), *sums.tolist(), limits.tolist(), counts.tolist()
