"""Two histograms of a transfer set: entries kept per response token, and how unsure the teacher was."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from quantkd.transfer_set import TransferSet

_ROWS_AT_ONCE = 256
_NATS_PER_BIN = 0.25


@dataclass(frozen=True)
class Histograms:
    """Counts of target positions: by their number of entries, and by the teacher's entropy."""

    entries: NDArray[np.int64]
    entropy: NDArray[np.int64]  # the tail counts as one class: a lower bound of the teacher's own entropy
    entropy_edges: NDArray[np.float64]  # nats; bin b is from edge b to below edge b + 1, and the last edge is infinite


def compute_histograms(transfer_set: TransferSet) -> Histograms:
    """Read a set once and count."""
    top = np.log(transfer_set.plan.vocab_size)
    edges = np.arange(np.ceil(top / _NATS_PER_BIN) + 1) * _NATS_PER_BIN
    entries = np.zeros(1, dtype=np.int64)
    entropy = np.zeros(len(edges), dtype=np.int64)
    for start in range(0, len(transfer_set), _ROWS_AT_ONCE):
        teacher = transfer_set.__getitems__(range(start, min(start + _ROWS_AT_ONCE, len(transfer_set)))).teacher
        held = np.bincount(teacher.counts.numpy(), minlength=len(entries))
        held[: len(entries)] += entries
        entries = held
        logprobs, tail = (part.double() for part in teacher.at_temperature(1.0))
        sums = -torch.xlogy(tail, tail).index_add(0, teacher.positions, logprobs.exp() * logprobs)
        bins = np.clip(np.digitize(sums, edges) - 1, 0, len(edges) - 1)
        entropy += np.bincount(bins, minlength=len(edges))
    return Histograms(entries, entropy, np.append(edges, np.inf))
