"""From examples to token ids: prompts, given answers and whole conversations, and the table that holds all of them."""

from __future__ import annotations

import array
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantkd.data.prompts import Example, Message
from quantkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = tuple[tuple[int, int], ...]
# Token ids of a prompt, of its given answer if there is one, and the supervised parts of a conversation.
EncodedRow = tuple[list[int], list[int] | None, Spans | None]

_CHUNK = 1024  # prompts tokenised in one call
# The block that marks an assistant's turn in a chat template, as transformers looks for it.
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class EncodedPrompt:
    """One row to be made."""

    index: int  # its place in the plan; with the seed it decides all random draws of the row
    prompt_ids: list[int]
    completion_ids: list[int] | None = None  # a given answer; None where the teacher answers
    # Of an answer of several turns, each supervised part, counted from the start of the prompt; None for all of it.
    spans: Spans | None = None


class PromptTable:
    """All prompts of a capture as token ids in flat arrays: 4 bytes per token, however many prompts there are."""

    def __init__(self, num_samples: int = 1) -> None:
        self.num_samples, self.is_given, self.num_duplicates = num_samples, False, 0
        self.examples: list[Example] = []
        self.numbers: list[int] = []  # the place of each in the data
        self._tokens = array.array("i")
        self._ends = array.array("q")  # of the prompt, then of the completion
        self._spans: dict[int, Spans] = {}
        self._digest = hashlib.sha256()

    @property
    def num_rows(self) -> int:
        """Prompts times samples."""
        return len(self.examples) * self.num_samples

    def append(self, number: int, example: Example, row: EncodedRow) -> None:
        """Add a prompt."""
        prompt_ids, completion_ids, spans = row
        if spans:
            self._spans[len(self.examples)] = spans
        self._digest.update(json.dumps([prompt_ids, completion_ids, spans] if spans else row[:2]).encode())
        for ids in (prompt_ids, completion_ids or ()):
            self._tokens.extend(ids)
            self._ends.append(len(self._tokens))
        self.is_given |= completion_ids is not None
        self.examples.append(example)
        self.numbers.append(number)

    def digest(self) -> str:
        """sha256 over the token ids of all prompts and answers, in hexadecimal."""
        return self._digest.hexdigest()

    def lengths(self) -> NDArray[np.int64]:
        """(prompts, 2): tokens of each prompt and of its given answer."""
        ends: NDArray[np.int64] = np.asarray([0, *self._ends], dtype=np.int64)
        return (ends[1:] - ends[:-1]).reshape(-1, 2)

    def count_tokens(self, max_new_tokens: int) -> tuple[int, int]:
        """Tokens of the prompts and of the answers of all rows; of answers that are not given, at most."""
        prompts, given = (int(total) * self.num_samples for total in self.lengths().sum(0))
        return prompts, given if self.is_given else self.num_rows * max_new_tokens

    def check_lengths(self, max_context: int | None, max_new_tokens: int) -> None:
        """Refuse prompts that leave no room for the answer, before any work is spent."""
        prompts, given = self.lengths().T.tolist()
        check_context(prompts, given if self.is_given else [max_new_tokens] * len(prompts), max_context, self.numbers)

    def batches(self, start: int, stop: int, size: int) -> list[list[EncodedPrompt]]:
        """The rows `[start, stop)`, longest first, so that a batch pads little."""
        rows = [self.row(row) for row in range(start, stop)]
        rows.sort(key=lambda row: (-len(row.prompt_ids) - len(row.completion_ids or ()), row.index))
        return [rows[place : place + size] for place in range(0, len(rows), size)]

    def longest(self, count: int, max_new_tokens: int) -> list[EncodedPrompt]:
        """At most `count` of the longest rows, with answers as long as they may get; which tokens does not matter."""
        order = self.lengths().sum(1).argsort(kind="stable")[::-1].repeat(self.num_samples)
        rows = [self.row(int(prompt) * self.num_samples) for prompt in order[:count]]
        if self.is_given:
            return rows
        return [
            replace(row, completion_ids=(row.prompt_ids * (max_new_tokens // len(row.prompt_ids) + 1))[:max_new_tokens])
            for row in rows
        ]

    def row(self, row: int) -> EncodedPrompt:
        """A row of the plan."""
        prompt = row // self.num_samples
        start = self._ends[2 * prompt - 1] if prompt else 0
        middle, stop = self._ends[2 * prompt], self._ends[2 * prompt + 1]
        return EncodedPrompt(
            index=row,
            prompt_ids=self._tokens[start:middle].tolist(),
            completion_ids=self._tokens[middle:stop].tolist() if self.is_given else None,
            spans=self._spans.get(prompt),
        )


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    given: bool,
    chat_template: bool = True,
    num_samples: int = 1,
    drop_duplicates: bool = False,
) -> PromptTable:
    """Token ids of all prompts, and of their answers where these are given."""
    table = PromptTable(num_samples)
    seen: set[bytes] = set()
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        if given:
            rows = [_encode_given(tokenizer, each, chat_template, start + place) for place, each in enumerate(chunk)]
        else:
            prompts = encode_prompts(
                tokenizer, [each.prompt for each in chunk], chat_template=chat_template, first=start
            )
            rows = [(prompt, None, None) for prompt in prompts]
        for number, row in enumerate(rows, start=start):
            turns = examples[number].prompt
            if not given and isinstance(turns, list) and turns[-1]["role"] == "assistant":
                raise DataError(
                    f"Row {number} ends in an assistant turn, and the teacher is to answer; expected a user turn at "
                    "the end. Remove the last turn, or keep the answers with responses='given'."
                )
            key = hashlib.sha256(repr(row).encode()).digest() if drop_duplicates else b""
            if drop_duplicates and key in seen:
                table.num_duplicates += 1
                continue
            seen.add(key)
            table.append(number, examples[number], row)
    return table


def check_context(
    prompts: Sequence[int], answers: Sequence[int], max_context: int | None, numbers: Sequence[int] | None = None
) -> None:
    """Refuse prompts that leave no room for the answer, by their lengths in tokens."""
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if max_context is not None and prompt + answer > max_context:
            raise DataError(
                f"Row {index if numbers is None else numbers[index]} has a prompt of {prompt} tokens; with {answer} "
                f"tokens for the answer that is more than the model's context of {max_context}. Shorten it (fewer "
                "shots), remove it, or lower max_new_tokens."
            )


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[Message]],
    *,
    chat_template: bool = True,
    first: int = 0,
) -> list[list[int]]:
    """Token ids of prompts, up to where the answers begin, from one call; errors count the rows from `first`."""
    texts: list[str] = []
    for number, prompt in enumerate(prompts, start=first):
        if chat_template:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            with _naming(number):
                texts.append(_render_chat(tokenizer, messages, add_generation_prompt=True, tokenize=False))
        elif isinstance(prompt, str):
            texts.append(prompt)
        else:
            raise DataError(
                f"Row {number}: a plain prompt must be text, found {len(prompt)} chat messages. "
                "Use chat_template=True, or give the prompts as text."
            )
    encoded = tokenizer(texts, add_special_tokens=not chat_template)["input_ids"] if texts else []
    for place, text in enumerate(texts):
        # Some tokenizers close every plain text with their end token; after it a model answers nothing.
        closed = encoded[place][-1:] == [tokenizer.eos_token_id] and not text.endswith(str(tokenizer.eos_token))
        if closed and not chat_template:
            encoded[place].pop()
        if not encoded[place]:
            raise DataError(f"Row {first + place}: the prompt {text!r:.80} gives no tokens. Remove it from the data.")
    return list(encoded)


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an answer: the text tokenised alone, then the end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token to close answers with. "
            "Set tokenizer.eos_token."
        )
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a conversation, and the `[start, stop)` of each assistant turn, its end token included.

    A chat template with `{% generation %}` blocks marks the turns itself. With any other, a turn is what the template
    adds to the prompt that the model would have seen there. Where a template changes earlier turns as later ones come,
    for example by removing their reasoning, the conversation is refused.
    """
    if _GENERATION_BLOCK.search(tokenizer.chat_template or ""):
        input_ids, spans = _by_generation_blocks(tokenizer, messages)
    else:
        input_ids, spans = _by_prefixes(tokenizer, messages)
    if spans[0][0] == 0:
        raise DataError(
            "The conversation's first token belongs to an assistant turn, and nothing predicts it. "
            "Begin the conversation with a user turn."
        )
    return input_ids[: spans[-1][1]], spans


def _encode_given(tokenizer: PreTrainedTokenizerBase, example: Example, chat_template: bool, number: int) -> EncodedRow:
    """A prompt and its given answer, or a conversation, every assistant turn of which is one."""
    if example.messages is None:
        if not example.completion:
            raise DataError(
                f"Row {number} has no completion, and responses='given' was asked for. Name the column with "
                "completion_column, or let the teacher answer with responses='generate'."
            )
        (prompt,) = encode_prompts(tokenizer, [example.prompt], chat_template=chat_template, first=number)
        return prompt, encode_completion(tokenizer, example.completion), None
    if not chat_template:
        raise DataError(f"Row {number} is a conversation, and plain prompts were asked for. Use the chat template.")
    with _naming(number):
        input_ids, spans = encode_conversation(tokenizer, example.messages)
    return input_ids[: spans[0][0]], input_ids[spans[0][0] :], tuple(spans)


def _render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **kwargs: Any) -> Any:
    """Messages in the tokenizer's chat template, as token ids unless `kwargs` say otherwise."""
    import jinja2

    if not tokenizer.chat_template:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, and a chat prompt was asked for. "
            "Use an instruct model's tokenizer, or plain prompts: chat_template=False (--plain_prompts)."
        )
    try:
        return tokenizer.apply_chat_template(list(messages), **{"tokenize": True, "return_dict": False, **kwargs})
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"The chat template refuses messages of the roles {roles}: {error}. Mend them.") from error


