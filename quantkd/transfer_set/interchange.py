"""Transfer sets to and from `datasets` tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from quantkd.errors import DataError
from quantkd.transfer_set.plan import Plan
from quantkd.transfer_set.reader import TransferSet
from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.writer import TransferSetWriter

_FEATURES = Features(
    {
        "input_ids": List(Value("int32")),
        "spans": List(List(Value("int32"))),
        "token_ids": List(List(Value("int32"))),
        "logprobs": List(List(Value("float32"))),
        "log_normalizers": List(List(Value("float32"))),
        "finished": Value("bool"),
    }
)


def to_dataset(transfer_set: TransferSet) -> Dataset:
    """The rows as a `datasets.Dataset`, one list of entries a target; convenient, and about ten times the bytes.

    Shapes: returns (R, number of temperatures).
    """
    columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
    for number in range(len(transfer_set)):
        row = transfer_set.row(number)
        ends = np.cumsum(row.counts)
        targets = [slice(end - count, end) for end, count in zip(ends, row.counts, strict=True)]
        columns["input_ids"].append(row.input_ids)
        columns["spans"].append(row.spans.tolist())
        columns["token_ids"].append([row.token_ids[target].tolist() for target in targets])
        columns["logprobs"].append([row.logprobs[target].tolist() for target in targets])
        columns["log_normalizers"].append(row.log_normalizers.tolist())
        columns["finished"].append(row.finished)
    return Dataset.from_dict(columns, features=_FEATURES)


def from_dataset(dataset: Dataset, path: str | Path, plan: Plan) -> str:
    """Write a table with the columns of `to_dataset` as a transfer set."""
    require_columns(dataset, _FEATURES)
    if len(dataset) != plan.num_prompts:
        raise DataError(f"The table has {len(dataset)} rows, the plan {plan.num_prompts} prompts; make them equal.")

    def read(row: dict[str, Any]) -> TransferRow:
        return TransferRow(
            input_ids=np.asarray(row["input_ids"], dtype=np.int64),
            spans=np.asarray(row["spans"], dtype=np.int64).reshape(-1, 2),
            counts=np.array([len(ids) for ids in row["token_ids"]], dtype=np.int64),
            token_ids=_flatten(row["token_ids"], np.int64),
            logprobs=_flatten(row["logprobs"], np.float32),
            log_normalizers=np.asarray(row["log_normalizers"], dtype=np.float32).reshape(-1, len(plan.temperatures)),
            finished=bool(row["finished"]),
        )

    with TransferSetWriter.open(path, plan) as writer:
        for task in writer.claim():
            writer.commit(task, [read(dataset[number]) for number in range(task.start, task.stop)])
        return writer.finalize()


def require_columns(dataset: Dataset, columns: Any) -> None:
    """Refuse a table that lacks columns."""
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        raise DataError(
            f"The table lacks the columns {missing}; it has {dataset.column_names}. Rename its columns, or choose "
            "another table."
        )


def _flatten(parts: list[list[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype=dtype) for part in parts)])
