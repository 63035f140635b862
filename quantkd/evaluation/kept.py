"""What was measured of a model before: it holds as long as the model, the data and the settings are the same."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list

from quantkd import __version__
from quantkd.evaluation.records import compute_model_fingerprint
from quantkd.hardware import process_state
from quantkd.models.network import base_network

# Parts of an arm's file that say what the model scored, and on what; a part that is not asked for this time stays.
_PARTS = ("transfer_set_digest", "fidelity", "accuracy", "items", "tasks")


class KeptArm:
    """An arm's file from an earlier evaluation, as far as it is about the model at hand.

    Args:
        path: the arm's JSON file; it may be missing.
        model: the model that is measured now, as it was loaded.
        force: begin anew whatever there is.
        share: all processes of the launcher make this call; they go by what the main process finds.
    """

    def __init__(self, path: Path, model: Any, *, force: bool = False, share: bool = False) -> None:
        self.fingerprint = compute_arm_fingerprint(model)
        found = [{} if force else _read(path, self.fingerprint)]
        if share and process_state().num_processes > 1:
            broadcast_object_list(found)
        self.parts = {part: found[0][part] for part in _PARTS if part in found[0]}
        self.measured: dict[str, Any] = {"fidelity": None, **found[0].get("measured", {})}
        self.measured["model"] = self.fingerprint

    def fidelity(self, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures that are kept, if they were measured so; else they are measured now."""
        settings = {**settings, "quantkd_version": __version__}
        if self.measured["fidelity"] != settings or "fidelity" not in self.parts:
            self.parts["fidelity"] = measure()
            self.measured["fidelity"] = settings
        return dict(self.parts["fidelity"])


def compute_arm_fingerprint(model: Any) -> str:
    """A digest of what decides a model's figures: samples of its weights, its adapters, its format and its dtype."""
    config = base_network(model).config
    quantization: Any = getattr(config, "quantization_config", None)
    facts = quantization.to_dict() if hasattr(quantization, "to_dict") else quantization
    described = json.dumps([facts, str(getattr(config, "dtype", None))], sort_keys=True, default=str)
    return hashlib.sha256((compute_model_fingerprint(model) + described).encode()).hexdigest()[:16]


def discard_stale_arm(folder: Path, arm: str, model: Any) -> None:
    """Remove an arm's figures and records if they are another model's, such as an adapter trained before."""
    if not _read(folder / f"{arm}.json", compute_arm_fingerprint(model)):
        discard_arm(folder, arm)


def discard_arm(folder: Path, arm: str) -> None:
    """Remove an arm's figures and records."""
    (folder / f"{arm}.json").unlink(missing_ok=True)
    # Not `arm-*-shot`: that is a file of the arm "arm-2" as well.
    own = re.compile(rf"{re.escape(arm)}-(\d+-shot|prompts)\.jsonl(\.settings\.json|\.tmp)?")
    for records in folder.glob(f"{arm}-*.jsonl*"):
        if own.fullmatch(records.name):
            records.unlink()
    if (folder / "lm-eval" / arm).is_dir():
        shutil.rmtree(folder / "lm-eval" / arm)


def _read(path: Path, fingerprint: str) -> dict[str, Any]:
    """The file's content if it is about the model with this fingerprint; nothing of a file that is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return {}  # measured anew, which mends a damaged file
    measured = content.get("measured") if isinstance(content, dict) else None
    return content if isinstance(measured, dict) and measured.get("model") == fingerprint else {}
