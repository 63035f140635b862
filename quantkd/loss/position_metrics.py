"""What a model says at target positions, and how far that is from its teacher: over stored entries, or all classes.

Everything is at temperature 1, in nats, and takes one chunk of logits at a time; whoever calls decides how large.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from quantkd.hardware import wide_dtype
from quantkd.loss.reference import MIN_TAIL, check_positions
from quantkd.models.network import Head
from quantkd.transfer_set.topk import TopKLogprobs

_CHUNK_BYTES = 64 * 2**20
# On a CPU the passes over two models' logits run over this much at a time, which stays in the cache.
_CPU_BLOCK_BYTES = 2 * 2**20


@dataclass(frozen=True)
class Predictions:
    """A model alone.

    Args:
        log_z: (N,) the log-normalizer of its logits.
        ce: (N,) cross-entropy of the targets.
        confidence: (N,) probability of its most probable token.
        top_ids: (N,) int64, that token.
    """

    log_z: Tensor
    ce: Tensor
    confidence: Tensor
    top_ids: Tensor


@dataclass(frozen=True)
class Comparison:
    """A model beside its teacher.

    Args:
        kl: (N,) forward KL, teacher to model.
        reverse_kl: (N,) model to teacher.
        entropy: (N,) the teacher's, over the same classes.
        top_ids: (N,) int64, the teacher's most probable token.
    """

    kl: Tensor
    reverse_kl: Tensor
    entropy: Tensor
    top_ids: Tensor


def positions_per_chunk(vocab_size: int) -> int:
    """How many positions' logits are made at once."""
    return max(1, _CHUNK_BYTES // (4 * vocab_size))


def take_logits(hidden: Tensor, part: slice, head: Head | None) -> Tensor:
    """The logits of some positions, the caller's to overwrite, in float32, or float64 if they are float64.

    Shapes: hidden (N, H).
    """
    if head is not None:
        return head.logits(hidden[part])
    return hidden[part].to(torch.float64 if hidden.dtype == torch.float64 else torch.float32, copy=True)


def compute_predictions(logits: Tensor, targets: Tensor) -> Predictions:
    """What a model says.

    Shapes: logits (N, V), targets (N,).
    """
    log_z = logits.logsumexp(-1)
    top, top_ids = logits.max(-1)
    ce = log_z - logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return Predictions(log_z, ce, (top - log_z).exp(), top_ids)


def compare_with_entries(logits: Tensor, predictions: Predictions, teacher: TopKLogprobs) -> Comparison:
    """Compare over the k + 1 classes of stored entries and the tail.

    Shapes: logits (N, V).
    """
    count, vocab_size = logits.shape
    check_positions(count, predictions.ce, teacher, vocab_size)
    wide = wide_dtype(logits.device)
    positions, ids = teacher.positions, teacher.token_ids
    log_p, p_tail = (part.to(wide) for part in teacher.at_temperature(1.0))
    log_q = (logits[positions, ids] - predictions.log_z[positions]).to(wide)  # (E,)
    # The tail is never 1 - sum(q), which has no digits left near 1. A position that stores all classes has none.
    has_tail = teacher.counts < vocab_size
    left_out = has_tail[positions]
    logits[positions[left_out], ids[left_out]] = -torch.inf
    log_q_tail = (logits.logsumexp(-1) - predictions.log_z).to(wide)
    q_tail = log_q_tail.exp().masked_fill(~has_tail, 0)
    p, q = log_p.exp(), log_q.exp()

    def add_up(tail: Tensor, entries: Tensor) -> Tensor:
        return tail.index_add(0, positions, entries)

    p_logs = torch.xlogy(p_tail, p_tail)
    kl_tail = p_logs - torch.where(p_tail > 0, p_tail * log_q_tail, 0)
    reverse_tail = torch.xlogy(q_tail, q_tail) - q_tail * p_tail.clamp_min(MIN_TAIL).log()
    return Comparison(
        kl=add_up(kl_tail, p * (log_p - log_q)),
        reverse_kl=add_up(reverse_tail, q * (log_q - log_p)),
        entropy=-add_up(p_logs, p * log_p),
        top_ids=teacher.top_ids,
    )


def compare_with_logits(logits: Tensor, predictions: Predictions, teacher_logits: Tensor) -> Comparison:
    """Compare over the whole vocabulary.

    Shapes: logits (N, V), teacher_logits (N, V).
    """
    rows = len(logits)
    if logits.device.type == "cpu":
        rows = max(1, _CPU_BLOCK_BYTES // (logits.element_size() * logits.shape[1]))
    kl, reverse_kl, entropy = (torch.empty_like(predictions.ce) for _ in range(3))
    top_ids = torch.empty_like(predictions.top_ids)
    for start in range(0, len(logits), max(rows, 1)):
        block = slice(start, start + rows)
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
