"""AdamW with decay on matrices only, and linear warmup followed by a cosine."""

from __future__ import annotations

import math

import torch
from torch import nn

from gpt2core.config import TrainConfig


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), fused into one kernel: weight decay on tensors of two and more dimensions,
    none on biases and LayerNorms (GPT-3, appendix B)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.max_lr, betas=(train.beta1, train.beta2), eps=1e-8, fused=True)


def learning_rate(step: int, max_steps: int, train: TrainConfig) -> float:
    """Learning rate of the update number `step`, counted from 0: linear warmup to max_lr, then a cosine to min_lr,
    which it keeps from `max_steps` on (Loshchilov & Hutter 2017, without restarts)."""
    if step < train.warmup_steps:
        return train.max_lr * (step + 1) / train.warmup_steps
    if step >= max_steps:
        return train.min_lr
    progress = (step - train.warmup_steps) / max(1, max_steps - train.warmup_steps)
    return train.min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (train.max_lr - train.min_lr)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
