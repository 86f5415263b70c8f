"""The mini-batch that fits: with the same total batch and the same mathematics."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from torch import nn

from gpt2core import lock
from gpt2core.batch_size import expected_bytes, fitting_mini_batch_size
from gpt2core.config import ModelConfig, RunConfig, TrainConfig
from gpt2core.distributed import Ranks
from gpt2core.flags import TRY_AGAIN
from gpt2core.memory_limit import rule_out, too_many_sequences
from gpt2core.model import GPT
from gpt2core.run_folder import RunFolder
from gpt2core.trainer import Trainer

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: a CPU's memory does not run out so")


def config(mini_batch_size: int | str, sequences: int = 512) -> RunConfig:
    return RunConfig(train=TrainConfig(total_batch_size=1024 * sequences, mini_batch_size=mini_batch_size))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "sequences", "world_size", "sizes"),
    [
        (32, 512, 1, [32, 16, 8, 4, 2, 1]),
        (24, 24, 1, [24, 12, 6, 3]),
        ("auto", 512, 1, [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]),
        ("auto", 512, 4, [128, 64, 32, 16, 8, 4, 2, 1]),
        ("auto", 24, 2, [4, 2, 1]),
        ("auto", 9, 3, [1]),
    ],
)
def test_every_size_keeps_the_total_batch(asked: int | str, sequences: int, world_size: int, sizes: list[int]) -> None:
    run = config(asked, sequences)
    assert run.mini_batch_sizes(world_size) == sizes
    for size in sizes:
        assert run.grad_accum_steps(world_size, size) * size * world_size == sequences


def test_a_total_batch_that_no_size_divides_is_refused() -> None:
    with pytest.raises(ValueError, match="does not divide into mini_batch_size 1 x context_length 1024 x 3 ranks"):
        config("auto", 512).mini_batch_sizes(3)


def test_a_larger_model_or_batch_is_expected_to_need_more() -> None:
    small, large = ModelConfig(), ModelConfig(num_layers=24, embd_size=1024, num_heads=16)
    assert expected_bytes(small, 64) < expected_bytes(small, 128) < expected_bytes(large, 128)


def test_auto_gives_the_losses_of_the_size_it_takes(lab: Any, tmp_path: Path, train_here: Any) -> None:
    losses = []
    for name, size in (("auto", "auto"), ("eight", "8")):
        length = {"num_epochs": 1, "steps_per_epoch": 3}
        train_here(lab.flags(tmp_path, run_name=name, mini_batch_size=size, total_batch_size=16 * 32, **length))
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([line["loss"] for line in map(json.loads, lines) if "loss" in line])
        log = (tmp_path / name / "logs" / "log.txt").read_text()
        assert "512 tokens = 2 accumulation steps x 1 ranks x 8 sequences" in log
        assert ("mini_batch_size auto: as many as fit" in log) == (name == "auto")
        assert (", at most " in log) == (name == "auto"), "which the check before the start cannot know better"
    assert losses[0] == losses[1] and losses[0]


@on_gpu
def test_a_size_that_does_not_fit_is_halved_until_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(0, 1, torch.device("cuda", 0))
    _, total = torch.cuda.mem_get_info()
    model = GPT(ModelConfig(), torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(ranks.device)
    before = torch.random.get_rng_state(), torch.cuda.get_rng_state()
    torch.cuda.set_per_process_memory_fraction(12 * 2**30 / total)
    try:
        size = fitting_mini_batch_size(model, model, config(64), ranks)
        assert size in (4, 8, 16)
        assert "mini_batch_size 64 does not fit into" in capsys.readouterr().out
        torch.cuda.set_per_process_memory_fraction(2.5 * 2**30 / total)
        with pytest.raises(ValueError, match="mini_batch_size 1 does not fit into"):
            fitting_mini_batch_size(model, model, config(2), ranks)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert torch.equal(before[1], torch.cuda.get_rng_state())


def test_what_was_compiled_for_a_size_that_does_not_fit_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the sizes tried do not use up the compilations that torch.compile allows a model."""
    model, compiled = nn.Linear(2, 2), []

    def count(module: Any, inputs: Any) -> Any:
        compiled.append(None)
        return module

    def fits(
        alone: nn.Module, together: nn.Module, config: RunConfig, device: Any, size: int, accum_steps: int
    ) -> bool:
        alone(torch.ones(size, 2))
        return size == 1

    monkeypatch.setattr("gpt2core.batch_size._fits", fits)
    monkeypatch.setattr("gpt2core.batch_size._memory", lambda device: "a GPU")
    alone = torch.compile(model, backend=count, dynamic=False)
    ranks = Ranks(0, 1, torch.device("cuda", 0))
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        assert fitting_mini_batch_size(alone, alone, config(16), ranks) == 1
    assert len(compiled) == 5, "16, 8, 4, 2 and 1"


