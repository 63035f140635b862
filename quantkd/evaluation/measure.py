"""Measure one model of a comparison: fidelity on held-out rows, answers to questions, and tasks, into its arm file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from quantkd import __version__
from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.accuracy import evaluate_gsm8k
from quantkd.evaluation.arms import Accuracy, Arm, check_arm_name, discard_arm
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.evaluation.fingerprint import compute_model_fingerprint
from quantkd.evaluation.harness import HarnessTasks, evaluate_tasks
from quantkd.evaluation.records import compute_digest
from quantkd.evaluation.sharing import ask_main, is_writer
from quantkd.models.network import base_network
from quantkd.models.student import bits_of, format_of, is_quantized
from quantkd.names import public_name
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.fingerprint import check_fingerprint

logger = logging.getLogger(__name__)

_TITLES = {
    "teacher": "teacher",
    "before": "{format}, before",
    "after": "{format}, distilled",
    "control": "{format}, cross-entropy alone",
    "merged": "{format}, distilled and merged",
    "requantized": "{format}, merged and quantized again",
}


@dataclass(frozen=True)
class Questions:
    """GSM8K questions for `evaluate_arm`.

    Args:
        rows: what to answer, as `load_gsm8k` gives them.
        few_shot: training rows that the shots are taken from, at least `max(shots)`.
        shots: numbers of shots to answer with, such as (0, 8).

    Raises:
        ConfigError: too few `few_shot` rows.
    """

    rows: Sequence[Mapping[str, str]]
    few_shot: Sequence[Mapping[str, str]] = ()
    shots: Sequence[int] = (0,)

    def __post_init__(self) -> None:
        if max(self.shots, default=0) > len(self.few_shot):
            raise ConfigError(f"{max(self.shots)} shots need as many training rows, found {len(self.few_shot)}.")


@dataclass(frozen=True)
class EvaluationSettings:
    """How `evaluate_arm` measures.

    Args:
        batch_size: rows or questions per batch.
        max_new_tokens: length limit of an answer.
        chat_template: False prompts with plain text, for a base model.
        force: measure again what was measured of this very model, and drop the records that are there.
        replace_other: drop what was measured of another model; otherwise its records are refused.
        share: deal rows and questions to all processes of the launcher, each of which must make this same call; the
            main process writes.
        progress: show bars.
    """

    batch_size: int = 8
    max_new_tokens: int = 256
    chat_template: bool = True
    force: bool = False
    replace_other: bool = False
    share: bool = False
    progress: bool = True


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
    if held_out is None and questions is None and tasks is None:
        raise ConfigError("There is nothing to measure: give held_out rows, questions, tasks, or several of them.")
    check_arm_name(arm)
    if held_out is not None:
        what = f"The held-out set of teacher {held_out.info.teacher_name}"
        check_fingerprint(held_out.info.tokenizer_fingerprint, tokenizer, what=what, parts=("vocabulary",))
    folder, share = Path(run_dir) / "evaluation", settings.share
    fingerprint = compute_model_fingerprint(model)
    new = Arm(
        arm,
        title or _TITLES.get(arm, arm).format(format=_name_format(model)),
        public_name(model_name),
        fingerprint,
        int(model.get_memory_footprint()),
    )
    result = ask_main(share, lambda: _take_up(new, folder, settings))

    def write() -> None:  # after each part, so that a stop in the next one does not cost it
        if is_writer(share):
            result.write(folder)

    shared: dict[str, Any] = {"batch_size": settings.batch_size, "share": share}
    if held_out is not None:
        facts = {
            "transfer_set": held_out.digest,
            "batch_size": settings.batch_size,
            "teacher": None
            if teacher is None
            else fingerprint
            if teacher is model
            else compute_model_fingerprint(teacher),
            "quantkd_version": __version__,
        }
        if result.fidelity is None or result.fidelity.settings != facts:
            found = evaluate_fidelity(model, held_out, teacher=teacher, progress=settings.progress, **shared)
            result = replace(result, fidelity=replace(found, settings=facts))
        write()
    questions = questions or Questions((), shots=())
    for count in questions.shots:
        records = evaluate_gsm8k(
            model,
            tokenizer,
            questions.rows,
            shots=questions.few_shot[:count],
            max_new_tokens=settings.max_new_tokens,
            chat_template=settings.chat_template,
            records_path=folder / f"{arm}-{count}-shot.jsonl",
            fingerprint=fingerprint,
            progress=settings.progress,
            **shared,
        )
        verdicts = {
            "correct_flexible": [record.correct_flexible for record in records],
            "correct_strict": [record.correct_strict for record in records],
        }
        asked = {
            "prompts": compute_digest([record.prompt for record in records]),
            "golds": compute_digest([record.gold for record in records]),
            "max_new_tokens": settings.max_new_tokens,
        }
        result = replace(result, questions={**result.questions, f"{count}-shot": Accuracy(verdicts, asked)})
        write()
    if tasks is not None:
        done = evaluate_tasks(
            model,
            tokenizer,
            tasks,
            folder / "lm-eval" / arm,
            finished=result.tasks,
            fingerprint=fingerprint,
            batch_size=settings.batch_size,
            share=share,
        )
        for name, one in done:
            result = replace(result, tasks={**result.tasks, name: one})
            write()
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


def _name_format(model: Any) -> str:
    """What the model's weights are in, such as "4-bit"; the name of a format whose bits are not known."""
    config = getattr(base_network(model).config, "quantization_config", None)
    if config is None and is_quantized(model):
        return "quantized"  # by its format's own library, which leaves no config
    bits = bits_of(config) if config else 8 * model.dtype.itemsize
    return f"{bits}-bit" if bits else format_of(config)
