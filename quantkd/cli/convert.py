"""`quantkd convert`: a transfer set in another profile, smaller or the same."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from quantkd.cli.format import format_info
from quantkd.storage import parse_storage_rule
from quantkd.transfer_set import PROFILES, TransferSet, convert

__all__ = ["main"]

_EXAMPLES = """examples:
  quantkd convert runs/set runs/small --profile compact
  quantkd convert runs/set runs/other --profile faithful --storage nucleus:0.9
"""


def main(argv: Sequence[str]) -> None:
    """Re-encode a set, and print what the new one holds.

    Args:
        argv: the arguments after `quantkd convert`.
    """
    parser = argparse.ArgumentParser(
        "quantkd convert", epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder of the transfer set")
    parser.add_argument("destination", help="folder of the new one")
    parser.add_argument("--profile", required=True, choices=list(PROFILES), help="precision of the new one")
    parser.add_argument(
        "--storage", help="rule to trim the entries to, such as nucleus:0.9; the profile's own if not given"
    )
    args = parser.parse_args(argv)
    rule = parse_storage_rule(args.storage) if args.storage else None
    convert(args.source, args.destination, args.profile, rule)
    print(f"{args.destination}\n{format_info(TransferSet.open(args.destination).info)}")
