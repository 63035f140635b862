"""Keeps 4-bit layers trainable on CPUs where bitsandbytes repacks them for inference.

On a CPU with AVX512-BF16, `bitsandbytes.nn.Linear4bit` rewrites its weight on the first forward pass in evaluation
mode. From then on its kernel has no gradient, also in training, and whoever dequantizes the weight, such as PEFT's
merge, gets nonsense (seen with bitsandbytes 0.50). Here a layer has the repacked weight during such a pass alone, so
that results are those of a plainly loaded model, and its own, bit for bit, outside.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from quantkd.foreign import find_unpacking, is_repacked, keep_from_repacking, lora_variant_of, repacks_on_cpu

logger = logging.getLogger(__name__)

_FORMS = "_quantkd_weight_forms"
_ROW_GROUP = 32  # the inference layout takes whole groups of rows


def keep_trainable_on_cpu(model: nn.Module) -> None:
    """Let every 4-bit layer of `model` have its own weight outside of evaluation passes. Idempotent."""
    from bitsandbytes.nn.modules import Linear4bit

    layers: list[Any] = list(model.modules())
    for layer in layers:
        if isinstance(layer, LoraLayer) and any(lora_variant_of(layer, each) for each in layer.active_adapters):
            # DoRA scales the base layer's output by its weight's norm, so the two must be of one precision.
            restore_weight(layer.get_base_layer())
            keep_from_repacking(layer.get_base_layer())
    for layer in layers:
        if not isinstance(layer, Linear4bit) or hasattr(layer, _FORMS) or not repacks_on_cpu(layer):
            continue
        state: Any = getattr(layer.weight, "quant_state", None)
        if state is not None and (layer.out_features % _ROW_GROUP or layer.in_features % state.blocksize):
            keep_from_repacking(layer)  # it would fail on this shape
            continue
        setattr(layer, _FORMS, _Forms())
        layer.register_forward_pre_hook(_before_forward)
        layer.register_forward_hook(_after_forward, always_call=True)
        layer.register_load_state_dict_pre_hook(forget_repacked)  # which writes into the weight that is there


class _Forms:
    """A layer's own weight and state, the repacked ones, and whether a pass has the latter in place."""

    own: tuple[Any, Tensor, Any] = (None, torch.empty(0), None)  # the parameter, its data and state
    packed: tuple[Tensor, Any] | None = None
    in_pass = False


def _before_forward(layer: Any, args: tuple[Tensor, ...]) -> None:
    weight = layer.weight
    state = getattr(weight, "quant_state", None)  # a layer that FSDP has just gathered keeps it elsewhere
    if state is None or weight.device.type != "cpu":
        return
    restore_weight(layer)
    if layer.training or args[0].requires_grad:
        return
    forms = getattr(layer, _FORMS)
    if forms.own[0] is not weight or forms.own[2] is not weight.quant_state:
        # A shallow copy is enough: repacking gives the state new tensors and leaves the old ones alone.
        forms.own, forms.packed = (weight, weight.data, copy.copy(weight.quant_state)), None
    elif forms.packed is not None:
        weight.data, weight.quant_state = forms.packed
    forms.in_pass = True


def _after_forward(layer: Any, args: tuple[Tensor, ...], output: Any) -> None:
    forms = getattr(layer, _FORMS)
    if not forms.in_pass:
        return
    forms.in_pass = False
    if forms.packed is None and is_repacked(layer.weight.quant_state):  # not where the pass failed before
        forms.packed = layer.weight.data, layer.weight.quant_state
        if layer.quant_state is not None:
            layer.quant_state = forms.own[2]
    layer.weight.data, layer.weight.quant_state = forms.own[1:]


def forget_repacked(layer: Any, *_: Any) -> None:
    """After a layer's own weight was written to, its next evaluation pass repacks it anew."""
    if hasattr(layer, _FORMS):
        setattr(layer, _FORMS, _Forms())


def restore_weight(layer: Any) -> None:
    """Put back the weight of a layer that was evaluated before its model was given to us."""
    state = getattr(getattr(layer, "weight", None), "quant_state", None)
    if state is None or not is_repacked(state):
        return
    logger.warning(
        "The model was evaluated on this CPU before it was given to train, and bitsandbytes had repacked its "
        "weights. Restoring them rounds their quantization constants. Load the model again to train the exact ones."
    )
    layer.weight.data, layer.weight.quant_state = find_unpacking()(layer.weight.data, state)
    if layer.quant_state is not None:
        layer.quant_state = layer.weight.quant_state
