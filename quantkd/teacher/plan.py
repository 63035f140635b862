"""The plan of a capture, fixed before the first token, and what it will cost."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from quantkd.errors import ConfigError
from quantkd.names import public_name
from quantkd.teacher.filters import Filter
from quantkd.teacher.teacher import RunSettings, Teacher
from quantkd.transfer_set import Plan, estimate_bytes
from quantkd.transfer_set.fingerprint import compute_fingerprint
from quantkd.transfer_set.index import INDEX_NAME, PLAN_NAME, read_index, read_plan
from quantkd.transfer_set.rules import storage_rule_to_dict

# Small sets are still cut into this many shards, so that as many processes can share the work.
_MIN_SHARDS = 16
_MAX_ROWS_PER_SHARD = 1024


@dataclass(frozen=True)
class CaptureEstimate:
    """What a capture will do and cost, known before anything is written.

    Args:
        plan: the plan.
        prompt_tokens: tokens of all prompts.
        response_tokens: tokens of all answers; at most, where `is_exact` is False.
        is_exact: whether the answers are given.
        num_bytes: bytes of the set; an upper bound where the tokens are one.
        free_bytes: bytes free on its disk.
    """

    plan: Plan
    prompt_tokens: int
    response_tokens: int
    is_exact: bool
    num_bytes: int
    free_bytes: int


def build_plan(
    teacher: Teacher,
    run: RunSettings,
    filters: Sequence[Filter],
    *,
    num_rows: int,
    prompts_digest: str,
    batch_size: int,
    responses: Literal["generate", "given"],
    chat_template: bool,
) -> Plan:
    """Everything that decides the set's bytes."""
    settings = teacher.settings
    rows_per_shard = run.rows_per_shard
    if rows_per_shard is None:
        batches = -(-num_rows // (_MIN_SHARDS * batch_size))
        rows_per_shard = min(batches * batch_size, max(_MAX_ROWS_PER_SHARD // batch_size, 1) * batch_size)
    # The samples of a prompt stay in one shard.
    rows_per_shard = -(-rows_per_shard // settings.num_samples) * settings.num_samples
    generation: dict[str, Any] = {"chat_template": chat_template, "seed": settings.seed}
    if responses == "generate":
        generation |= {"max_new_tokens": settings.max_new_tokens, "do_sample": settings.do_sample}
        if settings.do_sample:
            generation |= {
                "temperature": settings.generation_temperature,
                "top_p": settings.top_p,
                "top_k": settings.top_k,
            }
    if settings.num_samples > 1:
        generation["num_samples"] = settings.num_samples
    extra = teacher.describe()
    if filters:
        extra["filters"] = [each.describe() for each in filters]
    return Plan(
        teacher_name=public_name(teacher.name),
        teacher_revision=teacher.revision,
        teacher_dtype=teacher.dtype,
        tokenizer_fingerprint=compute_fingerprint(teacher.tokenizer),
        vocab_size=teacher.vocab_size,
        storage=storage_rule_to_dict(teacher.rule),
        profile=run.profile,
        temperatures=teacher.temperatures,
        responses=responses,
        generation=generation,
        prompts_digest=prompts_digest,
        num_prompts=num_rows,
        rows_per_shard=rows_per_shard,
        batch_size=batch_size,
        extra=extra,
    )


def find_planned_batch_size(folder: Path) -> int | None:
    """The batch size of the plan on disk, if there is one."""
    if (folder / INDEX_NAME).exists():
        return read_index(folder).plan.batch_size
    return read_plan(folder).batch_size if (folder / PLAN_NAME).exists() else None


def estimate_capture(
    plan: Plan, folder: Path, *, prompt_tokens: int, response_tokens: int, is_exact: bool
) -> CaptureEstimate:
    """What a capture will cost, refused if the set cannot fit on its disk even if every answer were one token long."""
    existing = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    estimate = CaptureEstimate(
        plan=plan,
        prompt_tokens=prompt_tokens,
        response_tokens=response_tokens,
        is_exact=is_exact,
        num_bytes=estimate_bytes(plan, prompt_tokens, response_tokens),
        free_bytes=shutil.disk_usage(existing).free,
    )
    least = estimate_bytes(plan, prompt_tokens, response_tokens if is_exact else plan.num_prompts)
    begun = (folder / PLAN_NAME).exists() or (folder / INDEX_NAME).exists()
    if not begun and least > 1.1 * estimate.free_bytes:  # the estimate is a few per cent off
        raise ConfigError(
            f"The set needs at least {least} bytes, and {estimate.free_bytes} are free at {folder}. Choose another "
            "disk, fewer prompts, profile='compact', or a storage rule that keeps fewer entries."
        )
    return estimate
