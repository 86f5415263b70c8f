"""The head and its loss as one operation: logits are made some rows at a time, and become their own gradient in place.

Cross-entropy of logits z with target t is logsumexp(z) - z_t, and its gradient softmax(z) - onehot(t). On a GPU one Triton
program takes one row: a pass over it for maximum and sum (online softmax, Milakov & Gimelshein 2018), and one that writes
the gradient over the logits, of which it finds some in the L2 cache. On Hopper QuACK's kernel reads them only once: a cluster of
multiprocessors keeps a row in their shared memories. The gradients of input and weight follow at once, so that the
logits, the largest tensor of the model by far, never exist as a whole and are gone before the backward pass begins.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.device_trial import failure_of

ROWS = 32_768  # of logits at a time: 3.3 GB in bf16; more are no faster
# torch's wheels bring it along for NVIDIA and AMD GPUs only
HAS_TRITON = importlib.util.find_spec("triton") is not None


def _losses_in_place(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses (N,) fp32 of logits (N, V), which become their gradient."""
    if logits.is_cuda:
        from gpt2core import triton_kernels

        return triton_kernels.loss_rows(logits, targets, with_gradient=True)[0]
    log_probabilities = logits.float().log_softmax(1)
    losses = -log_probabilities.gather(1, targets[:, None])[:, 0]
    gradient = log_probabilities.exp_()
    logits.copy_(gradient.scatter_add_(1, targets[:, None], -torch.ones_like(losses)[:, None]))
    return losses


def loss_rows(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and logsumexps, (N,) fp32, of logits (N, V)."""
    if logits.is_cuda and HAS_TRITON:
        from gpt2core import triton_kernels

        return triton_kernels.loss_rows(logits, targets, with_gradient=False)
    log_sums = logits.float().logsumexp(1)
    return log_sums - logits.gather(1, targets[:, None])[:, 0].float(), log_sums


def _operations(quack: bool) -> tuple[Callable[..., Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """What multiplies, and what makes logits their gradient."""
    if not quack:
        return torch.mm, _losses_in_place
    from gpt2core import quack_kernels

    return quack_kernels.multiply, quack_kernels.losses_in_place


@torch.library.custom_op("gpt2core::head_loss", mutates_args=())
def _head_loss(x: Tensor, weight: Tensor, targets: Tensor, rows: int, quack: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, and the gradients of the sum for x (N, C) and the fp32 weight (V, C)."""
    (multiply, losses_in_place), cast = _operations(quack), weight.to(x.dtype)
    losses = torch.empty(len(x), dtype=torch.float32, device=x.device)
    x_gradient, weight_gradient = torch.empty_like(x), torch.zeros_like(weight)
    for start in range(0, len(x), rows):
        some = slice(start, start + rows)
        logits = multiply(x[some], cast.T)  # (rows, V)
        losses[some] = losses_in_place(logits, targets[some])
        multiply(logits, cast, out=x_gradient[some])
        add_product(weight_gradient, logits.T, x[some])
        del logits  # the next ones take its place in memory
    return losses.mean(), x_gradient, weight_gradient


@_head_loss.register_fake
def _(x: Tensor, weight: Tensor, targets: Tensor, rows: int, quack: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty((), dtype=torch.float32), torch.empty_like(x), torch.empty_like(weight)


def save_gradients(ctx: Any, inputs: Any, output: Any) -> None:
    """Of a head's loss, for its backward pass: here those of the losses' sum, in fp8_linear.py of their mean."""
    _, x_gradient, weight_gradient = output
    ctx.save_for_backward(x_gradient, weight_gradient)
    ctx.set_materialize_grads(False)


def _scale_gradients(ctx: Any, loss_gradient: Tensor, *_: None) -> tuple[Tensor, Tensor, None, None, None]:
    x_gradient, weight_gradient = ctx.saved_tensors
    share = loss_gradient / len(x_gradient)
    return x_gradient * share, weight_gradient * share, None, None, None


_head_loss.register_autograd(_scale_gradients, setup_context=save_gradients)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, where total is fp32 and the factors may be bf16."""
    if a.is_cuda and a.dtype != total.dtype:
        torch.ops.aten.addmm.dtype_out(total, a, b, total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def mean_loss(x: Tensor, weight: Tensor, targets: Tensor, rows: int = ROWS, quack: bool = False) -> Tensor:
    """Mean cross-entropy, fp32, of the logits x @ weight.T: x (N, C), fp32 weight (V, C), targets (N,); by
    QuACK's kernels if that is asked for, C and V in eights."""
    loss, _, _ = _head_loss(x, weight, targets, rows, quack)
    return loss


def why_not(device: torch.device) -> str | None:
    """Why the operation cannot be had on this device; None when it can: a small one is tried and compared with PyTorch,
    for a compiler's fault would not show before the loss does."""
    if device.type != "cuda":
        return "no GPU"
    if not HAS_TRITON:
        return "Triton is not installed"
    return failure_of(lambda: check_kernel(device))


def check_kernel(device: torch.device) -> None:
    """Raises what Triton raises where it cannot compile for this GPU; RuntimeError where the kernel, with or without its
    gradient, does not compute what PyTorch does."""
    from gpt2core import triton_kernels

    random = torch.Generator(device).manual_seed(0)
    columns = triton_kernels.LOSS_BLOCK + 192  # a block and a part of one, in which the largest are
    logits = torch.randn(16, columns, device=device, generator=random)
    logits[:, -192:] += 4
    logits = logits.bfloat16()
    targets = torch.randint(columns, (16,), device=device, generator=random)
    exact = logits.float().requires_grad_()
    exact_losses = F.cross_entropy(exact, targets, reduction="none")
    (exact_gradient,) = torch.autograd.grad(exact_losses.sum(), exact)
    losses, _ = triton_kernels.loss_rows(logits, targets, with_gradient=False)
    again, _ = triton_kernels.loss_rows(logits, targets, with_gradient=True)  # over the logits
    if not (
        torch.equal(losses, again)
        and torch.allclose(losses, exact_losses, rtol=1e-4, atol=1e-4)
        and torch.allclose(logits.float(), exact_gradient, rtol=2**-7, atol=1e-8)  # a step of bf16
    ):
        raise RuntimeError("Triton compiles the loss wrongly")
