"""The figures of a report: every metric of every arm with its interval, paired tests, and the gap recovered."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from quantkd.evaluation.stats import (
    RowSums,
    bootstrap_ratio_interval,
    compute_gap_recovered,
    mcnemar_exact,
    wilson_interval,
)
from quantkd.report.arms import Arm

__all__ = ["Metric", "compute_results", "list_metrics", "order_results"]

CONFIDENCE = 0.95
_SEED = 0
_RESAMPLES = 2000
# More digits would differ between processors by the order of their sums.
_SIGNIFICANT_DIGITS = 10


@dataclass(frozen=True)
class Metric:
    """What one line of the report measures.

    Args:
        key: its name in results.json, such as "accuracy_0_shot".
        title: its name on the page.
        higher_is_better: the direction of the good.
        percent: shown as a percentage.
        setting: the accuracy setting it belongs to, such as "0-shot"; None for fidelity.
        numerator, denominator: the keys of the row sums, or of the verdict; no denominator counts each row once.
    """

    key: str
    title: str
    higher_is_better: bool
    percent: bool
    numerator: str
    denominator: str | None = "tokens"
    setting: str | None = None


_FIDELITY = (
    Metric("kl", "KL to the teacher (nats/token)", False, False, "kl_sum"),
    Metric("top1_agreement", "Top-1 agreement with the teacher", True, True, "agree"),
    Metric("ce", "Cross-entropy (nats/token)", False, False, "ce_sum"),
    Metric("perplexity", "Perplexity", False, False, "ce_sum"),
)


def list_metrics(arms: list[Arm]) -> list[Metric]:
    """The metrics of a comparison: fidelity always, and accuracy in each setting that an arm was evaluated in.

    Args:
        arms: all arms.

    Returns:
        The metrics in the order of the report; fewer shots come first.
    """
    settings = {setting for arm in arms for setting in arm.accuracy}
    accuracy = []
    for setting in sorted(settings, key=lambda name: (int((re.match(r"\d+", name) or ["0"])[0]), name)):
        key = "accuracy_" + re.sub(r"\W+", "_", setting)
        accuracy.append(Metric(key, f"Accuracy, {setting}", True, True, "correct_flexible", None, setting))
        title = f"Accuracy, {setting}, strict"
        accuracy.append(Metric(f"{key}_strict", title, True, True, "correct_strict", None, setting))
    return [*accuracy, *_FIDELITY]


def compute_results(arms: list[Arm]) -> dict[str, Any]:
    """All figures of a report, as JSON values; the same arms give the same bytes.

    Args:
        arms: as `load_arms` gives them.

    Returns:
        `arms` (per arm its metrics with intervals, paired tests and gap recovered), and for the arm "after" once more
        at the top `gap_recovered` {metric: number or None}, `gap_recovered_interval` and `not_measurable` {metric:
        why}; `missing` lists what was not evaluated.
    """
    metrics = list_metrics(arms)
    by_name = {arm.name: arm for arm in arms}
    compared = {arm.name: _describe_arm(arm, by_name, metrics) for arm in arms}
    after = compared["after"]["gap_recovered"]
    results: dict[str, Any] = _round(
        {
            "format_version": 1,
            "confidence": CONFIDENCE,
            "bootstrap": {"seed": _SEED, "resamples": _RESAMPLES},
            "transfer_set_digest": next((arm.transfer_set_digest for arm in arms if arm.fidelity), None),
            "arm_order": [arm.name for arm in arms],
            "metric_order": [metric.key for metric in metrics],
            "metrics": {metric.key: metric.title for metric in metrics},
            "arms": compared,
            "gap_recovered": {key: share["value"] for key, share in after.items()},
            "gap_recovered_interval": {key: share["interval"] for key, share in after.items()},
            "not_measurable": {key: share["reason"] for key, share in after.items() if share["reason"]},
            "missing": _list_missing(arms, metrics),
        }
    )
    return results


def order_results(results: dict[str, Any]) -> dict[str, Any]:
    """Results read back from JSON, whose keys are sorted, with arms and metrics in the order of the report again.

    Args:
        results: as `compute_results` gives them, or as results.json holds them.

    Returns:
        The same figures; teacher, before and after come first.
    """
    keys, gaps = results["metric_order"], ("metrics", "gap_recovered", "gap_recovered_interval", "not_measurable")
    return {
        **results,
        **{gap: {key: results[gap][key] for key in keys if key in results[gap]} for gap in gaps},
        "arms": {name: results["arms"][name] for name in results["arm_order"]},
    }


def _describe_arm(arm: Arm, arms: dict[str, Arm], metrics: list[Metric]) -> dict[str, Any]:
    """One arm as JSON: its figures with intervals, None where it was not evaluated."""
    description: dict[str, Any] = {
        "title": arm.title,
        "model": arm.model,
        "memory_bytes": arm.memory_bytes,
        "num_rows": len(arm.fidelity["tokens"]) if arm.fidelity else 0,
        "num_tokens": int(sum(arm.fidelity["tokens"])) if arm.fidelity else 0,
        "metrics": {},
        "mcnemar": {},
        "gap_recovered": {},
    }
    for metric in metrics:
        sums = _get_sums(arm, metric)
        if sums is not None:
            description["metrics"][metric.key] = _measure(metric, sums)
        if metric.setting is not None:
            tests = {other: _compare(arm, arms[other], metric) for other in ("teacher", "before") if other != arm.name}
            description["mcnemar"][metric.key] = {other: test for other, test in tests.items() if test is not None}
        if arm.name not in ("teacher", "before"):
            description["gap_recovered"][metric.key] = _compute_share(arm, arms, metric)
    return description


def _get_sums(arm: Arm, metric: Metric) -> RowSums | None:
    if metric.setting is None:
        if arm.fidelity is None or metric.denominator is None:
            return None
        return RowSums(arm.fidelity[metric.numerator], arm.fidelity[metric.denominator])
    rows = arm.accuracy.get(metric.setting)
    return None if rows is None else RowSums([float(row[metric.numerator]) for row in rows])


def _measure(metric: Metric, sums: RowSums) -> dict[str, Any]:
    numerators, denominators = sums.to_arrays()
    value = float(numerators.sum() / denominators.sum())
    interval: tuple[float, float] | None = None
    if metric.setting is not None:
        interval = wilson_interval(int(numerators.sum()), numerators.size, CONFIDENCE)
    elif numerators.size > 1:
        interval = bootstrap_ratio_interval(
            numerators, denominators, confidence=CONFIDENCE, seed=_SEED, resamples=_RESAMPLES
        )
    if metric.key == "perplexity":  # exp is monotone, so it carries the interval over
        value, interval = math.exp(value), interval and (math.exp(interval[0]), math.exp(interval[1]))
    return {"value": value, "interval": list(interval) if interval else None, "n": numerators.size}


def _compare(arm: Arm, other: Arm, metric: Metric) -> dict[str, Any] | None:
    assert metric.setting is not None
    rows, other_rows = arm.accuracy.get(metric.setting), other.accuracy.get(metric.setting)
    if rows is None or other_rows is None:
        return None
    result = mcnemar_exact([row[metric.numerator] for row in rows], [row[metric.numerator] for row in other_rows])
    return {"only_this": result.only_a, "only_other": result.only_b, "p_value": result.p_value}


def _compute_share(arm: Arm, arms: dict[str, Arm], metric: Metric) -> dict[str, Any]:
    """The gap that one arm recovered in one metric, and why there is none."""
    involved = [arms["teacher"], arms["before"], arm]
    lacking = [one.name for one in involved if _get_sums(one, metric) is None]
    if lacking:
        return {"value": None, "interval": None, "reason": f"not evaluated for {', '.join(lacking)}"}
    teacher, before, after = (_get_sums(one, metric) or RowSums([]) for one in involved)
    share = compute_gap_recovered(
        teacher,
        before,
        after,
        higher_is_better=metric.higher_is_better,
        binary=metric.setting is not None,
        transform="exp" if metric.key == "perplexity" else "identity",
        confidence=CONFIDENCE,
        seed=_SEED,
        resamples=_RESAMPLES,
    )
    return {"value": share.value, "interval": share.interval and list(share.interval), "reason": share.reason}


def _list_missing(arms: list[Arm], metrics: list[Metric]) -> list[str]:
    settings = list(dict.fromkeys(metric.setting for metric in metrics if metric.setting))
    missing = [] if settings else ["Accuracy was not evaluated for any arm."]
    for arm in arms:
        missing += [f"{arm.title}: accuracy, {setting}, was not evaluated." for setting in settings
                    if setting not in arm.accuracy]  # fmt: skip
        if arm.fidelity is None:
            missing.append(f"{arm.title}: fidelity to the teacher was not evaluated.")
        if arm.memory_bytes is None:
            missing.append(f"{arm.title}: the memory footprint was not measured.")
    return missing


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_round(item) for item in value]
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value
