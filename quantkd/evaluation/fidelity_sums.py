"""What fidelity keeps of each held-out row: sums, and sums by bin, so that any mean and interval over rows follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkd.evaluation.bins import CONFIDENCE_BINS, ENTROPY_EDGES, POSITION_EDGES, RowBins, bin_confidence, bin_values
from quantkd.evaluation.row_statistics import MAX_EXPONENT, CalibrationSums, compute_value
from quantkd.transfer_set import IGNORE_INDEX

_ROW_KEYS = ("tokens", "kl_sum", "reverse_kl_sum", "ce_sum", "agree")
_DENSE_ROW_KEYS = ("dense_kl_sum", "dense_reverse_kl_sum", "dense_agree")
_COUNTS = ("tokens", "agree", "dense_agree", "correct")
# What is summed in each bin of what, and how many bins there are.
_BINNED = {
    "position": (("tokens", "kl_sum"), len(POSITION_EDGES)),
    "entropy": (("tokens", "kl_sum"), len(ENTROPY_EDGES)),
    "confidence": (("tokens", "confidence_sum", "correct"), CONFIDENCE_BINS),
}
_DENSE_BINNED = {
    "dense_position": (("tokens", "kl_sum"), len(POSITION_EDGES)),
    "dense_entropy": (("tokens", "kl_sum"), len(ENTROPY_EDGES)),
}
_EDGES = {
    "position": POSITION_EDGES,
    "entropy": ENTROPY_EDGES,
    "confidence": tuple(round(place / CONFIDENCE_BINS, 6) for place in range(CONFIDENCE_BINS)),
    "dense_position": POSITION_EDGES,
    "dense_entropy": ENTROPY_EDGES,
}
# Enough for sums of float32 terms, and a third of the file.
_SIGNIFICANT_DIGITS = 9


@dataclass(frozen=True)
class Fidelity:
    """Sums per held-out row, so that means and intervals over rows follow.

    Args:
        rows: (R, C) float64 in the set's order; `column` names the columns.
        dense: whether the figures over the whole vocabulary are among them.
    """

    rows: Tensor
    dense: bool

    @classmethod
    def zeros(cls, num_rows: int, dense: bool) -> Fidelity:
        """No sums yet."""
        width = sum(width for _, width in _list_columns(dense))
        return cls(torch.zeros(num_rows, width, dtype=torch.float64), dense)

    def place(self, indices: Sequence[int], sums: Mapping[str, Tensor]) -> None:
        """Fill in some rows."""
        columns = [sums[name].reshape(len(indices), width) for name, width in _list_columns(self.dense)]
        self.rows[list(indices)] = torch.cat(columns, dim=1).cpu().double()

    def column(self, name: str) -> Tensor:
        """The sums of one name: (R,), or (R, bins) of a binned one such as "position/kl_sum"."""
        start = 0
        for each, width in _list_columns(self.dense):
            if each == name:
                found = self.rows[:, start : start + width]
                return found if "/" in name else found.squeeze(1)
            start += width
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values."""
        keys = [*_ROW_KEYS, *(_DENSE_ROW_KEYS if self.dense else ())]
        columns = {key: self.column(key).tolist() for key in keys}
        rows = [
            {key: int(columns[key][row]) if key in _COUNTS else columns[key][row] for key in keys}
            for row in range(len(self.rows))
        ]
        tokens = max(sum(columns["tokens"]), 1.0)
        means = {key: float(self.column(key).sum()) / tokens for key in keys}
        summary = {
            "kl": means["kl_sum"],
            "reverse_kl": means["reverse_kl_sum"],
            "ce": means["ce_sum"],
            "perplexity": math.exp(min(means["ce_sum"], MAX_EXPONENT)),
            "top1_agreement": means["agree"],
            "ece": self._compute_ece(),
        }
        if self.dense:
            summary["dense_kl"] = means["dense_kl_sum"]
            summary["dense_reverse_kl"] = means["dense_reverse_kl_sum"]
            summary["dense_top1_agreement"] = means["dense_agree"]
        return {"rows": rows, "bins": self._bins_to_json(), **summary}

    def _compute_ece(self) -> float:
        parts = [self.column(f"confidence/{key}").numpy() for key in ("confidence_sum", "correct", "tokens")]
        return compute_value(CalibrationSums(*parts)) if parts[2].sum() else 0.0

    def _bins_to_json(self) -> dict[str, Any]:
        bins: dict[str, Any] = {}
        for kind, (keys, _) in _list_binned(self.dense).items():
            bins[kind] = {"edges": list(_EDGES[kind])}
            for key in keys:
                sums = self.column(f"{kind}/{key}").tolist()
                bins[kind][key] = [
                    [int(value) if key in _COUNTS else float(f"{value:.{_SIGNIFICANT_DIGITS}g}") for value in row]
                    for row in sums
                ]
        return bins


def sum_rows(labels: Tensor, positions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Figures at target positions, added up by row, and by row and bin.

    Shapes: labels (B, T), positions (N,), returns (B,).
    """
    is_target = labels[:, 1:] != IGNORE_INDEX
    rows = is_target.nonzero()[:, 0]
    places = (is_target.cumsum(1) - 1)[is_target]  # of the row's targets, from 0
    ones = torch.ones_like(positions["ce"])
    num_rows = len(labels)
    whole = RowBins(rows, torch.zeros_like(rows), (num_rows, 1))
    sums = {"tokens": whole.sum(ones)}
    for key in ("kl", "reverse_kl", "ce", "dense_kl", "dense_reverse_kl"):
        if key in positions:
            sums[f"{key}_sum"] = whole.sum(positions[key])
    for key in ("agree", "dense_agree"):
        if key in positions:
            sums[key] = whole.sum(positions[key])
    by_position = RowBins(rows, bin_values(places, POSITION_EDGES), (num_rows, len(POSITION_EDGES)))
    by_confidence = RowBins(rows, bin_confidence(positions["confidence"]), (num_rows, CONFIDENCE_BINS))
    sums["confidence/tokens"] = by_confidence.sum(ones)
    sums["confidence/confidence_sum"] = by_confidence.sum(positions["confidence"])
    sums["confidence/correct"] = by_confidence.sum(positions["correct"])
    for prefix in ("", "dense_") if "dense_kl" in positions else ("",):
        entropies = bin_values(positions[f"{prefix}entropy"], ENTROPY_EDGES)
        by_entropy = RowBins(rows, entropies, (num_rows, len(ENTROPY_EDGES)))
        for kind, bins in (("position", by_position), ("entropy", by_entropy)):
            sums[f"{prefix}{kind}/tokens"] = bins.sum(ones)
            sums[f"{prefix}{kind}/kl_sum"] = bins.sum(positions[f"{prefix}kl"])
    return sums


def _list_binned(dense: bool) -> dict[str, tuple[tuple[str, ...], int]]:
    return {**_BINNED, **(_DENSE_BINNED if dense else {})}


def _list_columns(dense: bool) -> list[tuple[str, int]]:
    """Every column's name and width, in the order that `Fidelity.rows` has them."""
    plain = [(key, 1) for key in (*_ROW_KEYS, *(_DENSE_ROW_KEYS if dense else ()))]
    binned = [(f"{kind}/{key}", width) for kind, (keys, width) in _list_binned(dense).items() for key in keys]
    return [*plain, *binned]
