"""How many prompts fit into a batch, found before the plan is fixed, and what happens when memory runs out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate.utils import find_executable_batch_size, release_memory

from quantkd.data.encoding import EncodedPrompt
from quantkd.errors import TeacherError
from quantkd.hardware import has_accelerator
from quantkd.transfer_set import Plan, TransferRow

Run = Callable[[Sequence[EncodedPrompt]], list[TransferRow]]


def find_batch_size(score: Run, take_rows: Callable[[int], Sequence[EncodedPrompt]], begun: Plan | None) -> int:
    """The batch size of a plan that was begun, or the largest that `score` has memory for."""
    if begun is not None:
        return begun.batch_size

    def attempt(batch_size: int) -> int:
        try:
            # A quarter more rows than will be used, because generating takes more memory than scoring.
            score(take_rows(batch_size + batch_size // 4))
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):  # accelerate knows fewer of the messages
                raise torch.OutOfMemoryError("CUDA out of memory.") from error
            raise
        return batch_size

    # A CPU gains little from larger batches, and its process is killed, without an exception, when memory ends.
    largest = 256 if has_accelerator() else 32
    try:
        return int(find_executable_batch_size(attempt, largest)())
    except RuntimeError as error:
        if "No executable batch size" not in str(error):
            raise
        raise TeacherError(
            "The longest prompt with its answer does not fit into memory. Shorten prompts or max_new_tokens, or load "
            "the teacher in 16 bit."
        ) from error


def retry_out_of_memory(run: Run, batch: Sequence[EncodedPrompt]) -> list[TransferRow]:
    """What `run` makes of a batch; where memory runs out, which may only have been fragmented, it is tried again."""
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    release_memory()  # outside the handler, whose traceback holds the tensors of the failed pass
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # The shape of a batch changes the last bits of the logits, and with them stored codes and, at times, tokens.
        advice, reason = "Shorten it or max_new_tokens, or load the teacher in 16 bit", str(error)[:200]
        if half := len(batch) // 2:
            advice = "Half the batch could give other last bits, so it is not halved here: free memory and run the "
            advice += f"same command again, or start a new folder with --batch_size {half}"
        raise TeacherError(
            f"Memory ran out twice in a batch of {len(batch)} prompts, first prompt {batch[0].index} of "
            f"{len(batch[0].prompt_ids)} tokens ({reason}). {advice}."
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    text = str(error).lower()
    # Libraries beside torch have words of their own, such as CUBLAS_STATUS_ALLOC_FAILED.
    said = any(words in text for words in ("out of memory", "can't allocate memory", "_alloc_failed"))
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (isinstance(error, RuntimeError) and said)
