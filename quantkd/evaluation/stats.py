"""Intervals, a paired test, and the share of the teacher's gap that came back; docs/evaluation.md explains each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, bootstrap

from quantkd.errors import ConfigError, DataError

__all__ = [
    "GapRecovered",
    "McNemarResult",
    "RowSums",
    "bootstrap_ratio_interval",
    "compute_gap_recovered",
    "mcnemar_exact",
    "wilson_interval",
]

Interval = tuple[float, float]
Floats = NDArray[np.float64]

_BATCH = 256  # resamples drawn at once: (this, rows) indices are held in memory


@dataclass(frozen=True)
class McNemarResult:
    """The paired comparison of two models on the same questions.

    Args:
        only_a: questions that only the first model solved.
        only_b: questions that only the second solved.
        p_value: two-sided; how likely so uneven a split would be if both were equally good.
    """

    only_a: int
    only_b: int
    p_value: float


@dataclass(frozen=True)
class RowSums:
    """A metric that is a ratio of sums over rows, such as nats over tokens, or right answers over questions.

    Args:
        numerators: (N,) one sum a row.
        denominators: (N,) what it is divided by; None counts each row once.
    """

    numerators: ArrayLike
    denominators: ArrayLike | None = None

    def to_arrays(self) -> tuple[Floats, Floats]:
        """Numerators and denominators as arrays.

        Returns:
            Both as float64 (N,).

        Raises:
            DataError: lengths that differ, no rows, values that are not finite, or denominators without a positive sum.
        """
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


@dataclass(frozen=True)
class GapRecovered:
    """The share of the distance from "before" to the teacher that "after" has covered: 0 none, 1 all of it.

    Args:
        value: the share; None where the data cannot tell it.
        reason: why there is no value; None where there is one.
        interval: its bootstrap interval; None without a value, or where the resamples leave it unbounded.
    """

    value: float | None
    reason: str | None = None
    interval: Interval | None = None


def wilson_interval(correct: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion; unlike the textbook one it holds for few trials and near 0 and 1.

    Args:
        correct: successes.
        n: trials, at least 1.
        confidence: the coverage, in (0, 1).

    Returns:
        The bounds, within [0, 1].

    Raises:
        DataError: n below 1, or correct outside 0..n.
        ConfigError: a confidence outside (0, 1).

    Reference:
        Wilson 1927, Journal of the American Statistical Association 22:209.

    Example:
        >>> [round(bound, 3) for bound in wilson_interval(40, 100)]
        [0.309, 0.498]
    """
    _check_confidence(confidence)
    if n < 1 or not 0 <= correct <= n:
        raise DataError(f"Found {correct} correct of {n}; expected at least 1 trial, and 0 to {n} correct.")
    interval = binomtest(int(correct), int(n)).proportion_ci(confidence_level=confidence, method="wilson")
    return float(interval.low), float(interval.high)


