"""The checkpoint that training resumes from: the one that is named, or the last complete one of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from transformers.trainer import TRAINER_STATE_NAME

from quantkd.errors import ConfigError

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_checkpoint(resume_from_checkpoint: str | bool | None, output_dir: str | Path) -> str | None:
    """The checkpoint that `resume_from_checkpoint` asks for, checked before anything is loaded."""
    asked = str(resume_from_checkpoint)
    if resume_from_checkpoint is None or asked.lower() == "false":
        return None
    folder = Path(output_dir)
    if asked.lower() != "true":
        if _is_whole(Path(asked)):
            return asked
        raise ConfigError(
            f"resume_from_checkpoint is {asked}, which is not a complete checkpoint; expected true, or a folder such "
            f"as {folder / 'checkpoint-500'}."
        )
    entries = folder.iterdir() if folder.is_dir() else ()
    found = {int(name[1]): entry for entry in entries if (name := _CHECKPOINT.fullmatch(entry.name)) is not None}
    whole = [step for step, entry in found.items() if _is_whole(entry)]
    if not whole:
        raise ConfigError(
            f"{folder} holds no checkpoint to resume from; one is written every save_steps steps. Leave "
            "resume_from_checkpoint out to start anew."
        )
    return str(found[max(whole)])


def _is_whole(checkpoint: Path) -> bool:
    """Whether the file that the Trainer writes last is there and can be read."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
