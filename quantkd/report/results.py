"""The figures of a report: every metric of every arm with its interval, paired tests, and the gap recovered."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from quantkd.errors import DataError
from quantkd.evaluation.arms import Arm
from quantkd.evaluation.stats import (
    CONFIDENCE,
    RESAMPLES,
    SEED,
    Floats,
    RowStatistic,
    RowSums,
    bootstrap_interval,
    compute_difference,
    compute_gap_recovered,
    compute_questions_needed,
    compute_value,
    mcnemar_exact,
    wilson_interval,
)

# More digits would differ between processors by the order of their sums.
_SIGNIFICANT_DIGITS = 10
_FIRST = ("teacher", "before", "after")  # in the report; others follow by name
# Which arms each is compared with; "control" trained without the teacher. Any other one, such as an exported form, is
# compared with "after" as well: what the change of form cost.
_COMPARED_WITH: dict[str, tuple[str, ...]] = {
    "teacher": ("before",),
    "before": ("teacher",),
    "control": ("before", "teacher"),
    "after": ("before", "control", "teacher"),
}
_OTHERS = ("before", "control", "teacher", "after")
BREAKDOWNS = ("position", "entropy", "dense_position", "dense_entropy")


@dataclass(frozen=True)
class Metric:
    """One line of the report.

    Args:
        key: its name in results.json, such as "accuracy_0_shot".
        title: its name on the page.
        higher_is_better: False for KL and perplexity.
        setting: the accuracy setting it belongs to, such as "0-shot"; None for fidelity.
        grader: which of the setting's verdicts, as `Accuracy.statistics` names them.
    """

    key: str
    title: str
    higher_is_better: bool
    setting: str | None = None
    grader: str = ""

    def find(self, arm: Arm) -> RowStatistic | None:
        """One arm's figure; None if it was not evaluated."""
        if self.setting is None:
            return arm.fidelity.statistics.get(self.key) if arm.fidelity else None
        accuracy = arm.accuracy.get(self.setting)
        return None if accuracy is None else accuracy.statistics.get(self.grader)


_FIDELITY = (
    Metric("kl", "KL to the teacher (nats/token)", False),
    Metric("top1_agreement", "Top-1 agreement with the teacher", True),
    Metric("ce", "Cross-entropy (nats/token)", False),
    Metric("perplexity", "Perplexity", False),
    Metric("reverse_kl", "Reverse KL (nats/token)", False),
    Metric("ece", "Calibration error (ECE)", False),
    Metric("dense_kl", "KL, whole vocabulary (nats/token)", False),
    Metric("dense_reverse_kl", "Reverse KL, whole vocabulary (nats/token)", False),
    Metric("dense_top1_agreement", "Top-1 agreement, teacher beside the model", True),
)


def load_arms(folder: Path) -> list[Arm]:
    """Read all arms of a run, and check that they were evaluated on the same items."""
    if not folder.is_dir():
        raise DataError(
            f"There is no folder {folder}; expected what `quantkd evaluate --run_dir {folder.parent}` writes. "
            "Evaluate first, or correct the path."
        )
    # Records of answers are in the same folder.
    paths = {path.stem: path for path in sorted(folder.glob("*.json")) if not path.name.endswith(".settings.json")}
    if not paths:
        raise DataError(
            f"{folder} holds no arms; expected files such as teacher.json, before.json and after.json. Write them with "
            f"`quantkd evaluate --arm NAME --run_dir {folder.parent}`."
        )
    order = [*(name for name in _FIRST if name in paths), *(name for name in paths if name not in _FIRST)]
    arms = [Arm.read(paths[name]) for name in order]
    for arm in arms:
        if arm.fidelity is None and not arm.accuracy:
            raise DataError(f"{paths[arm.name]} holds neither fidelity nor accuracy; expected at least one. Evaluate "
                            "this arm again.")  # fmt: skip
    _check_same_items(arms)
    return arms


def _check_same_items(arms: list[Arm]) -> None:
    """A difference between arms means something only on the same items."""
    measured = [(arm.name, arm.fidelity) for arm in arms if arm.fidelity is not None]
    for name, fidelity in measured[1:]:
        first_name, first = measured[0]
        if fidelity.transfer_set != first.transfer_set or not np.array_equal(fidelity.tokens, first.tokens):
            raise DataError(
                f"Fidelity of {name!r} is over {len(fidelity.tokens)} rows of the transfer set "
                f"{fidelity.transfer_set}, that of {first_name!r} over {len(first.tokens)} rows of "
                f"{first.transfer_set}. Evaluate both on the same held-out rows."
            )
    for setting in sorted({setting for arm in arms for setting in arm.accuracy}):
        answered = [(arm.name, arm.accuracy[setting]) for arm in arms if setting in arm.accuracy]
        for name, accuracy in answered[1:]:
            first_name, first_accuracy = answered[0]
            own, others = accuracy.settings, first_accuracy.settings
            differing = sorted(key for key in {*own, *others} if own.get(key) != others.get(key))
            if differing or accuracy.count != first_accuracy.count:
                raise DataError(
                    f"{setting} accuracy of {name!r} and of {first_name!r} are not over the same questions: "
                    f"{', '.join(differing) or 'their number'} differ. Evaluate both on the same questions with the "
                    "same prompts."
                )


