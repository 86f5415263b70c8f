"""What a run says of its steps. Their numbers are read while the device is at the next step, so that it need not wait.

A GPU works through what it was given while the host prepares more. A step's numbers are put on their way to the host
behind the step's own work, and read when the next step has been handed over. On a CPU they are read at once.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt2core.config import RunConfig
from gpt2core.distributed import Ranks
from gpt2core.fp8 import FP8
from gpt2core.loader import Loader
from gpt2core.metrics import MetricsLog
from gpt2core.mfu import peak_flops

MEASUREMENTS_FOR_PACE = 500  # logged steps over which the time to go is reckoned: two rounds of evaluations by default
MAX_SKIPPED_IN_A_ROW = 10  # updates with a non-finite gradient before the run gives up


@dataclass(frozen=True)
class StepResult:
    """What one optimizer update left, still on the device."""

    loss: Tensor  # mean over this rank's tokens
    grad_norm: Tensor  # before clipping
    skipped_in_a_row: Tensor  # updates left out up to this one, for gradients that are not finite
    lr: float


class Mark:
    """A point in the device's work, where it will come by and by."""

    def __init__(self, device: torch.device) -> None:
        self._made_at = time.perf_counter()
        self._event = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self._event:
            self._event.synchronize()

    def seconds_since(self, earlier: Mark) -> float:
        """By the device's clock, when both have been waited for."""
        if self._event and earlier._event:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._made_at - earlier._made_at


@dataclass(frozen=True)
class _Measurement:
    step: int
    lr: float
    names: list[str]
    numbers: Tensor  # on the host, and there when `end` is reached
    begin: Mark
    end: Mark
    steps: int  # between the two
    beside_s: float  # of the time between them, what was not training
    data_wait_s: float


class StepLog:
    """Measures the steps of all ranks, and logs them where there is a log."""

    def __init__(self, config: RunConfig, ranks: Ranks, loader: Loader, fp8: FP8 | None, max_steps: int) -> None:
        self.config, self.ranks, self.loader, self.fp8, self.max_steps = config, ranks, loader, fp8, max_steps
        self.is_device_behind = ranks.device.type == "cuda"
        self.peak_flops = peak_flops(ranks.device)
        self.train_seconds = 0.0
        self.train_loss: float | None = None
        self.skipped = 0  # updates in a row, as last read off the device
        self._paces: deque[tuple[int, float]] = deque(maxlen=MEASUREMENTS_FOR_PACE)  # (step, time) as logged
        self._under_way: _Measurement | None = None
        self.begin(0)

    def begin(self, step: int) -> None:
        """What is trained from here on is measured; `step` steps are done."""
        self._since, self._since_step = Mark(self.ranks.device), step
        self._beside_s, self._waited_s = 0.0, self.loader.wait_s

    def leave_out(self, seconds: float) -> None:
        """Of the time of the next measurement, for it was spent on something else than training."""
        self._beside_s += seconds

    def add(self, step: int, result: StepResult, log: MetricsLog | None) -> None:
        """Measures all since the last time up to `step`, which has just been handed over, and logs what was added before."""
        self.catch_up(log)
        values = {"loss": self.ranks.sum(result.loss.clone()), "grad_norm": result.grad_norm}
        values["skipped"] = result.skipped_in_a_row
        if self.fp8 and self.fp8.scaling:
            values["fp8_saturated"] = self.fp8.take_saturated()
        on_device = torch.stack([value.float() for value in values.values()])
        is_cuda = self.ranks.device.type == "cuda"  # elsewhere there is no Mark to say that a copy has arrived
        numbers = torch.empty_like(on_device, device="cpu", pin_memory=is_cuda)
        numbers.copy_(on_device, non_blocking=is_cuda)
        self._under_way = _Measurement(
            step,
            result.lr,
            names=list(values),
            numbers=numbers,
            begin=self._since,
            end=Mark(self.ranks.device),
            steps=step - self._since_step,
            beside_s=self._beside_s,
            data_wait_s=self.loader.wait_s - self._waited_s,
        )
        self._since, self._since_step = self._under_way.end, step
        self._beside_s, self._waited_s = 0.0, self.loader.wait_s
        if not self.is_device_behind:
            self.catch_up(log)

    def catch_up(self, log: MetricsLog | None) -> None:
        """Waits for what was added last, and logs it. Raises FloatingPointError when update after update was left out."""
        measured, self._under_way = self._under_way, None
        if measured is None:
            return
        measured.end.wait()
        read = dict(zip(measured.names, measured.numbers.tolist(), strict=True))
        seconds = measured.end.seconds_since(measured.begin) - measured.beside_s
        self.skipped = int(read.pop("skipped"))
        self.train_seconds += seconds
        self.train_loss = read["loss"] = read["loss"] / self.ranks.world_size
        if log:
            self._log(measured, read, seconds, log)
        if self.skipped >= MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"step {measured.step}: {self.skipped} updates in a row had gradients that are not finite, and none was "
                f"applied; what was saved before is good: resume it, or start afresh where there is nothing yet, with a "
                f"lower --max_lr"
            )

    def _log(self, measured: _Measurement, read: dict[str, float], seconds: float, log: MetricsLog) -> None:
        steps = measured.steps
        values = {
            "loss": read["loss"],
            "lr": measured.lr,
            "grad_norm": read["grad_norm"],
            "tokens_per_sec": steps * self.config.train.total_batch_size / seconds,
            "step_ms": 1000 * seconds / steps,
            "data_wait_ms": 1000 * measured.data_wait_s / steps,
            **self._progress(measured.step),
        }
        if "fp8_saturated" in read:
            values["fp8_saturated"] = int(read["fp8_saturated"])
        if self.ranks.device.type == "cuda":
            values["memory_gib"] = torch.cuda.max_memory_allocated(self.ranks.device) / 2**30
        if self.peak_flops:
            flops = values["tokens_per_sec"] * self.config.model.flops_per_token()
            values["mfu"] = flops / (self.peak_flops * self.ranks.world_size)
        log.numbers(measured.step, **values)
        if self.skipped:
            log.say(
                f"step={measured.step} WARNING: gradients are not finite, {self.skipped} update(s) in a row left out"
            )

    def _progress(self, step: int) -> dict[str, float]:
        """How many steps the run has, and the seconds to its end at the pace of late, evaluations and all."""
        self._paces.append((step, time.perf_counter()))
        (first, began), (last, now) = self._paces[0], self._paces[-1]
        if first == last:
            return {"max_steps": self.max_steps}
        return {"max_steps": self.max_steps, "eta_s": (self.max_steps - last) * (now - began) / (last - first)}
