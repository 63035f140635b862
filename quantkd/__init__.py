"""Distill a language model into a 4-bit copy of itself, with a stored teacher and the Hugging Face libraries."""

from __future__ import annotations

from typing import TYPE_CHECKING

from quantkd.names import __version__ as __version__, lazy

# `import quantkd` and `quantkd --help` stay fast: they load no torch.
__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "errors": "QuantKDError",
        "models.quantize": "quantize",
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
    from quantkd.models.quantize import quantize as quantize
    from quantkd.teacher.capture import capture as capture
    from quantkd.teacher.teacher import GenerationSettings as GenerationSettings, RunSettings as RunSettings
    from quantkd.training.config import QuantizedDistillationConfig as QuantizedDistillationConfig
    from quantkd.training.trainer import QuantizedDistillationTrainer as QuantizedDistillationTrainer
    from quantkd.transfer_set.reader import TransferSet as TransferSet
    from quantkd.transfer_set.rules import Nucleus as Nucleus, Sampled as Sampled, TopK as TopK
    from quantkd.transfer_set.topk import TopKLogprobs as TopKLogprobs
