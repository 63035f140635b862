"""From examples to token ids: prompts, given answers and whole conversations, and the table that holds all of them."""

from __future__ import annotations

import array
import copy
import hashlib
import inspect
import json
import re
import string
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantkd.data.prompts import Example, Message, naming_row
from quantkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = tuple[tuple[int, int], ...]
# Token ids of a prompt, of its given answer if there is one, and the supervised parts of a conversation.
EncodedRow = tuple[list[int], list[int] | None, Spans | None]

_CHUNK = 1024  # prompts tokenised in one call
# Errors that a template can raise, in addition to jinja2's own.
_TEMPLATE_ERRORS = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
# The block that marks an assistant's turn in a chat template, as transformers looks for it.
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_ROLES = ("system", "user", "assistant")
_MARK = "qkd7"  # a text that no template writes by itself
_DATE_PARTS = [sign + letter for sign in ("%", "%-") for letter in string.ascii_letters]
# The last line break is taken by `trim_blocks`, so the template's own text begins as it stands.
_DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{%- for text in format.split('%%') -%}{%- set its = namespace(text=text) -%}"
    "{%- for part, value in PARTS -%}{%- set its.text = its.text | replace(part, value) -%}{%- endfor -%}"
    "{{ '%' if not loop.first }}{{ its.text }}{%- endfor -%}{%- endmacro %}\n"
)


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
        self._edges = array.array("q", [0])  # after each prompt, and after its completion
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
            self._edges.append(len(self._tokens))
        self.is_given |= completion_ids is not None
        self.examples.append(example)
        self.numbers.append(number)

    def digest(self) -> str:
        """sha256 over the token ids of all prompts and answers, in hexadecimal."""
        return self._digest.hexdigest()

    def lengths(self) -> NDArray[np.int64]:
        """(prompts, 2): tokens of each prompt and of its given answer."""
        return np.diff(np.asarray(self._edges)).reshape(-1, 2)

    def count_tokens(self, max_new_tokens: int) -> tuple[int, int]:
        """Tokens of the prompts and of the answers of all rows; of answers that are not given, at most."""
        prompts, given = (int(total) * self.num_samples for total in self.lengths().sum(0))
        return prompts, given if self.is_given else self.num_rows * max_new_tokens

    def check_rows(
        self, tokenizer: PreTrainedTokenizerBase, vocab_size: int, max_context: int | None, max_new_tokens: int
    ) -> None:
        """Refuse ids that the teacher lacks, and prompts that leave no room for the answer, before work is spent."""
        if np.asarray(self._tokens).max(initial=0) >= vocab_size:
            rows = [self.row(place) for place in range(0, self.num_rows, self.num_samples)]
            ids = [row.prompt_ids + (row.completion_ids or []) for row in rows]
            check_ids(tokenizer, ids, vocab_size, self.numbers)
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
        start, middle, stop = self._edges[2 * prompt : 2 * prompt + 3]
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
            end = find_turn_end(tokenizer) if chat_template else tokenizer.eos_token_id
            rows = [_encode_given(tokenizer, each, end, chat_template, start + at) for at, each in enumerate(chunk)]
        else:
            prompts = encode_prompts(tokenizer, chunk, chat_template=chat_template, first=start)
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


def check_ids(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]], vocab_size: int, numbers: Any = None) -> None:
    """Refuse token ids that the model's embedding has no row for; `numbers` are the rows' own."""
    for number, ids in zip(numbers or range(len(rows)), rows, strict=True):
        if min(ids, default=0) < 0:
            raise DataError(f"Row {number} has the token id {min(ids)}; expected numbers from 0 on. Encode it anew.")
        if (largest := max(ids, default=0)) >= vocab_size:
            raise DataError(
                f"Row {number} has the token id {largest}, {tokenizer.convert_ids_to_tokens(largest)!r}, and the model "
                f"has ids up to {vocab_size - 1}. Remove that token from the text or the tokenizer, or resize the "
                "model's embeddings and train them."
            )


