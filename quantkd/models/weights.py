"""The weight of a layer: whole where processes share it, in floating point where it is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from quantkd.errors import ConfigError
from quantkd.foreign import int8_scales, shape_of
from quantkd.models.cpu_repacking import restore_weight

# What a weight can be computed with in; float8 has its scales in another tensor.
FULL_PRECISION = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def is_sharded(parameter: Tensor) -> bool:
    """Whether this process holds only a part of the parameter now, for FSDP2 or ZeRO-3."""
    return isinstance(parameter, DTensor) or _is_partitioned(parameter)


def count_rows(parameter: Any) -> int:
    """The first dimension of the whole parameter, also where this process holds a part of it or a 4-bit form."""
    return shape_of(getattr(parameter, "quant_state", None) or parameter)[0]


def embedding_rows(model: Any) -> int:
    """How many token ids a model can read."""
    return count_rows(model.get_input_embeddings().weight)


def head_width(model: Any) -> int:
    """The rows of a model's output head, which may be padded beyond its tokenizer's ids."""
    return count_rows(model.get_output_embeddings().weight)


@contextmanager
def whole_parameters(layer: nn.Module) -> Iterator[tuple[Tensor, Tensor | None]]:
    """The layer's weight and bias whole, without a gradient if gathered. All that share the layer enter together."""
    with ExitStack() as stack:
        partitioned = [parameter for parameter in layer.parameters(recurse=False) if _is_partitioned(parameter)]
        if partitioned:
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(partitioned))
        weight, bias, dtype = _dequantize_4bit(layer), layer.bias, getattr(layer, "compute_dtype", None)
        if weight is None:
            weight = _whole(layer.weight)
        elif dtype is not None:
            weight = weight.to(dtype)
        yield weight, bias if bias is None else _whole(bias)


def quant_state_of(layer: Any) -> Any:
    """The constants of bitsandbytes' 4-bit layer; under FSDP its weight is a plain parameter, and it alone has them."""
    return getattr(getattr(layer, "weight", None), "quant_state", None) or getattr(layer, "quant_state", None)


def is_quantized_layer(layer: Any) -> bool:
    """Whether a layer's weight is in a format of bitsandbytes, HQQ, torchao, GPTQ or AWQ, or that of a GGUF file."""
    if any(hasattr(layer, mark) for mark in ("W_q", "qweight", "gguf_tensor")):
        return True
    weight = getattr(layer, "weight", None)
    kind = type(weight)
    return isinstance(weight, Tensor) and (
        getattr(weight, "quant_state", None) is not None
        or kind.__name__ in ("Params4bit", "Int8Params")
        or kind.__module__.startswith("torchao.")
    )


@torch.no_grad()
def dequantize_weight(layer: Any) -> Tensor:
    """The weight that a linear layer of any format trains with, in floating point; an ordinary one is not copied."""
    if hasattr(layer, "get_base_layer"):
        layer = layer.get_base_layer()
    weight: Tensor | None = getattr(layer, "weight", None)
    if hasattr(layer, "W_q"):  # HQQ
        weight = layer.dequantize()
    elif hasattr(layer, "qweight"):  # GPTQ and AWQ, whose layers differ in how they pack and agree in what they compute
        weight = _pass_identity(layer, layer.scales.dtype)
    elif type(weight).__name__ == "Int8Params":
        from bitsandbytes.functional import int8_vectorwise_dequant

        weight = int8_vectorwise_dequant(layer.weight.data, int8_scales(layer).to(layer.weight.device))
    elif type(weight).__module__.startswith("torchao."):
        # Not every layout can be dequantized by name.
        by_name = type(weight).__name__ in ("Int8Tensor", "IntxUnpackedToInt8Tensor")
        weight = layer.weight.dequantize() if by_name else _pass_identity(layer, layer.weight.dtype)
    elif (unpacked := _dequantize_4bit(layer)) is not None:
        weight = unpacked
    if weight is None or weight.dim() != 2 or weight.dtype not in FULL_PRECISION:
        raise ConfigError(
            f"{type(layer).__module__}.{type(layer).__name__} gives no full-precision weight; expected a linear layer "
            "of bitsandbytes, HQQ, torchao, GPTQ or AWQ, or an ordinary one."
        )
    return weight.detach()


def _dequantize_4bit(layer: Any) -> Tensor | None:
    """The weight of bitsandbytes' 4-bit layer, gathered if it is a DTensor; None for other layers."""
    restore_weight(layer)
    state = layer.folded_state() if hasattr(layer, "folded_state") else quant_state_of(layer)
    if state is None:
        return None
    from bitsandbytes.functional import dequantize_4bit

    weight: Tensor = dequantize_4bit(_whole(layer.weight.data), state)
    return weight


def _pass_identity(layer: Any, dtype: torch.dtype) -> Tensor:
    """The weight as the layer's own kernel applies it: what it makes of the unit vectors, less its bias."""
    device = next(tensor.device for tensor in (*layer.parameters(), *layer.buffers()))
    outputs: Tensor = layer(torch.eye(layer.in_features, dtype=dtype, device=device))
    bias = getattr(layer, "bias", None)
    return (outputs if bias is None else outputs - bias).T


def _whole(parameter: Any) -> Tensor:
    with torch.no_grad():
        whole: Tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return whole


def _is_partitioned(parameter: Any) -> bool:
    # What ZeRO-3 has gathered, or keeps everywhere because it is small, has its own shape.
    return tuple(parameter.shape) != shape_of(parameter)
