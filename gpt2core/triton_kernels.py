"""The project's own GPU kernels, in Triton. Import it only where there is a GPU, or with TRITON_INTERPRET=1 for tests.

What each computes stands beside it in plain PyTorch: `loss_rows` in fused_loss.py, `cast` in fp8_cast.py.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call,type-arg"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns that a program holds at once; measured best of 4096 to 16384 and 8 to 32 on an H200.
LOSS_BLOCK, LOSS_WARPS = 8192, 8
# A program's tile: each layout is written in half or whole cache lines. Not tuned yet.
CAST_ROWS, CAST_COLUMNS, CAST_WARPS = 128, 64, 8


@triton.jit
def _loss_kernel(
    logits, targets, losses, log_sums, num_columns, scale, with_gradient: tl.constexpr, block: tl.constexpr
):
    """Loss and logsumexp of row `program_id` and, `with_gradient`, scale * (softmax - onehot) over its logits."""
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
    tl.store(log_sums + row, tl.log(total) + maximum)
    if with_gradient:
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


def loss_rows(logits: Tensor, targets: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Losses and logsumexps, (N,) fp32, of logits (N, V), which become scale * their gradient unless it is None."""
    losses, log_sums = (torch.empty(len(logits), dtype=torch.float32, device=logits.device) for _ in range(2))
    _loss_kernel[(len(logits),)](
        logits,
        targets,
        losses,
        log_sums,
        logits.shape[1],
        scale or 0.0,
        with_gradient=scale is not None,
        block=LOSS_BLOCK,
        num_warps=LOSS_WARPS,
    )
    return losses, log_sums


@triton.jit
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
    num_columns,
    padded_rows,
    largest: tl.constexpr,
    what: tl.constexpr,
    with_sums: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
):
    """A tile of x, (num_rows, num_columns), made into `what`, times factor, rounded, in both layouts."""
    rows = tl.program_id(0).to(tl.int64) * block_rows + tl.arange(0, block_rows)
    columns = tl.program_id(1) * block_columns + tl.arange(0, block_columns)
    is_column = columns < num_columns
    is_there = (rows < num_rows)[:, None] & is_column[None, :]
    places = rows[:, None] * num_columns + columns[None, :]
    values = tl.load(x + places, mask=is_there, other=0.0).to(tl.float32)
    if what == "gelu":
        values *= tl.sigmoid(_gelu_slope(values))
    if what == "gelu_gradient":
        z = tl.load(other + places, mask=is_there, other=0.0).to(tl.float32)
        share = tl.sigmoid(_gelu_slope(z))
        inner = 1.5957691216057308 * (1 + 3 * 0.044715 * z * z)  # derivative of _gelu_slope
        values *= share + z * share * (1 - share) * inner
    if what == "softmax_gradient":
        log_sums = tl.load(other + rows, mask=rows < num_rows, other=0.0)
        target = tl.load(targets + rows, mask=rows < num_rows, other=-1)
        values = tl.exp(values - log_sums[:, None]) - tl.where(columns[None, :] == target[:, None], 1.0, 0.0)
        values = tl.where(is_there, values, 0.0)
    else:
        tl.atomic_max(amax, tl.max(tl.abs(values)))
    if with_sums:
        tl.store(sums + tl.program_id(0) * num_columns + columns, tl.sum(values, 0), mask=is_column)
    # cut by comparisons, which NaN passes: with PTX's min.NaN and max.NaN, ptxas before 13.3 spoils the transposed store
    # (https://github.com/triton-lang/triton/issues/11111)
    scaled = values * tl.load(factor)
    scaled = tl.where(scaled > largest, largest, tl.where(scaled < -largest, -largest, scaled))
    scaled = tl.where(tl.abs(values) == float("inf"), float("nan"), scaled)
    rounded = scaled.to(row_major.dtype.element_ty)
    tl.store(row_major + places, rounded, mask=is_there)
    transposed = columns[:, None].to(tl.int64) * padded_rows + rows[None, :]
    tl.store(column_major + transposed, tl.trans(rounded), mask=is_column[:, None] & (rows < padded_rows)[None, :])


@triton.jit
def _gelu_slope(z):
    """u, for which GELU's tanh form is z * sigmoid(u): 2 * sqrt(2 / pi) * (z + 0.044715 z^3)."""
    return 1.5957691216057308 * (z + 0.044715 * z * z * z)


def cast(
    x: Tensor,
    other: Tensor | None,
    targets: Tensor | None,
    factor: Tensor,
    amax: Tensor,
    row_major: Tensor,
    column_major: Tensor,
    largest: float,
    what: str,
    with_sums: bool,
) -> Tensor:
    """Fills row_major (M, N) and column_major (N, at least M), raises amax; the column sums (N,) in fp32, if wanted."""
    num_rows, num_columns = x.shape
    grid = triton.cdiv(column_major.shape[1], CAST_ROWS), triton.cdiv(num_columns, CAST_COLUMNS)
    partial = torch.empty(grid[0] if with_sums else 0, num_columns, dtype=torch.float32, device=x.device)
    _cast_kernel[grid](
        x,
        x if other is None else other,
        x if targets is None else targets,
        factor,
        amax,
        row_major,
        column_major,
        partial,
        num_rows,
        num_columns,
        column_major.shape[1],
        largest=largest,
        what=what,
        with_sums=with_sums,
        block_rows=CAST_ROWS,
        block_columns=CAST_COLUMNS,
        num_warps=CAST_WARPS,
    )
    return partial.sum(0) if with_sums else partial.new_empty(0)
