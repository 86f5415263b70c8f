"""Batches in an exact, elastic order: which sequences make up step N depends on the seed and N only.

A sequence is context_length + 1 neighbouring tokens of one shard; each token is a target once an epoch. Sequence number
`n` of the endless training stream lies in epoch `n // sequences_per_epoch`, whose order is a permutation made from
(seed, epoch). Ranks, accumulation steps and prefetching cut the stream without reordering it, and the whole state is one
number: the sequences consumed.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from gpt2core.shards import Shard, fingerprint

Shuffle = Literal["sequences", "shards", "none"]


class Sequences:
    """All sequences of a split, numbered shard by shard."""

    def __init__(self, shards: list[Shard], context_length: int) -> None:
        self.shards = shards
        self.context_length = context_length
        counts = [(shard.tokens.size - 1) // context_length for shard in shards]
        self.starts = np.concatenate([[0], np.cumsum(counts)])  # number of each shard's first sequence
        self.fingerprint = fingerprint(shards)
        if not len(self):
            raise ValueError(f"{shards[0].path.parent}: no shard is longer than context_length {context_length}")

    def __len__(self) -> int:
        return int(self.starts[-1])

    def read(self, number: int) -> np.ndarray:
        """Sequence `number`: (context_length + 1,) uint16; inputs are all but the last, targets all but the first."""
        shard = int(np.searchsorted(self.starts, number, side="right")) - 1
        start = (number - int(self.starts[shard])) * self.context_length
        return self.shards[shard].tokens[start : start + self.context_length + 1]

    def batch(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these sequences, each (len(numbers), context_length) int64."""
        tokens = torch.from_numpy(np.stack([self.read(int(number)) for number in numbers]).astype(np.int64))
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def epoch_order(sequences: Sequences, shuffle: Shuffle, seed: int, epoch: int) -> np.ndarray:
    """Numbers of all sequences in the order of this epoch, (len(sequences),) uint32."""
    if shuffle == "none":
        return np.arange(len(sequences), dtype=np.uint32)
    rng = np.random.default_rng([seed, epoch])
    if shuffle == "sequences":
        order = np.arange(len(sequences), dtype=np.uint32)
        rng.shuffle(order)
        return order
    ranges = list(zip(sequences.starts[:-1], sequences.starts[1:], strict=True))
    return np.concatenate([np.arange(*ranges[i], dtype=np.uint32) for i in rng.permutation(len(ranges))])


class Loader:
    """The training stream of one rank, micro-step by micro-step, read one micro-step ahead by a thread."""

    def __init__(
        self,
        sequences: Sequences,
        *,
        sequences_per_step: int,
        mini_batch_size: int,
        rank: int,
        world_size: int,
        shuffle: Shuffle,
        seed: int,
        device: torch.device,
    ) -> None:
        self.sequences = sequences
        self.sequences_per_step = sequences_per_step
        self.mini_batch_size = mini_batch_size
        self.rank, self.world_size = rank, world_size
        self.shuffle: Shuffle = shuffle
        self.seed = seed
        self.device = device
        self.consumed = 0  # sequences of all ranks that went into finished steps
        self._micro_step = 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.uint32))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: Future[tuple[Tensor, Tensor]] | None = None

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This rank's next inputs and targets, each (mini_batch_size, context_length) int64 on the device."""
        ahead = self._ahead or self._read_ahead()
        inputs, targets = ahead.result()
        self._advance()
        self._ahead = self._read_ahead()
        return inputs.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)

    def _advance(self) -> None:
        self._micro_step += 1
        if self._micro_step * self.mini_batch_size * self.world_size == self.sequences_per_step:
            self.consumed += self.sequences_per_step
            self._micro_step = 0

    def _read_ahead(self) -> Future[tuple[Tensor, Tensor]]:
        first = self.consumed + (self._micro_step * self.world_size + self.rank) * self.mini_batch_size
        return self._thread.submit(self._read, first)

    def _read(self, first: int) -> tuple[Tensor, Tensor]:
        numbers = np.array([self._at(first + i) for i in range(self.mini_batch_size)])
        inputs, targets = self.sequences.batch(numbers)
        if self.device.type == "cuda":
            return inputs.pin_memory(), targets.pin_memory()
        return inputs, targets

    def _at(self, position: int) -> int:
        """Number of the sequence at this position of the endless stream."""
        epoch, offset = divmod(position, len(self.sequences))
        if self._order[0] != epoch:
            self._order = (epoch, epoch_order(self.sequences, self.shuffle, self.seed, epoch))
        return int(self._order[1][offset])

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed": self.consumed,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "context_length": self.sequences.context_length,
            "fingerprint": self.sequences.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from a saved position, on any number of ranks. Raises ValueError when the data is not the same."""
        mine = self.state_dict()
        changed = [
            f"{name}: {state[name]} -> {mine[name]}"
            for name in mine
            if name != "consumed" and state[name] != mine[name]
        ]
        if changed:
            raise ValueError(
                f"the checkpoint was trained on another data order ({'; '.join(changed)}): "
                f"resume with the data and settings it was made with"
            )
        self.consumed, self._micro_step, self._ahead = state["consumed"], 0, None

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
