"""Intervals, paired tests and the gap recovered, from sums over rows; docs/statistics.md explains each."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, bootstrap, norm

from quantkd.errors import DataError

Floats = NDArray[np.float64]
Interval = tuple[float, float]

CONFIDENCE = 0.95  # the coverage of every interval, and 1 - the level of every test
SEED, RESAMPLES = 0, 2000
_POWER = 0.8
_MAX_EXPONENT = 700.0  # exp of more is not a float64
_BATCH = 256  # resamples at a time: (this, rows) indices are in memory


@dataclass(frozen=True)
class RowSums:
    """A ratio of sums over rows, such as nats over tokens, or correct answers over questions."""

    numerators: ArrayLike  # (N,) one sum per row
    denominators: ArrayLike | None = None  # (N,) what it is divided by; None counts each row once
    transform: Literal["identity", "exp"] = "identity"  # "exp" for perplexity, which is exp of a mean

    def to_columns(self) -> Floats:
        """(N, 2) what is summed over rows, checked: numerators and denominators."""
        numerators = np.asarray(self.numerators, dtype=np.float64)
        given = self.denominators
        denominators = np.ones_like(numerators) if given is None else np.asarray(given, dtype=np.float64)
        columns = _stack("numerators and denominators", [numerators, denominators], 1)
        if denominators.min() < 0 or not denominators.sum():
            raise DataError("Found a negative denominator, or none above 0; expected counts such as tokens per row.")
        return columns

    def compute(self, sums: Floats) -> Floats:
        """(..., 2) -> (...): their ratio, transformed."""
        ratio = _divide(sums[..., 0], sums[..., 1])
        return np.exp(np.minimum(ratio, _MAX_EXPONENT)) if self.transform == "exp" else ratio


@dataclass(frozen=True)
class CalibrationSums:
    """Expected calibration error: `sum over bins of |confidence - correct| / tokens` (Guo et al. 2017, equation 3)."""

    confidences: ArrayLike  # (N, M), as the others: a row's sums in M bins of confidence
    correct: ArrayLike
    tokens: ArrayLike

    def to_columns(self) -> Floats:
        """(N, 3 M): confidences, correct, tokens."""
        parts = [np.asarray(part, dtype=np.float64) for part in (self.confidences, self.correct, self.tokens)]
        columns = _stack("confidences, correct and tokens", parts, 2)
        if not parts[2].sum() > 0:
            raise DataError("Found no tokens to calibrate on. Evaluate rows with answers.")
        return columns

    def compute(self, sums: Floats) -> Floats:
        """(..., 3 M) -> (...): the error, in [0, 1]."""
        confidences, correct, tokens = np.split(sums, 3, axis=-1)
        return _divide(np.abs(confidences - correct).sum(-1), tokens.sum(-1))


RowStatistic = RowSums | CalibrationSums  # a figure that follows from sums over rows


def compute_value(statistic: RowStatistic) -> float:
    """The figure over all rows."""
    return float(statistic.compute(statistic.to_columns().sum(0)))


def wilson_interval(correct: int, n: int) -> Interval:
    """Wilson's 95% score interval of a proportion, which also holds for few trials and near 0 and 1.

    Args:
        correct: successes.
        n: trials, at least 1.

    Returns:
        The bounds, within [0, 1].

    Raises:
        DataError: n below 1, or correct outside 0..n.

    Reference:
        Wilson 1927, Journal of the American Statistical Association 22:209.

    Example:
        >>> low, high = wilson_interval(40, 100)
        >>> print(f"{low:.3f} to {high:.3f}")
        0.309 to 0.498
    """
    if n < 1 or not 0 <= correct <= n:
        raise DataError(f"Found {correct} correct of {n}; expected at least 1 trial, and 0 to {n} correct.")
    interval = binomtest(int(correct), int(n)).proportion_ci(confidence_level=CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


class McNemarResult(NamedTuple):
    """How many questions only one of two models solved, and the two-sided p-value of so uneven a split."""

    only_a: int
    only_b: int
    p_value: float


def mcnemar_exact(a_correct: ArrayLike, b_correct: ArrayLike) -> McNemarResult:
    """McNemar's exact test: is the split of the questions that only one model solved more uneven than chance?

    Questions that both or neither solved carry no information about the difference and are left out.

    Args:
        a_correct: (N,) bool, the first model's verdicts.
        b_correct: (N,) bool, the second model's on the same questions in the same order.

    Returns:
        The counts `only_a` and `only_b` and the two-sided binomial `p_value`; 1.0 where no question separates the
        models.

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


