"""Distill a language model into a 4-bit copy of itself, with a stored teacher and the Hugging Face libraries."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"


def lazy(package: str, exports: dict[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of a package whose names, by module, are imported when first used."""
    modules = {name: f"{package}.{module}" for module, names in exports.items() for name in names.split()}

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return load, lambda: sorted(modules), sorted(modules)


# `import quantkd` and `quantkd --help` stay fast: they load no torch.
__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "errors": "QuantKDError",
        "teacher.capture": "capture",
        "teacher.teacher": "GenerationSettings RunSettings",
        "training.config": "QuantizedDistillationConfig",
        "training.trainer": "QuantizedDistillationTrainer",
        "transfer_set.reader": "TransferSet",
        "transfer_set.rules": "Nucleus Sampled TopK",
        "transfer_set.topk": "TopKLogprobs",
    },
)

if TYPE_CHECKING:
    from quantkd.errors import QuantKDError as QuantKDError
    from quantkd.teacher.capture import capture as capture
    from quantkd.teacher.teacher import GenerationSettings as GenerationSettings, RunSettings as RunSettings
    from quantkd.training.config import QuantizedDistillationConfig as QuantizedDistillationConfig
    from quantkd.training.trainer import QuantizedDistillationTrainer as QuantizedDistillationTrainer
    from quantkd.transfer_set.reader import TransferSet as TransferSet
    from quantkd.transfer_set.rules import Nucleus as Nucleus, Sampled as Sampled, TopK as TopK
    from quantkd.transfer_set.topk import TopKLogprobs as TopKLogprobs
