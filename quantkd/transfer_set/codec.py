"""Rows to the compressed blocks of a shard and back; docs/transfer-set-format.md defines every byte."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkd.errors import TransferSetError
from quantkd.transfer_set.documents import is_whole
from quantkd.transfer_set.plan import MAX_SHARD_ROWS, Plan
from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.rules import max_entries

MAX_SHARD_SPANS = 2**20
MAX_SHARD_ITEMS = 2**32 - 1
BLOCK_ROWS = 8
BLOCK_BYTES = 2**20
MAX_BLOCK_BYTES = 2**27  # above any single row; reading one stays below 300 MiB whatever a set says
_HALF = np.dtype("<f2")
_LEAST = float(np.finfo(np.float16).min)


@dataclass(frozen=True)
class ShardSize:
    """The numbers that a shard's tensors are sized by: its rows, their sums, and the blocks that hold them."""

    rows: int
    tokens: int
    spans: int
    targets: int
    entries: int
    blocks: int
    bytes: int

    def is_possible(self) -> bool:
        """Whether some rows could have these numbers, within the limits of the format."""
        return (
            all(is_whole(number, 0, MAX_SHARD_ITEMS) for number in vars(self).values())
            and self.rows <= min(MAX_SHARD_ROWS, self.tokens)
            and self.spans <= min(MAX_SHARD_SPANS, self.targets)
            and self.targets <= min(self.entries, self.tokens - self.rows)
            and (self.rows > 0) <= self.blocks <= min(self.rows, self.bytes)
        )


class Codec:
    """The encoding that a plan asks for: its vocabulary, storage rule and temperatures decide every width."""

    def __init__(self, plan: Plan) -> None:
        self.vocab_size = plan.vocab_size
        self.temperatures = plan.temperatures
        self.max_entries = max_entries(plan.rule, plan.vocab_size)
        self._scaled = [column for column, temperature in enumerate(plan.temperatures) if temperature != 1.0]
        self._id = np.dtype("<u2" if plan.vocab_size <= 2**16 else "<u4")
        self._count = np.dtype("u1" if self.max_entries < 2**8 else "<u2" if self.max_entries < 2**16 else "<u4")

    def _columns(self, rows: Any, table: Any) -> list[tuple[np.dtype[Any], Any]]:
        """Dtype and number of items of each array of a block; `table` holds sums, of one block or of several."""
        tokens, spans, targets, entries = (table[..., column] for column in range(4))
        return [
            (np.dtype("u1"), rows),  # finished
            (np.dtype("<u4"), 2 * spans),
            (self._id, tokens),
            (self._count, targets),
            (self._id, entries),
            (_HALF, entries),
            (_HALF, targets * len(self._scaled)),
        ]

    def block_bytes(self, rows: Any, table: Any) -> Any:
        """Bytes of blocks before compression, from their numbers of rows and (..., 4) their sums of the row table."""
        return sum(dtype.itemsize * items for dtype, items in self._columns(rows, table))

    def encode(self, rows: Sequence[TransferRow]) -> tuple[ShardSize, dict[str, NDArray[Any]]]:
        """The size and the tensors of a shard that holds `rows`, which must be valid."""
        parts = [(row.input_ids, row.spans, row.counts, row.token_ids) for row in rows]
        table = np.array([list(map(len, part)) for part in parts], dtype=np.int64).reshape(-1, 4)
        blocks, packed, start = [], [], 0
        while start < len(rows):
            stop = start + 1
            # A row of a megabyte gets a block of its own, so that it can be read alone.
            while (
                stop < min(len(rows), start + BLOCK_ROWS)
                and self.block_bytes(stop + 1 - start, table[start : stop + 1].sum(0)) <= BLOCK_BYTES
            ):
                stop += 1
            packed.append(self._compress(rows[start:stop]))
            blocks.append([stop - start, len(packed[-1])])
            start = stop
        tokens, spans, targets, entries = table.sum(0).tolist()
        size = ShardSize(len(rows), tokens, spans, targets, entries, len(blocks), sum(map(len, packed)))
        return size, {
            "rows": table.astype("<u4"),
            "blocks": np.array(blocks, dtype="<u4").reshape(-1, 2),
            "data": np.frombuffer(b"".join(packed), dtype="u1"),
        }

    def _compress(self, rows: Sequence[TransferRow]) -> bytes:
        columns = zip(*(self._encode_row(row) for row in rows), strict=True)
        data = b"".join(_to_bytes(np.concatenate(column)) for column in columns)
        # memLevel 5 starts new Huffman codes every 2,048 symbols, so that ids and log-probabilities get their own.
        packer = zlib.compressobj(6, zlib.DEFLATED, zlib.MAX_WBITS, 5)
        return packer.compress(data) + packer.flush()

    def decompress(self, data: bytes, num_bytes: int) -> bytes:
        """A block's content, which must have `num_bytes`; zlib's own checksum shows damage."""
        unpacker = zlib.decompressobj()
        try:
            content = unpacker.decompress(data, num_bytes + 1)
        except zlib.error as error:
            raise TransferSetError(f"it cannot be decompressed: {error}") from error
        if len(content) != num_bytes or not unpacker.eof or unpacker.unused_data:
            raise TransferSetError(f"its content is not one stream of {num_bytes} bytes")
        return content

    def _encode_row(self, row: TransferRow) -> list[NDArray[Any]]:
        """The row's part of each array of its block."""
        counts = row.counts.astype(np.int64)
        order = _storage_order(row.logprobs, row.token_ids, counts)
        token_ids = row.token_ids[order].astype(self._id)
        starts = np.cumsum(counts) - counts
        logprobs = encode_logprobs(row.logprobs[order], counts)
        normalizers = [
            encode_normalizers(row.log_normalizers[:, column], logprobs, counts, self.temperatures[column])
            for column in self._scaled
        ]
        input_ids = row.input_ids.astype(self._id)
        input_ids[row.targets] ^= token_ids[starts]  # 0 where the teacher's choice is the token, so it costs nothing
        return [
            np.array([row.finished], dtype="u1"),
            row.spans.astype("<u4").ravel(),
            input_ids,
            counts.astype(self._count),
            token_ids,
            logprobs,
            np.stack([np.zeros(len(counts), _HALF), *normalizers], axis=1)[:, 1:].ravel(),
        ]

    def decode(self, content: bytes, table: NDArray[np.int64], row: int, *, check: bool) -> TransferRow:
        """Row number `row` of a block, from its content and its part (rows, 4) of the row table."""
        before = self._columns(row, table[:row].sum(0))
        own = self._columns(1, table[row])
        parts, offset = [], 0
        for (dtype, items), (_, first), (_, count) in zip(
            self._columns(len(table), table.sum(0)), before, own, strict=True
        ):
            parts.append(_from_bytes(content, dtype, offset, int(items), int(first), int(count)))
            offset += int(items) * dtype.itemsize
        finished, spans, input_ids, counts, token_ids, logprobs, normalizers = parts
        targets = len(counts)
        log_normalizers = np.zeros((targets, len(self.temperatures)), dtype=np.float32)
        log_normalizers[:, self._scaled] = normalizers.reshape(targets, len(self._scaled))
        decoded = TransferRow(
            input_ids=input_ids.astype(np.int64),
            spans=spans.astype(np.int64).reshape(-1, 2),
            counts=counts.astype(np.int64),
            token_ids=token_ids.astype(np.int64),
            logprobs=logprobs.astype(np.float32),
            log_normalizers=log_normalizers,
            finished=bool(finished[0]),
        )
        decoded.check_layout(self.max_entries)
        starts = np.cumsum(decoded.counts) - decoded.counts
        decoded.input_ids[decoded.targets] ^= decoded.token_ids[starts]
        if check:
            decoded.check_values(self.vocab_size, self.temperatures)
        return decoded


