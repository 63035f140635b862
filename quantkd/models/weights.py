"""A layer's weight whole and in floating point: gathered where processes share it, dequantized where it is 4-bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quantkd.models.cpu_repacking import unpack


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds only a part of the parameter now, for FSDP2 or ZeRO-3."""
    return _is_dtensor(parameter) or _is_partitioned(parameter)


def count_rows(parameter: Any) -> int:
    """The first dimension of the whole parameter, also where this process holds a part of it or a 4-bit form."""
    if hasattr(parameter, "ds_shape"):  # ZeRO-3 leaves an empty tensor here
        return int(parameter.ds_shape[0])
    state = getattr(parameter, "quant_state", None)
    return int((parameter if state is None else state).shape[0])


@contextmanager
def whole_parameters(layer: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The layer's weight and bias whole; what was gathered is let go of at the end.

    All processes that share the layer must enter together. Sharded parameters are gathered without a gradient; those
    that are whole already are handed out themselves.
    """
    with ExitStack() as stack:
        partitioned = [parameter for parameter in layer.parameters(recurse=False) if _is_partitioned(parameter)]
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        bias: Any = layer.bias
        yield _whole_weight(layer), bias if bias is None else _whole(bias)


def _whole_weight(layer: Any) -> Tensor:
    state = getattr(layer.weight, "quant_state", None) or getattr(layer, "quant_state", None)
    if state is None:
        return _whole(layer.weight)
    from bitsandbytes.functional import dequantize_4bit

    unpack(layer)
    weight: Tensor = dequantize_4bit(_whole(layer.weight.data), getattr(layer.weight, "quant_state", None) or state)
    return weight if layer.compute_dtype is None else weight.to(layer.compute_dtype)


def _whole(parameter: Any) -> Tensor:
    if not _is_dtensor(parameter):
        return parameter  # type: ignore[no-any-return]
    with torch.no_grad():
        gathered: Tensor = parameter.full_tensor()
    return gathered


def _is_dtensor(parameter: Any) -> bool:
    return hasattr(parameter, "full_tensor") and hasattr(parameter, "placements")


def _is_partitioned(parameter: Any) -> bool:
    # What ZeRO-3 has gathered, or keeps everywhere because it is small, has its own shape.
    return hasattr(parameter, "ds_shape") and parameter.shape != parameter.ds_shape
