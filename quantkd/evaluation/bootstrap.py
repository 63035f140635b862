"""The bootstrap over rows: intervals of one model's figures, and of the differences between models on the same rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.row_statistics import Floats, RowStatistic, RowSums, compute_value

Interval = tuple[float, float]

_BATCH = 256  # resamples drawn at once: (this, rows) indices are held in memory


@dataclass(frozen=True)
class BootstrapSettings:
    """How rows are drawn; the same settings draw the same rows.

    Args:
        confidence: the coverage of an interval, in (0, 1).
        seed: of the draws.
        resamples: how many, at least 1.

    Raises:
        ConfigError: a confidence outside (0, 1), or no resamples.
    """

    confidence: float = 0.95
    seed: int = 0
    resamples: int = 2000

    def __post_init__(self) -> None:
        check_confidence(self.confidence)
        if self.resamples < 1:
            raise ConfigError(
                f"Found resamples={self.resamples}; expected at least 1, and about 2000 for a 95% interval."
            )


@dataclass(frozen=True)
class Difference:
    """One model's figure less another's on the same rows.

    Args:
        value: in the figure's unit.
        interval: its paired bootstrap interval; None for a single row.
    """

    value: float
    interval: Interval | None


def bootstrap_interval(statistic: RowStatistic, settings: BootstrapSettings | None = None) -> Interval:
    """Percentile bootstrap interval of a figure, over whole rows.

    Reference:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    settings = settings or BootstrapSettings()
    (values,) = resample([statistic], settings)
    return compute_percentiles(values, settings.confidence)


def bootstrap_ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike | None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> Interval:
    """Percentile bootstrap interval of `sum(numerators) / sum(denominators)`, over whole rows.

    Rows are drawn, not tokens: the tokens of one answer depend on each other, and an interval over tokens would be far
    too narrow.

    Reference:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.

    Shapes: numerators (N,), denominators (N,).
    """
    return bootstrap_interval(RowSums(numerators, denominators), BootstrapSettings(confidence, seed, resamples))


def compute_difference(a: RowStatistic, b: RowStatistic, settings: BootstrapSettings | None = None) -> Difference:
    """`a - b` with its paired bootstrap interval: both models' rows are drawn together.

    What makes a row hard for both drops out, so the interval is narrower than those of two separate figures suggest.

    Reference:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapters 8 and 13.

    Example:
        >>> result = compute_difference(RowSums([3, 5, 9, 3]), RowSums([2, 4, 8, 2]))  # each row is 1 more
        >>> result.value, result.interval
        (1.0, (1.0, 1.0))
    """
    settings = settings or BootstrapSettings()
    value = compute_value(a) - compute_value(b)
    if len(a.to_columns()) < 2 and len(b.to_columns()) < 2:
        return Difference(value, None)
    first, second = resample([a, b], settings)
    return Difference(value, compute_percentiles(first - second, settings.confidence))


def resample(statistics: Sequence[RowStatistic], settings: BootstrapSettings) -> list[Floats]:
    """Each figure over rows drawn with replacement; one draw takes the same rows of all of them."""
    columns = [statistic.to_columns() for statistic in statistics]
    sizes = [len(one) for one in columns]
    if len(set(sizes)) != 1:
        raise DataError(f"The models have {sizes} rows; expected the same rows for all of them.")
    if sizes[0] < 2:
        raise DataError("A bootstrap over 1 row has nothing to draw from. Evaluate at least 2 rows.")
    draws = _draw(sizes[0], settings.seed, settings.resamples)
    stacked = np.concatenate(columns, axis=1)
    sums = np.concatenate(
        [draws[start : start + _BATCH].astype(np.float64) @ stacked for start in range(0, len(draws), _BATCH)]
    )
    parts = np.split(sums, np.cumsum([one.shape[1] for one in columns])[:-1], axis=1)
    return [statistic.compute(part) for statistic, part in zip(statistics, parts, strict=True)]


def compute_percentiles(values: Floats, confidence: float) -> Interval:
    """The middle part of resampled values.

    Shapes: values (R,).
    """
    tail = (1 - confidence) / 2
    low, high = np.quantile(values[~np.isnan(values)], [tail, 1 - tail])
    return float(low), float(high)


def check_confidence(confidence: float) -> None:
    """Refuse what is no coverage."""
    if not 0 < confidence < 1:
        raise ConfigError(f"Found confidence={confidence}; expected a share between 0 and 1, such as 0.95.")


@lru_cache(maxsize=4)
def _draw(num_rows: int, seed: int, resamples: int) -> NDArray[Any]:
    """(resamples, rows): how often each row is drawn.

    The draws are those of `scipy.stats.bootstrap`, which a test compares. Counted once, they serve every figure over as
    many rows, and a figure's resamples are one product.
    """
    generator = np.random.default_rng(seed)
    counts = np.empty((resamples, num_rows), dtype=np.uint16 if num_rows < 2**16 else np.uint32)
    for start in range(0, resamples, _BATCH):
        size = min(_BATCH, resamples - start)
        drawn = generator.integers(0, num_rows, (size, num_rows)) + num_rows * np.arange(size)[:, None]
        counts[start : start + size] = np.bincount(drawn.ravel(), minlength=size * num_rows).reshape(size, num_rows)
    counts.flags.writeable = False
    return counts
