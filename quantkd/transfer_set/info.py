"""TransferSetInfo: what a set is, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["TransferSetInfo"]


@dataclass(frozen=True)
class TransferSetInfo:
    """Facts about a set, a view of it, or several joined.

    The first fields come from the plan; for joined sets from the first one, with names listed by ", ". Counts are of
    the rows at hand. `num_bytes` is what the files of the underlying sets take on disk, all included.

    Args:
        teacher_name: the teacher's name or path.
        teacher_revision: its commit, or "".
        teacher_dtype: such as "bfloat16".
        tokenizer_fingerprint: sha256 in hexadecimal.
        vocab_size: V.
        storage: the storage rule as JSON.
        profile: "faithful" or "compact".
        temperatures: those with a stored log-normalizer.
        generation: generation settings.
        responses: "generate" or "given".
        num_rows: rows at hand.
        num_prompts: prompts in the plan.
        num_tokens: tokens of the rows.
        num_response_tokens: target positions of the rows.
        num_entries: stored entries of the rows.
        num_bytes: bytes on disk.
        bytes_per_response_token: `num_bytes` of the whole sets over their target positions; nan without any.
        mean_entries: entries per target position; nan without any.
        counters: what the captures counted, summed.
        digest: names the set, or the view.
        complete: whether every shard of the plan is there.
    """

    teacher_name: str
    teacher_revision: str
    teacher_dtype: str
    tokenizer_fingerprint: str
    vocab_size: int
    storage: dict[str, Any]
    profile: str
    temperatures: tuple[float, ...]
    generation: dict[str, Any]
    responses: str
    num_rows: int
    num_prompts: int
    num_tokens: int
    num_response_tokens: int
    num_entries: int
    num_bytes: int
    bytes_per_response_token: float
    mean_entries: float
    counters: dict[str, int]
    digest: str
    complete: bool
