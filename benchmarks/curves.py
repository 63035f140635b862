"""How the KL that training leaves falls with rows, epochs, rank and learning rates, and what of it is the start's.

The arms are those of recovery.py: the start on calibrated codes, before any step, and the same after training, by seed.
One of rows, epochs and rank is varied at a time; codes and start see the rows that training sees, at most 256 of them
for the codes. `--all_rates` varies the learning rates of adapters and of constants and norms together, as factors of
theirs; with `--choose` on training questions that no table reports, which is how defaults are chosen. The base
is recovery.py's default, and its arms are found again where --cache is that of recovery.py.

    python benchmarks/curves.py

The table is Markdown, curves.png is in --cache. The last line is one JSON object: by point, the KL gap that start and
trained student recover, and `training_share_of_rest`, from the mean over seeds, each with its 95% interval over rows.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from _sources import parse
from matplotlib.figure import Figure
from recovery import build_parser, cached_arm, capture_sets, gap_recovered, join_seeds, training_share

ROWS, EPOCHS, RANKS = (32, 64, 128, 256, 1000), (1, 2, 4), (4, 16, 64)
RATES = ("learning_rate", "scales_learning_rate")


def list_points(args: argparse.Namespace) -> dict[str, list[argparse.Namespace]]:
    """The settings of every point, by what varies: what has one value does not."""
    varied = {"rows": args.all_rows, "epochs": args.all_epochs, "rank": args.all_ranks, "rates": args.all_rates}

    def with_value(key: str, value: float) -> argparse.Namespace:
        rates = {name: getattr(args, name) * value for name in RATES} if key == "rates" else {}
        return argparse.Namespace(**{**vars(args), **rates, key: value})

    return {key: [with_value(key, value) for value in values] for key, values in varied.items() if len(values) > 1}


def measure_point(args: argparse.Namespace) -> dict[str, Any]:
    """What the start and training recover with these settings."""
    names = ["teacher", "before", "start", *(f"quantkd-{seed}" for seed in range(args.seeds))]
    arms = {name: cached_arm(name, args) for name in names}
    arms["trained"] = join_seeds(arms)
    found = {name: gap_recovered(arms, name) for name in ("start", "trained")}
    return {**found, "training_share_of_rest": training_share(arms["trained"], arms["start"])}


def draw(points: dict[str, dict[float, dict[str, Any]]]) -> Figure:
    """A panel for each setting: the KL gap recovered, by the start and after training."""
    figure = Figure(figsize=(1 + 3.5 * len(points), 3.8), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(points), sharey=True, squeeze=False)[0]
    for axes, (setting, found) in zip(panels, points.items(), strict=True):
        for name, style, color in (("start", "s--", "#5A5A5A"), ("trained", "o-", "#0072B2")):
            values = [100 * each[name][0] for each in found.values()]
            intervals = [[100 * bound for bound in each[name][1]] for each in found.values()]
            bounds = list(
                zip(*([v - low, high - v] for v, (low, high) in zip(values, intervals, strict=True)), strict=True)
            )
            label = "start, no step" if name == "start" else "after training"
            axes.errorbar(list(found), values, yerr=bounds, fmt=style, color=color, capsize=2, label=label)
        axes.set(xscale="log", xlabel=setting, xticks=list(found), xticklabels=[f"{each:g}" for each in found])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("KL gap recovered, %")
    panels[0].legend()
    return figure


def main() -> None:
    """Capture, run every point, print and draw."""
    parser = build_parser()
    parser.description = __doc__
    all_values = ("rows", int, ROWS), ("epochs", float, EPOCHS), ("ranks", int, RANKS), ("rates", float, (1.0,))
    for name, kind, values in all_values:
        parser.add_argument(f"--all_{name}", type=kind, nargs="+", default=values, help="to vary, the others at base")
    args = parse(parser)
    if not list_points(args):
        parser.error("Nothing varies; expected two values or more of one of --all_rows, _epochs, _ranks and _rates.")
    args.capture_rows = max(args.capture_rows, args.rows, *args.all_rows)
    capture_sets(args)
    points = {
        setting: {getattr(each, setting): measure_point(each) for each in settings}
        for setting, settings in list_points(args).items()
    }
    print("\n| | Start, no step | After training | Of the rest |\n| --- | --- | --- | --- |")
    for setting, found in points.items():
        for value, each in found.items():
            cells = (f"{share:.1%} [{low:.1%}, {high:.1%}]" for share, (low, high) in each.values())
            print(f"| {setting} {value:g} | {' | '.join(cells)} |")
    path = Path(args.cache) / "curves.png"
    draw(points).savefig(path)
    print(f"Picture: {path}")
    print(json.dumps({**points, "seeds": args.seeds, "held_out_rows": args.held_out_rows}))


if __name__ == "__main__":
    main()