def find_turn_end(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that ends an assistant's turn: the one that the chat template writes, or the end-of-sequence token."""
    end: int | None = tokenizer.eos_token_id
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ""}]
    added = {token for token, text in tokenizer.added_tokens_decoder.items() if str(text).strip()} | {end}
    with suppress(DataError):
        # Some templates write it between turns alone, where it is what no user turn holds.
        for following in ([], turns[:1]):
            after = _render_after(tokenizer, turns, {}, following)
            ids: list[int] = tokenizer(after, add_special_tokens=False)["input_ids"] if after else []
            others = following and _render_chat(tokenizer, following, {})
            if found := [token for token in ids if token in added and token not in others]:
                return found[0]
    return end


def uses_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template prints the current date."""
    return "strftime_now" in str(tokenizer.chat_template)


def read_date(found: Any, where: object) -> str:
    """The date that was written before, such as 2025-12-31, or today's for None."""
    try:
        return (date.today() if found is None else date.fromisoformat(found)).isoformat()
    except (TypeError, ValueError) as error:
        raise DataError(f"{where} has the date {found!r:.80}; expected one such as 2025-12-31. Remove it.") from error


def at_date(tokenizer: PreTrainedTokenizerBase, day: str) -> PreTrainedTokenizerBase:
    """The tokenizer, whose chat template takes `day`, such as 2025-12-31, for the current date, at midnight."""
    dated, now = copy.copy(tokenizer), datetime.fromisoformat(day)
    # transformers hands no function to a template, so the template gets one of its own in place of transformers'.
    macro = _DATE_MACRO.replace("PARTS", json.dumps([(part, now.strftime(part)) for part in _DATE_PARTS]))
    given: Any = tokenizer.chat_template
    named = {name: macro + each for name, each in given.items()} if isinstance(given, dict) else macro + str(given)
    dated.chat_template = named
    return dated


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[Message] | Example],
    *,
    chat_template: bool = True,
    first: int = 0,
) -> list[list[int]]:
    """Token ids of prompts, up to where the answers begin, from one call; errors count the rows from `first`."""
    texts: list[str] = []
    for number, prompt in enumerate(prompts, start=first):
        example = prompt if isinstance(prompt, Example) else Example(prompt)
        with naming_row(number):
            _check_text(example)
            if chat_template:
                texts.append(_render_prompt(tokenizer, example))
            elif isinstance(example.prompt, str) and not example.template_kwargs:
                texts.append(example.prompt)
            else:
                found = ", ".join([f"{len(example.turns)} chat messages", *example.template_kwargs])
                raise DataError(
                    f"a plain prompt must be text, found {found}. Use chat_template=True, or give the prompts as text."
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


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str, end: int | None = None) -> list[int]:
    """Token ids of an answer: the text tokenised alone, then the end token, by default that of the chat template."""
    end = find_turn_end(tokenizer) if end is None else end
    if end is None:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token to close answers with. "
            "Set tokenizer.eos_token."
        )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ends = {end, tokenizer.eos_token_id}
    stop = _find_end(tokenizer, ids, ends)
    return [*(ids[: stop - 1] if stop and ids[stop - 1] in ends else ids), end]


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    template_kwargs: Mapping[str, Any] | None = None,
    end: int | None = None,
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a conversation, and the `[start, stop)` of each assistant turn, its end token included."""
    # Without `{% generation %}` blocks a turn is what the template adds to the prompt that the model would have seen.
    # Of several templates transformers takes the one named default, or tool_use.
    template = (
        tokenizer.get_chat_template(tools=(template_kwargs or {}).get("tools")) if tokenizer.chat_template else ""
    )
    find = _by_generation_blocks if _GENERATION_BLOCK.search(template) else _by_prefixes
    ends = {find_turn_end(tokenizer) if end is None else end}
    input_ids, spans = find(tokenizer, messages, ends, template_kwargs or {})
    for turn, (start, stop) in enumerate(spans):  # what is marked, or written where no turn follows, may lack the end
        spans[turn] = start, stop + (input_ids[stop - 1] not in ends and {*input_ids[stop : stop + 1]} == ends)
    start, stop = spans[-1]
    if not ends & {*input_ids[start:]}:  # the template writes none, and the answer ends as a given or generated one
        input_ids[stop:], spans[-1] = encode_completion(tokenizer, "", *ends), (start, stop + 1)
    if spans[0][0] == 0:
        raise DataError(
            "The conversation's first token belongs to an assistant turn, and nothing predicts it. "
            "Begin the conversation with a user turn."
        )
    return input_ids[: spans[-1][1]], spans


def _encode_given(
    tokenizer: PreTrainedTokenizerBase, example: Example, end: int | None, chat_template: bool, number: int
) -> EncodedRow:
    """A prompt and its given answer, or a conversation, every assistant turn of which is one."""
    if example.messages is None:
        if not example.completion or not example.completion.strip():
            raise DataError(
                f"Row {number} has no completion, and responses='given' was asked for. Name the column with "
                "completion_column, or let the teacher answer with responses='generate'."
            )
        (prompt,) = encode_prompts(tokenizer, [example], chat_template=chat_template, first=number)
        return prompt, encode_completion(tokenizer, example.completion, end), None
    if not chat_template:
        raise DataError(f"Row {number} is a conversation, and plain prompts were asked for. Use the chat template.")
    with naming_row(number):
        _check_text(example)
        input_ids, spans = encode_conversation(tokenizer, example.messages, example.template_kwargs, end)
        _render_prompt(tokenizer, example)
    return input_ids[: spans[0][0]], input_ids[spans[0][0] :], tuple(spans)


def _render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], template_kwargs: Mapping[str, Any], **own: Any
) -> Any:
    """Messages in the tokenizer's chat template, as token ids unless `own` arguments say otherwise."""
    import jinja2

    if not tokenizer.chat_template:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, and a chat prompt was asked for. "
            "Use an instruct model's tokenizer, or plain prompts: chat_template=False (--plain_prompts)."
        )
    try:
        own = {"tokenize": True, "return_dict": False, **own}
        return tokenizer.apply_chat_template(list(messages), **{**template_kwargs, **own})
    except (jinja2.TemplateError, *_TEMPLATE_ERRORS) as error:
        roles = ", ".join(message["role"] for message in messages)
        reason = str(error)[:500] or type(error).__name__
        raise DataError(f"The chat template refuses messages of the roles {roles}: {reason}. Mend them.") from error


