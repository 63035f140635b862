"""Length-grouped order: every row once, like lengths together, the same order for the same seed and epoch."""

from itertools import pairwise

from hypothesis import given, settings, strategies as st

from quantkd.training.order import LengthGroupedBatches, row_lengths


def order_of(lengths, group, seed, epoch=0):
    sampler = LengthGroupedBatches(lengths, group, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert order == list(sampler) and len(sampler) == len(lengths)
    return order


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 500), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 5))
def test_every_row_comes_once_and_the_longest_first(lengths, group, epoch):
    order = order_of(lengths, group, 3, epoch)
    assert sorted(order) == list(range(len(lengths))) and lengths[order[0]] == max(lengths)


def test_epochs_and_seeds_differ_and_batches_hold_little_padding():
    lengths = [(37 * i) % 301 + 20 for i in range(400)]
    order, *others = (order_of(lengths, 8, seed, epoch) for seed in (0, 1) for epoch in (0, 1))
    assert len({tuple(each) for each in (order, *others)}) >= 3 and order_of(lengths, 8, 0, 1) == others[0]
    batches = [order[i : i + 8] for i in range(0, 400, 8)]
    padded = sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    assert sum(lengths) / padded > 0.9
    starts = [max(lengths[row] for row in batch) for batch in batches[1:-1]]
    assert sum(a > b for a, b in pairwise(starts)) < 0.8 * len(starts)  # not sorted any more


def test_lengths_come_from_rows_or_not_at_all():
    assert row_lengths([{"input_ids": [1, 2, 3]}, {"input_ids": [1]}]) == [3, 1]
    assert row_lengths(iter([])) is None
