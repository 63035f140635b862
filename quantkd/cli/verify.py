"""`quantkd verify`: is every byte of a transfer set as it was written, and do its rows hold what their teacher says?"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence

from quantkd.cli.format import format_bytes, say
from quantkd.cli.parsing import plain_parser, whole_number
from quantkd.errors import ConfigError, refuse_unused
from quantkd.transfer_set import IGNORE_INDEX, TransferSet, verify

_EXAMPLES = """examples:
  quantkd verify runs/set
  quantkd verify runs/set --allow_incomplete
  quantkd verify runs/set --teacher HuggingFaceTB/SmolLM2-135M-Instruct
  quantkd verify runs/set --teacher MODEL --rows 200 --seed 4711

With --teacher, a sample of the rows is also computed again with it: poisoned distributions are as well formed as any
others. Exits with 1 if anything is wrong.
"""
# Nats. In bfloat16, logits of 16 to 32 are an eighth apart: two such may change places in a second pass.
_TIE = 0.25
_LEAST_GREEDY = 0.99


def main(argv: Sequence[str]) -> None:
    """Check digests, structure and every row; the first thing that is wrong is named."""
    parser = plain_parser("quantkd verify", _EXAMPLES)
    parser.add_argument("path", help="folder of the transfer set")
    parser.add_argument("--allow_incomplete", action="store_true", help="check the committed part of an unfinished set")
    parser.add_argument("--teacher", help="also compute rows again with the teacher, from a source that you trust")
    parser.add_argument("--revision", help="its branch, tag or commit; the one that the set names if it names one")
    parser.add_argument("--rows", type=whole_number(1), default=32, help="how many rows to compute again (32)")
    parser.add_argument("--seed", type=int, default=0, help="which rows (0)")
    parser.add_argument("--tolerance", type=float, default=0.01, help="nats per token that a row may differ by (0.01)")
    parser.add_argument("--dtype", help="the teacher's dtype; the one that the set names if not given")
    parser.add_argument("--batch_size", type=whole_number(1), default=4, help="rows per batch (4)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code from the teacher's repository")
    args = parser.parse_args(argv)
    defaults = {name: parser.get_default(name) for name in vars(args)}
    refuse_unused(args, {"teacher": "revision rows seed tolerance dtype batch_size trust_remote_code"}, defaults)
    found = verify(args.path, allow_incomplete=args.allow_incomplete)
    say(f"{args.path}: {found.shards} shards, {found.rows} rows, {format_bytes(found.num_bytes)}, all as written.")
    say(f"digest {found.digest}")
    if args.teacher:
        _compute_again(TransferSet.open(args.path, allow_incomplete=args.allow_incomplete), args)


def _compute_again(transfer_set: TransferSet, args: Namespace) -> None:
    """Compare a random sample of the rows with what the teacher says now, and exit with 1 if they differ."""
    # n rows without a difference: with 95% confidence at most 3 / n of all are wrong (Hanley and Lippman-Hand 1983).
    import numpy as np

    from quantkd.evaluation.fidelity import evaluate_fidelity
    from quantkd.teacher import load_teacher
    from quantkd.transfer_set.fingerprint import check_fingerprint

    info = transfer_set.info
    if info.storage["kind"] == "sampled":
        raise ConfigError(
            "The set stores sampled entries, random draws that a second computation does not repeat; expected nucleus "
            "or topk entries. Capture the sample again and compare digests."
        )
    revision = args.revision or info.teacher_revision
    named = {"revision": revision} if revision else {}
    named["trust_remote_code"] = args.trust_remote_code
    model, tokenizer = load_teacher(args.teacher, dtype=args.dtype or info.teacher_dtype, **named)
    check_fingerprint(info.tokenizer_fingerprint, tokenizer, what=f"The transfer set at {args.path}")
    rows = np.sort(np.random.default_rng(args.seed).permutation(len(transfer_set))[: args.rows])
    sample = transfer_set.select(rows.tolist())
    sums = evaluate_fidelity(model, sample, batch_size=args.batch_size).columns
    kl = sums["kl_sum"] / sums["tokens"]
    say(f"rows        {len(rows)} of {len(transfer_set)}, drawn with seed {args.seed}")
    worst = kl.argmax()
    say(f"KL          {kl.mean():.2g} nats per token on average, {kl[worst]:.2g} in the worst row, {rows[worst]}")
    say(f"top token   the same at {sums['agree'].sum() / sums['tokens'].sum():.1%} of the positions")
    greedy = 1.0
    if info.responses == "generate" and not info.generation.get("do_sample"):
        greedy = _greedy_share(sample)
        say(f"greedy      {greedy:.1%} of the answers' tokens are the most probable ones")
    wrong = rows[~(kl <= args.tolerance)]
    if not len(wrong) and greedy >= _LEAST_GREEDY:
        say(f"passed: no row differs by more than {args.tolerance} nats per token")
        return
    say(
        f"FAILED: {len(wrong)} rows differ by more than {args.tolerance} nats per token"
        + (f", the first is row {wrong[0]}" if len(wrong) else "; the answers are not the teacher's greedy ones")
        + ". Another teacher, revision or dtype than the set names, or the set was changed.",
        file=sys.stderr,
    )
    raise SystemExit(1)


def _greedy_share(sample: TransferSet) -> float:
    """The share of response tokens that are the stored most probable one, or tie with it."""
    greedy, tokens = 0, 0
    for row in sample:
        answer, teacher = row["input_ids"][row["labels"] != IGNORE_INDEX], row["teacher"]
        entries = teacher.positions
        behind = teacher.logprobs[teacher.offsets[:-1]][entries] - teacher.logprobs
        greedy += int(((teacher.token_ids == answer[entries]) & (behind <= _TIE)).sum())
        tokens += len(answer)
    return greedy / tokens
