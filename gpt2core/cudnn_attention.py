"""Causal attention by cuDNN on queries, keys and values that lie packed in one tensor, as a block's c_attn makes them.

PyTorch calls the same cuDNN kernels, but gets three gradients in tensors of their own, which must then be copied together
for c_attn's backward pass. Through NVIDIA's cudnn-frontend, an optional package, they are written where they belong. On
Hopper the backward pass can be FlashAttention's instead (flash_attention.py).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gpt2core import hopper
from gpt2core.device_trial import check_close, failure_of

try:
    import cudnn
except ImportError:  # comes with the extra `gpu`
    cudnn = None

Graph = tuple[Any, dict[str, Any], int]  # cuDNN's graph, its tensors by name, the bytes of workspace it wants


@functools.cache
def _handle(device: int) -> Any:
    with torch.cuda.device(device):
        return cudnn.create_handle()


def _strides(batch: int, length: int, heads: int, size: int, packed: int) -> list[int]:
    """Of (batch, heads, length, size) within (batch, length, packed, heads, size)."""
    return [length * packed * heads * size, size, packed * heads * size, 1]


def _new_graph(device: int) -> Any:
    bf16, fp32 = cudnn.data_type.BFLOAT16, cudnn.data_type.FLOAT
    return cudnn.pygraph(io_data_type=bf16, intermediate_data_type=fp32, compute_data_type=fp32, handle=_handle(device))


def _built(graph: Any, tensors: dict[str, Any]) -> Graph:
    graph.build([cudnn.heur_mode.A])
    return graph, tensors, max(1, graph.get_workspace_size())


def _inputs(graph: Any, names: str, shape: list[int], strides: list[int]) -> dict[str, Any]:
    return {name: graph.tensor(name=name, dim=shape, stride=strides) for name in names.split()}


@functools.cache
def _forward_graph(device: int, batch: int, length: int, heads: int, size: int) -> Graph:
    shape = [batch, heads, length, size]
    graph = _new_graph(device)
    tensors = _inputs(graph, "q k v", shape, _strides(batch, length, heads, size, 3))
    out, stats = graph.sdpa(**tensors, is_inference=False, attn_scale=size**-0.5, use_causal_mask=True, name="sdpa")
    out.set_output(True).set_dim(shape).set_stride(_strides(batch, length, heads, size, 1))
    stats.set_output(True).set_data_type(cudnn.data_type.FLOAT)
    return _built(graph, tensors | {"out": out, "stats": stats})


@functools.cache
def _backward_graph(device: int, batch: int, length: int, heads: int, size: int) -> Graph:
    shape = [batch, heads, length, size]
    packed = _strides(batch, length, heads, size, 3)
    graph = _new_graph(device)
    tensors = _inputs(graph, "q k v", shape, packed)
    tensors |= _inputs(graph, "o dO", shape, _strides(batch, length, heads, size, 1))
    tensors["stats"] = graph.tensor(
        name="stats",
        dim=[batch, heads, length, 1],
        stride=[heads * length, length, 1, 1],
        data_type=cudnn.data_type.FLOAT,
    )
    gradients = graph.sdpa_backward(**tensors, attn_scale=size**-0.5, use_causal_mask=True, name="sdpa_backward")
    for name, gradient in zip(("dq", "dk", "dv"), gradients, strict=True):
        gradient.set_output(True).set_dim(shape).set_stride(packed)
        tensors[name] = gradient
    return _built(graph, tensors)


def _execute(built: Graph, values: dict[str, Tensor]) -> None:
    graph, tensors, workspace_bytes = built
    device = values["q"].device
    cudnn.set_stream(_handle(device.index), torch.cuda.current_stream(device).cuda_stream)
    workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
    graph.execute({tensors[name]: value for name, value in values.items()}, workspace, handle=_handle(device.index))


def _heads_first(names: str, packed: Tensor) -> dict[str, Tensor]:
    """(B, T, 3, H, D) as three views (B, H, T, D)."""
    return {name: part.transpose(1, 2) for name, part in zip(names.split(), packed.unbind(2), strict=True)}


def _sizes(qkv: Tensor) -> tuple[int, int, int, int, int]:
    batch, length, _, heads, size = qkv.shape
    return qkv.device.index, batch, length, heads, size


@torch.library.custom_op("gpt2core::packed_attention", mutates_args=(), device_types="cuda")
def _packed_attention(qkv: Tensor, flash_backward: bool) -> tuple[Tensor, Tensor]:
    _, batch, length, heads, size = sizes = _sizes(qkv)
    out = qkv.new_empty(batch, length, heads, size)
    stats = torch.empty(batch, heads, length, 1, dtype=torch.float32, device=qkv.device)
    values = _heads_first("q k v", qkv.contiguous()) | {"out": out.transpose(1, 2), "stats": stats}
    _execute(_forward_graph(*sizes), values)
    return out, stats


@_packed_attention.register_fake
def _(qkv: Tensor, flash_backward: bool) -> tuple[Tensor, Tensor]:
    batch, length, _, heads, size = qkv.shape
    return qkv.new_empty(batch, length, heads, size), qkv.new_empty(batch, heads, length, 1, dtype=torch.float32)


@torch.library.custom_op("gpt2core::packed_attention_backward", mutates_args=(), device_types="cuda")
def _packed_attention_backward(gradient: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, flash: bool) -> Tensor:
    qkv, gradient = qkv.contiguous(), gradient.contiguous()
    qkv_gradient = torch.empty_like(qkv)
    if flash:
        from gpt2core import flash_attention

        flash_attention.backward(gradient, qkv, out, stats.squeeze(-1), qkv_gradient)
        return qkv_gradient
    values = _heads_first("q k v", qkv) | _heads_first("dq dk dv", qkv_gradient)
    values |= {"o": out.transpose(1, 2), "dO": gradient.transpose(1, 2), "stats": stats}
    _execute(_backward_graph(*_sizes(qkv)), values)
    return qkv_gradient


@_packed_attention_backward.register_fake
def _(gradient: Tensor, qkv: Tensor, out: Tensor, stats: Tensor, flash: bool) -> Tensor:
    return torch.empty_like(qkv)


def _save(ctx: Any, inputs: tuple[Tensor, bool], output: tuple[Tensor, Tensor]) -> None:
    qkv, ctx.flash_backward = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.set_materialize_grads(False)


def _gradient(ctx: Any, gradient: Tensor, _: None) -> tuple[Tensor, None]:
    return _packed_attention_backward(gradient, *ctx.saved_tensors, ctx.flash_backward), None


_packed_attention.register_autograd(_gradient, setup_context=_save)


def attention(qkv: Tensor, flash_backward: bool = False) -> Tensor:
    """Causal softmax attention, (B, T, H, D), of queries, keys and values packed in (B, T, 3, H, D), bf16."""
    out, _ = _packed_attention(qkv, flash_backward)
    return out


def why_not(device: torch.device, heads: int, size: int) -> str | None:
    """Why it cannot be had on this device for such heads; None when it can: a small one is tried."""
    if device.type != "cuda":
        return "no NVIDIA GPU"
    if cudnn is None:
        return "nvidia-cudnn-frontend is not installed (the extra gpu)"

    def attempt() -> None:
        qkv = torch.zeros(1, 64, 3, heads, size, dtype=torch.bfloat16, device=device, requires_grad=True)
        attention(qkv).sum().backward()

    return failure_of(attempt)


def why_not_flash(device: torch.device, heads: int, size: int) -> str | None:
    """Why the backward pass cannot be FlashAttention's; None when it can: it is tried."""
    return hopper.why_not(device, "flash_attn") or failure_of(lambda: try_flash(device, heads, size))


def try_flash(device: torch.device, heads: int, size: int) -> None:
    """Raises what its compiler raises, or RuntimeError where its gradient is not cuDNN's."""
    random = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(2, 200, 3, heads, size, dtype=torch.bfloat16, device=device, generator=random)
    gradient = torch.randn(2, 200, heads, size, dtype=torch.bfloat16, device=device, generator=random)
    out, stats = _packed_attention(qkv, True)
    mine, cudnns = (_packed_attention_backward(gradient, qkv, out, stats, flash) for flash in (True, False))
    check_close(mine, cudnns, "FlashAttention's gradient")
