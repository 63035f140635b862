"""Transfer sets to and from `datasets` tables, and from the tables of other distillation toolkits."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from quantkd.errors import DataError
from quantkd.storage import TopK, storage_rule_to_dict
from quantkd.transfer_set.layout import Plan
from quantkd.transfer_set.reader import TransferSet
from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.writer import TransferSetWriter

__all__ = ["from_dataset", "import_axolotl", "import_distillkit", "to_dataset"]

ROWS_PER_SHARD = 1024
_PADDING_LOGPROB = -1e8  # toolkits pad with -inf or -1e9
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


@dataclass(frozen=True)
class _Facts:
    vocab_size: int
    teacher_name: str
    tokenizer_fingerprint: str
    profile: str
    rows_per_shard: int


def to_dataset(transfer_set: TransferSet) -> Dataset:
    """The rows as a `datasets.Dataset`, one list of entries a target; convenient, and about ten times the bytes.

    Returns:
        Columns `input_ids` (L,), `spans` (S, 2), `token_ids` and `logprobs` (R, entries), `log_normalizers`
        (R, number of temperatures), `finished`.
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
    """Write a table with the columns of `to_dataset` as a transfer set.

    Args:
        dataset: the rows; `plan.num_prompts` of them.
        path: the new set's folder.
        plan: what the rows are.

    Returns:
        The root digest.

    Raises:
        DataError: missing columns, or another number of rows than the plan has.
        TransferSetError: a row that is not valid, or another set at `path`.
    """
    _require_columns(dataset, _FEATURES)
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

    return _write(dataset, path, plan, read)


def import_axolotl(
    source: Dataset | str | Path | list[str], path: str | Path, *, vocab_size: int, teacher_name: str,
    tokenizer_fingerprint: str, profile: str = "faithful", rows_per_shard: int = ROWS_PER_SHARD,
) -> str:  # fmt: skip
    """Write Axolotl's prepared distillation rows as a transfer set.

    Reads `input_ids`, `labels`, `target_token_ids`, `target_logprobs` and `target_mask`, where position t of the last
    three describes the token at t. Axolotl renormalises over its top k, so the rows have no tail. Rows must have been
    prepared with `kd_temperature: 1.0`.

    Args:
        source: the table, or its parquet files.
        path: the new set's folder.
        vocab_size: width of the teacher's logits.
        teacher_name: what made the rows.
        tokenizer_fingerprint: sha256 of the tokenizer, in hexadecimal.
        profile: "faithful" or "compact".
        rows_per_shard: rows in one file.

    Returns:
        The root digest.

    Raises:
        DataError: missing columns.
        TransferSetError: a row that is not valid, or another set at `path`.
    """

    columns = ("input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask")

    def read(row: dict[str, Any]) -> TransferRow:
        if len({len(row[name]) for name in columns}) != 1:
            raise ValueError(f"{columns} must be of one length")  # arrays of length 1 would broadcast
        mask = np.asarray(row["target_mask"], dtype=bool)
        targets = np.flatnonzero(mask.any(-1) & (np.asarray(row["labels"]) != -100))
        return _row(
            row["input_ids"], targets[targets >= 1], np.asarray(row["target_token_ids"]),
            np.where(mask, np.asarray(row["target_logprobs"], dtype=np.float32), -np.inf), shift=0,
        )  # fmt: skip

    facts = _Facts(vocab_size, teacher_name, tokenizer_fingerprint, profile, rows_per_shard)
    return _import(source, path, columns, read, facts)


