"""Divergence: what the page shows, as values and as JSON; no model and no HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Nats. A token's color is the number of edges that its KL reaches. They are fixed, so that pages can be compared.
KL_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
NOT_STORED = -1


@dataclass(frozen=True)
class Alternatives:
    """At each target of a row the teacher's most probable tokens, in that order, the text's own, and first choices."""

    offsets: NDArray[np.int64]  # (R + 1,); target j owns the entries `offsets[j]:offsets[j + 1]`, no token twice
    token_ids: NDArray[np.int64]  # (A,)
    teacher: NDArray[np.float64]  # (A,) nats; nan where the transfer set did not store this token
    before: NDArray[np.float64]  # (A,) nats, of the student without its adapter
    after: NDArray[np.float64]  # (A,) nats, of the student with it


@dataclass(frozen=True)
class RowDivergence:
    """One held-out row of R targets; KL is the forward KL from teacher to student at temperature 1, in nats."""

    index: int  # the row's place in the set, from 0
    finished: bool  # False if the length limit cut the response
    token_ids: NDArray[np.int64]  # (R,) the targets
    contexts: tuple[tuple[int, str], ...]  # the prompt and other text around targets: (targets before, text)
    kl_before: NDArray[np.float64]  # (R,) without the adapter
    kl_after: NDArray[np.float64]  # (R,) with it
    top_teacher: NDArray[np.int64]  # (R,) the teacher's most probable token
    top_before: NDArray[np.int64]  # (R,) the student's, without the adapter
    top_after: NDArray[np.int64]  # (R,) the student's, with it
    alternatives: Alternatives


@dataclass(frozen=True)
class Divergence:
    """Rows of a held-out set, seen by a student without and with its adapter. The names hold no local paths."""

    rows: tuple[RowDivergence, ...]
    tokens: Mapping[int, str | bytes]  # the text of each id, or its bytes where they are not whole characters
    teacher: str
    student: str
    adapter: str
    digest: str  # of the set, in hexadecimal
    num_rows: int  # of the whole set

    @property
    def num_tokens(self) -> int:
        """Targets of all rows."""
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def kl(self) -> NDArray[np.float64]:
        """(2, N) the KL of every token before and after, over all rows, nats."""
        return np.concatenate([np.zeros((2, 0)), *([row.kl_before, row.kl_after] for row in self.rows)], axis=1)

    @property
    def mean_kl(self) -> tuple[float, float]:
        """Mean KL per token before and after, nats; nan without any token."""
        before, after = self.kl
        return _mean(before), _mean(after)

    @property
    def agreement(self) -> tuple[float, float]:
        """Share of the tokens where the student's first choice is the teacher's, before and after, in [0, 1]."""
        tops = [np.stack([row.top_teacher, row.top_before, row.top_after]) for row in self.rows]
        teacher, before, after = np.concatenate([np.zeros((3, 0)), *tops], axis=1)
        return _mean(before == teacher), _mean(after == teacher)


def encode_divergence(divergence: Divergence) -> dict[str, Any]:
    """The JSON that the page's script reads; `strings` holds each token's text once, as numbers if it is bytes."""
    places: dict[int, int] = {}
    rows = [_encode_row(row, places) for row in divergence.rows]
    spelled = [divergence.tokens[token] for token in places]
    strings = [list(token) if isinstance(token, bytes) else token for token in spelled]
    return {"edges": list(KL_EDGES), "strings": strings, "rows": rows}


def _encode_row(row: RowDivergence, places: dict[int, int]) -> dict[str, Any]:
    """One row; `places` gains the ids that it is the first to use."""
    own = row.alternatives
    starts, counts = own.offsets[:-1], np.diff(own.offsets)

    def place(ids: NDArray[np.int64]) -> list[int]:
        return [places.setdefault(token, len(places)) for token in ids.tolist()]

    def find(tops: NDArray[np.int64]) -> list[int]:
        """The place of a first choice among its target's alternatives."""
        found: list[int] = (np.flatnonzero(own.token_ids == np.repeat(tops, counts)) - starts).tolist()
        return found

    return {
        "index": row.index,
        "cut": not row.finished,
        "contexts": [list(context) for context in row.contexts],
        "tokens": place(row.token_ids),
        "before": [float(f"{kl:.3g}") for kl in row.kl_before.tolist()],
        "after": [float(f"{kl:.3g}") for kl in row.kl_after.tolist()],
        "first_before": find(row.top_before),
        "first_after": find(row.top_after),
        "counts": counts.tolist(),
        "ids": place(own.token_ids),
        "p_teacher": _encode_logprobs(own.teacher),
        "p_before": _encode_logprobs(own.before),
        "p_after": _encode_logprobs(own.after),
    }


def _encode_logprobs(logprobs: NDArray[np.float64]) -> list[int]:
    """Ten-thousandths of a nat, negated, which is exact to 0.005% of the probability."""
    # The rounding of half-precision teachers can give a probability a little above 1, which is encoded as 1.
    numbers = np.maximum(np.rint(-10_000 * logprobs), 0)
    encoded: list[int] = np.where(np.isnan(logprobs), NOT_STORED, numbers).astype(np.int64).tolist()
    return encoded


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean()) if len(values) else float("nan")
