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

    The last micro-step runs `together`: the model within DDP, which exchanges gradients by hooks on autograd's own additions, or
    `alone` again, which runs the others. The first one's gradients become the sum as they are. Those of the others are added by a
    few kernels, where autograd, and so DDP, takes one for each.
    """
    model = together if micro_step == accum_steps - 1 else alone
    loss: Tensor = model(inputs, targets) / accum_steps
    if micro_step == 0 or isinstance(model, DistributedDataParallel):
        loss.backward()
    else:
        torch._foreach_add_(gradients(model), list(torch.autograd.grad(loss, list(model.parameters()))))
    return loss.detach()


def rehearse(alone: nn.Module, together: nn.Module, inputs: Tensor, targets: Tensor, accum_steps: int) -> None:
    """Takes one micro-step of each kind that a step has: the first, one between and the last. Ranks exchange nothing."""
    kinds = {0, min(1, accum_steps - 1)} | ({accum_steps - 1} if together is not alone else set())
    with together.no_sync() if isinstance(together, DistributedDataParallel) else nullcontext():
        for micro_step in sorted(kinds):
            accumulate(alone, together, inputs, targets, micro_step, accum_steps)


def gradients(model: nn.Module) -> list[Tensor]:
    """Of all parameters, each of which takes part in each loss."""
    return [_gradient(parameter) for parameter in model.parameters()]


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # or ranks would add up gradients of different parameters
    return parameter.grad
