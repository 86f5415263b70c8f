"""Validation loss on a fixed set of sequences, the same for any number of ranks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gpt2core import heartbeat
from gpt2core.distributed import Ranks
from gpt2core.loader import Sequences
from gpt2core.terminal import track
from gpt2core.tokenizer import token_bytes

# (tokens, targets) -> loss of each token, (B, T)
TokenLosses = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ValidationLoss:
    """Cross-entropy on the validation shards."""

    mean: float  # nats a token
    stderr: float  # of the mean, over sequences; NaN for a single one
    bits_per_byte: float  # of the text's UTF-8: what <|endoftext|> costs is left out, as it stands for no byte

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.mean, 700.0))  # beyond that a float overflows


@torch.no_grad()
def validation_loss(
    losses: TokenLosses, sequences: Sequences, val_tokens: int, batch_size: int, ranks: Ranks
) -> ValidationLoss:
    """Measures the first `val_tokens` of the validation shards.

    Batches are cut the same way for any number of ranks and each sequence's loss has its own place in the sum, so the
    number does not depend on who computed what. Raises ValueError when there is not one whole sequence.
    """
    count = min(val_tokens // sequences.context_length, len(sequences))
    if count == 0:
        raise ValueError(
            f"val_tokens {val_tokens} is less than one sequence of context_length {sequences.context_length}"
        )
    sums = torch.zeros(3, count, dtype=torch.float64)  # of each sequence: nats a token, nats of text, bytes of text
    bytes_of = torch.from_numpy(token_bytes())
    starts = range(0, count, batch_size)
    for start in track(starts[ranks.rank :: ranks.world_size], "validation, batches"):
        numbers = np.arange(start, start + batch_size)
        inputs, targets = sequences.batch(numbers % count)  # a whole batch even at the end: one shape, one graph
        of_tokens = losses(inputs.to(ranks.device), targets.to(ranks.device)).cpu().double()
        in_bytes = bytes_of[targets]
        of_batch = torch.stack([of_tokens.mean(1), (of_tokens * (in_bytes > 0)).sum(1), in_bytes.sum(1)])
        kept = min(batch_size, count - start)
        sums[:, start : start + kept] = of_batch[:, :kept]
        heartbeat.beat()
    means, text_nats, text_bytes = ranks.sum(sums)
    return ValidationLoss(
        mean=means.mean().item(),
        stderr=means.std().item() / math.sqrt(count),
        bits_per_byte=text_nats.sum().item() / math.log(2) / max(1.0, text_bytes.sum().item()),
    )
