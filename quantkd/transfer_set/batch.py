"""RowBatch: some rows, flat, as a collator wants them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkd.transfer_set.codec import DecodedRows
from quantkd.transfer_set.topk import TopKLogprobs

IGNORE_INDEX = -100


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
    def from_decoded(
        cls, decoded: DecodedRows, temperatures: tuple[float, ...], vocab_size: int, weight: float | None
    ) -> RowBatch:
        """Decoded rows as tensors."""
        labels = np.full(len(decoded.input_ids), IGNORE_INDEX, dtype=np.int64)
        labels[decoded.targets] = decoded.input_ids[decoded.targets]
        return cls(
            lengths=torch.from_numpy(decoded.lengths),
            input_ids=torch.from_numpy(decoded.input_ids),
            labels=torch.from_numpy(labels),
            targets=torch.from_numpy(decoded.targets),
            target_counts=torch.from_numpy(decoded.target_counts),
            teacher=TopKLogprobs(
                offsets=torch.from_numpy(np.append(0, np.cumsum(decoded.counts))),
                token_ids=torch.from_numpy(decoded.token_ids),
                logprobs=torch.from_numpy(decoded.logprobs),
                log_normalizers=torch.from_numpy(decoded.log_normalizers),
                temperatures=temperatures,
                vocab_size=vocab_size,
            ),
            finished=torch.from_numpy(decoded.finished),
            weights=None if weight is None else torch.full((len(decoded.lengths),), weight),
        )

    @classmethod
    def concatenate(cls, parts: list[RowBatch]) -> RowBatch:
        """Several batches end to end; they must share temperatures and vocabulary size."""
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
