"""Capture: prompts in, a transfer set on disk out. The plan is fixed first; then each process fills its shards."""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from accelerate.utils import broadcast_object_list
from accelerate.utils.memory import clear_device_cache
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantkd.data.encoding import at_date, encode_examples, read_date, uses_date
from quantkd.data.prompts import Example, check_references, load_examples
from quantkd.errors import ConfigError, TransferSetError, refuse_unused
from quantkd.hardware import process_state
from quantkd.names import public_name
from quantkd.teacher.batches import find_batch_size, retry_out_of_memory
from quantkd.teacher.filters import Filter, as_filters, sift
from quantkd.teacher.loading import build_teacher
from quantkd.teacher.teacher import GenerationSettings, RunSettings, Teacher
from quantkd.transfer_set import Plan, TransferRow, TransferSet, TransferSetWriter, estimate_bytes
from quantkd.transfer_set.fingerprint import compute_fingerprint
from quantkd.transfer_set.index import INDEX_NAME, PLAN_NAME, read_begun_plan
from quantkd.transfer_set.rules import StorageRule, storage_rule_to_dict

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptureEstimate:
    """What a capture will do and cost, known before anything is written."""

    plan: Plan
    folder: Path
    prompt_tokens: int
    response_tokens: int  # at most, unless `is_exact`
    is_exact: bool  # the answers are given

    def __post_init__(self) -> None:
        responses = self.response_tokens if self.is_exact else self.plan.num_prompts
        least = estimate_bytes(self.plan, self.prompt_tokens, responses)
        begun = (self.folder / PLAN_NAME).exists() or (self.folder / INDEX_NAME).exists()
        if not begun and least > 1.2 * self.free_bytes:  # the estimate may be a fifth off
            raise ConfigError(
                f"The set needs at least {least} bytes, and {self.free_bytes} are free at {self.folder}. Choose "
                "another disk, fewer prompts, or a storage rule that keeps fewer entries."
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of the set; an upper bound where the tokens are one."""
        return estimate_bytes(self.plan, self.prompt_tokens, self.response_tokens)

    @property
    def free_bytes(self) -> int:
        """Bytes free on its disk."""
        folder = self.folder.absolute()
        return shutil.disk_usage(next(part for part in (folder, *folder.parents) if part.exists())).free


def capture(
    model: str | os.PathLike[str] | PreTrainedModel | Teacher,
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
    refuse_unused(generation or GenerationSettings(), {"": "max_new_tokens" * (responses == "given")})
    refuse_unused(run, {"": "batch_size" * run.auto_find_batch_size})
    occupied = next((part for part in (folder, *folder.parents) if part.exists()), None)
    if occupied is not None and not occupied.is_dir():
        raise TransferSetError(f"{occupied} is a file; the set needs a folder. Name another output_dir.")
    chosen = as_filters(filters)
    examples = load_examples(prompts, limit=limit)
    if comparing := [each for each in chosen if each.needs_reference]:
        if responses == "given":
            raise ConfigError(
                "correct_only compares the teacher's own answers with the data set's, and responses='given' takes the "
                "data set's unchanged. Leave one of them out."
            )
        check_references(examples, [each.check_reference for each in comparing])

    teacher = build_teacher(model, tokenizer, storage, temperatures, generation, run)
    settings = teacher.settings
    if responses == "given" and settings.do_sample:
        raise ConfigError(
            f"do_sample is on, num_samples {settings.num_samples}, with responses='given'; a given answer is one row, "
            "and is not sampled. Leave both out, or let the teacher answer with responses='generate'."
        )
    encoder, dated = teacher.tokenizer, dict[str, str]()
    if chat_template and uses_date(encoder):  # a capture that goes on after midnight renders the same prompts
        where = f"The plan in {folder}"
        dated["date"] = _decide(folder, lambda begun: read_date(begun and begun.generation.get("date"), where))
        encoder = at_date(encoder, dated["date"])
    answer = teacher.answer if responses == "generate" else teacher.score
    table = encode_examples(
        examples,
        encoder,
        given=responses == "given",
        chat_template=chat_template,
        num_samples=settings.num_samples,
        drop_duplicates=any(each.across_rows for each in chosen),
    )
    table.check_rows(teacher.tokenizer, teacher.vocab_size, teacher.max_context, settings.max_new_tokens)

    batch_size = run.batch_size
    if run.auto_find_batch_size:
        longest = partial(table.longest, max_new_tokens=settings.max_new_tokens)
        batch_size = teacher.preferred_batch_size or _decide(folder, partial(find_batch_size, teacher.score, longest))
    rows_per_shard = run.rows_per_shard
    if rows_per_shard is None:
        # A small set is still cut into 16 shards, so that as many processes can share the work.
        batches = min(-(-table.num_rows // (16 * batch_size)), max(1024 // batch_size, 1))
        rows_per_shard = batches * batch_size
    plan = Plan(
        **_describe_teacher(teacher, chosen, responses=responses, chat_template=chat_template, **dated),
        prompts_digest=table.digest(),
        num_prompts=table.num_rows,
        rows_per_shard=-(-rows_per_shard // settings.num_samples) * settings.num_samples,  # a prompt's samples together
        batch_size=batch_size,
    )
    estimate = CaptureEstimate(plan, folder, *table.count_tokens(settings.max_new_tokens), is_exact=table.is_given)
    if on_plan is not None:
        on_plan(estimate)

    state = process_state()
    shown = run.progress and state.is_main_process
    bar = tqdm(total=table.num_rows, desc="capture", unit="row", file=sys.stderr, disable=None if shown else True)
    with bar, TransferSetWriter.open(folder, plan, process=(state.process_index, state.num_processes)) as writer:
        if writer.is_complete:
            logger.warning("The transfer set at %s is complete already; nothing was captured.", output_dir)
        tokens, started = 0, time.monotonic()
        for task in writer.claim():
            rows: dict[int, TransferRow] = {}
            for batch in table.batches(task.start, task.stop, batch_size):
                made = retry_out_of_memory(answer, batch)
                rows |= {prompt.index: row for prompt, row in zip(batch, made, strict=True)}
                tokens += sum(len(row.counts) for row in made)
                bar.set_postfix_str(f"{tokens / max(time.monotonic() - started, 1e-9):.0f} tokens/s", refresh=False)
                bar.update(len(made))
            sources = [table.examples[index // settings.num_samples] for index in sorted(rows)]
            kept, counters = sift(chosen, teacher.tokenizer, [rows[index] for index in sorted(rows)], sources)
            if task.index == 0 and table.num_duplicates:
                counters["filtered_duplicate_prompts"] = table.num_duplicates
            writer.commit(task, kept, {**counters, "responses_cut": sum(not row.finished for row in kept)})
        writer.finalize()
    del teacher, answer
    clear_device_cache(garbage_collection=True)  # of a teacher that was loaded here, also what torch would keep
    transfer_set = TransferSet.open(folder)
    if not len(transfer_set):
        logger.warning("No row passed the filters; the transfer set at %s is empty.", output_dir)
    return transfer_set


def _decide(folder: Path, decide: Callable[[Plan | None], Any]) -> Any:
    """What the main process decides from the plan on disk, if there is one; the same in every process."""
    return broadcast_object_list([decide(read_begun_plan(folder)) if process_state().is_main_process else None])[0]


def _describe_teacher(
    teacher: Teacher, filters: Sequence[Filter], *, responses: Literal["generate", "given"], **generation: Any
) -> dict[str, Any]:
    """The fields of a `Plan` that do not depend on the prompts; `generation` says how these are rendered."""
    settings = teacher.settings
    generation["seed"] = settings.seed
    if responses == "generate":
        generation |= {"max_new_tokens": settings.max_new_tokens, "do_sample": settings.do_sample}
        if settings.do_sample:
            generation |= settings.sampling
    if settings.num_samples > 1:
        generation["num_samples"] = settings.num_samples
    return {
        "teacher_name": public_name(teacher.name),
        "teacher_revision": teacher.revision,
        "teacher_dtype": teacher.dtype,
        "tokenizer_fingerprint": compute_fingerprint(teacher.tokenizer),
        "vocab_size": teacher.vocab_size,
        "storage": storage_rule_to_dict(teacher.rule),
        "temperatures": teacher.temperatures,
        "responses": responses,
        "generation": generation,
        "extra": {**teacher.describe(), **({"filters": [each.describe() for each in filters]} if filters else {})},
    }
