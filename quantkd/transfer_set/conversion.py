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

# Bytes per item after zlib, of SmolLM2's answers to GSM8K under six rules; those of ids in 16 bits at True.
_ID_BYTES = {True: (1.2, 2.7), False: (1.5, 2.9)}  # of a prompt's token, and of an entry with its log-probability
_COUNT_BYTES = 0.4
_NORMALIZER_BYTES = 1.7


def convert(source: str | Path | TransferSet, destination: str | Path, storage: StorageRule | None = None) -> str:
    """Write a set or view as a new set, with the entries that `storage` keeps, or all; resumable. The root digest."""
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
            # A nucleus of rounded values may be smaller by an entry, so what fits already is not cut again.
            writer.commit(task, rows if rule == old.rule else [trim(row, rule) for row in rows])
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
    """The bytes that a set will take on disk, all files included; within a tenth if its entries are known."""
    expected = expect_entries(plan.rule) if entries_per_token is None else entries_per_token
    most = Codec(plan).max_entries
    entries = math.ceil(response_tokens * max(1.0, min(expected, most)))
    per_prompt_token, per_entry = _ID_BYTES[plan.vocab_size <= 2**16]
    per_target = _COUNT_BYTES * (most > 1) + _NORMALIZER_BYTES * sum(t != 1.0 for t in plan.temperatures)
    data = per_prompt_token * prompt_tokens + per_target * response_tokens + per_entry * entries
    sums = (
        plan.num_prompts, prompt_tokens + response_tokens, plan.num_prompts, response_tokens, entries,
        -(-plan.num_prompts // BLOCK_ROWS), math.ceil(data),
    )  # fmt: skip
    shard = ShardRecord(ShardSize(*(-(-total // plan.num_shards) for total in sums)), "0" * 64)
    index = Index.from_records(plan, [shard] * plan.num_shards)
    return plan.num_shards * shard_bytes(shard.size) + len(index.to_bytes())
