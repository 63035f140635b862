"""A shard file: a safetensors file whose header is fixed, byte for byte, by the plan and the numbers of the index."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkd.errors import TransferSetError
from quantkd.files import open_regular
from quantkd.transfer_set.codec import MAX_BLOCK_BYTES, Codec, ShardSize
from quantkd.transfer_set.row import MAX_ROW_ENTRIES, MAX_ROW_TOKENS, TransferRow


def shard_name(index: int) -> str:
    """The file name of shard `index`. Names are derived from numbers and never read from a set."""
    return f"shard-{index:05d}.safetensors"


def shard_header(size: ShardSize) -> bytes:
    """The 8 length bytes and the JSON header of a shard of that size, padded with spaces to a multiple of 8."""
    entries, offset = {}, 0
    for name, dtype, shape, num_bytes in (
        ("rows", "U32", [size.rows, 4], 16 * size.rows),
        ("blocks", "U32", [size.blocks, 2], 8 * size.blocks),
        ("data", "U8", [size.bytes], size.bytes),
    ):
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + num_bytes]}
        offset += num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_bytes(size: ShardSize) -> int:
    """How many bytes a shard of that size has on disk."""
    return len(shard_header(size)) + 16 * size.rows + 8 * size.blocks + size.bytes


def serialize_shard(size: ShardSize, tensors: dict[str, NDArray[Any]]) -> bytes:
    """The bytes of a shard file."""
    return shard_header(size) + b"".join(tensors[name].tobytes() for name in ("rows", "blocks", "data"))


class ShardMap:
    """A shard, mapped into memory. Header, size and tables are checked here, and each row when it is first read."""

    def __init__(self, path: Path, codec: Codec, size: ShardSize) -> None:
        self.path = path
        self._codec = codec
        header = shard_header(size)
        expected = shard_bytes(size)
        descriptor = open_regular(path, error=TransferSetError)
        try:
            found = os.fstat(descriptor).st_size
            if found != expected:
                raise TransferSetError(
                    f"{path} has {found} bytes; the index promises {expected}. "
                    f"{'It was cut off' if found < expected else 'Something was added'}: get the shard again."
                )
            self._data = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        except OSError as error:  # pragma: no cover - happens in a child: test_transfer_set_hostile maps 13 GiB there
            raise TransferSetError(f"Cannot map the {expected} bytes of {path}: {error}. Free some memory.") from error
        finally:
            os.close(descriptor)
        start = self._data[: len(header)]
        if start != header:
            at = next(i for i, (a, b) in enumerate(zip(start, header, strict=True)) if a != b)
            raise TransferSetError(f"{path} differs from the header of its index at byte {at}. Get it again.")
        rows = np.frombuffer(self._data, "<u4", 4 * size.rows, len(header)).reshape(-1, 4)
        blocks = np.frombuffer(self._data, "<u4", 2 * size.blocks, len(header) + rows.nbytes).reshape(-1, 2)
        self.table: NDArray[np.int64] = rows.astype(np.int64)
        """(rows, 4): tokens, spans, targets and entries of each row."""
        self._start = len(header) + rows.nbytes + blocks.nbytes
        self._check_tables(size, blocks.astype(np.int64))
        self._checked = np.zeros(size.rows, dtype=bool)  # rows whose content was found good
        self.block: tuple[int, bytes] | None = None  # number and content of the one that was read last

    def _check_tables(self, size: ShardSize, blocks: NDArray[np.int64]) -> None:
        """Check both tables against the index, and find where each block begins in the rows and in the data."""
        table = self.table
        ends = np.cumsum(blocks, axis=0)
        self._row_edges, self._byte_edges = np.append(0, ends[:, 0]), np.append(0, ends[:, 1])
        sums = dict(zip(("tokens", "spans", "targets", "entries"), table.sum(0).tolist(), strict=True))
        sums |= {"rows": int(self._row_edges[-1]), "bytes": int(self._byte_edges[-1])}
        for name, total in sums.items():
            if total != getattr(size, name):
                raise TransferSetError(
                    f"The tables of {self.path} sum to {total} {name}; the index says {getattr(size, name)}. "
                    "Get the shard again."
                )
        tokens, spans, targets, entries = table.T
        bad = (tokens < 1) | (tokens > MAX_ROW_TOKENS) | (entries > MAX_ROW_ENTRIES)
        bad |= (targets >= tokens) | (targets > entries) | (spans > targets)
        if bad.any():
            row = int(bad.argmax())
            raise TransferSetError(
                f"Row {row} of {self.path} cannot have the sizes {table[row].tolist()}. Get it again."
            )
        totals = np.append(np.zeros((1, 4), np.int64), np.cumsum(table, axis=0), axis=0)[self._row_edges]
        self._content_bytes = self._codec.block_bytes(blocks[:, 0], np.diff(totals, axis=0))
        if len(blocks) and (blocks[:, 0].min() < 1 or self._content_bytes.max() > MAX_BLOCK_BYTES):
            raise TransferSetError(
                f"A block of {self.path} holds no row, or more than {MAX_BLOCK_BYTES} bytes. Get the shard again."
            )

    def read_row(self, row: int, *, check: bool = True) -> TransferRow:
        """A row; with `check`, its values are checked when it is read for the first time."""
        block = int(np.searchsorted(self._row_edges, row, side="right")) - 1
        first, stop = int(self._row_edges[block]), int(self._row_edges[block + 1])
        begin, end = (self._start + int(edge) for edge in self._byte_edges[block : block + 2])
        try:
            if self.block is None or self.block[0] != block:
                self.block = block, self._codec.decompress(self._data[begin:end], int(self._content_bytes[block]))
        except TransferSetError as error:
            raise TransferSetError(
                f"Rows {first} to {stop - 1} of {self.path}, in its bytes {begin} to {end - 1}, are damaged: {error}. "
                "Get the shard again."
            ) from error
        check = check and not self._checked[row]
        try:
            decoded = self._codec.decode(self.block[1], self.table[first:stop], row - first, check=check)
        except TransferSetError as error:
            raise TransferSetError(f"Row {row} of {self.path}: {error}") from error
        self._checked[row] |= check
        return decoded

    def sha256(self) -> str:
        """The digest of the whole file, in hexadecimal."""
        return hashlib.sha256(self._data).hexdigest()
