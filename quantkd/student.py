"""The student: the teacher's own model in NF4, with LoRA on every linear layer."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from quantkd.cpu_packing import keep_trainable_on_cpu
from quantkd.hardware import default_device, native_compute_dtype, parse_dtype

__all__ = ["attach_lora", "default_lora_config", "default_quantization_config", "is_quantized", "load_student"]


def default_lora_config(r: int = 16) -> LoraConfig:
    """LoRA of rank `r` on all linear layers but the head, scaled by 2 (`lora_alpha = 2 * r`), without dropout."""
    return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def default_quantization_config(compute_dtype: torch.dtype | None = None) -> BitsAndBytesConfig:
    """NF4 with double quantization (Dettmers et al. 2023, arXiv:2305.14314).

    Args:
        compute_dtype: what the dequantized weights are multiplied in; after the hardware if None.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype or native_compute_dtype(),
    )


def is_quantized(model: Any) -> bool:
    """Whether transformers loaded the model quantized, with or without adapters around it.

    Args:
        model: a model of transformers or PEFT.
    """
    network = model.get_base_model() if hasattr(model, "get_base_model") else model
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
        The model, without adapters, in evaluation mode.
    """
    compute_dtype = parse_dtype(dtype)
    kwargs: dict[str, Any] = {
        "dtype": compute_dtype,
        "device_map": {"": default_device()},
        "trust_remote_code": False,
        "quantization_config": quantization_config or default_quantization_config(compute_dtype),
        **model_init_kwargs,
    }
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    keep_trainable_on_cpu(model)
    return model


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
