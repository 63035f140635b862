"""A quantized model with adapters turned into an ordinary one: each layer dequantized, and the adapter added.

The base of the merge is `dequantize(Q(W))`, the weights that the adapter was trained on. It does not fit the original
W: most of what it has learned is the difference between the two.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from quantkd.errors import ConfigError
from quantkd.foreign import float32_modules, merge_lora, remove_quantization, untie_weights, unwrap_trained_module
from quantkd.models.weights import dequantize_weight, is_quantized_layer


def merge_adapters(model: PeftModel, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Merge the active adapter into the dequantized weights, layer by layer. The model is used up."""
    # The sum is computed in float32 and rounded once; no more than one layer is held in float32.
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
    remove_quantization(network)
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
    trained = unwrap_trained_module(module)
    if trained is not None and any(map(is_quantized_layer, trained.modules())):
        raise ConfigError(f"{name} was trained whole and is quantized; expected full precision. Export the adapter.")
    if isinstance(module, LoraLayer):
        return _plain_layer(module.get_base_layer(), _compute_merged_weight(name, module).to(dtype))
    if trained is None and is_quantized_layer(module):
        return _plain_layer(module, dequantize_weight(module).to(dtype))
    return trained


def _compute_merged_weight(name: str, module: Any) -> Tensor:
    """dequantize(Q(W)) and the adapter's part in float32, in the base layer's own orientation."""
    base = module.get_base_layer()
    if not hasattr(base, "weight"):
        raise ConfigError(f"{name} holds experts in one parameter, which are not merged. Use --form adapter.")
    weight = (dequantize_weight(base) if is_quantized_layer(base) else base.weight.detach()).float()
    adapters = [adapter for adapter in module.active_adapters if adapter in module.r]
    if not adapters:
        return weight
    (adapter,) = adapters
    with torch.no_grad():
        try:
            merged = merge_lora(module, adapter, weight)
        except (NotImplementedError, RuntimeError) as error:
            raise ConfigError(f"PEFT cannot merge {name}: {error} Export it with --form adapter.") from error
    if merged is None:
        raise ConfigError(
            f"PEFT cannot merge into {name}, a {type(base).__module__}.{type(base).__name__}. Export the adapter with "
            "--form adapter."
        )
    if not bool(torch.isfinite(merged).all()):
        raise ConfigError(f"The merged weight of {name} is not finite: the adapter is broken. Train it again.")
    return merged


def _plain_layer(base: Any, weight: Tensor) -> nn.Module:
    """The layer with another weight; of a quantized layer, the ordinary one that it was made from."""
    layer: Any
    bias = getattr(base, "bias", None)
    if not is_quantized_layer(base):
        # An embedding keeps what its class adds, such as Gemma's scale. The memo saves a copy of the old weight.
        layer = copy.deepcopy(base, {id(base.weight): nn.Parameter(weight, requires_grad=False)})
        return layer  # type: ignore[no-any-return]
    is_turned = issubclass(getattr(base, "source_cls", nn.Linear), Conv1D)  # GPT-2's, which bitsandbytes stores turned
    weight = weight.T.contiguous() if is_turned else weight
    with torch.device("meta"):
        layer = (Conv1D if is_turned else nn.Linear)(weight.shape[1], weight.shape[0])
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
    # bitsandbytes' weight and its layer refer to each other, and would stay until the next garbage collection.
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
    untie_weights(network)


def _cast(network: Any, dtype: torch.dtype) -> None:
    kept = float32_modules(network)
    for name, parameter in network.named_parameters():
        if not parameter.is_floating_point():
            raise ConfigError(f"{name} is still quantized after the merge. Export the adapter with --form adapter.")
        if kept.isdisjoint(name.split(".")):
            parameter.data = parameter.data.to(dtype)
