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
from typing import Any

import torch
from precision import contender
from torch import Tensor, nn

from gpt2core.config import RunConfig
from gpt2core.distributed import Ranks, pick_device
from gpt2core.flags import run_config
from gpt2core.train_command import add_arguments
from gpt2core.trainer import Trainer

FP32_SUMS = "plain:fp32_sums"
FP32 = {"precision": "fp32", "kernels": "plain", "compile": "off"}
FP32_IS_LARGER = 8  # at most, in memory: the mini-batch is cut by as much
NO_CLIPPING = 1e9
GROUPS = ("all", "wte", "wpe", "c_attn.weight", "attn.c_proj.weight", "c_fc.weight", "mlp.c_proj.weight", "bias", "ln_")


def in_group(name: str, group: str) -> bool:
    """Biases and LayerNorms are groups of their own."""
    of_norm = ".ln_" in name
    if group == "ln_":
        return of_norm
    return group == "all" or (not of_norm and (name.endswith(f".{group}") or f".{group}." in name))


def trainer_of(config: RunConfig, device: torch.device, **changes: Any) -> Trainer:
    train = config.train.model_copy(update={"hellaswag_freq": 0, **changes})
    return Trainer(RunConfig.model_validate(config.model_dump() | {"train": train.model_dump()}), Ranks(0, 1, device))


def gradients(trainer: Trainer, weights: dict[str, Tensor], data: dict[str, Any]) -> dict[str, Tensor]:
    """Of the batch that is next at this place of the data."""
    trainer.raw_model.load_state_dict(weights)
    if trainer.fp8:
        trainer.fp8.weights_changed()
        trainer.fp8.load_state_dict({})  # the factors are found anew
    trainer.loader.load_state_dict(copy.deepcopy(data))
    trainer.train_step()
    return {name: parameter.grad.double() for name, parameter in named(trainer) if parameter.grad is not None}


def named(trainer: Trainer) -> list[tuple[str, nn.Parameter]]:
    return list(trainer.raw_model.named_parameters())


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--after", type=int, nargs="+", default=[0], help="steps")
    parser.add_argument("--ways", nargs="+", default=["bf16", "plain", FP32_SUMS])
    add_arguments(parser)
    arguments = parser.parse_args()
    config = run_config(arguments)
    device = pick_device(config.train.device)
    size = int(config.train.mini_batch_size)
    first = trainer_of(config, device, **contender(arguments.ways[0]).flags)
    ways = {
        way: trainer_of(config, device, **contender(way.removesuffix(":fp32_sums")).flags, grad_clip=NO_CLIPPING)
        for way in arguments.ways
    }
    reference = trainer_of(
        config, device, **FP32, grad_clip=NO_CLIPPING, mini_batch_size=max(1, size // FP32_IS_LARGER)
    )
    lines = []
    for stop in sorted(arguments.after):
        while first.step < stop:
            first.train_step()
            first.step += 1
        weights = {name: value.clone() for name, value in first.raw_model.state_dict().items()}
        place = weights, first.loader.state_dict()
        torch.set_float32_matmul_precision("highest")
        exact = gradients(reference, *place)
        torch.set_float32_matmul_precision("high")
        for way, trainer in ways.items():
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = way != FP32_SUMS
            cells = compared(gradients(trainer, *place), exact)
            lines.append(f"| {way} | {stop} | {' | '.join(cells)} |")
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    print(f"| way | after step | {' | '.join(GROUPS)} |")
    print("|---" * (2 + len(GROUPS)) + "|")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
