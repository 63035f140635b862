"""A whole experiment: capture, measure teacher and student, train, measure again, report."""

from __future__ import annotations

import copy
import gc
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel

from quantkd.data.gsm8k import build_prompt
from quantkd.errors import ConfigError
from quantkd.evaluation.accuracy import Questions
from quantkd.evaluation.arms import EvaluationSettings
from quantkd.evaluation.measure import evaluate_arm
from quantkd.hardware import default_device, process_state
from quantkd.models.export import CHECKPOINT_FORMS, export_checkpoint, load_exported
from quantkd.models.provenance import Provenance
from quantkd.models.student import load_student
from quantkd.report import build_report
from quantkd.teacher import GenerationSettings, load_teacher
from quantkd.teacher.capture import capture
from quantkd.training.checkpoints import find_checkpoint
from quantkd.training.config import QuantizedDistillationConfig
from quantkd.training.trainer import QuantizedDistillationTrainer

logger = logging.getLogger(__name__)

Row = Mapping[str, str]


def _prompt_of_question(row: Row) -> Any:
    return build_prompt(row["question"])


@dataclass(frozen=True)
class Experiment:
    """What an experiment is run on.

    Args:
        model: Hub name or checkpoint folder; in full precision the teacher, quantized the student.
        run_dir: the folder that everything is written to.
        train_rows: their prompts make the transfer set that is learned from, with the teacher's own answers.
        held_out_rows: their prompts make the transfer set that fidelity is measured on.
        test_rows: questions for the accuracy, in GSM8K's format (`question`, and an `answer` that ends in `#### n`);
            none to leave it out.
        few_shot_rows: what the shots are taken from, in the same format; disjoint from the test rows.
        shots: numbers of shots to test with.
        make_prompt: the prompt of a training or held-out row; that of a GSM8K question by default.
        capture: further arguments of `quantkd.capture`, such as `storage` and `generation`.
        dtype: of the teacher, and the compute dtype of the student; chosen by the hardware if None.
        quantization_config: of the student; NF4 if None.
        peft_config: of the student; rank 16 on all linear layers if None.
        chat_template: False prompts with plain text, for a base model.
        model_init_kwargs: further arguments of `from_pretrained`, for both.
        eval_batch_size: rows or questions per batch while measuring.
        control: also train and measure a student by cross-entropy alone: the same rows, start and steps, without the
            teacher's distributions. The difference is what the distributions are worth.
        exports: also write and measure the student in these forms, "merged" and "requantized", below `run_dir`.
        force: measure again what was measured of the same model on the same data.
    """

    model: str
    run_dir: Path
    train_rows: Sequence[Row]
    held_out_rows: Sequence[Row]
    test_rows: Sequence[Row] = ()
    few_shot_rows: Sequence[Row] = ()
    shots: Sequence[int] = (0,)
    make_prompt: Callable[[Row], Any] = _prompt_of_question
    capture: Mapping[str, Any] = field(default_factory=dict)
    dtype: str | None = None
    quantization_config: Any | None = None
    peft_config: PeftConfig | None = None
    chat_template: bool = True
    model_init_kwargs: Mapping[str, Any] = field(default_factory=dict)
    eval_batch_size: int = 8
    control: bool = False
    exports: Sequence[str] = ()
    force: bool = False

    def __post_init__(self) -> None:
        unknown = [form for form in self.exports if form not in CHECKPOINT_FORMS]
        if unknown:
            raise ConfigError(f"exports are of {', '.join(CHECKPOINT_FORMS)}; found {unknown}.")


