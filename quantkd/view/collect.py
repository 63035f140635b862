"""Run a student over held-out rows, without and with its adapter, and compare both with the stored teacher."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from tqdm import tqdm

from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.sharing import deal_batches
from quantkd.loss.metrics import compare_with_entries, compute_predictions, cut_positions
from quantkd.loss.states import TargetStates
from quantkd.models.network import Runner, evaluation_mode
from quantkd.names import public_name
from quantkd.transfer_set import TransferSet
from quantkd.transfer_set.batch import IGNORE_INDEX, DistillationCollator, RowBatch
from quantkd.transfer_set.fingerprint import check_fingerprint
from quantkd.transfer_set.topk import TopKLogprobs
from quantkd.view.divergence import Alternatives, Divergence, RowDivergence
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
    student_name: str = "student",
    adapter_name: str = "adapter",
) -> Divergence:
    """Compare a student with the stored teacher at every target, without and with its adapter, teacher-forced.

    Args:
        model: the student with its adapter.
        transfer_set: held-out rows.
        tokenizer: the student's.
        rows: how many to show, from the front.
        alternatives: the teacher's most probable tokens per position.
        batch_size: rows per forward pass.
        student_name: what the page calls the student.
        adapter_name: what the page calls the adapter.

    Returns:
        What `write_page` writes: KL in nats per token, and tokens with their probabilities.

    Raises:
        ConfigError: a model without an adapter, or less than one row or alternative.
        DataError: a set without rows.
        TransferSetError: a set that another tokenizer wrote.
    """
    if not isinstance(model, PeftModel):
        raise ConfigError(f"The model is a {type(model).__name__}; expected a PeftModel. Load the adapter onto it.")
    if rows < 1 or alternatives < 1:
        raise ConfigError(f"rows and alternatives are {rows} and {alternatives}; expected at least 1.")
    if not len(transfer_set):
        raise DataError("The transfer set has no rows to show; capture at least one held-out prompt.")
    check_fingerprint(transfer_set.info.tokenizer_fingerprint, tokenizer, what="The transfer set")
    shown = transfer_set[:rows]
    batches = deal_batches(shown.lengths.tolist(), batch_size, share=False)
    found: list[RowDivergence] = []
    trained = [parameter.requires_grad for parameter in model.parameters()]
    try:
        with evaluation_mode(model):  # as `quantkd evaluate`, so that both print the same figures
            runner = Runner(model)
            for indices in tqdm(batches, desc="view", unit="batch", disable=None):
                found += _compare_batch(runner, shown.__getitems__(indices), indices, tokenizer, alternatives)
    finally:
        for parameter, requires_grad in zip(model.parameters(), trained, strict=True):
            parameter.requires_grad_(requires_grad)  # which PEFT's switch changes
    found.sort(key=lambda row: row.index)
    ids = np.concatenate([part for row in found for part in (row.token_ids, row.alternatives.token_ids)])
    return Divergence(
        rows=tuple(found),
        tokens=spell_tokens(tokenizer, ids.tolist()),
        teacher=public_name(transfer_set.info.teacher_name),
        student=public_name(student_name),
        adapter=public_name(adapter_name),
        digest=transfer_set.digest,
        num_rows=len(transfer_set),
    )


def _compare_batch(
    runner: Runner, fetched: RowBatch, indices: list[int], tokenizer: PreTrainedTokenizerBase, alternatives: int
) -> Iterator[RowDivergence]:
    """The rows of one batch."""
    batch = DistillationCollator(pad_token_id=0)(fetched)  # padding is masked and never a target, whatever its id
    with runner.model.disable_adapter(), torch.inference_mode():
        before, targets = runner.run(batch)
    with torch.inference_mode():
        after, _ = runner.run(batch)
    teacher = batch["teacher"].to(targets.device)
    bounds = np.append(0, fetched.target_counts.cumsum(0).numpy())
    starts = np.append(0, fetched.lengths.cumsum(0).numpy())
    for place, index in enumerate(indices):
        own = slice(*bounds[place : place + 2])
        stored = teacher.select(own)
        with torch.inference_mode():
            columns = _compare_students(before.select(own), after.select(own), targets[own], stored, alternatives)
        if not (np.isfinite(columns["kl_before"]).all() and np.isfinite(columns["kl_after"]).all()):
            raise DataError(
                f"The student's KL at row {index} is not finite; expected finite logits. Load it in another dtype, or "
                "check it with `quantkd selftest`."
            )
        part = slice(*starts[place : place + 2])
        ids, is_target = fetched.input_ids[part], fetched.labels[part] != IGNORE_INDEX
        offsets = np.append(0, columns.pop("counts").cumsum())
        entries = {name: columns.pop(name) for name in ("token_ids", "teacher", "before", "after")}
        yield RowDivergence(
            index=index,
            finished=bool(fetched.finished[place]),
            token_ids=ids[is_target].numpy(),
            contexts=_read_contexts(tokenizer, ids.tolist(), is_target.tolist()),
            top_teacher=entries["token_ids"][offsets[:-1]],
            alternatives=Alternatives(offsets, **entries),
            **columns,
        )


def _compare_students(
    before: TargetStates, after: TargetStates, targets: Tensor, teacher: TopKLogprobs, limit: int
) -> dict[str, NDArray[Any]]:
    """The columns of a row, a chunk of both students' logits at a time."""
    chunks: list[dict[str, NDArray[Any]]] = []
    for part in cut_positions(before, dense=False):
        logits = [states.logits(part) for states in (before, after)]
        predicted = [compute_predictions(values, targets[part]) for values in logits]
        entries = teacher.select(part)
        first_choices = torch.stack([targets[part], *(each.top_ids for each in predicted)], dim=-1)
        found = _choose_alternatives(entries, first_choices.tolist(), limit)
        positions = torch.from_numpy(np.repeat(np.arange(len(entries)), found["counts"])).to(targets.device)
        chosen = torch.from_numpy(found["token_ids"]).to(targets.device)
        for name, values, each in zip(("before", "after"), logits, predicted, strict=True):
            found[name] = (values[positions, chosen] - each.log_z[positions]).cpu().double().numpy()
            found[f"top_{name}"] = each.top_ids.cpu().numpy()
            # Last, for it overwrites the logits.
            found[f"kl_{name}"] = compare_with_entries(values, each, entries).kl.cpu().double().numpy()
        chunks.append(found)
        del logits, values  # before the next part's are made
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def _choose_alternatives(entries: TopKLogprobs, extras: list[list[int]], limit: int) -> dict[str, NDArray[Any]]:
    """How many at each target, their ids, and the teacher's log-probabilities, nan where it stored none."""
    offsets, ids, logprobs = entries.offsets.tolist(), entries.token_ids.tolist(), entries.logprobs.tolist()
    kept: list[list[int]] = []
    known: list[float] = []
    for (start, stop), extra in zip(itertools.pairwise(offsets), extras, strict=True):
        stored = dict(zip(ids[start:stop], logprobs[start:stop], strict=True))
        ranked = sorted(stored, key=lambda token: -stored[token])  # stable: the stored first one stays the first
        kept.append(list(dict.fromkeys([*ranked[:limit], *extra])))
        known += [stored.get(token, np.nan) for token in kept[-1]]
    return {
        "counts": np.array([len(tokens) for tokens in kept], dtype=np.int64),
        "token_ids": np.array([token for tokens in kept for token in tokens], dtype=np.int64),
        "teacher": np.array(known, dtype=np.float64),
    }


def _read_contexts(tokenizer: Any, ids: list[int], is_target: list[bool]) -> tuple[tuple[int, str], ...]:
    """Each run of tokens that are not targets, as text, with the number of targets before it."""
    contexts: list[tuple[int, str]] = []
    targets = 0
    for target, run in itertools.groupby(zip(ids, is_target, strict=True), key=lambda pair: pair[1]):
        tokens = [token for token, _ in run]
        if target:
            targets += len(tokens)
        else:
            contexts.append((targets, decode_text(tokenizer, tokens)))
    return tuple(contexts)
