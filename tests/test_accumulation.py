"""A step's gradients over its micro-steps: how often ranks exchange them. That the sums are right, test_train.py says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY

# What `gpt2core.train` does, but for a count of the buckets that DDP hands over to be exchanged.
COUNTING = """
import sys
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
trainer.loader.close()
ranks.leave()
"""


@pytest.mark.parametrize("mini_batch_size", [4, 2, 1])
def test_ranks_exchange_gradients_once_a_step(lab: Any, tmp_path: Path, mini_batch_size: int) -> None:
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    done = lab.run_command(
        [*command, *lab.flags(tmp_path, mini_batch_size=mini_batch_size)], PYTHONPATH=str(REPOSITORY)
    )
    assert done.returncode == 0, done.stderr
    micro_steps, _, buckets, _, different, *_ = done.stdout.splitlines()[-1].split()
    assert int(micro_steps) == 4 // mini_batch_size
    assert int(buckets) == int(different) > 0
