"""The student's arguments, which several commands share: TRL's ModelConfig with our defaults."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, get_peft_config, get_quantization_config

from quantkd.cli.parsing import option
from quantkd.errors import ConfigError, refuse_unused
from quantkd.files import read_object
from quantkd.hardware import parse_dtype
from quantkd.hub.adapters import load_adapter
from quantkd.models.gguf_student import load_student_tokenizer
from quantkd.models.provenance import find_base
from quantkd.models.student import STUDENT_FORMATS, load_student, stored_quantization
from quantkd.names import hide_home, names_gguf, naming
from quantkd.remote import logger as revisions
from quantkd.training.config import QuantizedDistillationConfig
from quantkd.training.preparation import choose_base
from quantkd.transfer_set import TransferSet

_DTYPES = ["auto", "bfloat16", "float16", "float32"]
ADAPTERS = "lora_r lora_alpha lora_dropout lora_target_modules lora_target_parameters lora_modules_to_save "
ADAPTERS += "lora_task_type use_rslora use_dora"
_FOUR_BIT = "bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage"
FORMAT = f"student_format load_in_8bit load_in_4bit {_FOUR_BIT}"


@dataclass
class StudentArguments(ModelConfig):
    """TRL's ModelConfig; by default NF4 with double quantization and LoRA on all linear layers."""

    model_name_or_path: str = option("The teacher's own checkpoint: a Hub name or a folder.")
    dtype: str | None = option("Compute dtype; auto: bfloat16 where native, else float32.", "auto", choices=_DTYPES)
    use_peft: bool = option("Attach LoRA adapters.", True)
    lora_dropout: float = option("LoRA dropout.", 0.0)
    lora_target_modules: list[str] | None = option("LoRA target modules.", ["all-linear"])
    student_format: str | None = option(
        "By default that of the checkpoint if it is quantized, else nf4.", None, choices=list(STUDENT_FORMATS)
    )
    gguf_file: str | None = option("Make this GGUF file the student: a path, or a file of the model's folder.", None)
    load_in_4bit: bool = option("Load the student in 4 bit (bitsandbytes).", True)
    use_bnb_nested_quant: bool = option("Quantize the quantization constants too.", True)
    trust_remote_code: bool = option("Run code from the model's repository.", False)

    def __post_init__(self) -> None:
        asked = "int8" if self.load_in_8bit else self.bnb_4bit_quant_type
        if asked != "nf4" and self.student_format not in (None, asked):
            raise ConfigError(f"student_format is {self.student_format}, and another option says {asked}. Set one.")
        if self.student_format == "int8":
            self.load_in_8bit = True
        elif self.student_format is not None:
            self.load_in_4bit, self.bnb_4bit_quant_type = True, self.student_format
        if self.load_in_8bit:  # 4-bit is the default, so one option is enough to choose 8-bit
            self.load_in_4bit = False
        super().__post_init__()  # type: ignore[no-untyped-call]
        refuse_unused(self, {"load_in_4bit": _FOUR_BIT})

    def refuse(self, names: str = f"use_peft {ADAPTERS}") -> None:
        """Refuse options that have no effect, by default those of adapters, where none are trained."""
        refuse_unused(self, {"": names}, vars(StudentArguments("")))


def student_options(args: StudentArguments, *, is_made: bool = False) -> dict[str, Any]:
    """What `load_student` takes beside the name: a config, None for one that is stored (or `is_made` so), and more."""
    name = args.model_name_or_path
    is_gguf = names_gguf(args.model_name_or_path, args.gguf_file)
    dtype = parse_dtype("float32" if is_gguf and args.dtype == "auto" else args.dtype)  # the file's exact values
    args.dtype = str(dtype).removeprefix("torch.")
    options: dict[str, Any] = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    chosen = args.student_format is not None or args.load_in_8bit
    if is_gguf:
        args.refuse(_FOUR_BIT * (not chosen))
        config = get_quantization_config(args) if chosen else None
        return {"quantization_config": config, "dtype": dtype, "gguf_file": args.gguf_file, **options}
    with naming(name):
        stored = None if chosen else stored_quantization(name, revision=args.model_revision)
    args.refuse(_FOUR_BIT * bool(stored and not is_made))
    if not (chosen or stored or args.load_in_4bit):
        raise ConfigError("The student must be quantized; leave load_in_4bit on, or set student_format.")
    return {"quantization_config": get_quantization_config(args) if stored is None else None, "dtype": dtype, **options}


def _naming(args: StudentArguments) -> Any:
    """`naming`, but for a GGUF file, which needs no config beside it."""
    return nullcontext() if names_gguf(args.model_name_or_path, args.gguf_file) else naming(args.model_name_or_path)


def load_student_from(args: StudentArguments, base: str | Path | None = None) -> PreTrainedModel:
    """The quantized student that the arguments describe, without adapters; `base`: from the checkpoint made of it."""
    if base is not None:
        args = replace(args, model_name_or_path=str(base), model_revision="main")
    options = student_options(args, is_made=base is not None)
    with _naming(args):
        return load_student(args.model_name_or_path, **options)


def load_base_from(
    args: StudentArguments, config: QuantizedDistillationConfig, rows: TransferSet, lora: LoraConfig | None
) -> PreTrainedModel:
    """The same student to be trained, with calibrated codes unless the config leaves them out."""
    with _naming(args):
        base = choose_base(args.model_name_or_path, config, rows, peft_config=lora, **student_options(args))
    return load_student_from(args, None if base == args.model_name_or_path else base)


def load_adapted_from(args: StudentArguments, adapter: Path) -> PeftModel:
    """The student with an adapter, on the checkpoint of the run that trained it if that is beside it."""
    if (base := find_base(adapter, args.model_name_or_path)) is not None:
        revisions.info("Student %s, which is beside the adapter", hide_home(str(base)))
        if args.trust_remote_code and "auto_map" in read_object(base / "config.json"):
            raise ConfigError(
                f"{base}, which is beside the adapter, has code of its own; trust_remote_code is for the model that "
                "is named. If you trust that folder, name it as the model."
            )
        args = replace(args, trust_remote_code=False)
    return load_adapter(load_student_from(args, base), adapter)


def load_tokenizer_from(args: StudentArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint, or else of the GGUF file, that the arguments name."""
    where = {"revision": args.model_revision, "trust_remote_code": args.trust_remote_code}
    return load_student_tokenizer(args.model_name_or_path, gguf_file=args.gguf_file, **where)  # type: ignore[no-any-return]


def peft_config_from(args: StudentArguments) -> LoraConfig:
    """The adapters that the arguments describe."""
    config = get_peft_config(args)
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            "A quantized student trains adapters; leave use_peft on, or train its scales with train_scales."
        )
    return config
