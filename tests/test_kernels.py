"""The fused kernels against PyTorch's own operations in fp64: values and gradients, also at odd sizes.

On the CPU the operations run on PyTorch's arithmetic, which proves their derivatives and the chunks of the loss; the
kernels themselves need a GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core import fused_loss, hopper, kernel_cache, kernels
from gpt2core.config import ModelConfig
from gpt2core.model import GPT
from gpt2core.processes import descendants

HOPPER = torch.device("cuda", 0)
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the kernels are CUDA's and Triton's")
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]

# Relative error (Frobenius norm) against fp64. bf16 keeps 8 bits, so that one rounding is off by up to 2^-9 = 0.002; what
# is computed here is rounded two to four times on its way.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 8e-3}


def random(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device, dtype)


def check(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], tensors: list[Tensor], tolerance: float, *others: Tensor
) -> None:
    """Values and all gradients of `fused` are those of `plain` in fp64."""
    mine = [tensor.clone().requires_grad_() for tensor in tensors]
    exact = [tensor.double().requires_grad_() for tensor in tensors]
    results = fused(*mine, *others), plain(*exact, *others)
    seed = torch.randn(results[1].shape, generator=torch.Generator().manual_seed(0)).to(results[1])
    for result in results:
        result.backward(seed.to(result))
    for ours, theirs in [
        (results[0], results[1]),
        *((a.grad, b.grad) for a, b in zip(mine, exact, strict=True)),
    ]:
        assert ours is not None and theirs is not None
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def dtypes(device: str) -> list[torch.dtype]:
    return [torch.float32] if device == "cpu" else [torch.bfloat16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "width", "vocab"), [(7, 16, 150), (64, 64, 50304), (33, 768, 50257), (5, 32, 8192)])
@pytest.mark.parametrize("rows_at_once", [16, 1000])
def test_the_loss_is_cross_entropy(device: str, rows: int, width: int, vocab: int, rows_at_once: int) -> None:
    for dtype in {*dtypes(device), torch.float32}:
        x = random(rows, width, device=device, dtype=dtype)
        weight = random(vocab, width, device=device) / width**0.5
        targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
        check(
            lambda x, weight, targets: fused_loss.mean_loss(x, weight, targets, rows_at_once),
            lambda x, weight, targets: F.cross_entropy(x @ weight.T, targets),
            [x, weight],
            TOLERANCE[dtype],
            targets,
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(64, 64, 192), (37, 48, 24), (1, 8, 8), (1023, 768, 2304)])
def test_the_linear_layer(device: str, rows: int, inputs: int, outputs: int) -> None:
    for dtype in dtypes(device):
        tensors = [
            random(3, rows, inputs, device=device, dtype=dtype),
            random(outputs, inputs, device=device),
            random(outputs, device=device),
            random(3, rows, outputs, device=device, dtype=dtype),
        ]
        for products in all_products(device):
            fused = partial(kernels.fused_linear, products=products)
            check(fused, kernels.linear, tensors, TOLERANCE[dtype])
            check(fused, kernels.linear, tensors[:3], TOLERANCE[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("rows", "width"), [(64, 64), (37, 24), (1, 8), (1023, 768)])
def test_the_mlp(device: str, rows: int, width: int) -> None:
    for dtype in dtypes(device):
        tensors = [
            random(3, rows, width, device=device, dtype=dtype),
            random(4 * width, width, device=device) / width**0.5,
            random(4 * width, device=device),
            random(width, 4 * width, device=device) / width**0.5,
            random(width, device=device),
            random(3, rows, width, device=device, dtype=dtype),
        ]
        for products in all_products(device):
            check(partial(kernels.fused_mlp, products=products), kernels.mlp, tensors, TOLERANCE[dtype])


@on_gpu
@pytest.mark.parametrize(("rows", "width", "vocab"), [(64, 64, 50304), (33, 768, 50304), (5, 32, 8192)])
@pytest.mark.parametrize("rows_at_once", [16, 1000])
def test_the_loss_with_quacks_kernels(rows: int, width: int, vocab: int, rows_at_once: int) -> None:
    if len(all_products("cuda")) == 1:
        pytest.skip(hopper.why_not(HOPPER, "quack"))
    x, weight = random(rows, width, device="cuda", dtype=torch.bfloat16), random(vocab, width, device="cuda")
    check(
        lambda x, weight, targets: fused_loss.mean_loss(x, weight, targets, rows_at_once, quack=True),
        lambda x, weight, targets: F.cross_entropy(x @ weight.T, targets),
        [x, weight / width**0.5],
        TOLERANCE[torch.bfloat16],
        torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(1)).cuda(),
    )


def all_products(device: str) -> list[kernels.Products]:
    """Those of any GPU, and Hopper's own."""
    if device == "cpu" or hopper.why_not(HOPPER, "quack"):
        return [kernels.CUBLASLT]
    from gpt2core import quack_kernels as quack

    return [
        kernels.CUBLASLT,
        kernels.Products(quack.linear, quack.input_gradient, quack.linear_gelu, quack.gelu_gradient),
    ]


