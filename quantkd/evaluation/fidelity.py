"""Fidelity: how near a model is to the stored teacher, over k + 1 classes, and to the teacher's own model, over all."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.arms import EDGES, Arm, EvaluationSettings, Fidelity, find_bins, list_sums
from quantkd.evaluation.fingerprint import compute_model_fingerprint
from quantkd.evaluation.sharing import deal_batches, is_writer
from quantkd.evaluation.stats import Floats
from quantkd.hardware import process_state, wide_dtype
from quantkd.loss.metrics import measure_positions
from quantkd.loss.states import TargetStates
from quantkd.models.network import Runner, evaluation_mode
from quantkd.names import __version__
from quantkd.transfer_set import IGNORE_INDEX, TransferSet
from quantkd.transfer_set.batch import DistillationCollator
from quantkd.transfer_set.compatibility import check_student
from quantkd.transfer_set.topk import TopKLogprobs

_SIGNIFICANT_DIGITS = 9


@dataclass(frozen=True)
class HeldOut:
    """Held-out rows to be measured on, beside the teacher's own model where it is at hand."""

    rows: TransferSet
    teacher: Any = None

    def measure(self, model: Any, tokenizer: Any, arm: Arm, place: Path, settings: EvaluationSettings) -> Iterator[Arm]:
        """Yield the arm with its fidelity, which is kept if it was measured in the same way."""
        teacher = None
        if self.teacher is not None:
            teacher = arm.fingerprint if self.teacher is model else compute_model_fingerprint(self.teacher)
        facts: dict[str, Any] = {"transfer_set": self.rows.digest, "teacher": teacher, "quantkd_version": __version__}
        facts["batch_size"] = settings.batch_size
        if arm.fidelity is None or arm.fidelity.settings != facts:
            how = {name: getattr(settings, name) for name in ("batch_size", "share", "progress")}
            found = evaluate_fidelity(model, self.rows, teacher=self.teacher, **how)
            arm = replace(arm, fidelity=replace(found, settings=facts))
        yield arm


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
        batch_size: rows per batch. Rows of similar length share a batch; the result is in the set's order.
        share: deal the rows to all processes of the launcher, as in `EvaluationSettings`; all return all rows.
        progress: show a bar if there is a terminal.

    Returns:
        The sums of every row, at temperature 1.

    Raises:
        ConfigError: a batch size below 1, a head smaller than the set's vocabulary, or a teacher of another one.
        DataError: no rows, rows longer than the model's context, or figures that are not finite.
    """
    runner = Runner(model)
    check_student(transfer_set, runner.width, runner.context)
    other = None if teacher is None or teacher is model else Runner(teacher)
    if other is not None and other.width != runner.width:
        raise ConfigError(
            f"The model's vocabulary has {runner.width} ids, the teacher's {other.width}; figures over the whole "
            "vocabulary need the same. Give the model's own teacher, or none: the transfer set's entries suffice."
        )
    collate = DistillationCollator(pad_token_id=0)  # the padding is masked and never a target
    batches = deal_batches(transfer_set.lengths.tolist(), batch_size, share)
    quiet = None if progress and is_writer(share) else True
    found: list[tuple[list[int], dict[str, Floats]]] = []
    with evaluation_mode(model, *([] if other is None else [teacher])), torch.inference_mode():
        for indices in tqdm(batches, desc="fidelity", unit="batch", disable=quiet):
            batch = collate(transfer_set.__getitems__(indices))
            states, targets = runner.run(batch)
            teachers: dict[str, TopKLogprobs | TargetStates] = {"": batch["teacher"].to(states.device)}
            if teacher is not None:
                teachers["dense_"] = states if other is None else other.run(batch)[0].to(states.device)
            positions = measure_positions(states, targets, teachers)
            found.append((indices, sum_rows(batch["labels"], positions)))
    if share and process_state().num_processes > 1:
        found = gather_object(found)
    columns = join_rows([sums for _, sums in found], np.argsort(np.concatenate([indices for indices, _ in found])))
    finite = [np.isfinite(sums).reshape(len(transfer_set), -1).all(1) for sums in columns.values()]
    broken = len(transfer_set) - np.all(finite, axis=0).sum()
    if broken:
        raise DataError(
            f"The figures of {broken} of {len(transfer_set)} rows are not finite: the logits hold NaN or infinity. "
            "Load the model in bfloat16 or float32, or look for the step at which its training diverged."
        )
    return Fidelity(columns, {"transfer_set": transfer_set.digest})


def sum_rows(labels: Tensor, positions: Mapping[str, Tensor]) -> dict[str, Floats]:
    """Labels (B, T) and figures (N,) at target positions -> their sums per row (B,), and per row and bin (B, bins)."""
    stacked = torch.stack([values.to(wide_dtype(values.device)) for values in positions.values()])
    values = dict(zip(positions, stacked.cpu().double().numpy(), strict=True))  # one wait for the device
    is_target = (labels[:, 1:] != IGNORE_INDEX).numpy()
    rows = is_target.nonzero()[0]
    values["tokens"] = np.ones(len(rows))
    values["place"] = (is_target.cumsum(1) - 1)[is_target]  # among the row's targets, from 0
    sums: dict[str, Floats] = {}
    for kind, keys in list_sums(dense="dense_kl" in values).items():
        of = "place" if kind.endswith("position") else kind
        bins = find_bins(kind, values[of]) if kind else np.zeros(len(rows), dtype=np.int64)
        shape = (len(labels), len(EDGES[kind])) if kind else (len(labels),)
        prefix = "dense_" if kind.startswith("dense_") else ""
        for key in keys:
            summed = values[key if key == "tokens" else prefix + key.removesuffix("_sum")]
            flat = np.bincount(rows * math.prod(shape[1:]) + bins, summed, math.prod(shape))
            sums[f"{kind}/{key}".lstrip("/")] = flat.reshape(shape).astype(np.float64)
    return sums


def join_rows(parts: Sequence[Mapping[str, Floats]], order: NDArray[np.int64]) -> dict[str, Floats]:
    """The sums of several batches as one, their rows in this order."""
    return {name: _shorten(np.concatenate([sums[name] for sums in parts])[order]) for name in parts[0]}


def _shorten(sums: Floats) -> Floats:
    """Sums in as many digits as float32 terms have, which takes a third of the file."""
    return np.array([float(f"{value:.{_SIGNIFICANT_DIGITS}g}") for value in sums.ravel()]).reshape(sums.shape)
