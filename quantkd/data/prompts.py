"""Prompts from files, the Hub or memory, and what is put before them."""

from __future__ import annotations

import csv
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from quantkd.errors import DataError
from quantkd.files import object_of

Message = dict[str, Any]  # text under "role" and "content", and what else the chat template reads

_FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_DEFAULT_PROMPT = "prompt"
_CONVERSATION = "messages"
_DEFAULT_COMPLETION = "completion"
_MAX_CELL = 2**31 - 1  # characters of a CSV cell, instead of Python's 131,072


@dataclass(frozen=True)
class Example:
    """A prompt in text or messages, and the data set's own answer; messages may be a whole conversation."""

    prompt: str | list[Message]
    completion: str | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def turns(self) -> list[Message]:
        """The prompt as messages."""
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt

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
    split: str | None = None,
    limit: int | None = None,
) -> list[Example]:
    """Read prompts, and completions where there are any.

    Args:
        source: a .jsonl, .json, .parquet or .csv file, a folder of splits, a `datasets` name, or an iterable of
            strings, message lists, dicts or `Example`s.
        prompt_column: where the prompt is, a text or messages.
        completion_column: where the answer is, if there is one.
        split: of a source that has splits; "train" if None.
        limit: at most this many, from the front.

    Raises:
        DataError: rows that are missing, empty or malformed.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}; expected at least 1, or None for all rows.")
    name = str(source) if isinstance(source, (str, Path)) else f"The given {type(source).__name__}"
    has_splits = isinstance(source, Mapping)
    if isinstance(source, (str, Path)):
        has_splits = not Path(source).expanduser().is_file()
    if split is not None and not has_splits:
        raise DataError(
            f"{name} has no splits, and the split {split!r} was asked for. Leave split out, or give a folder with "
            f"{split}.jsonl."
        )
    rows = enumerate(itertools.islice(_iterate_rows(source, split or "train"), limit))
    examples = [_to_example(row, f"{name}, row {index}", prompt_column, completion_column) for index, row in rows]
    if not examples:
        place = f" and the split {split!r}" if split else ""
        raise DataError(f"{name} holds no rows; expected at least one. Check the source{place}.")
    return examples


def check_references(examples: Sequence[Example], checks: Sequence[Callable[[str], None]]) -> None:
    """Refuse examples without a reference answer, and those whose reference a check refuses."""
    for index, example in enumerate(examples):
        if not example.completion:
            raise DataError(
                f"Row {index} has no reference answer, and correct_only was asked for. Name its column with "
                "completion_column (--answer_column)."
            )
        with naming_row(index):
            for check in checks:
                check(example.completion)


@contextmanager
def naming_row(number: int) -> Iterator[None]:
    """Put the row's number before what is wrong with it."""
    try:
        yield
    except DataError as error:
        raise DataError(f"Row {number}: {error}") from error


def with_context(
    examples: Sequence[Example], *, system_prompt: str | None = None, few_shot: Sequence[Example] = ()
) -> list[Example]:
    """The examples with a system prompt and solved examples before them, as turns of the same chat.

    Args:
        examples: as `load_examples` reads them.
        system_prompt: the first turn of all that do not have one.
        few_shot: prompts with their completions, none of them among the examples.

    Raises:
        DataError: solved examples without a completion or among the questions, or before a whole conversation.
    """
    turns: list[Message] = []
    check_shots([each.turns[-1]["content"] for each in examples], [each.turns[-1]["content"] for each in few_shot])
    for index, shot in enumerate(few_shot):
        if not isinstance(shot.prompt, str) or not shot.completion or shot.template_kwargs:
            raise DataError(f"Few-shot example {index} is {shot!r:.80}; expected a prompt in text and its completion.")
        turns += [{"role": "user", "content": shot.prompt}, {"role": "assistant", "content": shot.completion}]
    system: list[Message] = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    if not system and not turns:
        return list(examples)
    made = []
    for index, example in enumerate(examples):
        if turns and example.messages is not None:
            raise DataError(
                f"Row {index} is a whole conversation, whose answers cannot be told from those of {len(few_shot)} "
                "few-shot examples before it. Leave few_shot out, or give prompts and completions."
            )
        messages = example.turns
        own = messages[:1] if messages[0]["role"] == "system" else []
        made.append(replace(example, prompt=[*(own or system), *turns, *messages[len(own) :]]))
    return made


def check_shots(questions: Sequence[str], shots: Sequence[str]) -> None:
    """Refuse solved examples that are among the questions, whose answers they would give away."""
    asked = {_fold(question): row for row, question in enumerate(questions)}
    for index, shot in enumerate(shots):
        if (row := asked.get(_fold(shot))) is not None:
            raise DataError(
                f"Few-shot example {index} is the question of row {row} with its answer: {shot!r:.60}. Take solved "
                "examples from other rows, such as those of train.jsonl, or none."
            )


def _fold(text: str) -> str:
    """What is left of a text without case, width, composition, punctuation, white space and what shows nothing."""
    shown = "".join(character for character in text if unicodedata.category(character) != "Cf")
    folded = unicodedata.normalize("NFKC", shown).casefold()
    return " ".join("".join(" " if _is_punctuation(character) else character for character in folded).split())


