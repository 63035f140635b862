"""The stored form of rows, and the numbers that size it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkd.transfer_set.idpacking import rest_bytes

_POPCOUNT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1, dtype=np.uint8)
MAX_SHARD_ROWS = 2**16
MAX_SHARD_SPANS = 2**20
MAX_SHARD_ITEMS = 2**32 - 1

# The columns of the tensor `rows`.
TOKENS, EXPLICIT, ENTRIES, SPANS, LOW, HIGH, CHECKSUM = range(7)
COLUMNS = 7


@dataclass(frozen=True)
class ShardSize:
    """The numbers that a shard's tensors are sized by.

    Args:
        rows: N.
        tokens: tokens of all rows.
        explicit: tokens stored in `input_ids`; the others are the first entry of their target.
        spans: S.
        targets: R.
        entries: E.
        low: bytes of `rest_low`.
        high: bytes of `rest_high`.
    """

    rows: int
    tokens: int
    explicit: int
    spans: int
    targets: int
    entries: int
    low: int
    high: int

    def is_possible(self) -> bool:
        """Whether some rows could have these numbers, within the limits of the format."""
        return (
            0 <= self.rows <= min(MAX_SHARD_ROWS, self.tokens)
            and 0 <= self.spans <= min(MAX_SHARD_SPANS, self.targets)
            and self.targets <= self.entries <= MAX_SHARD_ITEMS
            and 0 <= self.low <= 3 * self.entries + self.rows
            and 0 <= self.high <= 3 * self.entries + self.rows
            and 0 <= self.tokens - self.targets <= self.explicit <= self.tokens <= MAX_SHARD_ITEMS
        )


@dataclass(frozen=True)
class RowCodes:
    """The stored form of some rows, one array a tensor, end to end. Bits are unpacked, one a byte."""

    rows: NDArray[Any]  # (B, 7)
    finished: NDArray[Any]  # (B,)
    spans: NDArray[Any]  # (S, 2)
    input_ids: NDArray[Any]  # (X,)
    label_is_first: NDArray[Any]  # (R,)
    counts: NDArray[Any]  # (R,)
    first_ids: NDArray[Any]  # (R,)
    rest_low: NDArray[Any]  # bytes
    rest_high: NDArray[Any]  # bytes
    logprobs: NDArray[Any]  # (E,)
    log_normalizers: NDArray[Any]  # (R, M)
    logprobs_fine: NDArray[Any]  # (R,), or (0,) in the profile compact
    input_ids_high: tuple[NDArray[Any], ...] = ()  # per bit above the 16th, (X,)
    first_ids_high: tuple[NDArray[Any], ...] = ()  # per bit above the 16th, (R,)

    @classmethod
    def empty(cls, num_normalizers: int, high_bits: int) -> RowCodes:
        """No rows at all."""
        nothing = np.zeros(0, "u1")
        planes = (nothing,) * high_bits
        return cls(
            rows=np.zeros((0, COLUMNS), "<u4"),
            finished=nothing,
            spans=np.zeros((0, 2), "<u4"),
            input_ids=nothing,
            label_is_first=nothing,
            counts=nothing,
            first_ids=nothing,
            rest_low=nothing,
            rest_high=nothing,
            logprobs=nothing,
            log_normalizers=np.zeros((0, num_normalizers), "u1"),
            logprobs_fine=nothing,
            input_ids_high=planes,
            first_ids_high=planes,
        )

    def checksum(self) -> int:
        """crc32 over one row: every array in the order of the fields, without the checksum itself."""
        fields = list(vars(self).values())
        return zlib.crc32(b"".join([fields[0][0, :CHECKSUM].tobytes(), *_buffers(fields[1:])]))

    def find_fault(self, max_entries: int, vocab_size: int) -> tuple[int, str] | None:
        """The first row whose numbers contradict each other, with what is wrong; None if all agree."""
        rows = self.rows.astype(np.int64)
        span_edges = np.append(0, np.cumsum(rows[:, SPANS]))
        row_ends = np.append(0, np.cumsum(self.spans[:, 1].astype(np.int64) - self.spans[:, 0]))[span_edges]
        counts = self.counts.astype(np.int64)
        entries = np.diff(np.append(0, np.cumsum(counts))[row_ends])
        elided = np.diff(np.append(0, np.cumsum(self.label_is_first, dtype=np.int64))[row_ends])
        owner = np.repeat(np.arange(len(rows)), np.diff(row_ends))
        low, high = rest_bytes(np.maximum(counts - 1, 0), row_ends, vocab_size)
        high_edges = np.append(0, np.cumsum(rows[:, HIGH]))
        ones = np.diff(np.append(0, np.cumsum(_POPCOUNT[self.rest_high], dtype=np.int64))[high_edges])
        faults = {
            "has a finished flag above 1": self.finished > 1,
            "has counts that do not sum to its entries": entries != rows[:, ENTRIES],
            "has more or fewer explicit ids than its flags ask for": rows[:, TOKENS] - elided != rows[:, EXPLICIT],
            "has id streams of another length than its counts ask for": (low != rows[:, LOW]) | (high != rows[:, HIGH]),
            "has more or fewer ids than its counts ask for": ones != entries - np.diff(row_ends),
        }
        bad = {what: np.flatnonzero(wrong) for what, wrong in faults.items()}
        bad[f"has a target without entries, or with more than {max_entries}"] = owner[
            (counts < 1) | (counts > max_entries)
        ]
        return min(((int(at[0]), what) for what, at in bad.items() if len(at)), default=None)


def _buffers(fields: list[Any]) -> list[bytes]:
    return [array.tobytes() for field in fields for array in (field if isinstance(field, tuple) else (field,))]
