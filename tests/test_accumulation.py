"""A step's gradients over its micro-steps: how often ranks exchange them, and in how many graphs the model is compiled for
it. That the sums are right, test_train.py says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

# What `gpt2core.train` does, but for a count of the buckets that DDP hands over to be exchanged.
COUNTING = """
import sys
from torch._dynamo.utils import counters
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from gpt2core.distributed import Ranks
from gpt2core.flags import Parser, run_config
from gpt2core.train_command import add_arguments
from gpt2core.trainer import Trainer

parser = Parser("counting")
add_arguments(parser)
ranks = Ranks.join("cpu")
trainer = Trainer(run_config(parser.parse_args()), ranks)
exchanged = []
def counting(state, bucket):
    exchanged.append(bucket.index())
    return allreduce_hook(state, bucket)
trainer.together.register_comm_hook(None, counting)
trainer.train_step()
if ranks.is_main:
    print(trainer.accum_steps, "micro-steps", len(exchanged), "buckets", len(set(exchanged)), "of them different")
    print(counters["stats"]["unique_graphs"], "models compiled")
trainer.loader.close()
ranks.leave()
"""


def counts(lab: Any, folder: Path, **flags: Any) -> list[int]:
    """Micro-steps, buckets, different ones among them, compiled models."""
    script = folder / "counting.py"
    script.write_text(COUNTING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = lab.run_command([*command, *lab.flags(folder, **flags)], PYTHONPATH=str(REPOSITORY))
    assert done.returncode == 0, done.stderr
    return [int(word) for line in done.stdout.splitlines()[-2:] for word in line.split() if word.isdigit()]


@pytest.mark.parametrize("mini_batch_size", [4, 2, 1])
def test_ranks_exchange_gradients_once_a_step(lab: Any, tmp_path: Path, mini_batch_size: int) -> None:
    micro_steps, buckets, different, _ = counts(lab, tmp_path, mini_batch_size=mini_batch_size)
    assert micro_steps == 4 // mini_batch_size
    assert buckets == different > 0


@pytest.mark.slow
def test_only_the_exchange_cuts_the_compiled_model_at_its_buckets(lab: Any, tmp_path: Path) -> None:
    *_, alone_and_in_buckets = counts(lab, tmp_path, mini_batch_size=2, compile="on")
    assert alone_and_in_buckets == 2
