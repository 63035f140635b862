"""A full-precision teacher that runs beside the student instead of a transfer set."""

from __future__ import annotations

import logging
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkd.errors import ConfigError
from quantkd.foreign import is_zero3
from quantkd.hardware import default_device, parse_dtype
from quantkd.models.network import Runner
from quantkd.models.student import is_quantized
from quantkd.models.weights import head_width
from quantkd.names import naming, refuse_adapter

logger = logging.getLogger(__name__)


def load_live_teacher(model: str | PreTrainedModel, student: Any, **model_init_kwargs: Any) -> Runner:
    """A teacher whose distributions over the whole vocabulary, that of the `student`, are computed for each batch."""
    if isinstance(model, str) and model == "adapter_disabled":
        raise ConfigError(
            "teacher_model='adapter_disabled' would make the student without its adapters the teacher. With a "
            "quantized student that is the 4-bit model itself, whose errors should be corrected. "
            "Give the name of the full-precision model, or train on a transfer set."
        )
    if is_zero3():
        raise ConfigError(
            "teacher_model cannot run beside a student under DeepSpeed ZeRO-3, which would partition the teacher "
            "as well. Train on a transfer set, or under DDP, FSDP2 or ZeRO-2."
        )
    if isinstance(model, str):
        kwargs = {"device_map": {"": default_device()}, "trust_remote_code": False, **model_init_kwargs}
        kwargs["dtype"] = parse_dtype(kwargs.get("dtype"))
        with naming(model):
            refuse_adapter(model, **model_init_kwargs)
            model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
    if is_quantized(model):
        raise ConfigError(
            "The teacher_model is quantized, so its errors would be taught. Load it in 16 or 32 bits, or train on "
            "a transfer set that the full-precision model wrote."
        )
    runner = Runner(model)
    width, own = head_width(student), runner.width
    if width != own:
        raise ConfigError(
            f"The student's vocabulary has {width} ids, the teacher_model's {own}. Use a student of the same "
            "vocabulary, or capture a transfer set: without the padding of a head it fits every student of the "
            "tokenizer."
        )
    model.eval().requires_grad_(False)
    if runner.why_not_fused is not None:
        logger.warning("The teacher's logits are held, for %s.", runner.why_not_fused)
    return runner
