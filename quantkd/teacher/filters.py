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


class Filter(ABC):
    """Keeps or rejects a row; must depend on nothing but the row, its example and earlier samples of its prompt."""

    needs_reference: ClassVar[bool] = False  # each example must have a completion, which the teacher does not see
    across_rows: ClassVar[bool] = False  # prompts that came before are left out when the plan is made

    kind: ClassVar[str]

    def describe(self) -> dict[str, Any]:
        """What the plan says of it."""
        return {"kind": self.kind, **vars(self)}

    @abstractmethod
    def reject(self, example: Example, row: TransferRow, text: str, earlier: Sequence[TransferRow]) -> str | None:
        """Why a row, whose answer is `text` without special tokens, is left out; None to keep it."""

    def check_reference(self, reference: str) -> None:
        """Refuse a reference that answers cannot be compared with, before any work is spent."""
        return


@dataclass(frozen=True)
class FinishedOnly(Filter):
    """Leaves out answers that the length limit cut; counted as `filtered_unfinished`."""

    kind = "finished_only"

    def reject(self, example: Example, row: TransferRow, text: str, earlier: Sequence[TransferRow]) -> str | None:
        return None if row.finished else "unfinished"


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

    def reject(self, example: Example, row: TransferRow, text: str, earlier: Sequence[TransferRow]) -> str | None:
        if len(row.counts) < self.minimum:
            return "short"
        return "long" if self.maximum is not None and len(row.counts) > self.maximum else None


@dataclass(frozen=True)
class DropDuplicates(Filter):
    """Keeps one of equal rows; counts `filtered_duplicate_prompts`, and `filtered_duplicate` answers to one prompt."""

    # Prompts are compared when the plan is made, and the samples of a prompt are in one shard: so both are the same
    # whichever process computes it.
    kind = "drop_duplicates"
    across_rows = True

    def reject(self, example: Example, row: TransferRow, text: str, earlier: Sequence[TransferRow]) -> str | None:
        return "duplicate" if any(np.array_equal(row.input_ids, other.input_ids) for other in earlier) else None


@dataclass(frozen=True)
class CorrectOnly(Filter):
    """Leaves out answers that a verifier of text and completion, or GSM8K's, finds wrong: `filtered_incorrect`."""

    kind = "correct_only"
    needs_reference = True
    verifier: Callable[[str, str], bool] | None = None

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "verifier": "gsm8k" if self.verifier is None else _name_of(self.verifier)}

    def reject(self, example: Example, row: TransferRow, text: str, earlier: Sequence[TransferRow]) -> str | None:
        verifier = self.verifier or partial(is_correct, mode="strict")
        return None if verifier(text, example.completion or "") else "incorrect"

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

    def reject(self, example: Example, row: TransferRow, text: str, earlier: Sequence[TransferRow]) -> str | None:
        return None if self.function(example, text) else _name_of(self.function)


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
        ids = row.input_ids[row.targets].tolist()
        text = str(tokenizer.decode(ids, skip_special_tokens=True)) if filters else ""
        reason = next((why for each in filters if (why := each.reject(example, row, text, earlier)) is not None), None)
        if reason is None:
            earlier.append(row)
            kept.append(row)
        else:
            counts[f"filtered_{reason}"] += 1
    return kept, counts


def _name_of(function: Callable[..., Any]) -> str:
    name = str(getattr(function, "__name__", type(function).__name__))
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in name)[:64]