def _is_punctuation(character: str) -> bool:
    """Not dashes, and not the signs of a sum or of a name such as C#."""
    return unicodedata.category(character) in ("Po", "Ps", "Pe", "Pi", "Pf") and character not in "#%&*/@\\"


def _to_example(row: Any, where: str, prompt_column: str, completion_column: str) -> Example:
    """One row of any kind as an `Example`, or an error that says where it stands."""
    prompt: Any = row
    completion: Any = None
    template_kwargs: Mapping[str, Any] = {}
    if isinstance(row, Example):
        prompt, completion, template_kwargs = row.prompt, row.completion, row.template_kwargs
    elif isinstance(row, Mapping):
        if prompt_column == _DEFAULT_PROMPT and prompt_column not in row and _CONVERSATION in row:
            prompt_column = _CONVERSATION
        for column in (prompt_column, completion_column):
            if column not in row and column != _DEFAULT_COMPLETION:
                raise DataError(
                    f"{where} has the columns {sorted(map(str, row))}; {column!r} was asked for. "
                    "Name the right one with prompt_column or completion_column."
                )
        prompt, completion = row[prompt_column], row.get(completion_column)
        if prompt_column == _CONVERSATION and isinstance(prompt, str) and prompt.lstrip().startswith("["):
            prompt = _read_json(prompt, _CONVERSATION, list, where)  # as a CSV file has it
        for name, advice in _UNREAD_COLUMNS.items():
            is_named = name in (prompt_column, completion_column)
            if not is_named and (found := str(row.get(name))) not in ("None", "nan", "", "[]", "{}"):
                raise DataError(
                    f"{where} has the column {name}, {found:.80}, which is not read. {advice}, or remove it."
                )
        given = {name: _read_json(row.get(name), name, kind, where) for name, kind in _TEMPLATE_COLUMNS.items()}
        template_kwargs = _drop_empty(given.pop("chat_template_kwargs")) | _drop_empty(given)
    elif not isinstance(row, (str, list)):
        raise DataError(f"{where} is a {type(row).__name__}; expected text, a list of messages, or a dict of columns.")
    if isinstance(completion, list) and len(completion) == 1 and isinstance(completion[0], Mapping):
        if unread := sorted(_drop_empty(completion[0]).keys() - {"role", "content"}):
            raise DataError(
                f"{where}: the completion has {', '.join(unread)} beside its content, which no template renders there. "
                "Give the row as one conversation of messages, or remove the key."
            )
        if completion[0].get("role", "assistant") != "assistant":
            raise DataError(f"{where}: the completion is by {completion[0]['role']!r:.80}; expected the assistant.")
        completion = completion[0].get("content")
    if completion is not None and not isinstance(completion, str):
        raise DataError(f"{where}: the completion is a {type(completion).__name__}; expected text or one message.")
    if isinstance(prompt, str) and prompt.strip():
        return Example(prompt, completion, template_kwargs)
    if not isinstance(prompt, list) or not prompt:
        raise DataError(f"{where}: the prompt is {prompt!r:.80}; expected text that is not empty, or messages.")
    for place, message in enumerate(prompt):
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(
                f"{where}: found the message {message!r:.80}; expected text under 'role' and 'content'. Join the text "
                "of a list of parts."
            )
        if message.get("tool_calls"):
            raise DataError(f"{where}: a message calls tools, which are not rendered. Remove the row, or the calls.")
        is_turn = message["role"] in ("user", "assistant") and not message.get("reasoning_content")
        if is_turn and not message["content"].strip():
            raise DataError(f"{where}: message {place} ({message['role']}) has no text. Remove it, or the row.")
    messages = [{"role": each["role"], "content": each["content"], **_drop_empty(each)} for each in prompt]
    return Example(messages, completion, template_kwargs)


# What a row may hold for its chat template, by the names of TRL's data sets.
_TEMPLATE_COLUMNS: dict[str, type] = {"tools": list, "documents": list, "chat_template_kwargs": dict}
# What would change the prompt, and where it belongs.
_UNREAD_COLUMNS = {
    **dict.fromkeys(("images", "videos"), "A text model does not see it: take rows without one"),
    **dict.fromkeys(("system", "system_prompt"), "Begin the messages with a system message, or give --system_prompt"),
    "enable_thinking": "Put it into chat_template_kwargs",
    "chat_template": "Set it as the tokenizer's",
}


def _read_json(value: Any, name: str, kind: type, where: str) -> Any:
    """A column of this kind, which may also be given as JSON or left empty."""
    with suppress(ValueError, RecursionError):
        value = (json.loads(value) if isinstance(value, str) and value else value) or kind()
    if not isinstance(value, kind):
        raise DataError(f"{where}: {name} is {value!r:.80}; expected a {kind.__name__}, or one as JSON.")
    return value


