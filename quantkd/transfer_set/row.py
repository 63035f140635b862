"""One row: a whole token sequence, its target positions, and the teacher's entries at each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkd.errors import TransferSetError

MAX_ROW_TOKENS = 2**20
MAX_ROW_ENTRIES = 2**22  # so that decoding one row stays below 200 MiB
LOGPROB_SLACK = 1e-3  # nats above 0 that float16 teachers reach by rounding
MASS_SLACK = 1e-3


@dataclass(frozen=True)
class TransferRow:
    """One sequence with the teacher's distribution at each target position.

    Target j, counted over all spans in order, is a position t of `input_ids`; its `counts[j]` entries are the
    teacher's distribution of `input_ids[t]`, read from the logits at t - 1.

    Args:
        input_ids: (L,) integers, the whole sequence.
        spans: (S, 2) integers, ascending and disjoint `[start, stop)`, `start >= 1`; usually `[[prompt_length, L]]`.
        counts: (R,) integers of at least 1, entries per target.
        token_ids: (E,) integers, vocabulary ids, unique within a target.
        logprobs: (E,) float32, natural log of the teacher's probabilities at temperature 1.
        log_normalizers: (R, number of temperatures) float32; the column of temperature 1 is 0.
        finished: False if the length limit cut the response.
    """

    input_ids: NDArray[Any]
    spans: NDArray[Any]
    counts: NDArray[Any]
    token_ids: NDArray[Any]
    logprobs: NDArray[Any]
    log_normalizers: NDArray[Any]
    finished: bool = True

    def validate(
        self, vocab_size: int, temperatures: tuple[float, ...] = (1.0,), max_entries: int | None = None
    ) -> None:
        """Check shapes, ranges, uniqueness of ids and total mass."""
        arrays = {
            "input_ids": (self.input_ids, 1),
            "spans": (self.spans, 2),
            "counts": (self.counts, 1),
            "token_ids": (self.token_ids, 1),
        }
        for name, (array, ndim) in arrays.items():
            _require(
                isinstance(array, np.ndarray) and array.ndim == ndim and array.dtype.kind in "iu",
                f"`{name}` must be an integer array of {ndim} dimension(s)",
            )
        length, targets = len(self.input_ids), len(self.counts)
        _require(1 <= length <= MAX_ROW_TOKENS, f"a row holds 1 to {MAX_ROW_TOKENS} tokens, found {length}")
        _require(self.spans.shape[1] == 2, f"`spans` must have shape (S, 2), found {self.spans.shape}")
        edges = self.spans.astype(np.int64).ravel()
        _require(
            bool((edges >= 1).all() and (edges <= length).all())
            and bool((edges[1::2] > edges[::2]).all() and (edges[2::2] >= edges[1:-1:2]).all()),
            f"`spans` must be ascending, disjoint, not empty and within [1, {length}], found {edges[:8].tolist()}",
        )
        covered = int((edges[1::2] - edges[::2]).sum())
        _require(covered == targets, f"`spans` cover {covered} targets, but `counts` has {targets}")
        most = vocab_size if max_entries is None else max_entries
        _require(bool((self.counts >= 1).all() and (self.counts <= most).all()), f"`counts` must lie from 1 to {most}")
        entries = int(self.counts.astype(np.int64).sum())
        _require(entries <= MAX_ROW_ENTRIES, f"a row holds at most {MAX_ROW_ENTRIES} entries, found {entries}")
        _require(len(self.token_ids) == entries, f"`counts` sum to {entries}, but there are {len(self.token_ids)} ids")
        for name, array, shape in (
            ("logprobs", self.logprobs, (entries,)),
            ("log_normalizers", self.log_normalizers, (targets, len(temperatures))),
        ):
            _require(
                isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.shape == shape,
                f"`{name}` must be a float array of shape {shape}",
            )
        _require(bool((self.input_ids >= 0).all()), "`input_ids` must not be negative")
        check_entries(
            self.input_ids, self.counts.astype(np.int64), self.token_ids, self.logprobs, self.log_normalizers,
            vocab_size, temperatures,
        )  # fmt: skip


def check_entries(
    input_ids: NDArray[Any],
    counts: NDArray[np.int64],
    token_ids: NDArray[Any],
    logprobs: NDArray[Any],
    log_normalizers: NDArray[Any],
    vocab_size: int,
    temperatures: tuple[float, ...],
) -> None:
    """Check values over any number of rows: ids in range and unique, logprobs finite and at most 0, mass at most 1.

    Shapes: input_ids (T,), counts (R,), token_ids (E,), logprobs (E,), log_normalizers (R, number of temperatures).
    """
    for name, ids in (("input_ids", input_ids), ("token_ids", token_ids)):
        if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
            at = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
            raise TransferSetError(f"`{name}` holds {int(ids[at])} at {at}; the vocabulary ends at {vocab_size}.")
    _require(bool(np.isfinite(log_normalizers).all()), "`log_normalizers` must be finite")
    if len(counts) == 0:
        return
    _require(bool(np.isfinite(logprobs).all()), "`logprobs` must be finite")
    _require(float(logprobs.max()) <= LOGPROB_SLACK, f"`logprobs` must be at most 0, found {float(logprobs.max())}")
    starts = np.cumsum(counts) - counts
    keys = np.repeat(np.arange(len(counts), dtype=np.int64) * vocab_size, counts) + token_ids
    keys.sort()
    repeated = np.flatnonzero(keys[1:] == keys[:-1])
    if len(repeated):
        target, token = divmod(int(keys[repeated[0]]), vocab_size)
        raise TransferSetError(f"Token {token} occurs twice among the entries of target {target}; ids must be unique.")
    for column, temperature in enumerate(temperatures):
        normalizers = log_normalizers[:, column]
        if temperature == 1.0:
            _require(bool((np.abs(normalizers) <= LOGPROB_SLACK).all()), "log-normalizers of temperature 1 must be 0")
            scaled = logprobs
        else:
            scaled = logprobs / np.float32(temperature) - np.repeat(normalizers, counts)
        # Sums in float64: a vocabulary of float32 terms would drift past the slack.
        mass = np.add.reduceat(np.exp(scaled), starts, dtype=np.float64)
        if mass.max() > 1 + MASS_SLACK:
            target = int(mass.argmax())
            raise TransferSetError(
                f"The entries of target {target} hold a mass of {mass[target]:.6f} at temperature {temperature}; "
                "it cannot exceed 1. Store natural-log probabilities normalised over the whole vocabulary."
            )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise TransferSetError(f"A row cannot be stored or read: {message}.")
