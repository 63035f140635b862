"""The student: the teacher's own model quantized, NF4 unless another format is named, with LoRA on all its layers."""

from __future__ import annotations

import copy
import os
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.hqq import name_to_linear_tag
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizer_hqq import HqqHfQuantizer

from quantkd.errors import ConfigError
from quantkd.hardware import default_device, native_compute_dtype, parse_dtype
from quantkd.models.cpu_repacking import keep_trainable_on_cpu
from quantkd.models.network import base_network
from quantkd.models.student_formats import (
    build_quantization_config,
    check_format,
    choose_kernel,
    format_of,
    stored_quantization,
)
from quantkd.names import refuse_adapter


def default_lora_config(r: int = 16) -> LoraConfig:
    """LoRA of rank `r` on all linear layers but the head, scaled by 2 (`lora_alpha = 2 * r`), without dropout."""
    return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def default_quantization_config(compute_dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314).

    Under FSDP or ZeRO-3 the packed weights lie in tensors of `shard_dtype`, so that they can be sharded.
    """
    config = _build_config("nf4", compute_dtype or native_compute_dtype())
    assert isinstance(config, BitsAndBytesConfig)
    return config


def shares_weights() -> bool:
    """Whether the launcher shares the weights out over the processes: FSDP, or DeepSpeed ZeRO-3."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP") or is_deepspeed_zero3_enabled())


def shard_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """What packed 4-bit weights must be stored in where they are sharded: the dtype of the parameters beside them.

    FSDP shards floating parameters alone, and mixed precision casts them when it gathers them. Packed bits survive
    that only where the cast is to the dtype that they are in already.
    """
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed, compute_dtype)


def is_quantized(model: Any) -> bool:
    """Whether the model was loaded quantized, with or without adapters around it."""
    network = base_network(model)
    return bool(getattr(network, "is_quantized", False) or getattr(network, "hqq_quantized", False))


