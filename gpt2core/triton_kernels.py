"""The project's own GPU kernels, in Triton. Import it only where there is a GPU, or with TRITON_INTERPRET=1 for tests.

What each computes stands beside it in plain PyTorch: `loss_rows` in fused_loss.py, `cast` in fp8_cast.py.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,type-arg,assignment,misc"

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from gpt2core.fp8_cast import DITHER_BY_COLUMN, DITHER_BY_ROW

# Columns that a program holds at once; measured best of 4096 to 16384 and 8 to 32 on an H200.
LOSS_BLOCK, LOSS_WARPS = 8192, 8
# A block of the cast: its rows, columns and warps, without column sums and with them; measured best of 14 on an H200.
CAST_BLOCK, CAST_BLOCK_WITH_SUMS = (64, 128, 8), (64, 64, 4)

IS_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # by the interpreter, which knows no PTX
_GELU_LINEAR = tl.constexpr(2 * math.sqrt(2 / math.pi))
_GELU_CUBIC = tl.constexpr(2 * math.sqrt(2 / math.pi) * 0.044715)
_DITHER_BY_ROW, _DITHER_BY_COLUMN = map(tl.constexpr, (DITHER_BY_ROW, DITHER_BY_COLUMN))
_PACK_E4M3, _PACK_E5M2 = (
    tl.constexpr(
        "{ .reg .b16 low, high;"
        f" cvt.rn.satfinite.{name}x2.f32 low, $2, $1;"
        f" cvt.rn.satfinite.{name}x2.f32 high, $4, $3;"
        " mov.b32 $0, {low, high}; }"
    )
    for name in ("e4m3", "e5m2")
)


@triton.jit
def _loss_kernel(logits, targets, losses, log_sums, num_columns, with_gradient: tl.constexpr, block: tl.constexpr):
    """Loss and logsumexp of row `program_id` and, `with_gradient`, softmax - onehot over its logits."""
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
    log_sum = tl.log(total) + maximum
    target = tl.load(targets + row)
    of_target = tl.load(logits + target).to(tl.float32)
    tl.store(losses + row, log_sum - of_target)
    tl.store(log_sums + row, log_sum)
    if with_gradient:
        tl.debug_barrier()  # the target's logit is read before it is overwritten
        last = (num_columns - 1) // block * block
        for before in range(0, num_columns, block):  # from the end, which was read last and is in the cache most likely
            places = last - before + columns
            is_there = places < num_columns
            z = tl.load(logits + places, mask=is_there, other=float("-inf"), eviction_policy="evict_first").to(
                tl.float32
            )
            gradient = tl.exp(z - log_sum) - tl.where(places == target, 1.0, 0.0)
            tl.store(
                logits + places, gradient.to(logits.dtype.element_ty), mask=is_there, eviction_policy="evict_first"
            )


def loss_rows(logits: Tensor, targets: Tensor, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Losses and logsumexps, (N,) fp32, of logits (N, V), which become their gradient if `with_gradient`."""
    losses, log_sums = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    _loss_kernel[(len(logits),)](
        logits,
        targets,
        losses,
        log_sums,
        logits.shape[1],
        with_gradient=with_gradient,
        block=LOSS_BLOCK,
        num_warps=LOSS_WARPS,
    )
    return losses, log_sums


