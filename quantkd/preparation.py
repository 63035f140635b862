"""From what the caller names to a student that is ready to train: loaded, with adapters, and well started."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from quantkd.compatibility import check_student
from quantkd.config import QuantizedDistillationConfig
from quantkd.cpu_packing import keep_trainable_on_cpu
from quantkd.errors import ConfigError
from quantkd.initialization import initialize_from_rows
from quantkd.packing import why_not_packable
from quantkd.row_attention import use_row_attention
from quantkd.student import attach_lora, is_quantized, load_student
from quantkd.transfer_set import TransferSet

__all__ = ["prepare_student"]


def prepare_student(
    model: str | PreTrainedModel | PeftModel,
    args: QuantizedDistillationConfig,
    transfer_sets: list[TransferSet],
    *,
    train_dataset: Any | None = None,
    peft_config: PeftConfig | None = None,
    quantization_config: Any | None = None,
) -> PreTrainedModel | PeftModel:
    """The student that the trainer trains.

    Args:
        model: a name, loaded quantized; or a loaded model, taken as it is.
        args: the training arguments.
        transfer_sets: what it must fit.
        train_dataset: whose rows a covariance start looks at, if it can be indexed.
        peft_config: adapters to attach; the default ones on a quantized model if None.
        quantization_config: for a model given by name.

    Raises:
        ConfigError: arguments that do not fit each other, or a model that cannot be packed.
        DataError: rows longer than the student's context.
    """
    init_kwargs = dict(model_init_kwargs(args))
    name = model if isinstance(model, str) else model.config._name_or_path
    if isinstance(model, str):
        if args.packing and is_flash_attn_2_available():
            init_kwargs.setdefault("attn_implementation", "flash_attention_2")  # packed rows without a mask
        model = load_student(model, quantization_config=quantization_config, **init_kwargs)
    elif quantization_config is not None:
        raise ConfigError(
            "quantization_config applies to a model given by name; a loaded model is taken as it is. "
            "Pass the name, or load the model quantized and leave quantization_config out."
        )
    adapted = _with_adapters(model, peft_config, args)
    is_new = adapted is not model
    keep_trainable_on_cpu(adapted)
    for transfer_set in transfer_sets:
        check_student(transfer_set, adapted)
    if args.packing:
        use_row_attention(adapted)
    reason = why_not_packable(adapted) if args.packing else None
    if reason is not None:
        raise ConfigError(
            f"packing=True would let rows see each other: {reason}. Leave packing off; rows of like length still "
            "share a batch with train_sampling_strategy='group_by_length'."
        )
    if is_new and args.init == "covariance" and _can_be_indexed(train_dataset) and is_quantized(adapted):
        revision = init_kwargs.get("revision")
        initialize_from_rows(adapted, train_dataset, name, revision=revision, rows=args.init_rows, seed=args.seed)
    return adapted


def model_init_kwargs(args: QuantizedDistillationConfig) -> dict[str, Any]:
    """The further arguments of `from_pretrained`, parsed.

    Args:
        args: the training arguments.
    """
    assert not isinstance(args.model_init_kwargs, str)  # TrainingArguments has parsed it
    return args.model_init_kwargs or {}


def _can_be_indexed(dataset: Any) -> bool:
    return hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")


def _with_adapters(
    model: PreTrainedModel | PeftModel, peft_config: PeftConfig | None, args: QuantizedDistillationConfig
) -> PreTrainedModel | PeftModel:
    if isinstance(model, PeftModel):
        if peft_config is not None:
            raise ConfigError(
                "The model already carries adapters and peft_config asks for new ones. "
                "Leave peft_config out to train those there, or merge_and_unload() them first."
            )
        return model
    if peft_config is None and not is_quantized(model):
        return model  # a full-precision model that the caller chose to train whole
    kwargs = args.gradient_checkpointing_kwargs
    assert not isinstance(kwargs, str)  # TrainingArguments has parsed it
    torch.manual_seed(args.seed)
    return attach_lora(
        model,
        peft_config,
        gradient_checkpointing=bool(args.gradient_checkpointing),
        gradient_checkpointing_kwargs=kwargs,
    )