def import_distillkit(
    source: Dataset | str | Path | list[str], path: str | Path, *, vocab_size: int, teacher_name: str,
    tokenizer_fingerprint: str, profile: str = "faithful", rows_per_shard: int = ROWS_PER_SHARD,
) -> str:  # fmt: skip
    """Write DistillKit's uncompressed top-k rows as a transfer set.

    Reads `input_ids`, `token_ids`, `top_values` (log-probabilities) and, if there, `labels`. Position t of the two
    top-k columns describes the token at t + 1. Without `labels` every token but the first is a target.

    Args and Returns are those of `import_axolotl`.

    Raises:
        DataError: missing columns.
        TransferSetError: a row that is not valid, or another set at `path`.
    """

    def read(row: dict[str, Any]) -> TransferRow:
        values = np.asarray(row["top_values"], dtype=np.float32)
        targets = np.arange(1, min(len(row["input_ids"]), len(values) + 1))
        if row.get("labels") is not None:
            targets = targets[np.asarray(row["labels"])[targets] != -100]
        return _row(row["input_ids"], targets, np.asarray(row["token_ids"]), values, shift=1)

    columns = ("input_ids", "token_ids", "top_values")
    facts = _Facts(vocab_size, teacher_name, tokenizer_fingerprint, profile, rows_per_shard)
    return _import(source, path, columns, read, facts)


def _row(
    input_ids: list[int], targets: NDArray[np.int64], token_ids: NDArray[Any], logprobs: NDArray[np.float32], shift: int
) -> TransferRow:
    ids, values = token_ids[targets - shift], logprobs[targets - shift]  # (R, k)
    keep = values > _PADDING_LOGPROB
    cuts = np.flatnonzero(np.diff(targets) != 1) + 1
    runs = np.split(targets, cuts) if len(targets) else []
    return TransferRow(
        input_ids=np.asarray(input_ids, dtype=np.int64),
        spans=np.array([[run[0], run[-1] + 1] for run in runs], dtype=np.int64).reshape(-1, 2),
        counts=keep.sum(-1),
        token_ids=ids[keep].astype(np.int64),
        logprobs=values[keep],
        log_normalizers=np.zeros((len(targets), 1), dtype=np.float32),
    )


def _import(
    source: Dataset | str | Path | list[str],
    path: str | Path,
    columns: tuple[str, ...],
    read: Callable[[dict[str, Any]], TransferRow],
    facts: _Facts,
) -> str:
    if not isinstance(source, Dataset):
        source = Dataset.from_parquet([str(p) for p in source] if isinstance(source, list) else str(source))
    _require_columns(source, columns)
    digest, most = hashlib.sha256(), 0
    for number, values in enumerate(source):
        try:
            row = read(values)
        except (ValueError, IndexError, TypeError) as error:
            raise DataError(f"Row {number} has lists that do not fit together: {error}. Repair it.") from error
        digest.update(np.asarray([len(row.input_ids), *row.input_ids], dtype="<i8").tobytes())
        most = max(most, int(row.counts.max(initial=0)))
    if not most:
        raise DataError(f"None of the {len(source)} rows has a target with entries. Choose another table.")
    plan = Plan(
        teacher_name=facts.teacher_name,
        teacher_revision="",
        teacher_dtype="unknown",
        tokenizer_fingerprint=facts.tokenizer_fingerprint,
        vocab_size=facts.vocab_size,
        storage=storage_rule_to_dict(TopK(most)),
        profile=facts.profile,
        temperatures=(1.0,),
        responses="given",
        generation={},
        prompts_digest=digest.hexdigest(),
        num_prompts=len(source),
        rows_per_shard=facts.rows_per_shard,
        batch_size=1,
    )
    return _write(source, path, plan, read)


def _write(dataset: Dataset, path: str | Path, plan: Plan, read: Callable[[dict[str, Any]], TransferRow]) -> str:
    with TransferSetWriter.open(path, plan) as writer:
        for task in writer.claim():
            writer.commit(task, [read(dataset[number]) for number in range(task.start, task.stop)])
        return writer.finalize()


def _require_columns(dataset: Dataset, columns: Any) -> None:
    missing = [name for name in columns if name not in dataset.column_names]
    if missing:
        raise DataError(
            f"The table lacks the columns {missing}; it has {dataset.column_names}. Rename its columns, or choose "
            "another table."
        )


def _flatten(parts: list[list[Any]], dtype: type[np.generic]) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype=dtype) for part in parts)])
