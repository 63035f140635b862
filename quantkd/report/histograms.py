"""Two histograms of a transfer set: entries kept per response token, and how unsure the teacher was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from quantkd.transfer_set.histograms import Histograms

__all__ = ["draw_histograms"]

_BLUE, _ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito, apart for colour-blind readers


def draw_histograms(histograms: Histograms, path: str | Path) -> None:
    """Draw both and write them as a PNG.

    Args:
        histograms: from `quantkd.transfer_set.histograms.compute_histograms`.
        path: the PNG file.
    """
    total = max(int(histograms.entries.sum()), 1)
    figure = Figure(figsize=(8.0, 3.2), dpi=200, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.bar(np.arange(len(histograms.entries)), 100 * histograms.entries / total, width=1.0, color=_BLUE)
    left.set_xlabel("entries kept")
    edges = histograms.entropy_edges[:-1]
    right.bar(edges, 100 * histograms.entropy / total, width=edges[1] - edges[0], align="edge", color=_ORANGE)
    used = int(np.flatnonzero(histograms.entropy).max(initial=0)) + 1
    right.set_xlim(0, edges[min(used, len(edges) - 1)])
    right.set_xlabel("entropy of the teacher, nats (at least)")
    for panel in (left, right):
        panel.set_ylabel("% of response tokens")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
