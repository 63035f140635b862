"""Checks that need no ground truth, on any model: alignment, loss and gradients are what they claim to be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from quantkd.data.encoding import EncodedPrompt, encode_prompts
from quantkd.hardware import wide_dtype
from quantkd.loss.metrics import compute_row_metrics, summarize_rows
from quantkd.loss.reference import Objective, compute_distillation_loss, compute_position_terms
from quantkd.loss.states import TargetStates
from quantkd.teacher.teacher import GenerationSettings
from quantkd.teacher.transformers import TransformersTeacher
from quantkd.transfer_set import TransferRow
from quantkd.transfer_set.batch import DistillationCollator, RowBatch
from quantkd.transfer_set.rules import TopK
from quantkd.transfer_set.topk import TopKLogprobs

_PROMPTS = (
    "A pencil costs 3 coins. How many coins do 7 pencils cost?",
    "Name two colours.",
    "Tom has 12 apples and gives away 5. How many are left? Explain step by step.",
    "Write one short sentence about the sea.",
)
_MAX_KL = 1e-6
_MIN_SHIFTED_KL = 1e-2
_MAX_GRADIENT_ERROR = 1e-5


@dataclass(frozen=True)
class Check:
    """One line of the self-test: what must hold, whether it does, and the figure that says so."""

    name: str
    passed: bool
    figure: str


def run_selftest(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = True, max_new_tokens: int = 24
) -> Iterator[Check]:
    """Distil a model into itself and check what must then be true."""
    rule = TopK(min(50, model.get_output_embeddings().weight.shape[0]))
    teacher = TransformersTeacher(model, tokenizer, rule, (1.0, 2.0), GenerationSettings(max_new_tokens))
    prompts = encode_prompts(tokenizer, _PROMPTS, chat_template=chat_template)
    rows = list(teacher.answer([EncodedPrompt(index, ids) for index, ids in enumerate(prompts)]))
    model.eval()
    yield from _agreement_checks(model, _collate(rows, teacher))
    yield from _gradient_checks(model, rows, teacher)


@torch.no_grad()
def _agreement_checks(model: Any, batch: dict[str, Any]) -> Iterator[Check]:
    """Whether teacher and student, the same model, agree where they should and only there."""
    logits = _logits(model, batch)
    states, targets = TargetStates(logits).at_targets(batch["labels"])
    own = compute_row_metrics(TargetStates(logits), batch["labels"], batch["teacher"], Objective(alpha=1.0))
    metrics = summarize_rows(own)
    figure = f"KL {metrics['kl']:.2e}, top-1 agreement {metrics['top1_agreement']:.4f}"
    yield Check(f"teacher = student has a KL below {_MAX_KL:g}", abs(metrics["kl"]) < _MAX_KL, figure)
    for name, shift in (("late", 1), ("early", -1)):
        moved, targets = TargetStates(logits.roll(shift, dims=1)).at_targets(batch["labels"])
        kl = float(compute_position_terms(moved.logits(), targets, batch["teacher"]).kl.mean())
        yield Check(f"a shift by one, {name}, is detected", kl > _MIN_SHIFTED_KL, f"KL {kl:.3f}")
    target_logits = states.logits()
    dense = TopKLogprobs.from_dense(target_logits, (1.0, 2.0))
    student = target_logits.roll(1, dims=0)
    ours = compute_position_terms(student, targets, dense, temperature=2.0).kl.sum()
    log_p, log_q = (x.double().div(2).log_softmax(-1) for x in (target_logits, student))
    exact = torch.nn.functional.kl_div(log_q, log_p, reduction="sum", log_target=True)
    error = abs(float(ours) / float(exact) - 1)
    yield Check("with every class stored, KL is the dense KL", error < 1e-5, f"relative error {error:.1e}")


def _gradient_checks(model: Any, rows: list[TransferRow], teacher: TransformersTeacher) -> Iterator[Check]:
    """Whether the gradient is the same however the same rows are split and padded."""
    whole = _gradient(model, [_collate(rows, teacher)])
    splits = {
        "one row at a time": [_collate([row], teacher) for row in rows],
        "unequal micro-batches": [_collate(rows[:1], teacher), _collate(rows[1:], teacher)],
        "more padding": [_collate(rows, teacher, pad_to_multiple_of=64)],
    }
    for name, batches in splits.items():
        error = float((_gradient(model, batches) - whole).norm() / whole.norm())
        yield Check(f"the gradient is the same with {name}", error < _MAX_GRADIENT_ERROR, f"relative error {error:.1e}")


def _gradient(model: Any, batches: list[dict[str, Any]]) -> Tensor:
    """Of norms and biases alone, which see every layer and cost no memory."""
    parameters = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    total = sum(len(batch["teacher"]) for batch in batches)
    sums = [torch.zeros_like(each, dtype=wide_dtype(each.device)) for each in parameters]
    for batch in batches:
        # Against a teacher at another temperature, so that the gradient is far from zero.
        loss = compute_distillation_loss(
            _logits(model, batch), batch["labels"], batch["teacher"], alpha=0.5, temperature=2.0, num_items=total
        )
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        sums = [each if new is None else each + new for each, new in zip(sums, found, strict=True)]
    return torch.cat([each.flatten() for each in sums])


def _logits(model: Any, batch: dict[str, Any]) -> Tensor:
    device = model.device
    output = model(input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device))
    logits: Tensor = output.logits
    return logits.cpu()


def _collate(rows: list[TransferRow], teacher: TransformersTeacher, **options: Any) -> dict[str, Any]:
    """A batch as that of a `TransferSet`, without the rounding of a store."""
    batch = RowBatch.from_rows(rows, teacher.temperatures, teacher.vocab_size, [None] * len(rows))
    return DistillationCollator(pad_token_id=0, **options)(batch)
