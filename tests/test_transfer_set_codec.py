"""Rows through the codec: they come back, within the bounds that docs/transfer-set-format.md states."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from transfer_sets import make_plan, make_row, storage_order, write_rows

from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.codec import BLOCK_BYTES, BLOCK_ROWS, encode_logprobs, encode_normalizers

UNIT = 2.0**-11  # half a step of float16, relative
SMALLEST = 2.0**-25  # and below its normal numbers, absolute


LOGITS = st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40)


@settings(max_examples=200, deadline=None)
@given(LOGITS, st.integers(0, 40), st.floats(0, 1))
def test_logprobs_stay_within_the_stated_bounds(logits: list[float], kept: int, scale: float) -> None:
    values = np.array(logits, dtype=np.float64) * scale
    logprobs = np.sort(values - values.max() - np.log(np.exp(values - values.max()).sum()))[::-1][: kept + 1]
    stored = encode_logprobs(logprobs, np.array([len(logprobs)])).astype(np.float64)
    nearest = np.exp(logprobs.astype(np.float16).astype(np.float64)).sum() <= 1
    assert (np.abs(stored - logprobs) <= (1 if nearest else 2) * UNIT * np.abs(logprobs) + 2 * SMALLEST).all()
    assert np.exp(stored).sum() <= max(1.0, np.exp(logprobs).sum()) + 1e-12
    assert stored[0] == stored.max() and np.isfinite(stored).all()


def test_sure_and_hopeless_entries() -> None:
    stored = encode_logprobs(np.array([1e-6, 0.0, -1e9], np.float32), np.array([1, 2]))
    assert stored.tolist() == [0.0, 0.0, -65504.0]


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("kept", [20, 300])  # 300 is the whole vocabulary: no tail hides a mass above 1
def test_normalizers_stay_within_the_stated_bounds_and_leave_a_tail(temperature: float, kept: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 300)) * rng.uniform(0, 9, size=(50, 1))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = np.log(np.exp(logprobs / temperature).sum(-1))
    counts = np.full(50, kept)
    stored = encode_logprobs(np.sort(logprobs, -1)[:, ::-1][:, :kept].ravel(), counts)
    found = encode_normalizers(wanted, stored, counts, temperature).astype(np.float64)
    mass = np.exp(stored.astype(np.float64).reshape(50, kept) / temperature - found[:, None]).sum(-1)
    assert (mass <= 1 + 1e-12).all()
    # One step, and where all ids are stored what their own rounding moves.
    moved = np.abs(stored.astype(np.float64).reshape(50, kept)).max(-1) * 2 * UNIT / temperature
    assert (np.abs(found - wanted) <= 2 * UNIT * np.abs(wanted) + moved).all()


def test_blocks_hold_a_few_rows_and_a_long_row_alone(tmp_path: Path) -> None:
    plan = make_plan(num_prompts=20, rows_per_shard=20, storage={"kind": "topk", "k": 1000}, temperatures=(1.0,))
    rows = [make_row(plan, number) for number in range(20)]
    targets, vocab = 300, plan.vocab_size
    rows[5] = type(rows[5])(
        input_ids=np.zeros(targets + 1, np.int64),
        spans=np.array([[1, targets + 1]]),
        counts=np.full(targets, vocab),
        token_ids=np.tile(np.arange(vocab), targets),
        logprobs=np.full(targets * vocab, -np.log(vocab), np.float32),
        log_normalizers=np.zeros((targets, 1), np.float32),
    )
    assert 4 * targets * vocab > BLOCK_BYTES
    write_rows(tmp_path / "set", plan, rows.__getitem__)
    transfer_set = TransferSet(tmp_path / "set", verify="full")
    assert transfer_set.whole_store is not None
    assert transfer_set.whole_store.index.shards[0].size.blocks == 4  # 5, 1, then 8 and 6 of the rest
    assert BLOCK_ROWS == 8
    for number in (19, 5, 4, 6):
        np.testing.assert_array_equal(
            transfer_set.row(number).token_ids, rows[number].token_ids[storage_order(rows[number])]
        )
