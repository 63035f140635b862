"""Two histograms of a transfer set: entries kept per response token, and how unsure the teacher was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from quantkd.report.figure import clean_axes
from quantkd.transfer_set.histograms import Histograms

_BLUE, _ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito, apart for colour-blind readers


def draw_histograms(histograms: Histograms, path: str | Path) -> None:
    """Draw both and write them as a PNG."""
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
