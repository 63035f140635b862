"""The pass itself: every shard that this process gets, batch by batch, through the teacher and the filters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from quantkd.data.prompts import Example
from quantkd.errors import TeacherError
from quantkd.teacher.batches import run_batch
from quantkd.teacher.filters import Filter, apply_filters
from quantkd.teacher.progress import Progress
from quantkd.teacher.table import PromptTable
from quantkd.teacher.teacher import Teacher
from quantkd.transfer_set import ShardTask, TransferRow, TransferSetWriter


@dataclass(frozen=True)
class Work:
    """What is to be captured.

    Args:
        teacher: who answers.
        table: all prompts.
        examples: of each prompt its example.
        filters: what is left out.
        decode: from token ids to text.
        responses: "generate" or "given".
        duplicate_prompts: prompts that were dropped when the plan was made.
    """

    teacher: Teacher
    table: PromptTable
    examples: Sequence[Example]
    filters: Sequence[Filter]
    decode: Callable[[Sequence[int]], str]
    responses: str
    duplicate_prompts: int = 0


def fill(writer: TransferSetWriter, work: Work, progress: Progress) -> None:
    """Run the teacher over every shard that this process gets, and commit each."""
    for task in writer.claim():
        rows = _compute(task, work, writer.plan.batch_size, progress)
        samples = work.table.num_samples
        groups = [row // samples for row in range(task.start, task.stop)]
        counters: Counter[str] = Counter()
        if work.filters:
            examples = [work.examples[group] for group in groups]
            rows, counters = apply_filters(work.filters, rows, groups, examples, work.decode)
            if task.index == 0 and work.duplicate_prompts:
                counters["filtered_duplicate_prompts"] = work.duplicate_prompts
        counters["responses_cut"] = sum(not row.finished for row in rows)
        writer.commit(task, rows, counters)
        progress.shard(len(rows), counters)


def _compute(task: ShardTask, work: Work, batch_size: int, progress: Progress) -> list[TransferRow]:
    """The rows of a shard, in the order of the prompts. Batches depend on nothing but the plan."""
    run: Any = work.teacher.answer if work.responses == "generate" else work.teacher.score
    prompts = [work.table.row(row) for row in range(task.start, task.stop)]
    # Longest first, so that a batch pads little; rows go back to the order of the prompts.
    prompts.sort(key=lambda p: (-len(p.prompt_ids) - len(p.completion_ids or ()), p.index))
    rows: dict[int, TransferRow] = {}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        made = run_batch(run, batch, batch_invariant=bool(getattr(work.teacher, "batch_invariant", False)))
        if len(made) != len(batch):
            raise TeacherError(f"The teacher gave {len(made)} rows for a batch of {len(batch)}; expected one each.")
        for prompt, row in zip(batch, made, strict=True):
            rows[prompt.index] = row
        progress.batch(len(batch), sum(len(row.counts) for row in made))
    return [rows[index] for index in sorted(rows)]
