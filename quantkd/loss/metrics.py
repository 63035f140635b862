"""How close a model is to its teacher at target positions, and per row: over stored entries, or the whole vocabulary.

Everything is at temperature 1 and in nats. Sums per row are kept, so that any mean or interval over rows can be formed
later.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkd.hardware import chunk_bytes, wide_dtype
from quantkd.loss.fused import compute_fused_loss, cut_blocks
from quantkd.loss.reference import Objective, PositionTerms, check_positions, compute_divergence, merge_classes
from quantkd.loss.states import TargetStates
from quantkd.transfer_set.batch import find_targets
from quantkd.transfer_set.topk import TopKLogprobs

ROW_COLUMNS = ("tokens", "kl_sum", "ce_sum", "agree", "loss_sum")


@dataclass(frozen=True)
class Predictions:
    """A model alone, each (N,)."""

    log_z: Tensor  # the log-normalizer of its logits
    ce: Tensor  # cross-entropy of the targets
    confidence: Tensor  # probability of its most probable token
    top_ids: Tensor  # int64, that token


@dataclass(frozen=True)
class Comparison:
    """A model beside its teacher, each (N,)."""

    kl: Tensor  # forward: teacher to model
    reverse_kl: Tensor  # model to teacher
    entropy: Tensor  # the teacher's, over the same classes
    top_ids: Tensor  # int64, the teacher's most probable token


def cut_positions(states: TargetStates, *, dense: bool) -> list[slice]:
    """The positions in parts whose logits are compared at once, with another model's if `dense`; at least one part."""
    held = 7 if dense and states.device.type != "cpu" else 4  # tensors (n, V), as tests/test_loss_memory.py counts them
    size = max(1, chunk_bytes(states.device) // (4 * states.vocab_size) // held)
    return [slice(start, min(start + size, len(states))) for start in range(0, max(len(states), 1), size)]


def compute_predictions(logits: Tensor, targets: Tensor) -> Predictions:
    """What a model with logits (N, V) says of targets (N,)."""
    log_z = logits.logsumexp(-1)
    top, top_ids = logits.max(-1)
    ce = log_z - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return Predictions(log_z, ce, (top - log_z).exp(), top_ids)


def compare_with_entries(logits: Tensor, predictions: Predictions, teacher: TopKLogprobs) -> Comparison:
    """Compare logits (N, V) over the k + 1 classes of stored entries and the tail."""
    check_positions(len(logits), logits.shape[1], predictions.ce, teacher)
    wide = wide_dtype(logits.device)
    positions = teacher.positions
    log_p, p_tail = (part.to(wide) for part in teacher.at_temperature(1.0))
    log_q, log_q_tail = (part.to(wide) for part in merge_classes(logits, predictions.log_z, teacher))
    classes = log_p, p_tail, log_q, log_q_tail, positions
    return Comparison(
        kl=compute_divergence(*classes, "forward_kl"),
        reverse_kl=compute_divergence(*classes, "reverse_kl"),
        entropy=-torch.xlogy(p_tail, p_tail).index_add(0, positions, log_p.exp() * log_p),
        top_ids=teacher.top_ids,
    )


def compare_with_logits(logits: Tensor, predictions: Predictions, teacher_logits: Tensor) -> Comparison:
    """Compare two models' logits (N, V) over the whole vocabulary."""
    kl, reverse_kl, entropy = (torch.empty_like(predictions.ce) for _ in range(3))
    top_ids = torch.empty_like(predictions.top_ids)
    for block in cut_blocks(slice(0, len(logits)), logits):
        log_q = logits[block] - predictions.log_z[block].unsqueeze(-1)
        # As for the model, not by log_softmax: of equal logits the divergence is then 0 to the last bit.
        log_p = teacher_logits[block] - teacher_logits[block].logsumexp(-1, keepdim=True)
        top_ids[block] = log_p.argmax(-1)
        p = log_p.exp()
        entropy[block] = -(p * log_p).sum(-1)
        excess = log_p - log_q
        kl[block] = p.mul_(excess).sum(-1)
        reverse_kl[block] = -log_q.exp_().mul_(excess).sum(-1)
    return Comparison(kl, reverse_kl, entropy, top_ids)


def measure_positions(
    states: TargetStates, targets: Tensor, teachers: Mapping[str, TopKLogprobs | TargetStates]
) -> dict[str, Tensor]:
    """Every figure at each of N target positions, a chunk of logits at a time; a teacher's key begins its figures'."""
    parts: dict[str, list[Tensor]] = {}
    for part in cut_positions(states, dense=any(isinstance(teacher, TargetStates) for teacher in teachers.values())):
        logits = states.logits(part)
        predictions = compute_predictions(logits, targets[part])
        chunk = {"ce": predictions.ce, "confidence": predictions.confidence}
        chunk["correct"] = predictions.top_ids == targets[part]
        for key, teacher in teachers.items():
            if isinstance(teacher, TargetStates):
                compared = compare_with_logits(logits, predictions, teacher.logits(part))
            else:
                compared = compare_with_entries(logits, predictions, teacher.select(part))
            chunk |= {f"{key}{name}": getattr(compared, name) for name in ("kl", "reverse_kl", "entropy")}
            chunk[f"{key}agree"] = predictions.top_ids == compared.top_ids
        for name, values in chunk.items():
            parts.setdefault(name, []).append(values)
        del logits  # before the next part's are made
    return {name: torch.cat(values) for name, values in parts.items()}


def compute_row_metrics(
    states: TargetStates,
    labels: Tensor,
    teacher: TopKLogprobs | TargetStates,
    objective: Objective,
    places: Tensor | None = None,
) -> Tensor:
    """Per row: targets, forward KL and cross-entropy at temperature 1 (nats), top-1 agreements, and the training loss.

    Shapes: states (B, T, .), labels (B, T), teacher (N,), places (N,) as `find_targets` gives them, returns (B, 5).
    """
    places = find_targets(labels) if places is None else places
    states, targets = states.at_targets(labels, places)
    check_positions(len(states), states.vocab_size, targets, teacher)
    states, teacher = states.for_products(), teacher.for_products() if isinstance(teacher, TargetStates) else teacher
    found = measure_positions(states, targets, {"": teacher})
    ce, kl, agree = (found[name].to(wide_dtype(states.device)) for name in ("ce", "kl", "agree"))
    if (objective.temperature, objective.divergence) == (1.0, "forward_kl"):
        terms = PositionTerms(ce=ce, kl=kl)
    else:
        _, terms = compute_fused_loss(states, targets, teacher, objective)
    columns = torch.stack([torch.ones_like(kl), kl, ce, agree, terms.mix(objective.alpha, objective.temperature)], -1)
    rows = columns.new_zeros(len(labels), len(ROW_COLUMNS))
    return rows.index_add_(0, places // labels.shape[1], columns)


def summarize_rows(rows: Tensor) -> dict[str, float]:
    """Means over all target tokens of `rows` (R, 5)."""
    tokens, kl, ce, agree, loss = (float(value) for value in rows.sum(0))
    tokens = max(tokens, 1.0)
    means = {"kl": kl / tokens, "ce": ce / tokens, "perplexity": math.exp(min(ce / tokens, 700.0))}
    return means | {"top1_agreement": agree / tokens, "loss": loss / tokens}
