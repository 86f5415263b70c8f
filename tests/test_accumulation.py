"""A step's gradients over its micro-steps: how often ranks exchange them, and in how many graphs the model is compiled for
it. That the sums are right, test_train.py says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from torch import Tensor, nn

from gpt2core.accumulation import gradients, rehearse
from gpt2core.distributed import Ranks

# A step as `gpt2core.train` makes it, after a rehearsal, with counts of the exchanges, which are DDP's buckets where there are
# any, of the graphs that are compiled and of the pieces that torch.compile cuts one into.
COUNTING = """
import torch
from torch._dynamo.backends.distributed import DDPOptimizer
from torch._dynamo.utils import counters
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from gpt2core import trainer as trainer_module
from gpt2core.accumulation import rehearse
from gpt2core.distributed import Ranks
from gpt2core.flags import Parser, run_config
from gpt2core.model import GPT
from gpt2core.train_command import add_arguments
from gpt2core.trainer import Trainer

parser = Parser("counting")
add_arguments(parser)
ranks = Ranks.join("cpu")
config = run_config(parser.parse_args())
def tried(alone, together, *others):
    assert isinstance(together, DistributedDataParallel) if config.train.bucket_cap_mb else together is alone
    sums = ranks.gather(next(alone.parameters()).sum().item())
    assert len(set(sums)) == 1, "rank 0's weights are everyone's, before a mini-batch is tried"
    return fitting(alone, together, *others)
fitting, trainer_module.fitting_mini_batch_size = trainer_module.fitting_mini_batch_size, tried
init_weights = GPT.init_weights
def other_weights_than_rank_0(model, generator):
    init_weights(model, torch.Generator().manual_seed(ranks.rank))
GPT.init_weights = other_weights_than_rank_0
trainer = Trainer(config, ranks)
exchanged = []
def counting(state, bucket):
    exchanged.append(bucket.index())
    return allreduce_hook(state, bucket)
average = Ranks.average
def counting_average(ranks, tensors):
    exchanged.append(len(tensors))
    average(ranks, tensors)
Ranks.average = counting_average
if trainer.together is not trainer.alone:
    trainer.together.register_comm_hook(None, counting)
compile_in_pieces, pieces = DDPOptimizer.compile_fn, []
def counting_pieces(self, *arguments):
    compiled = compile_in_pieces(self, *arguments)
    pieces.append(len(self.buckets))
    return compiled
DDPOptimizer.compile_fn = counting_pieces
some = torch.zeros(trainer.mini_batch_size, trainer.config.model.context_length, dtype=torch.int64)
rehearse(trainer.alone, trainer.together, some, some.clone(), trainer.accum_steps)
assert not exchanged
trainer.raw_model.zero_grad()
rehearsed = counters["stats"]["unique_graphs"]
trainer.train_step()
exchanged.clear()  # in its first step DDP learns the order of the gradients, and has one bucket
trainer.train_step()
if ranks.is_main:
    print(trainer.accum_steps, "micro-steps", len(exchanged), "exchanges", len(set(exchanged)), "of them different")
    print(rehearsed, "graphs before the step", counters["stats"]["unique_graphs"], "after it", *pieces, "pieces")
