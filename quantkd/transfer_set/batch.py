"""RowBatch: some rows, flat, as a collator wants them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.topk import TopKLogprobs

IGNORE_INDEX = -100


def find_targets(labels: Tensor) -> Tensor:
    """(N,) int64 index of each target into the flattened (B, T) labels. Nothing predicts a row's first token."""
    is_target = labels != IGNORE_INDEX
    is_target[:, 0] = False
    return is_target.flatten().nonzero().squeeze(1)


@dataclass(frozen=True)
class RowBatch:
    """B rows of T tokens and R target positions in all, end to end and without padding."""

    lengths: Tensor  # (B,) int64, tokens per row
    input_ids: Tensor  # (T,) int64
    labels: Tensor  # (T,) int64, unshifted, -100 outside the targets
    targets: Tensor  # (R,) int64, each target's index into `input_ids`, ascending
    target_counts: Tensor  # (B,) int64, targets per row
    teacher: TopKLogprobs  # of the R targets, in that order
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
        """Rows as tensors; rows without a weight count as 1 among others that have one."""
        lengths = np.array([len(row.input_ids) for row in rows], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        targets = _join([row.targets + start for row, start in zip(rows, starts, strict=True)], np.int64)
        input_ids = _join([row.input_ids for row in rows], np.int64)
        labels = np.full(len(input_ids), IGNORE_INDEX, dtype=np.int64)
        labels[targets] = input_ids[targets]
        normalizers = [row.log_normalizers for row in rows] or [np.zeros((0, len(temperatures)))]
        counts = _join([row.counts for row in rows], np.int64)
        return cls(
            lengths=torch.from_numpy(lengths),
            input_ids=torch.from_numpy(input_ids),
            labels=torch.from_numpy(labels),
            targets=torch.from_numpy(targets),
            target_counts=torch.tensor([len(row.counts) for row in rows], dtype=torch.int64),
            teacher=TopKLogprobs(
                offsets=torch.from_numpy(np.append(0, np.cumsum(counts))),
                token_ids=torch.from_numpy(_join([row.token_ids for row in rows], np.int64)),
                logprobs=torch.from_numpy(_join([row.logprobs for row in rows], np.float32)),
                log_normalizers=torch.from_numpy(np.concatenate(normalizers).astype(np.float32, copy=False)),
                temperatures=temperatures,
                vocab_size=vocab_size,
            ),
            finished=torch.tensor([row.finished for row in rows], dtype=torch.bool),
            weights=torch.tensor([1.0 if w is None else w for w in weights]) if any(weights) else None,
        )


def _join(parts: list[NDArray[Any]], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *parts])
