"""The loss of `reference` from hidden states, in chunks of positions: no more than one chunk's logits ever exist.

One pass over a chunk of logits gives loss and gradient, because the gradient has a closed form: see
`fused_blocks`. Two matrix products around it turn hidden states into logits, and the gradient of logits into
that of the hidden states. See docs/loss.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantkd.errors import ConfigError
from quantkd.loss.fused_blocks import Block, DenseBlock, Objective, SparseBlock
from quantkd.loss.reference import Divergence, check_objective, check_positions, check_weights
from quantkd.models.network import Head
from quantkd.transfer_set.topk import TopKLogprobs

# The student's logits of one chunk; a dense teacher's come on top. Larger chunks cost memory, smaller ones read the
# head more often: a CPU's products with 128,256 tokens slow down below some 250 rows, and an accelerator needs several
# hundred rows to be as busy with arithmetic as with reading.
_CPU_CHUNK_BYTES = 128 * 2**20
_ACCELERATOR_CHUNK_BYTES = 512 * 2**20
# On a CPU the passes between the two products run over this much at a time, which stays in the cache.
_CPU_BLOCK_BYTES = 2 * 2**20


@dataclass(frozen=True)
class FusedTerms:
    """The loss of N positions, and its parts for the log.

    Args:
        loss: scalar, `sum of weight * ((1 - alpha) * ce + alpha * T^2 * kl)`, differentiable.
        ce: (N,) cross-entropy in nats, detached.
        kl: (N,) divergence at the training temperature in nats, without T^2, detached.
    """

    loss: Tensor
    ce: Tensor
    kl: Tensor


@dataclass(frozen=True)
class DenseTeacher:
    """A teacher that is in memory: its distributions at N positions, as hidden states and the head that reads them.

    It gets no gradient. Its logits exist only beside the student's, one chunk at a time.

    Args:
        hidden: (N, H) the teacher's last hidden states; H is its own.
        head: the teacher's, over the student's vocabulary.

    Example:
        >>> import torch
        >>> teacher = DenseTeacher(torch.randn(5, 8), Head(torch.randn(100, 8)))
        >>> len(teacher), len(teacher.select(torch.tensor([0, 3])))
        (5, 2)
    """

    hidden: Tensor
    head: Head

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def select(self, index: Tensor) -> DenseTeacher:
        """The positions named by `index` ((M,) int64, or (N,) bool), in that order."""
        return replace(self, hidden=self.hidden[index])


def compute_fused_loss(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    teacher: TopKLogprobs | DenseTeacher,
    *,
    alpha: float = 0.5,
    temperature: float = 1.0,
    divergence: Divergence = "forward_kl",
    beta: float = 0.5,
    weights: Tensor | None = None,
    chunk_rows: int | None = None,
) -> FusedTerms:
    """Equal to `compute_position_terms(head.logits(hidden), ...)` and its sum, without ever holding the logits.

    Under autocast both products run in its dtype, as the model's own head would.

    Shapes: hidden (N, H), labels (N,), weights (N,).
    """
    check_objective(alpha, temperature, divergence, beta)
    vocab_size = head.weight.shape[0]
    targets: _SparseTargets | _DenseTargets
    if isinstance(teacher, DenseTeacher):
        _check_dense(hidden.shape[0], labels, teacher, vocab_size)
        targets = _DenseTargets(teacher)
    else:
        check_positions(hidden.shape[0], labels, teacher, vocab_size)
        targets = _SparseTargets(teacher, temperature)
    check_weights(weights, labels)
    rows = chunk_rows or _balance_chunks(hidden, vocab_size)
    weight, bias = head.weight, head.bias
    if not torch.is_grad_enabled():  # a function's inputs ask for gradients even then
        hidden, weight, bias = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
    objective = Objective(alpha, temperature, divergence, beta)
    loss, ce, kl = _FusedLoss.apply(hidden, weight, bias, head, labels, targets, objective, weights, rows)  # type: ignore[no-untyped-call]
    return FusedTerms(loss, ce, kl)


def _balance_chunks(hidden: Tensor, vocab_size: int) -> int:
    """Positions a chunk: as few chunks as memory allows, all of about one size."""
    count = max(hidden.shape[0], 1)
    budget = _CPU_CHUNK_BYTES if hidden.device.type == "cpu" else _ACCELERATOR_CHUNK_BYTES
    chunks = math.ceil(count / max(1, budget // (4 * vocab_size)))
    return math.ceil(count / chunks)


def _check_dense(count: int, labels: Tensor, teacher: DenseTeacher, vocab_size: int) -> None:
    if not count == labels.shape[0] == len(teacher):
        raise ConfigError(
            f"Expected one hidden state of the teacher and one label for each of {count} target positions, found "
            f"{len(teacher)} and {labels.shape[0]}. Select the same target positions from teacher and student."
        )
    if teacher.head.weight.shape[0] != vocab_size:
        raise ConfigError(
            f"The teacher's head has {teacher.head.weight.shape[0]} tokens, the student's {vocab_size}; a dense "
            "divergence needs the same vocabulary. Take a teacher of the same family, or capture a transfer set."
        )


class _SparseTargets:
    """Stored entries, cut into blocks."""

    def __init__(self, teacher: TopKLogprobs, temperature: float) -> None:
        self.log_p, self.p_tail = teacher.at_temperature(temperature)
        self.positions, self.token_ids = teacher.positions, teacher.token_ids
        self.borders: list[int] = teacher.offsets.tolist()  # the one transfer that waits for the device

    def blocks(self, start: int, stop: int, size: int, dtype: torch.dtype) -> Iterator[tuple[slice, Block]]:
        """The positions of each block of a chunk, and its entries."""
        for rows in _cut(start, stop, size):
            part = slice(self.borders[rows.start], self.borders[rows.stop])
            yield (
                rows,
                SparseBlock(
                    self.positions[part] - rows.start,
                    self.token_ids[part],
                    self.log_p[part].to(dtype),
                    self.p_tail[rows].to(dtype),
                ),
            )


class _DenseTargets:
    """A teacher's hidden states, turned into logits a chunk at a time."""

    def __init__(self, teacher: DenseTeacher) -> None:
        self.hidden, self.head = _cast(teacher.hidden, teacher.head)

    def blocks(self, start: int, stop: int, size: int, dtype: torch.dtype) -> Iterator[tuple[slice, Block]]:
        """The positions of each block of a chunk, and its logits."""
        logits = self.head.logits(self.hidden[start:stop]).to(dtype)
        for rows in _cut(start, stop, size):
            yield rows, DenseBlock(logits[rows.start - start : rows.stop - start])


