"""The Triton kernels against plain PyTorch, at odd sizes: on a GPU as they are, elsewhere in Triton's interpreter.

The interpreter knows no PTX, so that what rounds there to 8 bits is other code; what is left to a GPU is that rounding.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core import fused_loss
from gpt2core.fp8 import CAPABILITY
from gpt2core.fp8_cast import E4M3, E5M2, MULTIPLE, cast, check_kernels, dithered, values_of
from gpt2core.fused_loss import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton is not installed: it is made for Linux alone", allow_module_level=True)

from gpt2core import triton_kernels as kernels

# Compiles the kernels for GPUs that need not be here, FP8's from Ada on; ends with an error where PTX or machine code cannot be made.
COMPILING = """
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gpt2core import triton_kernels as kernels

def compiled(capability, kernel, tensors, sizes, num_warps, **constants):
    types = {name: "*" + dtype for name, dtype in tensors.items()} | dict.fromkeys(sizes, "i32")
    source = ASTSource(kernel, types | dict.fromkeys(constants, "constexpr"), constants)
    target = GPUTarget("cuda", capability, 32)
    return triton.compile(source, target=target, options={"num_warps": num_warps}).asm["cubin"]

loss = {"logits": "bf16", "targets": "i64", "losses": "fp32", "log_sums": "fp32"}
factors = {"factor": "fp32", "amax": "fp32", "row_major": "i32", "column_major": "i32", "sums": "fp32"}
casts = {
    "gelu_gradient": ("bf16", kernels.CAST_BLOCK_WITH_SUMS, tl.float8e4nv, True),
    "softmax_gradient": ("fp32", kernels.CAST_BLOCK, tl.float8e5, False),
}
for capability in (80, 86, 89, 90, 100, 103, 120, 121):  # A100 to GB10
    print("capability", capability, flush=True)
    block = {"with_gradient": True, "block": kernels.LOSS_BLOCK}
    assert compiled(capability, kernels._loss_kernel, loss, ["num_columns"], kernels.LOSS_WARPS, **block)
    for what, (other, (rows, columns, num_warps), dtype, with_sums) in casts.items() if capability >= 89 else ():
        tensors = {"x": "bf16", "other": other, "targets": "i64"} | factors
        block = {"block_rows": rows, "block_columns": columns, "what": what, "dtype": dtype, "with_sums": with_sums}
        sizes = ["num_rows", "row_fours", "column_fours"]
        assert compiled(capability, kernels._cast_kernel, tensors, sizes, num_warps, **block)
"""

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = [(37, 52), (64, 128), (1, 16), (130, 260)]  # columns in fours


def test_the_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(Path(__file__).parent.parent), "TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILING]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout.splitlines()[-1:] + done.stderr.splitlines()[-40:]


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(DEVICE)


def some_targets(rows: int, columns: int) -> Tensor:
    return torch.randint(0, columns, (rows,), generator=torch.Generator().manual_seed(rows)).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "vocab"), [(3, 150), (2, 8192), (2, 8209), (2, 16384)])
def test_losses_logsumexps_and_gradients(rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits = (5 * random(rows, vocab)).to(dtype)
    targets = some_targets(rows, vocab)
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, targets, reduction="none")
    expected.sum().backward()
    before = logits.clone()
    losses, log_sums = kernels.loss_rows(logits, targets, with_gradient=False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(log_sums.double(), exact.logsumexp(1).detach(), rtol=1e-6, atol=1e-5)
    for found in (losses, kernels.loss_rows(logits, targets, with_gradient=True)[0]):
        torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-6, atol=1e-5)
    assert exact.grad is not None
    bf16 = 2**-8 if DEVICE == "cuda" else 2**-7  # it keeps 8 bits, and the interpreter cuts the others off
    tolerance = 1e-5 if dtype == torch.float32 else bf16
    torch.testing.assert_close(logits.double(), exact.grad, rtol=tolerance, atol=1e-7)


def cast_by_kernel(
    x: Tensor, other: Tensor | None, factor: float, what: str, dtype: torch.dtype, with_sums: bool = True
) -> list[Tensor]:
    """Row-major, column-major, column sums, largest magnitude, in fp32; memory of the layouts held NaN before."""
    rows, columns = x.shape
    padded = -(-rows // MULTIPLE) * MULTIPLE
    layouts = [torch.full(shape, torch.nan, device=DEVICE).to(dtype) for shape in ((rows, columns), (columns, padded))]
    amax = torch.full((1,), 0.5, device=DEVICE)
    targets = some_targets(rows, columns)
    multiplied = torch.tensor([factor], device=DEVICE)
    sums = kernels.cast(x, other, targets, multiplied, amax, *layouts, what, with_sums)
    return [*(layout.float() for layout in layouts), sums, amax]


def other_of(what: str, x: Tensor) -> Tensor | None:
    if what == "softmax_gradient":
        return x.float().logsumexp(1)
    return 2 * random(*x.shape[::-1]).T.contiguous().to(x.dtype) if what == "gelu_gradient" else None


def exactly(x: Tensor, other: Tensor | None, targets: Tensor, what: str) -> Tensor:
    """In fp64, by PyTorch's own functions and their derivatives."""
    x = x.double()
    if what == "gelu":
        return F.gelu(x, approximate="tanh")
    if what == "gelu_gradient":
        assert other is not None
        z = other.double().requires_grad_()
        return torch.autograd.grad(F.gelu(z, approximate="tanh"), z, x)[0]
    if what == "softmax_gradient":
        return x.softmax(1) - F.one_hot(targets, x.shape[1])
    return x


