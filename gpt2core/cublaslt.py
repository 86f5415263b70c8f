"""Matrix products with a GELU in their epilogue, which cuBLASLt has and PyTorch does not hand through.

A GELU apart reads and writes the widest activation of a block once more, forward and backward; here it happens while the
product's tiles are still in registers. The numbers below are those of cublasLt.h, cublas_api.h and library_types.h
(CUDA documentation, cuBLAS, "Using the cuBLASLt API").

cuBLAS stores matrices column by column and PyTorch row by row, so that a row-major (rows, columns) is cuBLAS's
(columns, rows): `out = x @ op(weight)` here is `D = op(A) B` with A the weight and B the x there.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.device_trial import failure_of

COMPUTE_FP32, FP32, BF16 = 68, 0, 14
TRANSPOSE_A, EPILOGUE, BIAS_POINTER, AUX_POINTER, AUX_STRIDE = 3, 7, 8, 11, 12  # cublasLtMatmulDescAttributes_t
GELU_AUX_BIAS, DGELU = 164, 192  # cublasLtEpilogue_t; both with the tanh form
MAX_WORKSPACE_BYTES = 1  # cublasLtMatmulPreferenceAttributes_t
WORKSPACE_BYTES = 32 << 20  # what NVIDIA advises for Hopper
ALIGNMENT = 8  # elements of bf16 in the 16 bytes to which cuBLASLt wants the auxiliary matrix's rows aligned


class _HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t."""

    _fields_ = [
        ("algo", ctypes.c_uint64 * 8),
        ("workspace_bytes", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@functools.cache
def _library() -> ctypes.CDLL:
    """The library that PyTorch itself computes with. Raises OSError where there is none."""
    if not torch.version.cuda:
        raise OSError("this PyTorch is not built for CUDA")
    return ctypes.CDLL(f"libcublasLt.so.{torch.version.cuda.split('.')[0]}")


def _call(function: str, *arguments: Any) -> None:
    if status := getattr(_library(), function)(*arguments):
        raise RuntimeError(f"{function} failed with status {status}")


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    _call("cublasLtCreate", ctypes.byref(handle))
    return handle


def _new(stack: ExitStack, what: str, *arguments: Any) -> ctypes.c_void_p:
    """A descriptor that lives as long as the stack."""
    made = ctypes.c_void_p()
    _call(f"cublasLt{what}Create", ctypes.byref(made), *arguments)
    stack.callback(_call, f"cublasLt{what}Destroy", made)
    return made


def _set(what: str, descriptor: ctypes.c_void_p, attribute: int, value: Any) -> None:
    size = ctypes.c_size_t(ctypes.sizeof(value))
    _call(f"cublasLt{what}SetAttribute", descriptor, attribute, ctypes.byref(value), size)


def _layout(stack: ExitStack, matrix: Tensor) -> ctypes.c_void_p:
    rows, columns = matrix.shape
    stride = ctypes.c_int64(matrix.stride(0))
    return _new(stack, "MatrixLayout", BF16, ctypes.c_uint64(columns), ctypes.c_uint64(rows), stride)


@contextmanager
def _problem(
    x: Tensor, weight: Tensor, out: Tensor, transpose: bool, epilogue: int, aux: Tensor, bias: Tensor | None
) -> Iterator[tuple[ctypes.c_void_p, ...]]:
    """Descriptors of the product and of the layouts of weight, x and out."""
    with ExitStack() as stack:
        product = _new(stack, "MatmulDesc", COMPUTE_FP32, FP32)
        _set("MatmulDesc", product, TRANSPOSE_A, ctypes.c_int32(transpose))
        _set("MatmulDesc", product, EPILOGUE, ctypes.c_uint32(epilogue))
        _set("MatmulDesc", product, AUX_POINTER, ctypes.c_void_p(aux.data_ptr()))
        _set("MatmulDesc", product, AUX_STRIDE, ctypes.c_int64(aux.stride(0)))
        if bias is not None:
            _set("MatmulDesc", product, BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
        yield product, _layout(stack, weight), _layout(stack, x), _layout(stack, out)


_algorithms: dict[tuple[Any, ...], _HeuristicResult] = {}  # by device, epilogue, shapes and strides


def _algorithm(key: tuple[Any, ...], device: int, problem: tuple[ctypes.c_void_p, ...]) -> _HeuristicResult:
    """The first choice of cuBLASLt's heuristic, asked once a shape. Raises RuntimeError when it has none.

    To choose by the stopwatch instead does not pay: at the power limit all take the same time (docs/results.md).
    """
    if key not in _algorithms:
        product, a, b, d = problem
        result, found = _HeuristicResult(), ctypes.c_int(0)
        with ExitStack() as stack:
            preference = _new(stack, "MatmulPreference")
            _set("MatmulPreference", preference, MAX_WORKSPACE_BYTES, ctypes.c_uint64(WORKSPACE_BYTES))
            wanted = (preference, 1, ctypes.byref(result), ctypes.byref(found))
            _call("cublasLtMatmulAlgoGetHeuristic", _handle(device), product, a, b, d, d, *wanted)
        if not found.value:
            raise RuntimeError("cuBLASLt has no algorithm for this product")
        _algorithms[key] = result
    return _algorithms[key]


def _multiply(
    x: Tensor, weight: Tensor, out: Tensor, transpose: bool, epilogue: int, aux: Tensor, bias: Tensor | None = None
) -> None:
    """out = epilogue(x @ weight.T) or, without `transpose`, epilogue(x @ weight); all bf16 with rows of stride 1."""
    device = x.device.index
    one, zero = ctypes.c_float(1.0), ctypes.c_float(0.0)
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=x.device)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (weight, x, out, workspace)]
    with torch.cuda.device(device), _problem(x, weight, out, transpose, epilogue, aux, bias) as problem:
        strides = tuple(tensor.stride(0) for tensor in (x, weight, out, aux))
        algorithm = _algorithm((device, epilogue, *x.shape, *weight.shape, *strides), device, problem)
        product, a, b, d = problem
        _call(
            "cublasLtMatmul",
            *(_handle(device), product, ctypes.byref(one), pointers[0], a, pointers[1], b),
            *(ctypes.byref(zero), pointers[2], d, pointers[2], d),
            *(ctypes.byref(algorithm.algo), pointers[3], ctypes.c_size_t(WORKSPACE_BYTES)),
            ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream),
        )


