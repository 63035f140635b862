"""Measure one model of a comparison: fidelity on held-out rows, answers to questions, and tasks, into its arm file."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from quantkd.errors import ConfigError, DataError, printable
from quantkd.evaluation.accuracy import Questions
from quantkd.evaluation.arms import Arm, EvaluationSettings, check_arm_name, discard_arm
from quantkd.evaluation.fidelity import HeldOut
from quantkd.evaluation.fingerprint import compute_model_fingerprint
from quantkd.evaluation.harness import HarnessTasks
from quantkd.evaluation.sharing import ask_main, is_writer
from quantkd.models.stored_weights import compute_size
from quantkd.models.student import name_format
from quantkd.names import public_name
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.fingerprint import check_fingerprint

logger = logging.getLogger(__name__)

_TITLES = {
    "teacher": "teacher",
    "before": "{format}, before",
    "codes": "{format}, calibrated codes",
    "start": "{format}, start",
    "after": "{format}, distilled",
    "control": "{format}, cross-entropy alone",
    "merged": "{format}, distilled and merged",
    "requantized": "{format}, merged and quantized again",
}


def evaluate_arm(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: str | Path,
    *,
    arm: str,
    model_name: str,
    title: str | None = None,
    held_out: TransferSet | None = None,
    teacher: Any = None,
    questions: Questions | None = None,
    tasks: HarnessTasks | None = None,
    settings: EvaluationSettings | None = None,
) -> Arm:
    """Measure a model and write `<run_dir>/evaluation/<arm>.json`, with each answer in a JSONL file beside it.

    What the file holds of the very same model is kept: figures on the same data with the same settings are not measured
    again, answers that are there are not asked for again, and parts that are not asked for this time remain.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        run_dir: the run's folder, which `quantkd.report.build_report` reads.
        arm: `teacher`, `before`, `after`, or a name of your own, as a file name.
        model_name: what the model is; of a path only the last part is written.
        title: how the report calls it; by default after the arm and the bits of the model's weights.
        held_out: rows of a transfer set for the fidelity to the teacher.
        teacher: the teacher's own model, `model` itself if it is that, for the fidelity over the whole vocabulary too.
        questions: GSM8K questions to answer.
        tasks: tasks of lm-evaluation-harness to run; their items are written below `evaluation/lm-eval/`.
        settings: how to measure.

    Returns:
        The arm, with all that its file holds. In other processes than the main one, tasks may be missing.

    Raises:
        ConfigError: nothing to measure, or an arm's name that is not a file name.
        TransferSetError: `held_out` was written with another tokenizer's vocabulary.
        DataError: `held_out` is empty, or records of another evaluation are there.
    """
    settings = settings or EvaluationSettings()
    rows = None if held_out is None else HeldOut(held_out, teacher)
    parts = [part for part in (rows, questions, tasks) if part is not None]
    if not parts:
        raise ConfigError("There is nothing to measure: give held_out rows, questions, tasks, or several of them.")
    check_arm_name(arm, title)
    if held_out is not None:
        what = f"The held-out set of teacher {held_out.info.teacher_name}"
        check_fingerprint(held_out.info.tokenizer_fingerprint, tokenizer, what=what, parts=("vocabulary",))
    folder = Path(run_dir) / "evaluation"
    of_model = compute_model_fingerprint(model), compute_size(model)
    title = (title or "").strip() or _TITLES.get(arm, arm).format(format=name_format(model))
    new = Arm(arm, printable(title), printable(public_name(model_name)), *of_model)
    result = ask_main(settings.share, lambda: _take_up(new, folder, settings))
    for part in parts:
        for measured in part.measure(model, tokenizer, result, folder, settings):
            result = measured
            if is_writer(settings.share):  # after each figure, so that a stop in the next one does not cost it
                result.write(folder)
    return result


def _take_up(new: Arm, folder: Path, settings: EvaluationSettings) -> Arm:
    """The new arm with what its file holds of this very model."""
    path = folder / f"{new.name}.json"
    kept = None
    if path.exists() and not settings.force:
        try:
            kept = Arm.read(path)
        except DataError as error:
            logger.warning("%s It is measured anew.", error)
    if kept is not None and kept.fingerprint == new.fingerprint:
        return replace(new, fidelity=kept.fidelity, questions=kept.questions, tasks=kept.tasks)
    if settings.force or settings.replace_other:
        discard_arm(folder, new.name)
    return new
