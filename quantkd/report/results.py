"""The figures of a report: every metric of every arm with its interval, paired tests, and the gap recovered."""

from __future__ import annotations

from typing import Any

from quantkd.evaluation.bootstrap import BootstrapSettings, bootstrap_interval, compute_difference
from quantkd.evaluation.row_statistics import RowStatistic, compute_value
from quantkd.evaluation.stats import (
    compute_gap_recovered,
    compute_questions_needed,
    mcnemar_exact,
    wilson_interval,
)
from quantkd.report.arms import Arm
from quantkd.report.breakdown import describe_bins
from quantkd.report.metrics import Metric, get_statistic, list_metrics

CONFIDENCE = 0.95
_SETTINGS = BootstrapSettings(CONFIDENCE, seed=0, resamples=2000)
# More digits would differ between processors by the order of their sums.
_SIGNIFICANT_DIGITS = 10
# Which arms each is compared with; "control" trained without the teacher. Any other one, such as an exported form, is
# compared with "after" as well: what the change of form cost.
_COMPARED_WITH: dict[str, tuple[str, ...]] = {
    "teacher": ("before",),
    "before": ("teacher",),
    "control": ("before", "teacher"),
    "after": ("before", "control", "teacher"),
}
_OTHERS = ("before", "control", "teacher", "after")


def compute_results(arms: list[Arm]) -> dict[str, Any]:
    """All figures of a report, as JSON values; the same arms give the same bytes."""
    metrics = list_metrics(arms)
    by_name = {arm.name: arm for arm in arms}
    compared = {arm.name: _describe_arm(arm, by_name, metrics) for arm in arms}
    students = [name for name in compared if name not in ("teacher", "before")]
    subject = students[0] if students else None
    shares = compared[subject]["gap_recovered"] if subject else {}
    gaps = compared["before"]["mcnemar"] if "before" in compared else {}
    results: dict[str, Any] = _round(
        {
            "format_version": 1,
            "confidence": CONFIDENCE,
            "bootstrap": {"seed": _SETTINGS.seed, "resamples": _SETTINGS.resamples},
            "transfer_set_digest": next((arm.transfer_set_digest for arm in arms if arm.fidelity), None),
            "arm_order": [arm.name for arm in arms],
            "metric_order": [metric.key for metric in metrics],
            "metrics": {metric.key: metric.title for metric in metrics},
            "arms": compared,
            "subject": subject,
            "gap_recovered": {key: share["value"] for key, share in shares.items()},
            "gap_recovered_interval": {key: share["interval"] for key, share in shares.items()},
            "not_measurable": {key: share["reason"] for key, share in shares.items() if share["reason"]},
            "questions_needed": {
                key: tests["teacher"]["questions_needed"] for key, tests in gaps.items() if "teacher" in tests
            },
            "missing": _list_missing(arms, metrics),
        }
    )
    return results


def order_results(results: dict[str, Any]) -> dict[str, Any]:
    """Results read back from JSON, whose keys are sorted, with arms and metrics in the order of the report again."""
    keys, gaps = results["metric_order"], ("metrics", "gap_recovered", "gap_recovered_interval", "not_measurable")
    return {
        "subject": "after",  # which every report of an earlier version has, and does not say
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
        "differences": {},
        "mcnemar": {},
        "gap_recovered": {},
    }
    others = [arms[name] for name in _COMPARED_WITH.get(arm.name, _OTHERS) if name in arms]
    for metric in metrics:
        statistic = get_statistic(arm, metric)
        if statistic is not None:
            description["metrics"][metric.key] = _measure(metric, statistic)
        if metric.setting is not None:
            tests = {other.name: _compare(arm, other, metric) for other in others}
            description["mcnemar"][metric.key] = {other: test for other, test in tests.items() if test is not None}
        if arm.name not in ("teacher", "before"):
            description["gap_recovered"][metric.key] = _compute_share(arm, arms, metric)
    description["differences"] = {other.name: _compute_differences(arm, other, metrics) for other in others}
    for kind in ("position", "entropy", "dense_position", "dense_entropy"):
        if kind in arm.bins:
            prefix = "dense_" if kind.startswith("dense_") else ""
            key = f"{prefix}kl_by_{kind.removeprefix('dense_')}"
            description[key] = describe_bins(arm.bins[kind], _SETTINGS)
    return description


