"""What a sweep searches: ranges and choices of training arguments and of the adapters' shape, as text and as values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkd.errors import ConfigError

TRAINING_NAMES: dict[str, type] = {
    "learning_rate": float,
    "num_train_epochs": float,
    "max_steps": int,
    "alpha": float,
    "temperature": float,
    "beta": float,
    "divergence": str,
    "weight_decay": float,
    "max_grad_norm": float,
    "lr_scheduler_type": str,
    "per_device_train_batch_size": int,
    "gradient_accumulation_steps": int,
}
"""Fields of `QuantizedDistillationConfig` that a sweep may search, and their types."""

ADAPTER_NAMES: dict[str, type] = {"lora_r": int, "lora_alpha": int, "lora_dropout": float}
"""The adapters' shape; each trial gets new adapters of it."""

# Of the numbers these alone may be 0.
_MAY_BE_ZERO = ("alpha", "weight_decay", "max_grad_norm", "lora_dropout")
_FORM = "expected NAME=LOW:HIGH, NAME=LOW:HIGH:log or NAME=A,B,C, such as learning_rate=1e-5:1e-3:log or lora_r=8,16,32"


@dataclass(frozen=True)
class Dimension:
    """One thing that is searched.

    Args:
        name: of `TRAINING_NAMES` or `ADAPTER_NAMES`.
        choices: the values to choose from; None for a range.
        low, high: the ends of a range, both included.
        log: draw evenly in the logarithm.
    """

    name: str
    choices: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False

    @property
    def type(self) -> type:
        """`float`, `int` or `str`."""
        return {**TRAINING_NAMES, **ADAPTER_NAMES}[self.name]

    @property
    def ends(self) -> tuple[Any, ...]:
        """The choices, or both ends of the range: if these are good, all between are."""
        return (self.low, self.high) if self.choices is None else self.choices

    def suggest(self, trial: Any) -> Any:
        """The value that a trial shall try; asked again, the same trial gives the same."""
        if self.choices is not None:
            return trial.suggest_categorical(self.name, self.choices)
        if self.type is int:
            return trial.suggest_int(self.name, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, log=self.log)

    def to_text(self) -> str:
        """What `parse_space` reads back."""
        if self.choices is not None:
            return f"{self.name}={','.join(map(str, self.choices))}"
        return f"{self.name}={self.low}:{self.high}" + ":log" * self.log


def parse_space(texts: Sequence[str]) -> tuple[Dimension, ...]:
    """Read the ranges and choices of a sweep.

    Example:
        >>> [dimension.ends for dimension in parse_space(["learning_rate=1e-5:1e-3:log", "lora_r=8,16"])]
        [(1e-05, 0.001), (8, 16)]
    """
    if not texts:
        raise ConfigError(f"There is nothing to search; {_FORM}.")
    dimensions = tuple(_parse(text) for text in texts)
    names = [dimension.name for dimension in dimensions]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"The space names {', '.join(twice)} more than once; give each once.")
    return dimensions


def _parse(text: str) -> Dimension:
    name, equals, rest = (part.strip() for part in text.partition("="))
    known = {**TRAINING_NAMES, **ADAPTER_NAMES}
    if not equals or not rest:
        raise ConfigError(f"Found {text!r}; {_FORM}.")
    if name not in known:
        raise ConfigError(f"Found {name!r} to search; expected one of {', '.join(known)}.")
    if ":" not in rest:
        choices = tuple(_to_value(text, name, part.strip()) for part in rest.split(","))
        if len(set(choices)) < len(choices):
            raise ConfigError(f"Found {text!r}, which names a choice more than once.")
        return Dimension(name, choices=choices)
    low, high, *scale = (part.strip() for part in rest.split(":"))
    if known[name] is str or scale not in ([], ["log"]):
        raise ConfigError(f"Found {text!r}; {_FORM}.")
    dimension = Dimension(name, low=_to_value(text, name, low), high=_to_value(text, name, high), log=bool(scale))
    if dimension.low >= dimension.high:
        raise ConfigError(f"Found {text!r}, whose lower end is not below its upper one.")
    if dimension.log and dimension.low <= 0:
        raise ConfigError(f"Found {text!r}: a logarithmic range begins above 0.")
    return dimension


def _to_value(text: str, name: str, value: str) -> Any:
    kind = {**TRAINING_NAMES, **ADAPTER_NAMES}[name]
    try:
        number = kind(value)
    except ValueError as error:
        raise ConfigError(f"Found {text!r}, where {value!r} is no {kind.__name__}; {_FORM}.") from error
    if kind is not str and (not 0 <= number < float("inf") or (number == 0 and name not in _MAY_BE_ZERO)):
        least = "at least 0" if name in _MAY_BE_ZERO else "above 0"
        raise ConfigError(f"Found {text!r}, where {name} would be {value}; expected a number {least}.")
    return number
