"""The figures of a report: every metric of every arm with its interval, paired tests, and the gap recovered."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantkd.errors import DataError
from quantkd.evaluation import stats
from quantkd.evaluation.agreement import AnswerComparison, compare_accuracy, compute_proportion
from quantkd.evaluation.arms import Arm

# More digits would differ between processors by the order of their sums.
_SIGNIFICANT_DIGITS = 10
_FIRST = ("teacher", "before", "codes", "start", "after")  # in the report; others follow by name
# Which arms each is compared with; "control" trained without the teacher. Any other one, such as an exported form, is
# compared with "after" as well: what the change of form cost, and of "start" what distillation added.
_COMPARED_WITH: dict[str, tuple[str, ...]] = {
    "teacher": ("before",),
    "codes": ("before", "teacher"),
    "before": ("teacher",),
    "control": ("before", "teacher"),
    "after": ("before", "control", "teacher"),
}
_OTHERS = ("before", "control", "teacher", "after")
_AGREES = "agreement"  # a grader of our own: the answer ends in the teacher's number
_Figures = dict[str, dict[str, stats.RowStatistic]]  # by arm and metric


@dataclass(frozen=True)
class Metric:
    """One line of the report: of fidelity, or of one `grader` of an accuracy `setting` such as "0-shot"."""

    key: str
    title: str
    higher_is_better: bool
    setting: str | None = None
    grader: str = ""

    def find(self, arm: Arm, teacher: Arm | None) -> stats.RowStatistic | None:
        """One arm's figure; None if it was not evaluated."""
        if self.setting is None:
            return arm.fidelity.statistics.get(self.key) if arm.fidelity else None
        if self.grader == _AGREES:
            compared = self.compare_answers(arm, teacher)
            return None if compared is None else stats.RowSums(compared.agrees)
        accuracy = arm.accuracy.get(self.setting)
        return None if accuracy is None else accuracy.statistics.get(self.grader)

    def compare_answers(self, arm: Arm, teacher: Arm | None) -> AnswerComparison | None:
        """One arm's answers against the teacher's."""
        setting = str(self.setting)
        return compare_accuracy(arm.questions.get(setting), teacher.questions.get(setting) if teacher else None)


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
    # Records of answers are in the same folder.
    paths = {path.stem: path for path in sorted(folder.glob("*.json")) if not path.name.endswith(".settings.json")}
    if not paths:
        raise DataError(
            f"{folder} holds no arms; expected files such as teacher.json and before.json, which "
            f"`quantkd evaluate --arm NAME --run_dir {folder.parent}` writes."
        )
    order = [*(name for name in _FIRST if name in paths), *(name for name in paths if name not in _FIRST)]
    arms = [Arm.read(paths[name]) for name in order]
    for arm in arms:
        if arm.fidelity is None and not arm.accuracy:
            raise DataError(f"{paths[arm.name]} holds neither fidelity nor accuracy. Evaluate this arm again.")
    _check_same_items(arms)
    return arms


def _check_same_items(arms: list[Arm]) -> None:
    """A difference between arms means something only on the same items."""
    measured = [(arm.name, arm.fidelity) for arm in arms if arm.fidelity is not None]
    for name, own in measured[1:]:
        first_name, first = measured[0]
        if own.transfer_set != first.transfer_set or not np.array_equal(own.tokens, first.tokens):
            raise DataError(
                f"Fidelity of {name!r} is over {len(own.tokens)} rows of the transfer set {own.transfer_set}, that of "
                f"{first_name!r} over {len(first.tokens)} rows of {first.transfer_set}. Evaluate both on the same "
                "held-out rows."
            )
    answered: dict[str, Arm] = {}  # the first arm of each setting
    for arm in arms:
        for setting, accuracy in arm.accuracy.items():
            first_arm = answered.setdefault(setting, arm)
            others = first_arm.accuracy[setting]
            if differing := accuracy.list_differences(others):
                raise DataError(
                    f"{setting} accuracy of {arm.name!r} and of {first_arm.name!r} are not over the same questions: "
                    f"{', '.join(differing)} differ. Evaluate both on the same ones."
                )


