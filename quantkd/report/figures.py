"""The charts of a report: figures of each arm as bars, KL against bits per weight, and KL by bins as lines."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from quantkd.errors import printable
from quantkd.files import write_file
from quantkd.report.page import list_told_apart, tabulate_breakdown

# Okabe and Ito's colours, which colour-blind readers can tell apart; the hatches serve in a black-and-white print.
_COLORS = ("#8C8C8C", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_MARKERS = "osD^vPX*"
_HATCHES = ("", "///", "", "...", "xxx", "\\\\\\", "+++", "ooo")
_OWN_COLORS = {"teacher": 0, "before": 1, "after": 2, "control": 3, "start": 4, "codes": 5}
_LABELS = {"Token": "Token of the answer, counted from 1", "Entropy (nats)": "Entropy of the teacher (nats)"}
_INK = "#222222"
_WIDEST = 14.0  # inches
_WIDE_BARS = 10  # so many bars in a panel of shares have room for a decimal each


def draw_bars(results: dict[str, Any]) -> Figure | None:
    """Accuracy, answer agreement and KL per arm, as far as they say something; None where nothing does."""
    arms = results["arms"]
    students = [name for name in arms if name != "teacher"]
    # Where no test tells arms apart, bars of few questions would show differences that are noise.
    told = [key for key, is_told in list_told_apart(results).items() if is_told]
    shares = {}
    for title, prefix, candidates in (("Accuracy", "accuracy_", arms), ("Answer agreement", "agreement_", students)):
        if keys := [key for key in told if key.startswith(prefix)]:
            names = [name for name in candidates if any(key in arms[name]["metrics"] for key in keys)]
            shares[title] = (keys, names)
    with_kl = [name for name in students if "kl" in arms[name]["metrics"]]
    widths = [max(1.9, 0.36 * len(keys) * len(names)) for keys, names in shares.values()]
    widths += [max(1.9, 0.95 * len(with_kl))] if with_kl else []
    if not widths:
        return None
    figure, panels = _make_panels(min(_WIDEST, max(5.6, 1.0 * len(widths) + 1.15 * sum(widths))), widths)
    for panel, (title, (keys, names)) in zip(panels, shares.items(), strict=False):
        _draw_shares(panel, results, title, keys, names)
    if with_kl:
        _draw_kl(panels[-1], results, with_kl)
    drawn = {*with_kl, *(name for _, names in shares.values() for name in names)}
    shown = [name for name in arms if name in drawn]
    handles = [Patch(edgecolor="white", **_style(arms, name)) for name in shown]
    _add_legend(figure, handles, [arms[name]["title"] for name in shown])
    sources = [f"Wilson's for {' and '.join(shares).lower()}"] if shares else []
    sources += ["bootstrap over rows for KL"] * bool(with_kl)
    figure.supxlabel(f"Whiskers: {results['confidence']:.0%} intervals ({', '.join(sources)})", fontsize=8, color=_INK)
    return figure


def draw_breakdown(results: dict[str, Any]) -> Figure | None:
    """KL by position and by the teacher's entropy; None where there is nothing to draw."""
    tables = [table for kind in ("position", "entropy") if (table := tabulate_breakdown(results, kind))]
    if not tables:
        return None
    figure, panels = _make_panels(10.0, [1] * len(tables))
    for panel, table in zip(panels, tables, strict=True):
        _draw_lines(panel, results["arms"], table)
    _add_legend(figure, panels[0].containers, [results["arms"][name]["title"] for name in tables[0]["arms"]])
    figure.supxlabel(f"Whiskers: {results['confidence']:.0%} intervals (bootstrap over rows)", fontsize=8)
    return figure


