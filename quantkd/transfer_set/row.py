"""One row: a whole token sequence, its target positions, and the teacher's entries at each of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkd.errors import TransferSetError

MAX_ROW_TOKENS = 2**20
MAX_ROW_ENTRIES = 2**22
LOGPROB_SLACK = 1e-3  # nats above 0 that float16 teachers reach by rounding
MASS_SLACK = 1e-3


@dataclass(frozen=True)
class TransferRow:
    """One sequence with the teacher's distribution of each target token, read from the logits one position before."""

    input_ids: NDArray[Any]  # (L,) integers, the whole sequence
    spans: NDArray[Any]  # (S, 2) ascending and disjoint `[start, stop)`, `start >= 1`; usually `[[prompt_length, L]]`
    counts: NDArray[Any]  # (R,) integers of at least 1, entries per target
    token_ids: NDArray[Any]  # (E,) integers, vocabulary ids, unique within a target
    logprobs: NDArray[Any]  # (E,) float32, natural log of the teacher's probabilities at temperature 1
    log_normalizers: NDArray[Any]  # (R, number of temperatures) float32; the column of temperature 1 is 0
    finished: bool = True  # False if the length limit cut the response

    @property
    def targets(self) -> NDArray[np.int64]:
        """(R,) int64: the position of each target in `input_ids`."""
        return np.concatenate([np.zeros(0, np.int64), *(np.arange(a, b) for a, b in self.spans.tolist())])

    def validate(self, vocab_size: int, temperatures: tuple[float, ...] = (1.0,), most: int | None = None) -> None:
        """Check dtypes, shapes, ranges, uniqueness of ids and total mass; `most` is the limit of entries per target."""
        integers = {"input_ids": 1, "spans": 2, "counts": 1, "token_ids": 1}
        for name, ndim in integers.items():
            array = getattr(self, name)
            _require(
                isinstance(array, np.ndarray) and array.ndim == ndim and array.dtype.kind in "iu",
                f"`{name}` must be an integer array of {ndim} dimension(s)",
            )
        self.check_layout(vocab_size if most is None else most)
        shapes = {"logprobs": (len(self.token_ids),), "log_normalizers": (len(self.counts), len(temperatures))}
        for name, shape in shapes.items():
            array = getattr(self, name)
            _require(
                isinstance(array, np.ndarray) and array.dtype.kind == "f" and array.shape == shape,
                f"`{name}` must be a float array of shape {shape}",
            )
        self.check_values(vocab_size, temperatures)

    def check_layout(self, most: int) -> None:
        """Check that sequence, spans, counts and ids have lengths that fit together."""
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
        _require(bool((self.counts >= 1).all() and (self.counts <= most).all()), f"`counts` must be from 1 to {most}")
        entries = int(self.counts.astype(np.int64).sum())
        _require(entries <= MAX_ROW_ENTRIES, f"a row holds at most {MAX_ROW_ENTRIES} entries, found {entries}")
        _require(len(self.token_ids) == entries, f"`counts` sum to {entries}, but there are {len(self.token_ids)} ids")

    def check_values(self, vocab_size: int, temperatures: tuple[float, ...]) -> None:
        """Check that ids are in range and unique, log-probabilities finite and at most 0, and the mass at most 1."""
        logprobs, counts = self.logprobs, self.counts.astype(np.int64)
        for name, ids in (("input_ids", self.input_ids), ("token_ids", self.token_ids)):
            if len(ids) and (ids.min() < 0 or ids.max() >= vocab_size):
                at = int(np.flatnonzero((ids < 0) | (ids >= vocab_size))[0])
                raise TransferSetError(f"`{name}` holds {int(ids[at])} at {at}; the vocabulary ends at {vocab_size}.")
        _require(bool(np.isfinite(self.log_normalizers).all()), "`log_normalizers` must be finite")
        if len(counts) == 0:
            return
        _require(bool(np.isfinite(logprobs).all()), "`logprobs` must be finite")
        _require(float(logprobs.max()) <= LOGPROB_SLACK, f"`logprobs` must be at most 0, found {float(logprobs.max())}")
        keys = np.repeat(np.arange(len(counts), dtype=np.int64) * vocab_size, counts) + self.token_ids
        keys.sort()
        repeated = np.flatnonzero(keys[1:] == keys[:-1])
        if len(repeated):
            target, token = divmod(int(keys[repeated[0]]), vocab_size)
            raise TransferSetError(f"Token {token} occurs twice among the entries of target {target}; expected once.")
        for column, temperature in enumerate(temperatures):
            normalizers = self.log_normalizers[:, column]
            if temperature == 1.0:
                is_zero = bool((np.abs(normalizers) <= LOGPROB_SLACK).all())
                _require(is_zero, "log-normalizers of temperature 1 must be 0")
            scaled = logprobs / np.float32(temperature) - np.repeat(normalizers, counts)
            # Sums in float64: a vocabulary of float32 terms would drift past the slack.
            mass = np.add.reduceat(np.exp(scaled), np.cumsum(counts) - counts, dtype=np.float64)
            if mass.max() > 1 + MASS_SLACK:
                target = int(mass.argmax())
                raise TransferSetError(
                    f"The entries of target {target} hold a mass of {mass[target]:.6f} at temperature {temperature}; "
                    "it cannot exceed 1. Store natural-log probabilities normalised over the whole vocabulary."
                )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise TransferSetError(f"A row cannot be stored or read: {message}.")