@on_gpu
@pytest.mark.parametrize(
    ("batch", "length", "heads", "size"), [(2, 64, 4, 64), (3, 37, 5, 64), (1, 2, 1, 32), (2, 1024, 12, 64)]
)
def test_attention(batch: int, length: int, heads: int, size: int) -> None:
    pytest.importorskip("cudnn")
    qkv = random(batch, length, 3, heads, size, device="cuda", dtype=torch.bfloat16)
    check(kernels.fused_attention, kernels.attention, [qkv], TOLERANCE[torch.bfloat16])
    if not hopper.why_not(HOPPER, "flash_attn"):
        flash = partial(kernels.fused_attention, flash_backward=True)
        check(flash, kernels.attention, [qkv], TOLERANCE[torch.bfloat16])


@pytest.mark.skipif(not hopper.is_hopper(HOPPER), reason="needs a Hopper GPU, whose kernels these are")
def test_hopper_gets_its_own_kernels_where_they_are_installed() -> None:
    pytest.importorskip("quack")
    pytest.importorskip("flash_attn.cute")
    chosen = kernels.pick_kernels("fused", HOPPER, torch.bfloat16, ModelConfig(embd_size=128, num_heads=2))
    assert "GELU (QuACK)" in chosen.note and "backward FlashAttention-4" in chosen.note
    fused, plain = (losses(kind, "cuda", torch.bfloat16, True) for kind in (chosen, kernels.PLAIN))
    assert fused == pytest.approx(plain, abs=0.02)


