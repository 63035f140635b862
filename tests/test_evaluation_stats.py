"""The statistics against published figures and references computed another way."""

import math

import numpy as np
import pytest

from quantkd.errors import DataError
from quantkd.evaluation import stats
from quantkd.evaluation.stats import CalibrationSums, GapRecovered, RowSums, bootstrap_interval, wilson_interval
from tests.conftest import refused
from tests.report_arms import bootstrap_by_scipy

NEEDED = stats.compute_questions_needed


@pytest.mark.parametrize(("function", "given", "expected"), [
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
    (wilson_interval, (81, 263), (0.2553, 0.3662)), (wilson_interval, (15, 148), (0.0624, 0.1605)),
    (wilson_interval, (0, 20), (0.0000, 0.1611)), (wilson_interval, (1, 29), (0.0061, 0.1718)),
    (wilson_interval, (20, 20), (0.8389, 1.0000)),  # the third, seen from the other side
    (NEEDED, (5, 45, 100), 23),  # the calculator of powerandsamplesize.com, which cites Connor 1987, page 209
    (NEEDED, (30, 15, 100), 155),  # that of clinicaltrials-tools.vercel.app, which cites Connor 1987
    (NEEDED, (15, 30, 100), 155), (NEEDED, (300, 150, 1000), 155), (NEEDED, (7, 7, 99), None),
    (NEEDED, (0, 0, 5), None),
])  # fmt: skip
def test_figures_as_published(function, given, expected):
    assert function(*given) == (expected if expected is None else pytest.approx(expected, abs=5e-5))


@pytest.mark.parametrize(("only_a", "only_b"), [(9, 2), (2, 9), (0, 6), (5, 5), (1, 0), (40, 20), (0, 0)])
def test_mcnemar_equals_the_sum_of_binomial_terms(only_a, only_b):
    n = only_a + only_b
    tail = sum(math.comb(n, k) for k in range(min(only_a, only_b) + 1)) / 2**n
    pairs = [(True, True)] * 30 + [(True, False)] * only_a + [(False, True)] * only_b + [(False, False)] * 12
    result = stats.mcnemar_exact(*map(list, zip(*pairs, strict=True)))
    assert (result.only_a, result.only_b) == (only_a, only_b)
    assert result.p_value == pytest.approx(min(1, 2 * tail), rel=1e-12)


def gap(after, *, teacher=(0.0,) * 50, before=(2.0, 4.0) * 25, transform="identity", higher_is_better=False, **options):
    sums = [RowSums(values, None, transform) for values in (teacher, before, after)]
    return stats.compute_gap_recovered(*sums, higher_is_better=higher_is_better, **options)


def test_known_shares_of_the_gap():
    assert gap([0.0] * 50) == GapRecovered(1.0, None, (1.0, 1.0))
    assert gap([2.0, 4.0] * 25) == GapRecovered(0.0, None, (0.0, 0.0))
    result = gap([1.5, 0.0] * 25)
    assert result.value == 0.75 and result.interval is not None and result.interval[0] < 0.75 < result.interval[1] < 1.0
    assert gap([3.0, 6.0] * 25).value == pytest.approx(-0.5)  # worse than before
    # Rows differ a thousandfold, and each recovers exactly half: only a paired interval has no width.
    before = np.logspace(0, 3, 50)
    result = gap(before / 2, before=before)
    assert result.value == pytest.approx(0.5) and result.interval == pytest.approx((0.5, 0.5))
    # Between perplexities, not between their logarithms.
    result = gap([1.5] * 50, teacher=[1.0] * 50, before=[2.0] * 50, transform="exp")
    assert result.value == pytest.approx((math.exp(1.5) - math.exp(2)) / (math.exp(1) - math.exp(2)))


