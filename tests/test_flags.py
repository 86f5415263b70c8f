"""Flags: what they start from, what they override, and how a wrong one is answered."""

from __future__ import annotations

import argparse
import errno

import pytest
from pydantic import ValidationError

from gpt2core.config import (
    MODEL_SIZES,
    RECIPES,
    DataConfig,
    EvalConfig,
    LaunchConfig,
    ModelConfig,
    RunConfig,
    TrainConfig,
    first_error,
)
from gpt2core.flags import (
    TRY_AGAIN,
    Parser,
    add_recipe,
    add_settings,
    as_flags,
    exit_code,
    main_guard,
    read_config,
    run_config,
    settings_of,
)


def parser() -> Parser:
    made = Parser(prog="trainer")
    add_recipe(made)
    add_settings(made, RunConfig)
    return made


def parse(*words: str) -> RunConfig:
    return run_config(parser().parse_args(list(words)))


def test_no_flag_gives_the_default_recipe():
    assert parse() == RunConfig()


def test_the_users_own_command_line_is_understood():
    config = parse(
        *[
            "--total_batch_size",
            "262144",
            "--mini_batch_size",
            "16",
            "--context_length",
            "512",
            "--num_layers",
            "6",
            "--embd_size",
            "384",
        ],
        *[
            "--num_heads",
            "6",
            "--max_lr",
            "6e-4",
            "--min_lr",
            "6e-5",
            "--warmup_steps",
            "10",
            "--num_epochs",
            "3",
            "--steps_per_epoch",
            "100",
        ],
        *[
            "--eval_freq",
            "50",
            "--checkpoint_freq",
            "25",
            "--keep_checkpoints",
            "4",
            "--use_tensorboard",
            "--run_name",
            "mine",
        ],
    )
    assert config == RunConfig(
        run_name="mine",
        model=ModelConfig(context_length=512, num_layers=6, embd_size=384, num_heads=6),
        train=TrainConfig(
            total_batch_size=262144,
            mini_batch_size=16,
            max_lr=6e-4,
            min_lr=6e-5,
            warmup_steps=10,
            num_epochs=3,
            steps_per_epoch=100,
            eval_freq=50,
            checkpoint_freq=25,
            keep_checkpoints=4,
        ),
    )


def test_flags_override_the_recipe_and_leave_the_rest_of_it():
    config = parse("--recipe", "demo", "--max_lr", "0.005", "--data_dir", "elsewhere", "--val_tokens", "128")
    demo = RECIPES["demo"]
    assert config.train == demo.train.model_copy(update={"max_lr": 0.005})
    assert config.data == demo.data.model_copy(update={"data_dir": "elsewhere"})
    assert config.evaluation == demo.evaluation.model_copy(update={"val_tokens": 128})
    assert config.model == demo.model


def test_a_flag_set_back_to_its_default_overrides_the_recipe_too():
    assert RECIPES["demo"].train.mini_batch_size != 32
    assert parse("--recipe", "demo", "--mini_batch_size", "32").train.mini_batch_size == 32


def test_steps_per_epoch_takes_a_number_or_auto():
    assert parse("--steps_per_epoch", "auto").train.steps_per_epoch == "auto"
    assert parse("--steps_per_epoch", "12").train.steps_per_epoch == 12


def test_use_tensorboard_is_on_and_off_by_flag():
    assert parse().train.use_tensorboard is True
    assert parse("--use_tensorboard").train.use_tensorboard is True
    assert parse("--no-use_tensorboard").train.use_tensorboard is False


@pytest.mark.parametrize("size", sorted(MODEL_SIZES))
def test_model_size_sets_the_shape_and_a_single_flag_still_wins(size):
    shape = MODEL_SIZES[size]
    config = parse("--model_size", size, "--recipe", "demo")
    assert config.model == RECIPES["demo"].model.model_copy(
        update={"num_layers": shape.num_layers, "embd_size": shape.embd_size, "num_heads": shape.num_heads}
    )
    assert parse("--model_size", size, "--num_layers", "2").model.num_layers == 2


def test_model_size_350m_is_gpt2_medium():
    model = parse("--model_size", "350M").model
    assert (model.num_layers, model.embd_size, model.num_heads) == (24, 1024, 16)


def test_a_config_file_is_a_starting_point(tmp_path):
    saved = RECIPES["demo"].model_copy(update={"run_name": "from-file"})
    path = tmp_path / "config.json"
    path.write_text(saved.model_dump_json())
    assert parse("--config", str(path)) == saved
    changed = parse("--config", str(path), "--seed", "7")
    assert changed.train.seed == 7
    assert changed.run_name == "from-file"


