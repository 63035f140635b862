"""The loss of `quantkd.losses` from hidden states, in chunks of positions: no more than one chunk's logits ever exist.

One pass over a chunk of logits gives loss and gradient, because the gradient has a closed form. With the k + 1 classes
c of a position (its entries and the tail), the student's class probabilities q_c and g_c = d divergence / d q_c:

    d divergence / d z_v = q_v * (g_c(v) - sum_c q_c g_c)        forward_kl: g_c = -p_c / q_c
                                                                 reverse_kl: g_c = log(q_c / p_c)
    d CE / d z_v         = q_v - [v = label]                     jsd:        g_c = (1 - beta) log(q_c / m_c)

(constants in g_c cancel). All vocabulary entries outside the stored ids and the label share one factor per position, so
the whole gradient is the exponentials scaled by that factor, with the few others written over it. See docs/loss.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quantkd.head import Head
from quantkd.losses import MIN_TAIL, Divergence, check_objective, check_positions
from quantkd.topk import TopKLogprobs

__all__ = ["FusedTerms", "compute_fused_loss"]

# Logits of one chunk. Larger chunks cost memory, smaller ones make the matrix products read the head more often.
_CHUNK_BYTES = 64 * 2**20
# On a CPU the passes between the two products run over this much at a time, which stays in the cache.
_CPU_BLOCK_BYTES = 2 * 2**20


@dataclass(frozen=True)
class FusedTerms:
    """The loss of N positions, and its parts for the log.

    Args:
        loss: scalar, `sum of (1 - alpha) * ce + alpha * T^2 * kl`, differentiable.
        ce: (N,) cross-entropy in nats, detached.
        kl: (N,) divergence at the training temperature in nats, without T^2, detached.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor


