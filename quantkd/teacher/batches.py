"""How many prompts fit into a batch, found before the plan is fixed, and what happens when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from accelerate.utils import find_executable_batch_size, release_memory

from quantkd.data.encoding import EncodedPrompt, PromptTable
from quantkd.errors import TeacherError
from quantkd.hardware import has_accelerator
from quantkd.teacher.teacher import Teacher
from quantkd.transfer_set import TransferRow

logger = logging.getLogger(__name__)


def find_batch_size(teacher: Teacher, table: PromptTable) -> int:
    """The largest batch of the longest rows, with answers as long as they may get, that fits into memory."""
    if teacher.preferred_batch_size is not None:
        return teacher.preferred_batch_size
    longest = table.lengths().sum(1).argsort(kind="stable")[::-1].tolist()
    limit = teacher.settings.max_new_tokens

    # A CPU gains little from larger batches, and its process is killed, without an exception, when memory ends.
    largest = min(256 if has_accelerator() else 32, table.num_rows)

    def score(batch_size: int) -> int:
        # A quarter more rows than will be used, because generating takes more memory than scoring.
        places = [longest[place % len(longest)] for place in range(batch_size + batch_size // 4)]
        rows = [table.row(place * table.num_samples) for place in places]
        try:
            teacher.score(rows if table.is_given else [_fill_up(row, limit) for row in rows])
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):  # accelerate knows fewer of the messages
                raise torch.OutOfMemoryError("CUDA out of memory.") from error
            raise
        return batch_size

    try:
        return int(find_executable_batch_size(score, largest)())
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise TeacherError(
            f"One prompt of {table.lengths()[longest[0], 0]} tokens with its answer does not fit into memory. Shorten "
            "prompts or max_new_tokens, or load the teacher in 16 bit."
        ) from error


def run_batch(
    run: Callable[[Sequence[EncodedPrompt]], list[TransferRow]],
    batch: Sequence[EncodedPrompt],
    *,
    batch_invariant: bool,
) -> list[TransferRow]:
    """Run a batch; where memory runs out, try again, and in halves if that does not change the bytes.

    The shape of a batch changes the last bits of the logits, and with them stored codes and, at times, tokens.
    """
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Outside the handler, whose traceback holds the tensors of the failed pass.
    release_memory()
    if not batch_invariant:
        try:
            return run(batch)  # memory may only have been fragmented
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise TeacherError(
                f"Memory ran out twice in a batch of {len(batch)} prompts, first {batch[0].index}: {reason}. Half the "
                "batch could give other last bits of the logits and so another set, so it is not halved here. Free "
                "memory and run the same command again to go on with the committed shards, or start a new folder with "
                f"--batch_size {max(len(batch) // 2, 1)}."
            ) from error
    if len(batch) == 1:
        raise TeacherError(
            f"Memory ran out for prompt {batch[0].index} alone, of {len(batch[0].prompt_ids)} tokens: {reason}. "
            "Shorten it or max_new_tokens, or load the teacher in 16 bit; then run the command again."
        )
    logger.warning("Memory ran out in a batch of %d prompts; it is run in halves, with the same bytes.", len(batch))
    half = len(batch) // 2
    return [*run_batch(run, batch[:half], batch_invariant=True), *run_batch(run, batch[half:], batch_invariant=True)]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    text = str(error).lower()
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
    )


def _fill_up(row: EncodedPrompt, new_tokens: int) -> EncodedPrompt:
    """The row with an answer of the greatest length; which tokens it has does not matter."""
    return replace(row, completion_ids=(row.prompt_ids * (new_tokens // len(row.prompt_ids) + 1))[:new_tokens])
