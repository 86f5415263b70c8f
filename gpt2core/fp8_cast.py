"""A tensor rounded to 8-bit floating point, in one pass over it: what it is made into on the way, times a factor, in both
layouts that matrix products want, with its largest magnitude and, for the gradient of a bias, the sums of its columns.

Formats are e4m3 (largest number 448) and e5m2 (57,344) of Micikevicius et al. 2022, "FP8 formats for deep learning". Numbers
are rounded to the nearest one, but for the softmax gradient: see `dithered`. What is beyond the largest number becomes the
largest number; an infinity becomes NaN, so that the update is left out as in any other precision. Factors are powers of two:
they add no rounding of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core import fused_loss

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # of a product's inner dimension and of its columns, which torch._scaled_mm asks for

LOWER_BITS = {E4M3: 20, E5M2: 21}  # of fp32's 23 in the significand, which are not kept
DITHER_BITS = 21
# Of 2^21, near the powers -1 and -2 of 1.32471795724, the root of x^3 = x + 1; odd, so that no place comes twice in 2^21. The
# first was searched: thresholds at the same place of one sequence after the other are as even as along the tokens of one, in
# the 32,768 rows that the loss takes at a time, which all have the same (no gap above twice the mean, for contexts that are
# powers of two from 128 to 4,096).
DITHER_BY_ROW, DITHER_BY_COLUMN = 1595987, 1195041

What = Literal["itself", "gelu", "gelu_gradient", "softmax_gradient"]


def values_of(x: Tensor, other: Tensor | None, targets: Tensor | None, what: str) -> Tensor:
    """The fp32 values that are rounded.

    itself: x. gelu: GELU of x, in the tanh form. gelu_gradient: x times the derivative of that at `other`.
    softmax_gradient: of the cross-entropy of the logits x (M, V), whose logsumexps (M,) are `other`, with `targets` (M,).
    """
    x = x.float()
    if what == "gelu":
        return F.gelu(x, approximate="tanh")
    if what == "gelu_gradient":
        assert other is not None
        gradient: Tensor = torch.ops.aten.gelu_backward(x, other.float(), approximate="tanh")
        return gradient
    if what == "softmax_gradient":
        assert other is not None and targets is not None
        return (x - other[:, None]).exp_().scatter_add_(1, targets[:, None], x.new_full((len(x), 1), -1.0))
    return x


def largest_magnitude(x: Tensor, other: Tensor | None, what: str) -> Tensor:
    """Of x as `what`, (1,) fp32."""
    made = x if what == "itself" else values_of(x, other, None, what)
    return torch.linalg.vector_norm(made, torch.inf, dtype=torch.float32).view(1)


def power_of_two(largest: float | Tensor, amax: Tensor) -> Tensor:
    """The largest power of two with which numbers up to amax stay below `largest`; 1 where amax is 0 or not finite."""
    exponent_alone = (largest / amax).view(torch.int32) & 0x7F800000
    is_usable = amax.isfinite() & (amax > largest * 2.0**-126)
    return torch.where(is_usable, exponent_alone.view(torch.float32), 1.0)


@torch.library.custom_op("gpt2core::fp8_cast", mutates_args=("amax",))
def cast(
    x: Tensor,
    other: Tensor | None,
    targets: Tensor | None,
    factor: Tensor,
    amax: Tensor,
    what: str,
    dtype: torch.dtype,
    with_sums: bool,
    emulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """cast_into new memory: row-major, column-major and the sums."""
    row_major, column_major = _layouts(x, dtype)
    sums = cast_into(row_major, column_major, x, other, targets, factor, amax, what, with_sums, emulate)
    return row_major, column_major, sums


def cast_into(
    row_major: Tensor,
    column_major: Tensor,
    x: Tensor,
    other: Tensor | None,
    targets: Tensor | None,
    factor: Tensor,
    amax: Tensor,
    what: str,
    with_sums: bool,
    emulate: bool,
) -> Tensor:
    """Fills both layouts, of one 8-bit type, with x (M, N) made into `what`, times factor (1,): row-major (M, N), N a multiple
    of 4, and transposed, (N, M padded with zeros to a multiple of 16). Returns the fp32 sums of the columns (N,), none without
    `with_sums`.

    Raises amax (1,) to the largest magnitude, but for softmax_gradient, whose bound is known. `emulate` uses nothing but
    PyTorch's operations.
    """
    if not emulate:
        from gpt2core import triton_kernels

        x, other = x.contiguous(), None if other is None else other.contiguous()
        return triton_kernels.cast(x, other, targets, factor, amax, row_major, column_major, what, with_sums)
    values = values_of(x, other, targets, what)
    if what != "softmax_gradient":
        torch.maximum(amax, values.abs().amax(), out=amax)
    scaled = cut(values, factor, row_major.dtype)
    row_major.copy_(dithered(scaled, row_major.dtype) if what == "softmax_gradient" else scaled)
    column_major.copy_(F.pad(row_major.float(), (0, 0, 0, column_major.shape[1] - len(x))).T)
    return values.sum(0) if with_sums else values.new_empty(0)


@cast.register_fake
def _(
    x: Tensor,
    other: Tensor | None,
    targets: Tensor | None,
    factor: Tensor,
    amax: Tensor,
    what: str,
    dtype: torch.dtype,
    with_sums: bool,
    emulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.empty(x.shape[1] if with_sums else 0, dtype=torch.float32, device=x.device)
    return *_layouts(x, dtype), sums


def _layouts(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rows, columns = x.shape
    padded = -(-rows // MULTIPLE) * MULTIPLE
    return (
        torch.empty(rows, columns, dtype=dtype, device=x.device),
        torch.empty(columns, padded, dtype=dtype, device=x.device),
    )


def check_kernels(device: torch.device) -> None:
    """Compares the kernels with PyTorch, in the shapes' kind that training has, as a compiler's fault would not show before
    the loss does.

    Raises what Triton raises where it cannot compile for this GPU; RuntimeError where what it compiled is wrong.
    """
    rows, columns = 128, 192  # multiples of 64 are compiled for on their own; blocks are 64 or 128 wide
    random = torch.Generator(device).manual_seed(0)
    x, other = torch.randn(2, rows, columns, device=device, generator=random).bfloat16()
    with_infinity = x.index_fill(0, torch.tensor([3], device=device), torch.inf)
    targets = torch.randint(columns, (rows,), device=device, generator=random)
    if device.type == "cuda":
        fused_loss.check_kernel(device)
    _, log_sums = fused_loss.loss_rows(x, targets)
    kinds: list[tuple[What, Tensor, Tensor | None, torch.dtype, bool]] = [  # as they are used: the last is with_sums
        ("itself", x.float(), None, E4M3, False),
        ("itself", x, None, E4M3, False),
        ("itself", with_infinity, None, E4M3, False),
        ("gelu", x, None, E4M3, False),
        *(("itself", x, None, dtype, True) for dtype in (E4M3, E5M2)),
        *(("gelu_gradient", x, other, dtype, True) for dtype in (E4M3, E5M2)),
        ("softmax_gradient", x, log_sums, E5M2, False),
    ]
    for what, values, beside, dtype, with_sums in kinds:
        factor = torch.full((1,), 2.0**15 if dtype == E5M2 else 2.0**8, device=device)  # the largest numbers are cut
        of_targets = targets if what == "softmax_gradient" else None
        amaxes = torch.zeros(2, 1, device=device)
        mine, reference = (
            (*cast(values, beside, of_targets, factor, amax, what, dtype, with_sums, emulate), amax)
            for amax, emulate in zip(amaxes, (False, True), strict=True)
        )
        if not is_cast(mine, reference, exactly=what == "itself"):
            raise RuntimeError(f"Triton compiles a kernel wrongly ({what} to {mine[0].dtype})")


def is_cast(mine: Sequence[Tensor], reference: Sequence[Tensor], exactly: bool) -> bool:
    """Whether a cast, row-major, column-major, sums and largest magnitude, is the other one, and its layouts are one
    another's. Not `exactly`, one number in a hundred may be rounded to the next one."""
    row_major, column_major, sums, amax = (part.double() for part in mine)
    expected, _, expected_sums, expected_amax = (part.double() for part in reference)
    rows, numbers = len(row_major), torch.finfo(mine[0].dtype)
    rtol = 0 if exactly else numbers.eps
    is_same = torch.isclose(row_major, expected, rtol=0, atol=0, equal_nan=True)
    return bool(
        torch.equal(column_major[:, :rows].nan_to_num(-1.0), row_major.T.nan_to_num(-1.0))
        and not column_major[:, rows:].any()
        and torch.allclose(row_major, expected, rtol=rtol, atol=rtol * numbers.smallest_normal, equal_nan=True)
        and is_same.double().mean() >= 0.99
        and torch.allclose(sums, expected_sums, rtol=1e-4, atol=1e-4)
        and torch.allclose(amax, expected_amax, rtol=1e-5, atol=0)
    )


