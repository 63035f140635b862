"""`quantkd inspect`: what a transfer set holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from quantkd.cli.format import format_info, say
from quantkd.cli.parsing import plain_parser, whole_number
from quantkd.errors import printable
from quantkd.report.histograms import Histograms, compute_histograms
from quantkd.transfer_set import IGNORE_INDEX, TransferSet

_EXAMPLES = """examples:
  quantkd inspect runs/set
  quantkd inspect runs/set --rows 2 --tokens 10 --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct
  quantkd inspect runs/set --json
"""


def main(argv: Sequence[str]) -> None:
    """Print a set's facts and, given its tokenizer, a few rows with the teacher's top alternatives."""
    parser = plain_parser("quantkd inspect", _EXAMPLES)
    parser.add_argument("path", help="folder of the transfer set")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--rows", type=whole_number(0), default=3, help="rows to show (3)")
    parser.add_argument("--tokens", type=whole_number(0), default=12, help="response tokens to show of each (12)")
    parser.add_argument("--alternatives", type=whole_number(0), default=3, help="entries to show of each token (3)")
    parser.add_argument("--tokenizer", help="the teacher's tokenizer, to show text; without it ids are shown")
    parser.add_argument("--allow_incomplete", action="store_true", help="show the committed part of an unfinished set")
    args = parser.parse_args(argv)
    transfer_set = TransferSet.open(args.path, allow_incomplete=args.allow_incomplete)
    decode = _decoder(args.tokenizer, transfer_set)
    shown = range(min(args.rows, len(transfer_set)))
    rows = [_describe(transfer_set[index], decode, args.tokens, args.alternatives) for index in shown]
    histograms = compute_histograms(transfer_set)
    if args.json:
        counts = {"entries": histograms.entries.tolist(), "entropy": histograms.entropy.tolist()}
        say(json.dumps({**asdict(transfer_set.info), "histograms": counts, "sample": rows}, sort_keys=True))
        return
    say(f"{format_info(transfer_set.info)}\n")
    _print_histograms(histograms)
    if args.tokenizer is None and rows:
        say("\nTokens are shown as ids; name the teacher's tokenizer with --tokenizer to see text.")
    for number, row in enumerate(rows):
        say(f"\nrow {number}: {row['prompt_tokens']} prompt tokens, {row['response_tokens']} response tokens")
        say(f"  prompt    {_quote(row['prompt'], 300)}\n  response  {_quote(row['response'], 300)}")
        for token in row["tokens"]:
            others = "  ".join(f"{_quote(entry['token'], 24)} {entry['probability']:.3f}" for entry in token["entries"])
            say(f"  {_quote(token['token'], 24):<20} {others}  tail {token['tail']:.3f}")


def _print_histograms(histograms: Histograms) -> None:
    """Entries and entropy per response token as bars."""
    entries, quarters = histograms.entries, histograms.entropy  # of a nat
    entropy = np.add.reduceat(quarters, np.arange(0, len(quarters), 4))
    pairs = [pair for pair in pairwise([1, 2, 3, 5, 9, 17, 33, len(entries)]) if pair[0] < pair[1]]
    kept = {f"{low}" if high == low + 1 else f"{low}-{high - 1}": entries[low:high].sum() for low, high in pairs}
    nats = {f"{low}-{low + 1} nats": count for low, count in enumerate(entropy) if count}
    kinds = (("entries per token", kept), ("the teacher's entropy, the tail counted as one token", nats))
    for title, counts in kinds:
        say(f"  {title}")
        for name, count in counts.items():
            share = count / max(sum(counts.values()), 1)
            say(f"    {name:<10} {share:6.1%}  {'#' * round(40 * share)}")


def _describe(row: dict[str, Any], decode: Any, tokens: int, alternatives: int) -> dict[str, Any]:
    """Prompt, response, and the entries of the first tokens, most probable first."""
    is_target = row["labels"] != IGNORE_INDEX
    response, teacher = row["input_ids"][is_target].tolist(), row["teacher"]
    logprobs, tail = teacher.at_temperature(1.0)
    shown = []
    for place, token in enumerate(response[:tokens]):
        entries = slice(int(teacher.offsets[place]), int(teacher.offsets[place + 1]))
        pairs = zip(teacher.token_ids[entries].tolist(), logprobs[entries].exp().tolist(), strict=True)
        likely = sorted(pairs, key=lambda pair: -pair[1])[:alternatives]
        alike = [{"token": decode([i]), "id": i, "probability": p} for i, p in likely]
        shown.append({"token": decode([token]), "entries": alike, "tail": float(tail[place])})
    return {
        "prompt": decode(row["input_ids"][~is_target].tolist()),
        "response": decode(response),
        "prompt_tokens": int((~is_target).sum()),
        "response_tokens": len(response),
        "finished": row["finished"],
        "tokens": shown,
    }


def _decoder(name: str | None, transfer_set: TransferSet) -> Any:
    if name is None:
        return lambda ids: " ".join(map(str, ids))
    from quantkd.names import load_tokenizer
    from quantkd.transfer_set.fingerprint import check_fingerprint

    tokenizer = load_tokenizer(name)
    check_fingerprint(transfer_set.info.tokenizer_fingerprint, tokenizer, what="The transfer set")
    return tokenizer.decode


def _quote(text: str, width: int) -> str:
    """In quotes, with control characters as escapes, and cut."""
    quoted = printable(json.dumps(text, ensure_ascii=False))
    return quoted if len(quoted) <= width else quoted[: width - 2] + '…"'
