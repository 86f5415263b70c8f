"""The mini-batch that fits into a GPU: found before the first step by taking it through the model as a step does.

Where memory runs out later nonetheless, beside another process say, the run's folder remembers at how many sequences, and the
next start takes fewer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import nn

from gpt2core.accumulation import rehearse
from gpt2core.config import ModelConfig, RunConfig
from gpt2core.distributed import Ranks
from gpt2core.launch import tell
from gpt2core.memory_limit import rule_out, too_many_sequences
from gpt2core.run_folder import RunFolder
from gpt2core.storage import first_line

ADAM_BYTES = 8  # a parameter: two fp32 moments, which the optimizer makes at its first step
STATE_BYTES = 8 + ADAM_BYTES  # a parameter: fp32 weight, gradient and moments
ACTIVATION_BYTES = 36  # a token, layer and channel; measured with the fused kernels on an H200
HEADROOM = 0.92  # of the free memory that auto plans with; the rest is for fragments and evaluation
AUTO_ON_CPU = 8  # more sequences make a CPU no faster


def fitting_mini_batch_size(alone: nn.Module, together: nn.Module, config: RunConfig, ranks: Ranks) -> int:
    """Sequences a rank takes at once: what was asked for, or the first of its halves that fits on every rank's GPU; for
    auto, the largest power of two. The total batch stays. `alone` and `together` are the model, as `accumulate` takes it.

    Raises ValueError when not even the smallest fits.
    """
    sizes = _not_ruled_out(config.mini_batch_sizes(ranks.world_size), config, ranks)
    is_auto = config.train.mini_batch_size == "auto"
    if ranks.device.type != "cuda":
        return next(size for size in sizes if not is_auto or size <= AUTO_ON_CPU)
    if is_auto:
        free, _ = torch.cuda.mem_get_info(ranks.device)
        hopeless = ranks.any(*(expected_bytes(config.model, size) > HEADROOM * free for size in sizes))
        sizes = [size for size, too_large in zip(sizes, hopeless, strict=True) if not too_large] or sizes[-1:]
    for size in sizes:
        accum_steps = config.grad_accum_steps(ranks.world_size, size)
        if not ranks.any(not _fits(alone, together, config, ranks.device, size, accum_steps))[0]:
            return size
        torch.compiler.reset()  # what was compiled for this size would count towards the limit of compilations
        if ranks.is_main:
            tell(
                f"mini_batch_size {size} does not fit into {_memory(ranks.device)}: halving it, at the same total batch"
            )
    raise ValueError(
        f"mini_batch_size {sizes[-1]} does not fit into {_memory(ranks.device)}, and the total batch does not divide "
        f"further: lower --context_length or --total_batch_size, or take a smaller model"
    )


def _not_ruled_out(sizes: list[int], config: RunConfig, ranks: Ranks) -> list[int]:
    """Those below the one at which memory ran out in an earlier start, on any rank."""
    folder = RunFolder.of(config)
    limit = min(ranks.gather(too_many_sequences(folder) or math.inf))
    left = [size for size in sizes if size < limit]
    if left == sizes:
        return sizes
    if not left:
        raise ValueError(
            f"memory ran out at mini_batch_size {limit} in an earlier start, and halving {sizes[0]} leads to no smaller one: "
            f"give a smaller --mini_batch_size, or auto, or remove {folder.too_many_file} where that was another process's fault"
        )
    if ranks.is_main:
        tell(
            f"mini_batch_size {limit} ran out of memory in an earlier start: at most {left[0]}, at the same total batch "
            f"(until {folder.too_many_file} is removed)"
        )
    return left


@contextlib.contextmanager
def fewer_when_memory_runs_out(config: RunConfig, ranks: Ranks, size: int, step: int) -> Iterator[None]:
    """Around a step with so many sequences at once: where the GPU's memory runs out in it, the run's next start takes half.

    Raises BlockingIOError then, since it may pass.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        ran_out = f"the GPU's memory ran out at step {step} with mini_batch_size {size}"
        if all(other >= size for other in config.mini_batch_sizes(ranks.world_size)):
            raise BlockingIOError(f"{ran_out}, and there is no smaller one ({first_line(error)})") from None
        rule_out(RunFolder.of(config), size)
        raise BlockingIOError(
            f"{ran_out}; started again, the run takes at most half of that, at the same total batch ({first_line(error)})"
        ) from None


def expected_bytes(model: ModelConfig, size: int) -> int:
    """What a rank needs at least to train on so many sequences at once."""
    activations = ACTIVATION_BYTES * model.context_length * model.num_layers * model.embd_size
    return STATE_BYTES * model.num_parameters() + size * activations


def _fits(
    alone: nn.Module, together: nn.Module, config: RunConfig, device: torch.device, size: int, accum_steps: int
) -> bool:
    """Takes a step's micro-steps of so many sequences, with room kept for the optimizer. Leaves gradients, random numbers
    and the other ranks alone."""
    try:
        moments = torch.empty(ADAM_BYTES * config.model.num_parameters(), dtype=torch.uint8, device=device)
        inputs = torch.zeros(size, config.model.context_length, dtype=torch.int64, device=device)
        targets = inputs.clone()  # one tensor for both would be compiled for that alone
        rehearse(alone, together, inputs, targets, accum_steps)
        torch.cuda.synchronize(device)
        del moments
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        alone.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _memory(device: torch.device) -> str:
    free, total = torch.cuda.mem_get_info(device)
    return f"{torch.cuda.get_device_name(device)} ({free / 2**30:.1f} of {total / 2**30:.1f} GiB free)"
