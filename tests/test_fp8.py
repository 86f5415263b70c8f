"""FP8: its arithmetic against fp32 and fp64, and the factors of each recipe.

Without a GPU the products are emulated, in the same formats. The kernels are in test_triton_kernels.py, whole runs in
test_fp8_runs.py.
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
from gpt2core.fp8 import FP8, equip, refuse_fp8, why_not
from gpt2core.fp8_cast import E4M3, E5M2, cast, power_of_two, product
from gpt2core.fp8_linear import Scale
from gpt2core.fp8_scaling import HEADROOM, HISTORY, DelayedScaling
from gpt2core.model import GPT

SHAPE = ModelConfig(context_length=16, num_layers=2, embd_size=32, num_heads=2)
HERE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
on_gpu = pytest.mark.skipif(why_not(HERE, SHAPE, "delayed") is not None, reason="needs a GPU with FP8: it is tested")
DEVICES = ["cpu", pytest.param("cuda", marks=on_gpu)]
RECIPES = ["delayed", "tensorwise", "rowwise"]

# Relative error (Frobenius norm) against fp64. Rounding to nearest is off by up to 2^-4 in e4m3 (4 significant bits) and
# 2^-3 in e5m2 (3), in the root mean square by 0.42 of that; errors of the factors of a product add up as squares.
E4M3_ERROR, E5M2_ERROR = 0.42 * 2**-4, 0.42 * 2**-3
VALUE, GRADIENT = 1.25 * (2 * E4M3_ERROR**2) ** 0.5, 1.25 * (E4M3_ERROR**2 + E5M2_ERROR**2) ** 0.5
GRADIENT_WITHIN = {"e4m3": 1.15 * VALUE, "e5m2": GRADIENT}  # the first is below what e5m2 is off by on average


def random(*shape: int, device: str = "cpu") -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(device)


def settings(
    recipe: str = "delayed", precision: str = "fp8", device: str = "cpu", gradients: str = "e4m3"
) -> TrainConfig:
    of_blocks = {"fp8_recipe": recipe, "fp8_gradients": gradients} if precision == "fp8" else {}
    kernels = "plain" if device == "cpu" else "auto"
    return TrainConfig.model_validate({"precision": precision, "kernels": kernels, **of_blocks})


def ranks(device: str = "cpu") -> Ranks:
    return Ranks(0, 1, torch.device(device))


def model_in_fp8(train: TrainConfig, device: str = "cpu", shape: ModelConfig = SHAPE) -> tuple[GPT, FP8]:
    model = GPT(shape, torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    fp8 = equip(model, train, ranks(device))
    assert fp8
    return model, fp8


def text(device: str = "cpu") -> tuple[Tensor, Tensor]:
    tokens = torch.randint(0, 50257, (4, SHAPE.context_length + 1), generator=torch.Generator().manual_seed(0))
    return tokens[:, :-1].to(device), tokens[:, 1:].to(device)


def calibrated(model: GPT, fp8: FP8, device: str = "cpu") -> None:
    if not fp8.is_calibrated:
        fp8.calibrate(lambda: model(*text(device)), list(model.parameters()))


def a_step(model: GPT, fp8: FP8, times: float = 1.0) -> None:
    """Forward, backward and no change of the weights."""
    model.zero_grad()
    (times * model(*text())).backward()
    fp8.updated(torch.zeros(()))


# --- rounding and products ---------------------------------------------------------------------------------------------


def test_factors_are_the_largest_powers_of_two_that_fit() -> None:
    amax = torch.tensor([448.0, 448.1, 1.0, 3.0, 1e-6, 1e6, 0.0, torch.inf, torch.nan])
    factors = power_of_two(448.0, amax)
    assert factors[6:].tolist() == [1.0, 1.0, 1.0]
    for number, factor in zip(amax[:6].tolist(), factors[:6].tolist(), strict=True):
        assert torch.tensor(factor).frexp().mantissa == 0.5
        assert number * factor <= 448.0 < number * factor * 2


@pytest.mark.parametrize(("dtype", "significant_bits"), [(E4M3, 4), (E5M2, 3)])
def test_a_cast_rounds_to_nearest_cuts_and_transposes(dtype: torch.dtype, significant_bits: int) -> None:
    x, amax = 100 * random(21, 40), torch.zeros(1)
    largest = torch.finfo(dtype).max
    factor = torch.tensor([2 * power_of_two(largest, x.abs().amax()).item()])  # so that some is cut
    row_major, column_major, sums = cast(x, None, None, factor, amax, "itself", dtype, True, True)
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


def check_layers(recipe: str, gradients: str, device: str, x: Tensor, of_gradients: float = 1.0) -> None:
    """A block's layers, on x and on gradients of this size, are as exact as 8 bits allow, and no more: so 8 bits they are."""
    model, _ = model_in_fp8(settings(recipe, device=device, gradients=gradients), device)
    block: Any = model.transformer.h[0]
    fc, proj, qkv = block.mlp.c_fc, block.mlp.c_proj, block.attn.c_attn
    rows = x.shape[:-1]
    of_mlp = check(
        block.mlp.kernels.mlp,
        lambda x, a, b, c, d, residual: residual + F.linear(F.gelu(F.linear(x, a, b), approximate="tanh"), c, d),
        [tensor.detach() for tensor in (x, fc.weight, fc.bias, proj.weight, proj.bias, torch.zeros_like(x))],
        seed=of_gradients * random(*rows, len(proj.weight), device=device),
    )
    of_linear = check(
        qkv.kernels.linear,
        F.linear,
        [x, qkv.weight.detach(), qkv.bias.detach()],
        seed=of_gradients * random(*rows, len(qkv.weight), device=device),
    )
    for ((value, exact), *found), products in ((of_mlp, 2), (of_linear, 1)):
        error = (value - exact).norm() / exact.norm()
        assert VALUE / 3 <= error <= products**0.5 * VALUE
        for mine, theirs in found:
            assert (mine - theirs).norm() <= products**0.5 * GRADIENT_WITHIN[gradients] * theirs.norm()
    assert (of_linear[1][0] - of_linear[1][1]).norm() > GRADIENT_WITHIN[gradients] / 3 * of_linear[1][1].norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradients", ["e5m2", "e4m3"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("rows", [64, 37, 1])
