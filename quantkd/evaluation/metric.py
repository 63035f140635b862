"""GSM8K accuracy as an `evaluate.Metric`, without network; `evaluate.load` takes the path of this file."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import evaluate

from quantkd.data.gsm8k import is_correct
from quantkd.errors import DataError
from quantkd.evaluation.stats import wilson_interval

_DESCRIPTION = """\
The share of GSM8K answers whose number is right. "accuracy" takes the last number of an output, "accuracy_strict" the
number after `####`; each comes with its Wilson 95% interval. "num_answers" counts the answers.
"""


class GSM8KAccuracy(evaluate.Metric):  # type: ignore[misc]
    """The share of right GSM8K answers, flexible and strict, with Wilson 95% intervals."""

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="Cobbe et al. 2021, Training Verifiers to Solve Math Word Problems (arXiv:2110.14168)",
            inputs_description="predictions: model outputs; references: GSM8K's answers, which end in `#### <number>`.",
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
