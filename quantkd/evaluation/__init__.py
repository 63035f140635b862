"""How good a model is: accuracy of its answers, fidelity to the teacher, and the statistics of both."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

# Name -> module that holds it: the statistics and the report need neither torch nor `evaluate`.
_EXPORTS = {
    "AnswerRecord": "accuracy",
    "GSM8KAccuracy": "metric",
    "GapRecovered": "stats",
    "McNemarResult": "stats",
    "PromptRecord": "accuracy",
    "bootstrap_ratio_interval": "bootstrap",
    "compute_gap_recovered": "stats",
    "evaluate_gsm8k": "accuracy",
    "evaluate_prompts": "accuracy",
    "mcnemar_exact": "stats",
    "wilson_interval": "stats",
}
__all__ = [
    "AnswerRecord",
    "GSM8KAccuracy",
    "GapRecovered",
    "McNemarResult",
    "PromptRecord",
    "bootstrap_ratio_interval",
    "compute_gap_recovered",
    "evaluate_gsm8k",
    "evaluate_prompts",
    "mcnemar_exact",
    "wilson_interval",
]

if TYPE_CHECKING:
    from quantkd.evaluation.accuracy import AnswerRecord, PromptRecord, evaluate_gsm8k, evaluate_prompts
    from quantkd.evaluation.bootstrap import bootstrap_ratio_interval
    from quantkd.evaluation.metric import GSM8KAccuracy
    from quantkd.evaluation.stats import (
        GapRecovered,
        McNemarResult,
        compute_gap_recovered,
        mcnemar_exact,
        wilson_interval,
    )


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'quantkd.evaluation' has no attribute {name!r}")
    return getattr(importlib.import_module(f"quantkd.evaluation.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
