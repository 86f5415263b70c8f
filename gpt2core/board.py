"""A run's curves for TensorBoard: three folders of event files, so that each has one x axis that only goes forward.

    tensorboard/              what the trainer measures, by step
    tensorboard/over_tokens/  the losses and HellaSwag again, by tokens seen, to compare runs of other batch sizes
    tensorboard/evaluation/   what `gpt2 evaluate` measured of checkpoints, by their step

A resume purges what a crashed attempt wrote beyond its checkpoint (`purge_step`), in each folder by its own axis.
"""

from __future__ import annotations

import math
import re
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from gpt2core.config import RunConfig
from gpt2core.records import Evaluation

BUCKETS = 64  # of a histogram
PERCENTILES = (50, 95, 99)
STEPS_FOR_PERCENTILES = 100  # the last so many

# Where TensorBoard shows each number of metrics.jsonl.
TAGS = {
    "loss": "loss/train",
    "val_loss": "loss/val",
    "lr": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "fp8_saturated": "train/fp8_saturated",
    "tokens_per_sec": "speed/tokens_per_sec",
    "step_ms": "speed/step_ms",
    "data_wait_ms": "speed/data_wait_ms",
    "memory_gib": "speed/memory_gib",
    "mfu": "speed/mfu",
    "eta_s": "progress/hours_to_go",
    "acc": "hellaswag/acc",
    "acc_norm": "hellaswag/acc_norm",
    "acc_stderr": "hellaswag/acc_stderr",
    "acc_norm_stderr": "hellaswag/acc_norm_stderr",
    "examples": "hellaswag/examples",
}
SCALES = {"eta_s": 1 / 3600}
OVER_TOKENS = {"loss", "val_loss", "acc", "acc_norm"}
FINAL = ("loss", "val_loss", "best_val_loss")

# The Custom Scalars page: the curves that say how a run goes.
FRONT_PAGE: dict[str, dict[str, list[Any]]] = {
    "How good": {
        "loss by step: train and validation": ["Multiline", ["loss/train", "loss/val"]],
        "loss by tokens seen": ["Multiline", ["over_tokens/loss_train", "over_tokens/loss_val"]],
        "HellaSwag acc_norm, with its standard error": [
            "Margin",
            ["hellaswag/acc_norm", "hellaswag/acc_norm_lower", "hellaswag/acc_norm_upper"],
        ],
    },
    "How fast": {
        "tokens per second": ["Multiline", ["speed/tokens_per_sec"]],
        "share of the GPU's peak (MFU)": ["Multiline", ["speed/mfu"]],
        "ms a step: median, 95th and 99th of 100": ["Multiline", [f"speed/step_ms_p{share}" for share in PERCENTILES]],
        "hours to go": ["Multiline", ["progress/hours_to_go"]],
    },
    "Is it well": {
        "gradient norm": ["Multiline", ["train/grad_norm"]],
        "learning rate": ["Multiline", ["train/learning_rate"]],
    },
}
LIVE_METRICS = ("loss/train", "loss/val", "hellaswag/acc_norm", "speed/tokens_per_sec")  # of the HParams page


class Board:
    """What the trainer writes. Opened to resume at a step, it purges what was written beyond."""

    def __init__(self, folder: Path, config: RunConfig, resume_at: int) -> None:
        self.config = config
        purge_step = resume_at + 1 if resume_at else 0  # a run that starts afresh measures step 0 again
        tokens = config.train.total_batch_size
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        self._over_tokens = SummaryWriter(str(folder / "over_tokens"), purge_step=purge_step * tokens)
        self._step_ms: deque[float] = deque(maxlen=STEPS_FOR_PERCENTILES)
        self._writer.add_custom_scalars(FRONT_PAGE)
        self._session_end: Any = None
        self._begin_session()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if tag := TAGS.get(name):
                self._writer.add_scalar(tag, value * SCALES.get(name, 1), step)
            if name in OVER_TOKENS:
                tag = f"over_tokens/{TAGS[name].replace('/', '_')}"
                self._over_tokens.add_scalar(tag, value, step * self.config.train.total_batch_size)
        for tag, value in bounds(values).items():
            self._writer.add_scalar(tag, value, step)
        if "step_ms" in values:
            self._step_ms.append(values["step_ms"])
            for share, value in zip(PERCENTILES, np.percentile(self._step_ms, PERCENTILES), strict=True):
                self._writer.add_scalar(f"speed/step_ms_p{share}", float(value), step)

    def samples(self, step: int, texts: list[str]) -> None:
        for number, text in enumerate(texts, start=1):
            self._writer.add_text(f"sample/{number}", _as_code(text), step)

    def histograms(self, step: int, model: nn.Module) -> None:
        """Parameters and gradients of every tensor."""
        for name, parameter in model.named_parameters():
            for kind, tensor in (("parameters", parameter.detach()), ("gradients", parameter.grad)):
                if tensor is not None and (counted := histogram(tensor)):
                    self._writer.add_histogram_raw(f"{kind}/{name}", *counted, step)  # type: ignore[call-arg]

    def finish(self, step: int, results: dict[str, float]) -> None:
        """The final metrics of a run that came to its end, for the HParams page."""
        for name, value in results.items():
            self._writer.add_scalar(f"final/{name}", value, step)
        self._writer._get_file_writer().add_summary(self._session_end)

    def flush(self) -> None:
        self._writer.flush()
        self._over_tokens.flush()

    def close(self) -> None:
        self._writer.close()
        self._over_tokens.close()

    def _begin_session(self) -> None:
        """The run's row of the HParams page: its settings, and the last values of these metrics while it goes on."""
        settings = {
            f"{group}.{name}": value if isinstance(value, int | float | str | bool) else str(value)
            for group in ("model", "train", "data")
            for name, value in getattr(self.config, group).model_dump().items()
        }
        metrics = dict.fromkeys([*LIVE_METRICS, *(f"final/{name}" for name in FINAL)], 0.0)
        experiment, start, self._session_end = hparams(settings, metrics)
        for summary in (experiment, start):
            self._writer._get_file_writer().add_summary(summary)


def write_evaluations(folder: Path, evaluations: list[Evaluation]) -> None:
    """Writes all that was measured of a run's checkpoints into a further event file, in the order of their steps, which
    purges what stands in those before it: a measurement may be of an older checkpoint, or of one measured before.

    The files before it stay: TensorBoard's Python loader reads no further in a folder where the file it was at is gone.
    """
    writer = SummaryWriter(str(folder / "evaluation"), purge_step=0)
    for evaluation in sorted(evaluations, key=lambda evaluation: evaluation.step):
        values = {"val_loss": evaluation.val_loss}
        if score := evaluation.hellaswag:
            values |= score.model_dump(include={"acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "examples"})
        tagged = {TAGS[name]: value for name, value in values.items()} | bounds(values)
        for tag, value in tagged.items():
            writer.add_scalar(tag, value, evaluation.step)
    writer.close()


def bounds(values: dict[str, float]) -> dict[str, float]:
    """One standard error below and above the accuracies, for the band around their curves."""
    found: dict[str, float] = {}
    for name in ("acc", "acc_norm"):
        if name in values and f"{name}_stderr" in values:
            value, stderr = values[name], values[f"{name}_stderr"]
            found |= {f"{TAGS[name]}_lower": value - stderr, f"{TAGS[name]}_upper": value + stderr}
    return found


def _as_code(text: str) -> str:
    """Markdown that shows the text as it is."""
    return "\n".join("    " + line for line in re.split("\r\n?|\n", text))


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
