"""How near a student is to its teacher, as sums per row, so that any mean or interval over rows can be formed later."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantkd.hardware import wide_dtype
from quantkd.loss.fused import DenseTeacher
from quantkd.loss.position_metrics import (
    compare_with_entries,
    compare_with_logits,
    compute_predictions,
    positions_per_chunk,
    take_logits,
)
from quantkd.loss.reference import Divergence, PositionTerms, compute_position_terms
from quantkd.models.network import Head
from quantkd.transfer_set import IGNORE_INDEX
from quantkd.transfer_set.topk import TopKLogprobs

ROW_COLUMNS = ("tokens", "kl_sum", "ce_sum", "agree", "loss_sum")


def compute_row_metrics(
    hidden: Tensor,
    targets: Tensor,
    teacher: TopKLogprobs | DenseTeacher,
    labels: Tensor,
    *,
    head: Head | None = None,
    alpha: float = 1.0,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
) -> Tensor:
    """Per row: targets, forward KL and cross-entropy at temperature 1 (nats), top-1 agreements, and the training loss.

    Shapes: hidden (N, H), targets (N,), labels (B, T), returns (B, 5).
    """
    width = hidden.shape[1] if head is None else head.weight.shape[0]
    step = positions_per_chunk(width)
    wide = wide_dtype(hidden.device)
    columns = torch.zeros(len(targets), len(ROW_COLUMNS), dtype=wide, device=hidden.device)
    plain = (temperature, divergence) == (1.0, "forward_kl")  # then the training loss is a mixture of two columns
    for start in range(0, len(targets), step):
        part = slice(start, min(start + step, len(targets)))
        logits = take_logits(hidden, part, head)
        predictions = compute_predictions(logits, targets[part])
        if isinstance(teacher, DenseTeacher):
            teacher_logits = take_logits(teacher.hidden, part, teacher.head)
            compared = compare_with_logits(logits, predictions, teacher_logits)
            entries = None if plain else TopKLogprobs.from_dense(teacher_logits, tuple({1.0, temperature}))
        else:
            entries = teacher.select(torch.arange(part.start, part.stop, device=hidden.device))
            compared = compare_with_entries(logits if plain else logits.clone(), predictions, entries)
        terms = PositionTerms(predictions.ce.to(wide), compared.kl.to(wide))
        if not plain and entries is not None:
            terms = compute_position_terms(
                logits, targets[part], entries, temperature=temperature, divergence=divergence, beta=beta
            )
        agree = predictions.top_ids == compared.top_ids
        found = [torch.ones_like(compared.kl), compared.kl, predictions.ce, agree, terms.mix(alpha, temperature)]
        columns[part] = torch.stack([column.to(wide) for column in found], dim=-1)
    rows = (labels[:, 1:] != IGNORE_INDEX).nonzero()[:, 0]
    return torch.zeros(labels.shape[0], len(ROW_COLUMNS), dtype=wide, device=hidden.device).index_add_(0, rows, columns)


def summarize_rows(rows: Tensor) -> dict[str, float]:
    """Means over all target tokens of `rows`.

    Shapes: rows (R, 5).
    """
    tokens, kl, ce, agree, loss = (float(value) for value in rows.sum(0))
    tokens = max(tokens, 1.0)
    return {
        "kl": kl / tokens,
        "ce": ce / tokens,
        "perplexity": math.exp(min(ce / tokens, 700.0)),
        "top1_agreement": agree / tokens,
        "loss": loss / tokens,
    }
