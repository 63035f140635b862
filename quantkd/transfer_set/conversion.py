"""Re-encoding a transfer set in another profile, and telling its size before it is captured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from quantkd.transfer_set.codec import Codec
from quantkd.transfer_set.encoded import ShardSize
from quantkd.transfer_set.index import Index, ShardRecord
from quantkd.transfer_set.plan import Plan
from quantkd.transfer_set.profiles import PROFILES
from quantkd.transfer_set.reader import TransferSet
from quantkd.transfer_set.rules import Sampled, StorageRule, TopK, storage_rule_to_dict
from quantkd.transfer_set.shard import shard_bytes
from quantkd.transfer_set.trimming import narrow, trim
from quantkd.transfer_set.writer import TransferSetWriter


def convert(
    source: str | Path | TransferSet, destination: str | Path, profile: str, storage: StorageRule | None = None
) -> str:
    """Write `source` again in another profile. A conversion that was cut off resumes."""
    transfer_set = source if isinstance(source, TransferSet) else TransferSet.open(source)
    old = transfer_set.plan
    if storage is None:
        storage = old.rule if isinstance(old.rule, Sampled) or profile not in PROFILES else PROFILES[profile].storage
    rule = narrow(old.rule, storage)
    plan = replace(
        old,
        profile=profile,
        storage=storage_rule_to_dict(rule),
        num_prompts=len(transfer_set),
        extra={**old.extra, "converted_from": transfer_set.digest},
    )
    with TransferSetWriter.open(destination, plan) as writer:
        for task in writer.claim():
            rows = transfer_set.rows(range(task.start, task.stop))
            writer.commit(task, [trim(row, rule) for row in rows])
        return writer.finalize()


def expect_entries(rule: StorageRule) -> float:
    """A guess at the mean entries per target, from SmolLM2-135M on its own GSM8K answers; larger models are surer."""
    if isinstance(rule, TopK):
        return float(rule.k)
    if isinstance(rule, Sampled):
        return min(float(rule.n), 1.5 * math.pow(rule.n, 0.34))  # 5.7 distinct ids in 50 draws
    # 5.0 entries at p = 0.90, 9.1 at 0.95 and 22.3 at 0.99: a power of the tail.
    return min(float(rule.max_k), max(1.0, 1.67 * math.pow(max(1 - rule.p, 1e-4), -0.56)))


def estimate_bytes(plan: Plan, prompt_tokens: int, response_tokens: int, entries_per_token: float | None = None) -> int:
    """The bytes that a set will take on disk, all files included. A few per cent off even if its entries are known.

    Example:
        A plan of 1,000 prompts with 95 tokens each and 100 tokens an answer: `estimate_bytes(plan, 95_000, 100_000)`.
    """
    codec = Codec(plan)
    entries = expect_entries(plan.rule) if entries_per_token is None else entries_per_token
    entries = max(1.0, min(entries, codec.max_entries))
    # Bits of an id beyond the first, as the id coding has it for sets of the mean size.
    id_bits = 2 + max(0.0, math.log2(plan.vocab_size / max(entries - 1, 1.0)))
    per_token = {"tokens": prompt_tokens + response_tokens, "targets": response_tokens}
    per_token["entries"] = math.floor(response_tokens * entries)
    per_token["low"] = math.floor(response_tokens * (entries - 1) * id_bits / 8)
    records, total, done = [], 0, dict.fromkeys(per_token, 0)
    for shard in range(plan.num_shards):
        start, stop = plan.prompt_range(shard)
        goal = {name: number * stop // plan.num_prompts for name, number in per_token.items()}
        part = {name: goal[name] - done[name] for name in goal}
        done = goal
        explicit = part["tokens"] - part["targets"]
        size = ShardSize(rows=stop - start, explicit=explicit, spans=stop - start, high=0, **part)
        records.append(ShardRecord(size, "0" * 64))
        total += shard_bytes(codec, size)
    return total + len(Index.from_records(plan, records).to_bytes())
