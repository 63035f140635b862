"""`quantkd push`: an adapter or a transfer set to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantkd.cli.format import format_bytes, say
from quantkd.cli.parsing import plain_parser
from quantkd.errors import ConfigError
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.index import INDEX_NAME, PLAN_NAME

_EXAMPLES = """examples:
  quantkd push runs/student user/name --license apache-2.0         an adapter, with its page and its run's report
  quantkd push runs/mine user/name --base_model user/model         after --no_calibrate on a folder: its name on the Hub
  quantkd push runs/set user/name-set                              a transfer set
  quantkd push runs/set user/name-set --public --license mit
  quantkd push runs/set user/name-set --dry_run                    list what would go, and stop

The token is that of `hf auth login`, or HF_TOKEN. After a failure, the same command goes on where it stopped.
"""


def main(argv: Sequence[str]) -> None:
    """Push what is in the folder, or list what would be pushed."""
    parser = plain_parser("quantkd push", _EXAMPLES)
    parser.add_argument("path", help="folder of an adapter, of a run with one adapter, or of a transfer set")
    parser.add_argument("repo_id", help="repository on the Hub, user/name; made if it is not there")
    public = "readable by all, not by its owner alone; needed for a repository that is public"
    parser.add_argument("--public", dest="private", action="store_false", help=public)
    parser.add_argument("--license", help="short name of the Hub's list, such as apache-2.0; never guessed")
    parser.add_argument("--base_model", help="adapter: the base model's name on the Hub, if it was trained on a folder")
    parser.add_argument("--run_dir", help="adapter: folder of the run whose results.json and chart go on the page")
    parser.add_argument("--revision", help="branch to push to (main)")
    parser.add_argument("--dry_run", action="store_true", help="list the files that would be pushed, and stop")
    args = parser.parse_args(argv)
    folder = Path(args.path)
    is_set = (folder / INDEX_NAME).is_file() or (folder / PLAN_NAME).is_file()
    if is_set and (args.base_model or args.run_dir):
        raise ConfigError(f"{folder} is a transfer set; --base_model and --run_dir describe adapters. Leave them out.")
    from quantkd.hub import adapters, sets
    from quantkd.hub.cards import check_license

    check_license(args.license)
    options = {"private": args.private, "license": args.license, "revision": args.revision}
    described = {} if is_set else {"base_model": args.base_model, "run_dir": args.run_dir}
    source: Any = TransferSet(folder) if is_set else folder
    if not args.dry_run:
        push: Any = sets.push_transfer_set if is_set else adapters.push_adapter
        say(push(source, args.repo_id, **options, **described))
        return
    files = sets.list_set_files(source) if is_set else adapters.list_adapter_files(source, **described)
    for name, size in files:
        say(f"{format_bytes(size):>12}  {name}")
    total = format_bytes(sum(size for _, size in files))
    say(f"{len(files)} files, {total}, would go to {args.repo_id} ({'private' if args.private else 'public'}).")
