"""Rows from wherever they lie: files, folders of splits, `datasets` names, and whatever can be iterated."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkd.errors import DataError

_FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")


def iterate_rows(source: str | Path | Iterable[Any], split: str) -> Iterator[Any]:
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
        with path.open(encoding="utf-8-sig", newline="") as file:  # Windows likes to put a byte order mark
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
