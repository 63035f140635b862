"""What goes into a transfer set comes out of it, within the stated bounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from transfer_sets import make_plan, make_row, storage_order, write_set

from quantkd.transfer_set.reader import TransferSet


@pytest.mark.parametrize("profile", ["faithful", "compact"])
@pytest.mark.parametrize("vocab_size", [1, 2, 17, 256, 257, 4096, 65_536, 65_537, 70_000])
def test_rows_come_back(tmp_path: Path, profile: str, vocab_size: int) -> None:
    plan = make_plan(profile=profile, vocab_size=vocab_size)
    digest = write_set(tmp_path / "set", plan)
    transfer_set = TransferSet(tmp_path / "set")
    assert len(transfer_set) == 10
    assert transfer_set.digest == digest
    for number in range(10):
        wanted, found = make_row(plan, number), transfer_set.row(number)
        for name in ("input_ids", "spans", "counts", "finished"):
            np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
        order = storage_order(wanted)
        np.testing.assert_array_equal(found.token_ids, wanted.token_ids[order])
        np.testing.assert_allclose(np.exp(found.logprobs), np.exp(wanted.logprobs[order]), atol=0.01)
        np.testing.assert_allclose(found.log_normalizers, wanted.log_normalizers, atol=0.05)
