"""`quantkd verify`: is every byte of a transfer set what it was when it was written?"""

from __future__ import annotations

from collections.abc import Sequence

from quantkd.cli.format import format_bytes
from quantkd.cli.parsing import plain_parser
from quantkd.transfer_set import verify

_EXAMPLES = """examples:
  quantkd verify runs/set
  quantkd verify runs/set --allow_incomplete
"""


def main(argv: Sequence[str]) -> None:
    """Check digests, structure and every row; the first thing that is wrong is named, and the exit code is 1."""
    parser = plain_parser("quantkd verify", _EXAMPLES)
    parser.add_argument("path", help="folder of the transfer set")
    parser.add_argument("--allow_incomplete", action="store_true", help="check the committed part of an unfinished set")
    args = parser.parse_args(argv)
    found = verify(args.path, allow_incomplete=args.allow_incomplete)
    print(f"{args.path}: {found.shards} shards, {found.rows} rows, {format_bytes(found.num_bytes)}, all as written.")
    print(f"digest {found.digest}")
