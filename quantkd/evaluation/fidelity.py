"""Fidelity: how near a model's distribution is to the stored teacher's, on held-out rows, teacher-forced."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import reduce
from torch import Tensor
from tqdm import tqdm

from quantkd.collator import DistillationCollator
from quantkd.evaluation.sharing import deal_batches
from quantkd.hardware import process_state
from quantkd.head import find_head, hidden_states_as_logits, why_not_fusable
from quantkd.losses import select_targets
from quantkd.row_metrics import ROW_COLUMNS, compute_row_metrics, summarize_rows
from quantkd.transfer_set import TransferSet

__all__ = ["Fidelity", "evaluate_fidelity"]


@dataclass(frozen=True)
class Fidelity:
    """Sums per held-out row, so that means and intervals over rows follow.

    Args:
        rows: (R, 5) float64 in the set's order, columns as in `quantkd.row_metrics.ROW_COLUMNS`.
    """

    rows: Tensor

    def to_json(self) -> dict[str, Any]:
        """The figures as JSON values.

        Returns:
            Means over tokens (`kl` and `ce` in nats, `perplexity`, `top1_agreement`), and under `rows` the sums of
            every row.
        """
        names = ("tokens", "kl_sum", "ce_sum", "agree")
        counts = ("tokens", "agree")
        per_row = [
            {
                name: int(row[ROW_COLUMNS.index(name)]) if name in counts else row[ROW_COLUMNS.index(name)]
                for name in names
            }
            for row in self.rows.tolist()
        ]
        summary = summarize_rows(self.rows)
        return {"rows": per_row, **{name: value for name, value in summary.items() if name != "loss"}}


def evaluate_fidelity(
    model: Any, transfer_set: TransferSet, *, batch_size: int = 8, share: bool = False, progress: bool = True
) -> Fidelity:
    """Run a model over held-out rows and compare it with the teacher at every target position.

    Args:
        model: a causal language model, with or without adapters; in evaluation mode meanwhile.
        transfer_set: the held-out rows.
        batch_size: rows a batch. Rows of like length go together; the result is in the set's order.
        share: deal the rows to all processes of the launcher, each of which holds the whole model and must make this
            same call; all return all rows.
        progress: show a bar if there is a terminal.

    Returns:
        The sums of every row. Forward KL is at temperature 1 over the stored entries and the tail.

    Raises:
        ConfigError: a batch size below 1.
    """
    collate = DistillationCollator(pad_token_id=0)  # whatever fills the padding is masked and never a target
    batches = deal_batches(transfer_set.lengths.tolist(), batch_size, share)
    quiet = None if progress and (not share or process_state().is_main_process) else True
    rows = torch.zeros(len(transfer_set), len(ROW_COLUMNS), dtype=torch.float64)
    training = model.training
    model.eval()
    head = find_head(model) if why_not_fusable(model) is None else None
    for indices in tqdm(batches, desc="fidelity", unit="batch", disable=quiet):
        batch = collate(transfer_set.__getitems__(indices))
        with torch.inference_mode():
            labels = batch["labels"].to(model.device)
            with hidden_states_as_logits(model) if head is not None else nullcontext():
                outputs = model(
                    input_ids=batch["input_ids"].to(model.device),
                    attention_mask=batch["attention_mask"].to(model.device),
                )
            hidden, targets = select_targets(outputs.logits, labels)
            found = compute_row_metrics(hidden, targets, batch["teacher"].to(hidden.device), labels, head=head)
        rows[indices] = found.double().cpu()
    model.train(training)
    if share and process_state().num_processes > 1:  # each process has filled in its own rows
        rows = reduce(rows.to(process_state().device), "sum").cpu()
    return Fidelity(rows)