@on_gpu
def test_auto_takes_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    ranks = Ranks(0, 1, torch.device("cuda", 0))
    small = ModelConfig(context_length=256, num_layers=2, embd_size=128, num_heads=2)
    model = GPT(small, torch.bfloat16).to(ranks.device)
    run = RunConfig(model=small, train=TrainConfig(total_batch_size=256 * 64, mini_batch_size="auto"))
    assert fitting_mini_batch_size(model, model, run, ranks) == 64


def test_what_is_only_measured_is_measured_sixteen_at_once(lab: Any) -> None:
    """There the logits exist as a whole, which in training they need not."""
    assert [config(size).batch_size_without_gradients() for size in ("auto", 64, 16, 8)] == [16, 16, 16, 8]
    groups: dict[str, Any] = lab.parameters(Path("unused"), mini_batch_size=32, total_batch_size=32 * 32)
    shape = {name: groups[name] for name in ("model", "data", "train", "evaluation")}
    trainer = Trainer(RunConfig.model_validate(shape), Ranks(0, 1, torch.device("cpu")))
    sizes, forward = [], trainer.alone

    def counting(inputs: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        sizes.append(len(inputs))
        return forward(inputs, *arguments, **options)

    trainer.alone = counting  # type: ignore[assignment]
    trainer.validate(None)
    trainer.loader.close()
    assert trainer.mini_batch_size == 32 and set(sizes) == {16}


# A GPU whose memory runs out at step 2, once: torch's own error where a step has its gradients. With `signalled` what
# started the trainer is told to stop in that step.
SHORT_OF_MEMORY = """
import os, signal, sys
if "gpt2core.train" in sys.orig_argv and os.environ.get("RANK", "0") == "0":
    import torch
    calls, clip = [], torch.nn.utils.clip_grad_norm_
    def short_of_memory(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2 and not os.path.exists({marker!r}):
            open({marker!r}, "w").close()
            if {signalled}:
                os.kill(os.getppid(), signal.SIGTERM)
                signal.sigwait([signal.SIGTERM])
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return clip(*arguments, **options)
    torch.nn.utils.clip_grad_norm_ = short_of_memory
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM] if {signalled} else [])
"""


@pytest.fixture
def short_of_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    def make(signalled: bool = False) -> None:
        code = SHORT_OF_MEMORY.format(marker=str(tmp_path / "ran_out"), signalled=signalled)
        (tmp_path / "sitecustomize.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return make


@pytest.mark.slow
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_run_whose_memory_runs_out_goes_on_with_half_the_mini_batch(
    lab: Any, straight: Path, tmp_path: Path, short_of_memory: Callable[[], None], nproc: int
) -> None:
    short_of_memory()
    flags = [*lab.flags(tmp_path, mini_batch_size=4, checkpoint_freq=0), "--stop_epoch", "1"]
    done = lab.run("gpt2core.cli", ["train", "--nproc_per_node", nproc, *flags])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the GPU's memory ran out at step 1 with mini_batch_size 4" in done.stdout + done.stderr
    assert "mini_batch_size 4 ran out of memory in an earlier start: at most 2, at the same total batch" in done.stdout
    assert f"256 tokens = {4 // nproc} accumulation steps x {nproc} ranks x 2 sequences" in done.stdout
    expected = {step: loss for step, loss in lab.logged(straight, "loss").items() if step <= lab.steps_per_epoch}
    assert lab.logged(tmp_path / "tiny", "loss") == pytest.approx(expected, abs=1e-4)


@pytest.mark.slow
def test_who_is_told_to_stop_does_not_start_again(
    lab: Any, tmp_path: Path, short_of_memory: Callable[[bool], None]
) -> None:
    short_of_memory(True)
    done = lab.run("gpt2core.cli", ["train", *lab.flags(tmp_path, mini_batch_size=4)])
    assert done.returncode == TRY_AGAIN, done.stdout + done.stderr
    assert list(lab.logged(tmp_path / "tiny", "loss")) == [1]


@pytest.mark.slow
def test_another_reason_to_try_again_is_none_to_start_again(lab: Any, tmp_path: Path) -> None:
    with lock.hold(tmp_path / "tiny" / lock.LOCK_FILE):
        done = lab.run("gpt2core.cli", ["train", *lab.flags(tmp_path)])
    assert done.returncode == TRY_AGAIN and done.stdout.count("error, which may pass") == 1, done.stdout + done.stderr


@pytest.mark.slow
def test_a_checkpoint_that_was_named_is_not_exchanged_for_the_latest(
    lab: Any, straight: Path, tmp_path: Path, short_of_memory: Callable[[], None]
) -> None:
    lab.copy_run(straight, tmp_path)
    short_of_memory()
    flags = lab.flags(tmp_path, mini_batch_size=4, checkpoint_freq=0, num_epochs=3)
    done = lab.run("gpt2core.cli", ["train", *flags, "--resume", "epoch_00001", "--force"])
    assert done.returncode == TRY_AGAIN, done.stdout + done.stderr
    assert "ran out at step 13" in done.stdout and "resumed from" in done.stdout
    assert too_many_sequences(RunFolder(tmp_path, "tiny")) == 4


@pytest.mark.slow
def test_one_sequence_that_ran_out_of_memory_is_no_less_the_next_time(
    lab: Any, tmp_path: Path, short_of_memory: Callable[[], None]
) -> None:
    short_of_memory()
    flags = [*lab.flags(tmp_path, mini_batch_size=1), "--stop_epoch", "1"]
    done = lab.run("gpt2core.cli", ["train", *flags])
    assert done.returncode == TRY_AGAIN and "there is no smaller one" in done.stdout, done.stdout + done.stderr
    assert too_many_sequences(RunFolder(tmp_path, "tiny")) is None
    lab.train([*flags, "--resume", "latest"])


def test_sizes_that_cannot_be_halved_below_what_ran_out_are_refused(lab: Any, tmp_path: Path, train_here: Any) -> None:
    folder = RunFolder(tmp_path, "tiny")
    rule_out(folder, 1)
    with pytest.raises(ValueError, match=rf"at mini_batch_size 1 in an earlier start.*remove {folder.too_many_file}"):
        train_here(lab.flags(tmp_path))


RULED_OUT_ON_ONE_RANK = """
import sys
from pathlib import Path
from torch import nn
from gpt2core.batch_size import fitting_mini_batch_size
from gpt2core.config import ModelConfig, RunConfig, TrainConfig
from gpt2core.distributed import Ranks
from gpt2core.memory_limit import rule_out
from gpt2core.run_folder import RunFolder

ranks = Ranks.join("cpu")
artifacts_dir = f"{sys.argv[1]}/{ranks.rank}"
config = RunConfig(
    artifacts_dir=artifacts_dir,
    model=ModelConfig(context_length=32),
    train=TrainConfig(total_batch_size=32 * 16, mini_batch_size=8),
)
if ranks.rank == 1:
    folder = RunFolder.of(config)
    folder.path.mkdir(parents=True)
    rule_out(folder, 8)
Path(artifacts_dir, "size.txt").parent.mkdir(parents=True, exist_ok=True)
Path(artifacts_dir, "size.txt").write_text(str(fitting_mini_batch_size(nn.Module(), nn.Module(), config, ranks)))
ranks.leave()
"""


def test_what_one_machine_ruled_out_is_ruled_out_on_all(lab: Any, tmp_path: Path) -> None:
    """Each rank with a run's folder of its own, as on machines without a shared file system."""
    script = tmp_path / "fitting.py"
    script.write_text(RULED_OUT_ON_ONE_RANK)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = lab.run_command([*torchrun, str(script), str(tmp_path)], PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / str(rank) / "size.txt").read_text() for rank in range(2)] == ["4", "4"]


@pytest.mark.parametrize("content", ["", "{}", "5", '{"mini_batch_size": 0}', '{"mini_batch_size": null}'])
def test_a_file_that_does_not_say_what_ran_out_is_named(content: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path, "tiny")
    folder.path.mkdir()
    folder.too_many_file.write_text(content)
    with pytest.raises(ValueError, match=rf"^{folder.too_many_file} does not say .*: remove it$"):
        too_many_sequences(folder)
