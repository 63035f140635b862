"""Two histograms of a transfer set: entries kept per response token, and how unsure the teacher was."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantkd.transfer_set import TransferSet

_ROWS_AT_ONCE = 256
_NATS_PER_BIN = 0.25
_BLUE, _ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito, apart for colour-blind readers


@dataclass(frozen=True)
class Histograms:
    """Counts of target positions.

    Args:
        entries: `entries[n]` targets hold n entries.
        entropy: `entropy[b]` targets have an entropy in `[entropy_edges[b], entropy_edges[b + 1])`. It is taken over
            the entries and the tail as one class, so it is a lower bound of the teacher's own.
        entropy_edges: edges of the bins in nats, the last one open.
    """

    entries: NDArray[np.int64]
    entropy: NDArray[np.int64]
    entropy_edges: NDArray[np.float64]


def compute_histograms(transfer_set: TransferSet) -> Histograms:
    """Read a set once and count."""
    top = np.log(transfer_set.plan.vocab_size)
    edges = np.arange(np.ceil(top / _NATS_PER_BIN) + 1) * _NATS_PER_BIN
    entries = np.zeros(1, dtype=np.int64)
    entropy = np.zeros(len(edges), dtype=np.int64)
    for start in range(0, len(transfer_set), _ROWS_AT_ONCE):
        teacher = transfer_set.__getitems__(range(start, min(start + _ROWS_AT_ONCE, len(transfer_set)))).teacher
        counts = teacher.counts.numpy()
        held = np.bincount(counts, minlength=len(entries))
        held[: len(entries)] += entries
        entries = held
        logprobs, tail = (part.double().numpy() for part in teacher.at_temperature(1.0))
        terms = np.append(-logprobs * np.exp(logprobs), 0.0)  # the last term keeps an empty batch from failing
        sums = np.diff(np.append(0.0, np.cumsum(terms))[np.append(0, np.cumsum(counts))])
        sums -= tail * np.log(np.where(tail > 0, tail, 1.0))
        bins = np.clip(np.digitize(sums, edges) - 1, 0, len(edges) - 1)
        entropy += np.bincount(bins, minlength=len(edges))
    return Histograms(entries, entropy, np.append(edges, np.inf))


def draw_histograms(histograms: Histograms, path: str | Path) -> None:
    """Draw both and write them as a PNG."""
    from matplotlib.figure import Figure  # takes a second to import

    from quantkd.report.figure import clean_axes

    total = max(int(histograms.entries.sum()), 1)
    figure = Figure(figsize=(8.0, 3.2), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(np.arange(len(histograms.entries)), 100 * histograms.entries / total, width=1.0, color=_BLUE)
    left.set_title("How many entries a token keeps", fontsize=10)
    left.set_xlabel("entries")
    left.set_xlim(0, len(histograms.entries))
    edges = histograms.entropy_edges[:-1]
    right.bar(edges, 100 * histograms.entropy / total, width=edges[1] - edges[0], align="edge", color=_ORANGE,
              edgecolor="white", linewidth=0.5)  # fmt: skip
    used = int(np.flatnonzero(histograms.entropy).max(initial=0)) + 1
    right.set_xlim(0, edges[min(used, len(edges) - 1)])
    right.set_title("How unsure the teacher is", fontsize=10)
    right.set_xlabel("entropy, nats (the tail counted as one token)")
    for panel in (left, right):
        panel.set_ylabel("response tokens (%)")
        clean_axes(panel)
        panel.tick_params(axis="x", length=3)  # numbers, not names of bars
    figure.savefig(path, metadata={"Software": None})