def encode_logprobs(logprobs: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[Any]:
    """(E,) float16; a target whose rounded mass would exceed 1 is rounded down instead."""
    values = np.clip(logprobs.astype(np.float64), _LEAST, 0.0)
    stored = values.astype(_HALF)
    mass = np.add.reduceat(np.exp(stored.astype(np.float64)), np.cumsum(counts) - counts)
    too_high = (stored > values) & np.repeat(mass > 1, counts)
    stored[too_high] = np.nextafter(stored[too_high], _HALF.type(-np.inf))
    return stored


def encode_normalizers(
    log_normalizers: NDArray[Any], logprobs: NDArray[Any], counts: NDArray[np.int64], temperature: float
) -> NDArray[Any]:
    """(R,) float16, never below the log of the stored entries' own sum, so that the tail stays at least 0."""
    terms = np.exp(logprobs.astype(np.float64) / temperature)
    least = np.log(np.add.reduceat(terms, np.cumsum(counts) - counts))
    stored = np.maximum(log_normalizers.astype(np.float64), least).astype(_HALF)
    too_low = stored < least
    stored[too_low] = np.nextafter(stored[too_low], _HALF.type(np.inf))
    return stored


def _storage_order(logprobs: NDArray[Any], token_ids: NDArray[Any], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The order in which entries are stored: each target's most probable one, then the others by ascending id."""
    targets = np.repeat(np.arange(len(counts)), counts)
    is_rest = np.ones(len(targets), dtype=bool)
    # Of equally probable entries the earliest one comes first.
    is_rest[np.lexsort((-logprobs, targets))[np.cumsum(counts) - counts]] = False
    return np.lexsort((token_ids, is_rest, targets))


def _to_bytes(array: NDArray[Any]) -> bytes:
    """An array's bytes; of floats first all low bytes and then all high ones, which zlib makes a tenth smaller."""
    if array.dtype == _HALF:
        return array.view("u1").reshape(-1, 2).T.tobytes()
    return array.tobytes()


def _from_bytes(content: bytes, dtype: np.dtype[Any], offset: int, items: int, first: int, count: int) -> NDArray[Any]:
    """`count` items from `first` on of an array of `items` at `offset`."""
    if dtype == _HALF:
        planes = np.frombuffer(content, "u1", 2 * items, offset).reshape(2, items)
        return np.ascontiguousarray(planes[:, first : first + count].T).view(_HALF).ravel()
    return np.frombuffer(content, dtype, count, offset + first * dtype.itemsize)
