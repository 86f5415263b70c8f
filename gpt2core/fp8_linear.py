"""Linear layers and the head as autograd functions whose products run on 8-bit numbers; fp8.py puts them into a model."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpt2core import fused_loss
from gpt2core.fp8_cast import E4M3, E5M2, cast, cut, largest_magnitude, power_of_two, product
from gpt2core.kernels import weight_gradient

HEAD_FACTOR = 2.0**15  # e5m2 holds it, and 2^-31 of it: probabilities of softmax down to 5e-10


class Scale(NamedTuple):
    """How a tensor is scaled before it is rounded; each (1,) fp32."""

    factor: Tensor
    inverse: Tensor
    amax: Tensor  # the largest magnitude seen since the last update

    @classmethod
    def new(cls, device: torch.device) -> Scale:
        return cls(torch.ones(1, device=device), torch.ones(1, device=device), torch.zeros(1, device=device))


class Weight(NamedTuple):
    """A weight (outputs, inputs) in e4m3, rounded once an update, in both layouts."""

    row_major: Tensor
    column_major: Tensor  # (inputs, outputs)
    row_inverse: Tensor  # (1,), or (outputs, 1) in the recipe rowwise
    column_inverse: Tensor  # (1,), or (inputs, 1)

    @classmethod
    def like(cls, weight: Tensor, rowwise: bool) -> Weight:
        outputs, inputs = weight.shape
        shapes = [(outputs, 1), (inputs, 1)] if rowwise else [(1,), (1,)]
        return cls(
            torch.empty(outputs, inputs, dtype=E4M3, device=weight.device),
            torch.empty(inputs, outputs, dtype=E4M3, device=weight.device),
            *(torch.empty(shape, device=weight.device) for shape in shapes),
        )

    def round_rows(self, master: Tensor) -> None:
        """Rounds the fp32 weight with a factor for each row, and its transpose with one for each of its rows."""
        for matrix, rounded, inverse in ((master, self[0], self[2]), (master.T, self[1], self[3])):
            values, factors = rows_rounded(matrix, E4M3)
            rounded.copy_(values)
            inverse.copy_(factors)


class Mode(NamedTuple):
    """What all products of a model have in common."""

    dynamic: bool  # factors from the tensor itself
    emulate: bool
    gradients: torch.dtype  # what those of layers' outputs are rounded to


class Rounded(NamedTuple):
    """A tensor in 8 bits."""

    row_major: Tensor
    column_major: Tensor
    inverse: Tensor  # of its factor, (1,)
    sums: Tensor  # of the columns, fp32, for a gradient


def _rounded(
    x: Tensor, scale: Scale, mode: Mode, other: Tensor | None = None, what: str = "itself", is_gradient: bool = False
) -> Rounded:
    """x made into `what`, which may need `other`."""
    dtype = mode.gradients if is_gradient else E4M3
    factor, inverse = scale.factor, scale.inverse
    if mode.dynamic:
        factor = power_of_two(torch.finfo(dtype).max, largest_magnitude(x, other, what))
        inverse = factor.reciprocal()
    with_sums = is_gradient
    row, column, sums = cast(x, other, None, factor, scale.amax, what, dtype, with_sums, mode.emulate)
    return Rounded(row, column, inverse, sums)


def _output(x: Rounded, weight: Weight, bias: Tensor, dtype: torch.dtype, mode: Mode) -> Tensor:
    """x @ weight.T + bias."""
    inverses = x.inverse, weight.row_inverse
    return product(x.row_major, weight.row_major, *inverses, dtype, mode.emulate, bias.to(dtype), fast=True)


def _input_gradient(gradient: Rounded, weight: Weight, dtype: torch.dtype, mode: Mode) -> Tensor:
    """gradient @ weight."""
    inverses = gradient.inverse, weight.column_inverse
    return product(gradient.row_major, weight.column_major, *inverses, dtype, mode.emulate)


def _weight_gradient(gradient: Rounded, x_column: Tensor, x_inverse: Tensor, mode: Mode) -> Tensor:
    """gradient.T @ x in fp32."""
    return product(gradient.column_major, x_column, gradient.inverse, x_inverse, torch.float32, mode.emulate)


class Linear8(torch.autograd.Function):
    """x @ weight.T + bias, x (M, inputs)."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, master: Tensor, bias: Tensor, weight: Weight, of_x: Scale, of_gradient: Scale, mode: Mode
    ) -> Tensor:
        rounded = _rounded(x, of_x, mode)
        ctx.save_for_backward(rounded.column_major, rounded.inverse)
        # not saved as the others are: what is saved must not change, and the amax of of_gradient will
        ctx.weight, ctx.of_gradient, ctx.mode = weight, of_gradient, mode
        return _output(rounded, weight, bias, x.dtype, mode)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_column, x_inverse = ctx.saved_tensors
        rounded = _rounded(gradient, ctx.of_gradient, ctx.mode, is_gradient=True)
        of_x = _input_gradient(rounded, ctx.weight, gradient.dtype, ctx.mode)
        of_weight = _weight_gradient(rounded, x_column, x_inverse, ctx.mode)
        return of_x, of_weight, rounded.sums, None, None, None, None


