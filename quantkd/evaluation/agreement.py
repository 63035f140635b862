"""Answer agreement: where a model's greedy answers end in the teacher's own number, and where their verdict flips."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantkd.errors import DataError
from quantkd.evaluation.arms import Accuracy
from quantkd.evaluation.stats import Interval, wilson_interval

if TYPE_CHECKING:
    from quantkd.evaluation.accuracy import AnswerRecord


class Proportion(NamedTuple):
    """A share of `n` questions with its Wilson 95% interval."""

    value: float
    interval: Interval
    n: int


def compute_proportion(verdicts: NDArray[np.bool_]) -> Proportion:
    """The share of (N,) verdicts that are true."""
    return Proportion(float(verdicts.mean()), wilson_interval(int(verdicts.sum()), len(verdicts)), len(verdicts))


@dataclass(frozen=True)
class AnswerComparison:
    """A model's answers against the teacher's, question by question; each array is (N,) bool."""

    agrees: NDArray[np.bool_]  # both end in a number, and it is the same
    right_to_wrong: NDArray[np.bool_]  # the teacher's answer is right, the model's is not
    wrong_to_right: NDArray[np.bool_]  # the other way round

    @property
    def agreement(self) -> Proportion:
        """The share of answers that end in the teacher's own number."""
        return compute_proportion(self.agrees)

    @property
    def flips(self) -> dict[str, Proportion]:
        """The shares of verdicts that differ from the teacher's, by direction."""
        return {name: compute_proportion(getattr(self, name)) for name in ("right_to_wrong", "wrong_to_right")}


def compare_answers(answers: Sequence[AnswerRecord], teacher: Sequence[AnswerRecord]) -> AnswerComparison:
    """Compare a model's answers to GSM8K questions with the teacher's answers to the same ones.

    An answer agrees if its last number is that of the teacher's answer, right or wrong. The number is what
    `prediction_flexible` holds, compared as a text as for the accuracy: `18` and `18.0` are two numbers. Where one of
    the two answers has no number, they do not agree, also where both have none. Every question counts.

    Args:
        answers: the model's records, as `evaluate_gsm8k` returns them.
        teacher: the teacher's, in the same order.

    Returns:
        The comparison: `agreement` and `flips` are shares of all questions with Wilson's 95% intervals. To test two
        students on the same questions, give `agrees` of both to `mcnemar_exact`.

    Raises:
        DataError: no records, or questions or prompts that are not the same in the same order.

    Reference:
        Dutta et al. 2024, Accuracy is Not All You Need (arXiv:2407.09141), for flips.

    Example:
        >>> from quantkd.evaluation.accuracy import AnswerRecord
        >>> def answer(place, number):
        ...     given = (f"#### {number}", "4", number, number, number == "4", number == "4", True, 5)
        ...     return AnswerRecord(place, "2 + 2?", "2 + 2?", *given)
        >>> teacher = [answer(place, number) for place, number in enumerate(["4", "4", "5"])]
        >>> student = [answer(place, number) for place, number in enumerate(["4", "3", "5"])]
        >>> found = compare_answers(student, teacher)
        >>> round(found.agreement.value, 3), found.flips["right_to_wrong"].value == 1 / 3
        (0.667, True)
    """
    if not answers or len(answers) != len(teacher):
        raise DataError(
            f"Found {len(answers)} answers and {len(teacher)} of the teacher's; expected as many, and at least one. "
            "Let both answer the same questions."
        )
    for place, (own, theirs) in enumerate(zip(answers, teacher, strict=True)):
        if (own.prompt, own.gold) != (theirs.prompt, theirs.gold):
            raise DataError(
                f"Answer {place} is to {own.question!r:.80}, the teacher's to {theirs.question!r:.80}, or prompts or "
                "gold answers differ. Let both answer the same questions, in the same order and with the same shots."
            )
    return _compare(
        [record.prediction_flexible for record in answers],
        [record.prediction_flexible for record in teacher],
        [record.correct_flexible for record in answers],
        [record.correct_flexible for record in teacher],
    )


def compare_accuracy(own: Accuracy | None, teacher: Accuracy | None) -> AnswerComparison | None:
    """The same of what two arms hold of one list of questions; None where one of them has no answers to it."""
    if own is None or teacher is None or own.answers is None or teacher.answers is None:
        return None
    verdicts = (each.verdicts["correct_flexible"] for each in (own, teacher))
    return _compare(own.answers, teacher.answers, *verdicts)


def _compare(
    own: Sequence[str | None], teachers: Sequence[str | None], correct: Sequence[bool], teacher_correct: Sequence[bool]
) -> AnswerComparison:
    # The extractor also takes dots alone, such as a final ellipsis, for a number.
    same = [a is not None and a == b and any(map(str.isdigit, a)) for a, b in zip(own, teachers, strict=True)]
    right, teacher_right = np.asarray(correct, dtype=bool), np.asarray(teacher_correct, dtype=bool)
    return AnswerComparison(np.asarray(same, dtype=bool), teacher_right & ~right, right & ~teacher_right)