def compute_fused_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: TopKLogprobs,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    chunk_rows: int | None = None,
) -> FusedTerms:
    """Equal to `compute_position_terms(head.logits(hidden), ...)` and its sum, without ever holding the logits.

    Args:
        hidden: (N, H) last hidden states that predict `labels`.
        head: how logits come from them. A weight that requires a gradient gets one; a frozen one costs nothing.
        labels: (N,) int64 target ids.
        teacher: the teacher's distributions at the same N positions.
        alpha: weight of the soft term, in [0, 1].
        temperature: one that `teacher` holds normalizers for.
        divergence: `forward_kl`, `reverse_kl` or `jsd`.
        beta: the teacher's share of the mixture in `jsd`.
        chunk_rows: positions a chunk; from a fixed number of bytes if None.

    Raises:
        ConfigError: an objective without meaning, positions that do not match, or entries outside the vocabulary.
    """
    check_objective(alpha, temperature, divergence, beta)
    vocab_size = head.weight.shape[0]
    check_positions(hidden.shape[0], labels, teacher, vocab_size)
    log_p, p_tail = teacher.at_temperature(temperature)
    rows = chunk_rows or max(1, _CHUNK_BYTES // (4 * vocab_size))
    objective = _Objective(alpha, temperature, divergence, beta)
    # Chunk borders in the ragged entries, read in one transfer.
    borders = teacher.offsets[
        torch.arange(0, len(teacher) + rows, rows, device=teacher.offsets.device).clamp_max(len(teacher))
    ].tolist()
    loss, ce, kl = _FusedLoss.apply(  # type: ignore[no-untyped-call]
        hidden, head.weight, head.bias, head, labels, teacher, log_p, p_tail, objective, rows, borders
    )
    return FusedTerms(loss, ce, kl)


@dataclass(frozen=True)
class _Objective:
    alpha: float
    temperature: float
    divergence: Divergence
    beta: float


class _FusedLoss(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        head: Head,
        labels: Tensor,
        teacher: TopKLogprobs,
        log_p: Tensor,
        p_tail: Tensor,
        objective: _Objective,
        rows: int,
        borders: list[int],
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        count = labels.shape[0]
        ce = torch.empty(count, dtype=dtype, device=hidden.device)
        kl = torch.empty(count, dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=dtype) if needs_bias else None
        wants_gradient = needs_hidden or needs_weight or needs_bias
        positions = teacher.positions
        for chunk, start in enumerate(range(0, count, rows)):
            stop = min(start + rows, count)
            entries = slice(borders[chunk], borders[chunk + 1])
            logits = head.logits(hidden[start:stop])
            slope = None
            if head.softcap is not None and wants_gradient:
                slope = 1 - (logits / head.softcap).square()
            # Blocks of a chunk differ only in where they lie; on a GPU one block is the chunk.
            block = stop - start
            if logits.device.type == "cpu":
                block = max(1, _CPU_BLOCK_BYTES // (logits.element_size() * logits.shape[1]))
            edges = (
                teacher.offsets[torch.arange(start, stop + block, block).clamp_max(stop)].tolist()
                if block < stop - start
                else [entries.start, entries.stop]
            )
            for number, first in enumerate(range(start, stop, block)):
                last = min(first + block, stop)
                part = slice(edges[number], edges[number + 1])
                ce[first:last], kl[first:last] = _differentiate(
                    logits[first - start : last - start],
                    labels[first:last],
                    positions[part] - first,
                    teacher.token_ids[part],
                    log_p[part].to(dtype),
                    p_tail[first:last].to(dtype),
                    objective,
                    wants_gradient,
                )
            if not wants_gradient:
                continue
            if slope is not None:
                logits.mul_(slope)
            if head.scale != 1.0:
                logits.mul_(head.scale)
            gradient = logits.to(weight.dtype)  # from here on `logits` holds the gradient
            if grad_hidden is not None:
                grad_hidden[start:stop] = gradient @ weight
            if grad_weight is not None:
                grad_weight += gradient.T @ hidden[start:stop].to(weight.dtype)
            if grad_bias is not None:
                grad_bias += logits.sum(0)
            del logits, gradient, slope
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        mixed = (1 - objective.alpha) * ce + objective.alpha * objective.temperature**2 * kl
        ctx.mark_non_differentiable(ce, kl)
        return mixed.sum(), ce, kl

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grad_loss).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype),
            None if grad_bias is None else (grad_bias * grad_loss).to(ctx.weight_dtype),
            *[None] * 8,
        )


