"""A search for training arguments: `Trainer.hyperparameter_search` with Optuna, on a student that is loaded once."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel

from quantkd.errors import ConfigError, MissingDependencyError
from quantkd.training.config import QuantizedDistillationConfig
from quantkd.training.curves import TrainingCurves
from quantkd.training.preparation import prepare_student
from quantkd.training.trainer import QuantizedDistillationTrainer
from quantkd.transfer_set import TransferSet

_FLOATS = "alpha beta learning_rate lora_dropout max_grad_norm num_train_epochs temperature weight_decay"
_INTS = "gradient_accumulation_steps lora_alpha lora_r max_steps per_device_train_batch_size"
_TYPES: dict[str, type] = {each: kind for kind, names in ((float, _FLOATS), (int, _INTS)) for each in names.split()}
_TYPES |= {"divergence": str, "lr_scheduler_type": str}
_REFUSED = ("train_scales", "adapter_budget", "push_to_hub", "resume_from_checkpoint")


def parse_space(texts: Sequence[str]) -> dict[str, dict[str, Any]]:
    """For each name what Optuna's `suggest_` functions take: `choices`, or `low`, `high` and `log`."""
    space: dict[str, dict[str, Any]] = {}
    for text, (name, _, values) in [(text, text.partition("=")) for text in texts]:
        if name not in _TYPES or name in space:
            raise ConfigError(f"Found {name!r} to search; expected each of {', '.join(_TYPES)} at most once.")
        try:
            if ":" in values:
                low, high = (_TYPES[name](value) for value in values.removesuffix(":log").split(":"))
                space[name] = {"low": low, "high": high, "log": values.endswith(":log")}
            else:
                space[name] = {"choices": [_TYPES[name](value) for value in values.split(",")]}
        except ValueError as error:
            raise ConfigError(f"Found {text!r}; expected NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C.") from error
    return space


def check_sweep(
    args: QuantizedDistillationConfig, space: dict[str, dict[str, Any]], train_dataset: TransferSet
) -> None:
    """Refuse a search that could not be run, before a student is made for it."""
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError("A sweep needs the package optuna: `pip install optuna`.") from error
    if unfit := [name for name in _REFUSED if getattr(args, name)]:
        raise ConfigError(f"A sweep tries adapters on one student as it is, and saves none. Leave {unfit[0]} out.")
    if args.world_size > 1:
        raise ConfigError("A sweep runs in one process, and several were launched. Start it without a launcher.")
    if "num_train_epochs" in space and ("max_steps" in space or args.max_steps > 0):
        raise ConfigError("max_steps overrides num_train_epochs; search one of them, and leave the other out.")
    captured = train_dataset.info.temperatures
    if "temperature" in space and not set(space["temperature"].get("choices", [None])) <= set(captured):
        raise ConfigError(f"temperature takes choices of the captured ones, {', '.join(map(str, captured))}.")
    if "beta" in space and "jsd" not in space.get("divergence", {"choices": [args.divergence]})["choices"]:
        raise ConfigError("beta has no effect without divergence=jsd. Search it together with that.")
    for name, dimension in space.items():
        for value in dimension.get("choices", [dimension.get("low"), dimension.get("high")]):
            replace(args, **({} if name.startswith("lora_") else {name: value}))  # which checks it


def run_sweep(
    model: PreTrainedModel,
    args: QuantizedDistillationConfig,
    space: dict[str, dict[str, Any]],
    lora: LoraConfig,
    *,
    train_dataset: TransferSet,
    eval_dataset: TransferSet,
    n_trials: int = 20,
) -> list[Any]:
    """Train students until `sweep.db` has `n_trials` of this search: Optuna's trials, the lowest held-out KL first."""
    check_sweep(args, space, train_dataset)
    import optuna

    args = copy(args)
    args.save_strategy = args.eval_strategy = "no"
    # The Trainer casts what a trial tries to the type of what it finds.
    args.load_best_model_at_end, args.num_train_epochs = False, float(args.num_train_epochs)
    fixed = {name: str(getattr(args, name)) for name in ("seed", "init", *_TYPES) if hasattr(args, name)}
    search = [fixed, space, train_dataset.digest, eval_dataset.digest, lora.r, lora.lora_alpha]
    name = "quantkd-" + hashlib.sha256(json.dumps(search).encode()).hexdigest()[:16]  # another search, another study
    Path(str(args.output_dir)).mkdir(parents=True, exist_ok=True)
    database = f"sqlite:///{Path(str(args.output_dir)).resolve()}/sweep.db"
    study = optuna.create_study(study_name=name, storage=database, load_if_exists=True)
    start, args.init = args.init, "zero"
    trainer = QuantizedDistillationTrainer(model, args, train_dataset, eval_dataset, peft_config=replace(lora))
    trainer.remove_callback(TrainingCurves)  # each trial would draw over the picture of the one before
    adapted: Any = trainer.model
    args.init = start

    def suggest(trial: Any) -> dict[str, Any]:
        """What a trial tries of the arguments; asked again, it answers the same."""
        for name, dimension in space.items():
            kind = "categorical" if "choices" in dimension else _TYPES[name].__name__
            getattr(trial, f"suggest_{kind}")(name, **dimension)
        return {name: value for name, value in trial.params.items() if not name.startswith("lora_")}

    def model_init(trial: Any) -> Any:
        """The student with new adapters in place of those of the trial before."""
        nonlocal adapted
        suggest(trial)  # the Trainer asks for the model first
        config = replace(lora, r=trial.params.get("lora_r", lora.r))
        config.lora_alpha = trial.params.get("lora_alpha", max(1, round(lora.lora_alpha / lora.r * config.r)))
        config.lora_dropout = trial.params.get("lora_dropout", lora.lora_dropout)
        adapted = prepare_student(adapted.unload(), args, [], train_dataset=train_dataset, peft_config=config)
        return adapted

    trainer.model_init = model_init
    try:  # each trial's sampler is seeded by its place, so a sweep that was stopped tries the same points
        while (place := len(finished := study.get_trials(states=[optuna.trial.TrialState.COMPLETE]))) < n_trials:
            trainer.hyperparameter_search(
                suggest, lambda metrics: metrics["eval_kl"] if math.isfinite(metrics["eval_kl"]) else math.inf,
                n_trials=1, direction="minimize", backend="optuna", storage=database, study_name=name,
                load_if_exists=True, sampler=optuna.samplers.TPESampler(seed=args.seed + place),
            )  # fmt: skip
    finally:
        adapted.unload()
    return sorted(finished, key=lambda trial: trial.value)
