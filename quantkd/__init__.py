"""Distil a language model into a 4-bit instance of itself, from a stored teacher, in the Hugging Face tools."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Name -> module that holds it: `import quantkd` itself stays light, for the command line's sake.
_EXPORTS = {
    "Nucleus": "transfer_set.rules",
    "QuantKDError": "errors",
    "QuantizedDistillationConfig": "training.config",
    "QuantizedDistillationTrainer": "training.trainer",
    "Sampled": "transfer_set.rules",
    "TopK": "transfer_set.rules",
    "TopKLogprobs": "transfer_set.topk",
    "TransferSet": "transfer_set",
    "capture": "teacher",
}
__all__ = [
    "Nucleus",
    "QuantKDError",
    "QuantizedDistillationConfig",
    "QuantizedDistillationTrainer",
    "Sampled",
    "TopK",
    "TopKLogprobs",
    "TransferSet",
    "__version__",
    "capture",
]

if TYPE_CHECKING:
    from quantkd.errors import QuantKDError
    from quantkd.teacher.capture import capture
    from quantkd.training.config import QuantizedDistillationConfig
    from quantkd.training.trainer import QuantizedDistillationTrainer
    from quantkd.transfer_set import TransferSet
    from quantkd.transfer_set.rules import Nucleus, Sampled, TopK
    from quantkd.transfer_set.topk import TopKLogprobs


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'quantkd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"quantkd.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
