"""Rows to a batch: flat and ragged as they are read, then padded or packed as a model takes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkd.errors import DataError
from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.topk import TopKLogprobs, offsets_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100


def find_targets(labels: Tensor) -> Tensor:
    """(N,) int64 index of each target into the flattened (B, T) labels. Nothing predicts a row's first token."""
    is_target = labels != IGNORE_INDEX
    is_target[:, 0] = False
    return is_target.flatten().nonzero().squeeze(1)


def position_ids_of(lengths: Tensor) -> Tensor:
    """(T,) int64 position ids of (B,) rows laid end to end: each counts from 0, where models cut them apart."""
    starts = torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
    return torch.arange(starts.numel(), device=lengths.device) - starts


@dataclass(frozen=True)
class RowBatch:
    """B rows of T tokens and R target positions in all, end to end and without padding."""

    lengths: Tensor  # (B,) int64, tokens per row
    input_ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, unshifted, -100 outside the targets
    target_counts: Tensor  # (B,) int64, targets per row
    teacher: TopKLogprobs  # of the R targets, in the order of the labels
    finished: Tensor  # (B,) bool, false where the length limit cut the response
    weights: Tensor | None = None  # (B,) float32, from `concatenate`; None if no set was weighted

    def __len__(self) -> int:
        return self.lengths.numel()

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[TransferRow],
        temperatures: tuple[float, ...],
        vocab_size: int,
        weights: Sequence[float | None],
    ) -> RowBatch:
        """Rows as tensors."""
        lengths = torch.tensor([len(row.input_ids) for row in rows], dtype=torch.int64)
        starts = (lengths.cumsum(0) - lengths).tolist()
        targets = _join([row.targets + start for row, start in zip(rows, starts, strict=True)], np.int64)
        input_ids = _join([row.input_ids for row in rows], np.int64)
        labels = torch.full_like(input_ids, IGNORE_INDEX)
        labels[targets] = input_ids[targets]
        teacher = TopKLogprobs(
            offsets=offsets_of(_join([row.counts for row in rows], np.int64)),
            token_ids=_join([row.token_ids for row in rows], np.int64),
            logprobs=_join([row.logprobs for row in rows], np.float32),
            log_normalizers=_join([row.log_normalizers.ravel() for row in rows], np.float32).view(
                -1, len(temperatures)
            ),
            temperatures=temperatures,
            vocab_size=vocab_size,
        )
        counts = torch.tensor([len(row.counts) for row in rows], dtype=torch.int64)
        finished = torch.tensor([row.finished for row in rows], dtype=torch.bool)
        return cls(lengths, input_ids, labels, counts, teacher, finished, weights_of(weights))


def weights_of(weights: Sequence[float | None]) -> Tensor | None:
    """(B,) float32: rows without a weight count as 1 among others that have one; None if no row has one."""
    if all(weight is None for weight in weights):
        return None
    return torch.tensor([1.0 if weight is None else float(weight) for weight in weights])


@dataclass(frozen=True)
class DistillationCollator:
    """Rows to one batch: padded on the right to the longest, or packed end to end.

    A call returns `input_ids`, `labels` and `attention_mask` (B, T), or with packing `input_ids`, `labels` and
    `position_ids` (1, T); `targets` (N,) int64, the index of each target into the flattened labels, and `targets_of`,
    the shape of the labels; `teacher`, one `TopKLogprobs` over the targets of all rows in order, if the rows hold one;
    and `weights` (N,) float32, per target its row's or 1, if some row has a `weight` other than None.
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
        teacher: TopKLogprobs | None
        if isinstance(rows, RowBatch):
            lengths, input_ids, labels = rows.lengths, rows.input_ids, rows.labels
            teacher, weights = rows.teacher, rows.weights
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
            weights = weights_of([row.get("weight") for row in rows])
        if weights is not None:
            is_target = (labels != IGNORE_INDEX) & (position_ids_of(lengths) > 0)
            weights = weights.repeat_interleave(lengths)[is_target]
        batch = self._pack(lengths, input_ids, labels) if self.packing else self._pad(lengths, input_ids, labels)
        extras: dict[str, Any] = {"targets": find_targets(batch["labels"]), "teacher": teacher, "weights": weights}
        extras["targets_of"] = tuple(batch["labels"].shape)
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
            "input_ids": input_ids.new_full(mask.shape, self.pad_token_id).masked_scatter(mask, input_ids),
            "attention_mask": mask.long(),
            "labels": labels.new_full(mask.shape, IGNORE_INDEX).masked_scatter(mask, labels),
        }


def _join(parts: list[NDArray[Any]], dtype: Any) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype), *parts]).astype(dtype, copy=False))
