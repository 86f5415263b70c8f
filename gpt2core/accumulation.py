"""A step's gradients, added up over micro-steps."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel


def accumulate(
    alone: nn.Module, together: nn.Module, inputs: Tensor, targets: Tensor, micro_step: int, accum_steps: int
) -> Tensor:
    """Adds a micro-step's share of the gradients to those of the micro-steps before; returns its share of the loss.

    Ranks exchange gradients in the last micro-step, which runs `together`, by DDP's hooks on autograd's own additions; the
    others run `alone`, the same model without DDP. The first one's gradients become the sum as they are. In between all
    are added by a few kernels, where autograd takes one for each.
    """
    is_last = micro_step == accum_steps - 1
    model = together if is_last else alone
    loss: Tensor = model(inputs, targets) / accum_steps
    if micro_step == 0 or is_last:
        loss.backward()
    else:
        parameters = list(model.parameters())
        sums = [_gradient(parameter) for parameter in parameters]
        torch._foreach_add_(sums, list(torch.autograd.grad(loss, parameters)))
    return loss.detach()


def rehearse(alone: nn.Module, together: nn.Module, inputs: Tensor, targets: Tensor, accum_steps: int) -> None:
    """Takes one micro-step of each kind that a step has: the first, one between and the last. Ranks exchange nothing."""
    with together.no_sync() if isinstance(together, DistributedDataParallel) else nullcontext():
        for micro_step in sorted({0, min(1, accum_steps - 1), accum_steps - 1}):
            accumulate(alone, together, inputs, targets, micro_step, accum_steps)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # each takes part in each loss
    return parameter.grad
