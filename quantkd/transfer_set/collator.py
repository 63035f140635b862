"""Rows of a transfer set to a padded or packed batch with the teacher's entries, still ragged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantkd.errors import DataError
from quantkd.transfer_set import IGNORE_INDEX, RowBatch
from quantkd.transfer_set.batch import find_targets
from quantkd.transfer_set.topk import TopKLogprobs


def position_ids_of(lengths: Tensor) -> Tensor:
    """(T,) int64 position ids of (B,) rows laid end to end: each counts from 0, where models cut them apart."""
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.arange(starts.numel(), device=lengths.device) - starts


@dataclass(frozen=True)
class DistillationCollator:
    """Rows to one batch: padded on the right to the longest, or packed end to end.

    A call returns `input_ids`, `labels` and `attention_mask` (B, T), or with packing `input_ids`, `labels` and
    `position_ids` (1, T); `targets` (N,) int64, the index of each target into the flattened labels; `teacher`, one
    `TopKLogprobs` over the targets of all rows in order, if the rows hold one; and `weights` (N,) float32, per target
    its row's or 1, if some row has a `weight` other than None.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None
    packing: bool = False

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, rows: int | None = None) -> DistillationCollator:
        """Pads with the first of the padding token, the end token and 0 below `rows` of an embedding; it is masked."""
        ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(next(each for each in ids if each is not None and (rows is None or each < rows)))

    def __call__(self, rows: RowBatch | Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        teacher: TopKLogprobs | None = None
        weights: Tensor | None = None
        if isinstance(rows, RowBatch):
            if rows.weights is not None:
                weights = torch.repeat_interleave(rows.weights, rows.target_counts)
            lengths, input_ids, labels, teacher = rows.lengths, rows.input_ids, rows.labels, rows.teacher
        else:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            input_ids = torch.cat([torch.as_tensor(row["input_ids"]) for row in rows])
            labels = torch.cat([torch.as_tensor(row["labels"]) for row in rows])
            taught = [row["teacher"] for row in rows if "teacher" in row]
            if taught and len(taught) < len(rows):
                raise DataError(
                    f"{len(rows) - len(taught)} of {len(rows)} rows hold no teacher entries; give all or none."
                )
            teacher = TopKLogprobs.concatenate(taught) if taught else None
            if any(row.get("weight") is not None for row in rows):
                weights = torch.cat([_row_weights(row) for row in rows])
        batch = self._pack(lengths, input_ids, labels) if self.packing else self._pad(lengths, input_ids, labels)
        extras = {"targets": find_targets(batch["labels"]), "teacher": teacher, "weights": weights}
        return {**batch, **{name: value for name, value in extras.items() if value is not None}}

    def _pack(self, lengths: Tensor, input_ids: Tensor, labels: Tensor) -> dict[str, Any]:
        positions = position_ids_of(lengths)
        return {
            "input_ids": input_ids.unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
            # Nothing predicts a row's first token; in a packed sequence the row before it would.
            "labels": labels.masked_fill(positions == 0, IGNORE_INDEX).unsqueeze(0),
        }

    def _pad(self, lengths: Tensor, input_ids: Tensor, labels: Tensor) -> dict[str, Any]:
        width = int(lengths.max())
        if self.pad_to_multiple_of:
            width = -(-width // self.pad_to_multiple_of) * self.pad_to_multiple_of
        mask = torch.arange(width) < lengths.unsqueeze(1)
        return {
            "input_ids": _fill(input_ids, mask, self.pad_token_id),
            "attention_mask": mask.long(),
            "labels": _fill(labels, mask, IGNORE_INDEX),
        }


def _row_weights(row: Mapping[str, Any]) -> Tensor:
    """The row's weight, once for each target; nothing predicts a label at its first token."""
    weight = row.get("weight")
    targets = int((torch.as_tensor(row["labels"])[1:] != IGNORE_INDEX).sum())
    return torch.full((targets,), 1.0 if weight is None else float(weight))


def _fill(flat: Tensor, mask: Tensor, value: int) -> Tensor:
    """(B, T) with the flat values where `mask` is set, row by row, and `value` elsewhere."""
    padded = torch.full(mask.shape, value, dtype=flat.dtype)
    padded[mask] = flat
    return padded
