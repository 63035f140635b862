"""Capture: prompts in, a transfer set on disk out. The plan is fixed first; then each process fills its shards."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantkd.data.encoding import PromptTable, encode_examples
from quantkd.data.prompts import Example, load_examples
from quantkd.errors import ConfigError, DataError, TeacherError, TransferSetError
from quantkd.hardware import process_state
from quantkd.teacher.batches import find_batch_size, run_batch
from quantkd.teacher.filters import Filter, apply_filters, as_filters, check_references
from quantkd.teacher.loading import build_teacher
from quantkd.teacher.plan import CaptureEstimate, build_plan, estimate_capture, find_planned_batch_size
from quantkd.teacher.teacher import GenerationSettings, RunSettings, Teacher
from quantkd.transfer_set import ShardTask, TransferRow, TransferSet, TransferSetWriter
from quantkd.transfer_set.rules import StorageRule

logger = logging.getLogger(__name__)


def capture(
    model: str | PreTrainedModel | Teacher,
    prompts: str | Path | Iterable[Any],
    output_dir: str | Path,
    *,
    storage: StorageRule | None = None,
    temperatures: Sequence[float] | None = None,
    responses: Literal["generate", "given"] = "generate",
    limit: int | None = None,
    chat_template: bool = True,
    filters: Sequence[Filter | Callable[[Example, str], bool]] = (),
    tokenizer: PreTrainedTokenizerBase | None = None,
    generation: GenerationSettings | None = None,
    run: RunSettings | None = None,
    on_plan: Callable[[CaptureEstimate], object] | None = None,
) -> TransferSet:
    """Let a teacher answer prompts, or score given answers, and store its distributions as a transfer set.

    The plan is fixed before the first token. A capture that was killed is resumed by the same call and ends in the same
    bytes; under `accelerate launch` or `torchrun` the processes share the shards. A set that is already complete is
    only opened.

    Args:
        model: the teacher: a Hub name, a checkpoint folder, a loaded model, or a `quantkd.teacher.Teacher`, which
            brings its own rule, temperatures, tokenizer and generation settings.
        prompts: a .jsonl, .json, .parquet or .csv file, a folder of splits, a `datasets` name, or an iterable of
            strings, message lists, dicts or `Example`s. `quantkd.data.prompts.load_examples` reads other columns and
            splits, and `with_context` adds a system prompt and solved examples.
        output_dir: the folder of the set.
        storage: `Nucleus`, `TopK` or `Sampled`; `Nucleus(0.95, max_k=64)` if None.
        temperatures: distillation temperatures to keep log-normalizers for; (1.0, 2.0) if None, and (1.0,) where the
            rule (`Sampled`) or the engine (vLLM, a server) has no other.
        responses: "generate" lets the teacher answer; "given" takes the data set's own answers, teacher-forced.
        limit: at most this many prompts, from the front.
        chat_template: render prompts with the tokenizer's chat template; False takes the plain text.
        filters: which rows to leave out and count: those of `quantkd.teacher.filters`, or functions of an `Example` and
            the answer's text that return whether to keep it.
        tokenizer: the teacher's tokenizer; needed with a loaded model that does not name it.
        generation: how the teacher answers; greedily, with at most 256 tokens, if None.
        run: what runs the teacher, in which batches.
        on_plan: called with the plan and its cost, in every process, before anything is written.

    Returns:
        The complete set, opened.

    Raises:
        DataError: prompts that are missing, empty, malformed or too long, or given answers that are missing.
        ConfigError: settings that do not fit each other or the teacher.
        TransferSetError: the folder holds another set, or another capture is writing it.
        TeacherError: the teacher's logits are not finite, or memory ran out.

    Example:
        transfer_set = capture("HuggingFaceTB/SmolLM2-135M-Instruct", ["What is 12 * 7?"], "runs/set")
    """
    if responses not in ("generate", "given"):
        raise ConfigError(f"responses is 'generate' or 'given', found {responses!r}.")
    folder, run = Path(output_dir), run or RunSettings()
    occupied = next((part for part in (folder, *folder.parents) if part.exists()), None)
    if occupied is not None and not occupied.is_dir():
        raise TransferSetError(f"{occupied} is a file; the set needs a folder. Name another output_dir.")
    examples = load_examples(prompts, limit=limit)
    chosen = as_filters(filters)
    check_references(chosen, examples, responses)
    teacher = build_teacher(model, tokenizer, storage, temperatures, generation, run)
    if responses == "given" and teacher.settings.num_samples > 1:
        raise ConfigError(
            f"num_samples is {teacher.settings.num_samples} with responses='given'; a given answer is one row. Leave "
            "num_samples at 1, or let the teacher answer with responses='generate'."
        )
    table = encode_examples(
        examples,
        teacher.tokenizer,
        given=responses == "given",
        chat_template=chat_template,
        num_samples=teacher.settings.num_samples,
        drop_duplicates=any(each.across_rows for each in chosen),
    )
    _check_lengths(table, teacher)
    plan = build_plan(
        teacher,
        run,
        chosen,
        num_rows=table.num_rows,
        prompts_digest=table.digest(),
        batch_size=_agree_on_batch_size(folder, teacher, table) if run.auto_find_batch_size else run.batch_size,
        responses=responses,
        chat_template=chat_template,
    )
    prompt_tokens, given_tokens = (int(total) * table.num_samples for total in table.lengths().sum(0))
    estimate = estimate_capture(
        plan,
        folder,
        prompt_tokens=prompt_tokens,
        response_tokens=given_tokens if table.is_given else table.num_rows * teacher.settings.max_new_tokens,
        is_exact=table.is_given,
    )
    if on_plan is not None:
        on_plan(estimate)

    with TransferSetWriter.open(folder, plan, join=process_state().num_processes > 1) as writer:
        if writer.is_complete:
            logger.warning("The transfer set at %s is complete already; nothing was captured.", output_dir)
        else:
            _fill(writer, teacher, table, chosen, progress=run.progress)
            writer.finalize()
    transfer_set = TransferSet.open(folder)
    if not len(transfer_set):
        logger.warning("No row passed the filters; the transfer set at %s is empty.", output_dir)
    return transfer_set


def _check_lengths(table: PromptTable, teacher: Teacher) -> None:
    """Refuse prompts that leave no room for the answer, before any work is spent."""
    lengths, limit = table.lengths(), teacher.max_context or 2**62
    answers = lengths[:, 1] if table.is_given else lengths[:, 1] + teacher.settings.max_new_tokens
    if not lengths[:, 0].all():
        row = table.numbers[int((lengths[:, 0] == 0).argmax())]
        raise DataError(f"Row {row} has a prompt without tokens; expected at least one. Remove the row.")
    too_long = lengths[:, 0] + answers > limit
    if too_long.any():
        index = int(too_long.argmax())
        raise DataError(
            f"Row {table.numbers[index]} has a prompt of {lengths[index, 0]} tokens; with {answers[index]} tokens for "
            f"the answer that is more than the teacher's context of {limit}. Shorten it (fewer shots), remove it, or "
            "lower max_new_tokens."
        )


def _agree_on_batch_size(folder: Path, teacher: Teacher, table: PromptTable) -> int:
    """The batch size of the plan on disk, or the one that the main process finds for all."""
    state = process_state()
    found = [0]
    if state.is_main_process:
        found = [find_planned_batch_size(folder) or find_batch_size(teacher, table)]
    if state.num_processes > 1:
        from accelerate.utils import broadcast_object_list

        broadcast_object_list(found)
    return found[0]


def _fill(
    writer: TransferSetWriter, teacher: Teacher, table: PromptTable, filters: Sequence[Filter], *, progress: bool
) -> None:
    """Run the teacher over every shard of this process, and commit each."""
    tokens, kept, counted, started = 0, 0, Counter[str](), time.monotonic()
    shown = progress and process_state().is_main_process
    bar = tqdm(total=table.num_rows, desc="capture", unit="row", file=sys.stderr, disable=None if shown else True)

    def advance(made: Sequence[TransferRow]) -> None:
        nonlocal tokens
        tokens += sum(len(row.counts) for row in made)
        speed = f"{tokens / max(time.monotonic() - started, 1e-9):.0f} tokens/s"
        bar.set_postfix_str(f"{speed}, {kept} kept, {counted.total()} filtered" if filters else speed, refresh=False)
        bar.update(len(made))

    with bar:
        for task in writer.claim():
            rows = _compute(task, teacher, table, writer.plan.batch_size, advance)
            counters: Counter[str] = Counter()
            if filters:
                prompts = [row // table.num_samples for row in range(task.start, task.stop)]
                examples = [table.examples[prompt] for prompt in prompts]
                rows, counters = apply_filters(filters, rows, prompts, examples, teacher.tokenizer)
                if task.index == 0 and table.num_duplicates:
                    counters["filtered_duplicate_prompts"] = table.num_duplicates
            kept += len(rows)
            counted += counters
            writer.commit(task, rows, {**counters, "responses_cut": sum(not row.finished for row in rows)})


def _compute(
    task: ShardTask,
    teacher: Teacher,
    table: PromptTable,
    batch_size: int,
    advance: Callable[[Sequence[TransferRow]], None],
) -> list[TransferRow]:
    """The rows of a shard, in the order of the prompts. Batches depend on nothing but the plan."""
    prompts = [table.row(row) for row in range(task.start, task.stop)]
    # Longest first, so that a batch pads little; rows go back to the order of the prompts.
    prompts.sort(key=lambda prompt: (-len(prompt.prompt_ids) - len(prompt.completion_ids or ()), prompt.index))
    rows: dict[int, TransferRow] = {}
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        made = run_batch(
            teacher.score if table.is_given else teacher.answer, batch, batch_invariant=teacher.batch_invariant
        )
        if len(made) != len(batch):
            raise TeacherError(f"The teacher gave {len(made)} rows for a batch of {len(batch)}; expected one each.")
        rows |= {prompt.index: row for prompt, row in zip(batch, made, strict=True)}
        advance(made)
    return [rows[index] for index in sorted(rows)]
