"""Figures that take minutes, kept by what they depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quantkd.files import write_file

__all__ = ["keep_figures"]


def keep_figures(
    cache: str | Path, name: str, settings: dict[str, Any], measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """An arm's figures from the cache; measured, and kept there, if these settings are new."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
    path = Path(cache) / "arms" / f"{name}-{digest}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(measure()).encode())
    found: dict[str, Any] = json.loads(path.read_text())
    return found
