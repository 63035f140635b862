"""What a start of the adapters gives back before the first step: zero, LoftQ, and the one that looks at the inputs.

An NF4 student gets LoRA on all linear layers at each start and rank, from rows of a transfer set (the teacher's own
answers), and is compared with the teacher on held-out rows. `recovered` is the share of the zero start's KL that is
gone. Seconds are those of the start alone, the forward pass over its rows included; loading is not.

    python benchmarks/initialization.py

Two domains, GSM8K and the built-in word problems. Transfer sets are captured once and kept in `--cache`.

The last line is one JSON object: `gap_recovered_rank16`, the least over the domains, and `seconds`, the most, both of
the covariance start at rank 16 with the most rows.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _sources import add_sources, find_gsm8k, parse

from quantkd import GenerationSettings, Nucleus, TransferSet, capture
from quantkd.data.arithmetic import generate_problems
from quantkd.data.gsm8k import build_prompt, load_gsm8k
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.models.initialization import SHRINKAGE, draw_rows, initialize_from_error
from quantkd.models.network import base_network
from quantkd.models.original_weights import OriginalWeights
from quantkd.models.student import attach_lora, default_lora_config, load_student
from quantkd.teacher import load_teacher


def load_sets(domain: str, args: argparse.Namespace) -> tuple[TransferSet, TransferSet]:
    """Rows to start from and held-out rows, captured if they are not in the cache."""
    folders = [Path(args.cache) / f"{domain}-{part}" for part in ("train", "held_out")]
    counts = (max(args.rows), args.held_out_rows)
    if not all((folder / "index.json").is_file() for folder in folders):
        if domain == "gsm8k":
            rows = load_gsm8k(find_gsm8k(args.gsm8k), "train", limit=sum(counts))
        else:
            rows = generate_problems(sum(counts), seed=0)
        teacher, tokenizer = load_teacher(args.model)
        prompts = [build_prompt(row["question"]) for row in rows]
        for folder, part in zip(folders, (prompts[: counts[0]], prompts[counts[0] :]), strict=True):
            capture(
                teacher,
                part,
                folder,
                tokenizer=tokenizer,
                storage=Nucleus(0.95, max_k=64),
                generation=GenerationSettings(max_new_tokens=256),
            )
    train, held_out = (TransferSet.open(folder) for folder in folders)
    return train, held_out[: args.held_out_rows]


def measure(domain: str, student: Any, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each start, rank and number of rows."""
    train, held_out = load_sets(domain, args)
    zero = None
    for rank in args.ranks:
        model = attach_lora(student, default_lora_config(rank))
        weights = OriginalWeights(args.model, base_network(model))
        if zero is None:
            zero = evaluate_fidelity(model, held_out).means["kl"]
            yield {"domain": domain, "start": "zero", "rank": "any", "rows": 0, "tokens": 0, "kl": zero, "seconds": 0.0}
        for start in args.starts:
            for rows in args.rows if start == "covariance" else (0,):
                drawn = draw_rows(train, rows, seed=0) if rows else None
                for name, parameter in model.named_parameters():
                    if ".lora_B." in name:
                        parameter.data.zero_()
                began = time.perf_counter()
                initialize_from_error(model, weights, drawn, shrinkage=args.shrinkage)
                yield {
                    "domain": domain, "start": start, "rank": rank, "rows": rows,
                    "tokens": int(drawn.attention_mask.sum()) if drawn else 0, "seconds": time.perf_counter() - began,
                    "kl": evaluate_fidelity(model, held_out).means["kl"],
                }  # fmt: skip
        student = model.unload()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_sources(parser)
    parser.add_argument("--cache", default="runs/initialization", help="folder that keeps the transfer sets")
    parser.add_argument("--domains", nargs="+", choices=("gsm8k", "arithmetic"), default=["gsm8k", "arithmetic"])
    parser.add_argument("--starts", nargs="+", choices=("loftq", "covariance"), default=["loftq", "covariance"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[4, 16, 32, 64])
    parser.add_argument("--rows", nargs="+", type=int, default=[64], help="numbers of rows that covariance looks at")
    parser.add_argument("--held_out_rows", type=int, default=32)
    parser.add_argument("--shrinkage", type=float, default=SHRINKAGE)
    args = parse(parser)
    print("| Domain | Start | Rank | Rows | Tokens | KL | Recovered | Seconds |\n" + "| --- " * 8 + "|", flush=True)
    headline = []
    for domain in args.domains:
        zero = 0.0
        for found in measure(domain, load_student(args.model), args):
            zero = found["kl"] if found["start"] == "zero" else zero
            recovered = 1 - found["kl"] / zero
            print(
                f"| {found['domain']} | {found['start']} | {found['rank']} | {found['rows']} | {found['tokens']} "
                f"| {found['kl']:.4f} | {recovered:.1%} | {found['seconds']:.1f} |",
                flush=True,
            )
            if (found["start"], found["rank"], found["rows"]) == ("covariance", 16, max(args.rows)):
                headline.append((recovered, found["seconds"]))
    recovered, seconds = zip(*headline, strict=True) if headline else ((float("nan"),), (float("nan"),))
    print(json.dumps({"gap_recovered_rank16": min(recovered), "seconds": max(seconds)}))


if __name__ == "__main__":
    main()
