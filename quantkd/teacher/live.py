"""LiveTeacher: a full-precision teacher that runs beside the student, for those who have the memory."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from quantkd.errors import ConfigError
from quantkd.foreign import is_zero3
from quantkd.hardware import default_device, parse_dtype
from quantkd.loss.fused import DenseTeacher
from quantkd.loss.reference import select_targets
from quantkd.models.network import find_head, hidden_states_as_logits, why_not_fusable
from quantkd.models.student import is_quantized
from quantkd.models.weights import count_rows
from quantkd.transfer_set.topk import TopKLogprobs

logger = logging.getLogger(__name__)


class LiveTeacher:
    """The teacher's distributions over the whole vocabulary, computed for each batch.

    Args:
        model: a Hub name or checkpoint folder, loaded in bfloat16 where the hardware has it, else float32; or a model.
        student: whose vocabulary it must have.
        temperatures: for a teacher whose logits must be held, the temperatures to normalise them at.
        **model_init_kwargs: passed to `from_pretrained`. `trust_remote_code` stays off unless it is given here.

    Raises:
        ConfigError: "adapter_disabled", a quantized teacher, one of another vocabulary, or DeepSpeed ZeRO-3.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        student: Any,
        temperatures: tuple[float, ...] = (1.0,),
        **model_init_kwargs: Any,
    ) -> None:
        if isinstance(model, str) and model == "adapter_disabled":
            raise ConfigError(
                "teacher_model='adapter_disabled' would make the student without its adapters the teacher. With a "
                "quantized student that is the 4-bit model itself, whose errors shall be mended, not the 16-bit one. "
                "Give the name of the full-precision model, or train on a transfer set."
            )
        if is_zero3():
            raise ConfigError(
                "teacher_model cannot run beside a student under DeepSpeed ZeRO-3, which would partition the teacher "
                "too. Train on a transfer set, or under DDP, FSDP2 or ZeRO-2."
            )
        if isinstance(model, str):
            kwargs = {"device_map": {"": default_device()}, "trust_remote_code": False, **model_init_kwargs}
            kwargs["dtype"] = parse_dtype(kwargs.get("dtype"))
            model = AutoModelForCausalLM.from_pretrained(model, **kwargs)
        if is_quantized(model):
            raise ConfigError(
                "The teacher_model is quantized, so its errors would be taught. Load it in 16 or 32 bits, or train on "
                "a transfer set that the full-precision model wrote."
            )
        width, own = (count_rows(each.get_output_embeddings().weight) for each in (student, model))
        if width != own:
            raise ConfigError(
                f"The student's vocabulary has {width} ids, the teacher_model's {own}. "
                "Distil into a student of the same vocabulary, or capture a transfer set: it leaves a head's padding "
                "out, and so fits every student of the tokenizer."
            )
        self.model = model.eval().requires_grad_(False)
        self.temperatures = tuple(dict.fromkeys((1.0, *temperatures)))
        reason = why_not_fusable(model)
        if reason is not None:
            logger.warning("The teacher's logits are held, for %s.", reason)
        self._passes_hidden_states = reason is None

    def distributions(
        self, inputs: dict[str, Any], labels: Tensor, device: torch.device
    ) -> DenseTeacher | TopKLogprobs:
        """The teacher's distributions at the N targets of a batch.

        Shapes: labels (B, T).
        """
        own = self.model.get_input_embeddings().weight.device
        moved = {key: value.to(own) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        with torch.no_grad(), hidden_states_as_logits(self.model) if self._passes_hidden_states else nullcontext():
            hidden, _ = select_targets(self.model(**moved).logits, labels.to(own))
        if not self._passes_hidden_states:
            return TopKLogprobs.from_dense(hidden, self.temperatures).to(device)
        head = find_head(self.model)
        bias = None if head.bias is None else head.bias.to(device)
        return DenseTeacher(hidden.to(device), replace(head, weight=head.weight.to(device), bias=bias))