def list_metrics(arms: list[Arm]) -> list[Metric]:
    """The metrics that an arm of the comparison was evaluated in; KL, agreement and cross-entropy always."""
    settings = {(setting, grader) for arm in arms for setting, one in arm.accuracy.items() for grader in one.statistics}
    accuracy: dict[str, Metric] = {}
    for setting, grader in sorted(settings, key=_order_setting):
        plain = "accuracy_" + re.sub(r"\W+", "_", setting)
        # Settings may differ in their punctuation alone.
        names = (f"{plain}_{place}" if place > 1 else plain for place in count(1))
        name = next(name for name in names if name + grader not in accuracy)
        title = f"Accuracy, {setting}" + ", strict" * (grader == "_strict")
        accuracy[name + grader] = Metric(name + grader, title, True, setting, grader)
    found = {name for arm in arms if arm.fidelity for name in arm.fidelity.statistics}
    always = ("kl", "top1_agreement", "ce", "perplexity")
    return [*accuracy.values(), *(metric for metric in _FIDELITY if metric.key in (*always, *found))]


def _order_setting(named: tuple[str, str]) -> tuple[bool, int, str, str]:
    """Our own settings by their shots, then those of tasks by name."""
    shots = re.match(r"\d+", named[0])
    return shots is None, int(shots[0]) if shots else 0, *named


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
            "bootstrap": {"seed": SEED, "resamples": RESAMPLES},
            "transfer_set_digest": next((arm.fidelity.transfer_set for arm in arms if arm.fidelity), None),
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
        "num_rows": len(arm.fidelity.tokens) if arm.fidelity else 0,
        "num_tokens": int(arm.fidelity.tokens.sum()) if arm.fidelity else 0,
        "metrics": {},
        "differences": {},
        "mcnemar": {},
        "gap_recovered": {},
    }
    others = [arms[name] for name in _COMPARED_WITH.get(arm.name, _OTHERS) if name in arms]
    for metric in metrics:
        statistic = metric.find(arm)
        if statistic is not None:
            description["metrics"][metric.key] = _measure(metric, statistic)
        if metric.setting is not None:
            tests = {other.name: _compare(arm, other, metric) for other in others}
            description["mcnemar"][metric.key] = {other: test for other, test in tests.items() if test is not None}
        if arm.name not in ("teacher", "before"):
            description["gap_recovered"][metric.key] = _compute_share(arm, arms, metric)
    description["differences"] = {other.name: _compute_differences(arm, other, metrics) for other in others}
    for kind in BREAKDOWNS:
        bins = arm.fidelity.list_bins(kind) if arm.fidelity else None
        if bins is not None:
            description[name_breakdown(kind)] = [_describe_bin(*each) for each in bins]
    return description


def name_breakdown(kind: str) -> str:
    """The key of a breakdown in results.json, such as "dense_kl_by_position"."""
    return f"dense_kl_by_{kind.removeprefix('dense_')}" if kind.startswith("dense_") else f"kl_by_{kind}"


def _describe_bin(start: float, stop: float | None, kl: Floats, tokens: Floats) -> dict[str, Any]:
    """KL per token in one bin."""
    held = tokens > 0  # or a draw could hold no token of this bin at all
    value: float | None = None
    interval: list[float] | None = None
    if held.any():
        statistic = RowSums(kl[held], tokens[held])
        value = compute_value(statistic)
        interval = list(bootstrap_interval(statistic)) if held.sum() > 1 else None
    return {"from": start, "to": stop, "tokens": int(tokens.sum()), "value": value, "interval": interval}


def _measure(metric: Metric, statistic: RowStatistic) -> dict[str, Any]:
    columns = statistic.to_columns()
    interval: tuple[float, float] | None = None
    if metric.setting is not None:
        interval = wilson_interval(int(columns[:, 0].sum()), len(columns))
    elif len(columns) > 1:
        interval = bootstrap_interval(statistic)
    return {"value": compute_value(statistic), "interval": interval and list(interval), "n": len(columns)}


def _compute_differences(arm: Arm, other: Arm, metrics: list[Metric]) -> dict[str, Any]:
    """This arm's figures less the other's, where both have them."""
    differences = {}
    for metric in metrics:
        own, others = metric.find(arm), metric.find(other)
        if own is not None and others is not None:
            found = compute_difference(own, others)
            differences[metric.key] = {"value": found.value, "interval": found.interval and list(found.interval)}
    return differences


def _compare(arm: Arm, other: Arm, metric: Metric) -> dict[str, Any] | None:
    own, others = metric.find(arm), metric.find(other)
    if own is None or others is None:
        return None
    verdicts = [statistic.to_columns()[:, 0] > 0.5 for statistic in (own, others)]
    result = mcnemar_exact(*verdicts)
    needed = compute_questions_needed(result.only_a, result.only_b, len(verdicts[0]))
    return {
        "only_this": result.only_a,
        "only_other": result.only_b,
        "p_value": result.p_value,
        "questions_needed": needed,
    }


def _compute_share(arm: Arm, arms: dict[str, Arm], metric: Metric) -> dict[str, Any]:
    """The gap that one arm recovered in one metric, and why there is none."""
    involved = {"teacher": arms.get("teacher"), "before": arms.get("before"), arm.name: arm}
    found = [None if one is None else metric.find(one) for one in involved.values()]
    lacking = [name for name, statistic in zip(involved, found, strict=True) if statistic is None]
    teacher, before, after = found
    if teacher is None or before is None or after is None:
        return {"value": None, "interval": None, "reason": f"not evaluated for {', '.join(lacking)}"}
    share = compute_gap_recovered(
        teacher, before, after, higher_is_better=metric.higher_is_better, binary=metric.setting is not None
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
    return absent + missing


def _round(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _round(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_round(item) for item in value]
    return float(f"{value:.{_SIGNIFICANT_DIGITS}g}") if isinstance(value, float) else value
