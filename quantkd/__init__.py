"""Distil a language model into a 4-bit instance of itself, from a stored teacher, in the Hugging Face tools."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Name -> module that holds it: `import quantkd` itself stays light, for the command line's sake.
_EXPORTS = {
    "Nucleus": "storage",
    "QuantKDError": "errors",
    "QuantizedDistillationConfig": "config",
    "QuantizedDistillationTrainer": "trainer",
    "Sampled": "storage",
    "TopK": "storage",
    "TopKLogprobs": "topk",
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
    from quantkd.config import QuantizedDistillationConfig
    from quantkd.errors import QuantKDError
    from quantkd.storage import Nucleus, Sampled, TopK
    from quantkd.teacher.capture import capture
    from quantkd.topk import TopKLogprobs
    from quantkd.trainer import QuantizedDistillationTrainer
    from quantkd.transfer_set import TransferSet


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'quantkd' has no attribute {name!r}")
    return getattr(importlib.import_module(f"quantkd.{_EXPORTS[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
