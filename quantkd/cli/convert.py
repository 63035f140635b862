"""`quantkd convert`: a transfer set with fewer entries, or one from the table of another toolkit."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from quantkd.cli.format import format_info, say
from quantkd.cli.parsing import plain_parser
from quantkd.transfer_set import TransferSet, convert
from quantkd.transfer_set.rules import parse_storage_rule

_EXAMPLES = """examples:
  quantkd convert runs/set runs/small --storage nucleus:0.9
  quantkd convert --from distillkit captured/ runs/set --model meta-llama/Llama-3.1-8B-Instruct
  quantkd convert --from axolotl last_run_prepared/0123abcd runs/set --model meta-llama/Llama-3.1-8B-Instruct
"""


def main(argv: Sequence[str]) -> None:
    """Trim a set or import a table, and print what the new set holds."""
    parser = plain_parser("quantkd convert", _EXAMPLES)
    parser.add_argument("source", help="folder of the transfer set; with --from a Parquet file, or a folder of them")
    parser.add_argument("destination", help="folder of the new one")
    parser.add_argument("--storage", help="rule to trim the entries to, such as nucleus:0.9")
    toolkits = ["axolotl", "distillkit"]
    parser.add_argument("--from", dest="toolkit", choices=toolkits, help="import that toolkit's table of the teacher")
    parser.add_argument("--model", help="with --from: the teacher that made the table; only its tokenizer is loaded")
    parser.add_argument("--revision", help="with --from: branch, tag or commit of the teacher")
    args = parser.parse_args(argv)
    if args.toolkit:
        if not args.model or args.storage:
            parser.error("--from needs --model, and takes no --storage: convert the imported set to trim it")
        _import_table(args)
    elif not args.storage or args.model or args.revision:
        parser.error("a transfer set is converted with --storage, and without --model and --revision")
    else:
        convert(args.source, args.destination, parse_storage_rule(args.storage))
    say(f"{args.destination}\n{format_info(TransferSet.open(args.destination).info)}")


def _import_table(args: argparse.Namespace) -> None:
    """Ask the teacher's checkpoint for what its table does not say, and import."""
    from transformers import AutoConfig

    from quantkd.names import load_tokenizer, naming, public_name
    from quantkd.transfer_set.fingerprint import compute_fingerprint
    from quantkd.transfer_set.importers import import_table

    with naming(args.model):
        config = AutoConfig.from_pretrained(args.model, revision=args.revision)
    tokenizer = load_tokenizer(args.model, revision=args.revision)
    facts = {"teacher_name": public_name(args.model), "tokenizer_fingerprint": compute_fingerprint(tokenizer)}
    vocab_size = config.get_text_config().vocab_size
    import_table(args.source, args.destination, toolkit=args.toolkit, vocab_size=vocab_size, **facts)
