"""`quantkd report`: evaluated arms side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quantkd.cli.format import say, say_results
from quantkd.cli.parsing import plain_parser
from quantkd.report import build_report

_EXAMPLES = """examples:
  quantkd report runs/x     reads runs/x/evaluation/*.json, writes report.md, results.json and gap.png
"""


def main(argv: Sequence[str]) -> None:
    """Build the report of a run and print its table."""
    parser = plain_parser("quantkd report", _EXAMPLES)
    parser.add_argument("run_dir", help="folder whose evaluation/ holds what `quantkd evaluate` wrote")
    args = parser.parse_args(argv)
    page = build_report(args.run_dir)
    say_results(Path(args.run_dir))
    say(f"\nThe report is {page}.")
