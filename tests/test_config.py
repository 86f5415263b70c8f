"""The configuration: its defaults are the user's recipe, and what does not fit together is refused with numbers that do."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from gpt2core.config import (
    MODEL_SIZES,
    RECIPES,
    DataConfig,
    EvalConfig,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    Settings,
    TrainConfig,
    differences,
    first_error,
)
from gpt2core.model import GPT


def test_the_defaults_are_the_users_recipe():
    config = RunConfig()
    users_table = {
        "total_batch_size": 524288,
        "mini_batch_size": 32,
        "max_lr": 1e-3,
        "min_lr": 1e-4,
        "warmup_steps": 715,
        "num_epochs": 5,
        "steps_per_epoch": 19073,
        "eval_freq": 250,
        "checkpoint_freq": 250,
        "keep_checkpoints": 10,
        "weight_decay": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "grad_clip": 1.0,
    }
    assert {name: getattr(config.train, name) for name in users_table} == users_table
    assert config.model.model_dump() == {
        "context_length": 1024,
        "num_layers": 12,
        "embd_size": 768,
        "num_heads": 12,
        "vocab_size": 50304,
    }
    assert config.data.data_dir == "data/edu_fineweb10B"
    assert config.data.source == "HuggingFaceFW/fineweb-edu"
    assert config.data.hub_config() == "sample-10BT"
    assert config.data.shard_size == 100_000_000
    assert RECIPES["gpt2_124m"] == config


@pytest.mark.parametrize("group", [ModelConfig, DataConfig, TrainConfig, EvalConfig, LaunchConfig, RunConfig])
def test_a_name_that_no_setting_has_is_refused(group):
    with pytest.raises(ValidationError) as caught:
        group(no_such_setting=1)
    assert first_error(caught.value) == "no_such_setting: there is no such setting"


def test_a_misspelt_name_inside_a_group_is_refused_with_its_place():
    with pytest.raises(ValidationError) as caught:
        RunConfig.model_validate({"train": {"max_lrr": 1e-3}})
    assert first_error(caught.value) == "train.max_lrr: there is no such setting"


def test_a_configuration_cannot_be_changed():
    config = RunConfig()
    with pytest.raises(ValidationError):
        config.run_name = "other"
    with pytest.raises(ValidationError):
        config.train.max_lr = 1.0
    assert config == RunConfig()


@pytest.mark.parametrize(
    ("group", "bad"),
    [
        (ModelConfig, {"num_layers": 0}),
        (ModelConfig, {"vocab_size": 50256}),
        (ModelConfig, {"embd_size": 100, "num_heads": 12}),
        (TrainConfig, {"max_lr": 0.0}),
        (TrainConfig, {"max_lr": float("nan")}),
        (TrainConfig, {"max_lr": 1e-4, "min_lr": 1e-3}),
        (TrainConfig, {"warmup_steps": -1}),
        (TrainConfig, {"steps_per_epoch": 0}),
        (TrainConfig, {"shuffle": "tokens"}),
        (TrainConfig, {"optimizer": "lion"}),
        (TrainConfig, {"lr_schedule": "linear"}),
        (TrainConfig, {"muon_lr": 0.05}),
        (TrainConfig, {"muon_momentum": 0.9, "lr_schedule": "wsd"}),
        (TrainConfig, {"muon_momentum": 1.0, "optimizer": "muon"}),
        (TrainConfig, {"decay_epochs": 0.5}),
        (TrainConfig, {"decay_epochs": 0.0, "lr_schedule": "wsd"}),
        (TrainConfig, {"decay_epochs": 6.0, "lr_schedule": "wsd"}),
        (DataConfig, {"shard_size": 10}),
        (DataConfig, {"text_column": ""}),
        (LaunchConfig, {"nproc_per_node": 0}),
        (LaunchConfig, {"nnodes": 0}),
        (LaunchConfig, {"nnodes": 2}),
        (LaunchConfig, {"rdzv_endpoint": "node0:29500"}),
        (LaunchConfig, {"rdzv_endpoint": "node0", "nnodes": 2}),
        (LaunchConfig, {"rdzv_id": "a,is_host=1", "nnodes": 2, "rdzv_endpoint": "node0:29500"}),
        (RunConfig, {"run_name": "../elsewhere"}),
        (RunConfig, {"run_name": ""}),
        (RunConfig, {"run_name": "promoted"}),
    ],
)
def test_values_out_of_bounds_are_refused(group, bad):
    with pytest.raises(ValidationError) as caught:
        group(**bad)
    sentence = first_error(caught.value)
    assert "\n" not in sentence
    assert next(iter(bad)) in sentence


def test_a_setting_that_would_do_nothing_is_refused_with_both_ways_out():
    with pytest.raises(ValidationError) as caught:
        TrainConfig(muon_lr=0.05)
    assert first_error(caught.value) == (
        "muon_lr 0.05 is for optimizer muon only: give --optimizer muon, or leave out --muon_lr"
    )


@pytest.mark.parametrize(
    ("world_size", "expected"),
    [(1, 16), (2, 8), (4, 4), (8, 2), (16, 1)],  # 524288 / (32 x 1024 x ranks)
)
def test_accumulation_steps_of_the_default_recipe(world_size, expected):
    assert RunConfig().grad_accum_steps(world_size) == expected


def run_config(total_batch_size: int, mini_batch_size: int, context_length: int) -> RunConfig:
    return RunConfig(
        model=ModelConfig(context_length=context_length),
        train=TrainConfig(total_batch_size=total_batch_size, mini_batch_size=mini_batch_size),
    )


def test_the_refusal_for_three_ranks_names_batches_that_do():
    with pytest.raises(ValueError, match=r"524288.*mini_batch_size 32 x context_length 1024 x 3 ranks") as caught:
        RunConfig().grad_accum_steps(3)
    advised = [int(number) for number in re.findall(r"\d+", str(caught.value).split("; use ")[1])]
    assert advised == [491520, 589824]  # 512 sequences never split three ways, so only other totals are offered
    for total in advised:
        assert run_config(total, 32, 1024).grad_accum_steps(3) * 32 * 3 * 1024 == total


@settings(max_examples=200, deadline=None)
@given(
    sequences=st.integers(1, 600),
    mini_batch_size=st.integers(1, 80),
    world_size=st.integers(1, 9),
    context_length=st.sampled_from([1, 7, 64]),
)
def test_every_rank_sees_its_share_or_the_numbers_advised_really_divide(
    sequences, mini_batch_size, world_size, context_length
):
    config = run_config(sequences * context_length, mini_batch_size, context_length)
    try:
        steps = config.grad_accum_steps(world_size)
    except ValueError as error:
        assert sequences % (mini_batch_size * world_size)
        advice = str(error).split("; use ")[1]
        mini_advice, _, total_advice = advice.rpartition("total_batch_size ")
        minis = [int(number) for number in re.findall(r"\d+", mini_advice)]
        totals = [int(number) for number in re.findall(r"\d+", total_advice)]
        assert bool(minis) == (sequences % world_size == 0)
        assert totals
        for mini in minis:
            run_config(sequences * context_length, mini, context_length).grad_accum_steps(world_size)
        for total in totals:
            run_config(total, mini_batch_size, context_length).grad_accum_steps(world_size)
    else:
        assert steps >= 1
        assert steps * mini_batch_size * world_size * context_length == config.train.total_batch_size


def test_a_stored_run_of_adamw_may_have_an_older_default_of_muon():
    stored = TrainConfig().model_dump() | {"muon_qkv": "whole"}
    assert TrainConfig.model_validate(stored) == TrainConfig()
    assert TrainConfig.model_validate(stored | {"optimizer": "muon"}).muon_qkv == "whole"


def test_a_total_batch_of_no_whole_sequences_is_refused_with_the_nearest_that_are():
    with pytest.raises(ValidationError) as caught:
        run_config(1000, 1, 300)
    assert first_error(caught.value) == (
        "total_batch_size 1000 tokens is not a multiple of context_length 300; nearest: 900 or 1200"
    )
    with pytest.raises(ValidationError, match=r"nearest: 300(\D|$)"):
        run_config(100, 1, 300)


def test_parameter_counts_of_gpt2s_sizes():
    assert MODEL_SIZES["124M"].num_parameters() == 124_475_904
    assert MODEL_SIZES["124M"] == RunConfig().model
    # with OpenAI's own 50,257 rows: the counts that Hugging Face's gpt2, -medium, -large and -xl report
    released = {"124M": 124_439_808, "350M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}
    for size, count in released.items():
        assert MODEL_SIZES[size].model_copy(update={"vocab_size": 50257}).num_parameters() == count


@pytest.mark.parametrize("shape", [(1, 8, 2, 16), (3, 12, 3, 5)])
def test_the_parameter_formula_counts_a_built_model(shape):
    num_layers, embd_size, num_heads, context_length = shape
    config = ModelConfig(num_layers=num_layers, embd_size=embd_size, num_heads=num_heads, context_length=context_length)
    built = sum(parameter.numel() for parameter in GPT(config).parameters())  # a tied matrix comes once
    assert config.num_parameters() == built
    run = RunConfig(model=config, train=TrainConfig(total_batch_size=context_length))
    assert run.checkpoint_bytes() == 12 * built


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_survive_json_and_split_evenly(name):
    recipe = RECIPES[name]
    again = RunConfig.model_validate_json(recipe.model_dump_json())
    assert again == recipe
    assert again.run_name == name
    assert recipe.grad_accum_steps(2) >= 1


def test_differences_names_what_may_not_change_and_nothing_else():
    saved = RunConfig()
    assert differences(saved, saved) == []
    free = saved.model_copy(
        update={
            "artifacts_dir": "elsewhere",
            "train": saved.train.model_copy(update={"mini_batch_size": 8, "eval_freq": 1, "device": "cpu"}),
            "data": saved.data.model_copy(update={"data_dir": "moved"}),
            "evaluation": saved.evaluation.model_copy(update={"val_tokens": 5}),
        }
    )
    assert differences(saved, free) == []
    bound = saved.model_copy(
        update={
            "model": saved.model.model_copy(update={"num_layers": 6}),
            "train": saved.train.model_copy(update={"max_lr": 2e-3, "seed": 1}),
        }
    )
    assert differences(saved, bound) == [
        "model.num_layers: 12 -> 6",
        "train.max_lr: 0.001 -> 0.002",
        "train.seed: 1337 -> 1",
    ]


def all_groups() -> list[type[BaseModel]]:
    return [group for group in Settings.__subclasses__() if group.__module__ == "gpt2core.config"]


def test_every_setting_explains_itself_and_what_is_free_to_change_exists():
    groups = all_groups()
    assert RunConfig in groups and TrainConfig in groups
    for group in groups:
        assert group.free_to_change <= set(group.model_fields)
        for name, field in group.model_fields.items():
            nested = isinstance(field.annotation, type) and issubclass(field.annotation, Settings)
            assert nested or field.description, f"{group.__name__}.{name}"
