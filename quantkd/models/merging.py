"""A quantized model with adapters, turned into an ordinary one: each layer dequantized, and what was learned added.

The base of the merge is `dequantize(Q(W))`, the weights that the adapter was trained on. Onto the original W it would
not fit: most of what it has learned is the difference between the two.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkd.errors import ConfigError
from quantkd.models.student_formats import dequantize_weight


def merge_adapters(model: PeftModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Merge the active adapter into the dequantized weights, layer by layer, and take the quantization away.

    The sum is taken in float32 and rounded once. Each layer's quantized form is let go of as soon as its merged one is
    there, so no more than one layer is held in float32.
    """
    network: Any = model.get_base_model()
    _check_mergeable(model, network)
    done: tuple[str, ...] = ()
    for name in [name for name, _ in network.named_modules() if name]:  # names, which keep no layer alive
        if name.startswith(done):
            continue  # within a layer that is merged already
        merged = _merge_module(name, network.get_submodule(name), dtype)
        if merged is not None:
            network.set_submodule(name, merged)
            done += (f"{name}.",)
    _untie_what_differs(network)
    _remove_quantization(network)
    _cast(network, dtype)
    return network  # type: ignore[no-any-return]


def _check_mergeable(model: PeftModel, network: Any) -> None:
    config = model.peft_config[model.active_adapter] if isinstance(model.active_adapter, str) else None
    if config is None:
        raise ConfigError(f"Several adapters are active, {model.active_adapters}; a merge takes one. Activate one.")
    if getattr(config, "lora_bias", False):
        raise ConfigError(
            "The adapter has a bias of its own (lora_bias=True), which most base layers have no place for. "
            "Export it with --form adapter, or train without lora_bias."
        )
    if config.peft_type != PeftType.LORA:
        method = getattr(config.peft_type, "value", config.peft_type)
        raise ConfigError(f"The adapter is of the method {method}; a merge knows LoRA. Export it with --form adapter.")
    if "meta" in {parameter.device.type for parameter in network.parameters()}:
        raise ConfigError("Some of the model's weights are offloaded; load it on one device to merge it.")


def _merge_module(name: str, module: Any, dtype: torch.dtype) -> nn.Module | None:
    """What stands in the module's place; None where it stays, with its children."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return _unwrap(name, module)
    if isinstance(module, LoraLayer):
        base: Any = module.get_base_layer()
        return _plain_layer(base, _compute_merged_weight(name, module).to(dtype))
    return _plain_layer(module, dequantize_weight(module).to(dtype)) if _is_quantized_layer(module) else None


def _unwrap(name: str, module: Any) -> nn.Module:
    """A module that was trained whole, or whose rows were; PEFT knows which."""
    trained: nn.Module = module.unload_and_optionally_merge_module(merge=True, safe_merge=True, adapter_names=None)
    quantized = [part for part in trained.modules() if _is_quantized_layer(part)]
    if quantized:
        raise ConfigError(f"{name} was trained whole and is quantized; expected full precision. Export the adapter.")
    return trained


def _compute_merged_weight(name: str, module: Any) -> Tensor:
    """dequantize(Q(W)) and the adapter's part in float32, in the base layer's own orientation."""
    base = module.get_base_layer()
    weight = (dequantize_weight(base) if _is_quantized_layer(base) else base.weight.detach()).float()
    adapters = [adapter for adapter in module.active_adapters if adapter in module.r]
    if not adapters:
        return weight
    if not hasattr(module, "get_delta_weight"):
        raise ConfigError(
            f"PEFT cannot merge into {name}, a {type(base).__module__}.{type(base).__name__}. Export the adapter with "
            "--form adapter."
        )
    (adapter,) = adapters
    with torch.no_grad():
        variant = module.lora_variant.get(adapter)
        if variant is None:
            merged = weight + module.get_delta_weight(adapter).float()
        else:  # DoRA and its like are no mere sum
            try:
                merged = variant.merge_safe(module, adapter, weight)
            except (NotImplementedError, RuntimeError) as error:
                raise ConfigError(f"PEFT cannot merge {name}: {error} Export it with --form adapter.") from error
    if not bool(torch.isfinite(merged).all()):
        raise ConfigError(f"The merged weight of {name} is not finite: the adapter is broken. Train it again.")
    return merged  # type: ignore[no-any-return]


def _is_quantized_layer(module: Any) -> bool:
    if hasattr(module, "W_q") or hasattr(module, "qweight"):
        return True
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    return (
        getattr(weight, "quant_state", None) is not None
        or type(weight).__name__ in ("Params4bit", "Int8Params")
        or type(weight).__module__.startswith("torchao.")
    )


def _plain_layer(base: Any, weight: Tensor) -> nn.Module:
    """The layer with another weight; of a quantized layer, the ordinary one that it was made from."""
    bias = getattr(base, "bias", None)
    layer: Any
    if not _is_quantized_layer(base):
        layer = copy.copy(base)  # an embedding keeps what its class adds, such as Gemma's scale
        layer._parameters = dict(base._parameters)
    elif issubclass(getattr(base, "source_cls", nn.Linear), Conv1D):  # GPT-2's, which bitsandbytes stores turned
        weight = weight.T.contiguous()
        with torch.device("meta"):
            layer = Conv1D(weight.shape[1], weight.shape[0])
    else:
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    if _is_quantized_layer(base):  # bitsandbytes' weight and its layer hold each other: none would go by itself
        for name in [name for name, _ in base.named_parameters(recurse=False)]:
            setattr(base, name, None)
    return layer  # type: ignore[no-any-return]


def _untie_what_differs(network: Any) -> None:
    """Tied weights of which one was adapted are two weights from now on."""
    tied = network.get_output_embeddings(), network.get_input_embeddings()
    weights = [None if layer is None else layer.weight for layer in tied]
    config = network.config.get_text_config()
    is_tied = bool(getattr(config, "tie_word_embeddings", False))
    if not is_tied or weights[0] is None or weights[1] is None or weights[0] is weights[1]:
        return
    if torch.equal(weights[0].float(), weights[1].float()):
        tied[0].weight = weights[1]
        return
    if "tie_word_embeddings" not in config.to_dict():
        raise ConfigError(
            f"An adapter sits on the embeddings or the head, which {type(network).__name__} always ties: a merged "
            "checkpoint could hold one of the two alone. Export it with --form adapter."
        )
    network.config.tie_word_embeddings = config.tie_word_embeddings = False
    network.all_tied_weights_keys = {}


def _remove_quantization(network: Any) -> None:
    quantizer = getattr(network, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(network)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(network, flag, False):
            setattr(network, flag, False)
    if hasattr(network, "hf_device_map"):
        del network.hf_device_map  # transformers would take a model on the CPU for an offloaded one


def _cast(network: Any, dtype: torch.dtype) -> None:
    strict = getattr(network, "_keep_in_fp32_modules_strict", None) or ()
    for name, parameter in network.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(f"{name} is still quantized after the merge. Export the adapter with --form adapter.")
        if not any(kept in name.split(".") for kept in strict):
            parameter.data = parameter.data.to(dtype)
