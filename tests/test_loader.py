"""The training stream: every token once an epoch, in one order whatever the number of ranks."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2core.loader import Loader, Sequences, epoch_order
from gpt2core.shards import open_shards, shard_name

CPU = torch.device("cpu")


def make_sequences(folder: Path, sizes: list[int], context_length: int) -> Sequences:
    """Train shards of these sizes in which no token comes twice, so that a token tells where it is from."""
    start = 0
    for index, size in enumerate(sizes, start=1):
        with (folder / shard_name(index)).open("wb") as file:
            np.save(file, np.arange(start, start + size).astype(np.uint16))
        start += size
    assert start <= 1 << 16
    return Sequences(open_shards(folder, "train"), context_length)


def expected_sequences(sizes: list[int], context_length: int) -> list[int]:
    """First token of each sequence, reckoned without the loader: a shard gives whole sequences only."""
    firsts, start = [], 0
    for size in sizes:
        firsts += [start + n * context_length for n in range((size - 1) // context_length)]
        start += size
    return firsts


class Group:
    """The loaders of all ranks of one training job."""

    def __init__(
        self, sequences, *, sequences_per_step, world_size, mini_batch_size, shuffle="sequences", seed=1, prefetch=2
    ):
        self.micro_steps, rest = divmod(sequences_per_step, world_size * mini_batch_size)
        assert not rest
        self.loaders = [
            Loader(
                sequences,
                sequences_per_step=sequences_per_step,
                mini_batch_size=mini_batch_size,
                rank=rank,
                world_size=world_size,
                shuffle=shuffle,
                seed=seed,
                device=CPU,
                prefetch=prefetch,
            )
            for rank in range(world_size)
        ]

    def step(self) -> torch.Tensor:
        """One step's inputs, (sequences_per_step, T): micro-step by micro-step, rank by rank within it."""
        rows = []
        for _ in range(self.micro_steps):
            for loader in self.loaders:
                inputs, targets = loader.next_batch()
                assert inputs.dtype == targets.dtype == torch.int64
                # neighbours in a shard are neighbouring numbers, so the target is the input plus one
                assert torch.equal(targets, inputs + 1)
                assert torch.equal(inputs[:, 1:], targets[:, :-1])
                rows.append(inputs)
        return torch.cat(rows)

    def steps(self, count: int) -> list[list[int]]:
        """Each step's sequences, by their first tokens."""
        return [self.step()[:, 0].tolist() for _ in range(count)]

    def close(self) -> None:
        for loader in self.loaders:
            loader.close()


SIZES = [333, 64, 200, 97]  # with T = 8: 41 + 7 + 24 + 12 = 84 sequences


