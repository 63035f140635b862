"""TransferSetInfo: what a set is, and what it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkd.transfer_set.store import ShardStore

_FROM_PLAN = (
    *("teacher_revision", "teacher_dtype", "tokenizer_fingerprint", "vocab_size", "storage", "temperatures"),
    *("generation", "responses"),
)


@dataclass(frozen=True)
class TransferSetInfo:
    """Facts about a set, a view of it, or several joined.

    The fields up to `responses` come from the plan, of joined sets from the first one's; the names of all their
    teachers and engines are listed by ", ". `num_prompts` counts the plan's prompts; `num_rows`, `num_tokens`,
    `num_response_tokens` and `num_entries` the rows at hand. `num_bytes` is what the files of the underlying sets take
    on disk, all included, and `bytes_per_response_token` that over all their response tokens. `mean_entries` is per
    response token at hand. Both are nan where there is none. `counters` sums what the captures counted, `digest` names
    the set or view, and `complete` says whether every shard of the plan is there.
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
    shards = [shard.size for store in stores for shard in store.index.shards]
    rows, tokens, targets, entries = (
        sum(getattr(size, name) for size in shards) for name in ("rows", "tokens", "targets", "entries")
    )
    all_targets = targets
    if table is not None:
        rows, (tokens, _, targets, entries) = len(table), table.sum(axis=0).tolist()
    counters: Counter[str] = Counter()
    for store in stores:
        counters.update(store.index.counters)
    num_bytes = sum(store.num_bytes for store in stores)
    return TransferSetInfo(
        **{name: getattr(stores[0].index.plan, name) for name in _FROM_PLAN},
        teacher_name=", ".join(dict.fromkeys(store.index.plan.teacher_name for store in stores)),
        num_rows=rows,
        num_prompts=sum(store.index.plan.num_prompts for store in stores),
        num_tokens=tokens,
        num_response_tokens=targets,
        num_entries=entries,
        num_bytes=num_bytes,
        bytes_per_response_token=num_bytes / all_targets if all_targets else float("nan"),
        mean_entries=entries / targets if targets else float("nan"),
        counters=dict(counters),
        engine=", ".join(dict.fromkeys(str(store.index.plan.extra.get("engine", "transformers")) for store in stores)),
        digest=digest,
        complete=all(store.index.complete for store in stores),
    )
