"""What a model's layers are stored as: their bytes, and a digest of the quantized weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from quantkd.foreign import int8_scales
from quantkd.models.cpu_repacking import restore_weight
from quantkd.models.gguf_codes import split_blocks
from quantkd.models.gguf_files import open_gguf
from quantkd.models.network import base_network
from quantkd.models.size import ModelSize
from quantkd.models.weights import dequantize_weight, is_quantized_layer, is_sharded, quant_state_of

_SUMS = 16
# Of the weights' norm. Other codes move every sum by tenths; another processor rounds the constants otherwise, and
# moves them by less than a millionth: bitsandbytes' mean of the constants depends even on the number of threads.
_SUMS_TOLERANCE = 1e-4
_SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def compute_size(model: Any) -> ModelSize:
    """The size of a loaded model. An adapter counts in 16 bits if its values are those of 16 bits, as it is saved."""
    network = base_network(model)
    layers = list(_list_quantized(network).values())
    stored = [_list_tensors(layer) for layer in layers]
    if not layers:
        layers = _list_linear(network)
        stored = [{"codes": layer.weight} for layer in layers]
    codes = sum(tensors["codes"].nbytes for tensors in stored)
    constants = sum(each.nbytes for tensors in stored for each in tensors.values()) - codes
    adapters = {id(each): each for each in list_adapter_parameters(model)}
    apart = {id(each) for layer in layers for each in (*layer.parameters(), *layer.buffers())}
    apart -= {id(getattr(layer, "bias", None)) for layer in layers}
    everything = {id(each): each for each in (*model.parameters(), *model.buffers())}
    rest = sum(each.nbytes for key, each in everything.items() if key not in apart | adapters.keys())
    if (file := getattr(network, "gguf_file", None)) is not None:
        rest = file.data.nbytes - codes - constants  # its metadata too
    count = sum(
        each.in_features * each.out_features if hasattr(each, "in_features") else each.weight.numel() for each in layers
    )
    return ModelSize(codes, constants, sum(map(_saved_bytes, adapters.values())), rest, count)


def compute_file_size(paths: Sequence[str | Path]) -> ModelSize:
    """The size of GGUF files that are run together: a model's, and those of adapters on it."""
    parts = {"codes": 0, "constants": 0, "adapters": 0, "rest": 0, "linear_weights": 0}
    for path in paths:
        file = open_gguf(path)
        is_adapter = file.metadata.get("general.type") == "adapter"
        parts["adapters" if is_adapter else "rest"] += file.data.nbytes
        layers = [each for each in file.tensors.values() if each.name.startswith("blk.") and len(each.shape) > 1]
        for layer in [] if is_adapter else layers:
            for key, tensor in split_blocks(layer).items():
                parts[key] += tensor.nbytes
                parts["rest"] -= tensor.nbytes
            parts["linear_weights"] += layer.size
    return ModelSize(**parts)


def list_adapter_parameters(model: Any) -> list[Tensor]:
    """What PEFT added to the layers; loaded for inference, it does not require a gradient."""
    found: list[Tensor] = []
    for module in list_adapted(model):
        parts = [getattr(module, name, None) for name in module.adapter_layer_names]
        found += [each for part in parts if isinstance(part, nn.Module) for each in part.parameters()]
        found += [part for part in parts if isinstance(part, nn.Parameter)]
    return found


def list_adapted(model: Any) -> list[Any]:
    """The layers that PEFT put adapters into."""
    marks = ("adapter_layer_names", "active_adapters")
    return [module for module in model.modules() if all(hasattr(module, mark) for mark in marks)]


def describe_weights(model: Any) -> dict[str, Any] | None:
    """What tells a model's quantized weights from others; None where it has none, or not whole in this process."""
    layers = _list_quantized(base_network(model))
    if not layers or any(is_sharded(each) or each.is_meta for each in model.parameters()):
        return None
    digest, sums, square = hashlib.sha256(), torch.zeros(_SUMS, dtype=torch.float64), 0.0
    for name, layer in layers.items():
        state = quant_state_of(layer)
        # The same codes mean other weights in another format.
        kind = state.quant_type if state else getattr(getattr(layer, "gguf_tensor", None), "format", "")
        digest.update(f"{name} {kind} {getattr(state, 'blocksize', '')}".encode())
        for key, tensor in _list_tensors(layer).items():
            digest.update(key.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        weight = dequantize_weight(layer).flatten()
        sums += weight[: len(weight) // _SUMS * _SUMS].view(-1, _SUMS).sum(0, dtype=torch.float32).cpu()
        square += float(torch.linalg.vector_norm(weight, dtype=torch.float32)) ** 2
    return {"sha256": digest.hexdigest(), "sums": [float(f"{each:.6g}") for each in (sums / square**0.5).tolist()]}


def are_close(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two descriptions are of the same weights up to rounding, as of one model quantized on two machines."""
    pairs = zip(one["sums"], other["sums"], strict=False)
    near = [all(type(each) is float for each in pair) and abs(pair[0] - pair[1]) < _SUMS_TOLERANCE for pair in pairs]
    return len(near) == _SUMS and all(near)


def _list_quantized(network: nn.Module) -> dict[str, Any]:
    """The quantized layers by name, in its order, whatever adapters are around them."""
    plain = [(name, each) for name, each in network.named_modules() if not hasattr(each, "get_base_layer")]
    found = {name.replace(".base_layer", ""): each for name, each in plain if is_quantized_layer(each)}
    return {name: found[name] for name in sorted(found)}


def _list_linear(network: Any) -> list[Any]:
    """The linear layers of a model in full precision but the head."""
    adapters, head = {id(each) for each in list_adapter_parameters(network)}, network.get_output_embeddings()
    linear = [each for each in network.modules() if type(each) in (nn.Linear, Conv1D) and each is not head]
    return [each for each in linear if id(each.weight) not in adapters]


def _list_tensors(layer: Any) -> dict[str, Tensor]:
    """The packed codes of a quantized layer under "codes", and the constants of its blocks by their names."""
    restore_weight(layer)
    if hasattr(layer, "gguf_tensor"):
        return split_blocks(layer.gguf_tensor)
    if (state := quant_state_of(layer)) is not None:
        nested = {"nested_absmax": state.state2.absmax, "offset": state.offset} if state.nested else {}
        return {"codes": layer.weight.data, "absmax": state.absmax, **nested}
    if hasattr(layer, "W_q"):  # HQQ
        constants = {name: each for name, each in layer.meta.items() if isinstance(each, Tensor)}
        return {"codes": layer.W_q, **constants}
    if hasattr(layer, "qweight"):  # GPTQ and AWQ
        names = [name for name in ("qzeros", "scales", "g_idx") if isinstance(getattr(layer, name, None), Tensor)]
        return {"codes": layer.qweight, **{name: getattr(layer, name) for name in names}}
    if type(layer.weight).__name__ == "Int8Params":
        return {"codes": layer.weight.data, "scales": int8_scales(layer)}
    parts = {name: getattr(layer.weight, name) for name in layer.weight.__tensor_flatten__()[0]}  # torchao
    codes = max(parts, key=lambda name: parts[name].nbytes)
    return {"codes": parts.pop(codes), **parts}


def _saved_bytes(parameter: Tensor) -> int:
    """The bytes of an adapter's weight; PEFT loads in 32 bits what was saved in 16."""
    is_short = any(torch.equal(parameter, parameter.to(dtype).to(parameter.dtype)) for dtype in _SIXTEEN_BITS)
    return parameter.numel() * (2 if is_short else parameter.element_size())