@pytest.fixture
def sequences(tmp_path):
    return make_sequences(tmp_path, SIZES, 8)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(2, 120), min_size=1, max_size=4),
    context_length=st.integers(1, 9),
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    mini_batch_size=st.integers(1, 3),
    micro_steps=st.integers(1, 3),
    shuffle=st.sampled_from(["sequences", "shards", "none"]),
    seed=st.integers(0, 2**32),
    prefetch=st.integers(0, 5),
)
def test_every_sequence_comes_exactly_once_an_epoch_across_the_ranks(
    tmp_path_factory, sizes, context_length, world_size, mini_batch_size, micro_steps, shuffle, seed, prefetch
):
    sizes = [*sizes, context_length + 1]  # at least one whole sequence
    sequences = make_sequences(tmp_path_factory.mktemp("shards"), sizes, context_length)
    expected = expected_sequences(sizes, context_length)
    assert len(sequences) == len(expected)
    sequences_per_step = world_size * mini_batch_size * micro_steps
    group = Group(
        sequences,
        sequences_per_step=sequences_per_step,
        world_size=world_size,
        mini_batch_size=mini_batch_size,
        shuffle=shuffle,
        seed=seed,
        prefetch=prefetch,
    )
    stream = [first for step in group.steps(-(-2 * len(expected) // sequences_per_step)) for first in step]
    group.close()
    for epoch in range(2):  # an epoch ends in the middle of a step as a rule, and the next goes on there
        assert sorted(stream[epoch * len(expected) : (epoch + 1) * len(expected)]) == expected


def test_every_token_but_the_first_of_a_shard_is_a_target_exactly_once(tmp_path):
    sequences = make_sequences(tmp_path, [65, 33], 8)  # 8 and 4 sequences, nothing left over
    group = Group(sequences, sequences_per_step=4, world_size=2, mini_batch_size=1)
    targets = torch.cat([group.step() + 1 for _ in range(3)]).flatten().tolist()
    group.close()
    assert sorted(targets) == [*range(1, 65), *range(66, 98)]


WORLD_SIZES = [1, 2, 3, 4, 8]  # all divide 24


def ways_to_cut(sequences_per_step):
    """World size and mini-batch size that make up a step together with a whole number of micro-steps."""
    return [
        (world_size, size)
        for world_size in WORLD_SIZES
        for size in range(1, sequences_per_step + 1)
        if sequences_per_step % (world_size * size) == 0
    ]


@pytest.mark.parametrize("shuffle", ["sequences", "shards", "none"])
def test_any_number_of_ranks_sees_the_same_stream(sequences, shuffle):
    ways = ways_to_cut(24)
    assert {world_size for world_size, _ in ways} == set(WORLD_SIZES)
    seen = []
    for world_size, mini_batch_size in ways:
        group = Group(
            sequences, sequences_per_step=24, world_size=world_size, mini_batch_size=mini_batch_size, shuffle=shuffle
        )
        seen.append(group.steps(8))  # over two epochs of 84 sequences
        group.close()
    assert all(steps == seen[0] for steps in seen)


@settings(max_examples=40, deadline=None)
@given(
    before=st.sampled_from(ways_to_cut(24)),
    after=st.sampled_from(ways_to_cut(24)),
    prefetch=st.tuples(st.integers(0, 6), st.integers(0, 6)),
    stopped_at=st.integers(0, 8),
    shuffle=st.sampled_from(["sequences", "shards", "none"]),
    seed=st.integers(0, 2**32),
)
def test_a_resume_anywhere_in_any_other_cut_goes_on_with_the_next_global_batch(
    tmp_path_factory, before, after, prefetch, stopped_at, shuffle, seed
):
    """World size, accumulation and prefetch depth change at a resume; the stream of whole steps does not."""
    sequences = make_sequences(tmp_path_factory.mktemp("shards"), SIZES, 8)
    options = {"sequences_per_step": 24, "shuffle": shuffle, "seed": seed}
    first = Group(sequences, world_size=before[0], mini_batch_size=before[1], prefetch=prefetch[0], **options)
    steps = first.steps(stopped_at)
    state = json.loads(json.dumps(first.loaders[-1].state_dict()))  # small, and JSON
    expected = first.steps(3)
    first.close()
    second = Group(sequences, world_size=after[0], mini_batch_size=after[1], prefetch=prefetch[1], **options)
    for loader in second.loaders:
        loader.load_state_dict(state)
    assert second.steps(3) == expected
    second.close()
    assert len(steps) == stopped_at and state["consumed"] == 24 * stopped_at
    assert state["epoch"] == 24 * stopped_at // 84


def test_a_resume_reads_nothing_of_what_was_consumed(sequences):
    """In constant time: a position a thousand epochs on comes as soon as the first."""
    group = Group(sequences, sequences_per_step=8, world_size=1, mini_batch_size=2)
    state = group.loaders[0].state_dict() | {"consumed": 84 * 1000}
    group.loaders[0].load_state_dict(state)
    order = [expected_sequences(SIZES, 8)[number] for number in epoch_order(sequences, "sequences", 1, 1000)]
    assert group.steps(1) == [order[:8]]
    assert set(group.loaders[0]._orders) == {1000, 1001}
    group.close()


def test_each_rank_reads_its_own_place_of_the_stream(sequences):
    """Rank r of W at micro-step m reads positions (m * W + r) * B and on."""
    order = [expected_sequences(SIZES, 8)[number] for number in epoch_order(sequences, "sequences", 1, 0)]
    group = Group(sequences, sequences_per_step=12, world_size=3, mini_batch_size=2)
    for micro_step in range(2):
        for rank, loader in enumerate(group.loaders):
            first = (micro_step * 3 + rank) * 2
            assert loader.next_batch()[0][:, 0].tolist() == order[first : first + 2]
    group.close()


@pytest.mark.parametrize("stopped_at", [0, 3, 10, 11])  # an epoch ends within step 10
@pytest.mark.parametrize(("world_size", "mini_batch_size"), [(1, 2), (4, 1), (8, 1)])
def test_a_resume_on_another_number_of_ranks_goes_on_exactly(sequences, stopped_at, world_size, mini_batch_size):
    first = Group(sequences, sequences_per_step=8, world_size=2, mini_batch_size=2)
    before = first.steps(stopped_at)
    states = [loader.state_dict() for loader in first.loaders]
    assert states[0] == states[1]  # one number serves all ranks
    assert states[0]["consumed"] == 8 * stopped_at
    whole = before + first.steps(24 - stopped_at)
    first.close()
    second = Group(sequences, sequences_per_step=8, world_size=world_size, mini_batch_size=mini_batch_size)
    second.steps(5)  # a loader that has already read something goes to the saved place all the same
    for loader in second.loaders:
        loader.load_state_dict(states[0])
    assert second.steps(24 - stopped_at) == whole[stopped_at:]
    second.close()


def test_a_state_saved_within_a_step_repeats_that_step(sequences):
    group = Group(sequences, sequences_per_step=8, world_size=1, mini_batch_size=2)
    steps = group.steps(2)
    group.loaders[0].next_batch()
    state = group.loaders[0].state_dict()
    assert state["consumed"] == 16
    group.loaders[0].load_state_dict(state)
    repeated = group.steps(1)
    again = Group(sequences, sequences_per_step=8, world_size=1, mini_batch_size=2)
    assert again.steps(3) == steps + repeated
    again.close()
    group.close()


def test_shuffled_shards_stay_whole_and_come_once(sequences):
    by_shard = [list(range(*sequences.starts[i : i + 2])) for i in range(4)]
    orders = set()
    for epoch in range(20):
        order = epoch_order(sequences, "shards", 1, epoch).tolist()
        assert sorted(order) == list(range(84))
        firsts = sorted(order.index(shard[0]) for shard in by_shard)
        pieces = [order[start:end] for start, end in zip(firsts, [*firsts[1:], 84], strict=True)]
        assert sorted(pieces) == by_shard
        orders.add(tuple(order))
    assert len(orders) > 10  # of the 24 there are


@pytest.mark.parametrize("shuffle", ["sequences", "shards"])
def test_the_order_depends_on_seed_and_epoch_alone(tmp_path, shuffle):
    sequences = make_sequences(tmp_path, [17] * 12, 8)
    orders = {(seed, epoch): epoch_order(sequences, shuffle, seed, epoch) for seed in range(3) for epoch in range(3)}
    for one, order in orders.items():
        np.testing.assert_array_equal(order, epoch_order(sequences, shuffle, *one))
        assert all(other == one or order.tolist() != orders[other].tolist() for other in orders)


def test_no_shuffle_is_the_order_of_the_files(sequences):
    group = Group(sequences, sequences_per_step=84, world_size=1, mini_batch_size=4, shuffle="none")
    assert group.steps(2) == [expected_sequences(SIZES, 8)] * 2
    group.close()


def test_sequences_are_mixed_over_the_whole_epoch(sequences):
    order = epoch_order(sequences, "sequences", 1337, 0)
    assert sorted(order.tolist()) == list(range(84))
    of_first_shard = np.flatnonzero(order < 41)
    assert of_first_shard.min() < 20 and of_first_shard.max() > 64


def test_the_order_of_a_seed_never_changes(tmp_path):
    """A run begun with one release goes on with the next only if the order stays what it was."""
    sequences = make_sequences(tmp_path, [81], 8)
    assert epoch_order(sequences, "sequences", 1337, 0).tolist() == [7, 6, 3, 5, 2, 8, 4, 9, 0, 1]


@pytest.mark.parametrize("changed", ["data", "seed", "shuffle", "context_length"])
def test_a_position_in_another_order_is_refused_by_name(tmp_path_factory, changed):
    folder = tmp_path_factory.mktemp("first")
    sequences = make_sequences(folder, SIZES, 8)
    options = {"sequences_per_step": 4, "world_size": 1, "mini_batch_size": 1}
    saved = Group(sequences, **options)
    saved.steps(1)
    state = saved.loaders[0].state_dict()
    saved.close()
    names = {"data": "fingerprint"}
    if changed == "data":
        other = Group(make_sequences(tmp_path_factory.mktemp("other"), SIZES[:-1], 8), **options)
    elif changed == "context_length":
        other = Group(Sequences(open_shards(folder, "train"), 4), **options)
    elif changed == "seed":
        other = Group(sequences, **options, seed=2)
    else:
        other = Group(sequences, **options, shuffle="shards")
    loader = other.loaders[0]
    with pytest.raises(ValueError, match=f"another data order.*{names.get(changed, changed)}"):
        loader.load_state_dict(state)
    assert loader.consumed == 0
    other.close()


def test_changed_data_can_be_accepted_and_nothing_else(tmp_path_factory):
    options = {"sequences_per_step": 4, "world_size": 2, "mini_batch_size": 1}
    saved = Group(make_sequences(tmp_path_factory.mktemp("first"), SIZES, 8), **options)
    saved.steps(5)
    state = saved.loaders[0].state_dict()
    saved.close()
    changed = make_sequences(tmp_path_factory.mktemp("other"), [*SIZES, 50], 8)
    other, straight = Group(changed, **options), Group(changed, **options)
    with pytest.raises(ValueError, match=r"fingerprint: .* with --accept_changed_data"):
        other.loaders[0].load_state_dict(state)
    for loader in other.loaders:
        loader.load_state_dict(state, accept_changed_data=True)
    assert other.steps(3) == straight.steps(8)[5:]  # at the same place of the new data's stream
    with pytest.raises(ValueError, match="seed: 2 -> 1") as caught:
        other.loaders[0].load_state_dict(state | {"seed": 2}, accept_changed_data=True)
    assert "--accept_changed_data" not in str(caught.value)
    other.close()
    straight.close()


def test_a_state_of_before_the_epoch_was_in_it_is_taken(sequences):
    group = Group(sequences, sequences_per_step=8, world_size=1, mini_batch_size=2)
    state = group.loaders[0].state_dict()
    del state["epoch"]
    group.loaders[0].load_state_dict(state | {"consumed": 16})
    assert group.loaders[0].consumed == 16
    group.close()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: what is tested is the copy to it")
def test_batches_on_a_gpu_are_those_on_the_cpu(sequences):
    options = {"sequences_per_step": 8, "mini_batch_size": 4, "rank": 0, "world_size": 1, "seed": 1}
    loaders = [
        Loader(sequences, shuffle="sequences", device=device, **options) for device in (CPU, torch.device("cuda"))
    ]
    for _ in range(50):
        for here, there in zip(*(loader.next_batch() for loader in loaders), strict=True):
            assert there.device.type == "cuda" and there.dtype == torch.int64 and there.is_contiguous()
            assert torch.equal(here, there.cpu())
    for loader in loaders:
        loader.close()


def test_data_shorter_than_a_sequence_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no shard is longer than context_length 8") as caught:
        make_sequences(tmp_path, [8, 5], 8)
    assert str(tmp_path) in str(caught.value)


def test_a_batch_is_the_tokens_of_the_shard_shifted_by_one(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 50257, 100).astype(np.uint16)
    with (tmp_path / shard_name(1)).open("wb") as file:
        np.save(file, tokens)
    sequences = Sequences(open_shards(tmp_path, "train"), 16)
    inputs, targets = sequences.batch(np.array([2, 0]))
    assert inputs.shape == targets.shape == (2, 16)
    assert inputs.is_contiguous() and targets.is_contiguous()
    np.testing.assert_array_equal(inputs[0], tokens[32:48])
    np.testing.assert_array_equal(targets[0], tokens[33:49])
    np.testing.assert_array_equal(inputs[1], tokens[0:16])
    np.testing.assert_array_equal(targets[1], tokens[1:17])