def list_metrics(arms: list[Arm]) -> list[Metric]:
    """The metrics that an arm of the comparison was evaluated in; KL, agreement and cross-entropy always."""
    settings = {(setting, grader) for arm in arms for setting, one in arm.accuracy.items() for grader in one.statistics}
    accuracy: dict[str, Metric] = {}
    for setting, grader in sorted(settings, key=_order_setting):
        plain = "accuracy_" + re.sub(r"\W+", "_", setting)
        # Settings may differ in their punctuation alone.
        names = (f"{plain}_{place}" if place > 1 else plain for place in itertools.count(1))
        # A task's own filter may be called so.
        name = next(name for name in names if name + grader not in accuracy and not name.endswith("_strict"))
        title = f"Accuracy, {setting}" + ", strict" * (grader == "_strict")
        accuracy[name + grader] = Metric(name + grader, title, True, setting, grader)
    agreement = [
        Metric(metric.key.replace("accuracy", _AGREES, 1), f"Answer agreement, {metric.setting}", True, metric.setting,
               _AGREES)
        for metric in accuracy.values()
        if metric.grader == "" and any(arm.name == "teacher" and metric.setting in arm.questions for arm in arms)
    ]  # fmt: skip
    found = {name for arm in arms if arm.fidelity for name in arm.fidelity.statistics}
    always = ("kl", "top1_agreement", "ce", "perplexity")
    return [*accuracy.values(), *agreement, *(metric for metric in _FIDELITY if metric.key in (*always, *found))]


def _order_setting(named: tuple[str, str]) -> tuple[bool, int, str, str]:
    """Our own settings by their shots, then those of tasks by name."""
    shots = re.match(r"\d+", named[0])
    return shots is None, int(shots[0]) if shots else 0, *named


