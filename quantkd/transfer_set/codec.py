"""Rows to tensors and back. The tensors are what a shard holds; docs/transfer-set-format.md defines each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkd.transfer_set.encoded import CHECKSUM, COLUMNS, SPANS, TOKENS, RowCodes, ShardSize
from quantkd.transfer_set.idpacking import decode_rest, encode_rest
from quantkd.transfer_set.plan import Plan, max_entries
from quantkd.transfer_set.profiles import PROFILES
from quantkd.transfer_set.quantization import (
    decode_logprobs,
    decode_normalizers,
    encode_logprobs,
    encode_normalizers,
    expand,
)
from quantkd.transfer_set.row import TransferRow


@dataclass(frozen=True)
class DecodedRows:
    """Some rows, flat: B rows of T tokens, R targets and E entries in all.

    Args:
        lengths: (B,) tokens per row.
        input_ids: (T,) int64.
        targets: (R,) int64, each target's index into `input_ids`.
        target_counts: (B,) targets per row.
        span_counts: (B,) spans per row.
        spans: (S, 2), as stored: relative to the row.
        counts: (R,) entries per target.
        token_ids: (E,) int64.
        logprobs: (E,) float32.
        log_normalizers: (R, number of temperatures) float32.
        finished: (B,) bool.
    """

    lengths: NDArray[np.int64]
    input_ids: NDArray[np.int64]
    targets: NDArray[np.int64]
    target_counts: NDArray[np.int64]
    span_counts: NDArray[np.int64]
    spans: NDArray[np.int64]
    counts: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    logprobs: NDArray[np.float32]
    log_normalizers: NDArray[np.float32]
    finished: NDArray[np.bool_]

    def rows(self) -> list[TransferRow]:
        """The rows one by one."""
        token_ends = np.cumsum(self.lengths)
        target_ends = np.cumsum(self.target_counts)
        span_ends = np.cumsum(self.span_counts)
        entry_ends = np.append(0, np.cumsum(self.counts))
        rows = []
        for row in range(len(self.lengths)):
            tokens = slice(token_ends[row] - self.lengths[row], token_ends[row])
            targets = slice(target_ends[row] - self.target_counts[row], target_ends[row])
            spans = slice(span_ends[row] - self.span_counts[row], span_ends[row])
            entries = slice(entry_ends[targets.start], entry_ends[targets.stop])
            rows.append(
                TransferRow(
                    input_ids=self.input_ids[tokens],
                    spans=self.spans[spans],
                    counts=self.counts[targets],
                    token_ids=self.token_ids[entries],
                    logprobs=self.logprobs[entries],
                    log_normalizers=self.log_normalizers[targets],
                    finished=bool(self.finished[row]),
                )
            )
        return rows


class Codec:
    """The encoding that a plan asks for.

    Args:
        plan: its vocabulary, profile, storage rule and temperatures decide every width.
    """

    def __init__(self, plan: Plan) -> None:
        self.vocab_size = plan.vocab_size
        self.temperatures = plan.temperatures
        self.max_entries = max_entries(plan.rule, plan.vocab_size)
        self.levels = PROFILES[plan.profile].levels
        self.fine = self.levels > 2**8
        self.num_normalizers = sum(t != 1.0 for t in plan.temperatures)
        bits = (plan.vocab_size - 1).bit_length()
        self.id_dtype = np.dtype("<u2" if bits > 8 else "u1")
        self.high_bits = max(0, bits - 16)
        self.count_dtype = np.dtype("u1" if self.max_entries < 2**8 else "<u2" if self.max_entries < 2**16 else "<u4")

    def tensors(self, size: ShardSize) -> list[tuple[str, np.dtype[Any], tuple[int, ...]]]:
        """Name, dtype and shape of every tensor of a shard, in file order: wide items first, so all are aligned."""
        byte = np.dtype("u1")
        planes, fine = self.high_bits, self.fine
        optional = [
            ("log_normalizers", np.dtype("<u2") if fine else byte, (size.targets, self.num_normalizers)),
            ("logprobs_fine", byte, (size.targets,)),
            ("first_ids_high", byte, (planes, -(-size.targets // 8))),
            ("input_ids_high", byte, (planes, -(-size.explicit // 8))),
        ]
        present = [self.num_normalizers > 0, fine, planes > 0, planes > 0]
        tensors = [
            ("rows", np.dtype("<u4"), (size.rows, COLUMNS)),
            ("spans", np.dtype("<u4"), (size.spans, 2)),
            ("counts", self.count_dtype, (size.targets,)),
            ("first_ids", self.id_dtype, (size.targets,)),
            ("input_ids", self.id_dtype, (size.explicit,)),
            ("rest_low", byte, (size.low,)),
            ("rest_high", byte, (size.high,)),
            ("logprobs", byte, (size.entries,)),
            *[tensor for tensor, wanted in zip(optional, present, strict=True) if wanted],
            ("label_is_first", byte, (-(-size.targets // 8),)),
            ("finished", byte, (size.rows,)),
        ]
        return sorted(tensors, key=lambda tensor: -tensor[1].itemsize)

    def encode(self, rows: Sequence[TransferRow]) -> tuple[ShardSize, dict[str, NDArray[Any]]]:
        """The tensors of a shard that holds `rows`. The rows must be valid.

        Each target's entries are stored with the most probable one first and the others by ascending id.
        """
        codes = [self._encode_row(row) for row in rows]
        size = ShardSize(
            rows=len(rows),
            tokens=sum(len(row.input_ids) for row in rows),
            explicit=sum(len(row.input_ids) for row in codes),
            spans=sum(len(row.spans) for row in rows),
            targets=sum(len(row.counts) for row in rows),
            entries=sum(len(row.token_ids) for row in rows),
            low=sum(len(row.rest_low) for row in codes),
            high=sum(len(row.rest_high) for row in codes),
        )
        tensors: dict[str, NDArray[Any]] = {}
        for name, dtype, shape in self.tensors(size):
            parts = [getattr(row, name) for row in codes]
            stored: NDArray[Any]
            if name in ("first_ids_high", "input_ids_high"):
                stored = np.stack([_pack([part[plane] for part in parts]) for plane in range(self.high_bits)])
            elif name == "label_is_first":
                stored = _pack(parts)
            else:
                stored = np.concatenate(parts) if parts else np.zeros(shape)
            tensors[name] = stored.astype(dtype).reshape(shape)
        return size, tensors

    def decode(self, codes: RowCodes) -> DecodedRows:
        """The rows behind `codes`, without a loop over rows or tokens."""
        lengths = codes.rows[:, TOKENS].astype(np.int64)
        span_counts = codes.rows[:, SPANS].astype(np.int64)
        spans = codes.spans.astype(np.int64)
        widths = spans[:, 1] - spans[:, 0]
        row_starts = np.cumsum(lengths) - lengths
        targets = expand(spans[:, 0] + np.repeat(row_starts, span_counts), widths)
        counts = codes.counts.astype(np.int64)
        starts = np.cumsum(counts) - counts
        width_ends = np.append(0, np.cumsum(widths))
        row_ends = np.append(0, np.cumsum(span_counts))
        first_ids = _join(codes.first_ids, codes.first_ids_high)
        token_ids = np.empty(len(codes.logprobs), dtype=np.int64)
        is_rest = np.ones(len(token_ids), dtype=bool)
        is_rest[starts] = False
        token_ids[starts] = first_ids
        token_ids[is_rest] = decode_rest(
            codes.rest_low, codes.rest_high, counts - 1, width_ends[row_ends], self.vocab_size
        )
        first_codes = codes.logprobs[starts].astype(np.int64)
        if self.fine:
            first_codes = first_codes * 256 + codes.logprobs_fine
        input_ids = np.empty(int(lengths.sum()), dtype=np.int64)
        elided = np.zeros(len(input_ids), dtype=bool)
        is_first = codes.label_is_first.astype(bool)
        elided[targets[is_first]] = True
        input_ids[~elided] = _join(codes.input_ids, codes.input_ids_high)
        input_ids[elided] = first_ids[is_first]
        return DecodedRows(
            lengths=lengths,
            input_ids=input_ids,
            targets=targets,
            target_counts=np.diff(width_ends[row_ends]),
            span_counts=span_counts,
            spans=spans,
            counts=counts,
            token_ids=token_ids,
            logprobs=decode_logprobs(first_codes, codes.logprobs, counts, self.levels),
            log_normalizers=decode_normalizers(codes.log_normalizers, self.temperatures, self.vocab_size, self.levels),
            finished=codes.finished.astype(bool),
        )

    def _encode_row(self, row: TransferRow) -> RowCodes:
        """The stored form of one valid row."""
        counts = row.counts.astype(np.int64)
        starts = np.cumsum(counts) - counts
        order = _storage_order(row, counts)
        token_ids = row.token_ids[order].astype(np.int64)
        first_ids, rest_ids = token_ids[starts], np.delete(token_ids, starts)
        rest_low, rest_high = encode_rest(rest_ids, counts - 1, self.vocab_size)
        first_codes, codes = encode_logprobs(row.logprobs[order], counts, self.levels)
        decoded = decode_logprobs(first_codes, codes, counts, self.levels)
        codes[starts] = first_codes // 256 if self.fine else first_codes
        normalizers = encode_normalizers(
            row.log_normalizers, decoded, counts, self.temperatures, self.vocab_size, self.levels
        )
        spans = row.spans.astype(np.int64)
        targets = expand(spans[:, 0], spans[:, 1] - spans[:, 0])
        input_ids = row.input_ids.astype(np.int64)
        is_first = input_ids[targets] == first_ids
        explicit = np.delete(input_ids, targets[is_first])
        sizes = [len(input_ids), len(explicit), len(token_ids), len(spans), len(rest_low), len(rest_high), 0]
        table = np.array([sizes], dtype="<u4")
        stored = RowCodes(
            rows=table,
            finished=np.array([row.finished], dtype="u1"),
            spans=spans.astype("<u4"),
            input_ids=(explicit & 0xFFFF).astype(self.id_dtype),
            label_is_first=is_first.astype("u1"),
            counts=counts.astype(self.count_dtype),
            first_ids=(first_ids & 0xFFFF).astype(self.id_dtype),
            rest_low=rest_low,
            rest_high=rest_high,
            logprobs=codes.astype("u1"),
            log_normalizers=normalizers.astype("<u2" if self.fine else "u1"),
            logprobs_fine=(first_codes % 256).astype("u1") if self.fine else np.zeros(0, "u1"),
            input_ids_high=_split(explicit, self.high_bits),
            first_ids_high=_split(first_ids, self.high_bits),
        )
        table[0, CHECKSUM] = stored.checksum()
        return stored


def _storage_order(row: TransferRow, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order in which entries are stored: each target's most probable one, then the others by ascending id."""
    targets = np.repeat(np.arange(len(counts)), counts)
    starts = np.cumsum(counts) - counts
    is_rest = np.ones(len(targets), dtype=bool)
    # Of equally probable entries the earliest one comes first.
    is_rest[np.lexsort((-row.logprobs, targets))[starts]] = False
    return np.lexsort((row.token_ids, is_rest, targets))


def _pack(parts: list[NDArray[Any]]) -> NDArray[np.uint8]:
    return np.packbits(np.concatenate([np.zeros(0, "u1"), *parts]), bitorder="little")


def _split(ids: NDArray[np.int64], bits: int) -> tuple[NDArray[np.uint8], ...]:
    return tuple(((ids >> (16 + bit)) & 1).astype("u1") for bit in range(bits))


def _join(low: NDArray[Any], high: tuple[NDArray[Any], ...]) -> NDArray[np.int64]:
    ids: NDArray[np.int64] = low.astype(np.int64)
    for bit, plane in enumerate(high):
        ids |= plane.astype(np.int64) << (16 + bit)
    return ids
