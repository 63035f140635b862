"""Which rows a view of a transfer set holds, in which order, and the digest that names it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkd.errors import ConfigError, DataError
from quantkd.transfer_set.documents import canonical_json


def permute_rows(length: int, entropy: tuple[int, ...]) -> NDArray[np.int64]:
    """An order of `length` rows that depends on `entropy` alone; no global random state is read or changed."""
    if any(number < 0 for number in entropy):
        raise DataError(f"seed and epoch must be at least 0, found {entropy}.")
    # The raw output of a bit generator never changes between numpy releases; that of `permutation` may.
    keys = np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(length)
    return np.argsort(np.asarray(keys), kind="stable")


def split_rows(length: int, fraction: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Two disjoint parts of `length` rows, each in the old order."""
    held_out = round(fraction * length) if 0 < fraction < 1 else 0
    if not 0 < held_out < length:
        raise ConfigError(
            f"A split of {fraction} of {length} rows leaves one part empty. Choose a fraction between 0 and 1 "
            "that leaves at least one row on either side."
        )
    order = permute_rows(length, (seed,))
    return np.sort(order[held_out:]), np.sort(order[:held_out])


def view_digest(sources: Sequence[tuple[str, float | None]], rows: Any) -> str:
    """The digest that names some rows of one or several sets."""
    chosen = np.asarray(rows, dtype="<i8").tobytes()
    view = {"sources": [list(source) for source in sources], "rows": hashlib.sha256(chosen).hexdigest()}
    return hashlib.sha256(canonical_json(view)).hexdigest()
