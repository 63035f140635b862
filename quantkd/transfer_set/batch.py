"""RowBatch: some rows, flat, as a collator wants them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkd.topk import TopKLogprobs

__all__ = ["RowBatch"]


@dataclass(frozen=True)
class RowBatch:
    """B rows of T tokens and R target positions in all, end to end and without padding.

    Args:
        lengths: (B,) int64, tokens per row.
        input_ids: (T,) int64.
        labels: (T,) int64, unshifted, -100 outside the targets.
        targets: (R,) int64, each target's index into `input_ids`, ascending.
        target_counts: (B,) int64, targets per row.
        teacher: the distributions at the R targets, in that order.
        finished: (B,) bool, false where the length limit cut the response.
        weights: (B,) float32, each row's weight from `concatenate`, or None if no set was weighted.
    """

    lengths: Tensor
    input_ids: Tensor
    labels: Tensor
    targets: Tensor
    target_counts: Tensor
    teacher: TopKLogprobs
    finished: Tensor
    weights: Tensor | None = None

    def __len__(self) -> int:
        return self.lengths.numel()

    @classmethod
    def concatenate(cls, parts: list[RowBatch]) -> RowBatch:
        """Several batches end to end; they must share temperatures and vocabulary size.

        Args:
            parts: at least one.

        Returns:
            One batch of all their rows, in order.
        """
        if len(parts) == 1:
            return parts[0]
        shifts = torch.tensor([0] + [part.input_ids.numel() for part in parts[:-1]]).cumsum(0)
        weights = None
        if any(part.weights is not None for part in parts):
            weights = torch.cat([torch.ones(len(p)) if p.weights is None else p.weights for p in parts])
        return cls(
            lengths=torch.cat([part.lengths for part in parts]),
            input_ids=torch.cat([part.input_ids for part in parts]),
            labels=torch.cat([part.labels for part in parts]),
            targets=torch.cat([part.targets + shift for part, shift in zip(parts, shifts, strict=True)]),
            target_counts=torch.cat([part.target_counts for part in parts]),
            teacher=TopKLogprobs.concatenate([part.teacher for part in parts]),
            finished=torch.cat([part.finished for part in parts]),
            weights=weights,
        )
