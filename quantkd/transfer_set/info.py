"""TransferSetInfo: what a set is, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkd.transfer_set.store import ShardStore

_TOTALS = ("tokens", "targets", "entries")


@dataclass(frozen=True)
class TransferSetInfo:
    """Facts about a set, a view of it, or several joined.

    The first fields come from the plan; for joined sets from the first one, with names listed by ", ". Counts are of
    the rows at hand. `num_bytes` is what the files of the underlying sets take on disk, all included.

    Args:
        teacher_name: the teacher's name or path.
        teacher_revision: its commit, or "".
        teacher_dtype: such as "bfloat16".
        tokenizer_fingerprint: sha256 in hexadecimal.
        vocab_size: V.
        storage: the storage rule as JSON.
        temperatures: those with a stored log-normalizer.
        generation: generation settings.
        responses: "generate" or "given".
        num_rows: rows at hand.
        num_prompts: prompts in the plan.
        num_tokens: tokens of the rows.
        num_response_tokens: target positions of the rows.
        num_entries: stored entries of the rows.
        num_bytes: bytes on disk.
        bytes_per_response_token: `num_bytes` of the whole sets over their target positions; nan without any.
        mean_entries: entries per target position; nan without any.
        counters: what the captures counted, summed.
        engine: what ran the teacher: "transformers", "vllm" or "server".
        digest: names the set, or the view.
        complete: whether every shard of the plan is there.
    """

    teacher_name: str
    teacher_revision: str
    teacher_dtype: str
    tokenizer_fingerprint: str
    vocab_size: int
    storage: dict[str, Any]
    temperatures: tuple[float, ...]
    generation: dict[str, Any]
    responses: str
    num_rows: int
    num_prompts: int
    num_tokens: int
    num_response_tokens: int
    num_entries: int
    num_bytes: int
    bytes_per_response_token: float
    mean_entries: float
    counters: dict[str, int]
    engine: str
    digest: str
    complete: bool


def describe_stores(stores: Sequence[ShardStore], table: NDArray[np.int64] | None, digest: str) -> TransferSetInfo:
    """The facts about some rows of one or several sets."""
    plan = stores[0].index.plan
    shards = [shard.size for store in stores for shard in store.index.shards]
    if table is None:
        tokens, targets, entries = (sum(getattr(size, name) for size in shards) for name in _TOTALS)
    else:
        tokens, targets, entries = (int(total) for total in table.sum(axis=0))
    counters: Counter[str] = Counter()
    for store in stores:
        counters.update(store.index.counters)
    num_bytes = sum(store.num_bytes for store in stores)
    all_targets = sum(size.targets for size in shards)
    return TransferSetInfo(
        teacher_name=", ".join(dict.fromkeys(store.index.plan.teacher_name for store in stores)),
        teacher_revision=plan.teacher_revision,
        teacher_dtype=plan.teacher_dtype,
        tokenizer_fingerprint=plan.tokenizer_fingerprint,
        vocab_size=plan.vocab_size,
        storage=plan.storage,
        temperatures=plan.temperatures,
        generation=plan.generation,
        responses=plan.responses,
        num_rows=sum(size.rows for size in shards) if table is None else len(table),
        num_prompts=sum(store.index.plan.num_prompts for store in stores),
        num_tokens=tokens,
        num_response_tokens=targets,
        num_entries=entries,
        num_bytes=num_bytes,
        bytes_per_response_token=num_bytes / all_targets if all_targets else float("nan"),
        mean_entries=entries / targets if targets else float("nan"),
        counters=dict(counters),
        # Only the engines that came later are written down.
        engine=", ".join(dict.fromkeys(str(store.index.plan.extra.get("engine", "transformers")) for store in stores)),
        digest=digest,
        complete=all(store.index.complete for store in stores),
    )
