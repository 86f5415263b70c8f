"""How the model's heavy operations are computed: as PyTorch has them, or fused on a GPU. The mathematics is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core import cublaslt, cudnn_attention, fused_loss, hopper
from gpt2core.config import ModelConfig
from gpt2core.device_trial import failure_of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in the dtype of x."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def mlp(x: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor, proj_bias: Tensor) -> Tensor:
    """A block's two linear layers with GELU between; GPT-2 was trained with the tanh form."""
    return linear(F.gelu(linear(x, fc, fc_bias), approximate="tanh"), proj, proj_bias)


def attention(qkv: Tensor) -> Tensor:
    """Causal softmax attention, (B, T, H, D), of queries, keys and values packed in (B, T, 3, H, D)."""
    q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, H, T, D)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def mean_loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, fp32, of the logits x @ weight.T: x (N, C), weight (V, C), targets (N,)."""
    return F.cross_entropy(linear(x, weight, None).float(), targets)


def weight_gradient(gradient: Tensor, x: Tensor) -> Tensor:
    """gradient.T @ x in fp32, as the tensor cores sum it: not rounded to bf16 on its way to the fp32 master weights."""
    if gradient.is_cuda and gradient.dtype != torch.float32:
        return torch.mm(gradient.T, x, out_dtype=torch.float32)
    return (gradient.T @ x).float()


class _Linear(torch.autograd.Function):
    """`linear` whose weight's gradient is fp32 from its birth."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        return torch.addmm(bias.to(x.dtype), x, cast.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, cast = ctx.saved_tensors
        return (
            gradient @ cast,
            weight_gradient(gradient, x),
            gradient.sum(0, dtype=torch.float32),
        )


class GeluProducts(NamedTuple):
    """A product with GELU behind it, and one times GELU's derivative with its column sums (quack_gelu.py)."""

    linear_gelu: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    gelu_gradient: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class _MLP(torch.autograd.Function):
    """`mlp` with the GELU and its derivative in the epilogues of the products beside it."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor, proj_bias: Tensor, products: GeluProducts
    ) -> Tensor:
        fc, proj = fc.to(x.dtype), proj.to(x.dtype)
        activated, z = products.linear_gelu(x, fc, fc_bias.to(x.dtype))
        ctx.save_for_backward(x, fc, proj, z, activated)
        ctx.products = products
        return torch.addmm(proj_bias.to(x.dtype), activated, proj.T)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, fc, proj, z, activated = ctx.saved_tensors
        z_gradient, z_sums = ctx.products.gelu_gradient(gradient, proj, z)
        return (
            z_gradient @ fc,
            weight_gradient(z_gradient, x),
            z_sums,
            weight_gradient(gradient, activated),
            gradient.sum(0, dtype=torch.float32),
            None,
        )


def _gelu_gradient(gradient: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    found = cublaslt.gelu_gradient(gradient, weight, z)
    return found, found.sum(0, dtype=torch.float32)


CUBLASLT = GeluProducts(cublaslt.linear_gelu, _gelu_gradient)


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if bias is None or not torch.is_grad_enabled():
        return linear(x, weight, bias)
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias)
    return out.view(*x.shape[:-1], -1)


def fused_mlp(
    x: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor, proj_bias: Tensor, products: GeluProducts = CUBLASLT
) -> Tensor:
    if not torch.is_grad_enabled():
        return mlp(x, fc, fc_bias, proj, proj_bias)
    out: Tensor = _MLP.apply(x.flatten(0, -2), fc, fc_bias, proj, proj_bias, products)
    return out.view_as(x)


def fused_attention(qkv: Tensor, flash_backward: bool = False) -> Tensor:
    return cudnn_attention.attention(qkv, flash_backward) if torch.is_grad_enabled() else attention(qkv)


@dataclass(frozen=True)
class Kernels:
    """The model's heavy operations; their arguments are those of `linear`, `attention`, `mlp` and `mean_loss` above."""

    note: str = "PyTorch's own"
    linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = linear
    attention: Callable[[Tensor], Tensor] = attention
    mlp: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = mlp
    mean_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = mean_loss


PLAIN = Kernels()


def pick_kernels(wanted: str, device: torch.device, dtype: torch.dtype, model: ModelConfig) -> Kernels:
    """The kernels for 'auto', 'fused' or 'plain'. Raises ValueError when 'fused' cannot be had in full."""
    if wanted == "plain":
        return PLAIN
    if device.type != "cuda" or dtype != torch.bfloat16:
        if wanted == "fused":
            raise ValueError(
                f"kernels fused: they are for bf16 on an NVIDIA GPU, and this is {dtype} on {device.type}; use --kernels auto"
            )
        return PLAIN
    parts: dict[str, tuple[str, Callable[..., Tensor], str | None]] = {
        "mean_loss": ("loss (Triton)", fused_loss.mean_loss, fused_loss.why_not(device)),
        "linear": ("weight gradients in fp32", fused_linear, None),
        "mlp": _pick_mlp(device, model),
        "attention": _pick_attention(device, model),
    }
    missing = "; ".join(f"{name}: {why_not}" for name, _, why_not in parts.values() if why_not)
    if wanted == "fused" and missing:
        raise ValueError(f"kernels fused: {missing}; use --kernels auto, which takes what there is")
    names = ", ".join(name for name, _, why_not in parts.values() if not why_not)
    note = f"fused {names or 'nothing'}" + (f"; PyTorch's for {missing}" if missing else "")
    found = {part: kernel for part, (_, kernel, why_not) in parts.items() if not why_not}
    return replace(PLAIN, note=note, **found)


def _pick_mlp(device: torch.device, model: ModelConfig) -> tuple[str, Callable[..., Tensor], str | None]:
    why_not_quack = hopper.why_not(device, "quack") or failure_of(partial(import_module, "gpt2core.quack_gelu"))
    if not why_not_quack:
        from gpt2core import quack_gelu

        why_not_quack = quack_gelu.why_not(device, model.embd_size)
    if not why_not_quack:
        products = GeluProducts(quack_gelu.linear_gelu, quack_gelu.gelu_gradient)
        return "GELU (QuACK)", partial(fused_mlp, products=products), None
    return f"GELU (cuBLASLt{_faster(device, why_not_quack)})", fused_mlp, cublaslt.why_not(device, model.embd_size)


def _pick_attention(device: torch.device, model: ModelConfig) -> tuple[str, Callable[..., Tensor], str | None]:
    heads, size = model.num_heads, model.embd_size // model.num_heads
    if torch.are_deterministic_algorithms_enabled():
        why_not = "cuDNN's backward pass adds in any order, and --deterministic was asked for"
        return "packed attention (cuDNN)", fused_attention, why_not
    if why_not_cudnn := cudnn_attention.why_not(device, heads, size):
        return "packed attention (cuDNN)", fused_attention, why_not_cudnn
    if why_not_flash := cudnn_attention.why_not_flash(device, heads, size):
        return f"packed attention (cuDNN{_faster(device, why_not_flash)})", fused_attention, None
    name = "packed attention (forward cuDNN, backward FlashAttention-4)"
    return name, partial(fused_attention, flash_backward=True), None


def _faster(device: torch.device, why_not: str) -> str:
    """What to say of kernels that are made for this device and are not used."""
    return f"; on Hopper another is faster: {why_not}" if hopper.is_hopper(device) else ""
