"""From examples to token ids: prompts, given answers and whole conversations, and the table that holds all of them."""

from __future__ import annotations

import array
import hashlib
import itertools
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
    """One row to be made.

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
    spans: Spans | None = None


class PromptTable:
    """All prompts of a capture as token ids in flat arrays: 4 bytes per token, however many prompts there are.

    Args:
        num_samples: how many rows each prompt becomes.

    Attributes:
        examples: where each prompt comes from.
        numbers: the place of each prompt in the data.
        is_given: whether the answers are given.
        num_duplicates: prompts that were left out because they came before.
    """

    def __init__(self, num_samples: int = 1) -> None:
        self.num_samples, self.is_given, self.num_duplicates = num_samples, False, 0
        self.examples: list[Example] = []
        self.numbers: list[int] = []
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
    for number, row in enumerate(_encode(examples, tokenizer, given, chat_template)):
        if drop_duplicates:
            key = hashlib.sha256(repr(row).encode()).digest()
            if key in seen:
                table.num_duplicates += 1
                continue
            seen.add(key)
        table.append(number, examples[number], row)
    return table


def _encode(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, given: bool, chat_template: bool
) -> Iterator[EncodedRow]:
    """`encode_example` of each, in one call per chunk where only prompts are wanted."""
    for start in range(0, len(examples), _CHUNK):
        chunk = examples[start : start + _CHUNK]
        together = None if given else _encode_together(chunk, tokenizer, chat_template)
        if together is not None:
            yield from ((prompt_ids, None, None) for prompt_ids in together)
            continue
        for number, example in enumerate(chunk, start=start):
            yield encode_example(tokenizer, example, given=given, chat_template=chat_template, where=f"Row {number}")


def _encode_together(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, chat_template: bool
) -> list[list[int]] | None:
    """The prompts' token ids from one call; None where one of them needs a closer look, or a message about it."""
    import jinja2

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


