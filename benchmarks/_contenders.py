"""Made-up inputs and the contenders of loss.py and scaling.py: each takes the inputs, runs loss and backward.

Peers are called, not copied: each `make_` imports its package and returns the step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from quantkd.loss.fused import compute_fused_loss
from quantkd.loss.reference import Objective, compute_position_terms
from quantkd.loss.states import Head, TargetStates
from quantkd.transfer_set.topk import TopKLogprobs

LIVE = {"fused_dense", "liger", "trl_chunked", "trl_gkd"}  # contenders that also get a teacher's head


@dataclass(frozen=True)
class Inputs:
    """What every contender starts from; the live teacher's parts are None for those that do not use them."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    teacher: TopKLogprobs
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None

    def first(self, count: int) -> Inputs:
        """The same for the first positions alone."""
        live = None if self.teacher_hidden is None else self.teacher_hidden[:count]
        index = torch.arange(count, device=self.labels.device)
        hidden = self.hidden.detach()[:count].requires_grad_()
        return Inputs(hidden, self.weight, self.labels[:count], self.teacher.select(index), live, self.teacher_weight)


def make_inputs(positions: int, hidden_size: int, vocab_size: int, device: str, dtype: str, live: bool) -> Inputs:
    """Normal hidden states, logits of standard deviation 1, and entries that hold 0.95 of the teacher's mass."""
    generator = torch.Generator(device).manual_seed(0)
    kind: dict[str, Any] = {"device": device, "dtype": getattr(torch, dtype)}

    def normal(rows: int, scale: float = 1.0) -> Tensor:
        return torch.empty(rows, hidden_size, **kind).normal_(0, scale, generator=generator)

    hidden, weight = normal(positions), normal(vocab_size, hidden_size**-0.5)
    on_host = torch.Generator().manual_seed(1)
    counts = torch.empty(positions).geometric_(0.1, generator=on_host).clamp_(1, 64).long()
    token_ids = torch.cat([torch.randint(vocab_size, (int(n) * 4,), generator=on_host).unique()[:n] for n in counts])
    owners = torch.repeat_interleave(counts)
    weights = torch.rand(len(token_ids), generator=on_host) + 0.01
    logprobs = (0.95 * weights / torch.zeros(positions).index_add_(0, owners, weights)[owners]).log()
    rest = vocab_size - counts  # the tail: 0.05, spread evenly
    normalizer = torch.zeros(positions).index_add_(0, owners, (logprobs / 2).exp()) + rest * (0.05 / rest).sqrt()
    teacher = TopKLogprobs(
        offsets=torch.cat([torch.zeros(1, dtype=torch.long), counts.cumsum(0)]),
        token_ids=token_ids,
        logprobs=logprobs,
        log_normalizers=torch.stack([torch.zeros(positions), normalizer.log()], -1),
        temperatures=(1.0, 2.0),
        vocab_size=vocab_size,
    ).to(device)
    live_parts = (normal(positions), normal(vocab_size, hidden_size**-0.5)) if live else (None, None)
    return Inputs(hidden.requires_grad_(), weight, teacher.top_ids.clone(), teacher, *live_parts)


def multiply(inputs: Inputs) -> Tensor:
    """The two products alone; the second one takes the first one's result for a gradient."""
    with torch.no_grad():
        inputs.hidden.grad = (inputs.hidden @ inputs.weight.T) @ inputs.weight
    return inputs.hidden.new_zeros(())


def backward(loss: Tensor) -> Tensor:
    """Take the loss's gradient; the same loss, detached."""
    loss.backward()
    return loss.detach()


def plain_ce(inputs: Inputs) -> Tensor:
    logits = functional.linear(inputs.hidden, inputs.weight)
    return backward(functional.cross_entropy(logits, inputs.labels, reduction="sum"))


def fused(inputs: Inputs, temperature: float = 1.0) -> Tensor:
    states = TargetStates(inputs.hidden, Head(inputs.weight))
    return backward(compute_fused_loss(states, inputs.labels, inputs.teacher, Objective(0.5, temperature))[0])


def fused_dense(inputs: Inputs) -> Tensor:
    states, teacher = (
        TargetStates(hidden, Head(weight))
        for hidden, weight in ((inputs.hidden, inputs.weight), (inputs.teacher_hidden, inputs.teacher_weight))
    )
    return backward(compute_fused_loss(states, inputs.labels, teacher, Objective(0.5))[0])


def reference(inputs: Inputs) -> Tensor:
    terms = compute_position_terms(Head(inputs.weight).logits(inputs.hidden), inputs.labels, inputs.teacher)
    return backward(terms.mix(0.5, 1.0).sum())


def make_axolotl(inputs: Inputs) -> Callable[[Inputs], Tensor]:
    """Axolotl's kernel reads entries padded to the longest position, and shifts the labels itself."""
    from axolotl.integrations.kd.kernels import LigerFusedLinearKLTopKLogprobLoss

    loss = LigerFusedLinearKLTopKLogprobLoss(beta=0.0, compiled=False)

    def pad(teacher: TopKLogprobs) -> tuple[Tensor, Tensor, Tensor]:
        owners, counts = teacher.positions, teacher.counts
        columns = torch.arange(len(owners), device=owners.device) - teacher.offsets[:-1][owners]
        shape = (len(teacher), int(counts.max()))
        ids = owners.new_zeros(shape).index_put_((owners, columns), teacher.token_ids)
        values = teacher.logprobs.new_full(shape, -1e9).index_put_((owners, columns), teacher.logprobs)
        return ids[None], values[None], values[None] > -1e9

    padded = {len(part.labels): pad(part.teacher) for part in (inputs, inputs.first(8))}

    def step(inputs: Inputs) -> Tensor:
        # Its shift drops the first label and leaves the last position without one.
        labels = torch.roll(inputs.labels, 1)[None]
        return backward(loss(inputs.weight, inputs.hidden[None], *padded[len(inputs.labels)], labels))

    return step


def make_liger(inputs: Inputs) -> Callable[[Inputs], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(beta=0.0, compiled=inputs.hidden.is_cuda)
    return lambda inputs: backward(
        loss(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.labels)
    )


def make_trl_chunked(inputs: Inputs) -> Callable[[Inputs], Tensor]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction as Divergence

    def step(inputs: Inputs) -> Tensor:
        student, teacher = (inputs.hidden, inputs.weight, None), (inputs.teacher_hidden, inputs.teacher_weight, None)
        return backward(Divergence.apply(*student, *teacher, 0.0)[0].sum())

    return step


def make_trl_gkd(inputs: Inputs) -> Callable[[Inputs], Tensor]:
    from trl.experimental.gkd import GKDTrainer

    def step(inputs: Inputs) -> Tensor:
        with torch.no_grad():
            teacher_logits = functional.linear(inputs.teacher_hidden, inputs.teacher_weight)
        logits = functional.linear(inputs.hidden, inputs.weight)
        return backward(GKDTrainer.generalized_jsd_loss(logits, teacher_logits, beta=0.0, reduction="sum"))

    return step


PLAIN = {
    "matmuls": multiply,
    "plain_ce": plain_ce,
    "fused_t1": fused,
    "fused_t2": partial(fused, temperature=2.0),
    "reference": reference,
    "fused_dense": fused_dense,
}
PEERS = {"axolotl": make_axolotl, "liger": make_liger, "trl_chunked": make_trl_chunked, "trl_gkd": make_trl_gkd}
