"""GSM8K accuracy as an `evaluate.Metric`. Importing this module imports `evaluate`; it reaches for no network.

`evaluate.load` takes the path of this file, so scripts that know only `evaluate` can use it.
"""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

from quantkd.data.gsm8k import is_correct
from quantkd.errors import DataError
from quantkd.evaluation.stats import wilson_interval

_DESCRIPTION = """\
The share of GSM8K answers whose number is right. "accuracy" takes the last number of an output, "accuracy_strict" the
number after `####`; each comes with its Wilson 95% interval.
"""

_USAGE = """\
Args:
    predictions: model outputs, as text.
    references: GSM8K's answers, which end in `#### <number>`.
Returns:
    accuracy, ci95_low, ci95_high, accuracy_strict, ci95_low_strict, ci95_high_strict: shares in [0, 1].
    num_answers: how many answers were graded.
"""

_CITATION = """\
@article{cobbe2021gsm8k,
  title={Training Verifiers to Solve Math Word Problems},
  author={Cobbe, Karl and Kosaraju, Vineet and Bavarian, Mohammad and others},
  journal={arXiv preprint arXiv:2110.14168},
  year={2021}
}
"""


class GSM8KAccuracy(evaluate.Metric):  # type: ignore[misc]
    """The share of right GSM8K answers, flexible and strict, with Wilson 95% intervals.

    Raises:
        DataError: on `compute`, no predictions, or a reference without `#### <number>`.

    Example:
        >>> from quantkd.evaluation.metric import GSM8KAccuracy
        >>> scores = GSM8KAccuracy().compute(predictions=["So 18.", "#### 3"], references=["#### 18", "#### 3"])
        >>> scores["accuracy"], scores["accuracy_strict"]
        (1.0, 0.5)
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_USAGE,
            features=datasets.Features({"predictions": text, "references": text}),
            reference_urls=["https://github.com/openai/grade-school-math"],
        )

    def _compute(self, predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | int]:
        if not predictions:
            raise DataError("There are no predictions to grade; expected at least one.")
        scores: dict[str, float | int] = {"num_answers": len(predictions)}
        for mode, suffix in (("flexible", ""), ("strict", "_strict")):
            pairs = zip(predictions, references, strict=True)
            correct = sum(is_correct(output, gold, mode) for output, gold in pairs)  # type: ignore[arg-type]
            low, high = wilson_interval(correct, len(predictions))
            scores[f"accuracy{suffix}"] = correct / len(predictions)
            scores[f"ci95_low{suffix}"], scores[f"ci95_high{suffix}"] = low, high
        return scores