def cut(values: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """values times factor, ready to be rounded: no further from 0 than dtype's largest number, NaN for infinities."""
    largest = torch.finfo(dtype).max
    return torch.where(values.isinf(), torch.nan, (values * factor).clamp(-largest, largest))


def dithered(values: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 values (M, N), each moved to one of its two neighbours in dtype, over the rows to each as often as it is near; those
    below dtype's smallest normal number lean to the nearest.

    A softmax gives a rare token about the same probability wherever it does not come next. To the nearest number it would
    be rounded the same way each time, and a sum over thousands of tokens would have the error of one. Here a sequence that
    fills the space between two numbers evenly, along rows and along columns, is added before the lower bits are cut off (R2
    of Roberts 2018, "The unreasonable effectiveness of quasirandom sequences").
    """
    lower_bits = LOWER_BITS[dtype]
    rows, columns = (torch.arange(size, device=values.device) for size in values.shape)
    place = rows[:, None] * DITHER_BY_ROW + columns * DITHER_BY_COLUMN
    dither = (place % (1 << DITHER_BITS)) >> (DITHER_BITS - lower_bits)
    bits = (values.view(torch.int32) + dither.int()) & -(1 << lower_bits)
    return torch.where(values.isnan(), values, bits.view(torch.float32))


def product(
    a: Tensor,
    b: Tensor,
    a_inverse: Tensor,
    b_inverse: Tensor,
    dtype: torch.dtype,
    emulate: bool,
    bias: Tensor | None = None,
    fast: bool = False,
) -> Tensor:
    """a @ b.T of 8-bit a (M, K) and b (N, K), times the inverses of their factors, plus bias (N,): (M, N) in `dtype`.

    An inverse is one number, or one a row: (M, 1) and (N, 1). `fast` lets the tensor cores sum in less than fp32.
    """
    if not emulate:
        return torch._scaled_mm(
            a,
            b.t(),
            scale_a=a_inverse,
            scale_b=b_inverse.t() if b_inverse.ndim == 2 else b_inverse,
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=fast,
        )
    out = (a.float() @ b.float().T) * a_inverse * (b_inverse.t() if b_inverse.ndim == 2 else b_inverse)
    return (out if bias is None else out + bias.float()).to(dtype)
