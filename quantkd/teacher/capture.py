"""Capture: prompts in, a transfer set on disk out. Plans, resumes, shares the work, and shows how far it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from quantkd.data.conversations import with_context
from quantkd.data.prompts import Example, load_examples
from quantkd.errors import ConfigError
from quantkd.hardware import process_state
from quantkd.teacher.batches import Probe
from quantkd.teacher.filters import CorrectOnly, DropDuplicates, Filter, as_filters
from quantkd.teacher.growing import grow, opening
from quantkd.teacher.loading import Engine, build_teacher, check_engine, is_teacher
from quantkd.teacher.plan import build_plan, check_disk, check_lengths, choose_batch_size, estimate_capture
from quantkd.teacher.progress import CaptureObserver, CaptureSummary, Progress
from quantkd.teacher.running import Work, fill
from quantkd.teacher.table import encode_examples
from quantkd.teacher.teacher import GenerationSettings, Teacher
from quantkd.transfer_set import PROFILES, TransferSet, TransferSetWriter
from quantkd.transfer_set.rules import Nucleus, Sampled, StorageRule, check_temperatures

logger = logging.getLogger(__name__)


def capture(
    model: str | PreTrainedModel | Teacher,
    prompts: str | Path | Iterable[Any],
    output_dir: str | Path,
    *,
    storage: StorageRule | None = None,
    temperatures: Sequence[float] | None = None,
    responses: Literal["generate", "given"] = "generate",
    max_new_tokens: int = 256,
    do_sample: bool = False,
    generation_temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    num_samples: int = 1,
    seed: int = 0,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    split: str = "train",
    limit: int | None = None,
    chat_template: bool = True,
    system_prompt: str | None = None,
    few_shot: Sequence[Example] = (),
    filters: Sequence[Filter | Callable[[Example, str], bool]] = (),
    extend: bool = False,
    join: bool = False,
    batch_size: int | Literal["auto"] = 8,
    rows_per_shard: int | None = None,
    profile: Literal["faithful", "compact"] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    teacher_adapter: str | None = None,
    engine: Engine = "transformers",
    base_url: str | None = None,
    engine_kwargs: Mapping[str, Any] | None = None,
    progress: bool = True,
    observer: CaptureObserver | None = None,
) -> TransferSet:
    """Let a teacher answer prompts, or score given answers, and store its distributions as a transfer set.

    The plan is fixed before the first token. A capture that was killed goes on where it stopped when it is called
    again in the same way, and ends in the same bytes; under `accelerate launch` or `torchrun` the processes share the
    shards. A set that is already complete is opened as it is.

    Args:
        model: the teacher: a Hub name, a checkpoint folder, a loaded model, or a `quantkd.teacher.Teacher`, which
            brings its own rule, temperatures and settings.
        prompts: a .jsonl, .json, .parquet or .csv file, a folder of splits, a `datasets` name, or an iterable of
            strings, message lists or dicts.
        output_dir: the folder of the set.
        storage: `Nucleus`, `TopK` or `Sampled`; `Nucleus(0.95, max_k=64)` if None and no profile is named.
        temperatures: distillation temperatures to keep log-normalizers for; (1.0, 2.0) if None, and (1.0,) where the
            rule (`Sampled`) or the engine (vLLM, a server) knows no other.
        responses: "generate" lets the teacher answer; "given" takes the data set's own answers, teacher-forced.
        max_new_tokens: length limit of a generated answer. What reaches it is kept, counted and marked.
        do_sample: sample the answers instead of decoding greedily.
        generation_temperature: sampling temperature.
        top_p: nucleus of the sampling; 1.0 for all tokens.
        top_k: number of tokens to sample from; 0 for all.
        num_samples: answers a prompt, each a row; needs `do_sample`. Sample j of prompt i is row i * num_samples + j.
        seed: seed of sampled answers and sampled entries; each row draws from a stream of (seed, row).
        prompt_column: column of the prompt.
        completion_column: column of the given answer, or of the reference that `CorrectOnly` compares with.
        split: split of a folder or a `datasets` name.
        limit: at most this many prompts, from the front.
        chat_template: render prompts with the tokenizer's chat template; False takes the plain text.
        system_prompt: put before every prompt whose messages bring none.
        few_shot: `Example`s with completions, put before every prompt as turns of the chat.
        filters: what is left out, and counted: those of `quantkd.teacher.filters`, or functions of an `Example` and
            the answer's text that return whether to keep it.
        extend: add the prompts to the finished set at `output_dir`; its shards stay as they are.
        join: share the work with other launches of the same call, on any machine that sees the folder, now or later;
            each must say so. The processes of one launch share it anyway.
        batch_size: prompts a batch, or "auto" to probe what fits and pays. Part of the plan, for it moves the last bits
            of the logits; a capture that goes on takes the plan's.
        rows_per_shard: prompts a shard; chosen from the number of prompts if None.
        profile: "faithful" or "compact": precision of the encoding, and the storage rule that goes with it if `storage`
            is None. Without a name the encoding is faithful.
        tokenizer: the teacher's tokenizer; needed with a loaded model that does not name it.
        dtype: dtype of a teacher given by name; after the hardware if None.
        model_init_kwargs: further arguments of `from_pretrained` for a teacher given by name.
        teacher_adapter: a PEFT adapter on the teacher, a Hub name or a folder.
        engine: what runs a teacher given by name: "transformers", "vllm" or "server".
        base_url: address of the server engine's OpenAI-compatible server.
        engine_kwargs: further arguments of `vllm.LLM` or of `ServerTeacher`.
        progress: show a bar with tokens per second and the time left, if there is a terminal.
        observer: is told the plan before anything is written, and what was done at the end.

    Returns:
        The complete set, opened.

    Raises:
        DataError: prompts that are missing, empty, malformed or too long, or given answers that are missing.
        ConfigError: settings that do not fit each other or the teacher.
        TransferSetError: the folder holds another set.
        TeacherError: the teacher's logits are not finite, or memory ran out.

    Example:
        transfer_set = capture("HuggingFaceTB/SmolLM2-135M-Instruct", ["What is 12 * 7?"], "runs/set")
    """
    if profile not in (None, *PROFILES):
        raise ConfigError(f"profile is one of {', '.join(PROFILES)}, found {profile!r}.")
    if responses not in ("generate", "given"):
        raise ConfigError(f"responses is 'generate' or 'given', found {responses!r}.")
    check_engine(model, engine, base_url, engine_kwargs, teacher_adapter)
    settings = GenerationSettings(max_new_tokens, do_sample, generation_temperature, top_p, top_k, seed)
    _check_numbers(batch_size, rows_per_shard, num_samples, responses, do_sample)
    chosen = as_filters(filters)
    examples = load_examples(
        prompts, prompt_column=prompt_column, completion_column=completion_column, split=split, limit=limit
    )
    for each in chosen:
        if isinstance(each, CorrectOnly):
            each.check(examples, responses)
    folder = Path(output_dir)
    place = opening(folder, extend=extend)

    adapter: dict[str, str] = {}
    if is_teacher(model):
        teacher: Teacher = model  # type: ignore[assignment]
        rule, settings, tokenizer = _own_settings(teacher, storage, temperatures, settings, profile, tokenizer)
    else:
        rule = storage or (PROFILES[profile].storage if profile else Nucleus(0.95, max_k=64))
        plain = isinstance(rule, Sampled) or engine != "transformers"
        kept = check_temperatures(rule, temperatures or ((1.0,) if plain else (1.0, 2.0)))
        teacher, tokenizer, adapter = build_teacher(
            model,  # type: ignore[arg-type]
            tokenizer,
            rule,
            kept,
            settings,
            engine=engine,
            base_url=base_url,
            engine_kwargs=engine_kwargs,
            adapter=teacher_adapter,
            dtype=dtype,
            model_init_kwargs=model_init_kwargs,
        )
    table, numbers = encode_examples(
        with_context(examples, system_prompt=system_prompt, few_shot=few_shot),
        tokenizer,
        responses=responses,
        chat_template=chat_template,
        num_samples=num_samples,
        first_row=place.first_row,
        drop_duplicates=any(isinstance(each, DropDuplicates) for each in chosen),
    )
    check_lengths(table, numbers, teacher.max_context, settings.max_new_tokens)
    plan_with = partial(
        build_plan,
        teacher,
        tokenizer,
        table,
        rule=rule,
        settings=settings,
        responses=responses,
        chat_template=chat_template,
        profile=profile or "faithful",
        rows_per_shard=place.rows_per_shard or rows_per_shard,
        filters=chosen,
        adapter=adapter,
    )
    probe = Probe(batch_size) if batch_size != "auto" else Probe(place.batch_size or 0)
    if probe.batch_size == 0:
        probe = choose_batch_size(
            place.folder, teacher, table, responses, settings.max_new_tokens, lambda size: plan_with(batch_size=size)
        )
    plan = plan_with(batch_size=probe.batch_size)
    if not place.check(plan):
        logger.warning("The transfer set at %s was extended by these prompts already; nothing was captured.", folder)
        return TransferSet.open(folder)
    estimate = estimate_capture(plan, table, folder, probe, settings.max_new_tokens)
    if observer is not None:
        observer.planned(estimate)
    check_disk(estimate, place.folder)

    work = Work(
        teacher,
        table,
        [examples[number] for number in numbers] if chosen else examples,
        chosen,
        lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        responses,
        duplicate_prompts=len(examples) - len(numbers),
    )
    reporter = Progress.over(plan.num_prompts, show=progress)
    join = join or process_state().num_processes > 1
    with reporter.bar, TransferSetWriter.open(place.folder, plan, join=join) as writer:
        if writer.is_complete:
            if not extend:
                logger.warning("The transfer set at %s is complete already; nothing was captured.", output_dir)
        else:
            fill(writer, work, reporter)
            writer.finalize()
    if extend:
        grow(folder)
    transfer_set = TransferSet.open(folder)
    if not len(transfer_set):
        logger.warning("No row passed the filters; the transfer set at %s is empty.", output_dir)
    if observer is not None:
        observer.finished(CaptureSummary(transfer_set.info, reporter.tokens, reporter.seconds))
    return transfer_set


def _check_numbers(
    batch_size: Any, rows_per_shard: int | None, num_samples: int, responses: str, do_sample: bool
) -> None:
    """Refuse sizes below 1, and several answers a prompt that would all be the same."""
    sizes = [1 if batch_size == "auto" else batch_size, 1 if rows_per_shard is None else rows_per_shard]
    if not all(isinstance(size, int) and size >= 1 for size in sizes):
        raise ConfigError(
            f"batch_size (a number or 'auto') and rows_per_shard must be at least 1, found {batch_size} and "
            f"{rows_per_shard}."
        )
    if num_samples < 1 or (num_samples > 1 and (responses == "given" or not do_sample)):
        raise ConfigError(
            f"num_samples is {num_samples} with responses={responses!r} and do_sample={do_sample}; more than one "
            "answer a prompt needs a teacher that samples. Set do_sample=True (--do_sample), or leave num_samples at 1."
        )


def _own_settings(
    teacher: Any,
    storage: StorageRule | None,
    temperatures: Sequence[float] | None,
    settings: GenerationSettings,
    profile: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> tuple[StorageRule, GenerationSettings, PreTrainedTokenizerBase]:
    """What a teacher object was built with; what the call names besides must be the same."""
    rule = getattr(teacher, "rule", None) or storage or Nucleus(0.95, max_k=64)
    own = getattr(teacher, "settings", settings)
    tokenizer = tokenizer or getattr(teacher, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError("The teacher does not hold its tokenizer; pass it as tokenizer.")
    wanted = [
        ("storage", storage, rule),
        (
            "temperatures",
            None if temperatures is None else tuple(map(float, temperatures)),
            tuple(teacher.temperatures),
        ),
        ("the generation settings", None if settings == GenerationSettings() else settings, own),
    ]
    for name, asked, found in wanted:
        if asked is not None and asked != found:
            raise ConfigError(
                f"The teacher was built with {name} {found}, and the call asks for {asked}. Leave that out of the "
                "call, or build the teacher with it."
            )
    return rule, own, tokenizer