def test_a_config_file_that_is_none_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"missing\.json: there is no such configuration file"):
        read_config(tmp_path / "missing.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"train": {"max_lr": "fast"}}')
    with pytest.raises(ValueError, match=r"broken\.json: train\.max_lr: .*'fast'"):
        read_config(broken)
    broken.write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json"):
        read_config(broken)


@pytest.mark.parametrize(
    ("words", "suggestion"),
    [
        (["--max_lrr", "1e-3"], "--max_lr"),
        (["--batch_size_total=8"], None),
        (["--mini_batchsize=8"], "--mini_batch_size"),
        (["--no-use_tensorbord"], "--no-use_tensorboard"),
    ],
)
def test_an_unknown_flag_ends_with_2_and_names_the_one_it_resembles(words, suggestion, capsys):
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert words[0].split("=")[0] in error
    assert error.count("\n") == 1
    if suggestion:
        assert f"did you mean {suggestion}?" in error


def test_no_abbreviation_is_taken_for_a_flag(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--max", "1e-3")
    assert caught.value.code == 2


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_as_flags_say_a_whole_recipe(name):
    recipe = RECIPES[name]
    words = ["--run_name", recipe.run_name, "--artifacts_dir", recipe.artifacts_dir]
    for group in (recipe.model, recipe.data, recipe.train, recipe.evaluation):
        words += as_flags(group)
    assert parse(*words) == recipe


@pytest.mark.parametrize(
    "settings",
    [
        TrainConfig(max_lr=3.0000000000000004e-4, min_lr=1e-300, use_tensorboard=False, steps_per_epoch="auto"),
        DataConfig(source="s3://bucket/with space/*.parquet", source_config="sample-10BT", num_workers=3),
        DataConfig(text_column='it\'s "quoted"'),
        DataConfig(text_column="-dashed", data_dir="--odd"),
        EvalConfig(val_tokens=1, hellaswag="a b.jsonl"),
        ModelConfig(num_layers=2, embd_size=64, num_heads=4),
        LaunchConfig(nproc_per_node=4),
    ],
)
def test_as_flags_through_a_parser_give_the_same_settings(settings):
    group = type(settings)
    made = Parser(prog="trainer")
    add_settings(made, group)
    assert group(**vars(made.parse_args(as_flags(settings)))) == settings


def test_only_the_flags_asked_for_are_added():
    made = Parser(prog="trainer")
    add_settings(made, RunConfig, only={"data_dir", "val_tokens"})
    assert vars(made.parse_args(["--data_dir", "d", "--val_tokens", "5"])) == {"data_dir": "d", "val_tokens": "5"}
    with pytest.raises(SystemExit):
        made.parse_args(["--max_lr", "1"])


def test_a_group_of_settings_takes_its_own_flags_only():
    assert settings_of(LaunchConfig, argparse.Namespace(nproc_per_node="4", max_lr="1")) == LaunchConfig(
        nproc_per_node=4
    )
    assert settings_of(LaunchConfig, argparse.Namespace()) == LaunchConfig(nproc_per_node="auto")


def test_help_shows_every_flag_with_its_default():
    shown = " ".join(parser().format_help().split())
    for group in (ModelConfig, DataConfig, TrainConfig, EvalConfig):
        for name, field in group.model_fields.items():
            assert f"--{name}" in shown
            assert f"[{field.default}]" in shown


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num_layers", "many"], "model.num_layers: Input should be a valid integer"),
        (["--max_lr", "-1"], "train.max_lr: Input should be greater than 0"),
        (["--steps_per_epoch", "0"], "train.steps_per_epoch: Input should be greater than or equal to 1"),
        (["--num_heads", "7"], "model: embd_size 768 is not a multiple of num_heads 7"),
        (["--context_length", "1000"], "total_batch_size 524288 tokens is not a multiple of context_length 1000"),
        (["--shuffle", "all"], "train.shuffle: Input should be 'sequences', 'shards' or 'none', got 'all'"),
    ],
)
def test_a_wrong_value_gives_one_sentence_that_names_the_setting(words, sentence):
    with pytest.raises(ValidationError) as caught:
        parse(*words)
    said = first_error(caught.value)
    assert said.startswith(sentence)
    assert "\n" not in said
    if ", got " in said:
        assert repr(words[1]) in said


@pytest.mark.parametrize("error", [ValueError("sentence"), FileNotFoundError("sentence"), PermissionError("sentence")])
def test_main_guard_ends_what_the_user_can_put_right_with_1_and_a_sentence(error, capsys):
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        main_guard(main)
    assert caught.value.code == 1
    assert capsys.readouterr().err.endswith(": error: sentence\n")


def test_main_guard_says_a_wrong_setting_and_passes_exit_codes_on(capsys):
    with pytest.raises(SystemExit) as caught:
        main_guard(lambda: parse("--num_epochs", "0") and None)
    assert caught.value.code == 1
    assert "train.num_epochs" in capsys.readouterr().err
    for returned, code in ((None, 0), (0, 0), (3, 3)):
        with pytest.raises(SystemExit) as ended:
            main_guard(lambda returned=returned: returned)
        assert ended.value.code == code


def test_main_guard_lets_our_own_mistakes_show():
    def main() -> None:
        raise AssertionError("ours")

    with pytest.raises(AssertionError):
        main_guard(main)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ESTALE, "Stale file handle"), TRY_AGAIN),
        (OSError(errno.EIO, "Input/output error"), TRY_AGAIN),
        (TimeoutError("read timed out"), TRY_AGAIN),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (FileNotFoundError(errno.ENOENT, "No such file"), 1),
        (ValueError("wrong"), 1),
    ],
)
def test_what_storage_may_recover_from_is_tried_again(error: Exception, code: int):
    assert exit_code(error) == code
