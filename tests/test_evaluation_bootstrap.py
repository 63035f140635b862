"""The bootstrap over rows, and the calibration error, against scipy and references computed another way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from quantkd.errors import DataError
from quantkd.evaluation.bootstrap import (
    BootstrapSettings,
    bootstrap_interval,
    bootstrap_ratio_interval,
    compute_difference,
)
from quantkd.evaluation.row_statistics import CalibrationSums, RowSums, compute_value


@pytest.mark.parametrize("rows", [2, 40, 700])
def test_bootstrap_is_that_of_scipy(rows: int) -> None:
    rng = np.random.default_rng(rows)
    nats, tokens = rng.gamma(2, 3, rows), rng.integers(1, 50, rows)
    expected = bootstrap(
        (nats, tokens), lambda a, b, axis: a.sum(axis) / b.sum(axis), paired=True, vectorized=True, n_resamples=999,
        batch=256, method="percentile", confidence_level=0.9, random_state=np.random.default_rng(7),
    ).confidence_interval  # fmt: skip
    found = bootstrap_ratio_interval(nats, tokens, confidence=0.9, seed=7, resamples=999)
    assert found == pytest.approx((expected.low, expected.high), rel=1e-12)


def test_difference_is_that_of_scipy_and_paired() -> None:
    rng = np.random.default_rng(5)
    tokens, hard = rng.integers(5, 90, 60), rng.gamma(2, 1, 60)
    a, b = tokens * hard * 0.2, tokens * hard * rng.normal(0.24, 0.02, 60)
    expected = bootstrap(
        (a, b, tokens), lambda x, y, n, axis: (x.sum(axis) - y.sum(axis)) / n.sum(axis), paired=True, vectorized=True,
        n_resamples=2000, batch=256, method="percentile", random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    found = compute_difference(RowSums(a, tokens), RowSums(b, tokens))
    assert found.value == pytest.approx((a.sum() - b.sum()) / tokens.sum()) and found.interval is not None
    assert found.interval == pytest.approx((expected.low, expected.high), rel=1e-9)
    apart = [bootstrap_interval(RowSums(sums, tokens)) for sums in (a, b)]
    assert found.interval[1] < 0 and apart[0][1] > apart[1][0]  # paired, they differ; their own intervals overlap
    assert compute_difference(RowSums([3.0]), RowSums([1.0])).interval is None
    with pytest.raises(DataError, match=r"\[60, 59\] rows"):
        compute_difference(RowSums(a), RowSums(b[1:]))


def test_calibration_of_made_up_tokens() -> None:
    """Against the definition, token by token: 1,000 of them in 15 bins, right as often as they say."""
    rng = np.random.default_rng(2)
    confidence, rows = rng.uniform(0.02, 1, 1000), rng.integers(0, 20, 1000)
    correct = rng.random(1000) < confidence
    bins = np.ceil(confidence * 15).astype(int) - 1

    def spread(values: np.ndarray) -> np.ndarray:
        sums = np.zeros((20, 15))
        np.add.at(sums, (rows, bins), values)
        return sums

    sums = CalibrationSums(spread(confidence), spread(correct), spread(np.ones(1000)))
    members = [bins == one for one in range(15)]
    expected = sum(one.mean() * abs(confidence[one].mean() - correct[one].mean()) for one in members)
    assert compute_value(sums) == pytest.approx(expected) and expected < 0.06
    always = CalibrationSums(spread(np.ones(1000)), spread(np.arange(1000) % 4 > 0), spread(np.ones(1000)))
    assert compute_value(always) == pytest.approx(
        sum(one.mean() * (1 - (np.arange(1000) % 4 > 0)[one].mean()) for one in members)
    )
    low, high = bootstrap_interval(sums, BootstrapSettings(resamples=300))
    assert 0 < low < high < 0.2


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (([[0.5]], [[1]], [[1, 2]]), r"one shape \(N, M\)"),
        (([0.5], [1], [1]), r"one shape \(N, M\)"),
        (([[math.nan]], [[1]], [[1]]), "not finite"),
        (([[0.0]], [[0]], [[0]]), "no tokens"),
    ],
)
def test_calibration_refuses(parts: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        compute_value(CalibrationSums(*parts))


def test_bootstrap_matches_the_normal_interval_on_many_rows() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(20, 200, 3_000)
    nats = tokens * rng.gamma(2, 0.1, 3_000)
    ratio = nats.sum() / tokens.sum()
    half = 1.96 * (nats - ratio * tokens).std() / tokens.mean() / math.sqrt(3_000)  # the ratio estimator's delta method
    low, high = bootstrap_ratio_interval(nats, tokens)
    assert (low, high) == pytest.approx((ratio - half, ratio + half), abs=0.15 * half)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = bootstrap_ratio_interval(rng.normal(1.0, 1.0, 60), None, resamples=300)
        hits += low <= 1.0 <= high
    assert 178 <= hits <= 199  # 95% of 200 is 190, four standard deviations either way


def test_bootstrap_draws_rows_not_tokens() -> None:
    """100 identical copies of each token add no information: the interval stays as wide as with one."""
    nats = np.random.default_rng(1).normal(2.0, 1.0, 40)
    assert bootstrap_ratio_interval(nats * 100, np.full(40, 100)) == pytest.approx(bootstrap_ratio_interval(nats, None))


def test_bootstrap_is_seeded_and_takes_constant_rows() -> None:
    nats = np.random.default_rng(1).normal(2.0, 1.0, 40)
    assert bootstrap_ratio_interval(nats, None) == bootstrap_ratio_interval(nats, None, seed=0)
    assert bootstrap_ratio_interval(nats, None) != bootstrap_ratio_interval(nats, None, seed=1)
    assert bootstrap_ratio_interval(np.zeros(5), np.ones(5)) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("numerators", "denominators", "message"),
    [
        ([1.0], None, "1 row"),
        ([], None, "N at least 1"),
        ([1.0, 2.0], [1.0], "one shape"),
        ([1.0, math.nan], None, "not finite"),
        ([1.0, 2.0], [0.0, 0.0], "none above 0"),
    ],
)
def test_bootstrap_refuses(numerators: list[float], denominators: list[float] | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        bootstrap_ratio_interval(numerators, denominators)
