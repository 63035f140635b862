"""Prompts from files, the Hub or memory, and how they become token ids, with a chat template or without one."""

from __future__ import annotations

import csv
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkd.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Example", "Message", "encode_completion", "encode_prompt", "load_examples"]

Message = dict[str, str]

_FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_DEFAULT_COMPLETION = "completion"


@dataclass(frozen=True)
class Example:
    """One prompt, and the answer that the data set gives for it, if it gives one.

    Args:
        prompt: plain text, or chat messages such as `[{"role": "user", "content": "Hello"}]`.
        completion: the data set's own answer, None where there is none.
    """

    prompt: str | list[Message]
    completion: str | None = None


def load_examples(
    source: str | Path | Iterable[Any],
    *,
    prompt_column: str = "prompt",
    completion_column: str = _DEFAULT_COMPLETION,
    split: str = "train",
    limit: int | None = None,
) -> list[Example]:
    """Read prompts, and completions where there are any, from wherever they lie.

    Args:
        source: a .jsonl, .json, .parquet or .csv file; a folder that holds `<split>` as one of these; a `datasets`
            name, with its configuration after a colon where it needs one ("openai/gsm8k:main"); a
            `datasets.Dataset` or `DatasetDict`; or an iterable of str, message lists, dicts or `Example`.
        prompt_column: the column of the prompt: text, or a list of messages with `role` and `content`.
        completion_column: the column of the answer: text, or a list holding one assistant message. The default one
            may be absent; a column that is named on purpose may not.
        split: the split of a folder or of a `datasets` name.
        limit: at most this many examples, from the front; None for all.

    Returns:
        The examples in the source's order, at least one.

    Raises:
        DataError: a file or data set that cannot be found or parsed, no rows, a missing column (the message names
            those found), a prompt or completion that is not text, or a limit below 1.

    Example:
        >>> load_examples(["What is 2 + 3?"])
        [Example(prompt='What is 2 + 3?', completion=None)]
        >>> load_examples([{"question": "2 + 3?", "answer": "5"}], prompt_column="question", completion_column="answer")
        [Example(prompt='2 + 3?', completion='5')]
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; expected at least 1, or None for all rows.")
    name = str(source) if isinstance(source, (str, Path)) else f"The given {type(source).__name__}"
    rows = itertools.islice(_iterate_rows(source, split), limit)
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
    """Token ids of a prompt, up to the point where the answer begins.

    Args:
        tokenizer: the model's tokenizer.
        prompt: text, taken as one user message, or chat messages.
        chat_template: True renders the tokenizer's chat template with its generation prompt; False tokenises the text
            as it stands (with the tokenizer's own start token), which is how a base model is prompted.

    Returns:
        The ids, without a trailing end-of-sequence token.

    Raises:
        DataError: the tokenizer has no chat template, messages are given for a plain prompt, or no token results.
    """
    if chat_template:
        if not tokenizer.chat_template:
            raise DataError(
                f"The tokenizer of {tokenizer.name_or_path!r} has no chat template, and a chat prompt was asked for. "
                "Use an instruct model's tokenizer, or plain prompts: chat_template=False (--plain_prompts)."
            )
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        encoded: Any = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
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


def encode_completion(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of an answer: the text tokenised alone, then the end-of-sequence token.

    Args:
        tokenizer: the model's tokenizer.
        text: the answer; empty text gives the end token alone.

    Returns:
        The ids, to be appended to those of `encode_prompt`.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, so an answer could never end.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer of {tokenizer.name_or_path!r} has no end-of-sequence token; expected one to close answers "
            "with. Set tokenizer.eos_token."
        )
    return [*(int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]), tokenizer.eos_token_id]


def _iterate_rows(source: str | Path | Iterable[Any], split: str) -> Iterator[Any]:
    """The rows of any source, unchecked, and read only as far as they are asked for where the format allows."""
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            return _read_file(_find_split(path, split))
        if path.suffix in _FILE_SUFFIXES or path.exists():
            return _read_file(path)
        if isinstance(source, Path) or source.startswith(("/", ".", "~")):
            raise DataError(f"There is no {path}. Give a file ({', '.join(_FILE_SUFFIXES)}) or a folder of splits.")
        return iter(_load_from_hub(source, split))
    if isinstance(source, Mapping):
        if split not in source:
            raise DataError(
                f"The data set has the splits {sorted(source)}; {split!r} was asked for. Name one of those."
            )
        return iter(source[split])
    return iter(source)


def _find_split(folder: Path, split: str) -> Path:
    for suffix in _FILE_SUFFIXES:
        if (folder / f"{split}{suffix}").is_file():
            return folder / f"{split}{suffix}"
    found = sorted(entry.name for entry in folder.iterdir())
    raise DataError(
        f"{folder} holds {found or 'nothing'}; expected {split}.jsonl (or .json, .parquet, .csv). "
        "Name another split or another folder."
    )


def _read_file(path: Path) -> Iterator[Any]:
    """The rows of one file, by its suffix."""
    if not path.is_file():
        raise DataError(f"There is no file {path}. Give the path of an existing file.")
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except pyarrow.ArrowInvalid as error:
            raise DataError(f"{path} is not a Parquet file that can be read: {error}. Write it again.") from error
        return
    if path.suffix not in _FILE_SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(_FILE_SUFFIXES)}. Convert it.")
    try:
        with path.open(encoding="utf-8", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
            elif path.suffix == ".json":
                rows = json.load(file)
                if not isinstance(rows, list):
                    raise DataError(f"{path} holds a JSON {type(rows).__name__}; expected a list of rows.")
                yield from rows
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _parse_line(line, f"{path}, line {number}")
    except (UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise DataError(f"{path} cannot be parsed: {error}. Expected UTF-8 text in {path.suffix} format.") from error


def _parse_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where} is not JSON: {error}. Expected one JSON object a line; mend or remove it.") from error


def _load_from_hub(name: str, split: str) -> Iterable[Any]:
    import datasets

    path, _, config = name.partition(":")
    try:
        rows: Iterable[Any] = datasets.load_dataset(path, config or None, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name!r} is neither a file or folder here nor a data set that could be loaded with split {split!r}: "
            f"{error}. Check the name, the configuration after the colon, and the network."
        ) from error
    return rows


def _to_example(row: Any, where: str, prompt_column: str, completion_column: str) -> Example:
    """One row of any kind as an `Example`, or an error that says where it stands."""
    prompt: Any
    completion: Any
    if isinstance(row, Example):
        prompt, completion = row.prompt, row.completion
    elif isinstance(row, (str, list)):
        prompt, completion = row, None
    elif isinstance(row, Mapping):
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
    return [{"role": message["role"], "content": message["content"]} for message in prompt]
