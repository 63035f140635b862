"""A whole experiment: capture, measure teacher and student, train, measure again, report."""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from peft import PeftConfig, PeftModel
from torch import Tensor
from transformers.trainer_utils import IntervalStrategy

from quantkd.data.gsm8k import build_prompt
from quantkd.errors import ConfigError
from quantkd.evaluation.accuracy import Questions
from quantkd.evaluation.arms import EvaluationSettings
from quantkd.evaluation.measure import evaluate_arm
from quantkd.hardware import default_device, process_state
from quantkd.models.export import CHECKPOINT_FORMS, export_checkpoint, load_exported
from quantkd.models.provenance import Provenance, find_base
from quantkd.models.quantize import quantize_once
from quantkd.models.student import format_of, load_student, refuse_quantized
from quantkd.names import names_gguf
from quantkd.report import build_report
from quantkd.teacher import GenerationSettings, RunSettings, load_teacher
from quantkd.teacher.capture import capture
from quantkd.training.checkpoints import find_checkpoint
from quantkd.training.config import QuantizedDistillationConfig
from quantkd.training.curves import was_evaluated
from quantkd.training.trainer import QuantizedDistillationTrainer
from quantkd.transfer_set.rules import StorageRule

logger = logging.getLogger(__name__)

Row = Mapping[str, str]

_CURVE_STEP = 0.25  # of all steps: a start and four points show where the KL goes


@dataclass(frozen=True)
class Experiment:
    """What an experiment is run on; everything is written below `run_dir`."""

    model: str  # in full precision the teacher, quantized the student
    run_dir: Path
    train_rows: Sequence[Row]  # the teacher answers their prompts, and the student learns from that
    held_out_rows: Sequence[Row]  # for the fidelity
    test_rows: Sequence[Row] = ()  # for the accuracy and the answer agreement, in GSM8K's format
    # For the held-out points of the student's training.png, measured a few times: neither trained on nor reported.
    curve_rows: Sequence[Row] = ()
    few_shot_rows: Sequence[Row] = ()  # in the same format, disjoint from the test rows
    shots: Sequence[int] = (0,)
    make_prompt: Callable[[Row], Any] = lambda row: build_prompt(row["question"])  # of a training or held-out row
    storage: StorageRule | None = None
    generation: GenerationSettings = field(default_factory=GenerationSettings)
    run: RunSettings = field(default_factory=RunSettings)
    dtype: str | None = None  # of the teacher, and the student's compute dtype
    quantization_config: Any | None = None
    peft_config: PeftConfig | None = None
    chat_template: bool = True
    model_init_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of both
    eval_batch_size: int = 8
    # Train and measure a student by cross-entropy alone too, on the same rows from the same start: the difference is
    # what the teacher's distributions are worth.
    control: bool = False
    start: bool = True  # measure the adapter before the first step too: what it gave, and what training added
    exports: Sequence[str] = ()  # forms of `CHECKPOINT_FORMS`, to be written and measured too
    force: bool = False  # measure again what was measured of the same model on the same data

    def __post_init__(self) -> None:
        if unknown := [form for form in self.exports if form not in CHECKPOINT_FORMS]:
            raise ConfigError(f"exports are of {', '.join(CHECKPOINT_FORMS)}; found {unknown}.")
        if names_gguf(self.model, **self.model_init_kwargs):
            raise ConfigError(
                "model and model_init_kwargs are of the teacher, too, and name a GGUF file. Name the full-precision "
                "checkpoint as model, and the file with quantization_config=GgufConfig(gguf_file=FILE)."
            )