@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("what", ["itself", "gelu", "gelu_gradient", "softmax_gradient"])
@pytest.mark.parametrize(("rows", "columns"), SIZES)
def test_a_cast(what: str, dtype: torch.dtype, with_sums: bool, rows: int, columns: int) -> None:
    x = (3 * random(rows, columns)).bfloat16()
    other = other_of(what, x)
    targets = some_targets(rows, columns)
    expected = exactly(x, other, targets, what)
    torch.testing.assert_close(values_of(x, other, targets, what).double(), expected, rtol=1e-5, atol=1e-5)
    row_major, column_major, sums, amax = cast_by_kernel(x, other, 64.0, what, dtype, with_sums)
    numbers = torch.finfo(dtype)
    scaled = (64 * expected).clamp(-numbers.max, numbers.max)
    is_dithered = what == "softmax_gradient"
    off = (1.01 if is_dithered else 0.505) * numbers.eps  # by a step, or by half of one
    below_normal = 1.5 if is_dithered else 1  # there it is dithered at the bits of a normal number, and then rounded
    torch.testing.assert_close(row_major.double(), scaled, rtol=off, atol=below_normal * off * numbers.smallest_normal)
    if is_dithered:
        by_pytorch = dithered(scaled.float(), dtype).to(dtype)
        assert (row_major != by_pytorch.float()).float().mean() < 0.01, "but where fp32 itself is off by a bit"
    if what == "itself":
        assert torch.equal(row_major, scaled.float().to(dtype).float())
    assert torch.equal(column_major[:, :rows], row_major.T)
    assert not column_major[:, rows:].any()
    if with_sums:
        torch.testing.assert_close(sums.double(), expected.sum(0), rtol=1e-5, atol=1e-4)
    else:
        assert sums.shape == (0,)
    if what != "softmax_gradient":  # whose bound is known
        torch.testing.assert_close(amax[0].double(), expected.abs().amax().clamp(min=0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("length", [128, 256, 512, 1024, 2048, 4096])
def test_thresholds_are_even_over_the_same_place_of_many_sequences(length: int) -> None:
    ones = torch.full((fused_loss.ROWS, 1), 1.0 + torch.finfo(E5M2).eps / 2)  # halfway between two numbers
    went_up = dithered(ones, E5M2).view(-1, length) > 1
    assert (went_up.float().mean(0) - 0.5).abs().max() <= 2.5 / len(went_up)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_errors_of_a_softmax_gradient_do_not_add_up_over_tokens(dtype: torch.dtype) -> None:
    """Tokens with the same probabilities, of which none is rounded to nothing."""
    rows, columns = 1024, 256
    logits = random(1, columns).expand(rows, columns).contiguous()
    probabilities = logits[0].double().softmax(0)
    factor = 2.0**15 if dtype == E5M2 else 2.0**12
    of_all = values_of(logits, logits.logsumexp(1), some_targets(rows, columns), "softmax_gradient")
    is_target = of_all < 0
    row_major, *_ = cast_by_kernel(logits, logits.logsumexp(1), factor, "softmax_gradient", dtype)
    mean = (row_major.double() / factor).masked_fill(is_target, 0).sum(0) / (~is_target).sum(0)
    to_nearest = (probabilities * factor).to(torch.float32).to(dtype).double() / factor
    error, error_of_one = ((found - probabilities).norm() / probabilities.norm() for found in (mean, to_nearest))
    assert error < 0.005 < 0.01 < error_of_one


@pytest.mark.parametrize("what", ["gelu", "gelu_gradient", "softmax_gradient"])
def test_what_is_cast_is_computed_in_fp32(what: str) -> None:
    """Column sums of one row are the numbers before they are rounded."""
    x = torch.linspace(-12, 12, 4096, device=DEVICE)[None]
    other = torch.linspace(-9, 9, 4096, device=DEVICE)[None] if what == "gelu_gradient" else other_of(what, x)
    _, _, sums, _ = cast_by_kernel(x, other, 1.0, what, E4M3)
    expected = exactly(x, other, some_targets(1, 4096), what)[0]
    torch.testing.assert_close(sums.double(), expected, rtol=2e-6, atol=2e-7 * float(expected.abs().amax()))


def test_numbers_of_8_bits_stay_as_they_are() -> None:
    for dtype in (E4M3, E5M2):
        bytes_of = torch.arange(256, dtype=torch.uint8).view(16, 16)
        x = bytes_of.view(dtype).float().nan_to_num(1.5, posinf=2.0, neginf=-2.0).to(DEVICE)
        row_major, column_major, _, _ = cast_by_kernel(x, None, 1.0, "itself", dtype)
        assert torch.equal(row_major, x) and torch.equal(column_major, x.T)


def test_what_is_not_finite_becomes_nan_and_the_rest_is_cut() -> None:
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 2.0, 0.0, 0.0]], device=DEVICE)
    for dtype, largest in ((E4M3, 448.0), (E5M2, 57344.0)):
        row_major, column_major, _, _ = cast_by_kernel(x, None, 8.0, "itself", dtype)
        assert row_major[0, :3].isnan().all() and column_major[:3, 0].isnan().all()
        assert row_major[0, 3:].tolist() == [largest, -largest, 16.0, 0.0, 0.0]


