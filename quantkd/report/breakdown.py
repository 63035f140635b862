"""KL by position in the answer and by the teacher's entropy: read from an arm, checked, and with intervals."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from quantkd.errors import DataError
from quantkd.evaluation.bootstrap import BootstrapSettings, bootstrap_interval
from quantkd.evaluation.row_statistics import RowSums, compute_value

_TITLES = {
    "position": ("KL by position in the answer", "Token"),
    "entropy": ("KL by the teacher's entropy", "Entropy (nats)"),
}
_COLUMNS = {
    "position": ("tokens", "kl_sum"),
    "entropy": ("tokens", "kl_sum"),
    "confidence": ("tokens", "confidence_sum", "correct"),
    "dense_position": ("tokens", "kl_sum"),
    "dense_entropy": ("tokens", "kl_sum"),
}


def read_bins(path: Path, bins: Any, tokens: list[float]) -> dict[str, dict[str, Any]]:
    """The sums by bin of an arm's file."""
    if not isinstance(bins, Mapping):
        raise DataError(f"{path}, fidelity: expected bins by name, found {bins!r:.60}. Evaluate this arm again.")
    found: dict[str, dict[str, Any]] = {}
    for kind, keys in _COLUMNS.items():
        if kind not in bins:
            continue
        try:
            edges = [float(edge) for edge in bins[kind]["edges"]]
            columns = {key: np.asarray(bins[kind][key], dtype=np.float64) for key in keys}
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{path}, fidelity by {kind}: expected edges and {', '.join(keys)}, each a list of numbers a row, "
                f"found {bins[kind]!r:.120} ({error!r}). Evaluate this arm again."
            ) from error
        shape = (len(tokens), len(edges))
        if any(column.shape != shape or not np.isfinite(column).all() for column in columns.values()):
            shapes = {key: column.shape for key, column in columns.items()}
            raise DataError(
                f"{path}, fidelity by {kind}: expected finite sums of shape {shape}, found {shapes}. "
                "Evaluate this arm again."
            )
        if (columns["tokens"] < 0).any() or columns["tokens"].sum(1).tolist() != tokens:
            raise DataError(
                f"{path}, fidelity by {kind}: the bins' tokens are not those of the rows. Evaluate this arm again."
            )
        found[kind] = {"edges": edges, **columns}
    return found


def describe_bins(bins: Mapping[str, Any], settings: BootstrapSettings) -> list[dict[str, Any]]:
    """KL per token in each bin."""
    edges = bins["edges"]
    described = []
    for place, (start, stop) in enumerate(zip(edges, [*edges[1:], None], strict=True)):
        tokens, sums = bins["tokens"][:, place], bins["kl_sum"][:, place]
        value: float | None = None
        interval: list[float] | None = None
        if tokens.sum():
            held = tokens > 0  # or a draw could hold no token of this bin at all
            statistic = RowSums(sums[held], tokens[held])
            value = compute_value(statistic)
            interval = list(bootstrap_interval(statistic, settings)) if held.sum() > 1 else None
        described.append({"from": start, "to": stop, "tokens": int(tokens.sum()), "value": value, "interval": interval})
    return described


def tabulate_breakdown(results: Mapping[str, Any], kind: str) -> dict[str, Any] | None:
    """KL by one kind of bin, arm beside arm: over the whole vocabulary if every arm has that, else over the entries."""
    arms = {name: arm for name, arm in results["arms"].items() if name != "teacher"}
    key = f"dense_kl_by_{kind}"
    dense = all(key in arm for arm in arms.values())
    key = key if dense else f"kl_by_{kind}"
    arms = {name: arm[key] for name, arm in arms.items() if key in arm}
    if not arms:
        return None
    first = next(iter(arms.values()))
    title, label = _TITLES[kind]
    return {
        "title": title + (", whole vocabulary" if dense else ""),
        "label": label,
        "arms": list(arms),
        "bins": [
            {
                "name": name_bin(found, whole=kind == "position"),
                "tokens": found["tokens"],
                "arms": {name: bins[place] for name, bins in arms.items()},
            }
            for place, found in enumerate(first)
            if found["tokens"]
        ],
    }


def name_bin(found: Mapping[str, Any], *, whole: bool) -> str:
    """A bin in words, such as "9 to 16" of tokens counted from 1, or "0.1 to 0.3" of nats."""
    start, stop = found["from"], found["to"]
    if whole:
        return f"{int(start) + 1} and on" if stop is None else f"{int(start) + 1} to {int(stop)}"
    return f"{start:g} and above" if stop is None else f"{start:g} to {stop:g}"