def _render_after(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    kwargs: Mapping[str, Any],
    following: Sequence[Message] = (),
) -> str:
    """What the template writes after the text of the last of the messages, whatever it makes of that text."""
    marked = ([*messages[:-1], {**messages[-1], "content": text}, *following] for text in (_MARK, _MARK[::-1]))
    one, other = (str(_render_chat(tokenizer, turns, kwargs, tokenize=False)) for turns in marked)
    pairs = enumerate(zip(one[::-1], other[::-1], strict=False))
    return one[len(one) - next((place for place, (a, b) in pairs if a != b), 0) :]  # nothing if the text is left out


def _check_text(example: Example) -> None:
    """Refuse half of a surrogate pair, which is no character and has no token."""
    text = json.dumps([example.prompt, example.completion, example.template_kwargs], ensure_ascii=False, default=str)
    if found := _SURROGATE.search(text):
        near = text[max(0, found.start() - 20) : found.end()]
        raise DataError(f"the text holds half of a surrogate pair, {near!r}. Write the whole character in UTF-8.")


def _render_prompt(tokenizer: PreTrainedTokenizerBase, example: Example) -> str:
    """The text of a prompt; a message, a key of it, or an argument that the template leaves out is refused."""
    messages, kwargs = example.turns, dict(example.template_kwargs)
    arguments = inspect.signature(tokenizer.apply_chat_template).parameters.keys() - {"tools", "documents"}
    if clash := sorted(kwargs.keys() & arguments):
        raise DataError(f"chat_template_kwargs holds {', '.join(clash)}, which no template reads. Remove it.")
    own = {"add_generation_prompt": True, "tokenize": False}
    text = str(_render_chat(tokenizer, messages, kwargs, **own))

    def is_left_out(owner: Mapping[str, Any], key: str, place: int | None = None) -> bool:
        """Whether the template gives the same text without the value, and with another one."""
        # No message is without content, and what a template makes of one says nothing.
        changes = [{name: value for name, value in owner.items() if name != key}] if key != "content" else []
        if not isinstance(owner[key], (list, dict)):
            changes.append({**owner, key: not owner[key] if isinstance(owner[key], bool) else _MARK})
        for changed in changes:
            turns = messages if place is None else [*messages[:place], changed, *messages[place + 1 :]]
            with suppress(DataError):
                if text == _render_chat(tokenizer, turns, changed if place is None else kwargs, **own):
                    continue
            return False
        return True

    for key in kwargs:
        if is_left_out(kwargs, key):
            raise DataError(f"the chat template does not read {key}. Remove it, or use a template that does.")
    for place, message in enumerate(messages):
        is_plain = message["role"] in _ROLES and message["content"].strip() in text
        for key in sorted(message.keys() - {"role", "content" if is_plain or not message["content"] else ""}):
            if is_left_out(message, key, place):
                where = f"{key!r} of message {place} ({message['role']})"
                raise DataError(f"the chat template leaves out {where}. Remove it, or use a template that renders it.")
    return text


