"""Figures that follow from sums over rows, so that each can be formed again for any draw of rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantkd.errors import DataError

Floats = NDArray[np.float64]
MAX_EXPONENT = 700.0  # exp of more is no float64; a perplexity of 1e304 says as much
Transform = Literal["identity", "exp"]


class RowStatistic(Protocol):
    """A figure that follows from sums over rows, so that it can be formed again for any draw of rows."""

    def to_columns(self) -> Floats:
        """(N, C) what is summed over rows, checked."""

    def compute(self, sums: Floats) -> Floats:
        """(..., C) sums over rows -> (...) the figure."""


@dataclass(frozen=True)
class RowSums:
    """A metric that is a ratio of sums over rows, such as nats over tokens, or right answers over questions.

    Args:
        numerators: (N,) one sum a row.
        denominators: (N,) what it is divided by; None counts each row once.
        transform: "exp" for perplexity, which is exp of a mean.
    """

    numerators: ArrayLike
    denominators: ArrayLike | None = None
    transform: Transform = "identity"

    def to_arrays(self) -> tuple[Floats, Floats]:
        """Numerators and denominators as arrays."""
        numerators = np.asarray(self.numerators, dtype=np.float64)
        given = self.denominators
        denominators = np.ones_like(numerators) if given is None else np.asarray(given, dtype=np.float64)
        if numerators.ndim != 1 or numerators.shape != denominators.shape or not numerators.size:
            raise DataError(
                f"Found numerators of shape {numerators.shape} and denominators of shape {denominators.shape}; "
                "expected both of one shape (N,), N at least 1."
            )
        if not (np.isfinite(numerators).all() and np.isfinite(denominators).all()):
            raise DataError("Found a row sum that is not finite. Look for NaN in the evaluation that produced it.")
        if denominators.min() < 0 or not denominators.sum():
            raise DataError("Found a negative denominator, or none above 0; expected counts such as tokens in a row.")
        return numerators, denominators

    def to_columns(self) -> Floats:
        """(N, 2): numerators and denominators."""
        return np.stack(self.to_arrays(), axis=1)

    def compute(self, sums: Floats) -> Floats:
        """(..., 2) -> (...): their ratio, transformed."""
        ratio = divide(sums[..., 0], sums[..., 1])
        return np.exp(np.minimum(ratio, MAX_EXPONENT)) if self.transform == "exp" else ratio


@dataclass(frozen=True)
class CalibrationSums:
    """The expected calibration error: by how much a model's confidence in its top token misses how often it is right.

    `sum over bins of |confidence - right answers| / tokens`, each summed over the bin's tokens.

    Args:
        confidences: (N, M) a row's top-1 probabilities, summed in each of M bins of confidence.
        correct: (N, M) how often the top token was the target.
        tokens: (N, M) the row's tokens in each bin.

    Reference:
        Guo et al. 2017, On Calibration of Modern Neural Networks (arXiv:1706.04599), equation 3.

    Example:
        >>> one_row = CalibrationSums(confidences=[[0.4, 1.8]], correct=[[0, 2]], tokens=[[1, 2]])
        >>> round(compute_value(one_row), 6)  # (|0.4 - 0| + |1.8 - 2|) / 3
        0.2
    """

    confidences: ArrayLike
    correct: ArrayLike
    tokens: ArrayLike

    def to_columns(self) -> Floats:
        """(N, 3 M): confidences, right answers, tokens."""
        parts = [np.asarray(part, dtype=np.float64) for part in (self.confidences, self.correct, self.tokens)]
        if parts[0].ndim != 2 or len({part.shape for part in parts}) != 1 or not parts[0].size:
            raise DataError(
                f"Found confidences, right answers and tokens of shapes {[part.shape for part in parts]}; "
                "expected all of one shape (N, M)."
            )
        if not all(np.isfinite(part).all() for part in parts) or not parts[2].sum() > 0:
            raise DataError("Found a calibration sum that is not finite, or no tokens. Evaluate this arm again.")
        return np.concatenate(parts, axis=1)

    def compute(self, sums: Floats) -> Floats:
        """(..., 3 M) -> (...): the error, in [0, 1]."""
        confidences, correct, tokens = np.split(sums, 3, axis=-1)
        return divide(np.abs(confidences - correct).sum(-1), tokens.sum(-1))


def compute_value(statistic: RowStatistic) -> float:
    """The figure over all rows."""
    return float(statistic.compute(statistic.to_columns().sum(0)))


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """A quotient that gives infinity or NaN where a draw has no gap, or holds rows that weigh nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(numerator, denominator), dtype=np.float64)
