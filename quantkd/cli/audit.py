"""`quantkd audit`: does a transfer set hold what its teacher says?"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from quantkd.cli.parsing import plain_parser, whole_number

_EXAMPLES = """examples:
  quantkd audit runs/set --teacher HuggingFaceTB/SmolLM2-135M-Instruct
  quantkd audit runs/set --teacher MODEL --rows 200 --seed 4711

A sample of the rows is computed again with the teacher. Exits with 1 if any differs by more than rounding does.
"""


def main(argv: Sequence[str]) -> None:
    """Compute rows again and print how near the stored ones are."""
    parser = plain_parser("quantkd audit", _EXAMPLES)
    parser.add_argument("transfer_set", help="folder of the set")
    parser.add_argument("--teacher", required=True, help="the teacher, from a source that you trust")
    parser.add_argument("--revision", help="its branch, tag or commit; the one that the set names if it names one")
    parser.add_argument("--rows", type=whole_number(1), default=32, help="how many rows (default: 32)")
    parser.add_argument("--seed", type=int, default=0, help="which rows")
    parser.add_argument("--tolerance", type=float, default=0.01, help="mean KL of a row, nats a token (default: 0.01)")
    parser.add_argument("--dtype", help="the teacher's dtype; the one that the set names if not given")
    parser.add_argument("--batch_size", type=whole_number(1), default=4, help="rows a batch")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code from the teacher's repository")
    args = parser.parse_args(argv)

    from quantkd.evaluation.audit import audit
    from quantkd.teacher import load_teacher
    from quantkd.transfer_set import TransferSet
    from quantkd.transfer_set.fingerprint import check_fingerprint

    transfer_set = TransferSet.open(args.transfer_set)
    info = transfer_set.info
    kwargs = {"revision": args.revision or info.teacher_revision} if args.revision or info.teacher_revision else {}
    model, tokenizer = load_teacher(
        args.teacher, dtype=args.dtype or info.teacher_dtype, trust_remote_code=args.trust_remote_code, **kwargs
    )
    check_fingerprint(info.tokenizer_fingerprint, tokenizer, what=f"The transfer set at {args.transfer_set}")
    found = audit(
        transfer_set,
        model,
        num_rows=args.rows,
        seed=args.seed,
        tolerance=args.tolerance,
        batch_size=args.batch_size,
    )
    worst = max(range(len(found.rows)), key=lambda place: found.kl[place])
    print(f"rows        {len(found.rows)} of {len(transfer_set)}, drawn with seed {args.seed}")
    mean = sum(found.kl) / len(found.kl)
    print(f"KL          {mean:.2g} nats a token on average, {found.kl[worst]:.2g} at worst, row {found.rows[worst]}")
    print(f"top token   the same at {sum(found.agreement) / len(found.agreement):.1%} of the positions")
    if found.greedy is not None:
        print(f"greedy      {found.greedy:.1%} of the answers' tokens are the most probable ones")
    if found.passed:
        print(f"passed: no row differs by more than {found.tolerance} nats a token")
        return
    print(
        f"FAILED: {len(found.suspects)} rows differ by more than {found.tolerance} nats a token"
        + (f", first row {found.suspects[0]}" if found.suspects else "; the answers are not the teacher's greedy ones")
        + ". Another teacher, revision or dtype than the set names, or the set was changed.",
        file=sys.stderr,
    )
    raise SystemExit(1)
