"""Log-probabilities and log-normalizers as small integers; docs/transfer-set-format.md states the error bounds.

The first entry of a target is its most probable one, p1 = sin(pi/2 * (code + 1) / N)^2 with N = 256 or 65,536: the
grid is even in the angle of (sqrt(p), sqrt(1 - p)), so it is finest where p nears 1, and p = 1 is exact. Every other
entry is at most c = min(p1, 1 - p1), and is stored as p = c * ((code + 1) / 256)^4: fine for what matters, never 0.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

_POWER = 4
_CODES = 256
_MASS_NOISE = 1e-6  # float32 logarithms of a mass of exactly 1 do not sum to it
Floats = NDArray[np.float32]


@cache
def first_entry_table(levels: int) -> tuple[Floats, Floats]:
    """log p1 and log c for each of `levels` codes of the first entry; log c is -inf for the last code, p1 = 1."""
    angle = np.pi / 2 * (np.arange(levels) + 1) / levels
    with np.errstate(divide="ignore"):
        first = 2 * np.log(np.sin(angle[:-1]))
        rest = 2 * np.log(np.cos(angle[:-1]))
    first, rest = np.append(first, 0.0), np.append(rest, -np.inf)
    return first.astype(np.float32), np.minimum(first, rest).astype(np.float32)


@cache
def other_entry_table() -> Floats:
    """log(p / c) for each of the 256 codes of the other entries."""
    return (_POWER * np.log((np.arange(_CODES) + 1) / _CODES)).astype(np.float32)


def encode_logprobs(
    logprobs: NDArray[Any], counts: NDArray[np.int64], levels: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Codes of descending log-probabilities; a target whose rounded mass would exceed 1 is rounded down instead.

    Shapes: logprobs (E,), counts (R,), returns (R,).
    """
    values = np.minimum(logprobs.astype(np.float64), 0.0)
    starts = np.cumsum(counts) - counts
    first_codes = np.zeros(len(counts), dtype=np.int64)
    codes = np.zeros(len(values), dtype=np.int64)
    todo = np.arange(len(counts))
    for rounding in (0.5, 0.25, 0.0):
        entries = expand(starts[todo], counts[todo])
        owned = counts[todo]
        first_codes[todo] = _encode_first(values[starts[todo]], owned, levels, rounding)
        scale = first_entry_table(levels)[1][first_codes[todo]].astype(np.float64)
        # A first entry of p = 1 stands alone; its scale of -inf is never used.
        ratio = np.exp((values[entries] - np.repeat(np.where(owned > 1, scale, 0.0), owned)) / _POWER)
        codes[entries] = np.clip(np.floor(ratio * _CODES + rounding) - 1, 0, _CODES - 1).astype(np.int64)
        codes[starts[todo]] = 0
        if len(todo):
            decoded = decode_logprobs(first_codes[todo], codes[entries], owned, levels)
            mass = np.add.reduceat(np.exp(decoded, dtype=np.float64), np.cumsum(owned) - owned)
            todo = todo[mass > 1 + _MASS_NOISE]
    return first_codes, codes


def decode_logprobs(first_codes: NDArray[Any], codes: NDArray[Any], counts: NDArray[np.int64], levels: int) -> Floats:
    """The inverse of `encode_logprobs`: (E,) float32 natural logs.

    Shapes: first_codes (R,), codes (E,), counts (R,), returns (E,).
    """
    first, scale = first_entry_table(levels)
    logprobs: Floats = other_entry_table()[codes]
    logprobs += np.repeat(scale[first_codes], counts)
    logprobs[np.cumsum(counts) - counts] = first[first_codes]
    return logprobs


def encode_normalizers(
    log_normalizers: NDArray[Any],
    decoded_logprobs: Floats,
    counts: NDArray[np.int64],
    temperatures: tuple[float, ...],
    vocab_size: int,
    levels: int,
) -> NDArray[np.int64]:
    """Codes of A_T for every temperature but 1: A_T = (1 - 1/T) * log V * code / (levels - 1).

    A_T never falls below the log of the decoded entries' own sum, so the tail stays at least 0.

    Shapes: log_normalizers (R, number of temperatures), decoded_logprobs (E,), counts (R,), returns (R, M).
    """
    starts = np.cumsum(counts) - counts
    columns = [np.zeros((len(counts), 0))]
    for column, temperature in enumerate(temperatures):
        if temperature == 1.0:
            continue
        span = (1 - 1 / temperature) * np.log(vocab_size)
        if span == 0 or len(counts) == 0:  # a vocabulary of one token
            columns.append(np.zeros((len(counts), 1)))
            continue
        wanted = log_normalizers[:, column].astype(np.float64)
        covered = np.log(np.add.reduceat(np.exp(decoded_logprobs.astype(np.float64) / temperature), starts))
        unit = span / (levels - 1)
        least = covered / unit
        codes = (
            np.maximum(np.rint(wanted / unit), np.ceil(least))
            if unit > 0
            else np.minimum(np.rint(wanted / unit), np.floor(least))
        )
        columns.append(np.clip(codes, 0, levels - 1)[:, None])
    return np.concatenate(columns, axis=1).astype(np.int64)


def decode_normalizers(codes: NDArray[Any], temperatures: tuple[float, ...], vocab_size: int, levels: int) -> Floats:
    """(R, len(temperatures)) float32 log-normalizers; the column of temperature 1 is 0.

    Shapes: codes (R, M).
    """
    decoded = np.zeros((len(codes), len(temperatures)), dtype=np.float32)
    others = [column for column, temperature in enumerate(temperatures) if temperature != 1.0]
    for source, column in enumerate(others):
        unit = (1 - 1 / temperatures[column]) * np.log(vocab_size) / (levels - 1)
        decoded[:, column] = codes[:, source] * np.float32(unit)
    return decoded


def expand(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """The indices `starts[j] ... starts[j] + counts[j] - 1` of every j, end to end.

    Shapes: starts (R,), counts (R,).
    """
    total = int(counts.sum())
    return np.repeat(starts - (np.cumsum(counts) - counts), counts) + np.arange(total, dtype=np.int64)


def _encode_first(
    values: NDArray[np.float64], counts: NDArray[np.int64], levels: int, rounding: float
) -> NDArray[np.int64]:
    angle = np.arcsin(np.exp(values / 2)) * (2 / np.pi)
    # With further entries p1 must stay below 1, or they would have no mass to share.
    highest = np.where(counts > 1, levels - 2, levels - 1)
    codes: NDArray[np.int64] = np.clip(np.floor(angle * levels + rounding) - 1, 0, highest).astype(np.int64)
    return codes