def test_layers_compute_what_they_should(recipe: str, rows: int, gradients: str, device: str) -> None:
    check_layers(recipe, gradients, device, random(2, rows, 32, device=device).bfloat16())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gradients", ["e5m2", "e4m3"])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize(("size", "of_gradients"), [(1e-5, 1e5), (1.0, 1e-5)])  # of far larger x GELU's slope is a step
def test_factors_bring_numbers_of_any_size_into_the_range_of_8_bits(
    recipe: str, size: float, of_gradients: float, gradients: str, device: str
) -> None:
    check_layers(recipe, gradients, device, size * random(2, 64, 32, device=device).bfloat16(), of_gradients)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_residual_is_added(recipe: str) -> None:
    model, fp8 = model_in_fp8(settings(recipe))
    calibrated(model, fp8)
    block: Any = model.transformer.h[0]
    x, residual = random(2, 16, 32).bfloat16(), random(2, 16, 32).bfloat16()
    for layer in (block.attn.c_proj, block.mlp):
        assert torch.equal(layer(x, residual), residual + layer(x, torch.zeros_like(x)))


@pytest.mark.parametrize("device", DEVICES)
def test_rowwise_has_a_factor_for_each_row(device: str) -> None:
    """Rows of very different size, all as exact as the largest; their gradients, too."""
    model, _ = model_in_fp8(settings("rowwise", device=device), device)
    layer: Any = model.transformer.h[0].attn.c_attn  # type: ignore[union-attr]
    sizes = torch.logspace(-5, 5, 64, device=device)[:, None]
    x = (sizes * random(64, 32, device=device)).bfloat16()
    tensors = [x, layer.weight.detach(), torch.zeros_like(layer.bias)]
    (value, exact), (gradient, exact_gradient), *_ = check(
        layer.kernels.linear, F.linear, tensors, seed=sizes.flip(0) * random(64, len(layer.weight), device=device)
    )
    assert ((value - exact).norm(dim=1) <= 2 * VALUE * exact.norm(dim=1)).all()
    assert ((gradient - exact_gradient).norm(dim=1) <= 2 * GRADIENT * exact_gradient.norm(dim=1)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_numbers_that_8_bits_hold_are_multiplied_exactly(recipe: str, device: str) -> None:
    """Small integers: nothing is rounded, so each of the three products must be right to the last bit."""
    model, fp8 = model_in_fp8(settings(recipe, device=device), device)
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
@pytest.mark.parametrize("precision", ["fp8", "fp8_head"])
@pytest.mark.parametrize(("rows", "size"), [(37, 1.0), (64, 1.0), (64, 2.0**-12)])
def test_the_head_computes_what_it_should(
    rows: int, size: float, precision: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gpt2core.fused_loss.ROWS", 32)  # so that there are several turns
    model, _ = model_in_fp8(settings(precision=precision, device=device), device)
    x = size * random(rows, 32, device=device).bfloat16()
    targets = torch.randint(0, 50257, (rows,), generator=torch.Generator().manual_seed(1)).to(device)
    (value, exact), *gradients = check(
        lambda x, weight: model.kernels.mean_loss(x, weight, targets),
        lambda x, weight: F.cross_entropy(x @ weight.T, targets),
        [x, model.lm_head.weight.detach()],
        torch.ones(()),
    )
    assert (value - exact).abs() <= 1e-3 * exact
    for mine, theirs in gradients:
        assert E4M3_ERROR / 3 <= (mine - theirs).norm() / theirs.norm() <= GRADIENT


@pytest.mark.parametrize("device", DEVICES)
def test_all_tokens_logits_do_not_lose_the_same_to_the_rounding_of_the_heads_weight(device: str) -> None:
    """Tokens that have as much in common as apart, and logits as large as a trained model's."""
    model, fp8 = model_in_fp8(settings(precision="fp8_head", device=device), device)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
    fp8.weights_changed()
    x = (3 * random(1, 32, device=device) + random(64, 32, device=device)).bfloat16()
    targets = torch.randint(0, 50257, (64,), generator=torch.Generator().manual_seed(1)).to(device)
    (loss, exact_loss), _, (of_weight, exact_of_weight) = check(
        lambda x, weight: model.kernels.mean_loss(x, weight, targets),
        lambda x, weight: F.cross_entropy(x @ weight.T, targets),
        [x, model.lm_head.weight.detach()],
        torch.ones(()),
    )
    assert (loss - exact_loss).abs() < 0.1  # 0.46 if nothing is done about it
    assert (of_weight - exact_of_weight).norm() < 0.03 * exact_of_weight.norm()  # 0.066


def test_without_gradients_a_model_computes_as_it_will_be_used() -> None:
    model, _ = model_in_fp8(settings())
    plain = GPT(SHAPE, torch.bfloat16)
    plain.load_state_dict(model.state_dict())  # of the same names and shapes
    inputs, targets = text()
    with torch.no_grad():
        assert torch.equal(model(inputs), plain(inputs))
        assert torch.equal(model(inputs, targets), plain(inputs, targets))


# --- recipes -----------------------------------------------------------------------------------------------------------


def test_delayed_factors_look_back_on_the_last_updates() -> None:
    scale = Scale.new(torch.device("cpu"))
    scaling = DelayedScaling({"layer": (scale, Scale.new(torch.device("cpu")))}, E5M2, 8, ranks())
    scale.amax.fill_(1.0)
    scaling.calibrated()
    for update in range(HISTORY + 1):
        scale.amax.fill_(1000.0 if update == 0 else 1.0)
        scaling.updated(torch.zeros(()))
        assert scale.amax == 0  # counted anew
        assert scale.factor * scale.inverse == 1
        assert scale.factor == power_of_two(448 / HEADROOM, torch.tensor(1000.0 if update < HISTORY else 1.0))
    assert scaling.saturated == 1  # by the first, which no factor had foreseen


def test_a_calibration_knows_nothing_of_before_nor_of_what_is_not_finite() -> None:
    model, fp8 = model_in_fp8(settings())
    scale = fp8.layers["h.1.mlp.c_fc"].of_x
    scale.amax.fill_(1e9)  # of a trial, say
    calibrated(model, fp8)
    assert scale.factor > 1
    assert fp8.scaling
    scale.amax.fill_(torch.inf)
    fp8.scaling.calibrated()
    assert scale.factor == 1
    scale.amax.fill_(1e-6)
    fp8.scaling.updated(torch.zeros(()))
    assert scale.factor == power_of_two(448 / HEADROOM, torch.tensor(1e-6))


@pytest.mark.parametrize(("amax", "is_bad"), [(torch.inf, 0.0), (0.0, 1.0), (1e9, 1.0)])
def test_an_update_that_is_left_out_leaves_the_factors_alone(amax: float, is_bad: float) -> None:
    scale = Scale.new(torch.device("cpu"))
    scaling = DelayedScaling({"layer": (scale, Scale.new(torch.device("cpu")))}, E5M2, 8, ranks())
    scale.amax.fill_(3.0)
    scaling.calibrated()
    for _ in range(HISTORY):
        scale.amax.fill_(amax)
        scaling.updated(torch.tensor(is_bad))
    assert scale.factor == power_of_two(448 / HEADROOM, torch.tensor(3.0))
    assert scaling.saturated == 0


def test_a_model_measures_what_goes_into_its_layers_and_comes_back() -> None:
    model, fp8 = model_in_fp8(settings())
    assert not fp8.is_calibrated
    calibrated(model, fp8)
    assert all(parameter.grad is None for parameter in model.parameters())
    block: Any = model.transformer.h[1]
    seen: dict[str, Tensor] = {}
    for name, module in {"attn.c_attn": block.attn.c_attn, "attn.c_proj": block.attn.c_proj, "mlp": block.mlp}.items():
        module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(f"{name} in", args[0]))
        module.register_full_backward_hook(lambda _, __, out, name=name: seen.__setitem__(f"{name} out", out[0]))
    model(*text()).backward()
    for layer, hooked in {"attn.c_attn": "attn.c_attn", "attn.c_proj": "attn.c_proj", "mlp.c_fc": "mlp"}.items():
        assert fp8.layers[f"h.1.{layer}"].of_x.amax == seen[f"{hooked} in"].abs().max().float()
    for layer, hooked in {"attn.c_attn": "attn.c_attn", "attn.c_proj": "attn.c_proj", "mlp.c_proj": "mlp"}.items():
        assert fp8.layers[f"h.1.{layer}"].of_gradient.amax == seen[f"{hooked} out"].abs().max().float()
    assert fp8.layers["h.1.mlp.c_proj"].of_x.amax > 0 and fp8.layers["h.1.mlp.c_fc"].of_gradient.amax > 0


def test_gradients_that_grow_are_cut_and_counted_until_the_factors_have_followed() -> None:
    """Layer after layer: what one of them cut has not grown as much for the one before."""
    model, fp8 = model_in_fp8(settings())
    calibrated(model, fp8)
    a_step(model, fp8)
    assert fp8.take_saturated() == 0
    before = [layer.of_gradient.factor.item() for layer in fp8.layers.values()]
    cut = []
    for _ in range(10):
        a_step(model, fp8, times=1000.0)
        cut.append(int(fp8.take_saturated()))
    assert cut[0] > 0 and cut[-1] == 0
    for factor, layer in zip(before, fp8.layers.values(), strict=True):
        assert factor / 2048 <= layer.of_gradient.factor.item() <= factor / 512


@pytest.mark.parametrize("saved", [{"tokens_per_rank": 8}, {"layers": ["h.0"]}, {}])
def test_a_state_that_does_not_fit_is_not_taken_over(saved: dict[str, Any]) -> None:
    model, fp8 = model_in_fp8(settings())
    calibrated(model, fp8)
    state, factor = fp8.state_dict(), fp8.layers["h.0.mlp.c_fc"].of_gradient.factor.clone()
    _, other = model_in_fp8(settings())
    other.load_state_dict({} if not saved else state | saved)
    assert not other.is_calibrated
    other.load_state_dict(state)
    assert other.is_calibrated and torch.equal(other.layers["h.0.mlp.c_fc"].of_gradient.factor, factor)


def _factor_of_rank(rank: int, file: str, found: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    scale = Scale.new(torch.device("cpu"))
    scaling = DelayedScaling({"layer": (scale, scale)}, E5M2, 8, Ranks(rank, 2, torch.device("cpu")))
    factors = []
    for after in (scaling.calibrated, lambda: scaling.updated(torch.zeros(()))):
        scale.amax.fill_(1.0 + 99 * rank)
        after()
        factors.append(scale.factor.item())
    found.put(factors)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_agree_on_the_factors(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    found = context.SimpleQueue()
    processes = [context.Process(target=_factor_of_rank, args=(rank, str(tmp_path / "meet"), found)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    wanted = power_of_two(57344 / HEADROOM, torch.tensor(100.0)).item()
    assert [found.get() for _ in processes] == [[wanted, wanted]] * 2


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("place", ["input", "gradient"])
def test_what_is_not_finite_comes_out_of_a_layer_as_such(recipe: str, bad: float, place: str) -> None:
    """So that the update is left out, as in any other precision."""
    model, fp8 = model_in_fp8(settings(recipe))
    calibrated(model, fp8)
    block: Any = model.transformer.h[0]
    for called, width in ((block.attn.c_proj, 32), (block.attn.c_attn, 96), (block.mlp, 32)):
        x, gradient = random(1, 16, 32).bfloat16(), random(1, 16, width).bfloat16()
        (x if place == "input" else gradient)[0, 3, 5] = bad
        model.zero_grad()
        called(x, torch.zeros_like(gradient)).backward(gradient)
        assert not all(parameter.grad.isfinite().all() for parameter in called.parameters())
        weights = [p.grad for p in called.parameters() if p.ndim == 2]
        assert not all(weight.isfinite().all() for weight in weights)


def losses(train: TrainConfig, device: str, compiled: bool = False) -> tuple[list[float], list[float]]:
    """Of some updates of a small model; and what was measured for the factors in the last one."""
    model = GPT(SHAPE.model_copy(update={"num_layers": 1}), torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(device)
    fp8 = equip(model, train, ranks(device))
    if fp8:
        calibrated(model, fp8, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    forward = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    found, measured = [], []
    for _ in range(5):
        loss = forward(*text(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if fp8:
            measured = [
                amax.item() for layer in fp8.layers.values() for amax in (layer.of_x.amax, layer.of_gradient.amax)
            ]
            fp8.updated(torch.zeros((), device=device))
        found.append(loss.item())
    return found, measured


@pytest.fixture(scope="module")
def losses_in_bf16() -> dict[str, list[float]]:
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    return {device: losses(TrainConfig(precision="bf16"), device)[0] for device in devices}


WAYS = [*RECIPES, "fp8_head"]
COMPILED = [pytest.param(way, True, marks=pytest.mark.slow if way == "delayed" else pytest.mark.soak) for way in WAYS]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("way", "compiled"), [*((way, False) for way in WAYS), *COMPILED])
def test_a_model_learns_as_in_bf16(
    way: str, compiled: bool, device: str, losses_in_bf16: dict[str, list[float]]
) -> None:
    train = settings(precision="fp8_head", device=device) if way == "fp8_head" else settings(way, device=device)
    found, measured = losses(train, device, compiled)
    assert found == pytest.approx(losses_in_bf16[device], abs=0.01)
    assert found[-1] < found[0] - 0.1
    assert found != losses_in_bf16[device]
    if compiled and way == "delayed":
        assert measured == pytest.approx(losses(train, device)[1], rel=0.2) and min(measured) > 0


# --- refusals ----------------------------------------------------------------------------------------------------------


def test_fp8_is_refused_where_it_cannot_be_had() -> None:
    model = GPT(SHAPE, torch.bfloat16)
    wanted = r"precision fp8: it needs an NVIDIA GPU of compute capability 8\.9 .*, and this is cpu; use --precision bf16, or --kernels plain"
    with pytest.raises(ValueError, match=wanted):
        equip(model, settings(device="any other"), ranks())
    assert equip(model, TrainConfig(precision="bf16"), ranks()) is None
    odd = SHAPE.model_copy(update={"embd_size": 24})
    assert why_not(torch.device("cpu"), odd, "delayed", emulate=True) == (
        "embd_size 24 is not a multiple of 16, as FP8 products need"
    )
    with pytest.raises(ValueError, match=r"as FP8 products need; use --precision bf16$"):
        refuse_fp8(settings(device="any other"), odd, torch.device("cpu"))
    unpadded = SHAPE.model_copy(update={"vocab_size": 50257})
    assert "vocab_size 50257 is not a multiple of 16" in str(why_not(torch.device("cpu"), unpadded, "delayed"))


def test_a_gpu_before_ada_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a100 = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    wanted = r"precision fp8: it needs .* capability 8\.9 \(Ada\).*, and NVIDIA A100 has 8\.0; use --precision bf16, or"
    with pytest.raises(ValueError, match=wanted):
        refuse_fp8(settings(device="any other"), SHAPE, a100)


@on_gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_gpu_with_fp8_takes_it(recipe: str) -> None:
    assert why_not(torch.device("cuda", 0), ModelConfig(), recipe) is None


def test_a_recipe_without_fp8_is_refused() -> None:
    with pytest.raises(ValueError, match="fp8_recipe rowwise is for precision fp8 only"):
        TrainConfig(fp8_recipe="rowwise")