def draw_bits(results: dict[str, Any]) -> Figure | None:
    """KL against bits per weight, a labelled point an arm; None where there is nothing to draw."""
    arms = {name: arm for name, arm in results["arms"].items() if name != "teacher" and arm["bits_per_weight"]}
    arms = {name: arm for name, arm in arms.items() if arm["metrics"].get("kl", {}).get("value", 0) > 0}
    if not arms:
        return None
    figure, (panel,) = _make_panels(7.4, [1])
    panel.set_xscale("log", base=2)
    panel.set_yscale("log", nonpositive="clip")
    styles = _pick_styles(results["arms"])
    for name, arm in arms.items():
        values, errors = _scale_intervals([arm["metrics"]["kl"]])
        look: dict[str, Any] = {"color": _COLORS[styles[name]], "marker": _MARKERS[styles[name]]}
        panel.errorbar([arm["bits_per_weight"]], values, yerr=errors, capsize=2.5, elinewidth=1, linewidth=0, **look)
    bits, heights = ([arm["bits_per_weight"] for arm in arms.values()], panel.get_ylim())
    panel.set_xlim(min(bits) / 1.12, max(bits) * 1.6)  # room for the labels
    panel.set_ylim(heights[0] / 1.2, heights[1] * 1.2)
    _label_points(
        panel, [(arm["bits_per_weight"], arm["metrics"]["kl"]["value"], arm["title"]) for arm in arms.values()]
    )
    for axis, subs in ((panel.xaxis, (1, 1.25, 1.5, 1.75)), (panel.yaxis, (1, 1.5, 2, 3, 5, 7))):
        axis.set_major_locator(LogLocator(2 if axis is panel.xaxis else 10, subs))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())
    panel.set_xlabel("Bits per weight of the linear layers, adapters and constants included")
    _label_axes(panel, "KL (nats per token)", "KL to the teacher against size")
    figure.supxlabel(f"Whiskers: {results['confidence']:.0%} intervals (bootstrap over rows)", fontsize=8, color=_INK)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, all of it or nothing; the same figure gives the same bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    write_file(path, buffer.getvalue())


def _make_panels(width: float, ratios: list[float]) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, 3.9), dpi=200)
    figure.set_layout_engine("constrained", wspace=0.05)
    return figure, figure.subplots(1, len(ratios), squeeze=False, gridspec_kw={"width_ratios": ratios})[0]


def _draw_shares(panel: Axes, results: dict[str, Any], title: str, keys: list[str], names: list[str]) -> None:
    """A group of bars a metric, with Wilson intervals."""
    arms = results["arms"]
    width = 0.8 / len(names)
    form = "{:.1f}" if len(names) * len(keys) <= _WIDE_BARS else "{:.0f}"
    for place, name in enumerate(names):
        found = arms[name]["metrics"]
        shown = [group for group, key in enumerate(keys) if key in found]
        lefts = [group + (place - (len(names) - 1) / 2) * width for group in shown]
        measured = [found[keys[group]] for group in shown]
        _draw_bars(panel, lefts, measured, 0.92 * width, _style(arms, name), scale=100, form=form)
    counts = {arms[name]["metrics"][key]["n"] for name in names for key in keys if key in arms[name]["metrics"]}
    labels = [fill(results["metrics"][key].removeprefix(f"{title}, "), 22) for key in keys]
    panel.set_xticks(range(len(keys)), [_plain_text(each) for each in labels], fontsize=9 if len(keys) < 5 else 7)
    panel.set_xlim(-0.55, len(keys) - 0.45)
    _label_axes(panel, f"{title} (%)", f"{title} ({', '.join(map(str, sorted(counts)))} questions)")
    # Room for the numbers above the intervals, yet no tick above 100%.
    panel.set_ylim(0, max(5.0, 1.08 * panel.dataLim.ymax))
    panel.set_yticks([tick for tick in panel.get_yticks() if 0 <= tick <= min(100, panel.get_ylim()[1])])


def _draw_kl(panel: Axes, results: dict[str, Any], names: list[str]) -> None:
    """A bar an arm, with bootstrap intervals."""
    arms = results["arms"]
    for place, name in enumerate(names):
        _draw_bars(panel, [place], [arms[name]["metrics"]["kl"]], 0.72, _style(arms, name), scale=1, form="{:.3f}")
    labels = []
    for name in names:
        share = arms[name]["gap_recovered"].get("kl", {}).get("value")
        labels.append("" if share is None else f"{round(100 * share)}% of the\ngap recovered")
    panel.set_xticks(range(len(names)), labels, fontsize=8 if len(names) < 5 else 7)
    panel.set_xlim(-0.6, len(names) - 0.4)
    num_rows = max(arms[name]["metrics"]["kl"]["n"] for name in names)
    _label_axes(panel, "KL (nats per token)", f"KL to the teacher ({num_rows} held-out row{'s' * (num_rows > 1)})")
    panel.set_ylim(0, max(1e-6, 1.08 * panel.dataLim.ymax))


def _draw_bars(
    panel: Axes, places: list[float], measured: list[dict[str, Any]], width: float, style: dict[str, Any], *,
    scale: float, form: str,
) -> None:  # fmt: skip
    values, errors = _scale_intervals(measured, scale)
    # The hatch takes the edge's colour: white, so that it does not hide the interval; the outline is drawn over it.
    panel.bar(places, values, width, edgecolor="white", linewidth=0, **style)
    panel.bar(
        places, values, width, yerr=errors, facecolor="none", edgecolor=_INK, linewidth=0.7,
        error_kw={"elinewidth": 1.1, "capsize": 2.5, "ecolor": _INK},
    )  # fmt: skip
    for place, value, above in zip(places, values, errors[1], strict=True):
        if value == 0:  # a bar without height still says whose it is
            panel.plot([place - width / 2, place + width / 2], [0, 0], color=style["facecolor"], linewidth=3,
                       solid_capstyle="butt", clip_on=False, zorder=3)  # fmt: skip
        panel.annotate(
            form.format(value), (place, value + above), (0, 3), textcoords="offset points", ha="center", fontsize=8
        )


