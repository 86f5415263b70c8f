"""The head and its loss as one operation: logits are made some rows at a time, and become their own gradient in place.

Cross-entropy of logits z with target t is logsumexp(z) - z_t, and its gradient softmax(z) - onehot(t). On a GPU one Triton
program takes one row: a pass over it for maximum and sum (online softmax, Milakov & Gimelshein 2018), and one that writes
the gradient over the logits, which it finds in the L2 cache. The gradients of input and weight follow at once, so that the
logits, the largest tensor of the model by far, never exist as a whole and are gone before the backward pass begins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's wheels bring it along for NVIDIA and AMD GPUs only
    triton = None

ROWS = 16_384  # of logits at a time: 1.6 GB in bf16, and enough to fill any GPU
BLOCK, WARPS = 8192, 8  # columns a program holds at once; measured best of 4096 to 16384 and 8 to 32 on an H200


if triton is not None:

    @triton.jit
    def _loss_kernel(logits, targets, losses, num_columns, scale, block: tl.constexpr):  # type: ignore[no-untyped-def]
        """Loss of row `program_id`, and scale * (softmax - onehot) over its logits."""
        row = tl.program_id(0).to(tl.int64)
        logits += row * num_columns
        columns = tl.arange(0, block)
        maximum, total = float("-inf"), 0.0
        for start in range(0, num_columns, block):
            is_there = start + columns < num_columns
            z = tl.load(logits + start + columns, mask=is_there, other=float("-inf"), eviction_policy="evict_last").to(
                tl.float32
            )
            larger = tl.maximum(maximum, tl.max(z, 0))
            total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(z - larger), 0)
            maximum = larger
        target = tl.load(targets + row)
        of_target = tl.load(logits + target).to(tl.float32)
        tl.store(losses + row, tl.log(total) + maximum - of_target)
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        for start in range(0, num_columns, block):
            is_there = start + columns < num_columns
            z = tl.load(logits + start + columns, mask=is_there, other=float("-inf"), eviction_policy="evict_first").to(
                tl.float32
            )
            gradient = tl.exp(z - maximum) * (scale / total) - tl.where(start + columns == target, scale, 0.0)
            tl.store(
                logits + start + columns,
                gradient.to(logits.dtype.element_ty),
                mask=is_there,
                eviction_policy="evict_first",
            )


def _losses_in_place(logits: Tensor, targets: Tensor, scale: float) -> Tensor:
    """Losses (N,) fp32 of logits (N, V), which become scale * their gradient."""
    if logits.is_cuda:
        losses = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        _loss_kernel[(len(logits),)](logits, targets, losses, logits.shape[1], scale, block=BLOCK, num_warps=WARPS)
        return losses
    log_probabilities = logits.float().log_softmax(1)
    losses = -log_probabilities.gather(1, targets[:, None])[:, 0]
    gradient = log_probabilities.exp_()
    gradient.scatter_add_(1, targets[:, None], -torch.ones_like(losses)[:, None])
    logits.copy_(gradient * scale)
    return losses


@torch.library.custom_op("gpt2core::head_loss", mutates_args=())
def _head_loss(x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, and its gradients for x (N, C) and the fp32 weight (V, C)."""
    cast = weight.to(x.dtype)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    x_gradient, weight_gradient = torch.empty_like(x), torch.zeros_like(weight)
    for start in range(0, len(x), rows):
        some = slice(start, start + rows)
        logits = x[some] @ cast.T  # (rows, V)
        losses[some] = _losses_in_place(logits, targets[some], 1.0 / len(x))
        torch.mm(logits, cast, out=x_gradient[some])
        _add_product(weight_gradient, logits.T, x[some])
    return losses.mean(), x_gradient, weight_gradient


@_head_loss.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


def _save_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    _, x_gradient, weight_gradient = output
    ctx.save_for_backward(x_gradient, weight_gradient)
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, loss_gradient: Tensor, *_: None) -> tuple[Tensor, Tensor, None, None]:
    x_gradient, weight_gradient = ctx.saved_tensors
    return x_gradient * loss_gradient, weight_gradient * loss_gradient, None, None


_head_loss.register_autograd(_scale_gradients, setup_context=_save_gradients)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is fp32 and the factors may be bf16."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def mean_loss(x: Tensor, weight: Tensor, targets: Tensor, rows: int = ROWS) -> Tensor:
    """Mean cross-entropy, fp32, of the logits x @ weight.T: x (N, C), fp32 weight (V, C), targets (N,)."""
    loss, _, _ = _head_loss(x, weight, targets, rows)
    return loss


def why_not(device: torch.device) -> str | None:
    """Why the operation cannot be had on this device; None when it can."""
    if device.type != "cuda":
        return "no GPU"
    if triton is None:
        return "Triton is not installed"
    return None
