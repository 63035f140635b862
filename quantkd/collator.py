"""Rows of a transfer set to a padded batch with the teacher's entries, still ragged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkd.topk import TopKLogprobs
from quantkd.transfer_set import RowBatch

__all__ = ["DistillationCollator"]


@dataclass(frozen=True)
class DistillationCollator:
    """Pad rows on the right to the longest of the batch.

    Args:
        pad_token_id: what `input_ids` are padded with; `labels` get -100 and `attention_mask` 0.
        pad_to_multiple_of: round the padded length up to a multiple of this.

    Returns (from a call):
        `input_ids`, `attention_mask`, `labels` (B, T), and `teacher`: one `TopKLogprobs` over the targets of all
        rows, in order. Entries are never padded.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, rows: RowBatch | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        if isinstance(rows, RowBatch):
            lengths, input_ids, labels, teacher = rows.lengths, rows.input_ids, rows.labels, rows.teacher
        else:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            input_ids = torch.cat([row["input_ids"] for row in rows])
            labels = torch.cat([row["labels"] for row in rows])
            teacher = TopKLogprobs.concatenate([row["teacher"] for row in rows])
        width = int(lengths.max())
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        mask = torch.arange(width) < lengths.unsqueeze(1)
        return {
            "input_ids": _pad(input_ids, mask, self.pad_token_id),
            "attention_mask": mask.long(),
            "labels": _pad(labels, mask, -100),
            "teacher": teacher,
        }


def _pad(flat: Tensor, mask: Tensor, value: int) -> Tensor:
    """(B, T) with the flat values where `mask` is set, row by row, and `value` elsewhere."""
    padded = torch.full(mask.shape, value, dtype=flat.dtype)
    padded[mask] = flat
    return padded
