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

from gpt2core import cublaslt, cudnn_attention, fused_loss, hopper, kernel_cache
from gpt2core.config import ModelConfig
from gpt2core.device_trial import check_close, failure_of


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """residual + x @ weight.T + bias in the dtype of x."""
    out = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
    return out if residual is None else residual + out


def mlp(x: Tensor, fc: Tensor, fc_bias: Tensor, proj: Tensor, proj_bias: Tensor, residual: Tensor) -> Tensor:
    """A block's two linear layers with GELU between, added to the residual; GPT-2 was trained with the tanh form."""
    return linear(F.gelu(linear(x, fc, fc_bias), approximate="tanh"), proj, proj_bias, residual)


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


class Products(NamedTuple):
    """Products of rows (M, K) or (M, N), weights (N, K) and biases (N,), all of one dtype, with what is done in their epilogues."""

    linear: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]  # x @ weight.T + bias + residual
    input_gradient: Callable[[Tensor, Tensor], Tensor]  # gradient @ weight
    linear_gelu: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # gelu(z) and z, of x, weight and bias
    gelu_gradient: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]  # of z, with column sums in fp32


def _linear(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None) -> Tensor:
    out = torch.addmm(bias, x, weight.T)
    return out if residual is None else residual + out


def _gelu_gradient(gradient: Tensor, weight: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    found = cublaslt.gelu_gradient(gradient, weight, z)
    return found, found.sum(0, dtype=torch.float32)


CUBLASLT = Products(_linear, torch.mm, cublaslt.linear_gelu, _gelu_gradient)


class _Linear(torch.autograd.Function):
    """`linear` whose weight's gradient is fp32 from its birth."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, products: Products
    ) -> Tensor:
        cast = weight.to(x.dtype)
        ctx.save_for_backward(x, cast)
        ctx.products, ctx.has_residual = products, residual is not None
        return products.linear(x, cast, bias.to(x.dtype), residual)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, cast = ctx.saved_tensors
        return (
            ctx.products.input_gradient(gradient, cast),
            weight_gradient(gradient, x),
            gradient.sum(0, dtype=torch.float32),
            gradient if ctx.has_residual else None,
            None,
        )


class _MLP(torch.autograd.Function):
    """`mlp` with the GELU and its derivative in the epilogues of the products beside it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        fc: Tensor,
        fc_bias: Tensor,
        proj: Tensor,
        proj_bias: Tensor,
        residual: Tensor,
        products: Products,
    ) -> Tensor:
        fc, proj = fc.to(x.dtype), proj.to(x.dtype)
        activated, z = products.linear_gelu(x, fc, fc_bias.to(x.dtype))
        ctx.save_for_backward(x, fc, proj, z, activated)
        ctx.products = products
        return products.linear(activated, proj, proj_bias.to(x.dtype), residual)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, fc, proj, z, activated = ctx.saved_tensors
        z_gradient, z_sums = ctx.products.gelu_gradient(gradient, proj, z)
        return (
            ctx.products.input_gradient(z_gradient, fc),
            weight_gradient(z_gradient, x),
            z_sums,
            weight_gradient(gradient, activated),
            gradient.sum(0, dtype=torch.float32),
            gradient,
            None,
        )


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    products: Products = CUBLASLT,
) -> Tensor:
    if bias is None or not torch.is_grad_enabled():
        return linear(x, weight, bias, residual)
    rows = None if residual is None else residual.flatten(0, -2)
    out: Tensor = _Linear.apply(x.flatten(0, -2), weight, bias, rows, products)
    return out.view(*x.shape[:-1], -1)


def fused_mlp(
    x: Tensor,
    fc: Tensor,
    fc_bias: Tensor,
    proj: Tensor,
    proj_bias: Tensor,
    residual: Tensor,
    products: Products = CUBLASLT,
) -> Tensor:
    if not torch.is_grad_enabled():
        return mlp(x, fc, fc_bias, proj, proj_bias, residual)
    rows = residual.flatten(0, -2)
    out: Tensor = _MLP.apply(x.flatten(0, -2), fc, fc_bias, proj, proj_bias, rows, products)
    return out.view_as(x)


def fused_attention(qkv: Tensor, flash_backward: bool = False) -> Tensor:
    return cudnn_attention.attention(qkv, flash_backward) if torch.is_grad_enabled() else attention(qkv)


@dataclass(frozen=True)
class Kernels:
    """The model's heavy operations; their arguments are those of `linear`, `attention`, `mlp` and `mean_loss` above."""

    note: str = "PyTorch's own"
    linear: Callable[..., Tensor] = linear
    attention: Callable[[Tensor], Tensor] = attention
    mlp: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = mlp
    mean_loss: Callable[[Tensor, Tensor, Tensor], Tensor] = mean_loss


