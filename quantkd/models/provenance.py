"""What is written beside a saved adapter: where it comes from, and nothing about where its maker keeps things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkd import __version__
from quantkd.files import write_file
from quantkd.names import public_name
from quantkd.transfer_set import TransferSet

# Named one by one: the arguments of a Trainer also hold folders, tokens and whatever a caller passes on.
_TRAINING_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "bf16",
    "fp16",
    "packing",
    "init",
    "init_rows",
)
_QUANTIZATION_SETTINGS = (
    "quant_method",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
    "nbits",
    "bits",
    "group_size",
)


def write_provenance(
    folder: Path,
    transfer_set: TransferSet | None,
    objective: dict[str, Any],
    training: dict[str, Any] | None = None,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Write `quantkd.json`: version, the transfer set's digest, its teacher, the objective, and how it was trained."""
    # Of a set on the Hub its repository and commit; where a folder lies is its owner's business.
    remote = [] if transfer_set is None else [str(source) for source in transfer_set.sources if source.is_remote]
    facts = {
        "quantkd_version": __version__,
        "transfer_set": ", ".join(dict.fromkeys(remote)) or None,
        "transfer_set_digest": None if transfer_set is None else transfer_set.digest,
        "teacher": None if transfer_set is None else transfer_set.info.teacher_name,
        "objective": objective,
        "training": training,
        "quantization": quantization,
    }
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    (folder / "quantkd.json").write_text(text, encoding="utf-8")


def describe_training(args: Any, num_processes: int) -> dict[str, Any]:
    """The training arguments that decide what is learned."""
    values = {name: getattr(args, name, None) for name in _TRAINING_ARGUMENTS}
    plain = {name: getattr(value, "value", value) for name, value in values.items()}
    return {**{name: value for name, value in plain.items() if value is not None}, "num_processes": num_processes}


def describe_quantization(model: Any) -> dict[str, Any] | None:
    """How the student's base model is quantized."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    if config is None:
        return None
    settings = config if isinstance(config, dict) else config.to_dict()
    found = {name: settings[name] for name in _QUANTIZATION_SETTINGS if settings.get(name) not in (None, False)}
    return {name: value if isinstance(value, str) else getattr(value, "value", value) for name, value in found.items()}


def name_base_model(folder: Path, base: str | None = None) -> None:
    """Name the base model in an adapter's files as `base`, or as PEFT wrote it; of a local folder the name alone."""
    file, card = folder / "adapter_config.json", folder / "README.md"
    if not file.is_file():
        return
    config = json.loads(file.read_text(encoding="utf-8"))
    written = config.get("base_model_name_or_path") or ""
    config["base_model_name_or_path"] = public_name(base or written)
    write_file(file, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if card.is_file() and public_name(written) != written:
        text = card.read_text(encoding="utf-8")
        write_file(card, text.replace(written, public_name(written)))