def test_what_is_not_measurable():
    """Of ten questions four are solved by the teacher alone: a bootstrap calls that a gap, McNemar has p = 0.125."""
    before = np.random.default_rng(0).normal(0.01, 1.0, 50)
    result = gap(before, before=before)
    assert result.value is result.interval is None and "inside noise (95% interval" in str(result.reason)
    assert gap([1.0] * 50, before=[0.0] * 50).reason == "teacher and before score the same"
    assert gap([1.0], teacher=[0.0], before=[2.0]).reason == "a single row gives no interval"
    assert "teacher scores worse" in str(gap([1.0] * 50, higher_is_better=True, teacher=[0.0] * 50).reason)
    refused(DataError, r"\[50, 50, 49\] rows", gap, [0.0] * 49)
    teacher, before = [1.0] * 8 + [0.0] * 2, [1.0] * 4 + [0.0] * 6
    assert gap(teacher, teacher=teacher, before=before, higher_is_better=True).value == 1.0
    result = gap(teacher, teacher=teacher, before=before, higher_is_better=True, binary=True)
    assert result.value is None and "exact McNemar p = 0.12, n = 10" in str(result.reason)
    assert gap(teacher * 5, teacher=teacher * 5, before=before * 5, higher_is_better=True, binary=True).value == 1.0


@pytest.mark.parametrize("rows", [2, 40, 700])
def test_bootstrap_is_that_of_scipy(rows):
    rng = np.random.default_rng(rows)
    nats, tokens = rng.gamma(2, 3, rows), rng.integers(1, 50, rows)
    expected = bootstrap_by_scipy((nats, tokens), lambda a, b, axis: a.sum(axis) / b.sum(axis))
    assert bootstrap_interval(RowSums(nats, tokens)) == pytest.approx(expected, rel=1e-12)
    assert bootstrap_interval(RowSums(np.zeros(rows), np.ones(rows))) == (0.0, 0.0)


def test_difference_is_that_of_scipy_and_paired():
    rng = np.random.default_rng(5)
    tokens, hard = rng.integers(5, 90, 60), rng.gamma(2, 1, 60)
    a, b = tokens * hard * 0.2, tokens * hard * rng.normal(0.24, 0.02, 60)
    expected = bootstrap_by_scipy((a, b, tokens), lambda x, y, n, axis: (x.sum(axis) - y.sum(axis)) / n.sum(axis))
    found = stats.compute_difference(RowSums(a, tokens), RowSums(b, tokens))
    assert found.value == pytest.approx((a.sum() - b.sum()) / tokens.sum()) and found.interval is not None
    assert found.interval == pytest.approx(expected, rel=1e-9)
    apart = [bootstrap_interval(RowSums(sums, tokens)) for sums in (a, b)]
    assert found.interval[1] < 0 and apart[0][1] > apart[1][0]  # paired, they differ; their own intervals overlap
    assert stats.compute_difference(RowSums([3.0]), RowSums([1.0])).interval is None
    refused(DataError, r"\[60, 59\] rows", stats.compute_difference, RowSums(a), RowSums(b[1:]))


@pytest.mark.parametrize(("function", "given", "message"), [
    (bootstrap_interval, [RowSums([1.0])], "1 row"), (bootstrap_interval, [RowSums([])], "N at least 1"),
    (bootstrap_interval, [RowSums([1.0, 2.0], [1.0])], "one shape"),
    (bootstrap_interval, [RowSums([1.0, math.nan])], "not finite"),
    (bootstrap_interval, [RowSums([1.0, 2.0], [0.0, 0.0])], "none above 0"),
    (bootstrap_interval, [CalibrationSums([[0.5]], [[1]], [[1, 2]])], r"one shape \(N, M\)"),
    (bootstrap_interval, [CalibrationSums([0.5], [1], [1])], r"one shape \(N, M\)"),
    (bootstrap_interval, [CalibrationSums([[math.nan]], [[1]], [[1]])], "not finite"),
    (bootstrap_interval, [CalibrationSums([[0.0]], [[0]], [[0]])], "no tokens"),
    (wilson_interval, (0, 0), "0 correct of 0"), (wilson_interval, (3, 2), "3 correct of 2"),
    (wilson_interval, (-1, 5), "-1 correct of 5"), (stats.mcnemar_exact, ([], []), "same questions"),
    (stats.mcnemar_exact, ([True], [True, False]), "same questions"),
])  # fmt: skip
def test_impossible_figures_are_refused(function, given, message):
    refused(DataError, message, function, *given)
