"""The plan of a capture, fixed before the first token, and what it will cost."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantkd.errors import ConfigError, DataError, TransferSetError
from quantkd.hardware import process_state
from quantkd.names import public_name
from quantkd.teacher.batches import Probe, probe_batch_size
from quantkd.teacher.filters import Filter
from quantkd.teacher.table import PromptTable
from quantkd.teacher.teacher import GenerationSettings, Teacher
from quantkd.transfer_set import Plan, estimate_bytes
from quantkd.transfer_set.fingerprint import compute_fingerprint
from quantkd.transfer_set.index import INDEX_NAME, PLAN_NAME, read_index, read_plan
from quantkd.transfer_set.rules import StorageRule, storage_rule_to_dict

# Small sets are still cut into this many shards, so that as many processes can share the work.
_MIN_SHARDS = 16
_MAX_ROWS_PER_SHARD = 1024


@dataclass(frozen=True)
class CaptureEstimate:
    """What a capture will do and cost.

    Args:
        plan: the plan.
        prompt_tokens: tokens of all prompts, exact.
        response_tokens: tokens of all answers; exact for given ones, else at most.
        is_exact: whether `response_tokens` is exact.
        num_bytes: bytes of the set; an upper bound where the tokens are.
        free_bytes: bytes free on its disk.
        seconds: how long it may take; None where no speed is known yet.
        num_processes: how many share it.
    """

    plan: Plan
    prompt_tokens: int
    response_tokens: int
    is_exact: bool
    num_bytes: int
    free_bytes: int
    seconds: float | None
    num_processes: int


def build_plan(
    teacher: Teacher,
    tokenizer: Any,
    table: PromptTable,
    *,
    rule: StorageRule,
    settings: GenerationSettings,
    responses: Literal["generate", "given"],
    chat_template: bool,
    profile: str,
    batch_size: int,
    rows_per_shard: int | None,
    filters: Sequence[Filter],
    adapter: dict[str, str],
) -> Plan:
    """Everything that decides the set's bytes."""
    samples = table.num_samples
    if rows_per_shard is None:
        batches = -(-table.num_rows // (_MIN_SHARDS * batch_size))
        rows_per_shard = min(batches * batch_size, max(_MAX_ROWS_PER_SHARD // batch_size, 1) * batch_size)
    rows_per_shard = -(-rows_per_shard // samples) * samples  # the samples of a prompt lie in one shard
    generation: dict[str, Any] = {"chat_template": chat_template, "seed": settings.seed}
    if responses == "generate":
        generation |= {"max_new_tokens": settings.max_new_tokens, "do_sample": settings.do_sample}
        if settings.do_sample:
            generation |= {
                "temperature": settings.generation_temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
            }
    if samples > 1:
        generation["num_samples"] = samples
    extra: dict[str, Any] = {}
    if teacher.engine != "transformers":
        extra["engine"] = teacher.engine
    if adapter:
        extra["adapter"] = adapter
    if filters:
        extra["filters"] = [each.describe() for each in filters]
    if table.first_row:
        extra["first_row"] = table.first_row
    return Plan(
        teacher_name=public_name(teacher.name),
        teacher_revision=teacher.revision,
        teacher_dtype=teacher.dtype,
        tokenizer_fingerprint=compute_fingerprint(tokenizer),
        vocab_size=teacher.vocab_size,
        storage=storage_rule_to_dict(rule),
        profile=profile,
        temperatures=tuple(teacher.temperatures),
        responses=responses,
        generation=generation,
        prompts_digest=table.digest(),
        num_prompts=table.num_rows,
        rows_per_shard=rows_per_shard,
        batch_size=batch_size,
        extra=extra,
    )


def choose_batch_size(
    folder: Path,
    teacher: Teacher,
    table: PromptTable,
    responses: str,
    max_new_tokens: int,
    plan_with: Callable[[int], Plan],
) -> Probe:
    """The batch size of the plan that lies at `folder`, or of a probe that the main process makes for all."""
    state = process_state()
    found: list[Any] = [None]
    if state.is_main_process:
        size = _planned_batch_size(folder, plan_with)
        if size is None:
            probe = probe_batch_size(teacher, table, responses, max_new_tokens)
            # A process of another launch may have been faster; its plan counts.
            size = _planned_batch_size(folder, plan_with)
            found = [probe if size is None else Probe(size)]
        else:
            found = [Probe(size)]
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    chosen: Probe = found[0]
    return chosen


def _planned_batch_size(folder: Path, plan_with: Callable[[int], Plan]) -> int | None:
    """The batch size of the plan on disk, if nothing else tells it from the wanted one."""
    try:
        if (folder / INDEX_NAME).exists():
            plan = read_index(folder).plan
        elif (folder / PLAN_NAME).exists():
            plan = read_plan(folder)
        else:
            return None
    except TransferSetError:
        return None  # the writer, which is opened next, says in words what is wrong with it
    return plan.batch_size if plan_with(plan.batch_size).digest() == plan.digest() else None


def check_lengths(table: PromptTable, numbers: Sequence[int], max_context: int | None, max_new_tokens: int) -> None:
    """Refuse prompts that leave no room for the answer, before any work is spent."""
    lengths = table.lengths()
    answers = lengths[:, 1] if table.is_given else lengths[:, 1] + max_new_tokens
    if not lengths[:, 0].all():
        index = int((lengths[:, 0] == 0).argmax())
        raise DataError(f"Row {numbers[index]} has a prompt without tokens; expected at least one. Remove the row.")
    too_long = lengths[:, 0] + answers > (max_context or 2**62)
    if too_long.any():
        index = int(too_long.argmax())
        raise DataError(
            f"Row {numbers[index]} has a prompt of {lengths[index, 0]} tokens; with {answers[index]} tokens for the "
            f"answer that is more than the teacher's context of {max_context}. Shorten it (fewer shots), "
            "remove it, or lower max_new_tokens."
        )


def estimate_capture(
    plan: Plan, table: PromptTable, folder: Path, probe: Probe | None, max_new_tokens: int
) -> CaptureEstimate:
    """What a capture will cost, as far as it can be known beforehand."""
    prompts = table.prompt_tokens()
    given = int(table.lengths()[:, 1].sum()) * table.num_samples
    responses = given if table.is_given else table.num_rows * max_new_tokens
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    speed = probe.tokens_per_second if probe else None
    processes = process_state().num_processes
    return CaptureEstimate(
        plan=plan,
        prompt_tokens=prompts,
        response_tokens=responses,
        is_exact=table.is_given,
        num_bytes=estimate_bytes(plan, prompts, responses),
        free_bytes=shutil.disk_usage(existing).free,
        seconds=responses / (speed * processes) if speed else None,
        num_processes=processes,
    )


def check_disk(estimate: CaptureEstimate, folder: Path) -> None:
    """Refuse a set that cannot fit on its disk even if every answer were one token long."""
    if (folder / PLAN_NAME).exists() or (folder / INDEX_NAME).exists():
        return  # part of it, or all, is there already
    rows = estimate.plan.num_prompts
    least = estimate_bytes(
        estimate.plan, estimate.prompt_tokens, estimate.response_tokens if estimate.is_exact else rows
    )
    if least > 1.1 * estimate.free_bytes:  # the estimate is a few per cent off
        raise ConfigError(
            f"The set needs at least {least} bytes, and {estimate.free_bytes} are free at {folder}. Choose another "
            "disk, fewer prompts, profile='compact', or a storage rule that keeps fewer entries."
        )
