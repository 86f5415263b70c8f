"""How far the gradients of each way to compute are from those of fp32: same weights, same batch.

    python tests/benchmarks/gradients.py --after 0 30 --data_dir DIR [--ways bf16 plain fp8 ...] [any flags of `gpt2 train`]

The first way trains, by the flags, up to each step of --after; there the gradient of the next batch is computed in all of them,
and in fp32 without TF32. A way is one of precision.py's, or `plain:fp32_sums`: cuBLAS may not add the parts of a long sum in
bf16. For each group of parameters the table has the norm of the difference over the norm of fp32's gradient and, in brackets,
how much longer the gradient is along fp32's, where an error without direction leaves no trace.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator
from typing import Any

import torch
from precision import way
from torch import Tensor

from gpt2core.config import RunConfig
from gpt2core.distributed import Ranks, pick_device
from gpt2core.flags import main_guard, run_config
from gpt2core.train_command import add_arguments
from gpt2core.trainer import Trainer

FP32_SUMS = "plain:fp32_sums"
FP32 = {"precision": "fp32", "kernels": "plain", "compile": "off"}
NO_CLIPPING = 1e9
GROUPS = ("all", "wte", "wpe", "c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight", "bias", "ln_")


def in_group(name: str, group: str) -> bool:
    """Biases and LayerNorms are groups of their own."""
    of_norm = ".ln_" in name
    if group == "ln_":
        return of_norm
    return group == "all" or (not of_norm and (name.endswith(f".{group}") or f".{group}." in name))


def trainer_of(config: RunConfig, device: torch.device, **changes: Any) -> Trainer:
    """As the flags say, but for how it computes."""
    train = (
        config.train.model_dump(exclude={"precision", "fp8_recipe", "fp8_gradients"}) | {"hellaswag_freq": 0} | changes
    )
    return Trainer(RunConfig.model_validate(config.model_dump() | {"train": train}), Ranks(0, 1, device))


def reference(config: RunConfig, device: torch.device) -> Trainer:
    """In fp32, whose mini-batch is halved three times where it can be: it takes more memory."""
    sizes = config.mini_batch_sizes(1)
    wanted = config.train.mini_batch_size
    size = wanted if wanted == "auto" else sizes[min(3, len(sizes) - 1)]
    return trainer_of(config, device, **FP32, grad_clip=NO_CLIPPING, mini_batch_size=size)


def gradients(trainer: Trainer, weights: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
    """Of the batch that is next at this place of the data."""
    trainer.raw_model.load_state_dict(weights)
    if trainer.fp8:
        trainer.fp8.weights_changed()
        trainer.fp8.load_state_dict({})  # the factors are found anew
    trainer.loader.load_state_dict(copy.deepcopy(data))
    trainer.train_step()
    named = trainer.raw_model.named_parameters()
    return {name: parameter.grad.double() for name, parameter in named if parameter.grad is not None}


def compared(ours: dict[str, Tensor], exact: dict[str, Tensor]) -> list[str]:
    """A cell for each group."""
    cells = []
    for group in GROUPS:
        names = [name for name in exact if in_group(name, group)]
        norm_2 = sum(exact[name].square().sum().item() for name in names)
        error_2 = sum((ours[name] - exact[name]).square().sum().item() for name in names)
        along = sum((ours[name] * exact[name]).sum().item() for name in names) / norm_2 - 1
        cells.append(f"{(error_2 / norm_2) ** 0.5:.2%} ({along:+.2%})")
    return cells


def rows(config: RunConfig, device: torch.device, names: list[str], after: list[int]) -> Iterator[str]:
    """A line of the table for each of the ways at each of the steps."""
    first = trainer_of(config, device, **way(names[0]).flags)
    trainers = {
        name: trainer_of(config, device, **way(name.removesuffix(":fp32_sums")).flags, grad_clip=NO_CLIPPING)
        for name in names
    }
    in_fp32 = reference(config, device)
    for stop in sorted(after):
        while first.step < stop:
            first.train_step()
            first.step += 1
        place = copy.deepcopy((first.raw_model.state_dict(), first.loader.state_dict()))
        torch.set_float32_matmul_precision("highest")
        exact = gradients(in_fp32, *place)
        torch.set_float32_matmul_precision("high")
        for name, trainer in trainers.items():
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = name != FP32_SUMS
            yield f"| {name} | {stop} | {' | '.join(compared(gradients(trainer, *place), exact))} |"
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", type=int, nargs="+", default=[0], help="steps")
    parser.add_argument("--ways", nargs="+", default=["bf16", "plain", FP32_SUMS])
    add_arguments(parser)
    arguments = parser.parse_args()
    config = run_config(arguments)
    lines = list(rows(config, pick_device(config.train.device), arguments.ways, arguments.after))
    print(f"| way | after step | {' | '.join(GROUPS)} |")
    print("|---" * (2 + len(GROUPS)) + "|")
    print("\n".join(lines))


if __name__ == "__main__":
    main_guard(main)