def run_experiment(experiment: Experiment, args: QuantizedDistillationConfig) -> Path:
    """Run all steps and write the report. Under a launcher, processes share every step."""
    state, run_dir = process_state(), Path(experiment.run_dir)
    args = copy.copy(args)  # the caller's stay as they are
    args.resume_from_checkpoint = find_checkpoint(args.resume_from_checkpoint, str(args.output_dir))
    if args.train_scales and experiment.peft_config is None and experiment.exports:
        raise ConfigError(
            f"exports is {experiment.exports}, which merge an adapter; train_scales without peft_config trains none, "
            "and saves a 4-bit checkpoint. Leave exports out, or give peft_config."
        )
    questions = Questions(experiment.test_rows, experiment.few_shot_rows, experiment.shots)
    _log("the teacher answers")
    refuse_quantized(experiment.model, **experiment.model_init_kwargs)
    teacher, tokenizer = load_teacher(experiment.model, dtype=experiment.dtype, **experiment.model_init_kwargs)
    asked = {"transfer_set": experiment.train_rows, "held_out": experiment.held_out_rows}
    asked |= {"curve": experiment.curve_rows} if experiment.curve_rows else {}
    answered: Any = {name: getattr(experiment, name) for name in ("storage", "chat_template", "generation", "run")}
    sets = {
        name: capture(teacher, [*map(experiment.make_prompt, rows)], run_dir / name, tokenizer=tokenizer, **answered)
        for name, rows in asked.items()
    }

    how = (experiment.eval_batch_size, experiment.generation.max_new_tokens, experiment.chat_template, experiment.force)
    # Replaced are the figures and answers of an adapter that was trained before.
    given: dict[str, Any] = {"settings": EvaluationSettings(*how, replace_other=True, share=True)}
    given |= {"model_name": experiment.model, "questions": questions if questions.rows else None}

    def measure(model: Any, arm: str) -> None:
        _log(f"measuring {arm}")
        evaluate_arm(model, tokenizer, run_dir, arm=arm, held_out=sets["held_out"], **given)
        state.wait_for_everyone()

    begun: dict[str, Tensor] = {}  # what the student trains, before its first step

    def train(own: QuantizedDistillationConfig) -> None:
        if calibrates and own.init != "zero" and Path(experiment.model).is_dir():
            own.init_from = own.init_from or experiment.model  # of a folder the checkpoint names the last part alone
        init = own.init
        if own is not args and begun:
            own.init = "zero"  # set below to where the student began: a start is not computed twice
        trainer = QuantizedDistillationTrainer(
            _load_student(experiment, base),
            own,
            train_dataset=sets["transfer_set"],
            eval_dataset=sets.get("curve", sets["held_out"]),
            processing_class=tokenizer,
            peft_config=copy.deepcopy(experiment.peft_config),
        )
        model: Any = trainer.model
        trained = {key: each for key, each in model.named_parameters() if each.requires_grad}
        if own is args and not own.resume_from_checkpoint and all(map(Tensor.numel, trained.values())):  # not ZeRO-3
            begun.update({key: each.detach().to("cpu", copy=True) for key, each in trained.items()})
        elif begun:
            for key, each in trained.items():
                each.data.copy_(begun[key])
            own.init, own.start, own.learning_rate = init, args.start, args.learning_rate
        if own is args and experiment.start and not own.resume_from_checkpoint:
            trainer.save_model(start, _internal_call=True)  # which does not push
        trainer.train(resume_from_checkpoint=own.resume_from_checkpoint)
        # Its last point, unless that is there or the best step was loaded.
        if own is args and "curve" in sets and not (own.load_best_model_at_end or was_evaluated(trainer.state)):
            trainer.evaluate()
        trainer.save_model()
        state.wait_for_everyone()  # process 0 writes what all of them load
        if own.push_to_hub:
            trainer.push_to_hub()

    measure(teacher, "teacher")
    del teacher
    measure(_load_student(experiment, experiment.model), "before")
    config: Any = copy.deepcopy(experiment.quantization_config) or "nf4"
    calibrates = args.calibrate and (config if isinstance(config, str) else format_of(config)) in ("nf4", "fp4")
    base = str(run_dir / "quantized") if calibrates else experiment.model
    if calibrates:
        _log("choosing the codes")
        clear_device_cache(garbage_collection=True)
        how_loaded = {"quantization_config": config, "dtype": experiment.dtype}
        quantize_once(experiment.model, sets["transfer_set"], Path(base), **how_loaded, **experiment.model_init_kwargs)
        measure(_load_student(experiment, base), "codes")
    arms, start = {"after": args}, f"{args.output_dir}-start"
    if experiment.control:
        control = copy.deepcopy(args)
        control.alpha, control.push_to_hub, control.resume_from_checkpoint = 0.0, False, None
        control.output_dir = f"{args.output_dir}-control"
        arms["control"] = control
    # Not of the control, whose points would take as long again.
    if "curve" in sets and args.eval_strategy == IntervalStrategy.NO:
        args.eval_strategy, args.eval_steps, args.eval_on_start = IntervalStrategy.STEPS, _CURVE_STEP, True
    for arm, own in arms.items():
        _log("training the control, by cross-entropy alone" if arm == "control" else "distillation")
        train(own)
        if own is args and experiment.start and Path(start).is_dir():  # one model is in memory at a time
            measure(_load_trained(experiment, base, start), "start")
        measure(_load_trained(experiment, base, str(own.output_dir)), arm)
    for form in experiment.exports:
        folder = run_dir / form
        if state.is_main_process:
            _log(f"exporting {form}")
            if folder.exists() and Provenance.read(folder).export is not None:  # of an earlier run of the experiment
                shutil.rmtree(folder)
            student = _load_trained(experiment, base, str(args.output_dir))
            facts = Provenance.read(str(args.output_dir))
            export_checkpoint(student, tokenizer, folder, form=form, provenance=facts)
            del student
        state.wait_for_everyone()
        clear_device_cache(garbage_collection=True)
        measure(load_exported(folder), form)
    if state.is_main_process:
        build_report(run_dir)
    state.wait_for_everyone()
    return run_dir / "report.md"


def _load_student(experiment: Experiment, name: str, **kwargs: Any) -> Any:
    clear_device_cache(garbage_collection=True)  # one model is in memory at a time
    config = copy.deepcopy(experiment.quantization_config) if name == experiment.model else None
    options = {"quantization_config": config, "dtype": experiment.dtype, **kwargs, **experiment.model_init_kwargs}
    return load_student(name, **options)


def _load_trained(experiment: Experiment, base: str, folder: str) -> Any:
    """The student as users load it; during training its head and norms are in float32."""
    where = {"device_map": {"": default_device()}}
    if not Path(folder, "adapter_config.json").is_file():  # trained scales alone
        return _load_student(experiment, folder, **where)
    own = find_base(Path(folder)) or base  # with trained scales, if there are any
    return PeftModel.from_pretrained(_load_student(experiment, str(own), **where), folder)


def _log(step: str) -> None:
    if process_state().is_main_process:
        logger.info("== %s", step)
