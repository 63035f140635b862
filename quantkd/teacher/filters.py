"""Which of a teacher's answers go into the set. What is left out is counted in the index by its reason."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from quantkd.data.gsm8k import is_correct
from quantkd.data.prompts import Example
from quantkd.errors import ConfigError, DataError
from quantkd.transfer_set import TransferRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Answered:
    """A row that is to be judged, and the example that it comes from."""

    example: Example
    row: TransferRow
    tokenizer: PreTrainedTokenizerBase

    @property
    def text(self) -> str:
        """The answer, without special tokens."""
        ids = np.concatenate([self.row.input_ids[start:stop] for start, stop in self.row.spans.tolist()])
        return str(self.tokenizer.decode(ids.tolist(), skip_special_tokens=True))


class Filter(ABC):
    """Keeps or rejects a row; must depend on nothing but the row, its example and earlier samples of its prompt."""

    needs_reference: ClassVar[bool] = False  # each example must have a completion, which the teacher does not see
    across_rows: ClassVar[bool] = False  # prompts that came before are left out when the plan is made

    kind: ClassVar[str]

    def describe(self) -> dict[str, Any]:
        """What the plan says of it."""
        return {"kind": self.kind, **vars(self)}

    @abstractmethod
    def reject(self, answered: Answered, earlier: Sequence[TransferRow]) -> str | None:
        """Why a row is left out; None to keep it."""

    def check_reference(self, reference: str) -> None:
        """Refuse a reference that answers cannot be compared with, before any work is spent."""
        return


@dataclass(frozen=True)
class FinishedOnly(Filter):
    """Leaves out answers that the length limit cut; counted as `filtered_unfinished`."""

    kind = "finished_only"

    def reject(self, answered: Answered, earlier: Sequence[TransferRow]) -> str | None:
        return None if answered.row.finished else "unfinished"


@dataclass(frozen=True)
class ResponseLength(Filter):
    """Leaves out answers of too few or too many tokens, end token included, as `filtered_short` and `filtered_long`."""

    kind = "response_length"
    minimum: int = 1
    maximum: int | None = None

    def __post_init__(self) -> None:
        if self.minimum < 1 or (self.maximum is not None and self.maximum < self.minimum):
            raise ConfigError(
                f"Answers of {self.minimum} to {self.maximum} tokens were asked for; expected "
                "1 <= min_response_tokens <= max_response_tokens."
            )

    def reject(self, answered: Answered, earlier: Sequence[TransferRow]) -> str | None:
        length = len(answered.row.counts)
        if length < self.minimum:
            return "short"
        return "long" if self.maximum is not None and length > self.maximum else None


@dataclass(frozen=True)
class DropDuplicates(Filter):
    """Keeps one of equal rows; counts `filtered_duplicate_prompts`, and `filtered_duplicate` answers to one prompt."""

    # Prompts are compared when the plan is made, and the samples of a prompt are in one shard: so both are the same
    # whichever process computes it.
    kind = "drop_duplicates"
    across_rows = True

    def reject(self, answered: Answered, earlier: Sequence[TransferRow]) -> str | None:
        ids = answered.row.input_ids
        return "duplicate" if any(np.array_equal(ids, other.input_ids) for other in earlier) else None


@dataclass(frozen=True)
class CorrectOnly(Filter):
    """Leaves out answers that a verifier of text and completion, or GSM8K's, finds wrong: `filtered_incorrect`."""

    kind = "correct_only"
    needs_reference = True
    verifier: Callable[[str, str], bool] | None = None

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "verifier": "gsm8k" if self.verifier is None else _name_of(self.verifier)}

    def reject(self, answered: Answered, earlier: Sequence[TransferRow]) -> str | None:
        reference = answered.example.completion or ""
        verifier = self.verifier or partial(is_correct, mode="strict")
        return None if verifier(answered.text, reference) else "incorrect"

    def check_reference(self, reference: str) -> None:
        if self.verifier is None:  # GSM8K's grader needs a number after `####`
            try:
                is_correct("", reference, "strict")
            except DataError as error:
                raise DataError(f"{error} For other data give a verifier: filters=[CorrectOnly(verifier)].") from error


@dataclass(frozen=True)
class UserFilter(Filter):
    """Leaves out where a function of the example and the answer's text is False; counted as `filtered_<its name>`."""

    kind = "function"
    function: Callable[[Example, str], bool]

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "name": _name_of(self.function)}

    def reject(self, answered: Answered, earlier: Sequence[TransferRow]) -> str | None:
        return None if self.function(answered.example, answered.text) else _name_of(self.function)


def as_filters(filters: Sequence[Filter | Callable[[Example, str], bool]]) -> list[Filter]:
    """Filters, with plain functions taken for the user's own."""
    for each in filters:
        if not callable(each) and not isinstance(each, Filter):
            raise ConfigError(
                f"filters holds {each!r:.80}; expected a filter of quantkd.teacher.filters, or a function of an "
                "example and the answer's text."
            )
    return [each if isinstance(each, Filter) else UserFilter(each) for each in filters]


def sift(
    filters: Sequence[Filter],
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[TransferRow],
    examples: Sequence[Example],
) -> tuple[list[TransferRow], Counter[str]]:
    """The rows that pass every filter, and how many did not, by first reason; a prompt's samples share an `Example`."""
    kept: list[TransferRow] = []
    earlier: list[TransferRow] = []  # of the same prompt
    counts: Counter[str] = Counter()
    for place, (row, example) in enumerate(zip(rows, examples, strict=True)):
        if place and example is not examples[place - 1]:
            earlier = []
        answered = Answered(example, row, tokenizer)
        reason = next((found for each in filters if (found := each.reject(answered, earlier)) is not None), None)
        if reason is None:
            earlier.append(row)
            kept.append(row)
        else:
            counts[f"filtered_{reason}"] += 1
    return kept, counts


def _name_of(function: Callable[..., Any]) -> str:
    name = str(getattr(function, "__name__", type(function).__name__))
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in name)[:64]
