"""Conversations of several turns: which tokens the assistant's turns are, and what may stand before a prompt."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from quantkd.data.prompts import Example, Message, encode_completion, encode_prompt, render_chat
from quantkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# The block that marks an assistant's turn in a chat template, as transformers looks for it.
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a conversation, and where the assistant's turns lie in them.

    A chat template with `{% generation %}` blocks says itself what a turn consists of. With any other, a turn is what
    the template adds to the prompt that the model would have seen there: the conversation up to the turn, with the
    generation prompt. That holds only if each such prompt is, token by token, the beginning of the whole conversation;
    it does not where a template changes earlier turns as later ones come, such as by removing their thoughts, and there
    the conversation is refused. A turn ends with its end-of-sequence token, without what the template writes behind it.

    Example:
        input_ids, spans = encode_conversation(tokenizer, [
            {"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": "5"},
            {"role": "user", "content": "And 1 more?"}, {"role": "assistant", "content": "6"},
        ])
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


def with_context(
    examples: Sequence[Example], *, system_prompt: str | None = None, few_shot: Sequence[Example] = ()
) -> list[Example]:
    """The examples with a system prompt and solved examples before them, as turns of the same chat.

    Example:
        >>> (example,) = with_context([Example("2 + 3?")], system_prompt="Be brief.", few_shot=[Example("1 + 1?", "2")])
        >>> [message["role"] for message in example.prompt]
        ['system', 'user', 'assistant', 'user']
    """
    turns: list[Message] = []
    for index, shot in enumerate(few_shot):
        if not isinstance(shot.prompt, str) or not shot.completion:
            raise DataError(f"Few-shot example {index} is {shot!r:.80}; expected a prompt in text and its completion.")
        turns += [{"role": "user", "content": shot.prompt}, {"role": "assistant", "content": shot.completion}]
    system: list[Message] = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    if not system and not turns:
        return list(examples)
    made = []
    for index, example in enumerate(examples):
        if turns and example.messages is not None:
            raise DataError(
                f"Row {index} is a whole conversation, and {len(few_shot)} few-shot examples were to stand before it; "
                "their answers would be taken for its own. Leave few_shot out, or give prompts and completions."
            )
        prompt = example.prompt
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        own = messages[:1] if messages[0]["role"] == "system" else []
        made.append(replace(example, prompt=[*(own or system), *turns, *messages[len(own) :]]))
    return made


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