def _cut(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, stop)) for first in range(start, stop, size))


def _cast(hidden: Tensor, head: Head) -> tuple[Tensor, Head]:
    """Both, detached, in the dtype that autocast computes products in; cast once, where each product would do it."""
    device, dtype = hidden.device.type, head.weight.dtype
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        hidden = hidden.to(dtype)
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    return hidden.detach(), replace(head, weight=head.weight.detach().to(dtype), bias=bias)


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
        targets: _SparseTargets | _DenseTargets,
        objective: Objective,
        weights: Tensor | None,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, CE (N,) and divergence (N,); what requires a gradient gets it now, for `backward` to scale."""
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        wants_gradient = needs_hidden or needs_weight or needs_bias
        dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        count = labels.shape[0]
        ce = torch.empty(count, dtype=dtype, device=hidden.device)
        kl = torch.empty(count, dtype=dtype, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if needs_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=dtype) if needs_bias else None
        weights = None if weights is None else weights.detach().to(dtype)
        hidden, head = _cast(hidden, head)
        with torch.autocast(hidden.device.type, enabled=False):
            for chunk in _cut(0, count, rows):
                logits = head.logits(hidden[chunk]).to(dtype)
                slope = None
                if head.softcap is not None and wants_gradient:
                    slope = 1 - (logits / head.softcap).square()
                # Blocks of a chunk differ only in where they lie; on a GPU one block is the chunk.
                block_rows = rows
                if logits.device.type == "cpu":
                    block_rows = max(1, _CPU_BLOCK_BYTES // (logits.element_size() * logits.shape[1]))
                for block, teacher in targets.blocks(chunk.start, chunk.stop, block_rows, dtype):
                    ce[block], kl[block] = teacher.differentiate(
                        logits[block.start - chunk.start : block.stop - chunk.start],
                        labels[block],
                        objective,
                        wants_gradient,
                    )
                if not wants_gradient:
                    continue
                if slope is not None:
                    logits.mul_(slope)
                if head.scale != 1.0:
                    logits.mul_(head.scale)
                if weights is not None:
                    logits.mul_(weights[chunk].unsqueeze(-1))
                gradient = logits.to(head.weight.dtype)  # from here on `logits` holds the gradient
                if grad_hidden is not None:
                    grad_hidden[chunk] = gradient @ head.weight
                if grad_weight is not None:
                    grad_weight += gradient.T @ hidden[chunk]
                if grad_bias is not None:
                    grad_bias += logits.sum(0)
                del logits, gradient, slope
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        mixed = (1 - objective.alpha) * ce + objective.alpha * objective.temperature**2 * kl
        if weights is not None:
            mixed = mixed * weights
        ctx.mark_non_differentiable(ce, kl)
        return mixed.sum(), ce, kl

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *unused: Any) -> tuple[Tensor | None, ...]:
        """The gradients of `forward`, times that of the loss."""
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        return (
            None if grad_hidden is None else (grad_hidden * grad_loss).to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * grad_loss).to(ctx.weight_dtype),
            None if grad_bias is None else (grad_bias * grad_loss).to(ctx.weight_dtype),
            *[None] * 6,
        )
