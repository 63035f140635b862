"""Keeps 4-bit layers trainable on CPUs where bitsandbytes repacks them for inference.

On a CPU with AVX512-BF16, `bitsandbytes.nn.Linear4bit` rewrites its weight on the first forward pass in evaluation mode
and computes through a kernel without gradients from then on, in training too: every gradient below the last layer is
silently lost (seen with bitsandbytes 0.50). Its own way back rounds the quantization constants. Here the weight is put
aside before it is repacked and put back, bit for bit, when the layer trains; evaluation keeps the fast kernel, so that
it gives what a plainly loaded model gives.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)

_STASH = "_quantkd_unpacked"
_PACKED_ROWS = 32  # the inference kernel's layout takes whole groups of rows


def keep_trainable_on_cpu(model: nn.Module) -> None:
    """Let every 4-bit layer of `model` return to its trainable form whenever it is trained. Idempotent."""
    from bitsandbytes.nn.modules import Linear4bit

    found = [layer for layer in model.modules() if isinstance(layer, Linear4bit) and not hasattr(layer, _STASH)]
    layer: Any
    for layer in found:
        if not getattr(layer, "support_avx512bf16_for_cpu", False):
            continue
        state = layer.weight.quant_state
        if state is not None and (layer.out_features % _PACKED_ROWS or layer.in_features % state.blocksize):
            layer.support_avx512bf16_for_cpu = False  # repacking would fail on this shape
            continue
        setattr(layer, _STASH, None)
        layer.register_forward_pre_hook(_before_forward)
        # Taking a state dict makes bitsandbytes unpack, in its rounding way: a checkpoint would alter the model.
        layer.register_state_dict_pre_hook(lambda layer, prefix, keep_vars: unpack(layer))


def _before_forward(module: Any, args: tuple[Tensor, ...]) -> None:
    state = getattr(module.weight, "quant_state", None)  # a layer that FSDP has just gathered keeps it elsewhere
    if state is None or module.weight.device.type != "cpu":
        return
    if module.training or args[0].requires_grad:
        unpack(module)
    elif not _is_packed(state):
        # A shallow copy is enough: repacking gives the state new tensors and leaves the old ones alone.
        setattr(module, _STASH, (module.weight.data, copy.copy(state)))


def unpack(module: Any) -> None:
    """Put a layer's own weight back if it is repacked; its next forward pass in evaluation mode repacks it."""
    state = getattr(module.weight, "quant_state", None)
    if state is None or not _is_packed(state):
        return
    data, state = getattr(module, _STASH, None) or _round_back(module)
    module.weight.data = data
    module.weight.quant_state = state
    if module.quant_state is not None:
        module.quant_state = state
    if hasattr(module, _STASH):
        setattr(module, _STASH, None)


def unpack_kept(model: nn.Module) -> None:
    """Put every layer's own weight back where it was put aside, bit for bit."""
    for layer in model.modules():
        if getattr(layer, _STASH, None) is not None:
            unpack(layer)


def _is_packed(state: Any) -> bool:
    return bool(getattr(state, "packing_format_for_cpu", False))


def _round_back(module: Any) -> tuple[Tensor, Any]:
    """The way back for a layer that was repacked before it came to us; the constants are rounded anew."""
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    logger.warning(
        "The model was evaluated on this CPU before it was given to train, and bitsandbytes had repacked its weights; "
        "their quantization constants are rounded on the way back. Load it anew to train the exact ones."
    )
    data, state = _convert_weight_packed_for_cpu_inverse(module.weight.data, module.weight.quant_state)
    return data, state
