"""One arm of a comparison: a model measured on the same held-out rows and the same questions as every other arm."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from quantkd.checkpoint import short_name
from quantkd.errors import ConfigError
from quantkd.evaluation.accuracy import evaluate_gsm8k
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.hardware import process_state
from quantkd.transfer_set import TransferSet

__all__ = ["TITLES", "check_arm_name", "evaluate_arm"]

TITLES = {
    "teacher": "teacher",
    "before": "4-bit, before",
    "after": "4-bit, distilled",
    "control": "4-bit, cross-entropy alone",
}


def check_arm_name(arm: str) -> None:
    """Refuse a name that would not be a plain file name.

    Args:
        arm: the name.

    Raises:
        ConfigError: it is empty, or holds anything but letters, digits, - and _.
    """
    if not arm or not all(character.isalnum() or character in "-_" for character in arm):
        raise ConfigError(f"An arm's name is a file name of letters, digits, - and _, found {arm!r}. Choose another.")


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
    questions: Sequence[Mapping[str, str]] = (),
    few_shot: Sequence[Mapping[str, str]] = (),
    shots: Sequence[int] = (0,),
    batch_size: int = 8,
    max_new_tokens: int = 256,
    chat_template: bool = True,
    share: bool = False,
    progress: bool = True,
) -> Path:
    """Measure a model and write `<run_dir>/evaluation/<arm>.json`, and each answer to a JSONL beside it.

    Args:
        model: a causal language model, with or without adapters.
        tokenizer: its tokenizer.
        run_dir: the run's folder, which `quantkd.report.build_report` reads.
        arm: `teacher`, `before`, `after`, or a name of your own, as a file name.
        title: how the report calls it.
        model_name: what the model is; of a path only the last part is written.
        memory_bytes: the model's footprint; asked of the model if None.
        held_out: rows of a transfer set for the fidelity to the teacher; none if None.
        questions: GSM8K rows to answer; none if empty.
        few_shot: training rows that the shots are taken from, at least `max(shots)`.
        shots: numbers of shots to answer the questions with, such as (0, 8).
        batch_size: rows or questions a batch.
        max_new_tokens: length limit of an answer.
        chat_template: False prompts with plain text, for a base model.
        share: deal rows and questions to all processes of the launcher, each of which must make this same call; the
            main process writes.
        progress: show bars.

    Returns:
        The path of the arm's JSON file.

    Raises:
        ConfigError: nothing to measure, an arm's name that is no file name, or too few `few_shot` rows.
    """
    if held_out is None and not questions:
        raise ConfigError("There is nothing to measure: give held_out rows, questions, or both.")
    check_arm_name(arm)
    if questions and max(shots) > len(few_shot):
        raise ConfigError(f"{max(shots)} shots need as many training rows, found {len(few_shot)}.")
    folder = Path(run_dir) / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "arm": arm,
        "title": title or TITLES.get(arm, arm),
        "model": short_name(model_name),
        "memory_bytes": int(model.get_memory_footprint() if memory_bytes is None else memory_bytes),
    }
    if held_out is not None:
        result["transfer_set_digest"] = held_out.digest
        result["fidelity"] = evaluate_fidelity(
            model, held_out, batch_size=batch_size, share=share, progress=progress
        ).to_json()
    if questions:
        result["accuracy"] = {}
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
            result["accuracy"][f"{count}-shot"] = [
                {"id": r.id, "correct_strict": r.correct_strict, "correct_flexible": r.correct_flexible}
                for r in records
            ]
    path = folder / f"{arm}.json"
    if share and not process_state().is_main_process:
        return path
    temporary = path.with_suffix(".json.tmp")
    temporary.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path
