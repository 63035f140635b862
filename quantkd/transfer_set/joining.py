"""Several transfer sets as one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from quantkd.errors import ConfigError
from quantkd.transfer_set.reader import TransferSet
from quantkd.transfer_set.store import ShardStore


def concatenate(sets: Sequence[TransferSet], weights: Sequence[float] | None = None) -> TransferSet:
    """Several sets (or views) one after the other, without copying."""
    if not sets:
        raise ConfigError("concatenate needs at least one transfer set.")
    if len(sets) == 1 and weights is None:
        return sets[0]
    if weights is not None and (len(weights) != len(sets) or not all(0 < w < float("inf") for w in weights)):
        raise ConfigError(f"weights are {list(weights)} for {len(sets)} sets; give each a finite number above 0.")
    plans = [store.index.plan for each in sets for store, _ in each._sources]
    for name in ("tokenizer_fingerprint", "vocab_size", "temperatures"):
        found = list(dict.fromkeys(getattr(plan, name) for plan in plans))
        if len(found) > 1:
            raise ConfigError(f"The sets differ in {name}: {found[0]} and {found[1]}. Capture them alike to join them.")
    joined = object.__new__(TransferSet)  # a view over several stores, which no path names
    sources: list[tuple[ShardStore, float | None]] = []
    rows: list[NDArray[np.int64]] = []
    shift = 0
    for position, each in enumerate(sets):
        rows.append(np.asarray(each._rows, dtype=np.int64) + shift)
        for store, weight in each._sources:
            sources.append((store, weight if weights is None else (weight or 1.0) * weights[position]))
            shift += store.num_rows
    joined._sources = tuple(sources)
    joined._starts = np.append(0, np.cumsum([store.num_rows for store, _ in sources], dtype=np.int64))
    joined._rows = np.concatenate(rows)
    return joined
