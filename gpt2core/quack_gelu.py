"""The MLP's products with GELU in their epilogue, by QuACK's kernels for Hopper (Dao et al., the package quack-kernels).

Import it only where that is installed. While one of two groups of warps is at the epilogue of its tile, the other multiplies
("ping-pong"), so that a product takes little longer for it. cuBLASLt's (cublaslt.py) takes a third longer with GELU; with its
derivative as long as here, but without the sums for the gradient of the bias.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from quack.epilogue.library import dgelu_dbias_epi
from quack.gemm_config import GemmConfig
from quack.gemm_interface import gemm_act
from torch import Tensor

from gpt2core.device_trial import check_close, failure_of

ALIGNMENT = 8  # elements of bf16 in the 16 bytes to which rows are aligned for the tensor memory accelerator
# The fastest of QuACK's own candidates for GPT-2 124M on an H100; the others take up to a third longer.
GELU_TILES = GemmConfig(
    tile_m=192, tile_n=128, pingpong=True, is_dynamic_persistent=False, cluster_m=2, cluster_n=1, swap_ab=True
)
DERIVATIVE_TILES = GemmConfig(
    tile_m=128, tile_n=128, pingpong=True, is_dynamic_persistent=False, cluster_m=1, cluster_n=2, swap_ab=False
)


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


def why_not(device: torch.device, width: int) -> str | None:
    """Why these products cannot be had for a model of such a width; None when they can: small ones are compared with
    PyTorch's."""
    if width % ALIGNMENT:
        return f"width {width} is not a multiple of {ALIGNMENT}"
    return failure_of(lambda: _check(device, width))


def _check(device: torch.device, width: int) -> None:
    random = torch.Generator(device).manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16, generator=random)

    x, weight, bias, back = some(300, width), some(4 * width, width), some(4 * width), some(width, 4 * width)
    weight /= width**0.5
    activated, z = linear_gelu(x, weight, bias)
    exact = F.linear(x.float(), weight.float(), bias.float())
    check_close(z, exact, "QuACK's product")
    check_close(activated, F.gelu(exact, approximate="tanh"), "QuACK's GELU")
    expected = torch.ops.aten.gelu_backward(x.float() @ back.float(), z.float(), approximate="tanh")
    derivative, sums = gelu_gradient(x, back, z)
    check_close(derivative, expected, "QuACK's derivative of GELU")
    check_close(sums, expected.sum(0), "QuACK's column sums")