def load_student(
    name_or_path: str,
    *,
    quantization_config: Any | None = None,
    dtype: str | torch.dtype | None = None,
    trainable: bool = True,
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model quantized, on this process's own device."""
    compute_dtype = parse_dtype(dtype)
    refuse_adapter(name_or_path, **model_init_kwargs)
    stored = stored_quantization(name_or_path, **model_init_kwargs)
    config = _choose_config(name_or_path, quantization_config, stored, compute_dtype)
    check_format(
        stored or config, device=default_device(), trainable=trainable, shared=shares_weights(), dtype=compute_dtype
    )
    kwargs: dict[str, Any] = {"dtype": compute_dtype, "trust_remote_code": False, **model_init_kwargs}
    if shares_weights():
        _check_storage(stored or config, shard_dtype(compute_dtype))
    else:
        kwargs.setdefault("device_map", {"": default_device()})
    # transformers 5 reads an HqqConfig and leaves out the quantizing that it asks for.
    by_hqq = format_of(stored or config).startswith("hqq") and _is_left_out(HqqHfQuantizer)
    if by_hqq and stored is not None:
        raise ConfigError(
            f"{name_or_path} is a checkpoint in HQQ, which this transformers cannot read. Load the full-precision "
            "checkpoint that it was made from, with quantization_config='hqq4'."
        )
    if config is not None and not by_hqq:
        kwargs["quantization_config"] = config
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    if by_hqq:
        _quantize_with_hqq(model, config, compute_dtype)
    keep_trainable_on_cpu(model)
    return model


def _choose_config(name_or_path: str, wanted: Any, stored: dict[str, Any] | None, compute_dtype: torch.dtype) -> Any:
    """The config to load with; None for a checkpoint whose own says all."""
    if stored is None:
        wanted = "nf4" if wanted is None else wanted
        return _build_config(wanted, compute_dtype) if isinstance(wanted, str) else wanted
    if wanted is None:
        return choose_kernel(stored, default_device())
    found, asked = format_of(stored), wanted if isinstance(wanted, str) else format_of(wanted)
    if found != asked:
        raise ConfigError(
            f"{name_or_path} is stored in {found} already; a student in {asked} was asked for. Leave the format out to "
            "load the checkpoint as it is, or give the full-precision one that it was made from."
        )
    return choose_kernel(stored, default_device()) if isinstance(wanted, str) else wanted


def _build_config(name: str, compute_dtype: torch.dtype) -> Any:
    storage_dtype = shard_dtype(compute_dtype) if shares_weights() else torch.uint8
    return build_quantization_config(name, compute_dtype, storage_dtype)


def _is_left_out(quantizer: type[HfQuantizer]) -> bool:
    return quantizer.get_quantize_ops is HfQuantizer.get_quantize_ops


def _quantize_with_hqq(model: PreTrainedModel, config: Any, compute_dtype: torch.dtype) -> None:
    """Replace the linear layers one by one, each freed before the next; which and how, as HqqConfig documents it."""
    from hqq.core.quantize import HQQLinear

    model.requires_grad_(False)
    tags = {name: name_to_linear_tag(name) for name, module in model.named_modules() if type(module) is nn.Linear}
    settings = config.quant_config
    by_tag = any(tag in settings for tag in tags.values())  # else one setting for all
    for name, tag in tags.items():
        wanted = settings.get(tag) if by_tag else settings
        if tag not in (config.skip_modules or ()) and wanted is not None:
            layer: Any = model.get_submodule(name)
            device = str(layer.weight.device)
            model.set_submodule(name, HQQLinear(layer, dict(wanted), compute_dtype=compute_dtype, device=device))
    setattr(model, "hqq_quantized", True)  # what PEFT knows such a model by  # noqa: B010


def _check_storage(quantization_config: Any, expected: torch.dtype) -> None:
    """Refuse 4-bit weights that lie, or would lie, in another floating dtype than they are gathered in."""
    is_stored = isinstance(quantization_config, dict)
    config: Any = SimpleNamespace(**quantization_config) if is_stored else quantization_config
    storage = getattr(config, "bnb_4bit_quant_storage", None)
    storage = getattr(torch, storage) if isinstance(storage, str) else storage
    if storage is not None and storage.is_floating_point and storage != expected:
        remedy = f"Set bnb_4bit_quant_storage={expected}, or leave it out."
        if is_stored:
            remedy = "The checkpoint is stored so; load the full-precision one that it was made from."
        raise ConfigError(
            f"bnb_4bit_quant_storage is {storage}, and the sharded parameters are gathered in {expected}: the cast "
            f"would destroy the packed weights. {remedy}"
        )


def attach_lora(
    model: PreTrainedModel,
    peft_config: PeftConfig | None = None,
    *,
    gradient_checkpointing: bool = False,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> PeftModel:
    """Freeze the model and attach trainable adapters.

    A quantized model first goes through PEFT's `prepare_model_for_kbit_training`, which casts norms, embeddings and
    head of bitsandbytes' and AWQ's formats to float32.
    """
    if is_quantized(model):
        check_trainable(model)
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False, **(gradient_checkpointing_kwargs or {})},
        )
    return get_peft_model(model, _name_linear_layers(model, peft_config or default_lora_config()))


def _name_linear_layers(model: PreTrainedModel, peft_config: PeftConfig) -> PeftConfig:
    """What "all-linear" means for HQQ, GPTQ and AWQ, whose layers PEFT adapts but does not count among the linear."""
    if getattr(peft_config, "target_modules", None) != "all-linear":
        return peft_config
    modules = {name: module for name, module in model.named_modules() if module is not model.get_output_embeddings()}
    packed = {name for name, module in modules.items() if hasattr(module, "W_q") or hasattr(module, "qweight")}
    if not packed:
        return peft_config
    named: Any = copy.copy(peft_config)
    named.target_modules = packed | {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    return named  # type: ignore[no-any-return]


def check_trainable(model: Any) -> None:
    """Refuse a loaded model whose format cannot be trained where the model is."""
    network = base_network(model)
    config = getattr(network.config, "quantization_config", None)
    if config is None and getattr(network, "hqq_quantized", False):
        config = {"quant_method": "hqq"}
    if not is_quantized(network) or config is None:
        return
    check_format(config, device=network.device, trainable=True, shared=shares_weights())
    quantizer = getattr(network, "hf_quantizer", None)
    if quantizer is not None and not quantizer.is_trainable:
        raise ConfigError(
            f"The student is in {format_of(config)}, which transformers does not train. "
            "Train nf4, fp4, int8, hqq4 or torchao-int8, or only evaluate this one."
        )
