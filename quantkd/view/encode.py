"""The divergence as compact JSON, and JSON as text that is safe inside a page's script element."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantkd.view.divergence import Divergence, RowDivergence

# Nats. A token is drawn in the colour of the number of edges that its KL reaches, so pages compare with each other.
KL_EDGES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
NOT_STORED = -1


def encode_divergence(divergence: Divergence) -> dict[str, Any]:
    """What the page's script reads, as JSON values.

    KL is kept to 3 significant digits, a probability as its logarithm in whole ten-thousandths of a nat, negated, which
    is within 0.005%. Each token's text is held once, and named by its place in `strings`; bytes are lists of numbers.
    """
    places: dict[int, int] = {}
    rows = [_encode_row(row, places) for row in divergence.rows]
    spelled = [divergence.tokens[token] for token in places]
    strings = [list(token) if isinstance(token, bytes) else token for token in spelled]
    return {"edges": list(KL_EDGES), "strings": strings, "rows": rows}


def escape_script_json(value: Any) -> str:
    """JSON in ASCII that no HTML parser can take for a tag, an entity or the end of its element."""
    # ensure_ascii escapes U+2028, U+2029, lone surrogates and everything else that an encoding could turn into another.
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def count_classes(kl: NDArray[np.float64]) -> NDArray[np.int64]:
    """How many tokens fall into each colour class.

    Shapes: kl (N,).
    """
    return np.bincount(np.searchsorted(KL_EDGES, kl, side="right"), minlength=len(KL_EDGES) + 1)


def _encode_row(row: RowDivergence, places: dict[int, int]) -> dict[str, Any]:
    """One row; `places` gains the ids that it is the first to use."""

    def place(ids: NDArray[np.int64]) -> list[int]:
        return [places.setdefault(token, len(places)) for token in ids.tolist()]

    own = row.alternatives
    starts = own.offsets[:-1]
    owners = np.repeat(np.arange(len(starts)), np.diff(own.offsets))

    def find(tops: NDArray[np.int64]) -> list[int]:
        """The place of a first choice among its target's alternatives."""
        found = np.flatnonzero(own.token_ids == tops[owners])
        return [int(number) for number in found - starts]

    return {
        "index": row.index,
        "cut": not row.finished,
        "contexts": [list(context) for context in row.contexts],
        "tokens": place(row.token_ids),
        "before": _round(row.kl_before),
        "after": _round(row.kl_after),
        "first_before": find(row.top_before),
        "first_after": find(row.top_after),
        "counts": np.diff(own.offsets).tolist(),
        "ids": place(own.token_ids),
        "p_teacher": _encode_logprobs(own.teacher),
        "p_before": _encode_logprobs(own.before),
        "p_after": _encode_logprobs(own.after),
    }


def _round(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.3g}") for value in values.tolist()]


def _encode_logprobs(logprobs: NDArray[np.float64]) -> list[int]:
    # Half-precision teachers reach a little above probability 1 by rounding, which is 0 here.
    numbers = np.maximum(np.rint(-10_000 * logprobs), 0)
    return [int(number) for number in np.where(np.isnan(logprobs), NOT_STORED, numbers)]