PLAIN = Kernels()
Part = tuple[str, Callable[..., Tensor], str | None]  # what it is called, itself, and why it cannot be had


def pick_kernels(
    wanted: str, device: torch.device, dtype: torch.dtype, model: ModelConfig, fp8: bool = False
) -> Kernels:
    """The kernels for 'auto', 'fused' or 'plain'. Raises ValueError when 'fused' cannot be had in full.

    With `fp8` other products will take the place of these, so that the fastest ones are not looked for.
    """
    if wanted == "plain":
        return PLAIN
    if device.type != "cuda" or dtype != torch.bfloat16:
        if wanted == "fused":
            raise ValueError(
                f"kernels fused: they are for bf16 on an NVIDIA GPU, and this is {dtype} on {device.type}; use --kernels auto"
            )
        return PLAIN
    wants_quack = not fp8 and model.embd_size % cublaslt.ALIGNMENT == 0
    wants_flash = not torch.are_deterministic_algorithms_enabled()
    with kernel_cache.filling(device, model, ["flash_attn"] * wants_flash + ["quack"] * wants_quack):
        parts = _pick_products(device, model, fp8)
    parts["attention"] = _pick_attention(device, model)
    missing = "; ".join(f"{name}: {why_not}" for name, _, why_not in parts.values() if why_not)
    if wanted == "fused" and missing:
        raise ValueError(f"kernels fused: {missing}; use --kernels auto, which takes what there is")
    names = ", ".join(name for name, _, why_not in parts.values() if not why_not)
    note = f"fused {names or 'nothing'}" + (f"; PyTorch's for {missing}" if missing else "")
    found = {part: kernel for part, (_, kernel, why_not) in parts.items() if not why_not}
    return replace(PLAIN, note=note, **found)


def _pick_products(device: torch.device, model: ModelConfig, fp8: bool) -> dict[str, Part]:
    if why_not_sums := failure_of(partial(_try_weight_gradients, device)):
        return {"linear": ("weight gradients in fp32", linear, why_not_sums)}  # the others need them, too
    quack, why_not_quack = (None, "") if fp8 else _quack_products(device, model)
    loss = _pick_loss(device, model, quack is not None)
    if quack:
        return {
            "mean_loss": loss,
            "linear": ("weight gradients in fp32", partial(fused_linear, products=quack), None),
            "mlp": ("products with bias, residual and GELU (QuACK)", partial(fused_mlp, products=quack), None),
        }
    gelu = f"GELU (cuBLASLt{_faster(device, why_not_quack)})"
    return {
        "mean_loss": loss,
        "linear": ("weight gradients in fp32", fused_linear, None),
        "mlp": (gelu, fused_mlp, cublaslt.why_not(device, model.embd_size)),
    }


def _pick_loss(device: torch.device, model: ModelConfig, has_quack: bool) -> Part:
    why_not_quack = ""
    if has_quack:
        from gpt2core import quack_kernels

        why_not_quack = quack_kernels.why_not_loss(device, model.vocab_size) or ""
        if not why_not_quack:
            return "loss (QuACK)", partial(fused_loss.mean_loss, quack=True), None
    return f"loss (Triton{_faster(device, why_not_quack)})", fused_loss.mean_loss, fused_loss.why_not(device)


def _try_weight_gradients(device: torch.device) -> None:
    random = torch.Generator(device).manual_seed(0)
    gradient, x = (torch.randn(64, n, device=device, dtype=torch.bfloat16, generator=random) for n in (16, 8))
    expected = gradient.float().T @ x.float()
    check_close(weight_gradient(gradient, x), expected, "a product of bf16 in fp32")
    total = expected.clone()
    fused_loss.add_product(total, gradient.T, x)
    check_close(total, 2 * expected, "a product of bf16 added in fp32")


def _quack_products(device: torch.device, model: ModelConfig) -> tuple[Products | None, str]:
    """QuACK's products; without them, why they cannot be had."""
    why_not = hopper.why_not(device, "quack") or failure_of(partial(import_module, "gpt2core.quack_kernels"))
    if why_not:
        return None, why_not
    from gpt2core import quack_kernels as quack

    if why_not := quack.why_not(device, model.embd_size):
        return None, why_not
    return Products(quack.linear, quack.input_gradient, quack.linear_gelu, quack.gelu_gradient), ""


def _pick_attention(device: torch.device, model: ModelConfig) -> Part:
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
    return f"; on Hopper another is faster: {why_not}" if why_not and hopper.is_hopper(device) else ""
