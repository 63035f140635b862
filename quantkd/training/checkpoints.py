"""The checkpoint that training resumes from: the one that is named, or the last complete one of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers.trainer import TRAINER_STATE_NAME

from quantkd.errors import ConfigError
from quantkd.files import read_object
from quantkd.models.adapter_files import SCALES_NAME, check_adapter
from quantkd.models.network import base_network
from quantkd.models.provenance import Provenance
from quantkd.models.scales import scaled_layers

# What decides an adapter's shape and scale.
_ADAPTER_FIELDS = (
    "r", "lora_alpha", "target_modules", "modules_to_save", "bias", "use_dora", "use_rslora", "rank_pattern",
    "alpha_pattern",
)  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for, checked before anything is loaded."""
    asked = str(resume_from_checkpoint)
    if resume_from_checkpoint is None or asked.lower() == "false":
        return None
    folder = Path(output_dir)
    found = [(int(name[1]), entry) for entry in folder.glob("*") if (name := _CHECKPOINT.fullmatch(entry.name))]
    whole = [entry for _, entry in sorted(found) if _is_whole(entry)]
    if asked.lower() != "true":
        if _is_whole(Path(asked)):
            return asked
        there = ", ".join(entry.name for entry in whole[-8:]) or "none"
        raise ConfigError(
            f"resume_from_checkpoint is {asked}, which {'is not a complete' if Path(asked).exists() else 'is no'} "
            f"checkpoint; expected true, or one of those in {folder}: {there}."
        )
    if not whole:
        raise ConfigError(
            f"{folder} holds no checkpoint to resume from; one is written every save_steps steps. Leave "
            "resume_from_checkpoint out to start anew."
        )
    return str(whole[-1])


def check_resumable(checkpoint: str, model: Any) -> None:
    """Refuse a checkpoint without the state that training goes on from, or with other adapters than the model's."""
    folder = Path(checkpoint)
    # DeepSpeed and FSDP write folders; all three are left out by `save_only_model`.
    states = {"optimizer": ["optimizer*", "global_step*"], "scheduler": ["scheduler*", "global_step*"]}
    states["random numbers"] = ["rng_state*"]
    if lacking := [name for name, files in states.items() if not any([*folder.glob(file)] for file in files)]:
        raise ConfigError(
            f"{folder} lacks the state of {', '.join(lacking)}, so training would not go on where it stopped. Name a "
            "checkpoint that was saved without save_only_model, or leave resume_from_checkpoint out."
        )
    found, expected = (folder / SCALES_NAME).is_file(), bool(scaled_layers(model))
    if found != expected:
        raise ConfigError(
            f"train_scales was {'on' if found else 'off'} in the run of {folder}, and is {'on' if expected else 'off'} "
            f"now. Resume with train_scales={found}, or leave resume_from_checkpoint out."
        )
    if expected:  # the factors belong to the constants that they multiply
        Provenance.read(folder).check_weights(model, checkpoint)
    if not isinstance(model, PeftModel) or not (folder / "adapter_config.json").is_file():
        return
    check_adapter(folder, base_network(model).config.name_or_path or "")
    Provenance.read(folder).check_weights(model, checkpoint)
    stored, own = read_object(folder / "adapter_config.json"), model.peft_config[model.active_adapter].to_dict()
    for name in _ADAPTER_FIELDS:
        found, expected = (_plain(each.get(name)) for each in (stored, own))
        if found != expected:
            raise ConfigError(
                f"The adapters of {folder} have {name} {found!r:.200}, the student's {expected!r:.200}. Resume with "
                "the arguments of the run, or leave resume_from_checkpoint out."
            )


def _plain(value: Any) -> Any:
    """A setting of PEFT as JSON has it, in one order; nothing is None."""
    return (sorted(value) if isinstance(value, (set, list)) else value) or None


def _is_whole(checkpoint: Path) -> bool:
    """Whether the file that the Trainer writes last is there and can be read."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return True
