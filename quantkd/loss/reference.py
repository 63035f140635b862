"""The distillation loss over logits in plain PyTorch: the readable reference that the fused form is checked against.

Per target position, with label y, student logits z, stored teacher log-probabilities l_i and temperature T:

    CE         = -log softmax(z)[y]
    p_i, q_i   = the teacher's and the student's probability of stored entry i at temperature T
    p_r, q_r   = all the mass outside the stored entries, kept as one further class, the tail
    forward_kl = sum_i p_i (log p_i - log q_i) + p_r (log p_r - log q_r)
    loss       = (1 - alpha) * CE + alpha * T^2 * divergence

`reverse_kl` and `jsd` are computed over the same k + 1 classes. See docs/loss.md for the derivation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from quantkd.errors import ConfigError
from quantkd.hardware import wide_dtype
from quantkd.loss.states import TargetStates
from quantkd.transfer_set.topk import TopKLogprobs

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]

# A teacher's tail below float32's half unit of 1.0 is rounding; reverse KL would take its logarithm.
_MIN_TAIL = 2.0**-24


@dataclass(frozen=True)
class Objective:
    """What is minimized at every target: `(1 - alpha) * ce + alpha * temperature**2 * divergence`.

    An objective that has no meaning raises ConfigError.
    """

    alpha: float
    temperature: float = 1.0
    divergence: str = "forward_kl"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"alpha is {self.alpha}; expected a weight of the soft loss in [0, 1].")
        if not (self.temperature > 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"temperature is {self.temperature}; expected a finite number above 0.")
        if self.divergence not in get_args(Divergence):
            raise ConfigError(f"divergence is {self.divergence!r}; expected one of {', '.join(get_args(Divergence))}.")
        if self.divergence == "jsd" and not 0 < self.beta < 1:
            raise ConfigError(
                f"beta is {self.beta}; jsd needs 0 < beta < 1. Its ends are forward_kl (beta near 0) and reverse_kl "
                "(beta near 1)."
            )


@dataclass(frozen=True)
class PositionTerms:
    """The two terms of the loss at each of N target positions, (N,) each, in nats."""

    ce: Tensor
    kl: Tensor

    def mix(self, alpha: float, temperature: float) -> Tensor:
        """(N,) `(1 - alpha) * ce + alpha * temperature**2 * kl`."""
        return (1 - alpha) * self.ce + alpha * temperature**2 * self.kl


def check_positions(
    count: int, vocab_size: int, labels: Tensor, teacher: TopKLogprobs | TargetStates, weights: Tensor | None = None
) -> None:
    """Refuse labels, distributions and weights that are not one per position, or a teacher of another vocabulary."""
    if not count == labels.shape[0] == len(teacher):
        raise ConfigError(
            f"Expected one teacher distribution and one label for each of {count} target positions, found "
            f"{len(teacher)} and {labels.shape[0]}. Was the batch truncated after the transfer set was read?"
        )
    if isinstance(teacher, TargetStates):
        if teacher.vocab_size != vocab_size:
            raise ConfigError(
                f"The teacher's head has {teacher.vocab_size} tokens, the student's {vocab_size}; a dense divergence "
                "needs the same vocabulary. Use a teacher of the same family, or capture a transfer set."
            )
    # The maximum is looked up only where it can matter: on a GPU it waits for the device.
    elif teacher.vocab_size > vocab_size and teacher.token_ids.numel() and int(teacher.token_ids.max()) >= vocab_size:
        raise ConfigError(
            f"The teacher's entries reach id {int(teacher.token_ids.max())}, the student's vocabulary ends at "
            f"{vocab_size - 1}. Teacher and student must share a tokenizer."
        )
    if weights is not None and weights.shape != labels.shape:
        raise ConfigError(
            f"Expected one weight for each of {count} target positions, found the shape {tuple(weights.shape)}. "
            "Repeat a row's weight once for each of its targets."
        )


def compute_position_terms(
    logits: Tensor,
    labels: Tensor,
    teacher: TopKLogprobs,
    *,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
) -> PositionTerms:
    """Cross-entropy and divergence at every target position, differentiable in `logits`.

    Args:
        logits: (N, V) student logits that predict `labels`; computed in float32, or float64 if they are float64.
        labels: (N,) int64 target ids.
        teacher: the teacher's distributions at the same N positions.
        temperature: one that `teacher` holds normalizers for.
        divergence: `forward_kl` (teacher to student), `reverse_kl` (student to teacher) or `jsd`.
        beta: for `jsd`, `beta * KL(p || m) + (1 - beta) * KL(q || m)` with `m = beta * p + (1 - beta) * q`.

    Raises:
        ConfigError: the three disagree on N, an entry is outside the student's vocabulary, or the temperature is
            not one of the teacher's.

    Reference:
        Hinton et al. 2015 (arXiv:1503.02531); generalised JSD as in Agarwal et al. 2024 (arXiv:2306.13649).

    Example:
        >>> import torch
        >>> logits, labels = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([0])
        >>> terms = compute_position_terms(logits, labels, TopKLogprobs.from_dense(logits))
        >>> f"{terms.ce.item():.4f} {abs(terms.kl.item()):.4f}"
        '0.4076 0.0000'
    """
    check_positions(len(logits), logits.shape[1], labels, teacher)
    if logits.dtype != torch.float64:
        logits = logits.float()
    log_z = logits.logsumexp(-1)
    ce = log_z - logits.gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    scaled = logits / temperature
    log_z = log_z if temperature == 1.0 else scaled.logsumexp(-1)
    log_p, p_tail = teacher.at_temperature(temperature)
    log_q, log_q_tail = merge_classes(scaled, log_z, teacher)
    kl = compute_divergence(
        log_p.to(log_q.dtype), p_tail.to(log_q.dtype), log_q, log_q_tail, teacher.positions, divergence, beta
    )
    return PositionTerms(ce=ce, kl=kl)


def compute_distillation_loss(
    logits: Tensor,
    labels: Tensor,
    teacher: TopKLogprobs,
    *,
    alpha: float,
    temperature: float = 1.0,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    num_items: Tensor | int | None = None,
) -> Tensor:
    """The scalar loss of a batch: `sum over targets of (1 - alpha) * ce + alpha * T^2 * kl`, over `num_items`.

    Args:
        logits: (B, T, V) student logits.
        labels: (B, T) int64, unshifted, -100 where there is no target.
        teacher: distributions of the N targets of all rows, in order.
        alpha: weight of the soft term, in [0, 1].
        temperature: distillation temperature.
        divergence: see `compute_position_terms`.
        beta: see `compute_position_terms`.
        num_items: what the sum is divided by; the number of targets here if None. Give the count of the whole
            accumulated, distributed batch to make the gradient independent of how it was split.

    Returns:
        A scalar in nats; 0 with a zero gradient when nothing is a target.

    Raises:
        ConfigError: an objective that has no meaning, or what `compute_position_terms` refuses.

    Example:
        >>> import torch
        >>> logits, labels = torch.zeros(1, 2, 3), torch.tensor([[-100, 1]])
        >>> teacher = TopKLogprobs.from_dense(torch.tensor([[2.0, 1.0, 0.0]]))
        >>> f"{compute_distillation_loss(logits, labels, teacher, alpha=1.0).item():.4f}"
        '0.2662'
    """
    Objective(alpha, temperature, divergence, beta)
    states, targets = TargetStates(logits).at_targets(labels)
    terms = compute_position_terms(
        states.values, targets, teacher, temperature=temperature, divergence=divergence, beta=beta
    )
    count = max(len(teacher), 1) if num_items is None else num_items
    return terms.mix(alpha, temperature).sum() / count


def merge_classes(logits: Tensor, log_z: Tensor, teacher: TopKLogprobs) -> tuple[Tensor, Tensor]:
    """The log-probabilities of logits (N, V) over the teacher's classes: (E,) of the entries, and (N,) of the tail."""
    positions = teacher.positions
    log_q = logits[positions, teacher.token_ids] - log_z[positions]
    # Not 1 - sum(q): that loses all digits when the entries hold nearly all mass. A position that stores the whole
    # vocabulary has no tail; its logits stay, because the gradient of a logsumexp over nothing is not a number.
    has_tail, entries = teacher.counts < logits.shape[1], (positions, teacher.token_ids)
    rest = logits.index_put(entries, logits.detach()[entries].masked_fill(has_tail[positions], -torch.inf))
    return log_q, (rest.logsumexp(-1) - log_z).masked_fill(~has_tail, -torch.inf)


