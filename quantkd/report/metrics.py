"""The lines of a report: what each measures, and the row sums that it follows from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import count

from quantkd.evaluation.row_statistics import CalibrationSums, RowStatistic, RowSums
from quantkd.report.arms import Arm


@dataclass(frozen=True)
class Metric:
    """What one line of the report measures.

    Args:
        key: its name in results.json, such as "accuracy_0_shot".
        title: its name on the page.
        higher_is_better: the direction of the good.
        numerator: the key of the row sums, or of the verdict; "confidence" for the calibration error.
        setting: the accuracy setting it belongs to, such as "0-shot"; None for fidelity, which counts tokens.
    """

    key: str
    title: str
    higher_is_better: bool
    numerator: str
    setting: str | None = None


_FIDELITY = (
    Metric("kl", "KL to the teacher (nats/token)", False, "kl_sum"),
    Metric("top1_agreement", "Top-1 agreement with the teacher", True, "agree"),
    Metric("ce", "Cross-entropy (nats/token)", False, "ce_sum"),
    Metric("perplexity", "Perplexity", False, "ce_sum"),
)
# Lines that show only where an arm has them: an evaluation may be older, or have had no teacher at hand.
_OPTIONAL = (
    Metric("reverse_kl", "Reverse KL (nats/token)", False, "reverse_kl_sum"),
    Metric("ece", "Calibration error (ECE)", False, "confidence"),
    Metric("dense_kl", "KL, whole vocabulary (nats/token)", False, "dense_kl_sum"),
    Metric("dense_reverse_kl", "Reverse KL, whole vocabulary (nats/token)", False, "dense_reverse_kl_sum"),
    Metric("dense_top1_agreement", "Top-1 agreement with the teacher at hand", True, "dense_agree"),
)


def list_metrics(arms: list[Arm]) -> list[Metric]:
    """The metrics of a comparison: fidelity always, and what else an arm was evaluated in."""
    settings = {setting for arm in arms for setting in arm.accuracy}
    accuracy: list[Metric] = []
    for setting in sorted(settings, key=_order_setting):
        key = plain = "accuracy_" + re.sub(r"\W+", "_", setting)
        taken = {metric.key for metric in accuracy}
        for place in count(2):  # settings that differ in their punctuation alone
            if key not in taken:
                break
            key = f"{plain}_{place}"
        accuracy.append(Metric(key, f"Accuracy, {setting}", True, "correct_flexible", setting))
        if any("correct_strict" in arm.accuracy[setting][0] for arm in arms if setting in arm.accuracy):
            accuracy.append(Metric(f"{key}_strict", f"Accuracy, {setting}, strict", True, "correct_strict", setting))
    optional = [metric for metric in _OPTIONAL if any(get_statistic(arm, metric) for arm in arms)]
    return [*accuracy, *_FIDELITY, *optional]


def _order_setting(name: str) -> tuple[bool, int, str]:
    """Our own settings by their shots, then those of other tasks by name."""
    shots = re.match(r"\d+", name)
    return shots is None, int(shots[0]) if shots else 0, name


def get_statistic(arm: Arm, metric: Metric) -> RowStatistic | None:
    """One arm's row sums for a metric."""
    if metric.setting is not None:
        rows = arm.accuracy.get(metric.setting)
        if rows is None or metric.numerator not in rows[0]:
            return None
        return RowSums([float(row[metric.numerator]) for row in rows])
    if metric.key == "ece":
        bins = arm.bins.get("confidence")
        return None if bins is None else CalibrationSums(bins["confidence_sum"], bins["correct"], bins["tokens"])
    if arm.fidelity is None or metric.numerator not in arm.fidelity:
        return None
    sums = arm.fidelity[metric.numerator]
    return RowSums(sums, arm.fidelity["tokens"], "exp" if metric.key == "perplexity" else "identity")
