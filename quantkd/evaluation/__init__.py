"""How good a model is: accuracy of its answers, fidelity to the teacher, and the statistics of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkd import lazy

# The statistics and the report need neither torch nor `evaluate`.
__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "accuracy": "AnswerRecord PromptRecord evaluate_gsm8k evaluate_prompts",
        "metric": "GSM8KAccuracy",
        "measure": "EvaluationSettings Questions evaluate_arm",
        "stats": "GapRecovered McNemarResult bootstrap_ratio_interval compute_gap_recovered mcnemar_exact "
        "wilson_interval",
    },
)

if TYPE_CHECKING:
    from quantkd.evaluation.accuracy import (
        AnswerRecord as AnswerRecord,
        PromptRecord as PromptRecord,
        evaluate_gsm8k as evaluate_gsm8k,
        evaluate_prompts as evaluate_prompts,
    )
    from quantkd.evaluation.measure import (
        EvaluationSettings as EvaluationSettings,
        Questions as Questions,
        evaluate_arm as evaluate_arm,
    )
    from quantkd.evaluation.metric import GSM8KAccuracy as GSM8KAccuracy
    from quantkd.evaluation.stats import (
        GapRecovered as GapRecovered,
        McNemarResult as McNemarResult,
        bootstrap_ratio_interval as bootstrap_ratio_interval,
        compute_gap_recovered as compute_gap_recovered,
        mcnemar_exact as mcnemar_exact,
        wilson_interval as wilson_interval,
    )