def compute_divergence(
    log_p: Tensor,
    p_tail: Tensor,
    log_q: Tensor,
    log_q_tail: Tensor,
    positions: Tensor,
    divergence: str,
    beta: float = 0.5,
) -> Tensor:
    """(N,) divergence over the classes of each position: the entries (E,) that `positions` assigns to it, and its tail.

    Shapes: log_p (E,), p_tail (N,), log_q (E,), log_q_tail (N,), positions (E,).
    """
    p, q, q_tail = log_p.exp(), log_q.exp(), log_q_tail.exp()
    # Where there is no tail its logarithm must be finite, so that its term and its gradient are 0.
    log_q_tail = log_q_tail.masked_fill(log_q_tail.isneginf() & (p_tail == 0), 0)
    if divergence == "forward_kl":
        entries = p * (log_p - log_q)
        tail = torch.xlogy(p_tail, p_tail) - p_tail * log_q_tail
    elif divergence == "reverse_kl":
        entries = q * (log_q - log_p)
        tail = q_tail * (log_q_tail - p_tail.clamp_min(_MIN_TAIL).log())
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        log_m_tail = torch.logaddexp(p_tail.log() + math.log(beta), log_q_tail + math.log1p(-beta))
        entries = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
        tail = beta * (torch.xlogy(p_tail, p_tail) - p_tail * log_m_tail)
        tail = tail + (1 - beta) * q_tail * (log_q_tail - log_m_tail)
    # With k = V a position sums a whole vocabulary, one term after the other: float32 would lose three digits.
    wide = wide_dtype(tail.device)
    return tail.to(wide).index_add(0, positions, entries.to(wide)).to(tail.dtype)
