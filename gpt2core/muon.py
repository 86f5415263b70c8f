"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/): a matrix moves along its momentum, made nearly
orthogonal by a Newton-Schulz iteration.

The update is torch.optim.Muon's with its default adjust_lr_fn. Beyond that one, this takes matrices of equal shape through
the iteration together, may treat a matrix as several, shares the work among ranks, and can leave an update out without
the host knowing.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic x -> a x + b x^3 + c x^5; Jordan et al. 2024
NS_STEPS = 5  # of the iteration; the same source
EPS = 1e-7  # least norm to divide by
BATCH_ELEMENTS = 2**26  # of matrices taken together: a good gigabyte of intermediate values


def orthogonalize(matrices: Tensor) -> Tensor:
    """(n, rows, columns), rows <= columns, with the same singular vectors and singular values near 1, most in [0.68, 1.14].

    The polynomial acts on each singular value by itself and wants it in [0, 1]; division by the Frobenius norm sees to that.
    """
    a, b, c = COEFFICIENTS
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=EPS)
    for _ in range(NS_STEPS):
        gram = x @ x.mT  # (n, rows, rows)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x


@dataclass(frozen=True)
class Matrix:
    """Views of a parameter, or of a part of it, lying so that rows <= columns."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor
    scale: float  # of the update: sqrt(outputs / inputs) where that is above 1


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay.

    A parameter group's `parts` says of how many matrices, one below the other, each parameter of it consists. The
    iteration runs in `dtype`. Gradients must be the same on all ranks, each of which has all weights and momenta and
    computes a part of the updates.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "parts": 1})
        self.dtype, self.rank, self.world_size = dtype, rank, world_size
        self.found_inf: Tensor | None = None  # above 0: the next updates change nothing, as in torch's fused optimizers

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[Matrix]] = defaultdict(list)
            for matrix in self._matrices(group):
                same_shape[matrix.weight.shape].append(matrix)
            for shape, matrices in same_shape.items():
                size = max(1, BATCH_ELEMENTS // shape.numel() // self.world_size) * self.world_size
                for start in range(0, len(matrices), size):
                    self._update(matrices[start : start + size], group)

    def _matrices(self, group: dict[str, Any]) -> Iterator[Matrix]:
        parts = group["parts"]
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            whole = (parameter, parameter.grad, state["momentum_buffer"])
            for weight, gradient, momentum in zip(*(tensor.chunk(parts) for tensor in whole), strict=True):
                outputs, inputs = weight.shape
                if outputs > inputs:
                    weight, gradient, momentum = weight.mT, gradient.mT, momentum.mT
                yield Matrix(weight, gradient, momentum, scale=math.sqrt(max(1, outputs / inputs)))

    def _update(self, matrices: list[Matrix], group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        gradients = torch.stack([matrix.gradient for matrix in matrices])  # (n, rows, columns)
        momenta = torch.stack([matrix.momentum for matrix in matrices]).lerp_(gradients, 1 - momentum)
        share = -(-len(matrices) // self.world_size)
        own = slice(self.rank * share, (self.rank + 1) * share)
        nesterov = gradients[own].lerp(momenta[own], momentum)
        updates = self._gather(orthogonalize(nesterov.to(self.dtype)), share)
        for matrix, new_momentum, update in zip(matrices, momenta, updates, strict=False):
            decayed = matrix.weight * (1 - lr * group["weight_decay"])
            self._set(matrix.weight, decayed.add_(update, alpha=-lr * matrix.scale))
            self._set(matrix.momentum, new_momentum)

    def _gather(self, own: Tensor, share: int) -> Tensor:
        """Every rank's (share, rows, columns) one after the other; who has fewer matrices fills up with zeros."""
        if self.world_size == 1:
            return own
        filled = F.pad(own, (0, 0, 0, 0, 0, share - len(own)))
        every = [torch.empty_like(filled) for _ in range(self.world_size)]
        dist.all_gather(every, filled)
        return torch.cat(every)

    def _set(self, tensor: Tensor, value: Tensor) -> None:
        """Writes the value, unless this update is to be left out, which is decided on the device."""
        if self.found_inf is None:
            tensor.copy_(value)
        else:
            torch.where(self.found_inf > 0, tensor, value, out=tensor)
