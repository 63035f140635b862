"""From evaluated arms to a page: results.json, report.md and a bar chart."""

from __future__ import annotations

import json
from pathlib import Path

from quantkd.files import write_file
from quantkd.report.page import format_table, render_page
from quantkd.report.results import compute_results, load_arms

__all__ = ["build_report", "compute_results", "format_table", "load_arms"]


def build_report(run_dir: str | Path) -> Path:
    """Compare the arms of a run and write `results.json`, `report.md` and its charts beside them.

    The same arms give the same bytes, so a report can be checked by building it again.

    Args:
        run_dir: a folder that holds `evaluation/<arm>.json`, for any set of arms. A share of the gap needs teacher and
            before.

    Returns:
        The path of report.md; `format_table` prints results.json on a terminal.

    Raises:
        DataError: no arms, a malformed one, or arms evaluated on different items.
    """
    from quantkd.report import figures  # matplotlib takes a second to import

    run_dir = Path(run_dir)
    results = compute_results(load_arms(run_dir / "evaluation"))
    text = json.dumps(results, indent=2, sort_keys=True, allow_nan=False, ensure_ascii=False)
    write_file(run_dir / "results.json", text + "\n")
    charts = {"gap.png": figures.draw_bars, "kl_bins.png": figures.draw_breakdown, "kl_bits.png": figures.draw_bits}
    drawn = {name: figure for name, draw in charts.items() if (figure := draw(results))}
    for name in charts:
        if name in drawn:
            figures.save_figure(drawn[name], run_dir / name)
        else:
            (run_dir / name).unlink(missing_ok=True)  # an older one
    write_file(run_dir / "report.md", render_page(results, *(name if name in drawn else None for name in charts)))
    return run_dir / "report.md"
