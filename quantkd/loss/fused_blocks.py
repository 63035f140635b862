"""Loss and gradient of one block of logits in closed form, against a teacher that is sparse (entries, tail) or dense.

With the classes c of a position (its k entries and the tail, or the whole vocabulary), the student's probabilities q_c
and g_c = d divergence / d q_c:

    d divergence / d z_v = q_v * (g_c(v) - sum_c q_c g_c)        forward_kl: g_c = -p_c / q_c
                                                                 reverse_kl: g_c = log(q_c / p_c)
    d CE / d z_v         = q_v - [v = label]                     jsd:        g_c = (1 - beta) log(q_c / m_c)

(constants in g_c cancel). Of a sparse teacher all tokens outside the stored ids and the label share one factor per
position, so the whole gradient is the exponentials scaled by that factor, with the few others written over it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from quantkd.loss.reference import MIN_TAIL, Divergence


@dataclass(frozen=True)
class Objective:
    """What is minimised: `(1 - alpha) * ce + alpha * T^2 * divergence`, checked by `check_objective`."""

    alpha: float
    temperature: float
    divergence: Divergence
    beta: float


class Block(Protocol):
    """The teacher's side of n positions."""

    def differentiate(
        self, logits: Tensor, labels: Tensor, objective: Objective, wants_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """CE and divergence, each (n,); `logits` (n, V) are overwritten, with the gradient of the loss if wanted."""


@dataclass(frozen=True)
class SparseBlock:
    """Entries and tail at the training temperature.

    Args:
        positions: (E,) int64, the row of the block that each entry belongs to.
        token_ids: (E,) int64.
        log_p: (E,) log-probabilities.
        p_tail: (n,) mass outside the entries.
    """

    positions: Tensor
    token_ids: Tensor
    log_p: Tensor
    p_tail: Tensor

    def differentiate(
        self, logits: Tensor, labels: Tensor, objective: Objective, wants_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """See `Block`."""
        temperature, alpha = objective.temperature, objective.alpha
        positions, token_ids = self.positions, self.token_ids
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
        kl, slopes, slope_tail = _class_slopes(self, log_q, log_q_tail, objective)
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


@dataclass(frozen=True)
class DenseBlock:
    """The teacher's own logits, over the whole vocabulary.

    Args:
        teacher_logits: (n, V) at temperature 1, of the student's dtype; overwritten.
    """

    teacher_logits: Tensor

    def differentiate(
        self, logits: Tensor, labels: Tensor, objective: Objective, wants_gradient: bool
    ) -> tuple[Tensor, Tensor]:
        """See `Block`."""
        temperature, alpha, beta = objective.temperature, objective.alpha, objective.beta
        every = torch.arange(logits.shape[0], device=logits.device)
        hard_log_z = logits.logsumexp(-1)
        ce = hard_log_z - logits[every, labels]
        if temperature == 1.0:
            hard, log_q = None, logits.sub_(hard_log_z.unsqueeze(-1))
        else:
            hard = (logits - hard_log_z.unsqueeze(-1)).exp_() if wants_gradient else None
            log_q = _log_softmax_(logits.mul_(1 / temperature))
        log_p = _log_softmax_(self.teacher_logits.mul_(1 / temperature))
        q = log_q.exp()
        if objective.divergence == "forward_kl":
            p = log_p.exp()
            kl = log_p.sub_(log_q).mul_(p).sum(-1)
            soft = p.neg_().add_(q)
        else:
            if objective.divergence == "reverse_kl":
                slope = log_q.sub_(log_p)
                kl = mean = (q * slope).sum(-1)
            else:
                log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
                slope = log_q.sub_(log_m).mul_(1 - beta)
                mean = (q * slope).sum(-1)
                kl = mean + beta * log_m.neg_().add_(log_p).mul_(log_p.exp()).sum(-1)
            soft = slope.sub_(mean.unsqueeze(-1)).mul_(q)
        if not wants_gradient:
            return ce, kl
        # T^2 from the loss, 1 / T from z / T. `log_q` lay in `logits`, and has served.
        torch.add(soft.mul_(alpha * temperature), q if hard is None else hard, alpha=1 - alpha, out=logits)
        logits[every, labels] -= 1 - alpha
        return ce, kl


def _class_slopes(
    block: SparseBlock, log_q: Tensor, log_q_tail: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence (n,), and q_c * g_c for the entries (E,) and the tail (n,); a constant in g_c cancels later."""
    log_p, p_tail = block.log_p, block.p_tail
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
    return tail.index_add(0, block.positions, entries), slopes, slope_tail


def _segment_logsumexp(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """(count,) logsumexp of the values of each segment; -inf for an empty one."""
    peak = values.new_full((count,), -torch.inf).scatter_reduce(0, segments, values, "amax")
    safe = torch.where(peak.isfinite(), peak, 0)
    return values.new_zeros(count).index_add(0, segments, (values - safe[segments]).exp()).log() + safe


def _log_softmax_(logits: Tensor) -> Tensor:
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
