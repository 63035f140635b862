"""Fidelity: how near a model's distribution is to its teacher's, on held-out rows, teacher-forced.

The teacher is what the transfer set stored, over k + 1 classes, and, where it is at hand, the model itself, over the
whole vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from tqdm import tqdm

from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.fidelity_sums import Fidelity, sum_rows
from quantkd.evaluation.sharing import deal_batches
from quantkd.hardware import process_state
from quantkd.loss.metrics import compare_with_entries, compare_with_logits, compute_predictions, cut_positions
from quantkd.loss.states import TargetStates
from quantkd.models.generation import context_length
from quantkd.models.network import run_to_targets, why_not_fusable
from quantkd.models.weights import head_width
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.collator import DistillationCollator
from quantkd.transfer_set.compatibility import check_student
from quantkd.transfer_set.topk import TopKLogprobs


def evaluate_fidelity(
    model: Any,
    transfer_set: TransferSet,
    *,
    teacher: Any = None,
    batch_size: int = 8,
    share: bool = False,
    progress: bool = True,
) -> Fidelity:
    """Run a model over held-out rows and compare it with the teacher at every target position.

    Args:
        model: a causal language model, with or without adapters; in evaluation mode meanwhile.
        transfer_set: the held-out rows.
        teacher: the teacher's own model, for the same figures over the whole vocabulary as well; `model` itself if it
            is the teacher. Evaluation mode meanwhile. No more than a chunk of the logits of both exists at a time.
        batch_size: rows a batch. Rows of like length go together; the result is in the set's order.
        share: deal the rows to all processes of the launcher, each of which holds the whole model and must make this
            same call; all return all rows.
        progress: show a bar if there is a terminal.

    Returns:
        The sums of every row, at temperature 1.

    Raises:
        ConfigError: a batch size below 1, a head smaller than the set's vocabulary, or a teacher of another one.
        DataError: no rows, rows longer than the model's context, or figures that are not finite.
    """
    check_student(transfer_set, head_width(model), context_length(model))
    fused = [each is not None and why_not_fusable(each) is None for each in (model, teacher)]
    if teacher is not None:
        widths = [head_width(each) for each in (model, teacher)]
        if widths[0] != widths[1]:
            raise ConfigError(
                f"The model's vocabulary has {widths[0]} ids, the teacher's {widths[1]}; figures over the whole "
                "vocabulary need the same. Give the model's own teacher, or none: the transfer set's entries suffice."
            )
    collate = DistillationCollator(pad_token_id=0)  # whatever fills the padding is masked and never a target
    batches = deal_batches(transfer_set.lengths.tolist(), batch_size, share)
    quiet = None if progress and (not share or process_state().is_main_process) else True
    found = Fidelity.zeros(len(transfer_set), dense=teacher is not None)
    training = [(each, each.training) for each in (model, teacher) if each is not None]
    for each, _ in training:
        each.eval()
    for indices in tqdm(batches, desc="fidelity", unit="batch", disable=quiet):
        batch = collate(transfer_set.__getitems__(indices))
        with torch.inference_mode():
            states, targets = run_to_targets(model, batch, fused=fused[0])
            device, beside = states.device, None
            if teacher is not None:
                beside = states if teacher is model else run_to_targets(teacher, batch, fused=fused[1])[0].to(device)
            positions = _measure_positions(states, targets, batch["teacher"].to(device), beside)
            found.place(indices, sum_rows(batch["labels"].to(device), positions))
    for each, mode in training:
        each.train(mode)
    if share and process_state().num_processes > 1:  # each process has filled in its own rows
        found = Fidelity(reduce(found.rows.to(process_state().device), "sum").cpu(), found.dense)
    broken = int((~found.rows.isfinite().all(1)).sum())
    if broken:
        raise DataError(
            f"The figures of {broken} of {len(transfer_set)} rows are not finite: the logits hold NaN or infinity. "
            "Load the model in bfloat16 or float32, or look for the step at which its training diverged."
        )
    return found


def _measure_positions(
    states: TargetStates, targets: Tensor, entries: TopKLogprobs, beside: TargetStates | None
) -> dict[str, Tensor]:
    """Every figure at each of N target positions, a chunk of logits at a time; `beside` is the teacher in memory."""
    parts: dict[str, list[Tensor]] = {}
    for part in cut_positions(len(targets), states.vocab_size):
        logits = states.logits(part)
        predictions = compute_predictions(logits, targets[part])
        chunk = {
            "ce": predictions.ce,
            "confidence": predictions.confidence,
            "correct": predictions.top_ids == targets[part],
        }
        stored = entries.select(torch.arange(len(targets), device=targets.device)[part])
        comparisons = [("", compare_with_entries(logits, predictions, stored))]
        if beside is not None:
            comparisons.append(("dense_", compare_with_logits(logits, predictions, beside.logits(part))))
        for prefix, compared in comparisons:
            chunk[f"{prefix}kl"] = compared.kl
            chunk[f"{prefix}reverse_kl"] = compared.reverse_kl
            chunk[f"{prefix}entropy"] = compared.entropy
            chunk[f"{prefix}agree"] = predictions.top_ids == compared.top_ids
        for name, values in chunk.items():
            parts.setdefault(name, []).append(values)
    return {name: torch.cat(values) for name, values in parts.items()}
