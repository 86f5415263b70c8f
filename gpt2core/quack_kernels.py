"""The model's products and its loss by QuACK's kernels for Hopper (Dao et al., the package quack-kernels); the products with what
follows them in their epilogue: bias, residual, GELU, its derivative.

Import it only where that is installed. While one of two groups of warps is at the epilogue of its tile, the other multiplies
("ping-pong"), so that a product takes little longer for it; those without any are a few percent faster than cuBLAS's, too.
Gradients of weights are not: long sums of few tiles stay with cuBLAS (docs/results.md).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from quack.cross_entropy import cross_entropy_fwd
from quack.epilogue.library import dgelu_dbias_epi
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm_act
from torch import Tensor

from gpt2core.device_trial import check_close, failure_of

ALIGNMENT = 8  # elements of bf16 in the 16 bytes to which rows are aligned for the tensor memory accelerator


def _tiles(rows: int, columns: int, cluster: tuple[int, int], pingpong: bool = True, swap: bool = False) -> GemmConfig:
    return GemmConfig(
        tile_m=rows,
        tile_n=columns,
        pingpong=pingpong,
        is_dynamic_persistent=False,
        cluster_m=cluster[0],
        cluster_n=cluster[1],
        swap_ab=swap,
    )


# The fastest of QuACK's own candidates for GPT-2 124M on an H100; the others take up to a third longer.
GELU_TILES = _tiles(192, 128, (2, 1), swap=True)
DERIVATIVE_TILES = _tiles(128, 128, (1, 2))
RESIDUAL_TILES = _tiles(192, 128, (1, 2))
TILES = _tiles(128, 192, (1, 2))
LONG_TILES = _tiles(256, 192, (1, 2), pingpong=False)  # both groups of warps on one tile
LONG = 3072  # terms of a sum, from which on these are faster


def multiply(
    a: Tensor, b: Tensor, out: Tensor | None = None, bias: Tensor | None = None, residual: Tensor | None = None
) -> Tensor:
    """a @ b + bias + residual, (M, N), of a (M, K), b (K, N), bias (N,) and residual (M, N), all bf16."""
    tiles = LONG_TILES if a.shape[1] >= LONG else TILES
    if residual is not None:
        tiles = RESIDUAL_TILES
    _, product = gemm_act(a, b, residual, bias, postact_out=out, store_preact=False, config=tiles)
    return product


@torch.library.custom_op("gpt2core::quack_linear", mutates_args=(), device_types="cuda")
def linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    """x @ weight.T + bias + residual, (M, N), of x (M, K), weight (N, K), bias (N,) and residual (M, N), all bf16."""
    return multiply(x.contiguous(), weight.T, bias=bias, residual=None if residual is None else residual.contiguous())


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    return x.new_empty(len(x), len(weight))


@torch.library.custom_op("gpt2core::quack_input_gradient", mutates_args=(), device_types="cuda")
def input_gradient(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient @ weight, (M, K), of gradient (M, N) and weight (N, K), all bf16."""
    return multiply(gradient.contiguous(), weight)


@input_gradient.register_fake
def _(gradient: Tensor, weight: Tensor) -> Tensor:
    return gradient.new_empty(len(gradient), weight.shape[1])


@torch.library.custom_op("gpt2core::quack_linear_gelu", mutates_args=(), device_types="cuda")
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(z) and z = x @ weight.T + bias, each (M, N), of x (M, K), weight (N, K) and bias (N,), all bf16."""
    z, activated = gemm_act(x.contiguous(), weight.T, bias=bias, activation="gelu_tanh_approx", config=GELU_TILES)
    return activated, z


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = (len(x), len(weight))
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("gpt2core::quack_gelu_gradient", mutates_args=(), device_types="cuda")
def gelu_gradient(gradient: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient (M, N) of z where gelu(z) @ weight.T has this gradient (M, K), and its column sums (N,) in fp32; weight
    (K, N), z (M, N), all bf16."""
    found = dgelu_dbias_epi(gradient.contiguous(), weight, z, config=DERIVATIVE_TILES)
    return found["D"], found["dwb"]


