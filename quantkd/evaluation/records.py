"""Records of an evaluation: one JSON object per line, written as answers come in, and taken up again after a stop."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args, get_type_hints

from quantkd.data.encoding import at_date, read_date, uses_date
from quantkd.errors import DataError
from quantkd.evaluation.sharing import ask_main, is_writer
from quantkd.files import parse_json, write_file


class RecordFile:
    """A JSONL file of records with the key `id`, and `<name>.settings.json` beside it, which names model and items."""

    # Records are taken up under the same settings alone: an old file must not pass for the answers of another model.
    # Each is a flat dataclass of this kind, with an id below `count`; without a kind none are taken up.

    def __init__(
        self, path: Path, settings: Mapping[str, Any], kind: type[Any] | None = None, count: int = 0, *, share: bool
    ) -> None:
        self.path = path
        self._is_writer = is_writer(share)
        self.existing: list[Any] = ask_main(share, lambda: self._take_up(settings, kind, count))

    def append(self, records: Iterable[dict[str, Any]]) -> None:
        """Write records at the end, so that they survive the end of this process."""
        if self._is_writer:
            with self.path.open("ab") as file:
                file.writelines(_to_line(record) for record in records)

    def replace(self, records: Iterable[dict[str, Any]]) -> None:
        """Replace the file by all records in the order of their ids: the same bytes whatever the batches were."""
        if self._is_writer:
            lines = [_to_line(record) for record in sorted(records, key=lambda record: record["id"])]
            write_file(self.path, b"".join(lines))

    def _take_up(self, settings: Mapping[str, Any], kind: type[Any] | None, count: int) -> list[Any]:
        settings_path = self.path.with_name(self.path.name + ".settings.json")
        found: list[Any] = []
        if self.path.exists():
            _check_settings(self.path, settings_path, settings)
            content = self.path.read_bytes() if kind else b""
            whole = content[: content.rfind(b"\n") + 1]  # the process may have ended while it wrote the last line
            found = _read_lines(self.path, whole, kind, count) if kind else []
            if whole != content:
                write_file(self.path, whole)
        write_file(settings_path, json.dumps(settings, indent=2, sort_keys=True) + "\n")
        return found


def compute_digest(values: Sequence[Any]) -> str:
    """A digest of JSON values, such as prompts, in order."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]


def date_prompts(
    tokenizer: Any, path: str | Path | None, chat: bool, share: bool, depth: int = 0
) -> tuple[Any, dict[str, str]]:
    """The tokenizer at one date, and that date as a setting of the records at `path`, if its prompts print any."""

    def find() -> str:  # that of these records, else of others that stand `depth` folders below the same, else today's
        settings = "*.settings.json"
        own = [Path(f"{path}{settings[1:]}")] if path else []
        for file in (*own, *(sorted(Path(path).parents[depth].glob("*/" * depth + settings)) if path else [])):
            with suppress(OSError, ValueError, AttributeError):  # what is damaged is refused where it is used
                if found := parse_json(file.read_bytes()).get("date"):
                    return read_date(found, file)
        return read_date(None, path)

    if not (chat and uses_date(tokenizer)):
        return tokenizer, {}
    day = ask_main(share, find)
    return at_date(tokenizer, day), {"date": day}


def _check_settings(path: Path, settings_path: Path, settings: Mapping[str, Any]) -> None:
    if not settings_path.exists():
        raise DataError(f"{path} is of unknown settings: {settings_path.name} beside it is missing. Remove it.")
    try:
        found = parse_json(settings_path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("expected an object")
    except ValueError as error:
        raise DataError(f"{settings_path} is damaged: {error}. Evaluate again with --force.") from error
    differing = sorted(key for key in {*found, *settings} if found.get(key) != settings.get(key))
    if differing:
        pairs = ", ".join(f"{key} is {found.get(key)!r:.200}, not {settings.get(key)!r:.200}" for key in differing)
        raise DataError(f"{path} holds records of another evaluation: {pairs}. Use --force, or choose another arm.")


def _read_lines(path: Path, content: bytes, kind: type[Any], count: int) -> list[Any]:
    records: dict[int, Any] = {}
    hints = get_type_hints(kind)
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            value = parse_json(line)
            if not isinstance(value, dict) or value.keys() != hints.keys():
                raise ValueError(f"expected an object with the keys {', '.join(hints)}")
            for name, hint in hints.items():
                if type(value[name]) not in (get_args(hint) or (hint,)):
                    raise ValueError(f"{name} is {value[name]!r:.80}, expected {getattr(hint, '__name__', hint)}")
            if value["id"] in records or not 0 <= value["id"] < count:
                raise ValueError(f"id is {value['id']}, expected each of 0 to {count - 1} at most once")
            records[value["id"]] = kind(**value)
        except ValueError as error:  # of which JSON's and Unicode's errors are kinds
            raise damaged(path, number, error) from error
    return list(records.values())


def damaged(path: Path, number: int, reason: object) -> DataError:
    """The error of a line that holds no record of these items."""
    return DataError(f"{path}, line {number} is damaged: {reason}. Remove the file to evaluate again.")


def _to_line(value: Any) -> bytes:
    """One line of JSON."""
    return json.dumps(value, ensure_ascii=False, default=str).encode() + b"\n"