def _measure(metric: Metric, statistic: RowStatistic) -> dict[str, Any]:
    columns = statistic.to_columns()
    interval: tuple[float, float] | None = None
    if metric.setting is not None:
        interval = wilson_interval(int(columns[:, 0].sum()), len(columns), CONFIDENCE)
    elif len(columns) > 1:
        interval = bootstrap_interval(statistic, _SETTINGS)
    return {"value": compute_value(statistic), "interval": interval and list(interval), "n": len(columns)}


def _compute_differences(arm: Arm, other: Arm, metrics: list[Metric]) -> dict[str, Any]:
    """This arm's figures less the other's, where both have them."""
    differences = {}
    for metric in metrics:
        own, others = get_statistic(arm, metric), get_statistic(other, metric)
        if own is not None and others is not None:
            found = compute_difference(own, others, _SETTINGS)
            differences[metric.key] = {"value": found.value, "interval": found.interval and list(found.interval)}
    return differences


def _compare(arm: Arm, other: Arm, metric: Metric) -> dict[str, Any] | None:
    own, others = get_statistic(arm, metric), get_statistic(other, metric)
    if own is None or others is None:
        return None
    verdicts = [statistic.to_columns()[:, 0] > 0.5 for statistic in (own, others)]
    result = mcnemar_exact(*verdicts)
    needed = compute_questions_needed(result.only_a, result.only_b, len(verdicts[0]), level=1 - CONFIDENCE)
    return {
        "only_this": result.only_a,
        "only_other": result.only_b,
        "p_value": result.p_value,
        "questions_needed": needed,
    }


def _compute_share(arm: Arm, arms: dict[str, Arm], metric: Metric) -> dict[str, Any]:
    """The gap that one arm recovered in one metric, and why there is none."""
    involved = {"teacher": arms.get("teacher"), "before": arms.get("before"), arm.name: arm}
    found = [None if one is None else get_statistic(one, metric) for one in involved.values()]
    lacking = [name for name, statistic in zip(involved, found, strict=True) if statistic is None]
    teacher, before, after = found
    if teacher is None or before is None or after is None:
        return {"value": None, "interval": None, "reason": f"not evaluated for {', '.join(lacking)}"}
    share = compute_gap_recovered(
        teacher,
        before,
        after,
        higher_is_better=metric.higher_is_better,
        binary=metric.setting is not None,
        confidence=CONFIDENCE,
        seed=_SETTINGS.seed,
        resamples=_SETTINGS.resamples,
    )
    return {"value": share.value, "interval": share.interval and list(share.interval), "reason": share.reason}


def _list_missing(arms: list[Arm], metrics: list[Metric]) -> list[str]:
    names = {arm.name for arm in arms}
    absent = [f"There is no arm {name}, so no share of the gap." for name in ("teacher", "before") if name not in names]
    settings = list(dict.fromkeys(metric.setting for metric in metrics if metric.setting))
    missing = [] if settings else ["Accuracy was not evaluated for any arm."]
    for arm in arms:
        missing += [f"{arm.title}: accuracy, {setting}, was not evaluated." for setting in settings
                    if setting not in arm.accuracy]  # fmt: skip
        if arm.fidelity is None:
            missing.append(f"{arm.title}: fidelity to the teacher was not evaluated.")
        if arm.memory_bytes is None:
            missing.append(f"{arm.title}: the memory footprint was not measured.")
    return absent + missing


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_round(item) for item in value]
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value
