"""The loss of a batch: from hidden states where the head can be fused, from logits where it cannot."""

from __future__ import annotations

from torch import Tensor

from quantkd.loss.fused import DenseTeacher, FusedTerms, compute_fused_loss
from quantkd.loss.reference import Divergence, check_weights, compute_position_terms
from quantkd.models.network import Head
from quantkd.transfer_set.topk import TopKLogprobs


def compute_terms(
    hidden: Tensor,
    labels: Tensor,
    teacher: TopKLogprobs | DenseTeacher,
    head: Head | None,
    *,
    alpha: float,
    temperature: float,
    divergence: Divergence,
    beta: float,
    weights: Tensor | None = None,
) -> FusedTerms:
    """`compute_fused_loss` if there is a head, else the same from logits by `compute_position_terms`.

    Shapes: hidden (N, H), labels (N,), weights (N,).
    """
    if head is not None:
        return compute_fused_loss(
            hidden, head, labels, teacher,
            alpha=alpha, temperature=temperature, divergence=divergence, beta=beta, weights=weights,
        )  # fmt: skip
    if isinstance(teacher, DenseTeacher):
        teacher = TopKLogprobs.from_dense(teacher.head.logits(teacher.hidden), (temperature,))
    terms = compute_position_terms(hidden, labels, teacher, temperature=temperature, divergence=divergence, beta=beta)
    check_weights(weights, labels)
    mixed = terms.mix(alpha, temperature)
    loss = (mixed if weights is None else mixed * weights.to(mixed.dtype)).sum()
    return FusedTerms(loss, terms.ce.detach(), terms.kl.detach())
