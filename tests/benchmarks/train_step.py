"""Our training step beside those of peers: same device, same batch, turn by turn in one process, a table last.

    python tests/benchmarks/train_step.py [--mini_batch_size 64] [--nanogpt PATH/TO/nanoGPT]
    python tests/benchmarks/train_step.py --precision fp8 fp8:tensorwise fp8_head --without plain transformers
    python tests/benchmarks/train_step.py --tiny --device cpu            seconds, to see that it runs

`ours` is the trainer as a run has it: shards from disk, clipping, the schedule, the logs, TensorBoard; with --precision also
in other ones, with --fp8_recipe and --fp8_gradients behind colons. --profile lists the kernels of a step of each of these.
The others do what their own scripts do in a step (forward and backward under autocast in bf16, accumulation, clipping, fused
AdamW) on tokens that lie on the device already. `plain` is a GPT-2 as the textbooks write it, compiled. nanoGPT is taken from a checkout.
MFU counts the model's FLOPs as PaLM does (Chowdhery et al. 2022, appendix B).
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from trainings import precision_flags

from gpt2core.board import Board
from gpt2core.config import DataConfig, EvalConfig, ModelConfig, RunConfig, TrainConfig
from gpt2core.distributed import Ranks, pick_device, use_compile
from gpt2core.metrics import MetricsLog
from gpt2core.mfu import peak_flops
from gpt2core.run_folder import RunFolder
from gpt2core.shards import shard_name
from gpt2core.trainer import Trainer

TINY = ModelConfig(context_length=32, num_layers=2, embd_size=32, num_heads=2)


@dataclass
class Contender:
    name: str
    step: Callable[[], float]  # makes one step, returns its loss
    seconds: list[float] = field(default_factory=list)
    own_bytes: int = 0  # of weights, gradients and moments, which stay while others have their turn
    peak_bytes: int = 0
    loss: float = 0.0

    def measure(self, device: torch.device, steps: int) -> None:
        for _ in range(2):  # so that what the one before left does not count, and ours has a step under way
            self.step()
        before = reset_peak(device)
        for _ in range(steps):
            started = time.perf_counter()
            self.loss = self.step()  # reading a loss waits for the device
            self.seconds.append(time.perf_counter() - started)
        if device.type == "cuda":
            self.peak_bytes = torch.cuda.max_memory_allocated(device) - before + self.own_bytes


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.embd_size
        self.heads = config.num_heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.qkv(self.norms[0](x)).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.embd_size)
        self.positions = nn.Parameter(0.02 * torch.randn(config.context_length, config.embd_size))
        self.blocks = nn.Sequential(*(PlainBlock(config) for _ in range(config.num_layers)))
        self.norm = nn.LayerNorm(config.embd_size)
        nn.init.normal_(self.tokens.weight, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.norm(self.blocks(self.tokens(inputs) + self.positions))
        return F.cross_entropy(F.linear(x, self.tokens.weight).flatten(0, 1), targets.flatten())


class Peers:
    """Makes the other contenders, all with the same step around their models."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        shape = (config.train.mini_batch_size, config.model.context_length + 1)
        self.rows = torch.randint(0, 50257, shape, generator=torch.Generator().manual_seed(0)).to(device)

    def contender(
        self, name: str, model: nn.Module, loss_of: Callable[[nn.Module, Tensor, Tensor], Tensor]
    ) -> Contender:
        train, device = self.config.train, self.device
        model.to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        called = torch.compile(model) if use_compile(train, device) else model
        accum_steps = self.config.grad_accum_steps(1)
        inputs, targets = self.rows[:, :-1].contiguous(), self.rows[:, 1:].contiguous()

        def step() -> float:
            total = torch.zeros((), device=device)
            for _ in range(accum_steps):
                with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                    loss = loss_of(called, inputs, targets) / accum_steps
                loss.backward()
                total += loss.detach()
            nn.utils.clip_grad_norm_(model.parameters(), train.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return total.item()

        return Contender(name, step)

    def plain(self) -> Contender:
        return self.contender("plain", PlainGPT(self.config.model), lambda model, x, y: model(x, y))

    def transformers(self) -> Contender:
        from transformers import GPT2Config, GPT2LMHeadModel

        model = self.config.model
        shape = GPT2Config(
            vocab_size=model.vocab_size,
            n_positions=model.context_length,
            n_embd=model.embd_size,
            n_layer=model.num_layers,
            n_head=model.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
        )

        def loss_of(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten())

        return self.contender("transformers", GPT2LMHeadModel(shape), loss_of)

    def nanogpt(self, checkout: Path) -> Contender:
        spec = importlib.util.spec_from_file_location("nanogpt_model", checkout / "model.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = self.config.model
        shape: dict[str, Any] = {
            "block_size": model.context_length,
            "vocab_size": model.vocab_size,
            "n_layer": model.num_layers,
            "n_head": model.num_heads,
            "n_embd": model.embd_size,
            "dropout": 0.0,
            "bias": True,
        }
        return self.contender("nanoGPT", module.GPT(module.GPTConfig(**shape)), lambda model, x, y: model(x, y)[1])


def ours(config: RunConfig, ranks: Ranks, precision: str | None = None) -> Contender:
    """A whole run's step: data, schedule, update, logs; of all ranks together."""
    if precision:
        train = config.train.model_dump() | precision_flags(precision)
        config = config.model_copy(update={"train": TrainConfig.model_validate(train)})
    trainer = Trainer(config, ranks)
    log = None
    if ranks.is_main:
        print(f"our kernels: {trainer.fp8.describe() if trainer.fp8 else trainer.kernels.note}")
        folder = RunFolder.of(config)
        log = MetricsLog(folder, resume_at=None, board=Board(folder.tensorboard, config, 0))
        log.say = log.note  # type: ignore[method-assign]  # not on the terminal

    def step() -> float:
        result = trainer.train_step()
        trainer.step += 1
        trainer.step_log.add(trainer.step, result, log)  # which waits for the step before, as in a run
        return trainer.step_log.train_loss or 0.0

    return Contender(precision or "ours", step)


def write_shards(folder: Path, tokens: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(2):
        np.save(folder / shard_name(number), rng.integers(0, 50257, tokens, dtype=np.uint16))


def configuration(folder: Path, device: torch.device, is_tiny: bool, mini_batch_size: int) -> RunConfig:
    """Of a run in this folder, on random tokens that are written there."""
    model = TINY if is_tiny else ModelConfig()
    write_shards(folder, 2_000 if is_tiny else 20_000_000)
    return RunConfig(
        run_name="benchmark",
        artifacts_dir=str(folder),
        model=model,
        data=DataConfig(data_dir=str(folder)),
        train=TrainConfig(
            total_batch_size=16 * model.context_length if is_tiny else 524_288,
            mini_batch_size=2 if is_tiny else mini_batch_size,
            hellaswag_freq=0,
            kernels="plain" if device.type == "cpu" else "auto",
        ),
        evaluation=EvalConfig(val_tokens=model.context_length),
    )


def measure(contenders: list[Contender], device: torch.device, rounds: int, steps: int) -> None:
    """Turn by turn, so that a device that slows down with heat does so for all."""
    for _ in range(rounds):
        for contender in contenders:
            contender.measure(device, steps)


# What a kernel's name begins with or holds, and what it is counted as; the first that fits.
GROUPS = {
    "fp8_cast": ("_cast_kernel",),
    "loss": ("_loss_kernel", "cross_entropy"),
    "attention": ("cudnn", "flash", "fmha", "sdpa"),
    "matrix products": ("nvjet", "gemm", "cutlass", "cublas", "splitK"),
    "LayerNorm and what is fused with it": ("triton_per", "triton_red"),
    "copies": ("Memcpy", "Memset"),
}


def profile(contender: Contender, device: torch.device) -> None:
    """Kernel time of one step, by group and for the longest kernels."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the step before may be under way
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU, activity.CUDA]) as profiler:
        contender.step()
    kind = torch.autograd.DeviceType.CUDA if device.type == "cuda" else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    ms = {
        event.key: (event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total) / 1000
        for event in events
    }
    by_group: dict[str, float] = {}
    for name, time_ms in ms.items():
        group = next((group for group, marks in GROUPS.items() if any(mark in name for mark in marks)), "all else")
        by_group[group] = by_group.get(group, 0.0) + time_ms
    print(f"\n{contender.name}: {sum(ms.values()):.1f} ms of kernels in a step")
    for name, time_ms in sorted(by_group.items(), key=lambda item: -item[1]):
        print(f"{time_ms:9.1f} ms  {name}")
    for event in sorted(events, key=lambda event: -ms[event.key])[:25]:
        print(f"    {ms[event.key]:9.1f} ms {event.count:6} x {event.key[:100]}")


def reset_peak(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def built(make: Callable[[], Contender], device: torch.device) -> Contender:
    """A contender after its first step, which compiles and makes the moments, with what it keeps on the device."""
    before = reset_peak(device)
    contender = make()
    contender.loss = contender.step()
    contender.own_bytes = reset_peak(device) - before
    return contender


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--mini_batch_size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7, help="measured a round")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT to measure as well")
    parser.add_argument("--without", nargs="*", default=[], choices=["transformers", "plain"])
    parser.add_argument("--precision", nargs="*", default=[], help="others to measure ours in")
    parser.add_argument("--profile", action="store_true", help="of ours, after the measurement")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and batch, to see that it runs")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    torch.set_float32_matmul_precision("high")
    with tempfile.TemporaryDirectory() as folder:
        config = configuration(Path(folder), device, arguments.tiny, arguments.mini_batch_size)
        peers = Peers(config, device)
        makers: list[Callable[[], Contender]] = [
            partial(ours, config, Ranks(0, 1, device), precision) for precision in (None, *arguments.precision)
        ]
        makers += [getattr(peers, name) for name in ("plain", "transformers") if name not in arguments.without]
        if arguments.nanogpt:
            makers.append(lambda: peers.nanogpt(arguments.nanogpt))
        contenders = [built(make, device) for make in makers]
        measure(contenders, device, arguments.rounds, arguments.steps)
        if arguments.profile:
            for contender in contenders[: 1 + len(arguments.precision)]:
                profile(contender, device)
    show(contenders, config, device)


def show(contenders: list[Contender], config: RunConfig, device: torch.device) -> None:
    peak = peak_flops(device)
    tokens = config.train.total_batch_size
    rate = {contender.name: tokens / statistics.median(contender.seconds) for contender in contenders}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    print(f"\n{name}, torch {torch.__version__}; median of {len(contenders[0].seconds)} steps of {tokens:,} tokens")
    print(f"{'':14}{'tokens/s':>10}{'ms':>9}{'MFU':>7}{'peak GiB':>10}{'ours is':>9}{'loss':>8}")
    for one in contenders:
        mfu = f"{rate[one.name] * config.model.flops_per_token() / peak:.1%}" if peak else "-"
        print(
            f"{one.name:14}{rate[one.name]:>10,.0f}{1000 * statistics.median(one.seconds):>9.1f}{mfu:>7}"
            f"{one.peak_bytes / 2**30:>10.2f}{rate['ours'] / rate[one.name]:>8.2f}x{one.loss:>8.3f}"
        )


if __name__ == "__main__":
    main()