def _drop_empty(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without the empty values, and the nulls in others, with which tables fill up the rows that lack a key."""
    return {key: _drop_nulls(value) for key, value in values.items() if value not in (None, "", [], {})}


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, list):
        return [_drop_nulls(each) for each in value]
    if isinstance(value, Mapping):
        return {key: _drop_nulls(each) for key, each in value.items() if each is not None}
    return value


def _iterate_rows(source: str | Path | Iterable[Any], split: str) -> Iterator[Any]:
    """The rows of any source, unchecked, and read only as far as they are asked for where the format allows."""
    if isinstance(source, (str, Path)):
        path = Path(source).expanduser()
        if path.is_dir():
            files = [path / f"{split}{suffix}" for suffix in _FILE_SUFFIXES]
            found = sorted(entry.name for entry in path.iterdir())
            path = next((file for file in files if file.is_file()), path)
            if path not in files:
                raise DataError(
                    f"{path} holds {found or 'nothing'}; expected {split}.jsonl (or .json, .parquet, .csv)."
                )
        elif path.suffix not in _FILE_SUFFIXES and not path.exists():
            if isinstance(source, Path) or source.startswith(("/", ".", "~")):
                raise DataError(f"There is no {path}. Give a file ({', '.join(_FILE_SUFFIXES)}) or a folder of splits.")
            return _load_from_hub(source, split)
        if not path.is_file():
            raise DataError(f"There is no file {path}. Give the path of an existing file.")
        return _read_file(path)
    if isinstance(source, Mapping):
        if split not in source:
            raise DataError(f"The data set has the splits {sorted(source)}; {split!r} was asked for.")
        return iter(source[split])
    if hasattr(source, "to_dict") and hasattr(source, "columns"):  # a table of pandas or polars
        if hasattr(source, "to_dicts"):
            return iter(source.to_dicts())
        table: Any = source.astype(object)  # type: ignore[union-attr]  # of pandas, which fills empty cells with NaN
        return iter(table.where(table.notna(), None).to_dict("records"))
    if not isinstance(source, Iterable):
        raise DataError(f"The prompts are a {type(source).__name__}; expected rows, a file, a folder or a Hub name.")
    return iter(source)


def _read_file(path: Path) -> Iterator[Any]:
    """The rows of one file, by its suffix."""
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            yield from pyarrow.parquet.read_table(path).to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a Parquet file that can be read: {error}.") from error
        return
    if path.suffix not in _FILE_SUFFIXES:
        raise DataError(f"{path} ends in {path.suffix!r}; expected one of {', '.join(_FILE_SUFFIXES)}. Convert it.")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:  # Windows likes to put a byte order mark
            if path.suffix == ".csv":
                yield from _read_csv(path, file)
            elif path.suffix == ".json":
                rows = json.load(file, object_pairs_hook=object_of)
                if not isinstance(rows, list):
                    raise DataError(f"{path} holds a JSON {type(rows).__name__}; expected a list of rows.")
                yield from rows
            else:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        try:
                            yield json.loads(line, object_pairs_hook=object_of)
                        except (ValueError, RecursionError) as error:
                            raise DataError(f"{path}, line {number} is not JSON: {error}.") from error
    except (csv.Error, ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be parsed: {error}. Expected UTF-8 text in {path.suffix} format.") from error


def _read_csv(path: Path, file: TextIO) -> Iterator[dict[str, str]]:
    """Rows of a table with a header, whose cells are separated by commas, semicolons or tabs."""
    header, skipped = file.readline(), 0
    while header and not header.strip():
        header, skipped = file.readline(), skipped + 1
    bare = re.sub(r'"[^"]*"', "", header)
    delimiter = max(";\t,", key=bare.count) if ";" in bare or "\t" in bare else ","
    has_blanks = f"{delimiter} " in bare
    limit = csv.field_size_limit(_MAX_CELL)
    try:
        reader = csv.reader(
            itertools.chain([header], file), delimiter=delimiter, strict=True, skipinitialspace=has_blanks
        )
        table = [(reader.line_num + skipped, cells) for cells in reader if cells]
    except csv.Error as error:
        raise DataError(
            f"{path}, line {reader.line_num + skipped}: {error}. Write a quotation mark in a cell twice."
        ) from error
    finally:
        csv.field_size_limit(limit)
    columns = [name.strip() for name in table[0][1]] if table else []
    if len(set(columns)) < len(columns):
        raise DataError(f"{path} has the columns {columns}; expected each name once. Rename one.")
    for row, (line, cells) in enumerate(table[1:]):
        if len(cells) != len(columns):
            raise DataError(
                f"{path}, row {row} (it ends at line {line}) has {len(cells)} cells, and the header names "
                f"{len(columns)}: {', '.join(columns)}. Put a cell that holds {delimiter!r} into double quotes."
            )
        yield dict(zip(columns, cells, strict=True))


def _load_from_hub(name: str, split: str) -> Iterator[Any]:
    import datasets

    path, _, config = name.partition(":")
    try:
        return iter(datasets.load_dataset(path, config or None, split=split))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name!r} is neither a file or folder here nor a data set that could be loaded with split {split!r}: "
            f"{error}. Check the name, the configuration after the colon, and the network."
        ) from error
