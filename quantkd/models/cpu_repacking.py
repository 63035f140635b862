"""Keeps 4-bit layers trainable on CPUs where bitsandbytes repacks them for inference.

On a CPU with AVX512-BF16, `bitsandbytes.nn.Linear4bit` rewrites its weight on the first forward pass in evaluation mode
and computes through a kernel without gradients from then on, also in training: every gradient below the last layer is
silently lost (seen with bitsandbytes 0.50). Its own way back rounds the quantization constants. Here the weight is kept
before it is repacked and put back, bit for bit, when the layer trains. Evaluation still uses the fast kernel, so that
its results are those of a plainly loaded model.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from quantkd.foreign import is_repacked, keep_from_repacking, lora_variant_of, repacks_on_cpu, unpack_rounded

logger = logging.getLogger(__name__)

_KEPT = "_quantkd_kept_weight"
_ROW_GROUP = 32  # the inference layout takes whole groups of rows


def keep_trainable_on_cpu(model: nn.Module) -> None:
    """Let every 4-bit layer of `model` return to its trainable form whenever it is trained. Idempotent."""
    from bitsandbytes.nn.modules import Linear4bit

    layers: list[Any] = list(model.modules())
    for layer in layers:
        if isinstance(layer, LoraLayer) and any(lora_variant_of(layer, each) for each in layer.active_adapters):
            # DoRA dequantizes the base layer's weight in every forward pass, and cannot read the inference layout.
            restore_weight(layer.get_base_layer())
            keep_from_repacking(layer.get_base_layer())
    for layer in layers:
        if not isinstance(layer, Linear4bit) or hasattr(layer, _KEPT) or not repacks_on_cpu(layer):
            continue
        state: Any = getattr(layer.weight, "quant_state", None)
        if state is not None and (layer.out_features % _ROW_GROUP or layer.in_features % state.blocksize):
            keep_from_repacking(layer)  # it would fail on this shape
            continue
        setattr(layer, _KEPT, None)
        layer.register_forward_pre_hook(_before_forward)
        # Taking a state dict makes bitsandbytes unpack, in its rounding way: a checkpoint would alter the model.
        layer.register_state_dict_pre_hook(_before_state_dict)


def _before_forward(layer: Any, args: tuple[Tensor, ...]) -> None:
    state = getattr(layer.weight, "quant_state", None)  # a layer that FSDP has just gathered keeps it elsewhere
    if state is None or layer.weight.device.type != "cpu":
        return
    if layer.training or args[0].requires_grad:
        restore_weight(layer)
    elif not is_repacked(state):
        # A shallow copy is enough: repacking gives the state new tensors and leaves the old ones alone.
        setattr(layer, _KEPT, (layer.weight.data, copy.copy(state)))


def _before_state_dict(layer: Any, prefix: str, keep_vars: bool) -> None:
    restore_weight(layer)


def restore_weight(layer: Any) -> None:
    """Put a layer's own weight back if it is repacked; its next forward pass in evaluation mode repacks it."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is None or not is_repacked(state):
        return
    kept = getattr(layer, _KEPT, None)
    if kept is None:
        logger.warning(
            "The model was evaluated on this CPU before it was given to train, and bitsandbytes had repacked its "
            "weights. Restoring them rounds their quantization constants. Load the model again to train the exact ones."
        )
        kept = unpack_rounded(layer.weight.data, state)
    layer.weight.data, layer.weight.quant_state = kept
    if layer.quant_state is not None:
        layer.quant_state = kept[1]
    if hasattr(layer, _KEPT):
        setattr(layer, _KEPT, None)


def stored_weight(layer: Any) -> Tensor:
    """A layer's own weight, also while it is repacked: bit for bit what was kept."""
    kept = getattr(layer, _KEPT, None)
    weight: Tensor = layer.weight.detach() if kept is None else kept[0]
    return weight