def _draw_lines(panel: Axes, arms: dict[str, Any], table: dict[str, Any]) -> None:
    shift = 0.24 / max(1, len(table["arms"]) - 1)
    for place, (name, bins) in enumerate(table["arms"].items()):
        style = _pick_styles(arms)[name]
        values, errors = _scale_intervals(bins)
        lefts = [spot + shift * place - 0.12 for spot in range(len(values))]
        panel.errorbar(
            lefts, values, yerr=errors, color=_COLORS[style], marker=_MARKERS[style],
            markersize=4.5, linewidth=1.2, elinewidth=0.9, capsize=2, clip_on=False, zorder=3,
        )  # fmt: skip
    # "to" for a range would not fit below an axis.
    names = [re.sub(" and (on|above)", "+", name.replace(" to ", "-")) for name in table["names"]]
    panel.set_xticks(range(len(names)), names, fontsize=8)
    panel.set_xlabel(_LABELS[table["label"]])
    _label_axes(panel, "KL (nats per token)", table["title"])
    panel.set_ylim(0, None)


def _label_points(panel: Axes, points: list[tuple[float, float, str]]) -> None:
    """Labels in a column to the right of all points, moved up where one would hide the one below."""
    low, high = map(math.log, panel.get_ylim())
    line = {"arrowstyle": "-", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 3, "relpos": (0, 0.5)}
    right, lowest = 1.08 * max(x for x, *_ in points), -math.inf
    for x, y, title in sorted(points, key=lambda point: point[1]):
        place = max((math.log(y) - low) / (high - low), lowest)  # a share of the panel's height
        lowest = place + 0.06
        text = _plain_text(title if len(title) <= 40 else title[:37] + "...")
        panel.annotate(
            text, (x, y), (right, math.exp(low + place * (high - low))), va="center", fontsize=8, arrowprops=line
        )  # fmt: skip


def _scale_intervals(measured: list[dict[str, Any]], scale: float = 1) -> tuple[list[float], list[list[float]]]:
    """Values, and how far their intervals reach below and above them."""
    values = [math.nan if one["value"] is None else scale * one["value"] for one in measured]  # a gap in the line
    intervals = [one["interval"] and [scale * bound for bound in one["interval"]] for one in measured]
    bounds = [found or (value, value) for value, found in zip(values, intervals, strict=True)]
    below = [max(0.0, value - low) for value, (low, _) in zip(values, bounds, strict=True)]
    return values, [below, [max(0.0, high - value) for value, (_, high) in zip(values, bounds, strict=True)]]


def _style(arms: dict[str, Any], name: str) -> dict[str, Any]:
    place = _pick_styles(arms)[name]
    return {"facecolor": _COLORS[place], "hatch": _HATCHES[place]}


def _pick_styles(arms: Iterable[str]) -> dict[str, int]:
    """A place in `_COLORS` for each arm; the usual arms have theirs in every report."""
    others = [name for name in arms if name not in _OWN_COLORS]
    return _OWN_COLORS | {name: place % len(_COLORS) for place, name in enumerate(others, start=len(_OWN_COLORS))}


def _add_legend(figure: Figure, handles: list[Any], titles: list[str]) -> None:
    """A legend above the panels, in as many columns as there is room for."""
    labels = [_plain_text(title if len(title) <= 60 else title[:57] + "...") for title in titles]
    widest = 0.07 * max(map(len, labels)) + 0.65  # inches, at this size of the letters
    side_by_side = sum(0.07 * len(label) + 0.65 for label in labels) < figure.get_figwidth()
    columns = len(labels) if side_by_side else max(1, int(figure.get_figwidth() / widest))
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def _plain_text(text: str) -> str:
    """Text that matplotlib neither reads as mathematics nor hides, as it does with labels that begin with `_`."""
    return (" " if text.startswith("_") else "") + printable(text, lines=True).replace("$", r"\$")


def _label_axes(panel: Axes, label: str, title: str) -> None:
    """Titles, no lines that say nothing, and light ones to read values by."""
    panel.set_ylabel(label)
    panel.set_title(title, fontsize=10)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(axis="x", length=0)
    panel.yaxis.grid(True, color="#DDDDDD", linewidth=0.6)
    panel.set_axisbelow(True)
