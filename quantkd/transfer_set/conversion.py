"""Trimming a transfer set to a narrower storage rule, and telling its size before it is captured."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from quantkd.transfer_set.codec import BLOCK_ROWS, Codec, ShardSize
from quantkd.transfer_set.index import Index, ShardRecord
from quantkd.transfer_set.plan import Plan
from quantkd.transfer_set.reader import TransferSet
from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.rules import Sampled, StorageRule, TopK, keep_entries, narrow, storage_rule_to_dict
from quantkd.transfer_set.shard import shard_bytes
from quantkd.transfer_set.writer import TransferSetWriter

# Of the bytes of plain CSR, what zlib leaves: 0.64 to 0.66 of SmolLM2's GSM8K answers, in benchmarks/storage.py.
_COMPRESSION = 0.65


def convert(source: str | Path | TransferSet, destination: str | Path, storage: StorageRule | None = None) -> str:
    """Write a set or view as a new set, with the entries that `storage` keeps. A conversion that was cut off resumes.

    Args:
        source: the set.
        destination: the new set's folder.
        storage: the rule; None keeps all entries.

    Returns:
        The root digest.

    Raises:
        ConfigError: the rule cannot be applied to what is stored.
        TransferSetError: the source is damaged, or the destination holds another set.
    """
    transfer_set = source if isinstance(source, TransferSet) else TransferSet.open(source)
    old = transfer_set.plan
    rule = narrow(old.rule, storage or old.rule)
    plan = replace(
        old,
        storage=storage_rule_to_dict(rule),
        num_prompts=len(transfer_set),
        extra={**old.extra, "converted_from": transfer_set.digest},
    )
    with TransferSetWriter.open(destination, plan) as writer:
        for task in writer.claim():
            rows = transfer_set.rows(range(task.start, task.stop))
            writer.commit(task, [trim(row, rule) for row in rows])
        return writer.finalize()


def trim(row: TransferRow, rule: StorageRule) -> TransferRow:
    """The row with the entries that `rule` keeps, most probable first. The tail is 1 minus them, so it stays exact."""
    counts = row.counts.astype(np.int64)
    targets = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-row.logprobs, targets))
    keep = order[keep_entries(row.logprobs[order], counts, rule)]
    return replace(
        row,
        counts=np.bincount(targets[keep], minlength=len(counts)),
        token_ids=row.token_ids[keep],
        logprobs=row.logprobs[keep],
    )


def expect_entries(rule: StorageRule) -> float:
    """A guess at the mean entries per target, from SmolLM2-135M on its own GSM8K answers; larger models are surer."""
    if isinstance(rule, TopK):
        return float(rule.k)
    if isinstance(rule, Sampled):
        return min(float(rule.n), 1.5 * math.pow(rule.n, 0.34))  # 5.7 distinct ids in 50 draws
    # 5.0 entries at p = 0.90, 9.1 at 0.95 and 22.3 at 0.99: a power of the tail.
    return min(float(rule.max_k), max(1.0, 1.67 * math.pow(max(1 - rule.p, 1e-4), -0.56)))


def estimate_bytes(plan: Plan, prompt_tokens: int, response_tokens: int, entries_per_token: float | None = None) -> int:
    """The bytes that a set will take on disk, all files included; within a fifth if its entries are known.

    Example:
        A plan of 1,000 prompts with 95 tokens each and 100 tokens an answer: `estimate_bytes(plan, 95_000, 100_000)`.
    """
    codec = Codec(plan)
    entries = expect_entries(plan.rule) if entries_per_token is None else entries_per_token
    sums = [prompt_tokens + response_tokens, plan.num_prompts, response_tokens]
    sums.append(math.floor(response_tokens * max(1.0, min(entries, codec.max_entries))))
    records, total, done = [], 0, np.zeros(4, dtype=np.int64)
    for shard in range(plan.num_shards):
        start, stop = plan.prompt_range(shard)
        goal = np.array([number * stop // plan.num_prompts for number in sums])
        tokens, spans, targets, stored = (goal - done).tolist()
        packed = math.ceil(_COMPRESSION * codec.block_bytes(stop - start, goal - done))
        size = ShardSize(stop - start, tokens, spans, targets, stored, -(-(stop - start) // BLOCK_ROWS), packed)
        done = goal
        records.append(ShardRecord(size, "0" * 64))
        total += shard_bytes(size)
    return total + len(Index.from_records(plan, records).to_bytes())