@gelu_gradient.register_fake
def _(gradient: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(z), z.new_empty(z.shape[1], dtype=torch.float32)


def losses_in_place(logits: Tensor, targets: Tensor) -> Tensor:
    """Losses (N,) fp32 of logits (N, V), which become their gradient."""
    losses, _ = cross_entropy_fwd(logits, targets, return_dx=True, inplace_backward=True)
    return losses


def why_not(device: torch.device, width: int) -> str | None:
    """Why the products cannot be had for a model of such a width; None when they can: small ones are compared with PyTorch's."""
    if width % ALIGNMENT:
        return f"width {width} is not a multiple of {ALIGNMENT}"
    return failure_of(lambda: [trial() for trial in product_trials(device, width).values()])


def why_not_loss(device: torch.device, vocab_size: int) -> str | None:
    """Why the loss of such logits cannot be had, nor their product; None when it can: it is compared with PyTorch's."""
    if vocab_size % ALIGNMENT:  # as OpenAI's 50,257
        return f"a vocabulary of {vocab_size} is not a multiple of {ALIGNMENT}"
    return failure_of(lambda: try_loss(device, vocab_size))


def try_loss(device: torch.device, vocab_size: int) -> None:
    """Raises what the compiler raises, or RuntimeError where the result is not PyTorch's."""
    random = torch.Generator(device).manual_seed(0)
    logits = torch.randn(16, vocab_size, device=device, dtype=torch.bfloat16, generator=random)
    targets = torch.randint(vocab_size, (16,), device=device, generator=random)
    exact = logits.float().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    check_close(losses_in_place(logits, targets), expected, "QuACK's loss")
    check_close(logits, gradient, "QuACK's gradient of the loss")


def product_trials(device: torch.device, width: int) -> dict[str, Callable[[], None]]:
    """Each product in small, by what it is for. A trial raises what the compiler raises, or RuntimeError where the result is not
    PyTorch's."""
    random = torch.Generator(device).manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=random)

    x, weight, bias, residual = some(300, width), some(4 * width, width), some(4 * width), some(300, 4 * width)
    weight /= width**0.5
    product = x.float() @ weight.float().T
    exact = product + bias.float()
    z = exact.bfloat16()
    back, tall = some(width, 4 * width), some(LONG, width)

    def try_linear_gelu() -> None:
        activated, found = linear_gelu(x, weight, bias)
        check_close(found, exact, "QuACK's product with GELU")
        check_close(activated, F.gelu(exact, approximate="tanh"), "QuACK's GELU")

    def try_gelu_gradient() -> None:
        expected = torch.ops.aten.gelu_backward(x.float() @ back.float(), z.float(), approximate="tanh")
        found, sums = gelu_gradient(x, back, z)
        check_close(found, expected, "QuACK's derivative of GELU")
        check_close(sums, expected.sum(0), "QuACK's column sums")

    def try_multiply(a: Tensor, b: Tensor, what: str) -> None:
        check_close(multiply(a, b), a.float() @ b.float(), what)

    return {
        "gelu_gradient": try_gelu_gradient,
        "linear_gelu": try_linear_gelu,
        "linear": lambda: check_close(linear(x, weight, bias, None), exact, "QuACK's product"),
        "residual": lambda: check_close(
            linear(x, weight, bias, residual), exact + residual.float(), "QuACK's product with a residual"
        ),
        "input_gradient": lambda: try_multiply(x, back, "QuACK's gradient of an input"),
        "long_sum": lambda: try_multiply(some(300, LONG), tall, "QuACK's gradient of an input of many outputs"),
        "logits": lambda: check_close(multiply(x, weight.T), product, "QuACK's logits"),
    }