@triton.jit(do_not_specialize_on_alignment=["factor", "amax"])  # numbers out of a row of them: one kernel for all
def _cast_kernel(
    x,
    other,
    targets,
    factor,
    amax,
    row_major,
    column_major,
    sums,
    num_rows,
    row_fours,
    column_fours,
    what: tl.constexpr,
    dtype: tl.constexpr,
    with_sums: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """A block of x, (num_rows, 4 * row_fours), made into `what`, times factor, rounded, in both layouts.

    These are written four numbers at once, which lie in one thread: four rows are loaded as four tensors. Stores of single
    8-bit floats in both layouts took twice as long and, with the ptxas 12.8 of Triton 3.6, came out wrong on an H200: see
    https://github.com/triton-lang/triton/issues/11111, which met the same where PTX has min.NaN (ours had it in one of
    two versions).
    """
    num_columns = 4 * row_fours
    first_column = tl.program_id(1) * block_columns
    columns = tl.arange(0, block_columns)
    columns_4 = tl.arange(0, block_columns // 4)
    rows_4 = tl.arange(0, block_rows // 4)
    is_column = columns < num_columns - first_column
    is_column_4 = columns_4 < row_fours - first_column // 4
    multiplier = tl.load(factor)
    total = tl.zeros((block_rows // 4, block_columns), tl.float32)
    largest = tl.zeros((block_rows // 4, block_columns), tl.float32)
    first_row = tl.program_id(0) * block_rows
    first = first_row.to(tl.int64) * num_columns + first_column
    scaled = ()
    for row in tl.static_range(4):
        rows = 4 * rows_4 + row
        is_row = rows < num_rows - first_row
        is_there = is_row[:, None] & is_column[None, :]
        places = rows[:, None] * num_columns + columns[None, :]
        values = tl.load(x + first + places, mask=is_there, other=0.0).to(tl.float32)
        if what == "gelu":
            values *= _sigmoid(_gelu_slope(values * values) * values)
        if what == "gelu_gradient":
            values *= _gelu_derivative(tl.load(other + first + places, mask=is_there, other=0.0).to(tl.float32))
        if what == "softmax_gradient":
            log_sums = tl.load(other + first_row + rows, mask=is_row, other=float("inf"))
            target = tl.load(targets + first_row + rows, mask=is_row, other=-1).to(tl.int32) - first_column
            values = _exp(values - log_sums[:, None])
            values -= tl.where(columns[None, :] == target[:, None], 1.0, 0.0)
        else:
            largest = tl.maximum(largest, tl.abs(values))
        if with_sums:
            total += values
        product = values * multiplier
        if what == "softmax_gradient":
            product = _dithered(product, first_row + rows, first_column + columns, dtype)
        values = product + (values - values)  # 0, or NaN of what is not finite
        scaled = scaled + (values,)  # noqa: RUF005 - Triton knows no *
        even, odd = _parted(values)
        a, c = _parted(even)
        b, d = _parted(odd)
        tl.store(
            row_major + first // 4 + rows[:, None] * row_fours + columns_4[None, :],
            _packed(a, b, c, d, dtype),
            mask=is_row[:, None] & is_column_4[None, :],
        )
    tl.store(
        column_major
        + first_column.to(tl.int64) * column_fours
        + first_row // 4
        + columns[:, None] * column_fours
        + rows_4[None, :],
        tl.trans(_packed(scaled[0], scaled[1], scaled[2], scaled[3], dtype)),
        mask=is_column[:, None] & (rows_4 < column_fours - first_row // 4)[None, :],
    )
    if what != "softmax_gradient":
        peak = tl.max(largest)
        if peak > tl.load(amax):  # so that all but a few programs need not wait for one another
            tl.atomic_max(amax, peak)
    if with_sums:
        tl.store(sums + tl.program_id(0) * num_columns + first_column + columns, tl.sum(total, 0), mask=is_column)


@triton.jit
def _dithered(values, rows, columns, dtype: tl.constexpr):
    """fp8_cast.dithered, at these rows and columns."""
    finer: tl.constexpr = 1 if dtype == tl.float8e4nv else 0  # by a bit
    kept: tl.constexpr = -0x100000 if dtype == tl.float8e4nv else -0x200000
    place = (rows * _DITHER_BY_ROW)[:, None] + (columns * _DITHER_BY_COLUMN)[None, :]
    dither = (place & 0x1FFFFF) >> finer
    bits = (values.to(tl.int32, bitcast=True) + dither) & kept
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _parted(values):
    """The even and the odd columns."""
    return tl.split(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)))


@triton.jit
def _packed(a, b, c, d, dtype: tl.constexpr):
    """Four fp32 tensors rounded to 8 bits, cut at the largest number, as the bytes of one of 32 bits, the lowest first."""
    if IS_INTERPRETED:
        return _byte(a, dtype) | (_byte(b, dtype) << 8) | (_byte(c, dtype) << 16) | (_byte(d, dtype) << 24)
    return tl.inline_asm_elementwise(
        _PACK_E4M3 if dtype == tl.float8e4nv else _PACK_E5M2,
        "=r,r,r,r,r",
        [a, b, c, d],
        dtype=tl.int32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _byte(values, dtype: tl.constexpr):
    """For the interpreter, whose own rounding forgets to carry: what it gets has no more bits than the type already."""
    is_e4m3: tl.constexpr = dtype == tl.float8e4nv
    largest: tl.constexpr = 448.0 if is_e4m3 else 57344.0
    smallest_normal: tl.constexpr = 2.0**-6 if is_e4m3 else 2.0**-14
    cut = tl.clamp(values, -largest, largest)
    shifted = cut * (2.0**20 + 1 if is_e4m3 else 2.0**21 + 1)  # Dekker 1971: it keeps 4 bits, or 3
    to_fixed: tl.constexpr = 1.5 * 2.0**14 if is_e4m3 else 1.5 * 2.0**7  # where fp32's steps are the subnormals'
    rounded = tl.where(tl.abs(cut) < smallest_normal, (cut + to_fixed) - to_fixed, shifted - (shifted - cut))
    return tl.where(values != values, 0x7F, rounded.to(dtype).to(tl.uint8, bitcast=True)).to(tl.int32)


@triton.jit
def _gelu_slope(z_squared):
    """u / z, for which GELU's tanh form is z * sigmoid(u): u = 2 * sqrt(2 / pi) * (z + 0.044715 z^3)."""
    return z_squared * _GELU_CUBIC + _GELU_LINEAR


@triton.jit
def _gelu_derivative(z):
    z_squared = z * z
    share = _sigmoid(_gelu_slope(z_squared) * z)
    inner = z_squared * (_GELU_CUBIC * 3) + _GELU_LINEAR  # derivative of u
    return share + share * (1 - share) * (z * inner)


@triton.jit
def _sigmoid(u):
    return _reciprocal(1 + _exp(-u))


@triton.jit
def _exp(x):
    """By the hardware's 2^x, exact to 2^-22, of an x that is rounded before: together to 2^-19 up to |x| = 40."""
    x *= 1.4426950408889634
    if IS_INTERPRETED:
        return tl.exp2(x)
    return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x):
    if IS_INTERPRETED:
        return 1 / x
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


def cast(
    x: Tensor,
    other: Tensor | None,
    targets: Tensor | None,
    factor: Tensor,
    amax: Tensor,
    row_major: Tensor,
    column_major: Tensor,
    what: str,
    with_sums: bool,
) -> Tensor:
    """Fills row_major (M, N), N a multiple of 4, and column_major (N, M padded to a multiple of 4), both of one 8-bit
    type, raises amax; the column sums (N,) in fp32, if wanted.
    """
    num_rows, num_columns = x.shape
    padded_rows = column_major.shape[1]
    block_rows, block_columns, num_warps = CAST_BLOCK_WITH_SUMS if with_sums else CAST_BLOCK
    grid = triton.cdiv(padded_rows, block_rows), triton.cdiv(num_columns, block_columns)
    partial = torch.empty(grid[0] if with_sums else 0, num_columns, dtype=torch.float32, device=x.device)
    _cast_kernel[grid](
        x,
        x if other is None else other,
        x if targets is None else targets,
        factor,
        amax,
        row_major.view(torch.int32),
        column_major.view(torch.int32),
        partial,
        num_rows,
        num_columns // 4,
        padded_rows // 4,
        what=what,
        dtype=tl.float8e4nv if row_major.dtype == torch.float8_e4m3fn else tl.float8e5,
        with_sums=with_sums,
        block_rows=block_rows,
        block_columns=block_columns,
        num_warps=num_warps,
    )
    return partial.sum(0) if with_sums else partial.new_empty(0)
