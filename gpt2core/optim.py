"""The optimizers, who of them has which weights, and the schedule of the learning rate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gpt2core.config import TrainConfig
from gpt2core.model import GPT
from gpt2core.muon import Muon


class Optimizer:
    """AdamW for all weights, or Muon for the matrices inside the blocks and AdamW for the rest: one to the outside."""

    def __init__(self, adamw: torch.optim.AdamW, muon: Muon | None = None) -> None:
        self.adamw, self.muon = adamw, muon

    @property
    def each(self) -> list[torch.optim.Optimizer]:
        return [self.adamw, self.muon] if self.muon else [self.adamw]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        return [group for one in self.each for group in one.param_groups]

    def zero_grad(self) -> None:
        for one in self.each:
            one.zero_grad(set_to_none=True)

    def step(self, is_bad: Tensor | None = None) -> None:
        """One update. Where `is_bad` is above 0 weights and moments stay as they are; that is decided on the device."""
        for one in self.each:
            one.found_inf, one.grad_scale = is_bad, None  # type: ignore[attr-defined]  # as GradScaler sets them
            one.step()

    def describe(self) -> str:
        rest = sum(len(group["params"]) for group in self.adamw.param_groups)
        if self.muon is None:
            return f"optimizer: AdamW on {rest} tensors"
        matrices = sum(group["parts"] * len(group["params"]) for group in self.muon.param_groups)
        return f"optimizer: Muon on {matrices} matrices of the blocks, AdamW on the other {rest} tensors"

    def state_dict(self) -> dict[str, Any]:
        """AdamW's, with Muon's beside it under `muon`."""
        return self.adamw.state_dict() | ({"muon": self.muon.state_dict()} if self.muon else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over the moments; rates, decays and the like stay as they are configured now."""
        _load_moments(self.adamw, {name: state[name] for name in ("state", "param_groups")})
        if self.muon:
            _load_moments(self.muon, state["muon"])


def _load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    configured = [
        {name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups
    ]
    optimizer.load_state_dict(state)
    for group, values in zip(optimizer.param_groups, configured, strict=True):
        group.update(values)


def build_optimizer(model: GPT, train: TrainConfig, rank: int = 0, world_size: int = 1) -> Optimizer:
    """The optimizer that is configured. AdamW decays what has two and more dimensions, and spares biases and LayerNorms
    (GPT-3, appendix B); Muon's iteration runs in the dtype of the activations."""
    matrices: dict[str, nn.Parameter] = {}
    if train.optimizer == "muon":
        matrices = {
            name: p for name, p in model.named_parameters() if name.startswith("transformer.h.") and p.ndim == 2
        }
    rest = [p for name, p in model.named_parameters() if name not in matrices]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, lr=train.max_lr, betas=(train.beta1, train.beta2), eps=1e-8, fused=True)
    if not matrices:
        return Optimizer(adamw)
    qkv = [p for name, p in matrices.items() if name.endswith("c_attn.weight")]
    others = [p for name, p in matrices.items() if not name.endswith("c_attn.weight")]
    ratio = train.muon_lr / train.max_lr  # both follow one schedule
    muon = Muon(
        [
            {"params": qkv, "parts": 3 if train.muon_qkv == "split" else 1, "lr_ratio": ratio},
            {"params": others, "lr_ratio": ratio},
        ],
        lr=train.muon_lr,
        momentum=train.muon_momentum,
        weight_decay=train.muon_weight_decay,
        dtype=model.compute_dtype,
        rank=rank,
        world_size=world_size,
    )
    return Optimizer(adamw, muon)


def learning_rate(step: int, max_steps: int, train: TrainConfig) -> float:
    """AdamW's learning rate at the update number `step`, counted from 0: linear warmup to max_lr, then down to min_lr, which
    it keeps from `max_steps` on.

    `cosine`: at once (Loshchilov & Hutter 2017, without restarts). `wsd`: after a stable phase, in the last decay_epochs,
    by one minus a square root (Hägele et al. 2024, who found it better than a line).
    """
    if step < train.warmup_steps:
        return train.max_lr * (step + 1) / train.warmup_steps
    if step >= max_steps:
        return train.min_lr
    start = train.warmup_steps
    if train.lr_schedule == "wsd":
        start = max(start, max_steps - round(train.decay_epochs * max_steps / train.num_epochs))
    progress = max(0, step - start) / max(1, max_steps - start)
    height = 1 - math.sqrt(progress) if train.lr_schedule == "wsd" else 0.5 * (1 + math.cos(math.pi * progress))
    return train.min_lr + height * (train.max_lr - train.min_lr)


def set_learning_rate(optimizer: Optimizer, lr: float) -> None:
    """AdamW's learning rate, to which Muon's has a fixed ratio."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_ratio", 1.0)
