"""The bar chart of a report: accuracy in each setting, and KL to the teacher, with 95% intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from quantkd.report.results import order_results

__all__ = ["COLORS", "clean_axes", "draw_figure"]

# Okabe and Ito's colours, which stay apart for colour-blind readers; the hatches do so in a black-and-white print.
COLORS = ("#8C8C8C", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_HATCHES = ("", "///", "", "...", "xxx", "\\\\\\", "+++", "ooo")
_INK = "#222222"


def draw_figure(results: dict[str, Any], path: Path) -> None:
    """Draw the chart and write it as a PNG.

    Args:
        results: as `compute_results` gives them.
        path: the PNG file.
    """
    results = order_results(results)
    settings = [key for key in results["metrics"] if key.startswith("accuracy_") and not key.endswith("_strict")]
    with_kl = [name for name, arm in results["arms"].items() if "kl" in arm["metrics"] and name != "teacher"]
    widths = ([1.0 + 0.9 * len(settings)] if settings else []) + ([0.6 + 0.5 * len(with_kl)] if with_kl else [])
    figure = Figure(figsize=(max(4.6, min(10.0, 1.4 + 2.0 * sum(widths))), 3.6), dpi=200)
    figure.set_layout_engine("constrained", wspace=0.05)
    panels = figure.subplots(1, len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    if settings:
        _draw_accuracy(panels[0], results, settings)
    if with_kl:
        _draw_kl(panels[-1], results, with_kl)
    handles: dict[str, Any] = {}
    for panel in panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside upper center", ncols=min(4, len(handles)), frameon=False,
        fontsize=9, handlelength=1.4,
    )  # fmt: skip
    figure.savefig(path, metadata={"Software": None})


def _draw_accuracy(panel: Axes, results: dict[str, Any], settings: list[str]) -> None:
    """A group of bars a setting, with Wilson intervals."""
    arms = results["arms"]
    width = 0.8 / len(arms)
    for place, (name, arm) in enumerate(arms.items()):
        shown = [group for group, key in enumerate(settings) if key in arm["metrics"]]
        measured = [arm["metrics"][settings[group]] for group in shown]
        lefts = [group + (place - (len(arms) - 1) / 2) * width for group in shown]
        _draw_bars(panel, lefts, measured, 0.92 * width, _style(arms, name), scale=100, form="{:.0f}")
    counts = {arm["metrics"][key]["n"] for arm in arms.values() for key in settings if key in arm["metrics"]}
    panel.set_xticks(range(len(settings)), [results["metrics"][key].removeprefix("Accuracy, ") for key in settings])
    panel.set_xlim(-0.55, len(settings) - 0.45)
    panel.set_ylabel("Accuracy (%)")
    panel.set_title(f"Accuracy (n = {', '.join(map(str, sorted(counts)))})", fontsize=10)
    # Room for the numbers above the intervals, yet no tick above 100%.
    panel.set_ylim(0, max(5.0, 1.08 * panel.dataLim.ymax))
    panel.set_yticks([tick for tick in panel.get_yticks() if 0 <= tick <= min(100, panel.get_ylim()[1])])
    clean_axes(panel)


def _draw_kl(panel: Axes, results: dict[str, Any], names: list[str]) -> None:
    """A bar an arm, with bootstrap intervals."""
    arms = results["arms"]
    for place, name in enumerate(names):
        _draw_bars(panel, [place], [arms[name]["metrics"]["kl"]], 0.72, _style(arms, name), scale=1, form="{:.3f}")
    labels = []
    for name in names:
        share = arms[name]["gap_recovered"].get("kl", {}).get("value")
        labels.append("" if share is None else f"{100 * share:.0f}% of the\ngap recovered")
    panel.set_xticks(range(len(names)), labels, fontsize=8)
    panel.set_xlim(-0.6, len(names) - 0.4)
    panel.set_ylabel("KL divergence (nats per token)")
    num_rows = max(arms[name]["metrics"]["kl"]["n"] for name in names)
    panel.set_title(f"KL to the teacher ({num_rows} rows)", fontsize=10)
    panel.set_ylim(0, max(1e-6, 1.08 * panel.dataLim.ymax))
    clean_axes(panel)


def _draw_bars(
    panel: Axes,
    places: list[float],
    measured: list[dict[str, Any]],
    width: float,
    style: dict[str, Any],
    *,
    scale: float,
    form: str,
) -> None:
    values = [scale * one["value"] for one in measured]
    tops = [scale * one["interval"][1] if one["interval"] else scale * one["value"] for one in measured]
    bottoms = [scale * one["interval"][0] if one["interval"] else scale * one["value"] for one in measured]
    errors = [
        [max(0.0, value - bottom) for value, bottom in zip(values, bottoms, strict=True)],
        [max(0.0, top - value) for value, top in zip(values, tops, strict=True)],
    ]
    # The hatch takes the edge's colour: white, so that it does not hide the interval; the outline is drawn over it.
    panel.bar(places, values, width, edgecolor="white", linewidth=0, **style)
    panel.bar(
        places, values, width, yerr=errors, facecolor="none", edgecolor=_INK, linewidth=0.7,
        error_kw={"elinewidth": 1.1, "capsize": 2.5, "ecolor": _INK},
    )  # fmt: skip
    for place, value, top in zip(places, values, tops, strict=True):
        panel.annotate(
            form.format(value), (place, top), xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8
        )


def _style(arms: dict[str, Any], name: str) -> dict[str, Any]:
    place = list(arms).index(name) % len(COLORS)
    return {"color": COLORS[place], "hatch": _HATCHES[place], "label": arms[name]["title"]}


def clean_axes(panel: Axes) -> None:
    """Take away the lines that say nothing, and add light ones to read values by.

    Args:
        panel: a chart whose vertical axis carries the values.
    """
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="x", length=0)
    panel.yaxis.grid(True, color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
