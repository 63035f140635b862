"""The token ids of a target's entries beyond the first, as an ascending set: Elias-Fano coding.

A set of m ids below V costs about m * (log2(V / m) + 2) bits, some 11 bits an id where 64 are kept of 49,152, because
the order of the entries is not stored. Each id gives its low `width` bits to one stream; its high bits become the gaps
between set bits of another. All widths follow from m and V, so nothing but the two streams is stored.

Reference:
    Elias 1974, "Efficient storage and retrieval by content and address of static files"; Fano 1971.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def low_widths(sizes: Ints, vocab_size: int) -> Ints:
    """floor(log2(V / m)) for sets of m ids, and 0 for empty sets.

    Shapes: sizes (R,), returns (R,).
    """
    # The exponent of the quotient is its bit length; exact, for a quotient is far below 2**53.
    widths = np.frexp(vocab_size // np.maximum(sizes, 1))[1].astype(np.int64) - 1
    return np.where(sizes > 0, widths, 0)


def high_lengths(sizes: Ints, widths: Ints, vocab_size: int) -> Ints:
    """Bits of the high stream for sets of m ids: one set bit an id, and room for the largest gap sum.

    Shapes: sizes (R,), widths (R,), returns (R,).
    """
    return np.where(sizes > 0, sizes + ((vocab_size - 1) >> widths), 0)


def rest_bytes(sizes: Ints, row_ends: Ints, vocab_size: int) -> tuple[Ints, Ints]:
    """Bytes of both streams for every row; each row starts at a byte.

    Shapes: sizes (R,), row_ends (B + 1,), returns (B,).
    """
    widths = low_widths(sizes, vocab_size)
    low = np.diff(np.append(0, np.cumsum(sizes * widths))[row_ends])
    high = np.diff(np.append(0, np.cumsum(high_lengths(sizes, widths, vocab_size)))[row_ends])
    return (low + 7) // 8, (high + 7) // 8


def encode_rest(ids: Ints, sizes: Ints, vocab_size: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The two streams of one row.

    Shapes: sizes (R,).
    """
    widths = low_widths(sizes, vocab_size)
    lengths = high_lengths(sizes, widths, vocab_size)
    width = np.repeat(widths, sizes)
    column = np.arange(int(widths.max(initial=0)))
    bits = (ids[:, None] >> column) & 1
    low = bits[column < width[:, None]].astype(np.uint8)  # row by row, so id by id, the lowest bit first
    high = np.zeros(int(lengths.sum()), dtype=np.uint8)
    rank = np.arange(len(ids)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    high[np.repeat(np.cumsum(lengths) - lengths, sizes) + (ids >> width) + rank] = 1
    return np.packbits(low, bitorder="little"), np.packbits(high, bitorder="little")


def decode_rest(low: NDArray[Any], high: NDArray[Any], sizes: Ints, row_ends: Ints, vocab_size: int) -> Ints:
    """The inverse of `encode_rest` over several rows at once.

    Shapes: sizes (R,), row_ends (B + 1,).
    """
    widths = low_widths(sizes, vocab_size)
    lengths = high_lengths(sizes, widths, vocab_size)
    rank = np.arange(int(sizes.sum())) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    ones = np.flatnonzero(np.unpackbits(high, bitorder="little"))
    ids = ones - np.repeat(_starts(lengths, row_ends), sizes) - rank
    width = np.repeat(widths, sizes)
    at = np.repeat(_starts(sizes * widths, row_ends), sizes) + rank * width
    # Any 32 bits from a byte on, so one gather finds all of up to 24 bits that begin within that byte.
    padded = np.append(low, np.zeros(4, dtype=np.uint8))
    words = np.ndarray((len(low) + 1,), dtype="<u4", buffer=padded.data, strides=(1,))
    ids <<= width
    joined: Ints = ids | ((words[at >> 3] >> (at & 7)) & ((1 << width) - 1))
    return joined


def _starts(bits: Ints, row_ends: Ints) -> Ints:
    """Where each target begins in a stream whose rows begin at bytes."""
    ends = np.cumsum(bits)
    edges = np.append(0, ends)[row_ends]
    padding = np.cumsum(-np.diff(edges) % 8)
    shift = np.append(0, padding[:-1]) if len(padding) else padding
    starts: Ints = ends - bits + np.repeat(shift, np.diff(row_ends))
    return starts
