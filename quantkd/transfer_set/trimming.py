"""Trimming rows to a narrower storage rule. The tail stays exact, for it is 1 minus whatever is stored."""

from __future__ import annotations

import numpy as np

from quantkd.errors import ConfigError
from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.rules import Nucleus, Sampled, StorageRule, TopK


def narrow(stored: StorageRule, wanted: StorageRule) -> StorageRule:
    """The rule that rows follow once those stored under `stored` were trimmed to `wanted`."""
    match stored, wanted:
        case Sampled(), Sampled():
            if stored == wanted:
                return stored
        case Nucleus(), Nucleus():
            return Nucleus(min(stored.p, wanted.p), min(stored.max_k, wanted.max_k))
        case TopK(), TopK():
            return TopK(min(stored.k, wanted.k))
        case TopK(), Nucleus():
            return Nucleus(wanted.p, min(stored.k, wanted.max_k))
        case Nucleus(), TopK():
            return Nucleus(stored.p, min(stored.max_k, wanted.k))
    raise ConfigError(
        f"Rows stored under {stored} cannot be trimmed to {wanted}: draws would lose their balance. "
        f"Convert with storage={stored}, or capture again."
    )


def trim(row: TransferRow, rule: StorageRule) -> TransferRow:
    """The row with the entries that `rule` keeps, most probable first. `Sampled` keeps all."""
    counts = row.counts.astype(np.int64)
    targets = np.repeat(np.arange(len(counts)), counts)
    order = np.lexsort((-row.logprobs, targets))
    token_ids, logprobs = row.token_ids[order], row.logprobs[order]
    starts = np.cumsum(counts) - counts
    rank = np.arange(len(logprobs)) - np.repeat(starts, counts)
    keep = np.ones(len(logprobs), dtype=bool)
    if isinstance(rule, TopK):
        keep = rank < rule.k
    elif isinstance(rule, Nucleus):
        mass = np.exp(logprobs.astype(np.float64))
        before = np.cumsum(mass) - mass
        before -= np.repeat(before[starts], counts)
        keep = (rank < rule.max_k) & (before < rule.p)
    return TransferRow(
        input_ids=row.input_ids,
        spans=row.spans,
        counts=np.bincount(targets[keep], minlength=len(counts)),
        token_ids=token_ids[keep],
        logprobs=logprobs[keep],
        log_normalizers=row.log_normalizers,
        finished=row.finished,
    )
