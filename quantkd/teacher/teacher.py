"""What capture asks of a teacher, and the settings of a capture, from which the command line makes its options."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from quantkd.data.encoding import EncodedPrompt
from quantkd.errors import ConfigError, TeacherError, refuse_unused
from quantkd.files import parse_object
from quantkd.transfer_set import TransferRow
from quantkd.transfer_set.rules import StorageRule, check_temperatures

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a dataclass that is an option of the command line."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass(frozen=True)
class GenerationSettings:
    """How the teacher answers. Part of a capture's plan: the same settings give the same answers.

    Args:
        max_new_tokens: length limit of an answer. An answer that reaches it is kept, counted and marked as cut.
        do_sample: sample instead of taking the most probable token. What is stored is the teacher's unfiltered
            distribution either way.
        generation_temperature: sampling temperature; not the distillation temperature.
        top_p: sample from the smallest set of tokens with this mass; 1.0 for all.
        top_k: sample from the k most probable tokens; 0 for all.
        seed: seed of sampled answers and sampled entries. Each row draws from a stream of its own, derived from this
            and its index, whatever batch it is in.
        num_samples: answers per prompt, each a row; sample j of prompt i is row i * num_samples + j.

    Raises:
        ConfigError: a value outside its range, or several answers per prompt without sampling.
    """

    max_new_tokens: int = option(256, "Length limit of an answer.")
    do_sample: bool = option(False, "Sample the answers instead of decoding greedily.")
    generation_temperature: float = option(1.0, "Sampling temperature.")
    top_p: float = option(1.0, "Sample from this mass of most probable tokens.")
    top_k: int = option(0, "Sample from this many most probable tokens; 0 for all.")
    seed: int = option(0, "Seed of sampled answers and sampled entries.")
    num_samples: int = option(1, "Answers per prompt, each a row; needs --do_sample.")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.num_samples < 1:
            found = f"{self.max_new_tokens} and {self.num_samples}"
            raise ConfigError(f"max_new_tokens and num_samples must be at least 1, found {found}.")
        if not (self.generation_temperature > 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise ConfigError(
                "Sampling needs generation_temperature > 0, 0 < top_p <= 1 and top_k >= 0, found "
                f"{self.generation_temperature}, {self.top_p} and {self.top_k}. For greedy answers leave do_sample off."
            )
        refuse_unused(self, {"do_sample": "generation_temperature top_p top_k num_samples"})

    @property
    def sampling(self) -> dict[str, Any]:
        """Temperature, 0 for greedy answers, top_p and top_k by the names that engines have for them."""
        temperature = self.generation_temperature if self.do_sample else 0.0
        return {"temperature": temperature, "top_p": self.top_p, "top_k": self.top_k}


@dataclass(frozen=True)
class RunSettings:
    """What runs the teacher, in which batches, and how its rows are cut into shards.

    Args:
        batch_size: prompts per batch. Part of the plan, because it changes the last bits of the logits.
        auto_find_batch_size: find the batch size instead, before the plan is fixed. A capture that is resumed keeps
            the size of its plan.
        rows_per_shard: rows per shard; chosen from the number of prompts if None.
        engine: what runs a teacher given by name: "transformers", "vllm" or "server".
        base_url: address of the server engine's OpenAI-compatible server.
        engine_kwargs: further arguments of `vllm.LLM` or of `ServerTeacher`; a JSON object on the command line.
        dtype: dtype of a teacher given by name; bfloat16 where the hardware has it, else float32, if None.
        revision: branch, tag or commit of a teacher given by name.
        attn_implementation: attention of a teacher given by name, such as "sdpa".
        trust_remote_code: run code from the teacher's repository.
        teacher_adapter: a PEFT adapter on the teacher, a Hub name or a folder.
        progress: show a bar with tokens per second and the time left, if there is a terminal.

    Raises:
        ConfigError: a value outside its range, or settings that belong to another engine.
    """

    batch_size: int = option(8, "Prompts per batch.")
    auto_find_batch_size: bool = option(
        False, "Find the largest batch that fits into memory, before anything is written."
    )
    rows_per_shard: int | None = option(None, "Rows per shard.")
    engine: Literal["transformers", "vllm", "server"] = option("transformers", "What runs the teacher.")
    base_url: str | None = option(None, "Address of the server engine's server, with /v1.")
    engine_kwargs: dict[str, Any] | str | None = option(
        None, "Further arguments of vLLM or the server engine, as JSON: '{\"tensor_parallel_size\": 2}'."
    )
    dtype: str | None = option(None, "Teacher's dtype; bfloat16 where the hardware has it, else float32.")
    revision: str | None = option(None, "Branch, tag or commit of the teacher.")
    attn_implementation: str | None = option(None, "Attention of the teacher, such as sdpa.")
    trust_remote_code: bool = option(False, "Run code from the teacher's repository.")
    teacher_adapter: str | None = option(None, "LoRA adapter on the teacher: a folder, or user/name on the Hub.")
    progress: bool = option(True, "Show a progress bar.")

    def __post_init__(self) -> None:
        if self.batch_size < 1 or (self.rows_per_shard is not None and self.rows_per_shard < 1):
            raise ConfigError(
                f"batch_size and rows_per_shard must be at least 1, found {self.batch_size} and {self.rows_per_shard}."
            )
        if self.engine not in ("transformers", "vllm", "server"):
            raise ConfigError(f"engine is {self.engine!r}; expected transformers, vllm or server.")
        if (self.engine == "server") != (self.base_url is not None):
            raise ConfigError(
                f"base_url is the address of the server engine; found {self.base_url!r} with engine={self.engine!r}. "
                "Give both engine='server' and base_url, or neither."
            )
        self.engine_arguments()  # which reads them
        needs = {"engine=transformers": "attn_implementation teacher_adapter"}
        refuse_unused(self, {**needs, "engine=vllm engine=server": "engine_kwargs"})

    def engine_arguments(self) -> dict[str, Any]:
        """`engine_kwargs` as a dictionary."""
        return parse_object("engine_kwargs", self.engine_kwargs)


def seed_of(seed: int, index: int, purpose: str = "tokens", bits: int = 31) -> int:
    """The seed of a row's own random draws, the same in any batch and for any number of processes."""
    digest = hashlib.sha256(f"{seed}:{index}:{purpose}".encode()).digest()
    return (int.from_bytes(digest[:8], "little") >> 1) % (1 << bits)


