"""A search for good training arguments: `Trainer.hyperparameter_search` with Optuna on one loaded student.

The student is loaded once; every trial gets new adapters and their start. Trials lie in an SQLite file beside the
results, so a sweep that was stopped goes on, and tries the same points as one that was not: the sampler of each trial
is seeded by its place.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from quantkd.errors import ConfigError, MissingDependencyError
from quantkd.hardware import process_state
from quantkd.loss.reference import check_objective
from quantkd.models.student import default_lora_config
from quantkd.names import short_name
from quantkd.training.config import QuantizedDistillationConfig
from quantkd.training.curves import TrainingCurves
from quantkd.training.preparation import load_tokenizer, prepare_student
from quantkd.training.search_space import ADAPTER_NAMES, TRAINING_NAMES, Dimension
from quantkd.training.sweep_trials import (
    OBJECTIVE,
    STUDY,
    Trial,
    open_study,
    quiet_optuna,
    read_trials,
    to_json,
    write_trials,
)
from quantkd.training.trainer import QuantizedDistillationTrainer
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.compatibility import check_transfer_set

_METRICS = (OBJECTIVE, "eval_ce", "eval_top1_agreement")
# What else decides a trial's figure, beside the arguments that can be searched.
_FIXED = ("seed", "optim", "warmup_steps", "init", "init_rows", "train_sampling_strategy", "bf16", "fp16")


def run_sweep(
    model: PreTrainedModel,
    args: QuantizedDistillationConfig,
    space: Sequence[Dimension],
    *,
    train_dataset: TransferSet,
    eval_dataset: TransferSet,
    n_trials: int = 20,
    processing_class: PreTrainedTokenizerBase | None = None,
    peft_config: PeftConfig | None = None,
    on_trial: Callable[[Trial], None] | None = None,
) -> list[Trial]:
    """Train `n_trials` students and compare their KL to the teacher on held-out rows."""
    if importlib.util.find_spec("optuna") is None:
        raise MissingDependencyError("A sweep needs the package optuna: `pip install quantkd[sweep]`.")
    if process_state().num_processes > 1:
        raise ConfigError(
            f"A sweep runs in one process, and {process_state().num_processes} were launched. Start it without a "
            "launcher; what it finds holds for a launched training of the same batch."
        )
    if n_trials < 1:
        raise ConfigError(f"n_trials is {n_trials}; expected at least 1.")
    args = _own_arguments(args, space)
    tokenizer = processing_class or load_tokenizer(model, args)
    adapters = peft_config or default_lora_config()
    _check_space(space, args, adapters, tokenizer, (train_dataset, eval_dataset))
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "space": [dimension.to_text() for dimension in space],
        "model": short_name(str(model.config._name_or_path)),
        "train": [train_dataset.digest, len(train_dataset)],
        "held_out": [eval_dataset.digest, len(eval_dataset)],
        "adapters": json.loads(json.dumps(adapters.to_dict(), default=to_json, sort_keys=True)),
        **{name: to_json(getattr(args, name)) for name in (*TRAINING_NAMES, *_FIXED)},
    }
    students = _Students(model, args, space, train_dataset, eval_dataset, adapters)
    with quiet_optuna():
        study, storage = open_study(folder / "sweep.db", settings)
        search = _Search(students, space)
        if len(read_trials(study)) < n_trials:
            trainer = QuantizedDistillationTrainer(
                students.attach(None, start=False),
                args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
            )
            trainer.remove_callback(TrainingCurves)  # each trial's picture would be drawn over the one before
            trainer.model_init = search.model_init  # type: ignore[assignment]  # PEFT's models are models
        while (place := len(read_trials(study))) < n_trials:
            search.run(trainer, storage, seed=args.seed + place)
            trials = read_trials(study)
            write_trials(folder, settings, trials)
            if on_trial is not None:
                on_trial(trials[-1])
        students.detach()
        trials = read_trials(study)
    write_trials(folder, settings, trials)
    from quantkd.report.sweep import draw_sweep  # matplotlib takes a second to import

    draw_sweep(trials, space, folder / "sweep.png")
    return trials


class _Students:
    """The loaded model, with new adapters for each trial. A start of the same shape is computed once."""

    def __init__(
        self,
        model: PreTrainedModel,
        args: QuantizedDistillationConfig,
        space: Sequence[Dimension],
        train_dataset: TransferSet,
        eval_dataset: TransferSet,
        adapters: PeftConfig,
    ) -> None:
        self.model, self.args, self.adapters = model, args, adapters
        self.space = [dimension for dimension in space if dimension.name in ADAPTER_NAMES]
        self.train_dataset, self.transfer_sets = train_dataset, [train_dataset, eval_dataset]
        self.adapted: Any = None
        self.starts: dict[str, dict[str, torch.Tensor]] = {}

    def attach(self, trial: Any, *, start: bool = True) -> PeftModel:
        """New adapters of the shape that a trial asks for, in place of those there."""
        self.detach()
        config = self._shape(trial)
        key = f"{getattr(config, 'r', None)} {getattr(config, 'lora_alpha', None)}"
        args = copy.copy(self.args)
        if key in self.starts or not start:
            args.init = "zero"
        self.adapted = prepare_student(
            self.model, args, self.transfer_sets, train_dataset=self.train_dataset, peft_config=config
        )
        trained = {name: weight for name, weight in self.adapted.named_parameters() if weight.requires_grad}
        if key in self.starts:
            for name, weight in trained.items():
                weight.data.copy_(self.starts[key][name])
        elif start:
            self.starts[key] = {name: weight.detach().cpu().clone() for name, weight in trained.items()}
        return self.adapted  # type: ignore[no-any-return]

    def detach(self) -> None:
        """The model without adapters again."""
        if self.adapted is not None:
            self.model = self.adapted.unload()
            self.adapted = None

    def _shape(self, trial: Any) -> PeftConfig:
        config = copy.deepcopy(self.adapters)
        if trial is not None and self.space:
            assert isinstance(config, LoraConfig)  # `_check_space`
            shape = {dimension.name: dimension.suggest(trial) for dimension in self.space}
            scale = config.lora_alpha / config.r
            config.r = shape.get("lora_r", config.r)
            config.lora_alpha = shape.get("lora_alpha", max(1, round(scale * config.r)))
            config.lora_dropout = shape.get("lora_dropout", config.lora_dropout)
        return config


class _Search:
    """The functions that `hyperparameter_search` asks for, of the trial that runs."""

    def __init__(self, students: _Students, space: Sequence[Dimension]) -> None:
        self.students, self.space = students, space
        self.trial: Any = None

    def run(self, trainer: QuantizedDistillationTrainer, storage: Any, *, seed: int) -> None:
        """One trial."""
        import optuna

        trainer.hyperparameter_search(
            self.hp_space, self.compute_objective, n_trials=1, direction="minimize", backend="optuna",
            storage=storage, study_name=STUDY, load_if_exists=True, sampler=optuna.samplers.TPESampler(seed=seed),
        )  # fmt: skip

    def model_init(self, trial: Any) -> PeftModel:
        return self.students.attach(trial)

    def hp_space(self, trial: Any) -> dict[str, Any]:
        self.trial = trial
        found = {dimension.name: dimension.suggest(trial) for dimension in self.space}
        return {name: value for name, value in found.items() if name in TRAINING_NAMES}

    def compute_objective(self, metrics: dict[str, float]) -> float:
        self.trial.set_user_attr("metrics", {name: metrics[name] for name in _METRICS if math.isfinite(metrics[name])})
        value = metrics[OBJECTIVE]
        return value if math.isfinite(value) else math.inf  # Optuna counts a nan as no trial at all


def _own_arguments(args: QuantizedDistillationConfig, space: Sequence[Dimension]) -> QuantizedDistillationConfig:
    """Arguments that trials may write to: nothing is saved, and one measurement at the end decides."""
    own = copy.deepcopy(args)
    own.save_strategy, own.eval_strategy = SaveStrategy.NO, IntervalStrategy.NO
    own.load_best_model_at_end = own.push_to_hub = False
    own.resume_from_checkpoint = None
    for dimension in space:
        if dimension.name in TRAINING_NAMES and dimension.type is not str:
            # The Trainer casts what it is given to the type that it finds: an epoch and a half to one epoch.
            setattr(own, dimension.name, dimension.type(getattr(own, dimension.name)))
    return own


def _check_space(
    space: Sequence[Dimension],
    args: QuantizedDistillationConfig,
    adapters: PeftConfig,
    tokenizer: PreTrainedTokenizerBase,
    transfer_sets: Sequence[TransferSet],
) -> None:
    """Refuse, before the first trial, what would fail in a later one."""
    names = [dimension.name for dimension in space]
    if any(name in ADAPTER_NAMES for name in names) and not isinstance(adapters, LoraConfig):
        raise ConfigError(f"The space asks for LoRA's shape, and peft_config is a {type(adapters).__name__}.")
    if "num_train_epochs" in names and ("max_steps" in names or args.max_steps > 0):
        raise ConfigError("max_steps decides over num_train_epochs; search one of them, and leave the other out.")
    for dimension in space:
        if dimension.name == "temperature" and dimension.choices is None:
            captured = ", ".join(map(str, transfer_sets[0].info.temperatures))
            raise ConfigError(f"temperature takes the captured ones, {captured}: give it as choices, not as a range.")
        for value in dimension.ends if dimension.name in TRAINING_NAMES else ():
            tried = copy.copy(args)
            old = getattr(args, dimension.name)
            try:
                setattr(tried, dimension.name, type(old)(value) if dimension.type is str else value)
            except ValueError as error:  # such as a schedule that there is not
                raise ConfigError(f"{dimension.name}={value} cannot be: {error}.") from error
            check_objective(tried.alpha, tried.temperature, tried.divergence, tried.beta)
            for transfer_set in transfer_sets:
                check_transfer_set(transfer_set, tokenizer, tried)
