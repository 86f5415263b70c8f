"""What one update costs: AdamW, Muon with AdamW, and PyTorch's Muon with AdamW; random gradients, turn by turn.

python tests/benchmarks/optimizer_step.py [--size 124M] [--device cuda]
torchrun --standalone --nproc_per_node=2 tests/benchmarks/optimizer_step.py        # the work shared by two ranks
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from gpt2core.config import MODEL_SIZES, ModelConfig, TrainConfig
from gpt2core.distributed import Ranks
from gpt2core.model import GPT
from gpt2core.optim import Optimizer, build_optimizer

TINY = ModelConfig(context_length=32, num_layers=2, embd_size=32, num_heads=2)


def pytorchs(model: GPT, train: TrainConfig) -> Optimizer:
    """The same, with torch.optim.Muon on the matrices, which cannot leave an update out."""
    optimizer = build_optimizer(model, train)
    assert optimizer.muon
    weights = [weight for group in optimizer.muon.param_groups for weight in group["params"]]
    optimizer.muon = torch.optim.Muon(weights, lr=train.muon_lr, momentum=train.muon_momentum)
    return optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M", choices=MODEL_SIZES)
    parser.add_argument("--tiny", action="store_true", help="a model that takes no time, to see that it runs")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    ranks = Ranks.join(arguments.device)
    shape = TINY if arguments.tiny else MODEL_SIZES[arguments.size]
    model = GPT(shape, torch.bfloat16)
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(ranks.device)
    set_gradients(model)
    whole, split = (TrainConfig(optimizer="muon", muon_qkv=qkv) for qkv in ("whole", "split"))
    place = ranks.rank, ranks.world_size
    contenders = {
        "AdamW": build_optimizer(model, TrainConfig(), *place),
        "Muon": build_optimizer(model, whole, *place),
        "Muon, qkv split": build_optimizer(model, split, *place),
        "PyTorch's Muon": pytorchs(model, whole),
    }
    is_bad = torch.zeros((), device=ranks.device)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(arguments.rounds + 1):  # the first makes the moments
        for name, optimizer in contenders.items():
            seconds[name].append(timed(lambda optimizer=optimizer: optimizer.step(is_bad), ranks.device))
    if ranks.is_main:
        print(f"{ranks.device.type}, {ranks.world_size} ranks, {shape.num_parameters() / 1e6:.1f}M parameters, bf16")
        for name, its_seconds in seconds.items():
            print(f"{name:16}{1000 * statistics.median(its_seconds[1:]):>10.2f} ms")
    ranks.leave()


def set_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)


def timed(do: Callable[[], None], device: torch.device) -> float:
    def now() -> float:
        if device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(device)
        return time.perf_counter()

    started = now()
    do()
    return now() - started


if __name__ == "__main__":
    main()
