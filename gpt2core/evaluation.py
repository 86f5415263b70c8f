"""Validation loss on a fixed set of sequences, the same for any number of ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from gpt2core import heartbeat
from gpt2core.distributed import Ranks
from gpt2core.loader import Sequences
from gpt2core.terminal import track

# (tokens, targets) -> loss of each token, (B, T)
TokenLosses = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def validation_loss(losses: TokenLosses, sequences: Sequences, val_tokens: int, batch_size: int, ranks: Ranks) -> float:
    """Mean cross-entropy, in nats a token, over the first `val_tokens` of the validation shards.

    Batches are cut the same way for any number of ranks and each sequence's loss has its own place in the sum, so the
    number does not depend on who computed what. Raises ValueError when there is not one whole sequence.
    """
    count = min(val_tokens // sequences.context_length, len(sequences))
    if count == 0:
        raise ValueError(
            f"val_tokens {val_tokens} is less than one sequence of context_length {sequences.context_length}"
        )
    means = torch.zeros(count, dtype=torch.float64)
    starts = range(0, count, batch_size)
    for start in track(starts[ranks.rank :: ranks.world_size], "validation, batches"):
        numbers = np.arange(start, start + batch_size)
        inputs, targets = sequences.batch(numbers % count)  # a whole batch even at the end: one shape, one graph
        of_tokens = losses(inputs.to(ranks.device), targets.to(ranks.device))
        kept = min(batch_size, count - start)
        means[start : start + kept] = of_tokens.double().mean(1)[:kept].cpu()
        heartbeat.beat()
    return ranks.sum(means).mean().item()
