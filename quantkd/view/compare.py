"""Two students beside one teacher at the same targets: divergence, first choices, and what could have stood there."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quantkd.loss.position_metrics import (
    Predictions,
    compare_with_entries,
    compute_predictions,
    positions_per_chunk,
    take_logits,
)
from quantkd.models.network import Head
from quantkd.transfer_set.topk import TopKLogprobs
from quantkd.view.divergence import Alternatives


@dataclass(frozen=True)
class Outputs:
    """What one forward pass gives at N targets.

    Args:
        hidden: (N, H) last hidden states if there is a head, else (N, V) logits.
        head: makes logits of hidden states, a chunk at a time.
    """

    hidden: Tensor
    head: Head | None

    @property
    def vocab_size(self) -> int:
        """V, the width of the logits."""
        return self.hidden.shape[1] if self.head is None else self.head.weight.shape[0]


@dataclass(frozen=True)
class Compared:
    """Columns over N targets.

    Args:
        kl_before: (N,) forward KL of the first student, nats.
        kl_after: (N,) of the second.
        top_before: (N,) the first student's most probable token.
        top_after: (N,) the second's.
        alternatives: see `quantkd.view.Alternatives`.
    """

    kl_before: NDArray[np.float64]
    kl_after: NDArray[np.float64]
    top_before: NDArray[np.int64]
    top_after: NDArray[np.int64]
    alternatives: Alternatives

    def select(self, start: int, stop: int) -> Compared:
        """The targets from `start` to `stop`."""
        own = self.alternatives
        offsets = own.offsets[start : stop + 1]
        entries = slice(offsets[0], offsets[-1])
        return Compared(
            self.kl_before[start:stop],
            self.kl_after[start:stop],
            self.top_before[start:stop],
            self.top_after[start:stop],
            Alternatives(
                offsets - offsets[0],
                own.token_ids[entries],
                own.teacher[entries],
                own.before[entries],
                own.after[entries],
            ),
        )


def compare_students(
    before: Outputs, after: Outputs, targets: Tensor, teacher: TopKLogprobs, num_alternatives: int
) -> Compared:
    """Compare both students with the teacher, a chunk of logits at a time.

    Shapes: targets (N,).
    """
    step = max(1, positions_per_chunk(max(before.vocab_size, after.vocab_size)) // 2)  # both students' logits at once
    columns: dict[str, list[NDArray[Any]]] = {}
    for start in range(0, len(targets), step):
        part = slice(start, min(start + step, len(targets)))
        logits = [take_logits(outputs.hidden, part, outputs.head) for outputs in (before, after)]
        said = [compute_predictions(values, targets[part]) for values in logits]
        entries = teacher.select(torch.arange(part.start, part.stop, device=targets.device))
        counts, ids, known = _choose_alternatives(entries, targets[part], said, num_alternatives)
        positions = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(targets.device)
        chosen = torch.from_numpy(ids).to(targets.device)
        found: dict[str, NDArray[Any]] = {"counts": counts, "ids": ids, "teacher": known}
        for name, values, own in zip(("before", "after"), logits, said, strict=True):
            found[name] = _to_numpy(values[positions, chosen] - own.log_z[positions])
            found[f"top_{name}"] = own.top_ids.cpu().numpy()
            found[f"kl_{name}"] = _to_numpy(compare_with_entries(values, own, entries).kl)  # overwrites the logits
        for name, column in found.items():
            columns.setdefault(name, []).append(column)
    whole = {name: np.concatenate(parts) for name, parts in columns.items()}
    offsets = np.append(0, whole.pop("counts").cumsum())
    alternatives = Alternatives(
        offsets, whole.pop("ids"), whole.pop("teacher"), whole.pop("before"), whole.pop("after")
    )
    return Compared(alternatives=alternatives, **whole)


def _choose_alternatives(
    entries: TopKLogprobs, targets: Tensor, said: list[Predictions], count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """How many at each target, their ids, and the teacher's log-probabilities, nan where it stored none."""
    offsets, ids, logprobs = entries.offsets.tolist(), entries.token_ids.tolist(), entries.logprobs.tolist()
    extras = torch.stack([targets, *(own.top_ids for own in said)], dim=-1).tolist()
    counts, chosen, known = [], [], []
    for target, (start, stop) in enumerate(itertools.pairwise(offsets)):
        stored = dict(zip(ids[start:stop], logprobs[start:stop], strict=True))
        ranked = sorted(stored, key=lambda token: -stored[token])  # stable: the stored first one stays the first
        kept = list(dict.fromkeys([*ranked[:count], *extras[target]]))
        counts.append(len(kept))
        chosen += kept
        known += [stored.get(token, np.nan) for token in kept]
    return np.array(counts), np.array(chosen, dtype=np.int64), np.array(known, dtype=np.float64)


def _to_numpy(values: Tensor) -> NDArray[np.float64]:
    return values.cpu().double().numpy()
