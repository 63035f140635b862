"""One arm of a comparison: a model measured on the same held-out rows and the same questions as every other arm."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from quantkd.errors import ConfigError
from quantkd.evaluation.accuracy import evaluate_gsm8k
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.evaluation.harness import HarnessTasks, evaluate_tasks
from quantkd.evaluation.kept import KeptArm, compute_arm_fingerprint, discard_arm
from quantkd.hardware import process_state
from quantkd.names import public_name
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.fingerprint import check_fingerprint

TITLES = {
    "teacher": "teacher",
    "before": "4-bit, before",
    "after": "4-bit, distilled",
    "control": "4-bit, cross-entropy alone",
    "merged": "16-bit, distilled and merged",
    "requantized": "4-bit, merged and quantized again",
}

_LONGEST_NAME = 100


def check_arm_name(arm: str) -> None:
    """Refuse a name that would not be a plain file name."""
    # Of ASCII: other letters make other file names under another locale or file system.
    if len(arm) > _LONGEST_NAME or not re.fullmatch(r"[A-Za-z0-9_-]+", arm):
        raise ConfigError(
            f"An arm's name is a file name of 1 to {_LONGEST_NAME} of a-z, A-Z, 0-9, - and _, found {arm!r}. "
            "Choose another; --title takes any text."
        )


def evaluate_arm(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: str | Path,
    *,
    arm: str,
    title: str | None = None,
    model_name: str,
    memory_bytes: int | None = None,
    held_out: TransferSet | None = None,
    teacher: Any = None,
    questions: Sequence[Mapping[str, str]] = (),
    few_shot: Sequence[Mapping[str, str]] = (),
    shots: Sequence[int] = (0,),
    batch_size: int = 8,
    max_new_tokens: int = 256,
    chat_template: bool = True,
    tasks: HarnessTasks | None = None,
    force: bool = False,
    share: bool = False,
    progress: bool = True,
) -> Path:
    """Measure a model and write `<run_dir>/evaluation/<arm>.json`, and each answer to a JSONL beside it.

    What the file holds of the very same model stays: figures on the same data with the same settings are not measured
    again, answers that are there are not asked for again, and what is not asked for this time is kept.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        run_dir: the run's folder, which `quantkd.report.build_report` reads.
        arm: `teacher`, `before`, `after`, or a name of your own, as a file name.
        title: how the report calls it.
        model_name: what the model is; of a path only the last part is written.
        memory_bytes: the model's footprint; asked of the model if None.
        held_out: rows of a transfer set for the fidelity to the teacher; none if None.
        teacher: the teacher's own model, `model` itself if it is that, for the same over the whole vocabulary as well.
        questions: GSM8K rows to answer; none if empty.
        few_shot: training rows that the shots are taken from, at least `max(shots)`.
        shots: numbers of shots to answer the questions with, such as (0, 8).
        batch_size: rows or questions a batch.
        max_new_tokens: length limit of an answer.
        chat_template: False prompts with plain text, for a base model.
        tasks: tasks of lm-evaluation-harness to run; none if None. Finished ones are kept below `evaluation/lm-eval/`.
        force: measure again what was measured of this very model, and drop records that are there.
        share: deal rows and questions to all processes of the launcher, each of which must make this same call; the
            main process writes.
        progress: show bars.

    Returns:
        The path of the arm's JSON file.

    Raises:
        ConfigError: nothing to measure, an arm's name that is no file name, or too few `few_shot` rows.
        TransferSetError: `held_out` was written with another tokenizer's vocabulary.
        DataError: `held_out` is empty, or records of another evaluation are there.
    """
    if held_out is None and not questions and tasks is None:
        raise ConfigError("There is nothing to measure: give held_out rows, questions, tasks, or several of them.")
    check_arm_name(arm)
    if held_out is not None:
        info = held_out.info
        what = f"The held-out set of teacher {info.teacher_name}"
        check_fingerprint(info.tokenizer_fingerprint, tokenizer, what=what, parts=("vocabulary",))
    if questions and max(shots) > len(few_shot):
        raise ConfigError(f"{max(shots)} shots need as many training rows, found {len(few_shot)}.")
    folder = Path(run_dir) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{arm}.json"
    if force and process_state().is_main_process:
        discard_arm(folder, arm)
    if force and share:
        process_state().wait_for_everyone()
    kept = KeptArm(path, model, force=force, share=share)
    result: dict[str, Any] = {
        **kept.parts,
        "measured": kept.measured,
        "arm": arm,
        "title": title or TITLES.get(arm, arm),
        "model": public_name(model_name),
        "memory_bytes": int(model.get_memory_footprint() if memory_bytes is None else memory_bytes),
    }
    if held_out is not None:
        result["transfer_set_digest"] = held_out.digest
        result["fidelity"] = kept.fidelity(
            {
                "transfer_set": held_out.digest,
                "batch_size": batch_size,
                "teacher": None if teacher is None else compute_arm_fingerprint(teacher),
            },
            lambda: evaluate_fidelity(
                model, held_out, teacher=teacher, batch_size=batch_size, share=share, progress=progress
            ).to_json(),
        )
        if not share or process_state().is_main_process:
            _write(path, result)  # so that a stop among the answers does not cost them
    if questions:
        for count in shots:
            records = evaluate_gsm8k(
                model,
                tokenizer,
                questions,
                shots=few_shot[:count],
                batch_size=batch_size,
                max_new_tokens=max_new_tokens,
                chat_template=chat_template,
                records_path=folder / f"{arm}-{count}-shot.jsonl",
                share=share,
                progress=progress,
            )
            result.setdefault("accuracy", {})[f"{count}-shot"] = [
                {"id": r.id, "correct_strict": r.correct_strict, "correct_flexible": r.correct_flexible}
                for r in records
            ]
            result.setdefault("items", {})[f"{count}-shot"] = {
                "prompts": _digest([r.prompt for r in records]),
                "golds": _digest([r.gold for r in records]),
                "max_new_tokens": max_new_tokens,
            }
    if tasks is not None:
        ran = evaluate_tasks(model, tokenizer, tasks, folder / "lm-eval" / arm, batch_size=batch_size, share=share)
        figures = {task: found for one in ran.values() for task, found in one.figures.items()}
        result["tasks"] = result.get("tasks", {}) | figures
        for one in ran.values():
            result.setdefault("accuracy", {}).update(one.verdicts)
            result.setdefault("items", {}).update({key: dict(one.items) for key in one.verdicts})
    if not share or process_state().is_main_process:
        _write(path, result)
    return path


def _digest(texts: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:16]


def _write(path: Path, result: dict[str, Any]) -> None:
    temporary = path.with_suffix(".json.tmp")
    text = json.dumps(result, indent=1, sort_keys=True)
    # Plain numbers go on one line: the sums by bin would take one each.
    text = re.sub(r"\[\n[^][{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
