"""The optimizer: which weights decay, and the learning rate at each end of its schedule."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from gpt2core.config import ModelConfig, TrainConfig
from gpt2core.model import GPT
from gpt2core.optim import build_optimizer, learning_rate, set_learning_rate


@pytest.fixture
def model():
    model = GPT(ModelConfig(context_length=8, num_layers=2, embd_size=8, num_heads=2))
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def test_every_parameter_is_in_exactly_one_group_and_only_matrices_decay(model):
    optimizer = build_optimizer(model, TrainConfig(weight_decay=0.3))
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    grouped = [[names[id(parameter)] for parameter in group["params"]] for group in (decayed, spared)]
    assert sorted(grouped[0] + grouped[1]) == sorted(names.values())
    matrices = {name for name in names.values() if name.endswith(("wte.weight", "wpe.weight")) or ".c_" in name}
    assert set(grouped[0]) == {name for name in matrices if not name.endswith("bias")}
    assert all(name.endswith("bias") or ".ln_" in name for name in grouped[1])


def test_the_moments_and_the_rate_are_the_configurations(model):
    optimizer = build_optimizer(model, TrainConfig(max_lr=0.5, beta1=0.8, beta2=0.7))
    for group in optimizer.param_groups:
        assert group["betas"] == (0.8, 0.7)
        assert group["lr"] == 0.5
        assert group["eps"] == 1e-8
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_one_update_is_adamws(model):
    """Written out: decay first, then a step of the rate against the sign of a first gradient."""
    optimizer = build_optimizer(model, TrainConfig(max_lr=0.01, weight_decay=0.1))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, -2.0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 0.01 * 0.1 if parameter.ndim == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * kept + 0.01, atol=1e-6, rtol=0)


def test_the_schedule_of_the_default_recipe():
    train = TrainConfig()
    last = 5 * 19073
    assert learning_rate(0, last, train) == pytest.approx(1e-3 / 715)
    assert learning_rate(356, last, train) == pytest.approx(1e-3 * 357 / 715)
    assert learning_rate(714, last, train) == pytest.approx(1e-3)
    assert learning_rate(715, last, train) == pytest.approx(1e-3)
    assert learning_rate(715 + (last - 715) // 2, last, train) == pytest.approx(5.5e-4, rel=1e-3)
    quarter = learning_rate(715 + (last - 715) // 4, last, train)
    assert quarter == pytest.approx(1e-4 + 9e-4 * (1 + math.sqrt(0.5)) / 2, rel=1e-3)
    assert learning_rate(last - 1, last, train) == pytest.approx(1e-4, rel=1e-4)
    assert learning_rate(last, last, train) == 1e-4
    assert learning_rate(last + 1000, last, train) == 1e-4


def test_the_rate_rises_through_the_warmup_and_falls_ever_after():
    train = TrainConfig(warmup_steps=10)
    rates = [learning_rate(step, 100, train) for step in range(101)]
    assert all(low < high for low, high in itertools.pairwise(rates[:10]))
    assert all(high > low for high, low in itertools.pairwise(rates[10:]))
    assert max(rates) == train.max_lr
    assert min(rates[10:]) == train.min_lr


def test_no_warmup_begins_at_the_top():
    train = TrainConfig(warmup_steps=0)
    assert learning_rate(0, 100, train) == train.max_lr
    assert learning_rate(50, 100, train) == pytest.approx((train.max_lr + train.min_lr) / 2)


def test_a_run_shorter_than_its_warmup_has_a_rate_at_every_step():
    train = TrainConfig(warmup_steps=10)
    assert [learning_rate(step, 5, train) for step in range(5)] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4, 5e-4])


def test_the_stable_schedule_at_its_corners():
    train = TrainConfig(lr_schedule="wsd", warmup_steps=10, num_epochs=4, decay_epochs=1.0)
    rates = [learning_rate(step, 100, train) for step in range(101)]
    assert rates[0] == pytest.approx(1e-4) and rates[9] == 1e-3
    assert set(rates[10:76]) == {1e-3}  # the decay begins at its top
    assert all(high > low for high, low in itertools.pairwise(rates[75:]))
    assert rates[75 + 9] == pytest.approx(1e-4 + 9e-4 * (1 - math.sqrt(9 / 25)))
    assert rates[99] == pytest.approx(1e-4 + 9e-4 * (1 - math.sqrt(24 / 25)))
    assert rates[100] == learning_rate(1000, 100, train) == 1e-4


def test_a_longer_stable_schedule_has_the_same_beginning():
    short, long = (TrainConfig(lr_schedule="wsd", warmup_steps=10, num_epochs=epochs) for epochs in (4, 9))
    assert short.is_before_decay(3) and not short.is_before_decay(3.01) and long.is_before_decay(8)
    assert [learning_rate(step, 100, short) for step in range(75)] == [
        learning_rate(step, 225, long) for step in range(75)
    ]
    assert not TrainConfig(num_epochs=4).is_before_decay(0)  # every rate of a cosine depends on its length


def test_a_stable_schedule_whose_warmup_reaches_into_the_decay_goes_up_and_then_down():
    train = TrainConfig(lr_schedule="wsd", warmup_steps=10, num_epochs=1, decay_epochs=1.0)
    rates = [learning_rate(step, 20, train) for step in range(21)]
    assert rates[9] == rates[10] == max(rates) == 1e-3
    assert all(high > low for high, low in itertools.pairwise(rates[10:]))


@pytest.mark.parametrize(("decay_epochs", "steps"), [(0.5, 12), (0.3, 8), (0.01, 0), (2.0, 50)])
def test_the_decay_may_be_a_part_of_an_epoch(decay_epochs, steps):
    """To the next whole step; none is a drop at the end."""
    train = TrainConfig(lr_schedule="wsd", warmup_steps=10, num_epochs=4, decay_epochs=decay_epochs)
    stable = [step for step in range(10, 100) if learning_rate(step, 100, train) == train.max_lr]
    assert stable == list(range(10, min(100, 100 - steps + 1)))
    assert learning_rate(100, 100, train) == train.min_lr
