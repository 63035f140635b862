"""What capture asks of a teacher, whatever engine runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from quantkd.errors import ConfigError
from quantkd.transfer_set import TransferRow


@dataclass(frozen=True)
class EncodedPrompt:
    """One row to be made: its place in the set, the prompt as token ids, and the given answer if there is one.

    Args:
        index: the row's place in the plan; with the seed it decides all random draws of the row.
        prompt_ids: token ids up to where the answer begins.
        completion_ids: a given answer; None where the teacher answers.
        spans: of a given answer of several turns, the `[start, stop)` of each supervised part, counted from the start
            of the prompt; None supervises all of `completion_ids`.
    """

    index: int
    prompt_ids: list[int]
    completion_ids: list[int] | None = None
    spans: tuple[tuple[int, int], ...] | None = None


@dataclass(frozen=True)
class GenerationSettings:
    """How the teacher answers. Part of a capture's plan: the same settings give the same answers.

    Args:
        max_new_tokens: length limit of an answer; what reaches it is kept, counted and marked as cut.
        do_sample: sample instead of taking the most probable token. What is stored is the teacher's unfiltered
            distribution either way.
        generation_temperature: sampling temperature; not the distillation temperature.
        top_p: sample from the smallest set of tokens with this mass; 1.0 for all.
        top_k: sample from the k most probable tokens; 0 for all.
        seed: each row draws from a stream of its own, derived from this and its index, whatever batch it is in.

    Raises:
        ConfigError: a value outside its range.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    generation_temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}.")
        if not (self.generation_temperature > 0 and 0 < self.top_p <= 1 and self.top_k >= 0):
            raise ConfigError(
                "Sampling needs generation_temperature > 0, 0 < top_p <= 1 and top_k >= 0, found "
                f"{self.generation_temperature}, {self.top_p} and {self.top_k}. For greedy answers leave do_sample off."
            )


class Teacher(Protocol):
    """Answers batches of prompts, or scores given answers, and keeps the entries of every target token.

    Attributes:
        engine: "transformers", "vllm" or "server"; part of the plan, for engines differ in the last bits.
        name: the model's name or path.
        revision: its commit, or "" if it has none.
        dtype: such as "bfloat16".
        vocab_size: V, one more than the greatest id that can be a token; the padding of a head is not among them.
        max_context: tokens of prompt and answer together; None if it is not known.
        temperatures: the distillation temperatures it gives log-normalizers for, ascending; an engine that hands out
            log-probabilities alone gives (1.0,).
    """

    engine: str
    name: str
    revision: str
    dtype: str
    temperatures: tuple[float, ...]

    @property
    def vocab_size(self) -> int:
        """V, one more than the greatest id that can be a token."""

    @property
    def max_context(self) -> int | None:
        """Tokens of prompt and answer together; None if it is not known."""

    def answer(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """One answer a prompt, in order, with the entries of each of its tokens."""

    def score(self, prompts: Sequence[EncodedPrompt]) -> list[TransferRow]:
        """The entries at every supervised token of given answers, in order."""