def compute_questions_needed(only_a: int, only_b: int, n: int) -> int | None:
    """How many questions McNemar's test would need to detect a difference as large as the observed one.

    On a share `d = (only_a + only_b) / n` of the questions only one model is right, and their accuracies differ by
    `e = (only_a - only_b) / n`. If these were the true rates, `((1.96 * sqrt(d) + 0.84 * sqrt(d - e^2)) / e)^2`
    questions would give p < 0.05 four times in five.

    Args:
        only_a: questions that only the first model solved.
        only_b: questions that only the second solved.
        n: all questions, including those that both or neither solved.

    Returns:
        The number, rounded up; None where both solved equally many, which no number of questions tells apart.

    Reference:
        Connor 1987, Biometrics 43:207, for the test without continuity correction; the exact one needs up to a tenth
        more.

    Example:
        >>> compute_questions_needed(15, 5, 100)
        155
    """
    if only_a == only_b:
        return None
    discordant, difference = (only_a + only_b) / n, (only_a - only_b) / n
    z_level, z_power = float(norm.ppf((1 + CONFIDENCE) / 2)), float(norm.ppf(_POWER))
    spread = z_level * math.sqrt(discordant) + z_power * math.sqrt(max(0.0, discordant - difference**2))
    return math.ceil((spread / difference) ** 2)


def bootstrap_interval(statistic: RowStatistic) -> Interval:
    """The 95% percentile bootstrap interval of a figure, over whole rows."""
    # Not over tokens, which depend on each other within an answer: the interval would be far too narrow (Efron and
    # Tibshirani 1993, An Introduction to the Bootstrap, chapter 13).
    return _middle(_resample([statistic], lambda figures: figures[0]))


class Difference(NamedTuple):
    """One model's figure minus another's, with its paired bootstrap interval; None for a single row."""

    value: float
    interval: Interval | None


def compute_difference(a: RowStatistic, b: RowStatistic) -> Difference:
    """`a - b` with its paired bootstrap interval: each draw takes the same rows of both models."""
    value = compute_value(a) - compute_value(b)
    if len(a.to_columns()) < 2 and len(b.to_columns()) < 2:
        return Difference(value, None)
    return Difference(value, _middle(_resample([a, b], lambda figures: figures[0] - figures[1])))


class GapRecovered(NamedTuple):
    """A share of the gap with its interval, or the reason why the data cannot tell it."""

    value: float | None
    reason: str | None = None
    interval: Interval | None = None


def compute_gap_recovered(
    teacher: RowStatistic, before: RowStatistic, after: RowStatistic, *, higher_is_better: bool, binary: bool = False
) -> GapRecovered:
    """`(after - before) / (teacher - before)` of one metric over the same rows, where the data can tell it.

    If teacher and before cannot be told apart, the ratio divides noise by noise, and no value is given.

    Args:
        teacher: the teacher's figure.
        before: that of the quantized model before distillation.
        after: that of the distilled one; all three over the same rows in the same order.
        higher_is_better: True for accuracy and agreement, False for KL and perplexity.
        binary: rows are verdicts, 0 or 1: McNemar's exact test judges the gap too, because the bootstrap interval of
            few verdicts is too narrow.

    Returns:
        The share (0: none of the gap, 1: all of it) with its interval, which is None where the draws leave it
        unbounded; or the reason why there is none.

    Raises:
        DataError: models with different numbers of rows, or rows that a statistic refuses.

    Example:
        >>> teacher, before, after = RowSums([0, 0, 0, 0]), RowSums([3, 2, 4, 3]), RowSums([1, 0.5, 1, 0.5])
        >>> compute_gap_recovered(teacher, before, after, higher_is_better=False).value
        0.75
    """
    arms = (teacher, before, after)
    columns = [arm.to_columns() for arm in arms]
    num_rows = _count_rows(columns)
    teacher_value, before_value, after_value = (compute_value(arm) for arm in arms)
    gap = teacher_value - before_value
    if gap == 0:
        return GapRecovered(None, "teacher and before score the same")
    if num_rows < 2:
        return GapRecovered(None, "a single row gives no interval")
    noise = f"the teacher's gap of {gap:+.4g} is inside noise"
    if binary:
        test = mcnemar_exact(columns[0][:, 0] > 0.5, columns[1][:, 0] > 0.5)
        if test.p_value >= 1 - CONFIDENCE:
            needed = compute_questions_needed(test.only_a, test.only_b, num_rows)
            found = f"exact McNemar p = {test.p_value:.2g}, n = {num_rows}"
            return GapRecovered(None, f"{noise} ({found}; about {needed:,} questions would show it)")
    low, high = _middle(_resample(arms, lambda figures: figures[0] - figures[1]))
    if low <= 0 <= high:
        return GapRecovered(None, f"{noise} ({CONFIDENCE:.0%} interval {low:+.4g} to {high:+.4g})")
    if (gap > 0) != higher_is_better:
        reason = f"the teacher scores worse than before (gap {gap:+.4g}), so there is nothing to recover"
        return GapRecovered(None, reason)
    # The same draws, so numerator and denominator stay paired.
    shares = _resample(arms, lambda figures: _divide(figures[2] - figures[1], figures[0] - figures[1]))
    interval = _middle(shares)
    return GapRecovered((after_value - before_value) / gap, None, interval if np.isfinite(interval).all() else None)


