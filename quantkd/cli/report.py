"""`quantkd report`: evaluated arms side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from quantkd.cli.format import say
from quantkd.cli.parsing import plain_parser
from quantkd.report import build_report, format_table

_EXAMPLES = """examples:
  quantkd report runs/x     reads runs/x/evaluation/*.json, writes report.md, results.json and gap.png
"""


def main(argv: Sequence[str]) -> None:
    """Build the report of a run and print its table."""
    parser = plain_parser("quantkd report", _EXAMPLES)
    parser.add_argument("run_dir", help="folder whose evaluation/ holds what `quantkd evaluate` wrote")
    args = parser.parse_args(argv)
    page = build_report(args.run_dir)
    say(format_table(json.loads((Path(args.run_dir) / "results.json").read_text(encoding="utf-8"))))
    say(f"\nThe report is {page}.")
