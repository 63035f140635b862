"""The chart of where the KL lies: by position in the answer, and by the teacher's entropy, a line an arm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantkd.report.breakdown import tabulate_breakdown
from quantkd.report.figure import COLORS, add_legend, clean_axes, pick_styles
from quantkd.report.results import order_results

_MARKERS = "osD^vPX*"
_LABELS = {"Token": "Token of the answer, counted from 1", "Entropy (nats)": "Entropy of the teacher (nats)"}


def draw_breakdown(results: dict[str, Any], path: Path) -> bool:
    """Draw the chart and write it as a PNG; an older one is removed where there is nothing to draw."""
    results = order_results(results)
    tables = [table for kind in ("position", "entropy") if (table := tabulate_breakdown(results, kind))]
    if not tables:
        path.unlink(missing_ok=True)
        return False
    figure = Figure(figsize=(10.0, 3.9), dpi=200)
    figure.set_layout_engine("constrained", wspace=0.05)
    panels = figure.subplots(1, len(tables), squeeze=False)[0]
    for panel, table in zip(panels, tables, strict=True):
        _draw_lines(panel, results["arms"], table)
    add_legend(figure, panels[0].containers, [results["arms"][name]["title"] for name in tables[0]["arms"]])
    figure.supxlabel(f"Whiskers: {results['confidence']:.0%} intervals (bootstrap over rows)", fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    return True


def _draw_lines(panel: Axes, arms: dict[str, Any], table: dict[str, Any]) -> None:
    shift = 0.24 / max(1, len(table["arms"]) - 1)
    for place, name in enumerate(table["arms"]):
        style = pick_styles(arms)[name]
        found = [one["arms"][name] for one in table["bins"]]
        lefts = [spot + shift * place - 0.12 for spot in range(len(found))]
        values = [one["value"] for one in found]
        bounds = [one["interval"] or (one["value"], one["value"]) for one in found]
        errors = [
            [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)],
            [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)],
        ]
        panel.errorbar(
            lefts, values, yerr=errors, color=COLORS[style], marker=_MARKERS[style],
            markersize=4.5, linewidth=1.2, elinewidth=0.9, capsize=2, clip_on=False, zorder=3,
        )  # fmt: skip
    # "to" for a range would not fit below an axis.
    names = [
        one["name"].replace(" to ", "-").replace(" and on", "+").replace(" and above", "+") for one in table["bins"]
    ]
    panel.set_xticks(range(len(names)), names, fontsize=8)
    panel.set_xlabel(_LABELS[table["label"]])
    panel.set_ylabel("KL (nats per token)")
    panel.set_title(table["title"], fontsize=10)
    panel.set_ylim(0, None)
    clean_axes(panel)
