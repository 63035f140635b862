"""To and from `datasets`, and in from Axolotl's and DistillKit's tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from transfer_sets import make_plan, storage_order, write_set

from quantkd.errors import DataError, TransferSetError
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.interchange import from_dataset, import_axolotl, import_distillkit, to_dataset

FACTS: dict[str, Any] = {
    "vocab_size": 100,
    "teacher_name": "peer",
    "tokenizer_fingerprint": "a" * 64,
    "rows_per_shard": 2,
}


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


def axolotl_rows() -> list[dict[str, Any]]:
    """Three of five tokens are targets; the second target has one entry, and padding as its collator writes it."""
    low = -1e9
    return [
        {
            "input_ids": [3, 4, 5, 6, 7],
            "labels": [-100, -100, 5, 6, 7],
            "target_token_ids": [[0, 1], [0, 1], [5, 9], [6, 0], [8, 7]],
            "target_logprobs": [
                [-math.inf, -math.inf], [-math.inf, -math.inf], [math.log(0.75), math.log(0.25)], [0.0, low],
                [math.log(0.4), math.log(0.6)],
            ],
            "target_mask": [[0, 0], [0, 0], [1, 1], [1, 0], [1, 1]],
        },
        {
            "input_ids": [1, 2, 3],
            "labels": [1, -100, 3],
            "target_token_ids": [[1, 2], [1, 2], [1, 2]],
            "target_logprobs": [[math.log(0.5)] * 2] * 3,
            "target_mask": [[1, 1]] * 3,
        },
    ]  # fmt: skip


def test_axolotl(tmp_path: Path) -> None:
    Dataset.from_list(axolotl_rows()).to_parquet(tmp_path / "rows.parquet")
    digest = import_axolotl(tmp_path / "rows.parquet", tmp_path / "set", **FACTS)
    assert digest == import_axolotl([str(tmp_path / "rows.parquet")], tmp_path / "again", **FACTS)
    transfer_set = TransferSet(tmp_path / "set")
    assert transfer_set.info.storage == {"kind": "topk", "k": 2}
    first, second = transfer_set.rows([0, 1])
    assert first.spans.tolist() == [[2, 5]] and first.counts.tolist() == [2, 1, 2]
    assert first.token_ids.tolist() == [5, 9, 6, 7, 8]
    np.testing.assert_allclose(np.exp(first.logprobs), [0.75, 0.25, 1.0, 0.6, 0.4], atol=0.003)
    assert second.spans.tolist() == [[2, 3]], "nothing predicts the token at position 0"


def test_distillkit(tmp_path: Path) -> None:
    values = [[math.log(0.5), math.log(0.25)], [math.log(0.9), -math.inf], [math.log(0.3), math.log(0.2)]]
    row = {"input_ids": [3, 4, 5], "token_ids": [[4, 8], [5, 0], [1, 2]], "top_values": values}
    # DistillKit's capture drops the last position, its live teacher keeps it.
    for number, cut in enumerate((3, 2)):
        rows = [{**row, "token_ids": row["token_ids"][:cut], "top_values": values[:cut]}]
        import_distillkit(Dataset.from_list(rows), tmp_path / str(number), **FACTS)
        found = TransferSet(tmp_path / str(number)).row(0)
        assert found.spans.tolist() == [[1, 3]] and found.counts.tolist() == [2, 1]
        assert found.token_ids.tolist() == [4, 8, 5]
        np.testing.assert_allclose(np.exp(found.logprobs), [0.5, 0.25, 0.9], atol=0.003)
    import_distillkit(Dataset.from_list([{**row, "labels": [-100, -100, 5]}]), tmp_path / "labels", **FACTS)
    assert TransferSet(tmp_path / "labels").row(0).spans.tolist() == [[2, 3]]


def test_tables_that_cannot_be_imported(tmp_path: Path) -> None:
    rows = axolotl_rows()
    with pytest.raises(DataError, match=r"lacks the columns \['top_values'\]"):
        import_distillkit(
            Dataset.from_list(rows).rename_column("target_token_ids", "token_ids"), tmp_path / "a", **FACTS
        )
    for row in rows:
        row["labels"] = [-100] * len(row["labels"])
    with pytest.raises(DataError, match="None of the 2 rows has a target"):
        import_axolotl(Dataset.from_list(rows), tmp_path / "b", **FACTS)
    rows = axolotl_rows()
    rows[1]["target_logprobs"] = [[0.0, -0.1]] * 3
    with pytest.raises(TransferSetError, match="hold a mass of"):
        import_axolotl(Dataset.from_list(rows), tmp_path / "c", **FACTS)
    rows = axolotl_rows()
    rows[1]["target_mask"] = [[1, 1]]
    with pytest.raises(DataError, match="Row 1 has lists that do not fit together"):
        import_axolotl(Dataset.from_list(rows), tmp_path / "d", **FACTS)


def test_storage_order_is_what_the_set_gives(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    row = TransferSet(tmp_path / "set").row(4)
    np.testing.assert_array_equal(storage_order(row), np.arange(len(row.token_ids)))