def _differentiate(
    logits: Tensor,
    labels: Tensor,
    positions: Tensor,
    token_ids: Tensor,
    log_p: Tensor,
    p_tail: Tensor,
    objective: _Objective,
    wants_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """CE and divergence (n,) of a block; its logits (n, V) are overwritten with the gradient of the mixed loss."""
    temperature, alpha = objective.temperature, objective.alpha
    every = torch.arange(logits.shape[0], device=logits.device)
    label_logits = logits[every, labels]
    entry_logits = logits[positions, token_ids]  # (E,)
    logits[positions, token_ids] = -torch.inf  # what stays is the tail
    peak = logits.amax(-1)
    peak = torch.where(peak.isfinite(), peak, 0)  # k = V leaves nothing
    logits.sub_(peak.unsqueeze(-1))
    if temperature == 1.0:
        soft = logits.exp_()
        hard, hard_tail = soft, None
    elif temperature == 2.0:
        soft = logits.mul_(0.5).exp_()
        hard, hard_tail = soft, torch.linalg.vector_norm(soft, dim=-1).square()  # exp(x) = exp(x / 2)^2
    else:
        hard = logits.exp()
        soft, hard_tail = logits.mul_(1 / temperature).exp_(), hard.sum(-1)

    def normalize(tail_sum: Tensor, t: float) -> tuple[Tensor, Tensor]:
        """log Z of the whole vocabulary and log-mass of the tail at temperature t."""
        log_tail = tail_sum.log() + peak / t
        log_z = torch.logaddexp(log_tail, _segment_logsumexp(entry_logits / t, positions, logits.shape[0]))
        return log_z, log_tail - log_z

    tail_sum = soft.sum(-1)  # at least 1 where there is a tail, for its own peak was taken off
    log_z, log_q_tail = normalize(tail_sum, temperature)
    hard_log_z = log_z if hard_tail is None else normalize(hard_tail, 1.0)[0]
    ce = hard_log_z - label_logits
    log_q = entry_logits / temperature - log_z[positions]
    q = log_q.exp()
    kl, slopes, slope_tail = _class_slopes(log_p, log_q, p_tail, log_q_tail, positions, objective)
    if not wants_gradient:
        return ce, kl

    # slopes are q_c * g_c, which stays finite where q_c vanishes.
    mean = slope_tail.index_add(0, positions, slopes)
    soft_weight, hard_weight = alpha * temperature, 1 - alpha  # T^2 from the loss, 1 / T from z / T
    grad_entries = soft_weight * (slopes - q * mean[positions])
    grad_entries += hard_weight * (entry_logits - hard_log_z[positions]).exp()
    # Per position: d / d z_v = exp(z_v / T) * soft_factor + exp(z_v) * hard_factor for every v of the tail.
    # q_v / q_tail is exp(z_v / T) / tail_sum: a quotient of two numbers that may both underflow is not formed.
    share = torch.where(tail_sum > 0, slope_tail / tail_sum, 0)
    soft_factor = soft_weight * (share - (peak / temperature - log_z).exp() * mean)
    hard_factor = hard_weight * (peak - hard_log_z).exp()
    if temperature == 1.0:
        logits.mul_((soft_factor + hard_factor).unsqueeze(-1))
    elif temperature == 2.0:
        logits.mul_((logits * hard_factor.unsqueeze(-1)).add_(soft_factor.unsqueeze(-1)))
    else:
        logits.mul_(soft_factor.unsqueeze(-1)).addcmul_(hard, hard_factor.unsqueeze(-1))
    logits[positions, token_ids] = grad_entries
    logits[every, labels] -= hard_weight
    return ce, kl


def _class_slopes(
    log_p: Tensor, log_q: Tensor, p_tail: Tensor, log_q_tail: Tensor, positions: Tensor, objective: _Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence (n,), and q_c * g_c for the entries (E,) and the tail (n,); a constant in g_c cancels later."""
    p, q, q_tail = log_p.exp(), log_q.exp(), log_q_tail.exp()
    log_q_tail = torch.where(log_q_tail.isfinite(), log_q_tail, 0)  # no tail, and no weight
    if objective.divergence == "forward_kl":
        entries, tail = p * (log_p - log_q), torch.xlogy(p_tail, p_tail) - p_tail * log_q_tail
        slopes, slope_tail = -p, -p_tail
    elif objective.divergence == "reverse_kl":
        slopes = q * (log_q - log_p)
        slope_tail = q_tail * (log_q_tail - p_tail.clamp_min(MIN_TAIL).log())
        entries, tail = slopes, slope_tail
    else:
        beta = objective.beta
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        log_m_tail = torch.logaddexp(p_tail.log() + math.log(beta), log_q_tail + math.log1p(-beta))
        slopes = (1 - beta) * q * (log_q - log_m)
        slope_tail = (1 - beta) * q_tail * (log_q_tail - log_m_tail)
        entries = slopes + beta * p * (log_p - log_m)
        tail = slope_tail + beta * (torch.xlogy(p_tail, p_tail) - p_tail * log_m_tail)
    return tail.index_add(0, positions, entries), slopes, slope_tail


def _segment_logsumexp(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """(count,) logsumexp of the values of each segment; -inf for an empty one."""
    peak = values.new_full((count,), -torch.inf).scatter_reduce(0, segments, values, "amax")
    safe = torch.where(peak.isfinite(), peak, 0)
    return values.new_zeros(count).index_add(0, segments, (values - safe[segments]).exp()).log() + safe