def check_context(
    prompts: Sequence[int], answers: Sequence[int], max_context: int | None, numbers: Sequence[int] | None = None
) -> None:
    """Refuse prompts without tokens, and those that leave no room for the answer, by their lengths in tokens."""
    for index, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        row = f"Row {index if numbers is None else numbers[index]}"
        if not prompt:
            raise DataError(f"{row} has a prompt without tokens; expected at least one. Remove the row.")
        if max_context is not None and prompt + answer > max_context:
            raise DataError(
                f"{row} has a prompt of {prompt} tokens; with {answer} tokens for the answer that is more than the "
                f"model's context of {max_context}. Shorten it (fewer shots), remove it, or lower max_new_tokens."
            )


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str | list[Message], *, chat_template: bool = True
) -> list[int]:
    """Token ids of a prompt, up to the point where the answer begins."""
    if chat_template:
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, and a chat prompt was asked for. "
                "Use an instruct model's tokenizer, or plain prompts: chat_template=False (--plain_prompts)."
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        encoded = render_chat(tokenizer, messages, add_generation_prompt=True)
    elif not isinstance(prompt, str):
        raise DataError(
            f"A plain prompt must be text, found {len(prompt)} chat messages. "
            "Use chat_template=True, or give the prompts as text."
        )
    else:
        encoded = tokenizer(prompt)["input_ids"]
        # Some tokenizers close every text with their end token; after it a model answers nothing.
        if encoded and encoded[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
            encoded = encoded[:-1]
    if not encoded:
        raise DataError(f"The prompt {prompt!r} gives no tokens; expected at least one. Remove it from the data.")
    return [int(token) for token in encoded]


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], **kwargs: Any) -> Any:
    """Token ids of messages in the tokenizer's chat template."""
    import jinja2

    try:
        return tokenizer.apply_chat_template(list(messages), **{"tokenize": True, "return_dict": False, **kwargs})
    except jinja2.TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise DataError(f"The chat template refuses messages of the roles {roles}: {error}. Mend them.") from error


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an answer: the text tokenised alone, then the end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token; expected one to close answers "
            "with. Set tokenizer.eos_token."
        )
    return [*(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]), tokenizer.eos_token_id]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a conversation, and the `[start, stop)` of each assistant turn, its end token included.

    A chat template with `{% generation %}` blocks marks the turns itself. With any other, a turn is what the template
    adds to the prompt that the model would have seen there. That holds only if each such prompt is, token by token, the
    beginning of the whole conversation; where a template changes earlier turns as later ones come, for example by
    removing their reasoning, the conversation is refused.
    """
    if not tokenizer.chat_template:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, and a conversation was given. "
            "Use an instruct model's tokenizer, or give prompts and completions as text."
        )
    if not messages or messages[-1]["role"] != "assistant":
        last = messages[-1]["role"] if messages else "nothing"
        raise DataError(
            f"The conversation ends with {last!r}; expected an assistant turn, which is the given answer. "
            "Remove the turns after the last assistant turn."
        )
    template = tokenizer.get_chat_template()
    if _GENERATION_BLOCK.search(template):
        input_ids, spans = _by_generation_blocks(tokenizer, messages)
    else:
        input_ids, spans = _by_prefixes(tokenizer, messages)
    if spans[0][0] == 0:
        raise DataError(
            "The conversation's first token belongs to an assistant turn, and nothing predicts it. "
            "Begin the conversation with a user turn."
        )
    return input_ids[: spans[-1][1]], spans


def encode_example(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    *,
    given: bool,
    chat_template: bool = True,
    where: str = "The example",
) -> tuple[list[int], list[int] | None, tuple[tuple[int, int], ...] | None]:
    """Token ids of one row of a capture."""
    if not given:
        if isinstance(example.prompt, list) and example.prompt[-1]["role"] == "assistant":
            raise DataError(
                f"{where} ends in an assistant turn, and the teacher is to answer; expected a user turn at the end. "
                "Remove the last turn, or keep the answers with responses='given'."
            )
        with _naming(where):
            return encode_prompt(tokenizer, example.prompt, chat_template=chat_template), None, None
    if example.messages is not None:
        if not chat_template:
            raise DataError(f"{where} is a conversation, and plain prompts were asked for. Use the chat template.")
        with _naming(where):
            input_ids, spans = encode_conversation(tokenizer, example.messages)
        return input_ids[: spans[0][0]], input_ids[spans[0][0] :], tuple(spans)
    if not example.completion:
        raise DataError(
            f"{where} has no completion, and responses='given' was asked for. Name the column with "
            "completion_column, or let the teacher answer with responses='generate'."
        )
    with _naming(where):
        prompt = encode_prompt(tokenizer, example.prompt, chat_template=chat_template)
        return prompt, encode_completion(tokenizer, example.completion), None


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Put the row's name before what is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def _by_generation_blocks(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], list[tuple[int, int]]]:
    """What the template itself marks."""
    if not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path!r} keeps no character offsets, which its chat template's "
            "generation blocks need. Load the fast tokenizer: AutoTokenizer.from_pretrained(..., use_fast=True)."
        )
    encoded = render_chat(tokenizer, messages, return_dict=True, return_assistant_tokens_mask=True)
    edges = [0, *(int(flag) for flag in encoded["assistant_masks"]), 0]
    starts = [place for place, (before, after) in enumerate(itertools.pairwise(edges)) if before < after]
    stops = [place for place, (before, after) in enumerate(itertools.pairwise(edges)) if before > after]
    if not starts:
        raise DataError(
            "The chat template's generation blocks mark no token of the conversation; expected at least one assistant "
            "turn. Mend the template's {% generation %} blocks."
        )
    return [int(token) for token in encoded["input_ids"]], list(zip(starts, stops, strict=True))


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], list[tuple[int, int]]]:
    """What the template adds to each prompt that the model would have seen."""
    whole: list[int] = render_chat(tokenizer, messages)
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt: list[int] = render_chat(tokenizer, messages[:turn], add_generation_prompt=True) if turn else []
        answered: list[int] = render_chat(tokenizer, messages[: turn + 1])
        for part in (prompt, answered):
            if whole[: len(part)] != part:
                place = next(
                    (i for i, pair in enumerate(zip(whole, part, strict=False)) if pair[0] != pair[1]), "its end"
                )
                raise DataError(
                    f"The chat template renders the conversation up to its assistant turn {len(spans) + 1} differently "
                    f"once all turns are there (from token {place} on), so what the turn was made from cannot be kept "
                    "in one row. Use a chat template with {% generation %} blocks, or give each assistant turn as a "
                    "row of its own: the turns before it as prompt, and the turn as completion."
                )
        start, stop = len(prompt), len(answered)
        ends = [place for place in range(start, stop) if whole[place] == tokenizer.eos_token_id]
        if not start < stop:
            raise DataError(
                f"The chat template adds nothing for assistant turn {len(spans) + 1}; expected its text. Remove the "
                "conversation, or use another template."
            )
        spans.append((start, ends[-1] + 1 if ends else stop))
    return whole, spans
