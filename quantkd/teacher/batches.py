"""How many prompts a batch holds: probed once before the plan is fixed, and what happens when memory runs out."""

from __future__ import annotations

import gc
import logging
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quantkd.errors import TeacherError
from quantkd.teacher.table import PromptTable
from quantkd.teacher.teacher import EncodedPrompt, Teacher
from quantkd.transfer_set import TransferRow

logger = logging.getLogger(__name__)

MAX_BATCH = 256
# vLLM and servers schedule their own batches; this many prompts keep them busy.
_ENGINE_BATCH = 256
_PROBE_TOKENS = 8
_MEMORY_SHARE = 0.8  # of what is free, for the rest of the run is not quite like the probe
_LEAST_GAIN = 1.1  # a doubling that brings less only pads more


@dataclass(frozen=True)
class Probe:
    """What the probe chose, and the speed that it saw.

    Args:
        batch_size: prompts a batch.
        tokens_per_second: response tokens; None where nothing was run.
    """

    batch_size: int
    tokens_per_second: float | None = None


def probe_batch_size(teacher: Teacher, table: PromptTable, responses: str, max_new_tokens: int) -> Probe:
    """The batch size for a teacher, found by doubling on the longest prompts.

    Each size is tried twice: answers as long as they may get are scored, which fills the key-value cache as far as it
    will ever go, and a few tokens are generated, which gives the speed. It ends where memory does, or where twice the
    prompts bring less than a tenth more tokens a second.
    """
    if teacher.engine in ("vllm", "server"):
        return Probe(_ENGINE_BATCH)
    lengths = table.lengths()
    longest = lengths.sum(1).argsort(kind="stable")[::-1]
    shorten: Callable[[int], Teacher] | None = getattr(teacher, "with_max_new_tokens", None)
    speaker = shorten(min(_PROBE_TOKENS, max_new_tokens)) if shorten else teacher
    best: Probe | None = None
    size = 1
    while size <= MAX_BATCH and (best is None or size < 2 * table.num_rows):
        rows = [table.row(int(longest[i % len(longest)]) * table.num_samples) for i in range(size)]
        free = _free_bytes()
        try:
            base = _start_measuring()
            started = time.monotonic()
            full = rows if responses == "given" else [_fill_up(row, max_new_tokens) for row in rows]
            scored = teacher.score(full)
            used = _peak_bytes() - base
            if responses == "generate":
                started = time.monotonic()
                scored = speaker.answer(rows)
            seconds = time.monotonic() - started
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            _release_memory()
            if best is None:
                raise TeacherError(
                    f"One prompt of {len(rows[0].prompt_ids)} tokens with {max_new_tokens} for the answer does not fit "
                    f"into memory ({error}). Shorten prompts or max_new_tokens, or load the teacher in 16 bit."
                ) from error
            break
        speed = sum(len(row.counts) for row in scored) / max(seconds, 1e-9)
        if best is not None and best.tokens_per_second and speed < _LEAST_GAIN * best.tokens_per_second:
            break
        best = Probe(size, speed)
        if 2 * used > _MEMORY_SHARE * free:
            break
        size *= 2
    assert best is not None
    return best


def run_batch(
    run: Callable[[Sequence[EncodedPrompt]], list[TransferRow]],
    batch: Sequence[EncodedPrompt],
    *,
    batch_invariant: bool,
) -> list[TransferRow]:
    """Run a batch; where memory runs out, try again, and in halves if that does not change the bytes.

    The shape of a batch moves the last bits of the logits, and with them stored codes and, at times, tokens. So a batch
    is computed whole, once more after the caches are emptied, which mends fragmentation; and only for a teacher that
    promises the same bits in any batch, in halves.
    """
    try:
        return run(batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    # Outside the handler, whose traceback holds the tensors of the failed pass.
    _release_memory()
    if not batch_invariant:
        try:
            return run(batch)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            half = max(len(batch) // 2, 1)
            raise TeacherError(
                f"Memory ran out twice in a batch of {len(batch)} prompts, first {batch[0].index}: {reason}. Half the "
                "batch could give other last bits of the logits and so another set, so it is not halved here. Free "
                "memory and run the same command again to go on with the committed shards, or start a new folder with "
                f"--batch_size {half}."
            ) from error
    if len(batch) == 1:
        raise TeacherError(
            f"Memory ran out for prompt {batch[0].index} alone, of {len(batch[0].prompt_ids)} tokens: {reason}. "
            "Shorten it or max_new_tokens, or load the teacher in 16 bit; then run the command again."
        )
    logger.warning("Memory ran out in a batch of %d prompts; it is run in halves, with the same bytes.", len(batch))
    half = len(batch) // 2
    first = run_batch(run, batch[:half], batch_invariant=True)
    return first + run_batch(run, batch[half:], batch_invariant=True)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def _fill_up(row: EncodedPrompt, new_tokens: int) -> EncodedPrompt:
    """The row with an answer of the greatest length; which tokens it has does not matter."""
    return replace(row, completion_ids=(row.prompt_ids * (new_tokens // len(row.prompt_ids) + 1))[:new_tokens])


def _free_bytes() -> int:
    """What may still be allocated, as far as the system says."""
    if torch.cuda.is_available():
        reusable = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0] + reusable)
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _start_measuring() -> int:
    """The bytes in use, from which `_peak_bytes` is counted."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return int(torch.cuda.memory_allocated())
    return _peak_bytes()


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    # The peak of the whole process: a size that fits below an earlier peak counts as free, and so it is.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _release_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
