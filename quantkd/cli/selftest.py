"""`quantkd selftest MODEL`: check loss, alignment and gradients on your own model."""

from __future__ import annotations

from collections.abc import Sequence

from quantkd.cli.format import say
from quantkd.cli.parsing import plain_parser
from quantkd.models.student import refuse_quantized
from quantkd.names import naming
from quantkd.teacher import load_teacher
from quantkd.training.selftest import run_selftest

_EXAMPLES = """examples:
  quantkd selftest HuggingFaceTB/SmolLM2-135M-Instruct
  quantkd selftest ./my-base-model --plain_prompts
"""


def main(argv: Sequence[str]) -> None:
    """Print one line per check; the exit code is 1 if one fails."""
    parser = plain_parser("quantkd selftest", _EXAMPLES)
    parser.add_argument("model", help="a Hub name or a checkpoint folder; loaded in float32")
    parser.add_argument("--plain_prompts", action="store_true", help="use no chat template, as for a base model")
    parser.add_argument("--revision", help="branch, tag or commit")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code from the model's repository")
    args = parser.parse_args(argv)
    kwargs = {"revision": args.revision} if args.revision else {}
    with naming(args.model):
        refuse_quantized(args.model, **kwargs)
    model, tokenizer = load_teacher(args.model, dtype="float32", trust_remote_code=args.trust_remote_code, **kwargs)
    failed = 0
    for check in run_selftest(model, tokenizer, chat_template=not args.plain_prompts):
        failed += not check.passed
        say(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.figure}", flush=True)
    if failed:
        raise SystemExit(1)
