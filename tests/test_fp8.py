"""FP8: its arithmetic against fp32 and fp64, the factors of each recipe, and that runs in it are as exact as others.

Without a GPU the products are emulated, in the same formats; the kernels are in test_triton_kernels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core.config import ModelConfig, TrainConfig
from gpt2core.distributed import Ranks
from gpt2core.fp8 import FP8, HISTORY, ROOM, equip, why_not
from gpt2core.fp8_cast import E4M3, E5M2, cast, power_of_two, product
from gpt2core.model import GPT

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with FP8: its products are tested")
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]
RECIPES = ["delayed", "tensorwise", "rowwise"]
SHAPE = ModelConfig(context_length=16, num_layers=2, embd_size=32, num_heads=2)

# Relative error (Frobenius norm) against fp64. Rounding to nearest is off by up to 2^-4 in e4m3 (4 significant bits) and
# 2^-3 in e5m2 (3), in the root mean square by 0.42 of that; errors of the factors of a product add up as squares.
E4M3_ERROR, E5M2_ERROR = 0.42 * 2**-4, 0.42 * 2**-3
VALUE, GRADIENT = 1.25 * (2 * E4M3_ERROR**2) ** 0.5, 1.25 * (E4M3_ERROR**2 + E5M2_ERROR**2) ** 0.5


def random(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def settings(recipe: str = "delayed", precision: str = "fp8", **more: Any) -> TrainConfig:
    fp8_recipe = {"fp8_recipe": recipe} if precision == "fp8" else {}
    return TrainConfig.model_validate({"precision": precision, "kernels": "plain", **fp8_recipe, **more})


def ranks(device: str = "cpu") -> Ranks:
    return Ranks(0, 1, torch.device(device))


def model_in_fp8(train: TrainConfig, device: str = "cpu", shape: ModelConfig = SHAPE) -> tuple[GPT, FP8]:
    model = GPT(shape, torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    fp8 = equip(model, train, ranks(device))
    assert fp8
    return model, fp8


def text(sequences: int = 4) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 50257, (sequences, SHAPE.context_length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1], tokens[:, 1:]


def calibrated(model: GPT, fp8: FP8) -> None:
    if not fp8.is_calibrated:
        fp8.calibrate(lambda: model(*text()), list(model.parameters()))


# --- rounding and products ---------------------------------------------------------------------------------------------


def test_factors_are_the_largest_powers_of_two_that_fit() -> None:
    amax = torch.tensor([448.0, 448.1, 1.0, 3.0, 1e-6, 1e6, 0.0, torch.inf, torch.nan])
    factors = power_of_two(448.0, amax)
    assert factors[6:].tolist() == [1.0, 1.0, 1.0]
    for number, factor in zip(amax[:6].tolist(), factors[:6].tolist(), strict=True):
        assert torch.tensor(factor).frexp().mantissa == 0.5
        assert number * factor <= 448.0 < number * factor * 2


@pytest.mark.parametrize(("is_gradient", "dtype", "significant_bits"), [(False, E4M3, 4), (True, E5M2, 3)])
def test_a_cast_rounds_to_nearest_cuts_and_transposes(
    is_gradient: bool, dtype: torch.dtype, significant_bits: int
) -> None:
    x, amax = 100 * random(21, 40), torch.zeros(1)
    largest = torch.finfo(dtype).max
    factor = torch.tensor([2 * power_of_two(largest, x.abs().amax()).item()])  # so that some is cut
    row_major, column_major, sums = cast(x, None, None, factor, amax, "itself", is_gradient, True, True)
    wanted = (x * factor).clamp(-largest, largest)
    assert row_major.dtype == column_major.dtype == dtype
    assert ((row_major.float() - wanted).abs() <= wanted.abs() * 2.0**-significant_bits).all()
    assert (wanted.abs() == largest).any()
    assert torch.equal(column_major[:, :21].float(), row_major.float().T)
    assert column_major.shape == (40, 32) and not column_major[:, 21:].float().any()
    assert amax.item() == x.abs().amax()
    torch.testing.assert_close(sums, x.sum(0))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize(("rows", "inner", "columns"), [(64, 64, 64), (37, 48, 16), (1, 16, 80)])
def test_a_product_is_that_of_the_numbers_in_fp32(
    device: str, rowwise: bool, rows: int, inner: int, columns: int
) -> None:
    a, b = (random(*shape, device=device) for shape in ((rows, inner), (columns, inner)))
    inverses = [
        torch.rand(count, 1, device=device) if rowwise else torch.full((1,), 0.37, device=device)
        for count in (rows, columns)
    ]
    bias = random(columns, device=device).bfloat16()
    for first in (E4M3, E5M2):
        eights = a.to(first), b.to(E4M3)
        found = product(*eights, *inverses, torch.bfloat16, emulate=device == "cpu", bias=bias)
        plain = (eights[0].float() * inverses[0]) @ (eights[1].float() * inverses[1]).T + bias.float()
        assert found.dtype == torch.bfloat16
        assert (found.float() - plain).norm() <= 2**-8 * plain.norm()


# --- layers ------------------------------------------------------------------------------------------------------------


def check(
    ours: Callable[..., Tensor], exact: Callable[..., Tensor], tensors: list[Tensor], seed: Tensor | None = None
) -> list[tuple[Tensor, Tensor]]:
    """Pairs of ours and the exact ones: the value, then the gradient of each tensor."""
    mine = [tensor.clone().requires_grad_() for tensor in tensors]
    theirs = [tensor.double().requires_grad_() for tensor in tensors]
    values = ours(*mine), exact(*theirs)
    seed = random(*values[1].shape) if seed is None else seed
    for value in values:
        value.backward(seed.to(value))
    pairs = [values, *((a.grad, b.grad) for a, b in zip(mine, theirs, strict=True))]
    return [(a.detach().double(), b.detach()) for a, b in pairs if a is not None and b is not None]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("rows", [64, 37, 1])
def test_layers_compute_what_they_should(recipe: str, rows: int, device: str) -> None:
    model, _ = model_in_fp8(settings(recipe, kernels="plain" if device == "cpu" else "auto"), device)
    block: Any = model.transformer.h[0]
    x = random(2, rows, 32, device=device).bfloat16()
    fc, proj, qkv = block.mlp.c_fc, block.mlp.c_proj, block.attn.c_attn
    of_mlp = check(
        block.mlp.kernels.mlp,
        lambda x, a, b, c, d: F.linear(F.gelu(F.linear(x, a, b), approximate="tanh"), c, d),
        [tensor.detach() for tensor in (x, fc.weight, fc.bias, proj.weight, proj.bias)],
    )
    of_linear = check(qkv.kernels.linear, F.linear, [x, qkv.weight.detach(), qkv.bias.detach()])
    for ((value, exact), *gradients), products in ((of_mlp, 2), (of_linear, 1)):
        assert (value - exact).norm() <= products**0.5 * VALUE * exact.norm()
        for mine, theirs in gradients:
            assert (mine - theirs).norm() <= products**0.5 * GRADIENT * theirs.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_that_8_bits_hold_are_multiplied_exactly(recipe: str, device: str) -> None:
    """Small integers: nothing is rounded, so each of the three products must be right to the last bit."""
    model, fp8 = model_in_fp8(settings(recipe, kernels="plain" if device == "cpu" else "auto"), device)
    layer: Any = model.transformer.h[1].attn.c_proj  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)

    def integers(largest: int, *shape: int) -> Tensor:
        numbers = torch.randint(-largest, largest + 1, shape, generator=generator)
        numbers.flatten()[:2] = torch.tensor([largest, 1])
        return numbers.float().to(device)

    with torch.no_grad():
        layer.weight.copy_(integers(7, 32, 32))
    fp8.weights_changed()
    x, bias, seed = integers(7, 40, 32).bfloat16(), integers(3, 32), integers(3, 40, 32)
    for (mine, exact), places in zip(
        check(layer.kernels.linear, F.linear, [x, layer.weight.detach(), bias], seed), (8, 8, 24, 24), strict=True
    ):
        rounded = exact.bfloat16().double() if places == 8 else exact  # values and gradients of inputs are bf16
        assert torch.equal(mine, rounded)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [37, 64])
def test_the_head_computes_what_it_should(rows: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gpt2core.fp8_linear.HEAD_ROWS", 32)  # so that there are several turns
    model, _ = model_in_fp8(settings(precision="fp8_head", kernels="plain" if device == "cpu" else "auto"), device)
    x = random(rows, 32, device=device).bfloat16()
    targets = torch.randint(0, 50257, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    (value, exact), *gradients = check(
        lambda x, weight: model.kernels.mean_loss(x, weight, targets),
        lambda x, weight: F.cross_entropy(x @ weight.T, targets),
        [x, model.lm_head.weight.detach()],
        torch.ones(()),
    )
    assert (value - exact).abs() <= 1e-3 * exact
    for mine, theirs in gradients:
        assert (mine - theirs).norm() <= GRADIENT * theirs.norm()


def test_without_gradients_a_model_computes_as_it_will_be_used() -> None:
    model, _ = model_in_fp8(settings())
    plain = GPT(SHAPE, torch.bfloat16)
    plain.load_state_dict(model.state_dict())  # of the same names and shapes
    inputs, targets = text()
    with torch.no_grad():
        assert torch.equal(model(inputs), plain(inputs))
        assert torch.equal(model(inputs, targets), plain(inputs, targets))


# --- recipes -----------------------------------------------------------------------------------------------------------


def test_delayed_factors_look_back_on_the_last_updates_and_count_what_outgrew_them() -> None:
    model, fp8 = model_in_fp8(settings())
    assert not fp8.is_calibrated
    calibrated(model, fp8)
    assert all(parameter.grad is None for parameter in model.parameters())
    layer = fp8.layers["h.0.attn.c_attn"]
    assert layer.of_x.factor.item() > 1 and layer.of_gradient.factor.item() > 1
    assert layer.of_x.inverse * layer.of_x.factor == 1
    for update in range(HISTORY + 1):
        layer.of_x.amax.fill_(100.0 if update == 0 else 1.0)
        fp8.updated()
        assert layer.of_x.amax == 0  # counted anew
        largest = 100.0 if update < HISTORY else 1.0
        assert layer.of_x.factor == power_of_two(448 / ROOM, torch.tensor(largest))
    assert fp8.read_saturated() == 1  # by the first, which no factor had foreseen
    assert fp8.read_saturated() == 0
    layer.of_gradient.amax.fill_(torch.inf)  # of an update that was left out
    before = layer.of_gradient.factor.clone()
    fp8.updated()
    assert torch.equal(layer.of_gradient.factor, before) and fp8.read_saturated() == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_not_finite_reaches_the_gradients(recipe: str, bad: float) -> None:
    """So that the update is left out, as in any other precision."""
    model, fp8 = model_in_fp8(settings(recipe))
    calibrated(model, fp8)
    with torch.no_grad():
        model.transformer.ln_f.bias[3] = bad
    loss = model(*text())
    loss.backward()
    assert not torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()


def losses(train: TrainConfig, compiled: bool) -> list[float]:
    """Of some updates of a small model."""
    model = GPT(SHAPE.model_copy(update={"num_layers": 1}), torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    fp8 = equip(model, train, ranks())
    if fp8:
        calibrated(model, fp8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    forward = torch.compile(model) if compiled else model
    found = []
    for _ in range(5):
        loss = forward(*text())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if fp8:
            fp8.updated()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def losses_in_bf16() -> list[float]:
    return losses(TrainConfig(precision="bf16"), compiled=False)


COMPILED = [
    pytest.param(recipe, True, marks=pytest.mark.slow if recipe == "delayed" else pytest.mark.soak)
    for recipe in (*RECIPES, "fp8_head")
]


@pytest.mark.parametrize(("recipe", "compiled"), [*((recipe, False) for recipe in (*RECIPES, "fp8_head")), *COMPILED])
def test_a_model_learns_as_in_bf16(recipe: str, compiled: bool, losses_in_bf16: list[float]) -> None:
    train = settings(precision="fp8_head") if recipe == "fp8_head" else settings(recipe)
    found = losses(train, compiled)
    assert found == pytest.approx(losses_in_bf16, abs=0.01)
    assert found[-1] < found[0] - 0.1
    assert found != losses_in_bf16


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_fp8_is_refused_where_it_cannot_be_had() -> None:
    model = GPT(SHAPE, torch.bfloat16)
    wanted = r"precision fp8: it needs an NVIDIA GPU of compute capability 8\.9 .*, and this is cpu; use --precision bf16, or --kernels plain"
    with pytest.raises(ValueError, match=wanted):
        equip(model, settings(kernels="auto"), ranks())
    assert equip(model, TrainConfig(precision="bf16"), ranks()) is None
    odd = SHAPE.model_copy(update={"embd_size": 24})
    assert why_not(torch.device("cpu"), odd, "delayed", emulate=True) == (
        "embd_size 24 is not a multiple of 16, as FP8 products need"
    )
    unpadded = SHAPE.model_copy(update={"vocab_size": 50257})
    assert "vocab_size 50257 is not a multiple of 16" in str(why_not(torch.device("cpu"), unpadded, "delayed"))


@on_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_with_fp8_takes_it(recipe: str) -> None:
    assert why_not(torch.device("cuda", 0), ModelConfig(), recipe) is None


def test_a_recipe_without_fp8_is_refused() -> None:
    with pytest.raises(ValueError, match="fp8_recipe rowwise is for precision fp8 only"):
        TrainConfig(fp8_recipe="rowwise")


# --- whole runs --------------------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "precision": "fp8",
    "kernels": "plain",
    "total_batch_size": 128,
    "mini_batch_size": 2,
    "context_length": 16,
    "steps_per_epoch": 2,
    "eval_freq": 0,
    "checkpoint_freq": 0,
    "val_tokens": 128,
}


@pytest.fixture(scope="module")
def two_ranks(lab: Any) -> Path:
    """Two epochs in FP8 in two processes; there is a checkpoint of the first."""
    done = lab.train(lab.flags(lab.root / "fp8", **RUN), nproc=2)
    assert "precision: the blocks' linear layers and the head in FP8 (delayed scaling), all else in bf16" in done.stdout
    return lab.root / "fp8" / "tiny"


@pytest.mark.slow
def test_resuming_on_two_ranks_is_bit_identical(lab: Any, two_ranks: Path, tmp_path: Path) -> None:
    resumed = lab.copy_run(two_ranks, tmp_path)
    lab.train([*lab.flags(tmp_path, **RUN), "--resume", "epoch_00001"], nproc=2)
    lab.assert_same_run(resumed, two_ranks, max_steps=4)
    lab.assert_same(lab.latest(resumed)["fp8"], lab.latest(two_ranks)["fp8"])
    assert set(lab.logged(two_ranks, "fp8_saturated").values()) == {0}


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_in_one_process(lab: Any, two_ranks: Path, tmp_path: Path, train_here: Any) -> None:
    gone_on = lab.copy_run(two_ranks, tmp_path)
    train_here([*lab.flags(tmp_path, **RUN), "--resume", "epoch_00001"])
    assert lab.logged(gone_on, "loss") == pytest.approx(lab.logged(two_ranks, "loss"), abs=5e-3)


@pytest.mark.slow
def test_a_run_in_bf16_goes_on_in_fp8_and_back(lab: Any, tmp_path: Path, train_here: Any) -> None:
    run = RUN | {"num_epochs": 3, "steps_per_epoch": 1}
    bf16 = lab.flags(tmp_path, **run | {"precision": "bf16"})
    fp8 = [*lab.flags(tmp_path, **run), "--resume", "latest"]
    train_here([*bf16, "--stop_epoch", 1])
    with pytest.raises(ValueError, match=r"train\.precision: bf16 -> fp8.*--force to go on"):
        train_here([*fp8, "--stop_epoch", 2])
    train_here([*fp8, "--stop_epoch", 2, "--force"])
    state = lab.latest(tmp_path / "tiny")
    assert state["step"] == 2 and state["fp8"]["history"].shape == (HISTORY, 16)
    train_here([*bf16, "--resume", "latest", "--force"])
    state = lab.latest(tmp_path / "tiny")
    assert state["step"] == 3 and "fp8" not in state
    assert {float(moments["step"]) for moments in state["optimizer"]["state"].values()} == {3.0}


@pytest.mark.slow
def test_a_run_is_refused_fp8_in_one_sentence(lab: Any, tmp_path: Path) -> None:
    done = lab.run("gpt2core.train", lab.flags(tmp_path, **RUN | {"kernels": "auto"}))
    assert done.returncode != 0
    assert "precision fp8: it needs an NVIDIA GPU" in done.stderr and "Traceback" not in done.stderr