def run_experiment(experiment: Experiment, args: QuantizedDistillationConfig) -> Path:
    """Run all steps and write the report. Under a launcher, processes share every step."""
    state, run_dir = process_state(), Path(experiment.run_dir)
    args.resume_from_checkpoint = find_checkpoint(args.resume_from_checkpoint, str(args.output_dir))
    _log("the teacher answers")
    teacher, tokenizer = load_teacher(experiment.model, dtype=experiment.dtype, **experiment.model_init_kwargs)
    sets = {
        name: capture(
            teacher,
            [experiment.make_prompt(row) for row in rows],
            run_dir / name,
            tokenizer=tokenizer,
            chat_template=experiment.chat_template,
            **experiment.capture,
        )
        for name, rows in (("transfer_set", experiment.train_rows), ("held_out", experiment.held_out_rows))
    }
    asked = experiment.test_rows
    questions = Questions(asked, experiment.few_shot_rows, experiment.shots) if asked else None

    def measure(model: Any, arm: str) -> None:
        _log(f"measuring {arm}")
        evaluate_arm(
            model,
            tokenizer,
            run_dir,
            arm=arm,
            model_name=experiment.model,
            held_out=sets["held_out"],
            questions=questions,
            settings=EvaluationSettings(
                experiment.eval_batch_size,
                experiment.capture.get("generation", GenerationSettings()).max_new_tokens,
                experiment.chat_template,
                force=experiment.force,
                replace_other=True,  # figures and answers of an adapter that was trained before
                share=True,
            ),
        )
        state.wait_for_everyone()

    def train(own: QuantizedDistillationConfig) -> None:
        trainer = QuantizedDistillationTrainer(
            _load_student(experiment),
            own,
            train_dataset=sets["transfer_set"],
            eval_dataset=sets["held_out"],
            processing_class=tokenizer,
            peft_config=copy.deepcopy(experiment.peft_config),
        )
        trainer.train(resume_from_checkpoint=own.resume_from_checkpoint)
        trainer.save_model()
        if own.push_to_hub:
            trainer.push_to_hub()

    # One model is in memory at a time: each is dropped before the next is loaded.
    measure(teacher, "teacher")
    del teacher
    gc.collect()
    measure(_load_student(experiment), "before")
    arms = {"after": args}
    if experiment.control:
        control = copy.deepcopy(args)
        control.alpha, control.push_to_hub, control.resume_from_checkpoint = 0.0, False, None
        control.output_dir = f"{args.output_dir}-control"
        arms = {"control": control, **arms}
    for arm, own in arms.items():
        gc.collect()
        _log("training the control, by cross-entropy alone" if arm == "control" else "distillation")
        train(own)
        gc.collect()
        measure(_load_trained(experiment, str(own.output_dir)), arm)
    for form in experiment.exports:
        folder = run_dir / form
        gc.collect()
        if state.is_main_process:
            _export(experiment, form, str(args.output_dir), folder, tokenizer)
        state.wait_for_everyone()
        gc.collect()
        measure(load_exported(folder), form)
    report = run_dir / "report.md"
    if state.is_main_process:
        report = build_report(run_dir)
    state.wait_for_everyone()
    return report


def _load_student(experiment: Experiment, **kwargs: Any) -> Any:
    return load_student(
        experiment.model,
        quantization_config=copy.deepcopy(experiment.quantization_config),
        dtype=experiment.dtype,
        **{**kwargs, **experiment.model_init_kwargs},
    )


def _load_trained(experiment: Experiment, adapter: str) -> Any:
    """The student as users load it; during training its head and norms are in float32."""
    return PeftModel.from_pretrained(_load_student(experiment, device_map={"": default_device()}), adapter)


def _export(experiment: Experiment, form: str, adapter: str, folder: Path, tokenizer: Any) -> None:
    """Write one form, replacing that of an earlier run of the same experiment."""
    _log(f"exporting {form}")
    if Provenance.read(folder).export is not None:
        shutil.rmtree(folder)
    export_checkpoint(
        _load_trained(experiment, adapter), tokenizer, folder, form=form, provenance=Provenance.read(adapter)
    )


def _log(step: str) -> None:
    if process_state().is_main_process:
        logger.info("== %s", step)
