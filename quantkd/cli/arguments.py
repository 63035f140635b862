"""The student's arguments, which several commands share: TRL's ModelConfig with our defaults."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel
from trl import ModelConfig, get_peft_config, get_quantization_config

from quantkd.errors import ConfigError
from quantkd.hardware import parse_dtype
from quantkd.models.student import STUDENT_FORMATS, load_student, stored_quantization
from quantkd.names import naming


@dataclass
class StudentArguments(ModelConfig):
    """TRL's ModelConfig; by default NF4 with double quantization and LoRA on all linear layers."""

    dtype: str | None = field(
        default="auto",
        metadata={
            "help": "Compute dtype of the 4-bit layers; auto is bfloat16 if the hardware supports it, else float32.",
            "choices": ["auto", "bfloat16", "float16", "float32"],
        },
    )
    use_peft: bool = field(default=True, metadata={"help": "Attach LoRA adapters."})
    lora_dropout: float = field(default=0.0, metadata={"help": "LoRA dropout."})
    lora_target_modules: list[str] | None = field(
        default_factory=lambda: ["all-linear"], metadata={"help": "LoRA target modules."}
    )
    student_format: str | None = field(
        default=None,
        metadata={
            "help": "The student's format; by default that of the checkpoint if it is quantized, else nf4.",
            "choices": list(STUDENT_FORMATS),
        },
    )
    load_in_4bit: bool = field(default=True, metadata={"help": "Load the student in 4 bit (bitsandbytes)."})
    use_bnb_nested_quant: bool = field(default=True, metadata={"help": "Quantize the quantization constants too."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code from the model's repository."})

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.student_format not in (None, "int8"):
            raise ConfigError(
                f"load_in_8bit means int8, and student_format is {self.student_format}. Set one of the two."
            )
        if self.student_format == "int8":
            self.load_in_8bit = True
        elif self.student_format is not None:
            self.load_in_4bit, self.bnb_4bit_quant_type = True, self.student_format
        if self.load_in_8bit:  # 4-bit is the default, so one option is enough to choose 8-bit
            self.load_in_4bit = False
        super().__post_init__()  # type: ignore[no-untyped-call]


def load_student_from(args: StudentArguments) -> PreTrainedModel:
    """The quantized student that the arguments describe, without adapters."""
    if not args.model_name_or_path:
        raise ConfigError("Which model? Give --model_name_or_path, the teacher's own checkpoint.")
    dtype = parse_dtype(args.dtype)
    args.dtype = str(dtype).removeprefix("torch.")
    kwargs: dict[str, Any] = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    if args.attn_implementation:
        kwargs["attn_implementation"] = args.attn_implementation
    with naming(args.model_name_or_path):
        return load_student(
            args.model_name_or_path,
            quantization_config=_quantization_from(args, args.model_name_or_path),
            dtype=dtype,
            **kwargs,
        )


def _quantization_from(args: StudentArguments, name: str) -> Any:
    """A config, or None for a checkpoint that is loaded as it is stored."""
    if args.student_format is None and not args.load_in_8bit:
        if stored_quantization(name, revision=args.model_revision) is not None:
            return None
        if not args.load_in_4bit:
            raise ConfigError("The student must be quantized; leave load_in_4bit on, or set student_format.")
    return get_quantization_config(args)


def peft_config_from(args: StudentArguments) -> LoraConfig:
    """The adapters that the arguments describe."""
    config = get_peft_config(args)
    if not isinstance(config, LoraConfig):
        raise ConfigError("A quantized student trains adapters; leave use_peft on.")
    return config
