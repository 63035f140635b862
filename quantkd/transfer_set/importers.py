"""Transfer sets from the tables of other distillation toolkits."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from datasets import Dataset, load_from_disk
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray

from quantkd.errors import DataError
from quantkd.transfer_set.batch import IGNORE_INDEX
from quantkd.transfer_set.distillkit import CompressedLayout
from quantkd.transfer_set.interchange import require_columns
from quantkd.transfer_set.plan import Plan
from quantkd.transfer_set.row import MASS_SLACK, TransferRow
from quantkd.transfer_set.rules import TopK, storage_rule_to_dict
from quantkd.transfer_set.writer import TransferSetWriter

ROWS_PER_SHARD = 1024
_PADDING_LOGPROB = -1e8  # toolkits pad with -inf or -1e9
_LAYOUT_FILE = "compression_config.yaml"

Source: TypeAlias = "Dataset | str | Path | list[str]"
_Reader = Callable[[dict[str, Any]], tuple[TransferRow, int]]  # a row, and how many of its targets were rescaled


@dataclass(frozen=True)
class _Facts:
    """What a table does not say about itself."""

    vocab_size: int
    teacher_name: str
    tokenizer_fingerprint: str
    profile: str
    rows_per_shard: int


def import_axolotl(
    source: Source, path: str | Path, *, vocab_size: int, teacher_name: str,
    tokenizer_fingerprint: str, profile: str = "faithful", rows_per_shard: int = ROWS_PER_SHARD,
) -> str:  # fmt: skip
    """Write Axolotl's prepared distillation rows as a transfer set.

    Reads `input_ids`, `labels`, `target_token_ids`, `target_logprobs` and `target_mask`, where position t of the last
    three describes the token at t. Axolotl renormalises over its top k, so the rows have no tail. Rows must have been
    prepared with `kd_temperature: 1.0`.

    Args:
        source: the table, its parquet files, or a folder: of parquet files, or one that `save_to_disk` wrote, as
            Axolotl's `dataset_prepared_path` is.
        path: the new set's folder.
        vocab_size: width of the teacher's logits.
        teacher_name: what made the rows.
        tokenizer_fingerprint: of the teacher's tokenizer, from `quantkd.transfer_set.fingerprint.compute_fingerprint`.
        profile: "faithful" or "compact".
        rows_per_shard: rows in one file.

    Returns:
        The root digest.

    Raises:
        DataError: a source that cannot be read, missing columns, or lists that do not fit together.
        TransferSetError: a row that is not valid, or another set at `path`.

    Reference:
        `integrations/kd/chat_template.py` in github.com/axolotl-ai-cloud/axolotl.
    """
    columns = ("input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask")

    def read(row: dict[str, Any]) -> tuple[TransferRow, int]:
        if len({len(row[name]) for name in columns}) != 1:
            raise ValueError(f"{columns} must be of one length")  # arrays of length 1 would broadcast
        mask = np.asarray(row["target_mask"], dtype=bool)
        targets = np.flatnonzero(mask.any(-1) & (np.asarray(row["labels"]) != IGNORE_INDEX))
        return _row(
            row["input_ids"], targets[targets >= 1], np.asarray(row["target_token_ids"]),
            np.where(mask, np.asarray(row["target_logprobs"], dtype=np.float64), -np.inf), shift=0,
        )  # fmt: skip

    facts = _Facts(vocab_size, teacher_name, tokenizer_fingerprint, profile, rows_per_shard)
    table = _open(source)
    require_columns(table, columns)
    return _import(table, path, read, facts)


def import_distillkit(
    source: Source, path: str | Path, *, vocab_size: int, teacher_name: str,
    tokenizer_fingerprint: str, profile: str = "faithful", rows_per_shard: int = ROWS_PER_SHARD,
    layout: CompressedLayout | None = None,
) -> str:  # fmt: skip
    """Write a teacher table of DistillKit as a transfer set.

    Reads `input_ids`, if there `labels`, and the top k in either of two forms: compressed, as DistillKit's capture
    writes it (`compressed_logprobs` and `bytepacked_indices`, with `compression_config.yaml` beside the files), or
    plain (`token_ids` and `top_values`, which are log-probabilities). Position t of the top k describes the token at
    t + 1. Without `labels` every token but the first is a target, and so is the padding token that the capture adds.

    Compression can leave a position with a mass above 1. Such a position is scaled back to 1, and the set counts how
    many there were as `targets_rescaled`.

    Args:
        source: the table, its parquet files, or a folder that holds them.
        path: the new set's folder.
        vocab_size: width of the teacher's logits.
        teacher_name: what made the rows.
        tokenizer_fingerprint: of the teacher's tokenizer, from `quantkd.transfer_set.fingerprint.compute_fingerprint`.
        profile: "faithful" or "compact".
        rows_per_shard: rows in one file.
        layout: of compressed rows; None reads the file in the folder of the source.

    Returns:
        The root digest.

    Raises:
        DataError: a source that cannot be read, missing columns, lists that do not fit together, or rows of the older
            form that keeps centred logits, from which no probability follows.
        TransferSetError: a row that is not valid, or another set at `path`.

    Reference:
        `distillkit/compression` and `sample_logits_vllm.py` in github.com/arcee-ai/DistillKit.
    """
    table = _open(source)
    if {"packed_indices", "exact_values", "coeffs"} <= set(table.column_names):
        raise DataError(
            "The table holds DistillKit's older form, centred logits of the top k, which say nothing about the mass "
            "outside it. Expected log-probabilities; capture again with a newer DistillKit, or with `quantkd capture`."
        )
    compressed = "compressed_logprobs" in table.column_names
    names = ("bytepacked_indices", "compressed_logprobs") if compressed else ("token_ids", "top_values")
    require_columns(table, ("input_ids", *names))
    if compressed and layout is None:
        layout = CompressedLayout.load(_folder_of(source) / _LAYOUT_FILE)

    def read(row: dict[str, Any]) -> tuple[TransferRow, int]:
        ids, values = row[names[0]], row[names[1]]
        if compressed and layout is not None:
            ids, values = layout.decode_ids(ids), layout.decode_logprobs(values)
        values = np.asarray(values, dtype=np.float64)
        targets = np.arange(1, min(len(row["input_ids"]), len(values) + 1))
        if row.get("labels") is not None:
            targets = targets[np.asarray(row["labels"])[targets] != IGNORE_INDEX]
        return _row(row["input_ids"], targets, np.asarray(ids), values, shift=1, rescale=compressed)

    facts = _Facts(vocab_size, teacher_name, tokenizer_fingerprint, profile, rows_per_shard)
    return _import(table, path, read, facts)


def _row(
    input_ids: list[int],
    targets: NDArray[np.int64],
    token_ids: NDArray[Any],
    logprobs: NDArray[np.float64],
    shift: int,
    rescale: bool = False,
) -> tuple[TransferRow, int]:
    """A row from dense (positions, k) tables without their padding; each target is read `shift` positions before it."""
    ids, values = token_ids[targets - shift], logprobs[targets - shift]  # (R, k)
    keep = values > _PADDING_LOGPROB  # false for NaN, too, which a polynomial makes of an entry of -inf
    rescaled = 0
    if rescale:
        mass = np.exp(np.where(keep, values, -np.inf)).sum(-1, keepdims=True)
        rescaled = int((mass > 1 + MASS_SLACK).sum())
        values = values - np.log(np.maximum(mass, 1.0))
    cuts = np.flatnonzero(np.diff(targets) != 1) + 1
    runs = np.split(targets, cuts) if len(targets) else []
    row = TransferRow(
        input_ids=np.asarray(input_ids, dtype=np.int64),
        spans=np.array([[run[0], run[-1] + 1] for run in runs], dtype=np.int64).reshape(-1, 2),
        counts=keep.sum(-1),
        token_ids=ids[keep].astype(np.int64),
        logprobs=values[keep].astype(np.float32),
        log_normalizers=np.zeros((len(targets), 1), dtype=np.float32),
    )
    return row, rescaled


def _open(source: Source) -> Dataset:
    """The table that a source names."""
    if isinstance(source, Dataset):
        return source
    paths = [Path(path) for path in (source if isinstance(source, list) else [source])]
    missing = [str(path) for path in paths if not path.exists()]
    if missing or not paths:
        raise DataError(f"There is no {', '.join(missing) or 'file given'}. Give parquet files, or a folder with them.")
    folder = paths[0]
    if len(paths) == 1 and folder.is_dir():
        if (folder / "state.json").is_file():
            table = load_from_disk(str(folder))
            if not isinstance(table, Dataset):
                raise DataError(
                    f"{folder} holds the splits {sorted(table)}; expected one table. Give a split's folder."
                )
            return table
        # data_10 after data_9, so that rows keep the order in which they were written.
        paths = sorted(folder.glob("*.parquet"), key=lambda path: [*map(int, re.findall(r"\d+", path.stem))])
        if not paths:
            found = sorted(entry.name for entry in folder.iterdir())[:8]
            raise DataError(
                f"{folder} holds {found or 'nothing'}; expected *.parquet files, or what save_to_disk writes."
            )
    try:
        return Dataset.from_parquet([str(path) for path in paths])
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{paths[0]} cannot be read: {error}. Expected Parquet files of one schema; write them again."
        ) from error


def _folder_of(source: Source) -> Path:
    """Where the files of a source lie."""
    if isinstance(source, Dataset):
        files = [file["filename"] for file in source.cache_files]
        raise DataError(
            f"The table of {files or 'rows in memory'} is compressed, and the layout is not given. "
            "Load compression_config.yaml with CompressedLayout.load, and pass it as layout."
        )
    path = Path(source[0] if isinstance(source, list) else source)
    return path if path.is_dir() else path.parent


def _import(table: Dataset, path: str | Path, read: _Reader, facts: _Facts) -> str:
    """Read the table once to check it and to learn its plan, and once to write it."""
    digest, most = hashlib.sha256(), 0
    for number, values in enumerate(table):
        try:
            row, _ = read(values)
        except (ValueError, IndexError, TypeError) as error:
            raise DataError(f"Row {number} has lists that do not fit together: {error}. Repair it.") from error
        digest.update(np.asarray([len(row.input_ids), *row.input_ids], dtype="<i8").tobytes())
        most = max(most, int(row.counts.max(initial=0)))
    if not most:
        raise DataError(f"None of the {len(table)} rows has a target with entries. Choose another table.")
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
        num_prompts=len(table),
        rows_per_shard=facts.rows_per_shard,
        batch_size=1,
    )
    with TransferSetWriter.open(path, plan) as writer:
        for task in writer.claim():
            rows, rescaled = zip(*(read(table[number]) for number in range(task.start, task.stop)), strict=True)
            writer.commit(task, rows, {"targets_rescaled": sum(rescaled)} if sum(rescaled) else None)
        return writer.finalize()
