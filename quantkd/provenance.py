"""What is written beside a saved adapter: where it comes from, and nothing about where its maker keeps things."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from quantkd import __version__
from quantkd.transfer_set import TransferSet

__all__ = ["remove_local_paths", "write_provenance"]


def write_provenance(folder: Path, transfer_set: TransferSet | None, objective: dict[str, Any]) -> None:
    """Write `quantkd.json`: version, the transfer set's digest, its teacher, and the objective.

    Args:
        folder: the adapter's folder.
        transfer_set: what was learned from, if it was one.
        objective: alpha, temperature, divergence and beta.
    """
    facts = {
        "quantkd_version": __version__,
        "transfer_set_digest": None if transfer_set is None else transfer_set.digest,
        "teacher": None if transfer_set is None else transfer_set.info.teacher_name,
        "objective": objective,
    }
    text = json.dumps(facts, indent=2, sort_keys=True) + "\n"
    (folder / "quantkd.json").write_text(text, encoding="utf-8")


def remove_local_paths(folder: Path, model: Any) -> None:
    """PEFT writes where the base model was loaded from; of a local folder, only the name is left.

    Args:
        folder: the adapter's folder.
        model: the model that was saved.
    """
    base = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    if not base or not Path(base).is_dir():
        return
    for file in (folder / "adapter_config.json", folder / "README.md"):
        if file.is_file():
            text = file.read_text(encoding="utf-8")
            file.write_text(text.replace(base, Path(base).resolve().name), encoding="utf-8")
