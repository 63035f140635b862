"""Transfer sets from the tables of other distillation toolkits: Axolotl's prepared rows, and DistillKit's captures."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import yaml
from datasets import Dataset, load_from_disk
from datasets.exceptions import DatasetsError
from numpy.typing import ArrayLike, NDArray

from quantkd.errors import DataError
from quantkd.transfer_set.batch import IGNORE_INDEX
from quantkd.transfer_set.documents import is_whole
from quantkd.transfer_set.plan import Plan
from quantkd.transfer_set.row import MASS_SLACK, TransferRow
from quantkd.transfer_set.rules import TopK, storage_rule_to_dict
from quantkd.transfer_set.writer import TransferSetWriter

_PADDING_LOGPROB = -1e8  # toolkits pad with -inf or -1e9
_COLUMNS = {
    "axolotl": ("input_ids", "labels", "target_token_ids", "target_logprobs", "target_mask"),
    "distillkit": ("input_ids", "token_ids", "top_values"),
    "distillkit_compressed": ("input_ids", "bytepacked_indices", "compressed_logprobs"),
}
_FLOATS = {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}
_TERMS = {"sqrt": np.sqrt, "exp": np.exp}

Source: TypeAlias = "Dataset | str | Path | list[str]"


def import_table(
    source: Source, path: str | Path, *, toolkit: Literal["axolotl", "distillkit"], vocab_size: int,
    teacher_name: str, tokenizer_fingerprint: str,
) -> str:  # fmt: skip
    """Write another toolkit's table of a teacher as a transfer set.

    "axolotl": prepared distillation rows with `input_ids`, `labels`, `target_token_ids`, `target_logprobs` and
    `target_mask`, where position t of the last three describes the token at t. Axolotl renormalises over its top k, so
    the rows have no tail. They must have been prepared with `kd_temperature: 1.0`.

    "distillkit": `input_ids`, optional `labels`, and the top k: compressed, as DistillKit's capture writes it
    (`compressed_logprobs` and `bytepacked_indices`, with `compression_config.yaml` beside the files), or plain
    log-probabilities (`token_ids` and `top_values`). Position t of the top k describes the token at t + 1. Without
    `labels` every token but the first is a target. A position whose mass compression left above 1 is scaled back to 1
    and counted as `targets_rescaled`.

    Args:
        source: the table, its parquet files, or a folder: of parquet files, or one that `save_to_disk` wrote.
        path: the new set's folder.
        toolkit: "axolotl" or "distillkit".
        vocab_size: width of the teacher's logits.
        teacher_name: what made the rows.
        tokenizer_fingerprint: of the teacher's tokenizer, from `quantkd.transfer_set.fingerprint.compute_fingerprint`.

    Returns:
        The root digest.

    Raises:
        DataError: a source that cannot be read, missing columns, or lists that do not fit together.
        TransferSetError: a row that is not valid, or another set at `path`.

    Reference: `integrations/kd` in github.com/axolotl-ai-cloud/axolotl; github.com/arcee-ai/DistillKit.
    """
    table = source if isinstance(source, Dataset) else _load(source)
    is_compressed = toolkit == "distillkit" and "compressed_logprobs" in table.column_names
    needed = _COLUMNS["distillkit_compressed" if is_compressed else toolkit]
    missing = [name for name in needed if name not in table.column_names]
    if missing:
        raise DataError(f"The table lacks the columns {missing}; it has {table.column_names}. Choose another table.")
    layout = CompressedLayout.beside(source) if is_compressed else None
    read = _read_axolotl if toolkit == "axolotl" else lambda row: _read_distillkit(row, layout)
    digest, most = hashlib.sha256(), 0
    for number, values in enumerate(table):  # once to check the table and to learn its plan, and once to write it
        try:
            row, _ = read(values)
        except (ValueError, IndexError, TypeError) as error:
            raise DataError(f"Row {number} has lists that do not fit together: {error}. Repair it.") from error
        digest.update(np.asarray([len(row.input_ids), *row.input_ids], dtype="<i8").tobytes())
        most = max(most, int(row.counts.max(initial=0)))
    if not most:
        raise DataError(f"None of the {len(table)} rows has a target with entries. Choose another table.")
    plan = Plan(
        teacher_name=teacher_name, teacher_revision="", teacher_dtype="unknown", responses="given", generation={},
        tokenizer_fingerprint=tokenizer_fingerprint, vocab_size=vocab_size, storage=storage_rule_to_dict(TopK(most)),
        temperatures=(1.0,), prompts_digest=digest.hexdigest(), num_prompts=len(table), rows_per_shard=1024,
        batch_size=1,
    )  # fmt: skip
    with TransferSetWriter.open(path, plan) as writer:
        for task in writer.claim():
            rows, rescaled = zip(*(read(table[number]) for number in range(task.start, task.stop)), strict=True)
            writer.commit(task, rows, {"targets_rescaled": sum(rescaled)} if sum(rescaled) else None)
        return writer.finalize()


def _read_axolotl(row: dict[str, Any]) -> tuple[TransferRow, int]:
    if len({len(row[name]) for name in _COLUMNS["axolotl"]}) != 1:
        raise ValueError("its columns must be of one length")  # arrays of length 1 would broadcast
    mask = np.asarray(row["target_mask"], dtype=bool)
    targets = np.flatnonzero(mask.any(-1) & (np.asarray(row["labels"]) != IGNORE_INDEX))
    logprobs = np.where(mask, np.asarray(row["target_logprobs"], dtype=np.float64), -np.inf)
    return _make_row(row["input_ids"], targets[targets >= 1], np.asarray(row["target_token_ids"]), logprobs, shift=0)


def _read_distillkit(row: dict[str, Any], layout: CompressedLayout | None) -> tuple[TransferRow, int]:
    if layout is None:
        ids, values = np.asarray(row["token_ids"]), np.asarray(row["top_values"], dtype=np.float64)
    else:
        ids = layout.decode_ids(row["bytepacked_indices"])
        values = layout.decode_logprobs(row["compressed_logprobs"])
    targets = np.arange(1, min(len(row["input_ids"]), len(values) + 1))
    if row.get("labels") is not None:
        targets = targets[np.asarray(row["labels"])[targets] != IGNORE_INDEX]
    return _make_row(row["input_ids"], targets, ids, values, shift=1, rescale=layout is not None)


def _make_row(
    input_ids: list[int], targets: NDArray[np.int64], token_ids: NDArray[Any], logprobs: NDArray[np.float64],
    shift: int, rescale: bool = False,
) -> tuple[TransferRow, int]:  # fmt: skip
    """A row from dense (positions, k) tables, each target `shift` positions before it, and how many were rescaled."""
    ids, values = token_ids[targets - shift], logprobs[targets - shift]  # (R, k)
    keep = values > _PADDING_LOGPROB  # false for NaN, too, which a polynomial makes of an entry of -inf
    mass = np.exp(np.where(keep, values, -np.inf)).sum(-1, keepdims=True)
    rescaled = int((mass > 1 + MASS_SLACK).sum()) if rescale else 0
    values = values - np.log(np.maximum(mass, 1.0)) if rescale else values
    is_target = np.zeros(len(input_ids) + 1, dtype=np.int64)
    is_target[targets] = 1
    row = TransferRow(
        input_ids=np.asarray(input_ids, dtype=np.int64),
        spans=np.flatnonzero(np.diff(is_target, prepend=0)).reshape(-1, 2),  # where a run of targets starts and stops
        counts=keep.sum(-1),
        token_ids=ids[keep].astype(np.int64),
        logprobs=values[keep].astype(np.float32),
        log_normalizers=np.zeros((len(targets), 1), dtype=np.float32),
    )
    return row, rescaled


@dataclass(frozen=True)
class CompressedLayout:
    """How DistillKit lays out the k most probable of d tokens; the fields are those of `compression_config.yaml`.

    The first `exact_k` log-probabilities are floats; the others a polynomial in the rank, corrected by runs of
    residuals. With `delta_encoding` each number is the difference to the one before it, and with `normalize_t` the rank
    runs from 0 to 1.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str = "float32"
    polynomial_terms: Sequence[int | str] | None = None
    term_dtype: str = "float32"
    residual_bins: Sequence[dict[str, Any]] | None = None
    delta_encoding: bool = True
    normalize_t: bool = False
    error_diffusion: bool = False  # of no use to a reader

    def __post_init__(self) -> None:
        floats = {self.exact_dtype, self.term_dtype, *(part["scale_dtype"] for part in self.residual_bins or ())}
        if not floats <= set(_FLOATS):
            raise ValueError(f"dtypes {sorted(floats)}, expected {', '.join(_FLOATS)}")
        residuals = sum(part["num_elements"] for part in self.residual_bins or ())
        if not is_whole(self.k, 1, self.d) or not is_whole(self.exact_k, 0, self.k - residuals):
            raise ValueError(f"k is {self.k!r} of d = {self.d!r}, exact_k {self.exact_k!r}, with {residuals} residuals")

    @classmethod
    def beside(cls, source: Source) -> CompressedLayout:
        """The layout from the file beside a table's files."""
        if isinstance(source, Dataset):
            raise DataError("The rows are compressed, and a table in memory does not say how. Give its folder.")
        path = Path(source[0] if isinstance(source, list) else source)
        path = (path if path.is_dir() else path.parent) / "compression_config.yaml"
        try:
            return cls(**yaml.safe_load(path.read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError, TypeError, ValueError, KeyError) as error:
            raise DataError(f"{path} does not say how the table was compressed: {error}. Copy DistillKit's.") from error

    def decode_ids(self, data: ArrayLike) -> NDArray[np.int64]:
        """(T, k) token ids from `bytepacked_indices`."""
        bits = (self.d - 1).bit_length()
        return _unpack(_to_table(data, -(-self.k * bits // 8), "ids"), bits, self.k)

    def decode_logprobs(self, data: ArrayLike) -> NDArray[np.float64]:
        """(T, k) log-probabilities from `compressed_logprobs`."""
        terms, bins = self.polynomial_terms or (), self.residual_bins or ()
        widths = [-(-part["element_bits"] * part["num_elements"] // 8) for part in bins]
        floats = [self.exact_dtype] * self.exact_k + [self.term_dtype] * len(terms) + [p["scale_dtype"] for p in bins]
        table = _to_table(data, sum(widths) + sum(_FLOATS[dtype] for dtype in floats), "log-probabilities")
        exact, table = _take_floats(table, self.exact_k, self.exact_dtype)
        coefficients, table = _take_floats(table, len(terms), self.term_dtype)
        count = self.k - self.exact_k
        rank = np.linspace(0.0, 1.0, count) if self.normalize_t else np.arange(count, dtype=np.float64)
        approximate = np.zeros((len(exact), count))
        for column, term in enumerate(terms):
            power = _TERMS[term](rank) if isinstance(term, str) else rank**term
            approximate += coefficients[:, column : column + 1] * power
        start = 0
        for part, width in zip(bins, widths, strict=True):
            scale, table = _take_floats(table, 1, part["scale_dtype"])
            codes = _unpack(table[:, :width], part["element_bits"], part["num_elements"])
            # One bit is a sign; more are a whole number around 0.
            steps = 2 * codes - 1 if part["element_bits"] == 1 else codes - 2 ** (part["element_bits"] - 1)
            approximate[:, start : start + part["num_elements"]] += steps * scale
            start, table = start + part["num_elements"], table[:, width:]
        logprobs = np.concatenate([exact, approximate], axis=1)
        return np.cumsum(logprobs, axis=1) if self.delta_encoding else logprobs


def _to_table(data: ArrayLike, width: int, what: str) -> NDArray[np.uint8]:
    table = np.asarray(data, dtype=np.uint8)
    if table.shape[1:] != (width,):
        raise ValueError(f"{what} of shape {table.shape}, expected {width} bytes per position")
    return table


def _unpack(table: NDArray[np.uint8], bits: int, count: int) -> NDArray[np.int64]:
    """(T, count) whole numbers of `bits` bits each, the highest bit first, from (T, B) bytes."""
    flat = np.unpackbits(table, axis=1)[:, : bits * count].reshape(len(table), count, bits)
    return flat.astype(np.int64) @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))


def _take_floats(table: NDArray[np.uint8], count: int, dtype: str) -> tuple[NDArray[np.float64], NDArray[np.uint8]]:
    """The first `count` floats of each position as float64, and the bytes after them."""
    raw, rest = np.ascontiguousarray(table[:, : count * _FLOATS[dtype]]), table[:, count * _FLOATS[dtype] :]
    if dtype == "bfloat16":  # the upper half of a float32
        return (raw.view("<u2").astype("<u4") << 16).view("<f4").astype(np.float64), rest
    return raw.view(f"<f{_FLOATS[dtype]}").astype(np.float64), rest


def _load(source: str | Path | list[str]) -> Dataset:
    paths = [Path(path) for path in (source if isinstance(source, list) else [source])]
    is_saved = (paths[0] / "state.json").is_file()
    if paths[0].is_dir() and not is_saved:
        # data_10 after data_9, so that rows keep the order in which they were written.
        found = sorted(paths[0].glob("*.parquet"), key=lambda path: [*map(int, re.findall(r"\d+", path.stem))])
        if not found:
            raise DataError(f"{paths[0]} holds no *.parquet, nor what save_to_disk writes. Name another folder.")
        paths = found
    try:
        return load_from_disk(str(paths[0])) if is_saved else Dataset.from_parquet([str(path) for path in paths])
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{paths[0]} cannot be read: {error}. Expected Parquet files of one schema.") from error
