"""The loss of `reference` in chunks of positions, with its gradient in closed form: one chunk's logits at a time.

    loss, terms = compute_fused_loss(states, labels, teacher, Objective(alpha, temperature), weights)

equals, to rounding, what `compute_position_terms(states.logits(), labels, teacher, temperature=temperature)` gives as
`terms`, and `loss = (weights * terms.mix(alpha, temperature)).sum()`. One pass over a chunk of logits gives loss and
gradient. With the classes c of a position (its k entries and the tail, or the whole vocabulary), the student's
probabilities q_c and g_c = d divergence / d q_c:

    d divergence / d z_v = q_v * (g_c(v) - sum_c q_c g_c)
    d CE / d z_v         = q_v - [v = label]

Of a stored teacher all tokens outside the entries and the label share one factor per position, so the whole gradient
is the exponentials scaled by that factor, with the few others written over it. Where there is a head, two matrix
products around this turn hidden states into logits, and the gradient of logits into that of hidden states. See
docs/loss.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantkd.hardware import chunk_bytes
from quantkd.loss.reference import Objective, PositionTerms, check_positions, compute_divergence
from quantkd.loss.states import TargetStates
from quantkd.transfer_set.topk import TopKLogprobs

# On a CPU the passes over logits run over this much at a time, which stays in the cache.
_CPU_BLOCK_BYTES = 2 * 2**20


def compute_fused_loss(
    states: TargetStates,
    labels: Tensor,
    teacher: TopKLogprobs | TargetStates,
    objective: Objective,
    weights: Tensor | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, PositionTerms]:
    """The summed loss of N positions, differentiable in the states and their head, and its terms, detached.

    A teacher in memory gets no gradient; its logits exist only beside the student's, one chunk at a time. Under
    autocast the products run in its dtype, as the model's own head would.

    Shapes: labels (N,), weights (N,).
    """
    check_positions(len(states), states.vocab_size, labels, teacher, weights)
    weight, bias = (None, None) if states.head is None else (states.head.weight, states.head.bias)
    leaves = [states.values, weight, bias]
    if not torch.is_grad_enabled():  # a function's inputs ask for gradients even then
        leaves = [None if leaf is None else leaf.detach() for leaf in leaves]
    loss, ce, kl = _FusedLoss.apply(*leaves, states, labels, teacher, objective, weights, chunk_rows)  # type: ignore[no-untyped-call]
    return loss, PositionTerms(ce, kl)


def _balance_chunks(states: TargetStates, teacher: TopKLogprobs | TargetStates, objective: Objective) -> int:
    """Positions per chunk: as few chunks as memory allows, all of about one size."""
    count, dense = max(len(states), 1), isinstance(teacher, TargetStates)
    # Tensors (n, V) in float32 that exist at once, as tests/test_loss_memory.py counts them.
    if states.device.type == "cpu":
        held = 1 + dense + (states.values.itemsize < 4) / 2  # what else there is is no larger than a block
    else:
        held = (7 if objective.divergence == "jsd" else 5) if dense else 2
    if states.head is not None and states.head.softcap is not None:
        held += 1 + dense
    rows = int(chunk_bytes(states.device) / (4 * held * states.vocab_size))
    return math.ceil(count / math.ceil(count / max(1, rows)))


class _FusedLoss(torch.autograd.Function):
    """Loss and gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        states: TargetStates,
        labels: Tensor,
        teacher: TopKLogprobs | TargetStates,
        objective: Objective,
        weights: Tensor | None,
        chunk_rows: int | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, CE (N,) and divergence (N,); what requires a gradient gets it now, for `backward` to scale."""
        needs_values, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wants_gradient = needs_values or needs_weight or needs_bias
        dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        ce, kl = (torch.empty(len(states), dtype=dtype, device=states.device) for _ in range(2))
        # A gradient of logits waits for the loss's scale in float32; one of hidden states has been summed already, and
        # float16 alone is too narrow for it.
        waits_wide = weight is None or torch.float16 in (values.dtype, weight.dtype)
        grad_values = torch.empty_like(values, dtype=dtype if waits_wide else None) if needs_values else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight and weight is not None else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if needs_bias and bias is not None else None
        weights = None if weights is None else weights.detach().to(dtype)
        states = states.map(Tensor.detach).for_products()
        beside: TargetStates | _Entries
        if isinstance(teacher, TargetStates):
            beside = teacher.map(Tensor.detach).for_products()
        else:
            log_p, p_tail = (each.to(dtype) for each in teacher.at_temperature(objective.temperature))
            beside = _Entries(teacher.positions, teacher.token_ids, log_p, p_tail, teacher.borders)
        head = states.head

        def run(chunk: slice) -> None:  # a function, so that no name keeps a chunk's logits beside the next one's
            logits = states.logits(chunk).to(dtype)
            slope = None
            if head is not None and head.softcap is not None and wants_gradient:
                slope = (logits / head.softcap).square_().neg_().add_(1)
            side = beside.logits(chunk).to(dtype) if isinstance(beside, TargetStates) else beside
            for block in cut_blocks(chunk, logits):
                part = slice(block.start - chunk.start, block.stop - chunk.start)
                own = logits[part], labels[block]
                if isinstance(side, Tensor):
                    ce[block], kl[block] = _differentiate_dense(*own, side[part], objective, wants_gradient)
                else:
                    ce[block], kl[block] = _differentiate_entries(*own, side.select(block), objective, wants_gradient)
            del side  # before the products, which need memory of their own
            if not wants_gradient:
                return
            # From here on `logits` holds the gradient.
            if slope is not None:
                logits.mul_(slope)
            if head is not None and head.scale != 1.0:
                logits.mul_(head.scale)
            if weights is not None:
                logits.mul_(weights[chunk].unsqueeze(-1))
            if grad_bias is not None:
                grad_bias.add_(logits.sum(0))
            if head is None:
                if grad_values is not None:  # pragma: no branch  # nothing else wants a gradient
                    grad_values[chunk] = logits
                return
            scale = _scale_for(head.weight.dtype, logits)
            gradient = (logits if scale is None else logits.mul_(scale)).to(head.weight.dtype)
            if grad_values is not None:
                grad_values[chunk] = _unscale(gradient @ head.weight, scale)
            if grad_weight is not None:
                hidden = states.values[chunk]
                count = len(hidden)  # in float16 a sum over this many must not overflow either
                hidden = hidden if scale is None else hidden / count
                grad_weight.add_(_unscale(gradient.T @ hidden, scale, count))

        with torch.autocast(states.device.type, enabled=False):
            for part in _cut(0, len(states), chunk_rows or _balance_chunks(states, teacher, objective)):
                run(part)
        ctx.save_for_backward(grad_values, grad_weight, grad_bias)
        ctx.dtypes = values.dtype, weight is not None and weight.dtype
        mixed = PositionTerms(ce, kl).mix(objective.alpha, objective.temperature)
        if weights is not None:
            mixed = mixed * weights
        ctx.mark_non_differentiable(ce, kl)
        return mixed.sum(), ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        """The gradients of `forward`, times that of the loss."""
        dtypes = ctx.dtypes[0], ctx.dtypes[1], ctx.dtypes[1]
        scaled = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, dtypes, strict=True)
        ]
        return *scaled, *[None] * 6


class _Entries(NamedTuple):
    """The stored teacher's side of n positions at the training temperature."""

    positions: Tensor  # (E,) int64, from 0 to n - 1
    token_ids: Tensor  # (E,) int64
    log_p: Tensor  # (E,)
    p_tail: Tensor  # (n,)
    borders: list[int]  # of the entries of each position among those of all

    def select(self, block: slice) -> _Entries:
        """The side of a block of positions."""
        part = slice(self.borders[block.start], self.borders[block.stop])
        positions = self.positions[part] - block.start
        return _Entries(positions, self.token_ids[part], self.log_p[part], self.p_tail[block], [])


