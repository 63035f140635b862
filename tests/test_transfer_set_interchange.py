"""To and from `datasets` tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from transfer_sets import make_plan, storage_order, write_set

from quantkd.errors import DataError
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.interchange import from_dataset, to_dataset


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_there_and_back(tmp_path: Path) -> None:
    plan = make_plan()
    write_set(tmp_path / "set", plan)
    transfer_set = TransferSet(tmp_path / "set")
    table = to_dataset(transfer_set)
    assert table.column_names == ["input_ids", "spans", "token_ids", "logprobs", "log_normalizers", "finished"]
    assert len(table) == 10 and len(table[3]["token_ids"]) == len(transfer_set.row(3).counts)
    table.to_parquet(tmp_path / "table.parquet")
    from_dataset(Dataset.from_parquet(str(tmp_path / "table.parquet")), tmp_path / "back", plan)
    for before, after in zip(transfer_set.rows(range(10)), TransferSet(tmp_path / "back").rows(range(10)), strict=True):
        for name in ("input_ids", "spans", "counts", "token_ids", "finished"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
        np.testing.assert_allclose(after.logprobs, before.logprobs, atol=1e-4)
    with pytest.raises(DataError, match="10 rows, the plan 9 prompts"):
        from_dataset(table, tmp_path / "other", make_plan(num_prompts=9))
    with pytest.raises(DataError, match=r"lacks the columns \['spans'\]"):
        from_dataset(table.remove_columns("spans"), tmp_path / "other", plan)


def test_a_row_without_targets_goes_there_and_back(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [1, 2], "spans": [], "token_ids": [], "logprobs": [], "log_normalizers": [], "finished": True}
    ]
    plan = make_plan(num_prompts=1)
    from_dataset(Dataset.from_list(rows, features=to_dataset(_empty(tmp_path)).features), tmp_path / "set", plan)
    assert to_dataset(TransferSet(tmp_path / "set"))[0] == rows[0]


def _empty(tmp_path: Path) -> TransferSet:
    write_set(tmp_path / "empty", make_plan(num_prompts=1))
    return TransferSet(tmp_path / "empty")[:0]


def test_storage_order_is_what_the_set_gives(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    row = TransferSet(tmp_path / "set").row(4)
    np.testing.assert_array_equal(storage_order(row), np.arange(len(row.token_ids)))
