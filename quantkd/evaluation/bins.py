"""The bins that fidelity is broken down by, and sums per row and bin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkd.hardware import wide_dtype

# Lower edges; the last bin has no end. Octaves, for an answer's first tokens differ most from each other.
POSITION_EDGES = (0, 8, 16, 32, 64, 128, 256, 512)
# Nats. Half of a trained teacher's tokens are nearly sure, so the steps are finer there.
ENTROPY_EDGES = (0.0, 0.01, 0.1, 0.3, 1.0, 2.0)
# Equal widths over (0, 1], as many as Guo et al. 2017 (arXiv:1706.04599) take.
CONFIDENCE_BINS = 15


@dataclass(frozen=True)
class RowBins:
    """Which row and bin each of N positions belongs to.

    Args:
        rows: (N,) int64, the row of the batch.
        bins: (N,) int64.
        shape: rows and bins.
    """

    rows: Tensor
    bins: Tensor
    shape: tuple[int, int]

    def sum(self, values: Tensor) -> Tensor:
        """(N,) values, added up -> (rows, bins), in float64 (float32 on MPS, which has none)."""
        wide = wide_dtype(values.device)
        sums = torch.zeros(self.shape[0] * self.shape[1], dtype=wide, device=values.device)
        return sums.index_add_(0, self.rows * self.shape[1] + self.bins, values.to(wide)).view(self.shape)


def bin_values(values: Tensor, edges: tuple[float, ...]) -> Tensor:
    """(N,) values -> (N,) int64 bins: the last edge that is not above the value; below the first edge, bin 0."""
    inner = torch.tensor(edges[1:], dtype=values.dtype, device=values.device)
    return torch.bucketize(values, inner, right=True)


def bin_confidence(confidence: Tensor) -> Tensor:
    """(N,) probabilities -> (N,) int64 bins of equal width, each with its upper end."""
    return (confidence * CONFIDENCE_BINS).ceil().long().sub_(1).clamp_(0, CONFIDENCE_BINS - 1)