def compute_results(arms: list[Arm]) -> dict[str, Any]:
    """All figures of a report, as JSON values; the same arms give the same bytes."""
    metrics = list_metrics(arms)
    teacher = next((arm for arm in arms if arm.name == "teacher"), None)
    figures: _Figures = {arm.name: {} for arm in arms}
    for arm, metric in itertools.product(arms, metrics):
        if (found := metric.find(arm, teacher)) is not None:
            figures[arm.name][metric.key] = found
    compared = {arm.name: _describe_arm(arm, teacher, figures, metrics) for arm in arms}
    students = [name for name in compared if name not in ("teacher", "before")]
    # Shown only where nothing was trained from them.
    students.sort(key=lambda name: ("start", "codes").index(name) + 1 if name in ("start", "codes") else 0)
    subject = students[0] if students else None
    shares = compared[subject]["gap_recovered"] if subject else {}
    gaps = compared["before"]["mcnemar"] if "before" in compared else {}
    needed = {key: tests["teacher"]["questions_needed"] for key, tests in gaps.items() if "teacher" in tests}
    results: dict[str, Any] = _round(
        {
            "format_version": 1,
            "confidence": stats.CONFIDENCE,
            "bootstrap": {"seed": stats.SEED, "resamples": stats.RESAMPLES},
            "transfer_set_digest": next((arm.fidelity.transfer_set for arm in arms if arm.fidelity), None),
            "arm_order": [arm.name for arm in arms],
            "metric_order": [metric.key for metric in metrics],
            "metrics": {metric.key: metric.title for metric in metrics},
            "arms": compared,
            "subject": subject,
            "gap_recovered": {key: share["value"] for key, share in shares.items()},
            "gap_recovered_interval": {key: share["interval"] for key, share in shares.items()},
            "not_measurable": {key: share["reason"] for key, share in shares.items() if share["reason"]},
            "questions_needed": needed,
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


def _describe_arm(arm: Arm, teacher: Arm | None, figures: _Figures, metrics: list[Metric]) -> dict[str, Any]:
    """One arm as JSON: its figures with intervals, and beside those of others."""
    own, tokens = figures[arm.name], arm.fidelity.tokens if arm.fidelity else np.zeros(0)
    others = {name: figures[name] for name in _COMPARED_WITH.get(arm.name, _OTHERS) if name in figures}
    description: dict[str, Any] = {
        "title": arm.title,
        "model": arm.model,
        "bytes": {part: getattr(arm.size, part) for part in ("codes", "constants", "adapters", "rest", "total")},
        "bits_per_weight": arm.size.bits_per_weight,
        "num_rows": len(tokens),
        "num_tokens": int(tokens.sum()),
        "metrics": {metric.key: _measure(metric, own[metric.key]) for metric in metrics if metric.key in own},
        "differences": {
            name: {key: stats.compute_difference(own[key], theirs[key])._asdict() for key in own if key in theirs}
            for name, theirs in others.items()
        },
        "mcnemar": {},
        "gap_recovered": {},
        "flips": {},
    }
    for metric in metrics:
        key, agrees = metric.key, metric.grader == _AGREES
        if arm.name not in ("teacher", "before"):
            description["gap_recovered"][key] = _compute_share(arm.name, figures, metric)
        if metric.setting is not None:
            # The teacher agrees with itself, so a test of agreement against it tests nothing.
            tested = {name: each for name, each in others.items() if not (agrees and "teacher" in (arm.name, name))}
            tests = {name: _compare(own[key], each[key]) for name, each in tested.items() if key in own and key in each}
            description["mcnemar"][key] = tests
        if agrees and (compared := metric.compare_answers(arm, teacher)):
            if arm is teacher:
                description["metrics"][key]["interval"] = None  # what holds by definition is no estimate
            else:
                description["flips"][key] = {way: share._asdict() for way, share in compared.flips.items()}
    for prefix, kind in itertools.product(("", "dense_"), ("position", "entropy")):
        bins = arm.fidelity.list_bins(prefix + kind) if arm.fidelity else None
        if bins is not None:
            description[f"{prefix}kl_by_{kind}"] = [_describe_bin(*each) for each in bins]
    return description


def _describe_bin(start: float, stop: float | None, kl: stats.Floats, tokens: stats.Floats) -> dict[str, Any]:
    """KL per token in one bin."""
    held = tokens > 0  # or a draw could hold no token of this bin at all
    statistic = stats.RowSums(kl[held], tokens[held])
    value = stats.compute_value(statistic) if held.any() else None
    interval = stats.bootstrap_interval(statistic) if held.sum() > 1 else None
    return {"from": start, "to": stop, "tokens": int(tokens.sum()), "value": value, "interval": interval}


def _measure(metric: Metric, statistic: stats.RowStatistic) -> dict[str, Any]:
    columns = statistic.to_columns()
    if metric.setting is not None:
        return compute_proportion(columns[:, 0] > 0.5)._asdict()
    interval = stats.bootstrap_interval(statistic) if len(columns) > 1 else None
    return {"value": stats.compute_value(statistic), "interval": interval, "n": len(columns)}


def _compare(own: stats.RowStatistic, others: stats.RowStatistic) -> dict[str, Any]:
    """McNemar's test of two arms' verdicts."""
    verdicts = [statistic.to_columns()[:, 0] > 0.5 for statistic in (own, others)]
    only_this, only_other, p_value = stats.mcnemar_exact(*verdicts)
    needed = stats.compute_questions_needed(only_this, only_other, len(verdicts[0]))
    return {"only_this": only_this, "only_other": only_other, "p_value": p_value, "questions_needed": needed}


def _compute_share(arm: str, figures: _Figures, metric: Metric) -> dict[str, Any]:
    """The gap that one arm recovered in one metric, and why there is none."""
    found = {name: figures.get(name, {}).get(metric.key) for name in ("teacher", "before", arm)}
    teacher, before, after = found.values()
    if teacher is None or before is None or after is None:
        lacking = [name for name, statistic in found.items() if statistic is None]
        return stats.GapRecovered(None, f"not evaluated for {', '.join(lacking)}")._asdict()
    return stats.compute_gap_recovered(
        teacher, before, after, higher_is_better=metric.higher_is_better, binary=metric.setting is not None
    )._asdict()


def _list_missing(arms: list[Arm], metrics: list[Metric]) -> list[str]:
    names = {arm.name for arm in arms}
    lost = {"teacher": " and no answer agreement" * any(arm.questions for arm in arms), "before": ""}
    absent = [f"There is no arm {name}, so no share of the gap{lost[name]}." for name in lost if name not in names]
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