trainer.loader.close()
ranks.leave()
"""


def counts(lab: Any, folder: Path, **flags: Any) -> list[int]:
    """Micro-steps, exchanges, different ones among them, graphs before and after a step, pieces of each that was cut."""
    script = folder / "counting.py"
    script.write_text(COUNTING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = lab.run_command([*command, *lab.flags(folder, **flags)], PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    return [int(word) for line in done.stdout.splitlines()[-2:] for word in line.split() if word.isdigit()]


@pytest.mark.parametrize(
    ("mini_batch_size", "bucket_cap_mb", "is_at_once"), [(4, 0, True), (1, 0, True), (2, 1, False), (1, 1000, True)]
)
def test_ranks_exchange_gradients_once_a_step(
    lab: Any, tmp_path: Path, mini_batch_size: int, bucket_cap_mb: int, is_at_once: bool
) -> None:
    flags = {"mini_batch_size": mini_batch_size, "bucket_cap_mb": bucket_cap_mb, "embd_size": 128}
    micro_steps, exchanges, different, *_ = counts(lab, tmp_path, **flags)
    assert micro_steps == 4 // mini_batch_size
    assert exchanges == different
    assert (exchanges == 1) == is_at_once


@pytest.mark.slow
def test_only_the_exchange_in_buckets_cuts_the_compiled_model(lab: Any, tmp_path: Path) -> None:
    *_, before, after, pieces = counts(lab, tmp_path, mini_batch_size=2, compile="on", bucket_cap_mb=1)
    assert before == after == 2, "a rehearsal compiles all that a step needs"
    assert pieces > 1, "of the one that is cut"


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """For ranks of which only one is here."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize(
    ("device", "on_this_machine", "out_of_reach", "are_linked"),
    [
        ("cuda", 4, [], True),
        ("cuda", 4, [3], False),
        ("cuda", 2, [], False),
        ("cpu", 4, [], True),
        ("cpu", 1, [], False),
    ],
)
def test_ranks_are_linked_on_one_machine_with_gpus_that_reach_each_other(
    monkeypatch: pytest.MonkeyPatch, device: str, on_this_machine: int, out_of_reach: list[int], are_linked: bool
) -> None:
    asked: list[int] = []

    def reaches(own: torch.device, other: int) -> bool:
        asked.append(other)
        return other not in out_of_reach

    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(on_this_machine))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", reaches)
    assert Ranks(1, 4, torch.device(device, 1)).are_linked() == are_linked
    assert asked == ([0, 2, 3] if (device, on_this_machine) == ("cuda", 4) else [])


CHOOSING = """
import torch
from gpt2core.config import TrainConfig
from gpt2core.distributed import Ranks
from gpt2core.trainer import exchanges_in_buckets

ranks = Ranks.join("cpu")
said = [str(exchanges_in_buckets(TrainConfig(bucket_cap_mb=size), ranks)) for size in (None, 0, 1)]
try:
    exchanges_in_buckets(TrainConfig(bucket_cap_mb=None if ranks.is_main else 25), ranks)
except ValueError as error:
    said.append(str(error))
taken, mean = torch.full((2, 2), ranks.rank + 1.0), torch.full((2, 2), ranks.rank + 1.0).T
ranks.take_over([taken])
ranks.average([mean, torch.zeros(3)])
said += ranks.gather(f"{taken.sum():g} {mean.sum():g}")
if ranks.is_main:
    print(", ".join(said))
ranks.leave()
"""


def test_ranks_of_one_machine_wait_for_the_end_and_are_not_told_different_things(lab: Any, tmp_path: Path) -> None:
    script = tmp_path / "choosing.py"
    script.write_text(CHOOSING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = lab.run_command([*torchrun, str(script)], PYTHONPATH=str(REPOSITORY))
    refusal = "--bucket_cap_mb is not the same on all ranks ([None, 25]): give one on all machines"
    assert done.stdout == f"False, False, True, {refusal}, 4 6, 4 6\n", done.stderr


def test_a_gradient_that_is_missing_is_an_error_before_ranks_add_up_others() -> None:
    layer = nn.Linear(2, 2)
    layer(torch.ones(2)).sum().backward()
    layer.bias.grad = None
    with pytest.raises(AssertionError):
        gradients(layer)


class Named(nn.Module):
    """A model that writes down when it is called."""

    def __init__(self, name: str, layer: nn.Linear, called: list[str]) -> None:
        super().__init__()
        self.name, self.layer, self.called = name, layer, called

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        self.called.append(self.name)
        return F.mse_loss(self.layer(inputs), targets)


@pytest.mark.parametrize(
    ("accum_steps", "kinds"),
    [(1, "together"), (2, "alone together"), (3, "alone alone together"), (8, "alone alone together")],
)
def test_a_rehearsal_takes_each_kind_of_micro_step_that_the_step_has(accum_steps: int, kinds: str) -> None:
    layer, called = nn.Linear(3, 3), list[str]()
    alone, together = Named("alone", layer, called), Named("together", layer, called)
    rehearse(alone, together, torch.ones(2, 3), torch.zeros(2, 3), accum_steps)
    assert " ".join(called) == kinds
    assert layer.weight.grad is not None and layer.weight.grad.any()
