"""Divergence: what the page shows, as values; no model and no HTML."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Alternatives:
    """What could have stood at each target of a row, and how probable the three models hold it to be.

    Target j owns the entries `offsets[j]:offsets[j + 1]`: the teacher's most probable ones first, then what else is
    worth seeing there: the token of the text, and the student's first choice before and after.

    Args:
        offsets: (R + 1,) int64.
        token_ids: (A,) int64, unique within a target.
        teacher: (A,) float64, nats; nan where the transfer set did not store this token.
        before: (A,) float64, nats, of the student without its adapter.
        after: (A,) float64, nats, of the student with it.
    """

    offsets: NDArray[np.int64]
    token_ids: NDArray[np.int64]
    teacher: NDArray[np.float64]
    before: NDArray[np.float64]
    after: NDArray[np.float64]


@dataclass(frozen=True)
class RowDivergence:
    """One held-out row of R targets.

    Args:
        index: the row's place in the set, from 0.
        finished: False if the length limit cut the response.
        token_ids: (R,) int64, the targets.
        contexts: the text that is no target, such as the prompt: pairs of "before which target" and the text.
        kl_before: (R,) float64, forward KL from teacher to student at temperature 1, nats, without the adapter.
        kl_after: (R,) float64, the same with the adapter.
        top_teacher: (R,) int64, the teacher's most probable token.
        top_before: (R,) int64, the student's, without the adapter.
        top_after: (R,) int64, the student's, with the adapter.
        alternatives: what could have stood there.
    """

    index: int
    finished: bool
    token_ids: NDArray[np.int64]
    contexts: tuple[tuple[int, str], ...]
    kl_before: NDArray[np.float64]
    kl_after: NDArray[np.float64]
    top_teacher: NDArray[np.int64]
    top_before: NDArray[np.int64]
    top_after: NDArray[np.int64]
    alternatives: Alternatives


@dataclass(frozen=True)
class Divergence:
    """Some rows of a held-out set, seen by a student without and with its adapter.

    Args:
        rows: in the set's order.
        tokens: how each id of the rows reads: its text, or its bytes where they are no whole characters.
        teacher: the teacher's name.
        student: the student's name, without a path.
        adapter: the adapter's name, without a path.
        digest: names the rows' set, in hexadecimal.
        num_rows: rows of the whole set.
    """

    rows: tuple[RowDivergence, ...]
    tokens: Mapping[int, str | bytes]
    teacher: str
    student: str
    adapter: str
    digest: str
    num_rows: int

    @property
    def num_tokens(self) -> int:
        """Targets of all rows."""
        return sum(len(row.token_ids) for row in self.rows)

    @property
    def mean_kl(self) -> tuple[float, float]:
        """Mean KL a token before and after, nats; nan without any token."""
        return _mean([row.kl_before for row in self.rows]), _mean([row.kl_after for row in self.rows])

    @property
    def agreement(self) -> tuple[float, float]:
        """Share of the tokens where the student's first choice is the teacher's, before and after, in [0, 1]."""
        before = _mean([row.top_before == row.top_teacher for row in self.rows])
        return before, _mean([row.top_after == row.top_teacher for row in self.rows])


def _mean(parts: list[NDArray[Any]]) -> float:
    values = np.concatenate([np.zeros(0), *parts])
    return float(values.mean()) if len(values) else float("nan")
