"""Batches in an exact, elastic order: which sequences make up step N depends on the seed and N only.

A sequence is context_length + 1 neighbouring tokens of one shard; each token is a target once an epoch. Sequence number
`n` of the endless training stream lies in epoch `n // sequences_per_epoch`, whose order is a permutation made from
(seed, epoch). Ranks, accumulation steps and prefetching cut the stream without reordering it, and the whole state is one
number: the sequences consumed.
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
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
        counts = [(shard.num_tokens - 1) // context_length for shard in shards]
        self.starts = np.concatenate([[0], np.cumsum(counts)])  # number of each shard's first sequence
        self.fingerprint = fingerprint(shards)
        if not len(self):
            raise ValueError(
                f"{shards[0].location.rpartition('/')[0]}: no shard is longer than context_length {context_length}"
            )

    def __len__(self) -> int:
        return int(self.starts[-1])

    def shard_of(self, number: int) -> int:
        return int(np.searchsorted(self.starts, number, side="right")) - 1

    def rows(self, numbers: np.ndarray, pin: bool = False) -> Tensor:
        """These sequences, (len(numbers), context_length + 1) uint16, in memory that a GPU can read from if `pin`."""
        rows = torch.empty((len(numbers), self.context_length + 1), dtype=torch.uint16, pin_memory=pin)
        filled = rows.numpy()  # the same memory
        for shard, places in groupby(enumerate(numbers.tolist()), key=lambda place: self.shard_of(place[1])):
            with self.shards[shard].reading() as tokens:
                for row, number in places:
                    start = (number - int(self.starts[shard])) * self.context_length
                    filled[row] = tokens[start : start + self.context_length + 1]
        return rows

    def batch(self, numbers: np.ndarray) -> tuple[Tensor, Tensor]:
        """Inputs and targets of these sequences, each (len(numbers), context_length) int64."""
        return inputs_and_targets(self.rows(numbers))


def inputs_and_targets(rows: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens but the last, and all but the first: (B, T + 1) uint16 -> twice (B, T) int64, on the same device."""
    return rows[:, :-1].long().contiguous(), rows[:, 1:].long().contiguous()


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
    """The training stream of one rank, micro-step by micro-step, read some micro-steps ahead by a thread."""

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
        prefetch: int = 2,
    ) -> None:
        self.sequences = sequences
        self.sequences_per_step = sequences_per_step
        self.mini_batch_size = mini_batch_size
        self.rank, self.world_size = rank, world_size
        self.shuffle: Shuffle = shuffle
        self.seed = seed
        self.device = device
        self.prefetch = prefetch  # micro-steps
        self.consumed = 0  # sequences of all ranks that went into finished steps
        self.wait_s = 0.0  # that next_batch waited for the reader so far
        self._micro_step = 0
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._ahead: deque[Future[Tensor]] = deque()
        self._shuffler = ThreadPoolExecutor(1, thread_name_prefix="shuffler")
        self._orders: dict[int, Future[np.ndarray]] = {}
        self._next_shard_asked_at = -1

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """This rank's next inputs and targets, each (mini_batch_size, context_length) int64 on the device.

        What travels to a GPU is one uint16 row a sequence, an eighth of inputs and targets in int64.
        """
        self._read_ahead(1)
        asked = time.perf_counter()
        rows = self._ahead.popleft().result()
        self.wait_s += time.perf_counter() - asked
        self._advance()
        self._read_ahead(self.prefetch)
        return inputs_and_targets(rows.to(self.device, non_blocking=True))

    def _advance(self) -> None:
        self._micro_step += 1
        if self._micro_step * self.mini_batch_size * self.world_size == self.sequences_per_step:
            self.consumed += self.sequences_per_step
            self._micro_step = 0

    def _read_ahead(self, batches: int) -> None:
        while len(self._ahead) < batches:
            micro_step = self._micro_step + len(self._ahead)
            first = self.consumed + (micro_step * self.world_size + self.rank) * self.mini_batch_size
            self._ahead.append(self._reader.submit(self._read, first))

    def _read(self, first: int) -> Tensor:
        numbers = self._numbers(first, self.mini_batch_size)
        rows = self.sequences.rows(numbers, pin=self.device.type == "cuda")
        for past in [epoch for epoch in self._orders if epoch < first // len(self.sequences)]:
            del self._orders[past]
        if self.shuffle != "sequences":
            self._fetch_next_shard(first + self.mini_batch_size - 1, int(numbers[-1]))
        return rows

    def _numbers(self, first: int, count: int) -> np.ndarray:
        """Numbers of `count` sequences of the endless stream, from this position on."""
        epochs, offsets = np.divmod(np.arange(first, first + count), len(self.sequences))
        return np.concatenate([self._order(int(epoch))[offsets[epochs == epoch]] for epoch in np.unique(epochs)])

    def _order(self, epoch: int) -> np.ndarray:
        """The epoch's order; the next one's is made meanwhile, for ten million sequences take half a second."""
        for wanted in (epoch, epoch + 1):
            if wanted not in self._orders:
                self._orders[wanted] = self._shuffler.submit(
                    epoch_order, self.sequences, self.shuffle, self.seed, wanted
                )
        return self._orders[epoch].result()

    def _fetch_next_shard(self, position: int, number: int) -> None:
        """Lets the shard after the one at this position come from remote storage, once a shard.

        Not before every rank must have left the one before this, however far ahead of them this one is: with room for
        two shards only, the new one takes that one's place.
        """
        shard = self.sequences.shard_of(number)
        first, end = int(self.sequences.starts[shard]), int(self.sequences.starts[shard + 1])
        lead = self.sequences_per_step + self.prefetch * self.world_size * self.mini_batch_size
        start = position - (number - first)  # of this shard in the stream
        if number - first >= lead and start != self._next_shard_asked_at:
            self._next_shard_asked_at = start
            (following,) = self._numbers(start + end - first, 1)
            self.sequences.shards[self.sequences.shard_of(following)].fetch_ahead()

    def state_dict(self) -> dict[str, Any]:
        return {
            "consumed": self.consumed,
            "epoch": self.consumed // len(self.sequences),  # for people: it follows from the rest
            "seed": self.seed,
            "shuffle": self.shuffle,
            "context_length": self.sequences.context_length,
            "fingerprint": self.sequences.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any], accept_changed_data: bool = False) -> None:
        """Goes on from a saved position, on any number of ranks.

        Raises ValueError when the order is not the same, or the data is not and that was not accepted.
        """
        mine = self.state_dict()
        compared = ["seed", "shuffle", "context_length", *([] if accept_changed_data else ["fingerprint"])]
        changed = [f"{name}: {state[name]} -> {mine[name]}" for name in compared if state[name] != mine[name]]
        if changed:
            way_out = ", or go on with other data with --accept_changed_data" if "fingerprint" in changed[-1] else ""
            raise ValueError(
                f"the checkpoint was trained on another data order ({'; '.join(changed)}): "
                f"resume with the data and settings it was made with{way_out}"
            )
        self.consumed, self._micro_step, self._next_shard_asked_at = state["consumed"], 0, -1
        self._ahead.clear()

    def close(self) -> None:
        for pool in (self._reader, self._shuffler):
            pool.shutdown(wait=False, cancel_futures=True)
