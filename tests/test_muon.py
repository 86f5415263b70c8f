"""Muon: its update against mathematics and PyTorch's, who has which weights, and that runs with it are as exact as others."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gpt2core.config import LaunchConfig, ModelConfig, RunConfig, TrainConfig
from gpt2core.flags import read_config
from gpt2core.model import GPT
from gpt2core.muon import COEFFICIENTS, Muon, orthogonalize
from gpt2core.optim import Optimizer, build_optimizer, set_learning_rate
from gpt2core.preflight import claim_run

SHAPES = [(16, 16), (48, 16), (16, 64), (7, 5)]
RUN = {
    "optimizer": "muon",
    "num_layers": 3,  # of which two ranks cannot have the same number
    "total_batch_size": 128,
    "mini_batch_size": 2,
    "steps_per_epoch": 4,
    "eval_freq": 0,
    "checkpoint_freq": 0,
}


def reference_orthogonal(matrix: Tensor) -> Tensor:
    """The same polynomial, applied to singular values that LAPACK found."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    return left @ values.diag() @ right


def reference_update(
    weight: Tensor, momentum: Tensor, gradient: Tensor, *, lr: float, mu: float, decay: float
) -> tuple[Tensor, Tensor]:
    momentum = mu * momentum + (1 - mu) * gradient
    direction = reference_orthogonal((1 - mu) * gradient + mu * momentum)
    outputs, inputs = weight.shape
    return weight - lr * decay * weight - lr * max(1.0, outputs / inputs) ** 0.5 * direction, momentum


def small_model(num_layers: int = 2) -> GPT:
    model = GPT(ModelConfig(context_length=8, num_layers=num_layers, embd_size=8, num_heads=2))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def set_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


