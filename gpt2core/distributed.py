"""This process's place among the ranks, its device, and the wish to stop that a signal brings."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from gpt2core.config import TrainConfig
from gpt2core.flags import exit_code
from gpt2core.launch import tell

Value = TypeVar("Value")


@dataclass(frozen=True)
class Ranks:
    """Who takes part: one process alone, or the ranks that torchrun started."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @classmethod
    def join(cls, device: str) -> Ranks:
        """Joins torchrun's process group if there is one. Raises ValueError when the device cannot be had.

        CPU tensors go over gloo in any case, so that ranks can agree without making the GPU wait.
        """
        world_size, local_rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
        chosen = pick_device(device, local_rank)
        if world_size == 1:
            return cls(0, 1, chosen)
        if chosen.type == "cuda":
            torch.cuda.set_device(chosen)
        dist.init_process_group(backend="cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo")
        return cls(dist.get_rank(), world_size, chosen)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """The largest over all ranks, element by element, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return tensor

    def average(self, tensors: list[Tensor]) -> None:
        """Each tensor becomes the mean of all ranks', in place."""
        if self.world_size == 1:
            return
        has_mean = self.device.type == "cuda"  # NCCL's; gloo has sums alone
        with dist.distributed_c10d._coalescing_manager():  # one call for all; in public there is but a deprecated one
            for tensor in tensors:
                dist.all_reduce(tensor, op=dist.ReduceOp.AVG if has_mean else dist.ReduceOp.SUM)
        if not has_mean:
            torch._foreach_div_(tensors, self.world_size)

    def take_over(self, tensors: Iterable[Tensor]) -> None:
        """Each tensor becomes rank 0's, in place."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def are_linked(self) -> bool:
        """Whether all ranks are on one machine, on its CPU or on GPUs that reach each other's memory (NVLink, PCIe)."""
        count = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        apart = count != self.world_size
        if self.device.type == "cuda" and not apart:
            others = (other for other in range(count) if other != self.device.index)
            apart = not all(torch.cuda.can_device_access_peer(self.device, other) for other in others)
        return not self.any(apart)[0]

    def any(self, *values: bool) -> list[bool]:
        """For each value whether it is true on any rank; all ranks get the same answers at the same place."""
        if self.world_size == 1:
            return list(values)
        flags = torch.tensor(values, dtype=torch.int32)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in flags.tolist()]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in the order of the ranks; it may hold what a checkpoint may hold."""
        if self.world_size == 1:
            return [value]
        packed = io.BytesIO()
        torch.save(value, packed)
        every: list[Any] = [None] * self.world_size
        dist.all_gather_object(every, packed.getvalue())
        return [torch.load(io.BytesIO(one), weights_only=True) for one in every]

    def on_main(self, do: Callable[[], Value]) -> Value | None:
        """What `do` returns on rank 0, None elsewhere. What it raises there ends the other ranks too, without a word."""
        value, error = None, None
        if self.is_main:
            try:
                value = do()
            except Exception as raised:
                error = raised
        code = self.gather(exit_code(error) if error else 0)[0]
        if error:
            raise error
        if code:
            sys.exit(code)
        return value

    def leave(self) -> None:
        if self.world_size > 1:
            dist.destroy_process_group()


def pick_device(wanted: str, local_rank: int = 0) -> torch.device:
    """The device to compute on. Raises ValueError when the one asked for is not there."""
    gpus = torch.cuda.device_count()
    if wanted == "auto":
        wanted = "cuda" if gpus else "cpu"
    if wanted == "cuda" and local_rank >= gpus:
        raise ValueError(
            f"device cuda: local rank {local_rank} needs GPU number {local_rank} and this machine shows {gpus} GPUs; "
            f"start at most {gpus} processes or use --device cpu"
            if gpus
            else "device cuda: this machine shows no GPU (torch.cuda.is_available() is False); use --device cpu"
        )
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device mps: this machine has no Apple GPU; use --device cpu")
    return torch.device(wanted, local_rank) if wanted == "cuda" else torch.device(wanted)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of the activations, bf16 around products in FP8. Raises ValueError for bf16 on a GPU without it."""
    if precision.startswith("fp8"):
        precision = "bf16"
    has_bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bf16" and device.type == "cuda" and not has_bf16:
        raise ValueError(f"precision bf16: {torch.cuda.get_device_name(device)} does not have it; use --precision fp32")
    return torch.bfloat16 if (has_bf16 and precision == "auto") or precision == "bf16" else torch.float32


def dtype_to_measure_in(precision: str, device: torch.device) -> torch.dtype:
    """That of the run's precision; fp32, with a loud word, where the GPU does not have it: that is no reason not to measure."""
    try:
        return pick_dtype(precision, device)
    except ValueError as error:
        tell(f"WARNING: computing in fp32, for {error}")
        return torch.float32


def make_deterministic() -> None:
    """Asks for kernels that add in the same order each time; to be called before the GPU is first used.

    cuBLAS needs a workspace of fixed size for that (CUDA documentation, cuBLAS, "Results Reproducibility"), and inductor
    must not choose among kernels by the stopwatch.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    import torch._inductor.config as inductor

    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True


def use_compile(train: TrainConfig, device: torch.device) -> bool:
    return train.compile == "on" or (train.compile == "auto" and device.type == "cuda")


class StopRequest:
    """Turns SIGINT and SIGTERM into a wish that the loop reads between two steps; a second one ends at once.

    A SIGTERM soon after the first is no second one: torchrun and systemd hand the same one on to ranks that have it.
    """

    SAME_SIGTERM_S = 5.0

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.signalled_at = 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    @property
    def name(self) -> str:
        """Of the signal, as the log has it when the ranks have agreed to stop."""
        return self.signal.name if self.signal else "a signal to another rank"

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self.signalled_at = signal.Signals(number), now
        elif number == signal.SIGINT or now - self.signalled_at > self.SAME_SIGTERM_S:
            os._exit(128 + number)