def locate_targets(prompt: EncodedPrompt) -> tuple[list[int], NDArray[np.int64], list[int]]:
    """The whole sequence of a given answer; the spans of it that are supervised; and each place in these."""
    completion = prompt.completion_ids or []
    if not completion:
        raise TeacherError(f"Row {prompt.index} has an answer without tokens; expected at least one. Remove the row.")
    sequence = prompt.prompt_ids + completion
    spans = prompt.spans if prompt.spans is not None else ((len(prompt.prompt_ids), len(sequence)),)
    return sequence, np.asarray(spans, dtype=np.int64), [each for span in spans for each in range(*span)]


class Teacher(ABC):
    """Answers batches of prompts, or scores given answers, and keeps the entries of every target token.

    A teacher of your own calls this constructor and implements the three methods.
    """

    preferred_batch_size: int | None = None  # of an engine that forms its own batches: the prompts that keep it busy

    def __init__(
        self,
        name: str,
        tokenizer: PreTrainedTokenizerBase,
        rule: StorageRule,
        temperatures: Sequence[float],
        settings: GenerationSettings,
        *,
        vocab_size: int,  # one more than the greatest id that can be a token, without the padding of a head
        max_context: int | None = None,  # tokens of prompt and answer together, if that is known
        revision: str = "",
        dtype: str = "",
    ) -> None:
        self.name, self.revision, self.dtype, self.tokenizer = name, revision, dtype, tokenizer
        self.rule, self.temperatures, self.settings = rule, check_temperatures(rule, temperatures), settings
        self.vocab_size, self.max_context = vocab_size, max_context

    @abstractmethod
    def describe(self) -> dict[str, Any]:
        """What the plan records in addition: the engine, as engines differ in the last bits, or an adapter."""

    @abstractmethod
    def answer(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """One answer per prompt, in order, with the entries of each of its tokens."""

    @abstractmethod
    def score(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """The entries at every supervised token of given answers, in order."""
