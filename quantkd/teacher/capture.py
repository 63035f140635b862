"""Capture: prompts in, a transfer set on disk out. Plans, resumes, shares the work, and shows how far it is."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from quantkd.checkpoint import naming, short_name
from quantkd.data.prompts import Example, encode_completion, encode_prompt, load_examples
from quantkd.errors import ConfigError, DataError
from quantkd.fingerprint import compute_fingerprint
from quantkd.generation import check_context
from quantkd.hardware import default_device, parse_dtype, process_state
from quantkd.storage import Nucleus, Sampled, StorageRule, check_temperatures, storage_rule_to_dict
from quantkd.teacher.interface import EncodedPrompt, GenerationSettings
from quantkd.teacher.transformers import TransformersTeacher
from quantkd.transfer_set import PROFILES, Plan, TransferRow, TransferSet, TransferSetWriter

__all__ = ["capture", "load_teacher"]

logger = logging.getLogger(__name__)

# Small sets are still cut into this many shards, so that as many processes can share the work.
_MIN_SHARDS = 16
_MAX_ROWS_PER_SHARD = 1024


def load_teacher(
    name_or_path: str, *, dtype: str | None = None, **model_init_kwargs: Any
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokenizer in 16 bit, or in float32 where bfloat16 is not native.

    Args:
        name_or_path: a Hub name or a checkpoint folder.
        dtype: "bfloat16", "float16", "float32", or None to follow the hardware.
        **model_init_kwargs: passed to `from_pretrained`. `trust_remote_code` stays off unless it is given here.

    Returns:
        The model in evaluation mode, on this process's own device, and its tokenizer.

    Raises:
        ConfigError: no such folder or model, a folder that holds none, or an unknown dtype.
    """
    kwargs: dict[str, Any] = {"trust_remote_code": False, **model_init_kwargs}
    tokenizer_kwargs = {
        key: value for key, value in kwargs.items() if key in ("revision", "trust_remote_code", "token")
    }
    kwargs = {"dtype": parse_dtype(dtype), "device_map": {"": default_device()}, **kwargs}
    with naming(name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, **tokenizer_kwargs)
        return AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs), tokenizer