def _find_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Collection[int | None]) -> int:
    """Where an answer stops: after the first end token that only blanks and special tokens follow, or with the ids."""
    stop = place = len(ids)
    specials = {*tokenizer.all_special_ids, *ends}
    while place and (ids[place - 1] in specials or not str(tokenizer.decode(ids[place - 1])).strip()):
        place -= 1
        if ids[place] in ends:
            stop = place + 1
    return stop


def _by_generation_blocks(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ends: set[int | None], kwargs: Mapping[str, Any]
) -> tuple[list[int], list[tuple[int, int]]]:
    """What the template itself marks, up to the end of the turn."""
    encoded = _render_chat(tokenizer, messages, kwargs, return_dict=True, return_assistant_tokens_mask=True)
    steps = np.diff([0, *encoded["assistant_masks"], 0])
    starts, stops = np.flatnonzero(steps > 0).tolist(), np.flatnonzero(steps < 0).tolist()
    if not starts:
        raise DataError(
            "The chat template's {% generation %} blocks mark no token of the conversation; expected at least one "
            "assistant turn. Mend the template."
        )
    whole = list(encoded["input_ids"])
    spans = zip(starts, stops, strict=True)
    return whole, [(start, start + _find_end(tokenizer, whole[start:stop], ends)) for start, stop in spans]


def _by_prefixes(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], ends: set[int | None], kwargs: Mapping[str, Any]
) -> tuple[list[int], list[tuple[int, int]]]:
    """What the template adds to each prompt that the model would have seen, up to the end of the turn."""
    whole: list[int] = _render_chat(tokenizer, messages, kwargs)
    spans: list[tuple[int, int]] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt: list[int] = _render_chat(tokenizer, messages[:turn], kwargs, add_generation_prompt=True) if turn else []
        answered: list[int] = _render_chat(tokenizer, messages[: turn + 1], kwargs)
        if not ends & {*answered[len(prompt) :]}:  # what is written after the text, if anything, is plain text
            after = len(_render_after(tokenizer, messages[: turn + 1], kwargs))
            while answered and len(tokenizer.decode(answered[-1:])) <= after:
                after -= len(tokenizer.decode(answered[-1:]))
                answered.pop()
        del answered[len(prompt) + _find_end(tokenizer, answered[len(prompt) :], ends) :]
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
        spans.append((start, stop))
    return whole, spans
