"""GPT-2 (Radford et al. 2019), written from scratch, with the parameter names of Hugging Face's GPT2LMHeadModel.

Shapes in comments: B sequences, T tokens, C = embd_size, V = vocab_size.

Parameters stay in fp32. The activations run in `compute_dtype`: each matrix is cast where it is used, so no autocast
is needed and the residual stream itself is bf16 on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2core.config import VOCAB_SIZE, ModelConfig
from gpt2core.kernels import PLAIN, Kernels

INIT_STD = 0.02  # GPT-2's released code, model.py


class Layout(Protocol):
    """Where tokens stand in their texts, and which others they see, when it is not one text a row from its beginning."""

    def positions(self, count: int) -> Tensor:
        """Of the next `count` tokens: (B, T)."""

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention, (B, T, H, D), of the queries, keys and values in (B, T, 3, H, D); called for each layer in turn."""


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: drawn as PyTorch does they would only be drawn again (GPT.init_weights) or loaded."""


class Linear(nn.Linear):
    """A linear layer that computes in the dtype of its input, and may add its output to a residual."""

    def __init__(self, in_features: int, out_features: int, kernels: Kernels, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.kernels = kernels

    def reset_parameters(self) -> None:
        """Nothing, as in Embedding."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.kernels.linear(x, self.weight, self.bias, residual)


class LayerNorm(nn.LayerNorm):
    """A LayerNorm in the dtype of its input; PyTorch's kernels take mean and variance in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.num_heads, self.kernels = config.num_heads, kernels
        self.c_attn = Linear(config.embd_size, 3 * config.embd_size, kernels)
        self.c_proj = Linear(config.embd_size, config.embd_size, kernels)

    def forward(self, x: Tensor, residual: Tensor, attend: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        B, T, C = x.shape  # noqa: N806
        qkv = self.c_attn(x).view(B, T, 3, self.num_heads, C // self.num_heads)
        y = (attend or self.kernels.attention)(qkv)  # (B, T, heads, C / heads)
        return self.c_proj(y.reshape(B, T, C), residual)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.c_fc = Linear(config.embd_size, 4 * config.embd_size, kernels)
        self.c_proj = Linear(4 * config.embd_size, config.embd_size, kernels)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.kernels.mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias, residual)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.embd_size)
        self.attn = CausalSelfAttention(config, kernels)
        self.ln_2 = LayerNorm(config.embd_size)
        self.mlp = MLP(config, kernels)

    def forward(self, x: Tensor, attend: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        x = self.attn(self.ln_1(x), x, attend)
        return self.mlp(self.ln_2(x), x)


class Transformer(nn.Module):
    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.wte = Embedding(config.vocab_size, config.embd_size)
        self.wpe = Embedding(config.context_length, config.embd_size)
        self.h = nn.ModuleList(Block(config, kernels) for _ in range(config.num_layers))
        self.ln_f = LayerNorm(config.embd_size)


class GPT(nn.Module):
    """GPT-2 with its head tied to the token embedding. Its weights are not set before init_weights or load_state_dict."""

    def __init__(
        self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32, kernels: Kernels = PLAIN
    ) -> None:
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.kernels = kernels
        self.transformer = Transformer(config, kernels)
        self.lm_head = Linear(config.embd_size, config.vocab_size, kernels, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """Draws fresh weights: N(0, 0.02), the projections into the residual stream scaled by 1/sqrt(2 * num_layers)
        (GPT-2 paper, section 2.3), biases zero."""
        residual_std = INIT_STD / math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif ".ln_" in name:
                parameter.fill_(1.0)
            else:
                std = residual_std if name.endswith("c_proj.weight") else INIT_STD
                parameter.normal_(0.0, std, generator=generator)

    def cast_weights(self) -> None:
        """Keeps in compute_dtype what is cast to it at each use, for a model that is only measured: the same numbers.

        The embeddings stay fp32, for they are added before the cast; so the head, tied to one of them, gets a copy.
        """
        if self.compute_dtype == torch.float32:
            return
        self.lm_head.weight = nn.Parameter(self.lm_head.weight.detach())
        for module in self.modules():
            if isinstance(module, Linear | LayerNorm):
                module.to(self.compute_dtype)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, reduction: Literal["mean", "none"] = "mean"
    ) -> Tensor:
        """Logits (B, T, V) of `tokens` (B, T); with `targets` (B, T), the cross-entropy in nats.

        For reduction 'mean' the loss is a scalar, to train on; for 'none' it is one number a token, (B, T), to be reported: as
        in the published model, the vocabulary's padding takes no part in it. Both are fp32.
        """
        x = self.hidden(tokens)  # (B, T, C)
        if targets is not None and reduction == "mean":
            return self.kernels.mean_loss(x.flatten(0, 1), self.lm_head.weight, targets.flatten())
        logits = self.lm_head(x)  # (B, T, V)
        if targets is None:
            return logits
        published = logits.flatten(0, 1)[:, :VOCAB_SIZE].float()
        return F.cross_entropy(published, targets.flatten(), reduction="none").view_as(targets)

    def hidden(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """What the head reads: the last block's output after the final LayerNorm, (B, T, C).

        Without a layout each row of `tokens` (B, T) is a text from its beginning.
        """
        T = tokens.shape[1]  # noqa: N806
        if layout is None and self.config.context_length < T:
            raise ValueError(f"{T} tokens are more than the model's context_length {self.config.context_length}")
        position = torch.arange(T, device=tokens.device) if layout is None else layout.positions(T)
        x = self.transformer.wte(tokens) + self.transformer.wpe(position)  # (B, T, C)
        x = x.to(self.compute_dtype)
        for layer, block in enumerate(self.transformer.h):
            x = block(x, None if layout is None else partial(layout.attend, layer))
        return self.transformer.ln_f(x)