class MLP8(torch.autograd.Function):
    """Two linear layers with GELU between, which is computed where its result or its gradient is rounded."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc: Tensor,
        fc_bias: Tensor,
        proj: Tensor,
        proj_bias: Tensor,
        weights: tuple[Weight, Weight],
        of_inputs: tuple[Scale, Scale],
        of_gradients: tuple[Scale, Scale],
        mode: Mode,
    ) -> Tensor:
        rounded = _rounded(x, of_inputs[0], mode)
        z = _output(rounded, weights[0], fc_bias, x.dtype, mode)
        activated = _rounded(z, of_inputs[1], mode, what="gelu")
        ctx.save_for_backward(rounded.column_major, rounded.inverse, z, activated.column_major, activated.inverse)
        ctx.weights, ctx.of_gradients, ctx.mode = weights, of_gradients, mode
        return _output(activated, weights[1], proj_bias, x.dtype, mode)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_column, x_inverse, z, activated_column, activated_inverse = ctx.saved_tensors
        (fc8, proj8), (of_z, of_output), mode = ctx.weights, ctx.of_gradients, ctx.mode
        out = _rounded(gradient, of_output, mode, is_gradient=True)
        proj = _weight_gradient(out, activated_column, activated_inverse, mode)
        activated = _input_gradient(out, proj8, gradient.dtype, mode)
        hidden = _rounded(activated, of_z, mode, z, "gelu_gradient", is_gradient=True)
        fc = _weight_gradient(hidden, x_column, x_inverse, mode)
        return (
            _input_gradient(hidden, fc8, gradient.dtype, mode),
            *(fc, hidden.sums),
            *(proj, out.sums),
            *(None,) * 4,
        )


def rows_rounded(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (M, N) with a factor for each row, and the factors' inverses (M, 1)."""
    values = x.float()
    factor = power_of_two(torch.finfo(dtype).max, values.abs().amax(1, keepdim=True))
    return cut(values, factor, dtype).to(dtype), factor.reciprocal()


class RowwiseLinear8(torch.autograd.Function):
    """x @ weight.T + bias, x (M, inputs), with a factor for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, master: Tensor, bias: Tensor, weight: Weight, mode: Mode) -> Tensor:
        rows, inverse = rows_rounded(x, E4M3)
        ctx.save_for_backward(x)
        ctx.weight, ctx.mode = weight, mode
        return product(
            rows, weight.row_major, inverse, weight.row_inverse, x.dtype, mode.emulate, bias.to(x.dtype), fast=True
        )

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        weight, mode = ctx.weight, ctx.mode
        rows, inverse = rows_rounded(gradient, mode.gradients)
        return (
            product(rows, weight.column_major, inverse, weight.column_inverse, gradient.dtype, mode.emulate),
            weight_gradient(gradient, x),
            gradient.sum(0, dtype=torch.float32),
            None,
            None,
        )


@torch.library.custom_op("gpt2core::fp8_head_loss", mutates_args=())
def _head_loss(
    x: Tensor,
    master: Tensor,
    row_major: Tensor,
    column_major: Tensor,
    inverse: Tensor,
    targets: Tensor,
    rows: int,
    emulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, and its gradients for x (N, C) and the master weight (V, C), whose 8-bit layouts are given."""
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    x_gradient, weight_gradient = torch.empty_like(x), torch.zeros_like(master)
    factor, unused = torch.full_like(inverse, HEAD_FACTOR), torch.zeros_like(inverse)
    gradient_inverse = 1 / (factor * len(x))
    weight, scale = Weight(row_major, column_major, inverse, inverse), Scale(factor, factor, unused)
    mode = Mode(dynamic=True, emulate=emulate, gradients=E5M2)
    bias = _lost_of_the_mean(x, master, row_major, inverse).to(x.dtype)
    for start in range(0, len(x), rows):
        some = slice(start, start + rows)
        of_x = _rounded(x[some], scale, mode)
        inverses = of_x.inverse, inverse
        logits = product(of_x.row_major, row_major, *inverses, x.dtype, emulate, bias, fast=True)  # (rows, V)
        losses[some], log_sums = fused_loss.loss_rows(logits, targets[some])
        row, column, _ = cast(
            logits, log_sums, targets[some], factor, unused, "softmax_gradient", mode.gradients, False, emulate
        )
        of_logits = Rounded(row, column, gradient_inverse, unused)
        x_gradient[some] = _input_gradient(of_logits, weight, x.dtype, mode)
        weight_gradient += _weight_gradient(of_logits, of_x.column_major, of_x.inverse, mode)
        del logits, row, column, of_logits  # the next ones take their place in memory
    return losses.mean(), x_gradient, weight_gradient


def _lost_of_the_mean(x: Tensor, master: Tensor, rounded: Tensor, inverse: Tensor) -> Tensor:
    """What the rounding of the weight (V, C) takes from the logits of the mean of x (N, C): (V,) fp32.

    The final LayerNorm's outputs have much in common, so that this is most of what all tokens' logits lose, and they lose it
    together: no sum over tokens averages it out. It depends on all tokens of the mini-batch, if ever so little, and counts as
    a constant in the backward pass.
    """
    mean = x.mean(0, dtype=torch.float32)
    return master @ mean - inverse * (rounded.float() @ mean)


@_head_loss.register_fake
def _(
    x: Tensor,
    master: Tensor,
    row_major: Tensor,
    column_major: Tensor,
    inverse: Tensor,
    targets: Tensor,
    rows: int,
    emulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(master)


def _scale_gradients(ctx: Any, loss_gradient: Tensor, *_: None) -> tuple[Tensor | None, ...]:
    x_gradient, weight_gradient = ctx.saved_tensors
    return x_gradient * loss_gradient, weight_gradient * loss_gradient, *(None,) * 6


_head_loss.register_autograd(_scale_gradients, setup_context=fused_loss.save_gradients)


def head_loss(x: Tensor, master: Tensor, weight: Weight, targets: Tensor, emulate: bool) -> Tensor:
    """Mean cross-entropy, fp32, of the logits x @ weight.T: x (N, C), weight (V, C), targets (N,)."""
    loss, _, _ = _head_loss(
        x, master, weight.row_major, weight.column_major, weight.row_inverse, targets, fused_loss.ROWS, emulate
    )
    return loss