def mcnemar_exact(a_correct: ArrayLike, b_correct: ArrayLike) -> McNemarResult:
    """McNemar's exact test: of the questions that one model alone solved, is the split more uneven than a coin's?

    Questions that both or neither solved say nothing about it, and drop out.

    Args:
        a_correct: (N,) bool, the first model's verdicts.
        b_correct: (N,) bool, the second model's on the same questions in the same order.

    Returns:
        The two counts and the two-sided binomial p-value; 1.0 where no question separates the models.

    Raises:
        DataError: shapes that differ, or no questions.

    Reference:
        McNemar 1947, Psychometrika 12:153, in its exact binomial form.

    Example:
        >>> mcnemar_exact([True] * 9 + [False] * 2, [False] * 9 + [True] * 2).p_value
        0.0654296875
    """
    a, b = np.asarray(a_correct, dtype=bool), np.asarray(b_correct, dtype=bool)
    if a.ndim != 1 or a.shape != b.shape or not a.size:
        raise DataError(f"Found verdicts of shapes {a.shape} and {b.shape}; expected the same questions for both.")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    p_value = float(binomtest(only_a, only_a + only_b, 0.5).pvalue) if only_a + only_b else 1.0
    return McNemarResult(only_a, only_b, p_value)


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

    Args:
        numerators: (N,) one sum a row, such as nats.
        denominators: (N,) such as tokens in the row; None counts each row once.
        confidence: the coverage, in (0, 1).
        seed: of the resampling; the same seed gives the same interval.
        resamples: how many resamples.

    Returns:
        The bounds.

    Raises:
        DataError: fewer than 2 rows, or rows that `RowSums` refuses.
        ConfigError: a confidence outside (0, 1), or no resamples.

    Reference:
        Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13.
    """
    num, den = RowSums(numerators, denominators).to_arrays()
    values = _resample([num, den], lambda a, b, axis: _divide(a.sum(axis), b.sum(axis)), seed, resamples)
    return _percentiles(values, confidence)


def compute_gap_recovered(
    teacher: RowSums,
    before: RowSums,
    after: RowSums,
    *,
    higher_is_better: bool,
    binary: bool = False,
    transform: Literal["identity", "exp"] = "identity",
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = 2000,
) -> GapRecovered:
    """`(after - before) / (teacher - before)` of one metric over the same rows, where the data can tell it.

    If teacher and before cannot be told apart, the ratio divides noise by noise, and no value is given.

    Args:
        teacher: the teacher's row sums.
        before: those of the quantized model before distillation.
        after: those after it; all three on the same rows in the same order.
        higher_is_better: True for accuracy and agreement, False for KL and perplexity.
        binary: rows are verdicts, 0 or 1: McNemar's exact test judges the gap, too; a bootstrap of few is too sure.
        transform: "exp" for perplexity, which is exp of a mean.
        confidence: the coverage of the intervals, and 1 - the level of the test.
        seed, resamples: of the paired bootstrap.

    Returns:
        The share with its interval, or the reason why there is none.

    Raises:
        DataError: arms of different length, or rows that `RowSums` refuses.
        ConfigError: a confidence outside (0, 1), or no resamples.

    Example:
        >>> teacher, before, after = RowSums([0, 0, 0, 0]), RowSums([3, 2, 4, 3]), RowSums([1, 0.5, 1, 0.5])
        >>> compute_gap_recovered(teacher, before, after, higher_is_better=False).value
        0.75
    """
    arms = [arm.to_arrays() for arm in (teacher, before, after)]
    sizes = [numerators.size for numerators, _ in arms]
    if len(set(sizes)) != 1:
        raise DataError(f"Teacher, before and after have {sizes} rows; expected the same rows for all three.")
    _check_confidence(confidence)

    def compute_values(*sums: Floats) -> list[Floats]:
        ratios = [_divide(sums[place].sum(-1), sums[place + 1].sum(-1)) for place in (0, 2, 4)]
        return [np.exp(ratio) for ratio in ratios] if transform == "exp" else ratios

    sums = [values for arm in arms for values in arm]
    teacher_value, before_value, after_value = (float(value) for value in compute_values(*sums))
    gap = teacher_value - before_value
    if gap == 0:
        return GapRecovered(None, "teacher and before score the same")
    if sizes[0] < 2:
        return GapRecovered(None, "a single row gives no interval")
    noise = f"the teacher's gap of {gap:+.4g} is inside noise"
    if binary and (p_value := mcnemar_exact(arms[0][0] > 0.5, arms[1][0] > 0.5).p_value) >= 1 - confidence:
        return GapRecovered(None, f"{noise} (exact McNemar p = {p_value:.2g}, n = {sizes[0]})")
    gaps = _resample(sums, lambda *drawn, axis: (v := compute_values(*drawn))[0] - v[1], seed, resamples)
    low, high = _percentiles(gaps, confidence)
    if low <= 0 <= high:
        return GapRecovered(None, f"{noise} ({confidence:.0%} interval {low:+.4g} to {high:+.4g})")
    if (gap > 0) != higher_is_better:
        return GapRecovered(
            None, f"the teacher scores worse than before (gap {gap:+.4g}), so there is nothing to recover"
        )
    # The same seed draws the same rows, so numerator and denominator of the share stay paired.
    gains = _resample(sums, lambda *drawn, axis: (v := compute_values(*drawn))[2] - v[1], seed, resamples)
    shares = _divide(gains, gaps)
    interval = _percentiles(shares[~np.isnan(shares)], confidence)
    return GapRecovered((after_value - before_value) / gap, None, interval if np.isfinite(interval).all() else None)


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    # A resample without a gap, or of rows that weigh nothing, gives infinity or NaN; callers treat them.
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(numerator, denominator), dtype=np.float64)


def _resample(sums: list[Floats], statistic: Callable[..., Floats], seed: int, resamples: int) -> Floats:
    """(resamples,) values of the statistic over rows drawn with replacement, the same rows of all sums."""
    if resamples < 1:
        raise ConfigError(f"Found resamples={resamples}; expected at least 1, and about 2000 for a 95% interval.")
    if sums[0].size < 2:
        raise DataError("A bootstrap over 1 row has nothing to draw from. Evaluate at least 2 rows.")
    result = bootstrap(
        sums,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=_BATCH,
        method="percentile",
        random_state=np.random.default_rng(seed),
    )
    return np.asarray(result.bootstrap_distribution, dtype=np.float64)


def _percentiles(values: Floats, confidence: float) -> Interval:
    _check_confidence(confidence)
    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ConfigError(f"Found confidence={confidence}; expected a share between 0 and 1, such as 0.95.")