def _resample(statistics: Sequence[RowStatistic], combine: Callable[[list[Floats]], Floats]) -> Floats:
    """(RESAMPLES,) what `combine` makes of the figures over rows drawn with replacement, the same rows for all."""
    columns = [statistic.to_columns() for statistic in statistics]
    num_rows = _count_rows(columns)
    if num_rows < 2:
        raise DataError("A bootstrap over 1 row has nothing to draw from. Evaluate at least 2 rows.")
    stacked, ends = np.concatenate(columns, axis=1), np.cumsum([one.shape[1] for one in columns])

    def figure(rows: NDArray[np.int64], axis: int = -1) -> Floats:
        # How often each row was drawn: the sums over all draws are one product.
        places = rows.reshape(-1, num_rows) + num_rows * np.arange(rows.size // num_rows)[:, None]
        counts = np.bincount(places.ravel(), minlength=rows.size).reshape(-1, num_rows)
        parts = np.split(counts.astype(np.float64) @ stacked, ends[:-1], axis=1)
        figures = [one.compute(part) for one, part in zip(statistics, parts, strict=True)]
        return combine(figures).reshape(rows.shape[:-1])

    # Only its draws are used: where one has no figure, scipy warns and gives no interval.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn = bootstrap(
            (np.arange(num_rows),), figure, n_resamples=RESAMPLES, batch=_BATCH, vectorized=True,
            method="percentile", random_state=np.random.default_rng(SEED),
        ).bootstrap_distribution  # fmt: skip
    return np.asarray(drawn, dtype=np.float64)


def _stack(names: str, parts: Sequence[Floats], ndim: int) -> Floats:
    """(N, C) from finite arrays of one shape, (N,) or (N, M)."""
    if parts[0].ndim != ndim or len({part.shape for part in parts}) != 1 or not parts[0].size:
        raise DataError(
            f"Found {names} of shapes {[part.shape for part in parts]}; expected all of one shape "
            f"{('(N,)', '(N, M)')[ndim - 1]}, N at least 1."
        )
    if not all(np.isfinite(part).all() for part in parts):
        raise DataError("Found a row sum that is not finite. Look for NaN in the evaluation that produced it.")
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


def _middle(draws: Floats) -> Interval:
    """The interval that holds the middle part of (R,) resampled values; NaN is left out."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(draws[~np.isnan(draws)], [tail, 1 - tail])
    return float(low), float(high)


def _count_rows(columns: Sequence[Floats]) -> int:
    sizes = [len(one) for one in columns]
    if len(set(sizes)) != 1:
        raise DataError(f"The models have {sizes} rows; expected the same rows for all of them.")
    return sizes[0]


def _divide(numerator: Floats, denominator: Floats) -> Floats:
    """A quotient that is infinite or NaN where a draw has no gap, or only rows without tokens."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.divide(numerator, denominator), dtype=np.float64)