def capture(
    model: str | PreTrainedModel,
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
    seed: int = 0,
    prompt_column: str = "prompt",
    completion_column: str = "completion",
    split: str = "train",
    limit: int | None = None,
    chat_template: bool = True,
    batch_size: int = 8,
    rows_per_shard: int | None = None,
    profile: Literal["faithful", "compact"] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str | None = None,
    model_init_kwargs: dict[str, Any] | None = None,
    progress: bool = True,
) -> TransferSet:
    """Let a teacher answer prompts, or score given answers, and store its distributions as a transfer set.

    The plan is fixed before the first token. A capture that was killed goes on where it stopped when it is called
    again in the same way, and ends in the same bytes; under `accelerate launch` or `torchrun` the processes share the
    shards. A set that is already complete is opened as it is.

    Args:
        model: the teacher: a Hub name, a checkpoint folder, or a loaded model.
        prompts: a .jsonl, .json, .parquet or .csv file, a folder of splits, a `datasets` name, or an iterable of
            strings, message lists or dicts.
        output_dir: the folder of the set.
        storage: `Nucleus`, `TopK` or `Sampled`; `Nucleus(0.95, max_k=64)` if None and no profile is named.
        temperatures: distillation temperatures to keep log-normalizers for; (1.0, 2.0) if None, and (1.0,) for
            `Sampled`, which knows no other.
        responses: "generate" lets the teacher answer; "given" takes the data set's own answers, teacher-forced.
        max_new_tokens: length limit of a generated answer. What reaches it is kept, counted and marked.
        do_sample: sample the answers instead of decoding greedily.
        generation_temperature: sampling temperature.
        top_p: nucleus of the sampling; 1.0 for all tokens.
        top_k: number of tokens to sample from; 0 for all.
        seed: seed of sampled answers and sampled entries.
        prompt_column: column of the prompt.
        completion_column: column of the given answer.
        split: split of a folder or a `datasets` name.
        limit: at most this many prompts, from the front.
        chat_template: render prompts with the tokenizer's chat template; False takes the plain text.
        batch_size: prompts a batch. Part of the plan, for it moves the last bits of the logits.
        rows_per_shard: prompts a shard; chosen from the number of prompts if None.
        profile: "faithful" or "compact": precision of the encoding, and the storage rule that goes with it if `storage`
            is None. Without a name the encoding is faithful.
        tokenizer: the teacher's tokenizer; needed with a loaded model that does not name it.
        dtype: dtype of a teacher given by name; after the hardware if None.
        model_init_kwargs: further arguments of `from_pretrained` for a teacher given by name.
        progress: show a bar with tokens per second and the time left, if there is a terminal.

    Returns:
        The complete set, opened.

    Raises:
        DataError: prompts that are missing, empty, malformed or too long, or given answers that are missing.
        ConfigError: settings that do not fit each other or the teacher.
        TransferSetError: the folder holds another set.
        TeacherError: the teacher's logits are not finite.

    Example:
        transfer_set = capture("HuggingFaceTB/SmolLM2-135M-Instruct", ["What is 12 * 7?"], "runs/set")
    """
    if profile not in (None, *PROFILES):
        raise ConfigError(f"profile is one of {', '.join(PROFILES)}, found {profile!r}.")
    rule = storage or (PROFILES[profile].storage if profile else Nucleus(0.95, max_k=64))
    kept = check_temperatures(rule, temperatures or ((1.0,) if isinstance(rule, Sampled) else (1.0, 2.0)))
    settings = GenerationSettings(max_new_tokens, do_sample, generation_temperature, top_p, top_k, seed)
    if responses not in ("generate", "given"):
        raise ConfigError(f"responses is 'generate' or 'given', found {responses!r}.")
    if batch_size < 1 or (rows_per_shard is not None and rows_per_shard < 1):
        raise ConfigError(f"batch_size and rows_per_shard must be at least 1, found {batch_size} and {rows_per_shard}.")
    examples = load_examples(
        prompts, prompt_column=prompt_column, completion_column=completion_column, split=split, limit=limit
    )
    network, tokenizer = _resolve_teacher(model, tokenizer, dtype, model_init_kwargs)
    teacher = TransformersTeacher(network, tokenizer, rule, kept, settings)
    encoded = _encode(examples, tokenizer, responses, chat_template)
    longest = (
        max(len(prompt.completion_ids) for prompt in encoded if prompt.completion_ids) if responses == "given" else 0
    )
    check_context(network, [len(prompt.prompt_ids) for prompt in encoded], longest or max_new_tokens)

    if rows_per_shard is None:
        batches = -(-len(encoded) // (_MIN_SHARDS * batch_size))
        rows_per_shard = min(batches * batch_size, max(_MAX_ROWS_PER_SHARD // batch_size, 1) * batch_size)
    name = str(network.config._name_or_path)
    generation: dict[str, Any] = {"chat_template": chat_template, "seed": seed}
    if responses == "generate":
        generation |= {"max_new_tokens": max_new_tokens, "do_sample": do_sample}
        if do_sample:
            generation |= {"temperature": generation_temperature, "top_p": top_p, "top_k": top_k}
    plan = Plan(
        teacher_name=short_name(name),
        teacher_revision=getattr(network.config, "_commit_hash", None) or "",
        teacher_dtype=str(network.dtype).removeprefix("torch."),
        tokenizer_fingerprint=compute_fingerprint(tokenizer),
        vocab_size=teacher.vocab_size,
        storage=storage_rule_to_dict(rule),
        profile=profile or "faithful",
        temperatures=kept,
        responses=responses,
        generation=generation,
        prompts_digest=_digest(encoded),
        num_prompts=len(encoded),
        rows_per_shard=rows_per_shard,
        batch_size=batch_size,
    )
    state = process_state()
    bar = tqdm(
        total=len(encoded), desc="capture", unit="row", disable=None if progress and state.is_main_process else True
    )
    with TransferSetWriter.open(output_dir, plan, join=state.num_processes > 1) as writer, bar:
        if writer.is_complete:
            logger.warning("The transfer set at %s is complete already; nothing was captured.", output_dir)
        else:
            _fill(writer, teacher, encoded, responses, bar)
            writer.finalize()
    return TransferSet.open(output_dir)


def _fill(
    writer: TransferSetWriter,
    teacher: TransformersTeacher,
    encoded: list[EncodedPrompt],
    responses: str,
    bar: tqdm[Any],
) -> None:
    """Run the teacher over every shard that this process gets, and commit each."""
    run = teacher.answer if responses == "generate" else teacher.score
    batch_size = writer.plan.batch_size
    tokens, started = 0, time.monotonic()
    for task in writer.claim():
        # Longest first, so that a batch pads little; rows go back to the order of the prompts.
        order = sorted(
            encoded[task.start : task.stop], key=lambda p: (-len(p.prompt_ids + (p.completion_ids or [])), p.index)
        )
        rows: dict[int, TransferRow] = {}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            for prompt, row in zip(batch, run(batch), strict=True):
                rows[prompt.index] = row
                tokens += len(row.counts)
            bar.update(len(batch))
            bar.set_postfix_str(f"{tokens / (time.monotonic() - started):.0f} tokens/s")
        ordered = [rows[index] for index in range(task.start, task.stop)]
        writer.commit(task, ordered, {"responses_cut": sum(not row.finished for row in ordered)})


def _resolve_teacher(
    model: str | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: str | None,
    model_init_kwargs: dict[str, Any] | None,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The teacher and its tokenizer, loaded where only a name is given."""
    if isinstance(model, str):
        loaded, own = load_teacher(model, dtype=dtype, **(model_init_kwargs or {}))
        return loaded, tokenizer or own
    if dtype is not None or model_init_kwargs:
        raise ConfigError(
            "dtype and model_init_kwargs apply to a teacher given by name; a loaded model is taken as it is. "
            "Leave them out, or pass the name."
        )
    if tokenizer is None:
        if not model.config._name_or_path:
            raise ConfigError("The loaded teacher does not say where its tokenizer is; pass it as tokenizer.")
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    return model, tokenizer


def _encode(
    examples: list[Example], tokenizer: PreTrainedTokenizerBase, responses: str, chat_template: bool
) -> list[EncodedPrompt]:
    """Token ids of all prompts, and of their answers where these are given."""
    encoded = []
    for index, example in enumerate(examples):
        completion = None
        if responses == "given":
            if not example.completion:
                raise DataError(
                    f"Row {index} has no completion, and responses='given' was asked for. Name the column with "
                    "completion_column, or let the teacher answer with responses='generate'."
                )
            completion = encode_completion(tokenizer, example.completion)
        encoded.append(
            EncodedPrompt(index, encode_prompt(tokenizer, example.prompt, chat_template=chat_template), completion)
        )
    return encoded


def _digest(encoded: list[EncodedPrompt]) -> str:
    digest = hashlib.sha256()
    for prompt in encoded:
        digest.update(json.dumps([prompt.prompt_ids, prompt.completion_ids]).encode())
    return digest.hexdigest()
