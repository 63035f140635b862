"""Running a student twice over held-out rows, without and with its adapter, and keeping what each token shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.sharing import deal_batches
from quantkd.loss.reference import select_targets
from quantkd.models.network import base_network, find_head, hidden_states_as_logits, why_not_fusable
from quantkd.names import short_name
from quantkd.transfer_set import IGNORE_INDEX, TransferSet
from quantkd.transfer_set.collator import DistillationCollator
from quantkd.transfer_set.fingerprint import check_fingerprint
from quantkd.view.compare import Outputs, compare_students
from quantkd.view.divergence import Divergence, RowDivergence
from quantkd.view.spelling import decode_text, spell_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def collect_divergence(
    model: Any,
    transfer_set: TransferSet,
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int = 50,
    alternatives: int = 8,
    batch_size: int = 8,
    student_name: str | None = None,
    adapter_name: str = "adapter",
    progress: bool = True,
) -> Divergence:
    """Compare a student with the stored teacher at every target, without and with its adapter, teacher-forced."""
    for name, number in (("rows", rows), ("alternatives", alternatives)):
        if number < 1:
            raise ConfigError(f"{name} is {number}; expected at least 1.")
    if not isinstance(model, PeftModel):
        raise ConfigError(
            f"The model is a {type(model).__name__}; expected a PeftModel, whose adapter can be switched off for the "
            "look before training. Load the adapter with PeftModel.from_pretrained."
        )
    if not len(transfer_set):
        raise DataError("The transfer set has no rows to show; capture at least one held-out prompt.")
    check_fingerprint(transfer_set.info.tokenizer_fingerprint, tokenizer, what="The transfer set")
    shown = transfer_set[:rows]
    batches = deal_batches(shown.lengths.tolist(), batch_size, share=False)
    found: dict[int, RowDivergence] = {}
    with _evaluating(model):
        with model.disable_adapter():
            fusable = why_not_fusable(model) is None
        fusable = fusable and why_not_fusable(model) is None
        for indices in tqdm(batches, desc="view", unit="batch", disable=None if progress else True):
            for row in _compare_batch(model, shown, indices, tokenizer, alternatives, fusable):
                found[row.index] = row
    seen = tuple(found[index] for index in sorted(found))
    ids = np.concatenate([part for row in seen for part in (row.token_ids, row.alternatives.token_ids)])
    return Divergence(
        rows=seen,
        tokens=spell_tokens(tokenizer, ids.tolist()),
        teacher=_without_path(transfer_set.info.teacher_name),
        student=_without_path(student_name or str(base_network(model).config._name_or_path) or "student"),
        adapter=_without_path(adapter_name),
        digest=transfer_set.digest,
        num_rows=len(transfer_set),
    )


def _compare_batch(
    model: PeftModel,
    shown: TransferSet,
    indices: list[int],
    tokenizer: PreTrainedTokenizerBase,
    alternatives: int,
    fusable: bool,
) -> Iterator[RowDivergence]:
    """The rows of one batch."""
    fetched = shown.__getitems__(indices)
    batch = DistillationCollator(pad_token_id=0)(fetched)  # whatever fills the padding is masked and never a target
    labels, teacher = batch["labels"].to(model.device), batch["teacher"].to(model.device)
    with model.disable_adapter(), torch.inference_mode():
        before, targets = _run(model, batch, labels, fusable)
    with torch.inference_mode():
        after, _ = _run(model, batch, labels, fusable)
        compared = compare_students(before, after, targets, teacher, alternatives)
    bounds = np.append(0, fetched.target_counts.cumsum(0).numpy())
    starts = np.append(0, fetched.lengths.cumsum(0).numpy())
    for place, index in enumerate(indices):
        own = compared.select(bounds[place], bounds[place + 1])
        if not (np.isfinite(own.kl_before).all() and np.isfinite(own.kl_after).all()):
            raise DataError(
                f"The student's KL at row {index} is not finite, so its logits are not either; expected finite ones. "
                "Load it in another dtype, or check it with `quantkd selftest`."
            )
        part = slice(starts[place], starts[place + 1])
        ids, is_target = fetched.input_ids[part], fetched.labels[part] != IGNORE_INDEX
        yield RowDivergence(
            index=index,
            finished=bool(fetched.finished[place]),
            token_ids=ids[is_target].numpy(),
            contexts=_read_contexts(tokenizer, ids.tolist(), is_target.tolist()),
            kl_before=own.kl_before,
            kl_after=own.kl_after,
            top_teacher=own.alternatives.token_ids[own.alternatives.offsets[:-1]],
            top_before=own.top_before,
            top_after=own.top_after,
            alternatives=own.alternatives,
        )


def _run(model: PeftModel, batch: dict[str, Any], labels: Tensor, fusable: bool) -> tuple[Outputs, Tensor]:
    """One forward pass of the model as it stands, at the N targets, and the (N,) targets."""
    head = find_head(model) if fusable else None
    with hidden_states_as_logits(model) if fusable else nullcontext():
        outputs = model(
            input_ids=batch["input_ids"].to(model.device), attention_mask=batch["attention_mask"].to(model.device)
        )
    hidden, targets = select_targets(outputs.logits, labels)
    return Outputs(hidden, head), targets


def _read_contexts(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], is_target: list[bool]
) -> tuple[tuple[int, str], ...]:
    """The runs of tokens that are no targets, as text, each with the number of targets before it."""
    contexts: list[tuple[int, str]] = []
    run: list[int] = []
    targets = 0
    for token, target in [*zip(ids, is_target, strict=True), (0, True)]:  # a last target ends the last run
        if not target:
            run.append(token)
            continue
        if run:
            contexts.append((targets, decode_text(tokenizer, run)))
        run, targets = [], targets + 1
    return tuple(contexts)


def _without_path(name: str) -> str:
    """A name on the Hub as it is, and of a path the last part: where things lie is their owner's business."""
    name = short_name(name)
    is_path = name.startswith(("/", "~", ".")) or "\\" in name
    return PurePath(name.replace("\\", "/")).name if is_path else name


@contextmanager
def _evaluating(model: PeftModel) -> Iterator[None]:
    """Evaluation mode; afterwards the mode is what it was, and so is what trains, which PEFT's switch changes."""
    training, trained = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for parameter, requires_grad in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(requires_grad)
