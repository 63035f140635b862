"""The picture of a sweep: held-out KL in the order of the trials, and over each thing that was searched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantkd.training.search_space import Dimension

if TYPE_CHECKING:
    from quantkd.training.sweep_trials import Trial


_BLUE, _ORANGE = "#0072B2", "#E69F00"  # of Okabe and Ito, apart for colour-blind readers
_COLUMNS = 3


def draw_sweep(trials: Sequence[Trial], space: Sequence[Dimension], path: str | Path) -> None:
    """Draw the trials and write them as a PNG. Those that diverged have no value and are left out."""
    shown = [trial for trial in trials if trial.value is not None]
    values = [trial.value or 0.0 for trial in shown]
    num_panels = 1 + len(space)
    num_rows = -(-num_panels // _COLUMNS)
    figure = Figure(figsize=(3.4 * min(num_panels, _COLUMNS), 2.8 * num_rows), dpi=150, layout="constrained")
    panels: list[Axes] = list(figure.subplots(num_rows, min(num_panels, _COLUMNS), squeeze=False).flat)
    first = panels[0]
    first.scatter([trial.place + 1 for trial in shown], values, s=18, color=_BLUE, label="trial")
    lowest = [min(values[: place + 1]) for place in range(len(values))]
    first.step([trial.place + 1 for trial in shown], lowest, where="post", color=_ORANGE, label="lowest so far")
    first.set_xlabel("trial")
    first.legend(fontsize=8, frameon=False)
    for panel, dimension in zip(panels[1:], space, strict=False):
        tried = [trial.params[dimension.name] for trial in shown]
        if dimension.choices is not None:
            labels = [str(choice) for choice in dimension.choices]
            panel.scatter([labels.index(str(value)) for value in tried], values, s=18, color=_BLUE)
            panel.set_xticks(range(len(labels)), labels)
            panel.set_xlim(-0.5, len(labels) - 0.5)
        else:
            panel.scatter(tried, values, s=18, color=_BLUE)
            panel.set_xscale("log" if dimension.log else "linear")
        panel.set_xlabel(dimension.name)
    for panel in panels[:num_panels]:
        panel.set_ylabel("held-out KL (nats/token)")
        if values and min(values) > 0:
            panel.set_yscale("log")
        panel.spines[["top", "right"]].set_visible(False)
    for panel in panels[num_panels:]:
        panel.remove()
    figure.savefig(path, metadata={"Software": None})