def test_what_lies_transposed_in_memory_is_read_as_it_is() -> None:
    x, other = random(32, 64).T, (2 * random(64, 32)).T
    of_transposed, of_rows = (
        cast(
            *pair, None, torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE), "gelu_gradient", E5M2, True, False
        )
        for pair in ((x, other.T), (x.contiguous(), other.T.contiguous()))
    )
    assert all(torch.equal(*pair) for pair in zip(of_transposed, of_rows, strict=True))


def test_kernels_that_a_compiler_spoilt_are_found_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device(DEVICE)
    check_kernels(here)
    right = kernels.cast

    def wrong(*arguments: Any, spoilt: str) -> Tensor:
        sums, (amax, row_major, column_major, what, with_sums) = right(*arguments), arguments[4:9]
        is_gradient_in_e4m3 = with_sums and row_major.dtype == E4M3
        if spoilt == what or (spoilt == "gradient in e4m3" and is_gradient_in_e4m3):
            column_major.view(torch.uint8)[5, 3] ^= 1
        if spoilt == "amax" and what == "gelu":
            amax *= 1.01
        if spoilt == "both layouts" and what == "itself":  # alike, and wrong
            for place, layout in (((7, 9), row_major), ((9, 7), column_major)):
                layout.view(torch.uint8)[place] ^= 1
        if spoilt == "sums":
            sums *= 1.01
        return sums

    kinds = ("itself", "gelu", "gelu_gradient", "softmax_gradient", "gradient in e4m3")
    for spoilt in (*kinds, "amax", "both layouts", "sums"):
        monkeypatch.setattr(kernels, "cast", partial(wrong, spoilt=spoilt))
        with pytest.raises(RuntimeError, match="Triton compiles a kernel wrongly"):
            check_kernels(here)


def test_a_kernel_that_rounds_to_the_nearest_where_it_should_dither_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2core.fp8_cast.dithered", lambda values, dtype: values)  # what the kernel is compared with
    with pytest.raises(RuntimeError, match="softmax_gradient"):
        check_kernels(torch.device(DEVICE))


def test_a_loss_that_a_compiler_spoilt_is_found_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    here = torch.device(DEVICE)
    fused_loss.check_kernel(here)
    right = kernels.loss_rows

    def wrong(logits: Tensor, targets: Tensor, with_gradient: bool, spoilt: str) -> tuple[Tensor, Tensor]:
        losses, log_sums = right(logits, targets, with_gradient)
        if spoilt == "losses":
            losses *= 1.001
        if spoilt == "gradient" and with_gradient:
            logits[3, 5] *= 1.05
        return losses, log_sums

    for spoilt in ("losses", "gradient"):
        monkeypatch.setattr(kernels, "loss_rows", partial(wrong, spoilt=spoilt))
        with pytest.raises(RuntimeError, match="Triton compiles the loss wrongly"):
            fused_loss.check_kernel(here)


has_fp8 = DEVICE == "cuda" and torch.cuda.get_device_capability() >= CAPABILITY


@pytest.mark.skipif(not has_fp8, reason="needs a GPU with FP8: the rounding of the hardware is what is tested")
@pytest.mark.parametrize("with_sums", [False, True])
@pytest.mark.parametrize("what", ["itself", "gelu", "gelu_gradient", "softmax_gradient"])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("rows", "columns"), [*SIZES, (2048, 768)])
def test_a_gpu_rounds_as_pytorch_does(rows: int, columns: int, dtype: torch.dtype, what: str, with_sums: bool) -> None:
    x = (20 * random(rows, columns)).bfloat16()
    other, targets = other_of(what, x), some_targets(rows, columns)
    factor = torch.full((1,), 16.0, device=DEVICE)
    amax = [torch.zeros(1, device=DEVICE) for _ in range(2)]
    mine, reference = (
        cast(x, other, targets, factor, largest, what, dtype, with_sums, emulate)
        for largest, emulate in zip(amax, (False, True), strict=True)
    )
    assert mine[0].dtype == dtype
    assert torch.equal(mine[0].T.float(), mine[1][:, :rows].float()) and not mine[1][:, rows:].float().any()
    if what == "itself":
        assert torch.equal(mine[0].float(), reference[0].float()) and torch.equal(*amax)
    else:  # where exp differs in its last bit a number may round to the next one
        step = torch.finfo(dtype).eps
        torch.testing.assert_close(mine[0].float(), reference[0].float(), rtol=step, atol=2.0**-9)
        assert (mine[0].float() == reference[0].float()).float().mean() > 0.99
