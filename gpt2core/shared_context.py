"""How likely a model finds several endings of one context, with the context computed once for all of them.

A row of a batch holds a context and then, one after the other, the endings that go on from it. Each token sees the
context and what comes before it in its own ending, and has the position that it would have if its ending stood alone.

Shapes in comments: B rows, T columns, N tokens of endings, H heads, D their size, C = embd_size, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt2core import heartbeat
from gpt2core.config import VOCAB_SIZE
from gpt2core.distributed import Ranks
from gpt2core.model import GPT
from gpt2core.terminal import track

COLUMNS_PER_BATCH = 16_384
TOKENS_PER_HEAD = 1024  # the logits are the biggest tensor here: so many tokens' at a time
MULTIPLE = 8  # of columns: attention reads its mask in pieces of so many


@dataclass(frozen=True)
class Row:
    """A context of at least one token and the endings that go on from it, `first` being the number of the first one."""

    context: list[int]
    endings: list[list[int]]
    first: int

    def __len__(self) -> int:
        """Columns: nothing follows an ending's last token, so the model need not read it."""
        return len(self.context) + sum(len(ending) - 1 for ending in self.endings)


@torch.no_grad()
def ending_losses(model: GPT, rows: list[Row], ranks: Ranks) -> Tensor:
    """Summed cross-entropy, in nats, of each ending: (endings of all rows,) float64 on the CPU.

    The ranks share the batches, which are the same for any number of them, and all get the whole result.
    """
    losses = torch.zeros(sum(len(row.endings) for row in rows), dtype=torch.float64)
    for batch in track(list(_batches(rows))[ranks.rank :: ranks.world_size], "HellaSwag, batches"):
        laid_out = _Batch(batch, ranks.device)
        of_tokens = _token_losses(model, model.hidden(laid_out.tokens, laid_out), laid_out)
        losses.index_add_(0, laid_out.endings, of_tokens.cpu().double())
        heartbeat.beat()
    return ranks.sum(losses)


def _batches(rows: list[Row]) -> Iterator[list[Row]]:
    """Neighbours in length go together, so that little of a batch is padding; the longest come first."""
    batch: list[Row] = []
    for row in sorted(rows, key=len, reverse=True):
        if batch and len(batch[0]) * (len(batch) + 1) > COLUMNS_PER_BATCH:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


class _Batch:
    """Rows laid out for the model, which asks for `positions` and lets each layer `attend`."""

    def __init__(self, rows: list[Row], device: torch.device) -> None:
        width = -(-len(rows[0]) // MULTIPLE) * MULTIPLE
        tokens, positions, branch = np.zeros(
            (3, len(rows), width), np.int64
        )  # branch: 0 is the context, 1.. the endings
        read_at: list[int] = []  # column, in the flattened batch, from which each token of an ending is foretold
        targets: list[int] = []
        endings: list[int] = []
        for number, row in enumerate(rows):
            end = len(row.context)
            tokens[number, :end] = row.context
            positions[number, :end] = range(end)
            for nth, ending in enumerate(row.endings, start=1):
                length = len(ending) - 1
                tokens[number, end : end + length] = ending[:-1]
                positions[number, end : end + length] = range(len(row.context), len(row.context) + length)
                branch[number, end : end + length] = nth
                first_column = number * width
                read_at += [
                    first_column + len(row.context) - 1,
                    *range(first_column + end, first_column + end + length),
                ]
                targets += ending
                endings += [row.first + nth - 1] * len(ending)
                end += length
        self.tokens, self._positions, self._branch = (
            torch.from_numpy(array).to(device) for array in (tokens, positions, branch)
        )
        self.read_at = torch.tensor(read_at, device=device)  # (N,)
        self.targets = torch.tensor(targets, device=device)  # (N,)
        self.endings = torch.tensor(endings)  # (N,), of which ending each target is
        self._visible: Tensor | None = None

    def positions(self, count: int) -> Tensor:
        return self._positions

    def attend(self, layer: int, qkv: Tensor) -> Tensor:
        """Attention, (B, T, H, D), within the context and each ending, of packed (B, T, 3, H, D)."""
        if self._visible is None:
            column = torch.arange(qkv.shape[1], device=qkv.device)
            is_before = column <= column[:, None]  # (T, T)
            of_branch = self._branch[:, None, :]
            visible = is_before & ((of_branch == 0) | (of_branch == self._branch[:, :, None]))
            self._visible = visible[:, None]  # (B, 1, T, T)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (B, H, T, D)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._visible).transpose(1, 2)


def _token_losses(model: GPT, hidden: Tensor, batch: _Batch) -> Tensor:
    """Cross-entropy of each token of the endings, (N,), over the vocabulary without its padding; `hidden` is (B, T, C)."""
    flat = hidden.flatten(0, 1)
    losses = []
    for read_at, targets in zip(
        batch.read_at.split(TOKENS_PER_HEAD), batch.targets.split(TOKENS_PER_HEAD), strict=True
    ):
        logits = model.lm_head(flat[read_at])[:, :VOCAB_SIZE].float()
        losses.append(F.cross_entropy(logits, targets, reduction="none"))
    return torch.cat(losses)
