"""All prompts of a capture as token ids, in flat arrays: 4 bytes a token, however many prompts there are."""

from __future__ import annotations

import array
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
from numpy.typing import NDArray

from quantkd.data.conversations import encode_example
from quantkd.data.prompts import Example
from quantkd.teacher.teacher import EncodedPrompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_CHUNK = 1024  # prompts tokenised in one call

Spans = tuple[tuple[int, int], ...]


class PromptTable:
    """Prompts, and given answers where there are any, by number.

    Args:
        num_samples: how many rows each prompt becomes.
        first_row: the index of row 0, for a set that is extended.
    """

    def __init__(self, num_samples: int = 1, first_row: int = 0) -> None:
        self.num_samples, self.first_row = num_samples, first_row
        self._tokens = array.array("i")
        self._ends = array.array("q")  # of the prompt, then of the completion
        self._spans: dict[int, Spans] = {}
        self._digest = hashlib.sha256()
        self.is_given = False

    @property
    def num_prompts(self) -> int:
        """How many prompts there are."""
        return len(self._ends) // 2

    @property
    def num_rows(self) -> int:
        """How many rows they become."""
        return self.num_prompts * self.num_samples

    def append(self, prompt_ids: Sequence[int], completion_ids: Sequence[int] | None, spans: Spans | None) -> None:
        """Add a prompt."""
        content: list[Any] = [prompt_ids, completion_ids]
        if spans:
            self._spans[self.num_prompts] = spans
            content.append(spans)
        self._digest.update(json.dumps(content).encode())
        self._tokens.extend(prompt_ids)
        self._ends.append(len(self._tokens))
        self._tokens.extend(completion_ids or ())
        self._ends.append(len(self._tokens))
        self.is_given |= completion_ids is not None

    def digest(self) -> str:
        """sha256 over the token ids of all prompts and answers, in hexadecimal."""
        return self._digest.hexdigest()

    def lengths(self) -> NDArray[np.int64]:
        """(prompts, 2): tokens of each prompt and of its given answer."""
        ends = np.frombuffer(self._ends, dtype=np.int64) if self._ends else np.zeros(0, dtype=np.int64)
        return np.diff(ends, prepend=0).reshape(-1, 2)

    def prompt_tokens(self) -> int:
        """Tokens of the prompts of all rows."""
        return int(self.lengths()[:, 0].sum()) * self.num_samples

    def row(self, row: int) -> EncodedPrompt:
        """A row of the plan."""
        prompt = row // self.num_samples
        start = self._ends[2 * prompt - 1] if prompt else 0
        middle, stop = self._ends[2 * prompt], self._ends[2 * prompt + 1]
        return EncodedPrompt(
            index=self.first_row + row,
            prompt_ids=self._tokens[start:middle].tolist(),
            completion_ids=self._tokens[middle:stop].tolist() if self.is_given else None,
            spans=self._spans.get(prompt),
        )


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    responses: str,
    chat_template: bool,
    num_samples: int = 1,
    first_row: int = 0,
    drop_duplicates: bool = False,
) -> tuple[PromptTable, list[int]]:
    """Token ids of all prompts, and of their answers where these are given."""
    table = PromptTable(num_samples, first_row)
    kept: list[int] = []
    seen: set[bytes] = set()
    for number, row in enumerate(_encode(examples, tokenizer, responses, chat_template)):
        if drop_duplicates:
            key = hashlib.sha256(repr(row).encode()).digest()
            if key in seen:
                continue
            seen.add(key)
        table.append(*row)
        kept.append(number)
    return table, kept


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, responses: str, chat_template: bool
) -> Iterator[tuple[list[int], list[int] | None, Spans | None]]:
    """What `encode_example` gives for each, in one call a chunk where nothing but prompts is wanted."""
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        together = _encode_together(chunk, tokenizer, chat_template) if responses == "generate" else None
        if together is not None:
            yield from ((prompt_ids, None, None) for prompt_ids in together)
            continue
        for number, example in enumerate(chunk, start=start):
            yield encode_example(
                tokenizer, example, given=responses == "given", chat_template=chat_template, where=f"Row {number}"
            )


def _encode_together(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> list[list[int]] | None:
    """The prompts' token ids from one call; None where one of them needs a closer look, or a message about it."""
    prompts: list[Any] = [example.prompt for example in examples]
    if chat_template:
        conversations = [[{"role": "user", "content": p}] if isinstance(p, str) else p for p in prompts]
        if not tokenizer.chat_template or any(turns[-1]["role"] == "assistant" for turns in conversations):
            return None
        try:
            encoded: Any = tokenizer.apply_chat_template(
                conversations, add_generation_prompt=True, tokenize=True, return_dict=False
            )
        except jinja2.TemplateError:
            return None  # which of them it was is found one by one
    else:
        if not all(isinstance(prompt, str) for prompt in prompts):
            return None
        encoded = tokenizer(prompts)["input_ids"]
        if any(ids and ids[-1] == tokenizer.eos_token_id for ids in encoded):
            return None  # the tokenizer closes texts with its end token; encode_prompt takes it off
    return list(encoded) if all(encoded) else None
