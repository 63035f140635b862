"""The student: the teacher's own model in NF4, with LoRA on every linear layer."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from quantkd.cpu_packing import keep_trainable_on_cpu
from quantkd.errors import ConfigError
from quantkd.hardware import default_device, native_compute_dtype, parse_dtype
from quantkd.head import base_network

__all__ = [
    "attach_lora",
    "default_lora_config",
    "default_quantization_config",
    "is_quantized",
    "load_student",
    "shard_dtype",
    "shares_weights",
]


def default_lora_config(r: int = 16) -> LoraConfig:
    """LoRA of rank `r` on all linear layers but the head, scaled by 2 (`lora_alpha = 2 * r`), without dropout."""
    return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def default_quantization_config(compute_dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314).

    Args:
        compute_dtype: what the dequantized weights are multiplied in; after the hardware if None.

    Under FSDP or ZeRO-3 the packed weights lie in tensors of `shard_dtype`, so that they can be sharded.
    """
    compute_dtype = compute_dtype or native_compute_dtype()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_quant_storage=shard_dtype(compute_dtype) if shares_weights() else torch.uint8,
    )


def shares_weights() -> bool:
    """Whether the launcher shares the weights out over the processes: FSDP, or DeepSpeed ZeRO-3."""
    return bool(parse_flag_from_env("ACCELERATE_USE_FSDP") or is_deepspeed_zero3_enabled())


def shard_dtype(compute_dtype: torch.dtype) -> torch.dtype:
    """What packed 4-bit weights must be stored in where they are sharded: the dtype of the parameters beside them.

    FSDP shards floating parameters alone, and mixed precision casts them when it gathers them. Packed bits survive
    that only where the cast is to the dtype that they are in already.

    Args:
        compute_dtype: the dtype of the unquantized layers, which holds where the launcher asks for no mixed precision.
    """
    mixed = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mixed, compute_dtype)


def is_quantized(model: Any) -> bool:
    """Whether transformers loaded the model quantized, with or without adapters around it.

    Args:
        model: a model of transformers or PEFT.
    """
    network = base_network(model)
    return bool(getattr(network, "is_quantized", False))


def load_student(
    name_or_path: str,
    *,
    quantization_config: Any | None = None,
    dtype: str | torch.dtype | None = None,
    **model_init_kwargs: Any,
) -> PreTrainedModel:
    """Load a causal language model quantized, on this process's own device.

    Args:
        name_or_path: a Hub name or a checkpoint folder in full precision.
        quantization_config: any quantization config of transformers; NF4 with double quantization if None.
        dtype: dtype of the layers that stay unquantized, and of NF4's multiplications; bfloat16 where the hardware
            has it, else float32, if None or "auto".
        **model_init_kwargs: passed to `from_pretrained`. `trust_remote_code` stays off unless it is given here.

    Returns:
        The model, without adapters, in evaluation mode. Under FSDP or ZeRO-3 the wrapper places it.

    Raises:
        ConfigError: 4-bit weights stored in another floating dtype than FSDP gathers in.
    """
    compute_dtype = parse_dtype(dtype)
    kwargs: dict[str, Any] = {
        "dtype": compute_dtype,
        "trust_remote_code": False,
        "quantization_config": quantization_config or default_quantization_config(compute_dtype),
        **model_init_kwargs,
    }
    if shares_weights():
        _check_storage(kwargs["quantization_config"], shard_dtype(compute_dtype))
    else:
        kwargs.setdefault("device_map", {"": default_device()})
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    keep_trainable_on_cpu(model)
    return model


def _check_storage(quantization_config: Any, expected: torch.dtype) -> None:
    storage = getattr(quantization_config, "bnb_4bit_quant_storage", None)
    if storage is not None and storage.is_floating_point and storage != expected:
        raise ConfigError(
            f"bnb_4bit_quant_storage is {storage}, and the sharded parameters are gathered in {expected}: the cast "
            f"would destroy the packed weights. Set bnb_4bit_quant_storage={expected}, or leave it out."
        )


def attach_lora(
    model: PreTrainedModel,
    peft_config: PeftConfig | None = None,
    *,
    gradient_checkpointing: bool = False,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
) -> PeftModel:
    """Freeze the model and attach trainable adapters.

    A quantized model first goes through PEFT's `prepare_model_for_kbit_training`, which keeps norms, embeddings and
    head in float32.

    Args:
        model: a model without adapters.
        peft_config: any PEFT config; `default_lora_config()` if None.
        gradient_checkpointing: recompute activations in the backward pass.
        gradient_checkpointing_kwargs: passed on; not reentrant unless it says otherwise.
    """
    if is_quantized(model):
        model = prepare_model_for_kbit_training(
            model,
            use_gradient_checkpointing=gradient_checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": False, **(gradient_checkpointing_kwargs or {})},
        )
    return get_peft_model(model, peft_config or default_lora_config())
