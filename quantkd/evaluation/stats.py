"""Intervals, a paired test, and the share of the teacher's gap that came back; docs/statistics.md explains each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest, norm

from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.bootstrap import (
    BootstrapSettings,
    Interval,
    check_confidence,
    compute_percentiles,
    resample,
)
from quantkd.evaluation.row_statistics import RowStatistic, compute_value, divide


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
        >>> low, high = wilson_interval(40, 100)
        >>> print(f"{low:.3f} to {high:.3f}")
        0.309 to 0.498
    """
    check_confidence(confidence)
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


def compute_questions_needed(
    only_a: int, only_b: int, n: int, *, level: float = 0.05, power: float = 0.8
) -> int | None:
    """How many questions McNemar's test would need to see a difference as large as the observed one.

    Of a share `d = (only_a + only_b) / n` of the questions one model alone is right, and their accuracies differ by
    `e = (only_a - only_b) / n`. Were these the true rates, `((z_a * sqrt(d) + z_b * sqrt(d - e^2)) / e)^2` questions
    give p < `level` with probability `power`, with the normal quantiles z_a at 1 - level / 2 and z_b at `power`.

    Args:
        only_a: questions that only the first model solved.
        only_b: questions that only the second solved.
        n: all questions, those included that both or neither solved.
        level: of the two-sided test.
        power: how often the difference shall be seen.

    Returns:
        The number, rounded up; None where both solved equally many, which no number of questions tells apart.

    Raises:
        DataError: counts that cannot be.
        ConfigError: a level or power outside (0, 1).

    Reference:
        Connor 1987, Biometrics 43:207. It is the test without continuity correction; the exact one takes up to a tenth
        more.

    Example:
        >>> compute_questions_needed(15, 5, 100)
        155
    """
    if min(only_a, only_b) < 0 or only_a + only_b > n or n < 1:
        raise DataError(f"Found {only_a} and {only_b} questions that one model alone solved, of {n}; expected counts.")
    if not (0 < level < 1 and 0 < power < 1):
        raise ConfigError(f"Found level={level} and power={power}; expected both between 0 and 1.")
    if only_a == only_b:
        return None
    discordant, difference = (only_a + only_b) / n, (only_a - only_b) / n
    z_level, z_power = float(norm.ppf(1 - level / 2)), float(norm.ppf(power))
    spread = z_level * math.sqrt(discordant) + z_power * math.sqrt(max(0.0, discordant - difference**2))
    return math.ceil((spread / difference) ** 2)


def compute_gap_recovered(
    teacher: RowStatistic,
    before: RowStatistic,
    after: RowStatistic,
    *,
    higher_is_better: bool,
    binary: bool = False,
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
        confidence: the coverage of the intervals, and 1 - the level of the test.
        seed: of the paired bootstrap.
        resamples: how many it draws.

    Returns:
        The share with its interval, or the reason why there is none.

    Raises:
        DataError: arms of different length, or rows that a statistic refuses.
        ConfigError: a confidence outside (0, 1), or no resamples.

    Example:
        >>> teacher, before, after = RowSums([0, 0, 0, 0]), RowSums([3, 2, 4, 3]), RowSums([1, 0.5, 1, 0.5])
        >>> compute_gap_recovered(teacher, before, after, higher_is_better=False).value
        0.75
    """
    settings = BootstrapSettings(confidence, seed, resamples)
    arms = (teacher, before, after)
    columns = [arm.to_columns() for arm in arms]
    sizes = [len(one) for one in columns]
    if len(set(sizes)) != 1:
        raise DataError(f"Teacher, before and after have {sizes} rows; expected the same rows for all three.")
    teacher_value, before_value, after_value = (compute_value(arm) for arm in arms)
    gap = teacher_value - before_value
    if gap == 0:
        return GapRecovered(None, "teacher and before score the same")
    if sizes[0] < 2:
        return GapRecovered(None, "a single row gives no interval")
    noise = f"the teacher's gap of {gap:+.4g} is inside noise"
    if binary:
        test = mcnemar_exact(columns[0][:, 0] > 0.5, columns[1][:, 0] > 0.5)
        if test.p_value >= 1 - confidence:
            needed = compute_questions_needed(test.only_a, test.only_b, sizes[0], level=1 - confidence)
            found = f"exact McNemar p = {test.p_value:.2g}, n = {sizes[0]}"
            return GapRecovered(None, f"{noise} ({found}; to see it takes about {needed:,} questions)")
    teachers, befores, afters = resample(arms, settings)
    gaps = teachers - befores
    low, high = compute_percentiles(gaps, confidence)
    if low <= 0 <= high:
        return GapRecovered(None, f"{noise} ({confidence:.0%} interval {low:+.4g} to {high:+.4g})")
    if (gap > 0) != higher_is_better:
        return GapRecovered(
            None, f"the teacher scores worse than before (gap {gap:+.4g}), so there is nothing to recover"
        )
    shares = divide(afters - befores, gaps)  # of one draw, so numerator and denominator stay paired
    interval = compute_percentiles(shares, confidence)
    return GapRecovered((after_value - before_value) / gap, None, interval if np.isfinite(interval).all() else None)
