"""A shard file: a safetensors file whose header is fixed, byte for byte, by the plan and six numbers of the index."""

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
from quantkd.transfer_set.codec import Codec
from quantkd.transfer_set.encoded import CHECKSUM, COLUMNS, ENTRIES, EXPLICIT, SPANS, TOKENS, RowCodes, ShardSize
from quantkd.transfer_set.row import MAX_ROW_ENTRIES, MAX_ROW_TOKENS

TARGETS = CHECKSUM  # in `ShardMap.edges`, where a sum of checksums would mean nothing, targets take their place
_CHUNK_BYTES = 2**20
_SAFETENSORS_NAMES = {"u1": "U8", "u2": "U16", "u4": "U32"}


def shard_name(index: int) -> str:
    """The file name of shard `index`. Names are derived from numbers and never read from a set."""
    return f"shard-{index:05d}.safetensors"


def shard_header(codec: Codec, size: ShardSize) -> bytes:
    """The 8 length bytes and the JSON header of a shard of that size, padded with spaces to a multiple of 8."""
    entries, offset = {}, 0
    for name, dtype, shape in codec.tensors(size):
        end = offset + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        entries[name] = {
            "dtype": _SAFETENSORS_NAMES[dtype.str[1:]],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shard_bytes(codec: Codec, size: ShardSize) -> int:
    """How many bytes a shard of that size has on disk."""
    data = sum(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize for _, dtype, shape in codec.tensors(size))
    return len(shard_header(codec, size)) + data


def serialize_shard(codec: Codec, size: ShardSize, tensors: dict[str, NDArray[Any]]) -> bytes:
    """The bytes of a shard file."""
    return shard_header(codec, size) + b"".join(tensors[name].tobytes() for name, _, _ in codec.tensors(size))


class ShardMap:
    """A shard, mapped into memory. Header, size and row table are checked here, and each row when it is fetched.

    Args:
        path: the file.
        codec: how its set is encoded.
        size: what the index says of it.

    Raises:
        TransferSetError: the file is not exactly what the index promises.
    """

    def __init__(self, path: Path, codec: Codec, size: ShardSize) -> None:
        self.path = path
        self.size = size
        self._codec = codec
        header = shard_header(codec, size)
        expected = shard_bytes(codec, size)
        descriptor = open_regular(path, error=TransferSetError)
        try:
            found = os.fstat(descriptor).st_size
            if found != expected:
                raise TransferSetError(
                    f"{path} has {found} bytes; the index promises {expected}. "
                    f"{'It was cut off' if found < expected else 'Something was added'}: get the shard anew."
                )
            self.data = mmap.mmap(descriptor, 0, prot=mmap.PROT_READ)
        except OSError as error:  # pragma: no cover - happens in a child: test_transfer_set_hostile maps 13 GiB there
            raise TransferSetError(f"Cannot map the {expected} bytes of {path}: {error}. Free some memory.") from error
        finally:
            os.close(descriptor)
        start = self.data[: len(header)]
        if start != header:
            at = next(i for i, (a, b) in enumerate(zip(start, header, strict=True)) if a != b)
            raise TransferSetError(f"{path} differs from the header that its index asks for at byte {at}. Get it anew.")
        self.tensors: dict[str, NDArray[Any]] = {}
        self.offsets: dict[str, int] = {}
        offset = len(header)
        for name, dtype, shape in codec.tensors(size):
            count = int(np.prod(shape, dtype=np.int64))
            self.offsets[name] = offset
            self.tensors[name] = np.frombuffer(self.data, dtype, count, offset).reshape(shape)
            offset += count * dtype.itemsize
        self._locate_rows()
        # Rows whose checksum and content were found good; they are not checked again.
        self.checked = np.zeros(size.rows, dtype=bool)

    def _locate_rows(self) -> None:
        """Where each row begins in each tensor, from the row table, which is checked first."""
        size = self.size
        table = self.tensors["rows"].astype(np.int64)
        spans = self.tensors["spans"].astype(np.int64)
        self.edges = np.zeros((size.rows + 1, COLUMNS), dtype=np.int64)
        np.cumsum(table, axis=0, out=self.edges[1:])
        names = ("tokens", "explicit", "entries", "spans", "low", "high")
        for name, total in zip(names, self.edges[-1].tolist(), strict=False):
            if total != getattr(size, name):
                raise TransferSetError(
                    f"The row table of {self.path} sums to {total} in its column `{name}`; the index says "
                    f"{getattr(size, name)}. Get the shard anew."
                )
        lengths = table[:, TOKENS]
        widths = spans[:, 1] - spans[:, 0]
        owner = np.repeat(np.arange(size.rows), table[:, SPANS])
        good = (spans[:, 0] >= 1) & (widths >= 1) & (spans[:, 1] <= lengths[owner])
        good[1:] &= (owner[1:] != owner[:-1]) | (spans[1:, 0] >= spans[:-1, 1])
        packed = {"label_is_first": size.targets, "input_ids_high": size.explicit, "first_ids_high": size.targets}
        for name, bits in packed.items():
            if name in self.tensors and (self.tensors[name][..., bits // 8 :] >> bits % 8).any():
                raise TransferSetError(f"The padding bits of `{name}` in {self.path} are not 0. Get the shard anew.")
        self.edges[1:, TARGETS] = np.append(0, np.cumsum(widths))[self.edges[1:, SPANS]]
        targets = np.diff(self.edges[:, TARGETS])
        bad = (
            (lengths < 1)
            | (lengths > MAX_ROW_TOKENS)
            | (table[:, ENTRIES] > MAX_ROW_ENTRIES)
            | (targets > table[:, ENTRIES])
        )
        bad |= (table[:, EXPLICIT] > lengths) | (table[:, EXPLICIT] < lengths - targets)
        bad[owner[~good]] = True
        if bad.any() or int(self.edges[-1, TARGETS]) != size.targets:
            row = int(bad.argmax()) if bad.any() else size.rows - 1
            raise TransferSetError(
                f"Row {row} of {self.path} has spans or sizes that cannot be: {table[row].tolist()}. Get it anew."
            )

    def fetch(self, start: int, stop: int) -> RowCodes:
        """The stored form of the rows `[start, stop)`, as views of the file wherever possible."""
        tensors = self.tensors
        (_, x0, e0, s0, l0, h0, r0), (_, x1, e1, s1, l1, h1, r1) = self.edges[start].tolist(), self.edges[stop].tolist()
        fine = tensors["logprobs_fine"][r0:r1] if self._codec.fine else np.zeros(0, "u1")
        normalizers = tensors["log_normalizers"][r0:r1] if self._codec.num_normalizers else np.zeros((r1 - r0, 0), "u1")
        high_x: tuple[NDArray[Any], ...] = ()
        high_r: tuple[NDArray[Any], ...] = ()
        if self._codec.high_bits:
            high_x = tuple(_bits(plane, x0, x1) for plane in tensors["input_ids_high"])
            high_r = tuple(_bits(plane, r0, r1) for plane in tensors["first_ids_high"])
        return RowCodes(
            rows=tensors["rows"][start:stop],
            finished=tensors["finished"][start:stop],
            spans=tensors["spans"][s0:s1],
            input_ids=tensors["input_ids"][x0:x1],
            label_is_first=_bits(tensors["label_is_first"], r0, r1),
            counts=tensors["counts"][r0:r1],
            first_ids=tensors["first_ids"][r0:r1],
            rest_low=tensors["rest_low"][l0:l1],
            rest_high=tensors["rest_high"][h0:h1],
            logprobs=tensors["logprobs"][e0:e1],
            log_normalizers=normalizers,
            logprobs_fine=fine,
            input_ids_high=high_x,
            first_ids_high=high_r,
        )

    def sha256(self) -> str:
        """The digest of the whole file, in hexadecimal."""
        digest = hashlib.sha256()
        for start in range(0, len(self.data), _CHUNK_BYTES):
            digest.update(self.data[start : start + _CHUNK_BYTES])
        return digest.hexdigest()

    def byte_range(self, row: int) -> tuple[int, int]:
        """The first and the last byte of the file that belong to a row; other rows have bytes between them, too."""
        finished = self.offsets["finished"] + row
        return self.offsets["rows"] + row * self.tensors["rows"].strides[0], finished


def concatenate_codes(parts: list[RowCodes]) -> RowCodes:
    """Several stored rows end to end."""
    if len(parts) == 1:
        return parts[0]
    joined: dict[str, Any] = {}
    for name, first in vars(parts[0]).items():
        arrays = [getattr(part, name) for part in parts]
        if isinstance(first, tuple):
            joined[name] = tuple(np.concatenate(plane) for plane in zip(*arrays, strict=True))
        else:
            joined[name] = np.concatenate(arrays)
    return RowCodes(**joined)


def _bits(packed: NDArray[Any], start: int, stop: int) -> NDArray[np.uint8]:
    first = start >> 3
    bits = np.unpackbits(packed[first : (stop + 7) >> 3], bitorder="little")
    return bits[start - 8 * first : stop - 8 * first]
