"""What is written beside a saved adapter: where it comes from, and nothing about where its maker keeps things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkd import __version__
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


def remove_local_paths(folder: Path, model: Any) -> None:
    """PEFT writes where the base model was loaded from; of a local folder, only the name is left."""
    base = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not base or not Path(base).is_dir():
        return
    for file in (folder / "adapter_config.json", folder / "README.md"):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(base, Path(base).resolve().name), encoding="utf-8")