@contextmanager
def _naming(number: int) -> Iterator[None]:
    """Put the row's number before what is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"Row {number}: {error}") from error


def _by_generation_blocks(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], list[tuple[int, int]]]:
    """What the template itself marks."""
    encoded = _render_chat(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
    steps = np.diff([0, *encoded["assistant_masks"], 0])
    starts, stops = np.flatnonzero(steps > 0).tolist(), np.flatnonzero(steps < 0).tolist()
    if not starts:
        raise DataError(
            "The chat template's {% generation %} blocks mark no token of the conversation; expected at least one "
            "assistant turn. Mend the template."
        )
    return list(encoded["input_ids"]), list(zip(starts, stops, strict=True))


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], list[tuple[int, int]]]:
    """What the template adds to each prompt that the model would have seen."""
    whole: list[int] = _render_chat(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt: list[int] = _render_chat(tokenizer, messages[:turn], add_generation_prompt=True) if turn else []
        answered: list[int] = _render_chat(tokenizer, messages[: turn + 1])
        for part in (prompt, answered):
            if whole[: len(part)] != part:
                place = next((i for i, (a, b) in enumerate(zip(whole, part, strict=False)) if a != b), "its end")
                raise DataError(
                    f"The chat template renders the conversation up to its assistant turn {len(spans) + 1} differently "
                    f"once all turns are there (from token {place} on). Use a chat template with {{% generation %}} "
                    "blocks, or give each assistant turn as a separate row: the turns before it as prompt, and the "
                    "turn as completion."
                )
        start, stop = len(prompt), len(answered)
        if start == stop:
            raise DataError(
                f"The chat template adds nothing for assistant turn {len(spans) + 1}; expected its text. Remove the "
                "conversation, or use another template."
            )
        ends = [place for place in range(start, stop) if whole[place] == tokenizer.eos_token_id]
        spans.append((start, ends[-1] + 1 if ends else stop))
    return whole, spans