def cut_blocks(chunk: slice, logits: Tensor) -> Iterator[slice]:
    """The positions of a chunk, whose logits (n, V) are given, in parts that stay in the cache."""
    size = max(1, len(logits))  # on a GPU the chunk is one block
    if logits.device.type == "cpu":  # pragma: no branch  # the tests run without a GPU
        size = max(1, _CPU_BLOCK_BYTES // (logits.element_size() * logits.shape[1]))
    return _cut(chunk.start, chunk.stop, size)


def _scale_for(dtype: torch.dtype, gradient: Tensor) -> Tensor | None:
    """A power of two that brings a gradient (n, V) into the range of float16, which ends at 6e-8; None elsewhere."""
    if dtype != torch.float16:
        return None
    largest = torch.linalg.vector_norm(gradient, ord=1, dim=-1).amax().clamp_min(1e-30)
    return torch.exp2(10 - largest.log2().ceil())


def _unscale(product: Tensor, scale: Tensor | None, count: int = 1) -> Tensor:
    return product if scale is None else product.float() * (count / scale)


def _cut(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _differentiate_entries(
    logits: Tensor, labels: Tensor, entries: _Entries, objective: Objective, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """CE and divergence, each (n,); `logits` (n, V) are overwritten, with the gradient of the loss if wanted."""
    temperature, alpha = objective.temperature, objective.alpha
    positions, token_ids = entries.positions, entries.token_ids
    every = torch.arange(logits.shape[0], device=logits.device)
    label_logits = logits[every, labels]
    entry_logits = logits[positions, token_ids]  # (E,)
    logits[positions, token_ids] = -torch.inf  # what remains is the tail
    peak = logits.amax(-1)
    # Not `where`, which copies a number to the device and waits. k = V leaves nothing.
    peak = peak.masked_fill(~peak.isfinite(), 0)
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

    tail_sum = soft.sum(-1)  # at least 1 where there is a tail: its own peak was subtracted
    log_z, log_q_tail = normalize(tail_sum, temperature)
    hard_log_z = log_z if hard_tail is None else normalize(hard_tail, 1.0)[0]
    ce = hard_log_z - label_logits
    log_q = entry_logits / temperature - log_z[positions]
    with torch.set_grad_enabled(wants_gradient):
        sides = (log_q.requires_grad_(wants_gradient), log_q_tail.requires_grad_(wants_gradient))
        kl = compute_divergence(entries.log_p, entries.p_tail, *sides, positions, objective.divergence, objective.beta)
    if not wants_gradient:
        return ce, kl

    # The formula's own derivative by log q_c is q_c * g_c, and finite where q_c vanishes. The classes are few; only the
    # work over the vocabulary is written out here.
    slopes, slope_tail = torch.autograd.grad(kl, sides, torch.ones_like(kl))
    mean = slope_tail.index_add(0, positions, slopes)
    soft_weight, hard_weight = alpha * temperature, 1 - alpha  # T^2 from the loss, 1 / T from z / T
    grad_entries = soft_weight * (slopes - log_q.detach().exp() * mean[positions])
    grad_entries += hard_weight * (entry_logits - hard_log_z[positions]).exp()
    # Per position: d / d z_v = exp(z_v / T) * soft_factor + exp(z_v) * hard_factor for every v of the tail.
    # q_v / q_tail is exp(z_v / T) / tail_sum: a quotient of two numbers that may both underflow is not formed.
    share = (slope_tail / tail_sum).masked_fill(~(tail_sum > 0), 0)
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
    return ce, kl.detach()


def _differentiate_dense(
    logits: Tensor, labels: Tensor, teacher_logits: Tensor, objective: Objective, wants_gradient: bool
) -> tuple[Tensor, Tensor]:
    """As `_differentiate_entries`, over the whole vocabulary; both logits are overwritten.

    With log q and log p over V tokens an autograd graph would hold many copies of them, so the slopes are written out:
    g_v = -p_v / q_v (forward_kl), log(q_v / p_v) (reverse_kl), (1 - beta) log(q_v / m_v) (jsd); constants cancel.

    Shapes: logits (n, V), labels (n,), teacher_logits (n, V) at temperature 1.
    """
    temperature, alpha, beta = objective.temperature, objective.alpha, objective.beta
    every = torch.arange(logits.shape[0], device=logits.device)
    hard_log_z = logits.logsumexp(-1)
    ce = hard_log_z - logits[every, labels]
    if temperature == 1.0:
        hard, log_q = None, logits.sub_(hard_log_z.unsqueeze(-1))
    else:
        hard = (logits - hard_log_z.unsqueeze(-1)).exp_() if wants_gradient else None
        log_q = _log_softmax_(logits.mul_(1 / temperature))
    log_p = _log_softmax_(teacher_logits.mul_(1 / temperature))
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
    # T^2 from the loss, 1 / T from z / T. `log_q` shares the storage of `logits`, and is no longer needed.
    torch.add(soft.mul_(alpha * temperature), q if hard is None else hard, alpha=1 - alpha, out=logits)
    logits[every, labels] -= 1 - alpha
    return ce, kl


def _segment_logsumexp(values: Tensor, segments: Tensor, count: int) -> Tensor:
    """(count,) logsumexp of the values of each segment; -inf for an empty one."""
    peak = values.new_full((count,), -torch.inf).scatter_reduce(0, segments, values, "amax")
    safe = peak.masked_fill(~peak.isfinite(), 0)
    return values.new_zeros(count).index_add(0, segments, (values - safe[segments]).exp()).log() + safe


def _log_softmax_(logits: Tensor) -> Tensor:
    return logits.sub_(logits.logsumexp(-1, keepdim=True))