@pytest.mark.skipif(not hopper.is_hopper(HOPPER), reason="needs a Hopper GPU, whose kernels these are")
def test_the_kernels_are_compiled_ahead_into_their_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quack = pytest.importorskip("gpt2core.quack_kernels")
    pytest.importorskip("flash_attn.cute")
    assert {*quack.product_trials(HOPPER, 128), "loss"} == set(kernel_cache.TRIALS["quack"])
    monkeypatch.setenv("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    model = ModelConfig(embd_size=128, num_heads=2)
    for package, variable in kernel_cache.FOLDERS.items():
        monkeypatch.setenv(variable, str(tmp_path / package))
        with kernel_cache.filling(HOPPER, model, [package]):
            pass
        assert len(list((tmp_path / package).rglob("*.o"))) >= len(kernel_cache.TRIALS[package])


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 1)])
def test_kernels_for_hopper_are_tried_on_hopper_alone(
    capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setitem(hopper.PACKAGES, "a_package_that_is_missing", "its name")
    why_not = hopper.why_not(HOPPER, "a_package_that_is_missing")
    missing = "its name is not installed (the extra hopper)"
    assert why_not == (missing if capability[0] == 9 else "it is for Hopper GPUs")
    assert hopper.why_not(torch.device("cpu"), "quack") == "it is for Hopper GPUs"


@pytest.mark.skipif(torch.cuda.is_available(), reason="what cannot be loaded is shown where there is no GPU for it")
def test_what_cannot_be_compiled_ahead_is_left_to_the_trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = (ModelConfig(embd_size=64, num_heads=heads) for heads in (2, 4))
    monkeypatch.setenv(kernel_cache.FOLDERS["flash_attn"], str(tmp_path / "new"))
    monkeypatch.delenv(kernel_cache.FOLDERS["quack"], raising=False)

    def started(model: ModelConfig, *packages: str) -> list[list[str]]:
        before = {process.pid for process in descendants(os.getpid())}
        with kernel_cache.filling(HOPPER, model, packages):
            new = [process for process in descendants(os.getpid()) if process.pid not in before]
            commands = [Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")[2:-1] for process in new]
        assert not any(process.is_alive() for process in new)
        return commands

    assert started(model, "flash_attn") == [], "for this is no Hopper GPU"
    monkeypatch.setattr(hopper, "why_not", lambda device, package: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert started(model, "flash_attn") == [], "for it is not installed"
    monkeypatch.setitem(hopper.PACKAGES, "flash_attn", "torch")  # whose version is known
    command = ["gpt2core.kernel_cache", str(os.getpid()), "flash_attention", "64"]
    assert started(model, "flash_attn", "quack") == [[*command, "2", "50304"]], (
        "without a folder QuACK would do it in vain"
    )
    assert started(model, "flash_attn") == [], "once is enough, also of what fails"
    assert started(other, "flash_attn") == [[*command, "4", "50304"]]
    monkeypatch.setenv(kernel_cache.FOLDERS["flash_attn"], "/proc/no folder of ours")
    assert started(model, "flash_attn") == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="what cannot be loaded is shown where there is no GPU for it")
def test_attention_stays_cudnns_where_flash_attention_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "why_not", lambda device, package: None)
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(kernels.cudnn_attention, "why_not", lambda device, heads, size: None)
    name, kernel, why_not = kernels._pick_attention(HOPPER, ModelConfig(embd_size=64, num_heads=2))
    assert (kernel, why_not) == (kernels.fused_attention, None)
    assert name.startswith("packed attention (cuDNN; on Hopper another is faster: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="what cannot be loaded is shown where there is no GPU for it")
def test_kernels_for_hopper_that_do_not_load_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "why_not", lambda device, package: None)
    monkeypatch.setattr(hopper, "is_hopper", lambda device: True)
    monkeypatch.setattr(kernels, "_try_weight_gradients", lambda device: None)
    monkeypatch.setattr(fused_loss, "why_not", lambda device: None)
    monkeypatch.setattr(kernels.cublaslt, "why_not", lambda device, width: None)
    model = ModelConfig(embd_size=64, num_heads=2)
    in_fp8 = kernels.pick_kernels("auto", HOPPER, torch.bfloat16, model, fp8=True)
    assert "GELU (cuBLASLt)" in in_fp8.note, "others are not even looked for"
    chosen = kernels.pick_kernels("auto", HOPPER, torch.bfloat16, model)
    assert (chosen.linear, chosen.mlp) == (kernels.fused_linear, kernels.fused_mlp)
    assert chosen.mean_loss is fused_loss.mean_loss
    assert re.search(r"GELU \(cuBLASLt; on Hopper another is faster: [^)]{20,}\)", chosen.note)


@on_gpu
def test_the_weight_gradients_are_not_rounded_to_bf16() -> None:
    x = random(512, 64, device="cuda", dtype=torch.bfloat16)
    weight = random(64, 64, device="cuda").requires_grad_()
    kernels.fused_linear(x, weight, random(64, device="cuda")).sum().backward()
    assert weight.grad is not None
    assert not torch.equal(weight.grad, weight.grad.bfloat16().float())


def losses(chosen: kernels.Kernels, device: str, dtype: torch.dtype, compiled: bool) -> list[float]:
    """Of some updates of a small model."""
    config = ModelConfig(context_length=64, num_layers=2, embd_size=64, num_heads=2)
    tokens = torch.randint(0, 50257, (4, 65), generator=torch.Generator().manual_seed(0)).to(device)
    model = GPT(config, dtype, chosen)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    found = []
    for _ in range(8):
        loss = forward(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


FUSED = kernels.Kernels("fused", linear=kernels.fused_linear, mlp=kernels.fused_mlp, mean_loss=fused_loss.mean_loss)


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_learns_the_same_with_either(compiled: bool) -> None:
    fused, plain = (losses(chosen, "cpu", torch.float32, compiled) for chosen in (FUSED, kernels.PLAIN))
    assert fused == pytest.approx(plain, rel=1e-4)
    assert fused[-1] < fused[0] - 0.1


@on_gpu
def test_a_compiled_model_on_a_gpu_learns_the_same_with_either() -> None:
    fused, plain = (losses(chosen, "cuda", torch.bfloat16, True) for chosen in (FUSED, kernels.PLAIN))
    assert fused == pytest.approx(plain, abs=0.02)
    assert fused[-1] < fused[0] - 0.1


def test_without_gradients_the_plain_path_is_taken() -> None:
    x, weight = random(3, 8, device="cpu"), random(32, 8, device="cpu")
    bias, proj = random(32, device="cpu"), random(8, 32, device="cpu")
    with torch.no_grad():
        assert torch.equal(kernels.fused_linear(x, weight, bias), kernels.linear(x, weight, bias))
        arguments = (x, weight, bias, proj, random(8, device="cpu"), x)
        assert torch.equal(kernels.fused_mlp(*arguments), kernels.mlp(*arguments))


def test_what_cannot_work_is_refused_when_forced() -> None:
    model, cpu, gpu = ModelConfig(embd_size=64, num_heads=2), torch.device("cpu"), torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"kernels fused: they are for bf16 on an NVIDIA GPU.*use --kernels auto"):
        kernels.pick_kernels("fused", cpu, torch.bfloat16, model)
    with pytest.raises(ValueError, match=r"kernels fused: .* this is torch.float32 on cuda"):
        kernels.pick_kernels("fused", gpu, torch.float32, model)
    assert kernels.pick_kernels("auto", cpu, torch.float32, model) is kernels.PLAIN
    assert kernels.pick_kernels("plain", gpu, torch.bfloat16, model) is kernels.PLAIN


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a GPU lacks is shown where there is none")
def test_a_gpu_without_them_gets_what_there_is_and_is_refused_when_they_are_forced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, gpu = ModelConfig(embd_size=64, num_heads=2), torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"^kernels fused: weight gradients in fp32: (?!.*GELU).*use --kernels auto"):
        kernels.pick_kernels("fused", gpu, torch.bfloat16, model)
    chosen = kernels.pick_kernels("auto", gpu, torch.bfloat16, model)
    assert (chosen.linear, chosen.mean_loss, chosen.mlp) == (kernels.linear, kernels.mean_loss, kernels.mlp)
    monkeypatch.setattr(kernels, "_try_weight_gradients", lambda device: None)
    chosen = kernels.pick_kernels("auto", gpu, torch.bfloat16, model)
    assert chosen.linear is kernels.fused_linear, "which is PyTorch's own arithmetic"
    assert (chosen.mean_loss, chosen.mlp, chosen.attention) == (kernels.mean_loss, kernels.mlp, kernels.attention)
    assert chosen.note.startswith("fused weight gradients in fp32; PyTorch's for loss (Triton): ")
    with pytest.raises(ValueError, match=r"kernels fused: loss \(Triton\): .*GELU \(cuBLASLt\): .*use --kernels auto"):
        kernels.pick_kernels("fused", gpu, torch.bfloat16, model)


@on_gpu
def test_widths_without_a_fused_gelu_keep_the_other_kernels() -> None:
    model, gpu = ModelConfig(embd_size=60, num_heads=6), torch.device("cuda", 0)
    chosen = kernels.pick_kernels("auto", gpu, torch.bfloat16, model)
    assert chosen.mlp is kernels.mlp and chosen.mean_loss is fused_loss.mean_loss
    assert "width 60 is not a multiple of 8" in chosen.note
    with pytest.raises(ValueError, match="width 60"):
        kernels.pick_kernels("fused", gpu, torch.bfloat16, model)
