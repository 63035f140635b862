"""How near a student is to its teacher, as sums per row, so that any mean or interval over rows can be formed later."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkd.losses import compute_position_terms, select_targets
from quantkd.topk import TopKLogprobs

__all__ = ["ROW_COLUMNS", "compute_row_metrics", "sum_by_row", "summarize_rows"]

ROW_COLUMNS = ("tokens", "kl_sum", "ce_sum", "agree")


def compute_row_metrics(logits: Tensor, labels: Tensor, teacher: TopKLogprobs) -> Tensor:
    """Per row: target tokens, summed forward KL and cross-entropy at temperature 1 (nats), and top-1 agreements.

    Args:
        logits: (B, T, V) student logits.
        labels: (B, T) int64, unshifted, -100 where there is no target.
        teacher: distributions of the N targets of all rows, in order.

    Returns:
        (B, 4) float64 on the logits' device, columns as in `ROW_COLUMNS`.
    """
    target_logits, target_labels = select_targets(logits, labels)
    terms = compute_position_terms(target_logits, target_labels, teacher)
    agree = target_logits.argmax(-1) == teacher.top_ids
    columns = [torch.ones_like(terms.kl), terms.kl, terms.ce, agree.to(terms.kl.dtype)]
    return sum_by_row(torch.stack(columns, dim=-1), labels)


def sum_by_row(values: Tensor, labels: Tensor) -> Tensor:
    """Sum values of target positions over each row.

    Args:
        values: (N, C), one row of values a target, in the order of `select_targets`.
        labels: (B, T) int64, unshifted, -100 where there is no target.

    Returns:
        (B, C) float64 (float32 on MPS, which has no float64).
    """
    rows = (labels[:, 1:] != -100).nonzero()[:, 0]
    wide = torch.float32 if values.device.type == "mps" else torch.float64
    sums = torch.zeros(labels.shape[0], values.shape[1], dtype=wide, device=values.device)
    return sums.index_add_(0, rows, values.to(wide))


def summarize_rows(rows: Tensor) -> dict[str, float]:
    """Means over all target tokens of `rows`.

    Args:
        rows: (R, 4) as `compute_row_metrics` gives them, of any number of batches.

    Returns:
        `kl` and `ce` in nats per token, `perplexity` = exp(ce), `top1_agreement` in [0, 1].
    """
    tokens, kl, ce, agree = (float(value) for value in rows.sum(0))
    tokens = max(tokens, 1.0)
    return {
        "kl": kl / tokens,
        "ce": ce / tokens,
        "perplexity": math.exp(min(ce / tokens, 700.0)),
        "top1_agreement": agree / tokens,
    }
