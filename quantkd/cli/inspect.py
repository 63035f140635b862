"""`quantkd inspect`: what a transfer set holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from quantkd.cli.format import format_histograms, format_info
from quantkd.cli.parsing import plain_parser, whole_number
from quantkd.report.histograms import compute_histograms
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
    parser.add_argument(
        "--alternatives", type=whole_number(0), default=3, help="teacher's entries to show of each token (3)"
    )
    parser.add_argument("--tokenizer", help="the teacher's tokenizer, to show text; without it ids are shown")
    parser.add_argument("--allow_incomplete", action="store_true", help="show the committed part of an unfinished set")
    args = parser.parse_args(argv)
    transfer_set = TransferSet.open(args.path, allow_incomplete=args.allow_incomplete)
    decode = _decoder(args.tokenizer, transfer_set)
    rows = [
        _describe(transfer_set[index], decode, args.tokens, args.alternatives)
        for index in range(min(args.rows, len(transfer_set)))
    ]
    histograms = compute_histograms(transfer_set)
    if args.json:
        counts = {"entries": histograms.entries.tolist(), "entropy": histograms.entropy.tolist()}
        print(json.dumps({**asdict(transfer_set.info), "histograms": counts, "sample": rows}, sort_keys=True))
        return
    print(format_info(transfer_set.info))
    print(f"\n{format_histograms(histograms)}")
    if args.tokenizer is None and rows:
        print("\nTokens are shown as ids; name the teacher's tokenizer with --tokenizer to see text.")
    for number, row in enumerate(rows):
        print(f"\nrow {number}: {row['prompt_tokens']} prompt tokens, {row['response_tokens']} response tokens")
        print(f"  prompt    {_quote(row['prompt'], 300)}\n  response  {_quote(row['response'], 300)}")
        for token in row["tokens"]:
            others = "  ".join(f"{_quote(entry['token'], 24)} {entry['probability']:.3f}" for entry in token["entries"])
            print(f"  {_quote(token['token'], 24):<20} {others}  tail {token['tail']:.3f}")


def _describe(row: dict[str, Any], decode: Any, tokens: int, alternatives: int) -> dict[str, Any]:
    """Prompt, response, and the entries of the first tokens, most probable first."""
    is_target = row["labels"] != IGNORE_INDEX
    response, teacher = row["input_ids"][is_target].tolist(), row["teacher"]
    logprobs, tail = teacher.at_temperature(1.0)
    shown = []
    for place in range(min(tokens, len(response))):
        entries = slice(int(teacher.offsets[place]), int(teacher.offsets[place + 1]))
        pairs = sorted(
            zip(teacher.token_ids[entries].tolist(), logprobs[entries].exp().tolist(), strict=True),
            key=lambda pair: -pair[1],
        )
        shown.append(
            {
                "token": decode([response[place]]),
                "entries": [{"token": decode([i]), "id": i, "probability": p} for i, p in pairs[:alternatives]],
                "tail": float(tail[place]),
            }
        )
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
    """Printable on a terminal: control characters, which a stranger's set could abuse, are escaped."""
    quoted = json.dumps(text, ensure_ascii=False)
    quoted = "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in quoted)
    return quoted if len(quoted) <= width else quoted[: width - 2] + '…"'