# --- the update --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (16, 64), (5, 7)])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float64, 1e-10), (torch.float32, 1e-4), (torch.bfloat16, 0.05)])
def test_the_iteration_is_the_polynomial_of_the_singular_values(
    rows: int, columns: int, dtype: torch.dtype, atol: float
) -> None:
    matrices = torch.randn(3, rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    found = orthogonalize(matrices.to(dtype))
    assert found.dtype == dtype
    for one, matrix in zip(found, matrices, strict=True):
        torch.testing.assert_close(one.double(), reference_orthogonal(matrix), atol=atol, rtol=0)


@pytest.mark.parametrize("parts", [1, 3])
def test_updates_are_those_of_an_independent_reference(parts: int) -> None:
    """Four updates, fp64 throughout; with parts each third of the rows is a matrix of its own."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(parts * outputs, inputs) for outputs, inputs in SHAPES] * 2
    weights = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    muon = Muon([{"params": weights, "parts": parts}], lr=0.1, momentum=0.9, weight_decay=0.2, dtype=torch.float64)
    expected = [list(weight.detach().clone().chunk(parts)) for weight in weights]
    momenta = [[torch.zeros_like(part) for part in one] for one in expected]
    for _ in range(4):
        for weight, parts_of_it, its_momenta in zip(weights, expected, momenta, strict=True):
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            for i, gradient in enumerate(weight.grad.chunk(parts)):
                parts_of_it[i], its_momenta[i] = reference_update(
                    parts_of_it[i], its_momenta[i], gradient, lr=0.1, mu=0.9, decay=0.2
                )
        muon.step()
    for weight, parts_of_it in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), torch.cat(parts_of_it), atol=1e-9, rtol=0)


def test_updates_are_those_of_pytorchs_muon() -> None:
    generator = torch.Generator().manual_seed(3)
    mine = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES * 3]
    before = [weight.detach().clone() for weight in mine]
    pytorchs = [nn.Parameter(weight.clone()) for weight in before]
    optimizers = [
        Muon([{"params": mine}], lr=0.02, momentum=0.95, weight_decay=0.1, dtype=torch.bfloat16),
        torch.optim.Muon(pytorchs, lr=0.02, momentum=0.95, weight_decay=0.1),
    ]
    for _ in range(5):
        for pair in zip(mine, pytorchs, strict=True):
            gradient = torch.randn(pair[0].shape, generator=generator)
            for weight in pair:
                weight.grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, start in zip(mine, pytorchs, before, strict=True):
        # sums of another order, in bf16: under a hundredth of the way that the weights went
        assert (one - other).norm() < 0.01 * (one - start).norm()


# --- who has which weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("qkv", "matrices"), [("whole", 8), ("split", 12)])
def test_each_weight_is_in_one_group_and_muon_has_the_matrices_of_the_blocks(qkv: Any, matrices: int) -> None:
    model = small_model()
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon", muon_qkv=qkv))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [names[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(names.values())
    assert optimizer.muon
    of_muon = {names[id(parameter)] for group in optimizer.muon.param_groups for parameter in group["params"]}
    kinds = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    assert of_muon == {f"transformer.h.{layer}.{kind}.weight" for layer in range(2) for kind in kinds}
    assert f"Muon on {matrices} matrices" in optimizer.describe()
    split = {names[id(p)] for group in optimizer.muon.param_groups if group["parts"] == 3 for p in group["params"]}
    assert split == ({name for name in of_muon if "c_attn" in name} if qkv == "split" else set())


def test_each_optimizer_gets_its_own_settings_and_share_of_the_schedule() -> None:
    train = TrainConfig(
        optimizer="muon", max_lr=1e-3, muon_lr=0.05, muon_momentum=0.8, muon_weight_decay=0.3, weight_decay=0.2
    )
    optimizer = build_optimizer(small_model(), train)
    set_learning_rate(optimizer, 1e-4)
    assert optimizer.muon
    for group in optimizer.muon.param_groups:
        assert group["lr"] == pytest.approx(0.005)
        assert (group["momentum"], group["weight_decay"]) == (0.8, 0.3)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.adamw.param_groups] == [(1e-4, 0.2), (1e-4, 0)]


def test_a_checkpoint_counts_one_moment_for_muons_matrices() -> None:
    shape = ModelConfig(context_length=8, num_layers=2, embd_size=8, num_heads=2)
    model = small_model()
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon"))
    set_gradients(model, 0)
    optimizer.step()
    moments = [optimizer.adamw.state.values(), optimizer.muon.state.values()]  # type: ignore[union-attr]
    tensors = [tensor for states in moments for state in states for tensor in state.values() if tensor.ndim]
    saved = [*model.parameters(), *tensors]
    run = RunConfig(model=shape, train=TrainConfig(optimizer="muon", total_batch_size=8))
    assert run.checkpoint_bytes() == sum(4 * tensor.numel() for tensor in saved)


# --- updates that are left out -------------------------------------------------------------------------------------------


def assert_same_state(optimizer: Optimizer, other: Optimizer) -> None:
    for one, its_copy in zip(optimizer.each, other.each, strict=True):
        states = one.state_dict()["state"], its_copy.state_dict()["state"]
        assert states[0].keys() == states[1].keys()
        for key, state in states[0].items():
            for name, value in state.items():
                assert torch.equal(value, states[1][key][name]), (key, name)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [False, True])
def test_a_left_out_update_leaves_weights_and_moments_alone(bad: float, first: bool) -> None:
    """Also when it is the first; the next good one is what it would have been."""
    train = TrainConfig(optimizer="muon", weight_decay=0.1, muon_weight_decay=0.1)
    model, twin = small_model(), small_model()
    optimizer, other = build_optimizer(model, train), build_optimizer(twin, train)
    if not first:
        for one, its_own in ((model, optimizer), (twin, other)):
            set_gradients(one, 1)
            its_own.step(torch.zeros(()))
    set_gradients(model, 2)
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter.grad.view(-1)[0] = bad
    optimizer.step(torch.ones(()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    for one, its_own in ((model, optimizer), (twin, other)):
        set_gradients(one, 3)
        its_own.step(torch.zeros(()))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    assert_same_state(optimizer, other)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a CPU has nothing to wait for")
def test_an_update_does_not_make_the_host_wait() -> None:
    model = small_model().cuda()
    optimizer = build_optimizer(model, TrainConfig(optimizer="muon"))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    is_bad = torch.zeros((), device="cuda")
    optimizer.step(is_bad)  # makes the moments
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step(is_bad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- what is loaded ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_moments_are_loaded_and_settings_are_the_new_ones(name: Any) -> None:
    model = small_model()
    optimizer = build_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.1, beta2=0.95))
    set_gradients(model, 1)
    optimizer.step()
    changed = build_optimizer(model, TrainConfig(optimizer=name, weight_decay=0.3, beta2=0.9))
    changed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_state(changed, optimizer)
    assert [group["weight_decay"] for group in changed.adamw.param_groups] == [0.3, 0.0]
    assert {group["betas"] for group in changed.adamw.param_groups} == {(0.9, 0.9)}


# --- whole runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_ranks(lab: Any) -> Path:
    """Two epochs with Muon in two processes; there is a checkpoint of the first."""
    lab.train(lab.flags(lab.root / "muon", **RUN), nproc=2)
    return lab.root / "muon" / "tiny"


@pytest.mark.slow
def test_resuming_on_two_ranks_is_bit_identical(lab: Any, two_ranks: Path, tmp_path: Path) -> None:
    resumed = lab.copy_run(two_ranks, tmp_path)
    done = lab.train([*lab.flags(tmp_path, **RUN), "--resume", "epoch_00001"], nproc=2)
    assert "at step 4 of 8" in done.stdout and "Muon on 18 matrices" in done.stdout
    lab.assert_same_run(resumed, two_ranks, max_steps=8)


@pytest.mark.slow
def test_one_process_resumes_bit_for_bit_and_trains_as_two_ranks_that_share_the_work(
    lab: Any, two_ranks: Path, tmp_path: Path, train_here: Any
) -> None:
    train_here(lab.flags(tmp_path / "straight", **RUN))
    straight = tmp_path / "straight" / "tiny"
    assert lab.logged(straight, "loss") == pytest.approx(lab.logged(two_ranks, "loss"), abs=1e-4)
    resumed = lab.copy_run(straight, tmp_path / "resumed")
    train_here([*lab.flags(tmp_path / "resumed", **RUN), "--resume", "epoch_00001"])
    lab.assert_same_run(resumed, straight, max_steps=8)


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_in_one_process(lab: Any, two_ranks: Path, tmp_path: Path, train_here: Any) -> None:
    gone_on = lab.copy_run(two_ranks, tmp_path)
    train_here([*lab.flags(tmp_path, **RUN), "--resume", "epoch_00001"])
    assert lab.logged(gone_on, "loss") == pytest.approx(lab.logged(two_ranks, "loss"), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("through", ["the command line", "the pipeline"])
def test_another_optimizer_is_refused_and_begins_from_zero_when_forced(
    lab: Any, two_ranks: Path, tmp_path: Path, train_here: Any, capsys: Any, through: str
) -> None:
    run = lab.copy_run(two_ranks, tmp_path)
    flags = [*lab.flags(tmp_path, **RUN | {"optimizer": "adamw"}), "--resume", "epoch_00001"]
    with pytest.raises(
        ValueError, match=r"with optimizer muon, and adamw is asked for: give --optimizer muon"
    ) as caught:
        train_here(flags)
    assert "--force" in str(caught.value)
    if through == "the command line":
        train_here([*flags, "--force"])
    else:
        begun = read_config(run / "config.json")
        forced = {"artifacts_dir": str(tmp_path), "train": begun.train.model_copy(update={"optimizer": "adamw"})}
        config = begun.model_copy(update=forced)
        with pytest.raises(ValueError, match=r"train\.optimizer: muon -> adamw"):
            claim_run(config, LaunchConfig(nproc_per_node=1))
        claim_run(config, LaunchConfig(nproc_per_node=1), force=True)
        train_here(flags)
    assert "WARNING: with another optimizer than before, as forced: muon -> adamw" in capsys.readouterr().out
    state = lab.latest(run)["optimizer"]
    assert "muon" not in state
    assert {float(moments["step"]) for moments in state["state"].values()} == {4.0}  # all began anew