@torch.library.custom_op("gpt2core::linear_gelu", mutates_args=(), device_types="cuda")
def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """gelu(z) and z = x @ weight.T + bias, each (M, N), of x (M, K), weight (N, K) and bias (N,), all bf16."""
    z, activated = (x.new_empty(len(x), len(weight)) for _ in range(2))
    _multiply(x.contiguous(), weight, activated, True, GELU_AUX_BIAS, z, bias)
    return activated, z


@linear_gelu.register_kernel("cpu")
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    z = F.linear(x, weight, bias)
    return F.gelu(z, approximate="tanh"), z


@linear_gelu.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    shape = (len(x), len(weight))
    return x.new_empty(shape), x.new_empty(shape)


@torch.library.custom_op("gpt2core::gelu_gradient", mutates_args=(), device_types="cuda")
def gelu_gradient(gradient: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    """The gradient (M, N) of z where gelu(z) @ weight.T has this gradient (M, K); weight (K, N), z (M, N), all bf16."""
    out = torch.empty_like(z)
    _multiply(gradient.contiguous(), weight, out, False, DGELU, z)
    return out


@gelu_gradient.register_kernel("cpu")
def _(gradient: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward(gradient @ weight, z, approximate="tanh")


@gelu_gradient.register_fake
def _(gradient: Tensor, weight: Tensor, z: Tensor) -> Tensor:
    return torch.empty_like(z)


def why_not(device: torch.device, width: int) -> str | None:
    """Why these products cannot be had for a model of such a width; None when they can: small ones are tried."""
    if device.type != "cuda":
        return "no NVIDIA GPU"
    if width % ALIGNMENT:
        return f"width {width} is not a multiple of {ALIGNMENT}"

    def attempt() -> None:
        x, weight = (torch.zeros(rows, width, dtype=torch.bfloat16, device=device) for rows in (16, 4 * width))
        _, z = linear_gelu(x, weight, weight.new_zeros(4 * width))
        gelu_gradient(x, weight.view(width, 4 * width), z)

    return failure_of(attempt)
