"""How large the index of a set is, and how long it takes to open, by the number of shards.

The plans are made up, and so are the records: numbers of the size that a billion response tokens have. Bytes are those
of `index.json`; `bytes_per_shard` is the slope between the smallest and the largest. Seconds are for reading and
checking it, the best of five.

    python benchmarks/index.py

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
import time
from pathlib import Path

from quantkd.transfer_set import Plan
from quantkd.transfer_set.codec import ShardSize
from quantkd.transfer_set.index import INDEX_NAME, Index, ShardRecord, read_index


def make_index(shards: int, rows: int, prompt_tokens: int, response_tokens: int, entries: int) -> Index:
    """The index of a finished set of `shards` full shards."""
    plan = Plan(
        teacher_name="made-up/Teacher-70B-Instruct",
        teacher_revision="0" * 40,
        teacher_dtype="bfloat16",
        tokenizer_fingerprint=hashlib.sha256(b"tokenizer").hexdigest(),
        vocab_size=128_256,
        storage={"kind": "nucleus", "p": 0.95, "max_k": 64},
        temperatures=(1.0, 2.0),
        responses="generate",
        generation={"chat_template": True, "do_sample": False, "max_new_tokens": 2048, "seed": 0},
        prompts_digest=hashlib.sha256(b"prompts").hexdigest(),
        num_prompts=shards * rows,
        rows_per_shard=rows,
        batch_size=8,
    )
    targets = rows * response_tokens
    size = ShardSize(
        rows=rows, tokens=rows * prompt_tokens + targets, spans=rows, targets=targets, entries=targets * entries,
        blocks=-(-rows // 8), bytes=targets * entries * 3,
    )  # fmt: skip
    records = [
        ShardRecord(size, hashlib.sha256(str(shard).encode()).hexdigest(), {"responses_cut": 3})
        for shard in range(shards)
    ]
    return Index.from_records(plan, records)


def main() -> None:
    """Write, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, nargs="+", default=[16, 977, 4096, 8192], help="ascending")
    parser.add_argument("--rows_per_shard", type=int, default=1024)
    parser.add_argument("--prompt_tokens", type=int, default=100)
    parser.add_argument("--response_tokens", type=int, default=1000)
    parser.add_argument("--entries", type=int, default=6)
    args = parser.parse_args()
    sizes, seconds = {}, {}
    for shards in args.shards:
        index = make_index(shards, args.rows_per_shard, args.prompt_tokens, args.response_tokens, args.entries)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / INDEX_NAME
            path.write_bytes(index.to_bytes())
            sizes[shards] = path.stat().st_size
            taken = []
            for _ in range(5):
                began = time.perf_counter()
                read_index(Path(folder))
                taken.append(time.perf_counter() - began)
            seconds[shards] = min(taken)
        print(f"{shards:>6} shards: {sizes[shards]:>9,} bytes, read in {seconds[shards] * 1000:.1f} ms")
    first, last = args.shards[0], args.shards[-1]
    slope = (sizes[last] - sizes[first]) / max(last - first, 1)
    print(json.dumps({"bytes_per_shard": round(slope, 1), "bytes": sizes, "seconds": seconds}))


if __name__ == "__main__":
    main()
