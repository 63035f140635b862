"""Prompts from files, the Hub or memory, and how they become token ids, with a chat template or without one."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkd.data.sources import iterate_rows
from quantkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Message = dict[str, str]

_DEFAULT_PROMPT = "prompt"
_CONVERSATION = "messages"
_DEFAULT_COMPLETION = "completion"


@dataclass(frozen=True)
class Example:
    """One prompt, and the answer that the data set gives for it, if it gives one.

    Args:
        prompt: plain text, or chat messages such as `[{"role": "user", "content": "Hello"}]`; messages that end in an
            assistant turn are a whole conversation, whose answers are its assistant turns.
        completion: the data set's own answer, None where there is none.
    """

    prompt: str | list[Message]
    completion: str | None = None

    @property
    def messages(self) -> list[Message] | None:
        """The whole conversation, every assistant turn of which is a given answer; None if this is not one."""
        if self.completion is None and isinstance(self.prompt, list) and self.prompt[-1]["role"] == "assistant":
            return self.prompt
        return None


def load_examples(
    source: str | Path | Iterable[Any],
    *,
    prompt_column: str = _DEFAULT_PROMPT,
    completion_column: str = _DEFAULT_COMPLETION,
    split: str = "train",
    limit: int | None = None,
) -> list[Example]:
    """Read prompts, and completions where there are any, from wherever they lie.

    Example:
        >>> load_examples(["What is 2 + 3?"])
        [Example(prompt='What is 2 + 3?', completion=None)]
        >>> load_examples([{"question": "2 + 3?", "answer": "5"}], prompt_column="question", completion_column="answer")
        [Example(prompt='2 + 3?', completion='5')]
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; expected at least 1, or None for all rows.")
    name = str(source) if isinstance(source, (str, Path)) else f"The given {type(source).__name__}"
    rows = itertools.islice(iterate_rows(source, split), limit)
    examples = [
        _to_example(row, f"{name}, row {index}", prompt_column, completion_column) for index, row in enumerate(rows)
    ]
    if not examples:
        raise DataError(
            f"{name} holds no rows; expected at least one prompt. Check the source and the split {split!r}."
        )
    return examples


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


def _to_example(row: Any, where: str, prompt_column: str, completion_column: str) -> Example:
    """One row of any kind as an `Example`, or an error that says where it stands."""
    prompt: Any
    completion: Any
    if isinstance(row, Example):
        prompt, completion = row.prompt, row.completion
    elif isinstance(row, (str, list)):
        prompt, completion = row, None
    elif isinstance(row, Mapping):
        if prompt_column == _DEFAULT_PROMPT and prompt_column not in row and _CONVERSATION in row:
            prompt_column = _CONVERSATION
        required = [prompt_column] + [completion_column] * (completion_column != _DEFAULT_COMPLETION)
        for column in required:
            if column not in row:
                raise DataError(
                    f"{where} has the columns {sorted(map(str, row))}; {column!r} was asked for. "
                    "Name the right one with prompt_column or completion_column."
                )
        prompt, completion = row[prompt_column], row.get(completion_column)
    else:
        raise DataError(f"{where} is a {type(row).__name__}; expected text, a list of messages, or a dict of columns.")
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], Mapping):
        completion = completion[0].get("content")
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"{where}: the completion is a {type(completion).__name__}; expected text or one message.")
    return Example(_check_prompt(prompt, where), completion)


def _check_prompt(prompt: Any, where: str) -> str | list[Message]:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DataError(f"{where}: the prompt is empty. Remove the row, or fill it.")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{where}: the prompt is {prompt!r:.80}; expected text or a non-empty list of messages.")
    for message in prompt:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"{where}: found the message {message!r:.80}; expected text under 'role' and 'content'.")
        if message.get("tool_calls"):
            raise DataError(f"{where}: a message calls tools, which are not rendered. Remove the row, or the calls.")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]
