"""The JSON documents of a transfer set: written in one canonical form, read as if a stranger had made them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from quantkd.errors import TransferSetError

# An array of empty objects takes about 27 times its text in memory: 2 MiB of text stay below 64 MiB.
MAX_DOCUMENT_BYTES = 2 * 2**20
MAX_JSON_DEPTH = 16
# C0 without tab and newline, DEL, C1, the bidirectional controls, and lone surrogates: none of them reaches a terminal.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def canonical_json(value: Any, name: str = "A transfer set's description") -> bytes:
    """`value` as JSON bytes: keys sorted, no spaces, ASCII, one newline at the end."""
    _check_content(value, name)
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise TransferSetError(
            f"{name} must be plain JSON with finite numbers: {error}. "
            "Use strings, numbers, booleans, lists and dictionaries only."
        ) from error
    return text.encode() + b"\n"


def parse_canonical_json(data: bytes, name: str) -> dict[str, Any]:
    """The object in `data`, which must be byte for byte what `canonical_json` writes; so no key occurs twice."""
    try:
        value = json.loads(data.decode("ascii"))
    except RecursionError as error:
        raise TransferSetError(f"{name} nests deeper than {MAX_JSON_DEPTH} levels. Get the set again.") from error
    except ValueError as error:
        raise TransferSetError(f"{name} is not JSON: {error}. It is damaged; get the set again.") from error
    if not isinstance(value, dict):
        raise TransferSetError(f"{name} holds a JSON {type(value).__name__}; expected an object. Get the set again.")
    canonical = canonical_json(value, name)
    if canonical != data:
        at = next((i for i, (a, b) in enumerate(zip(canonical, data, strict=False)) if a != b), len(canonical))
        raise TransferSetError(
            f"{name} is not in canonical form at byte {at}. It was edited, or its line ends converted; get it again."
        )
    return value


def require_fields(value: Any, name: str, fields: Iterable[str]) -> dict[str, Any]:
    """`value`, checked to be an object with exactly `fields`."""
    expected = set(fields)
    if not isinstance(value, dict) or set(value) != expected:
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        raise TransferSetError(
            f"{name} has {found!a:.200}; expected the fields {sorted(expected)}. "
            "The set is damaged, or a newer quantkd wrote it: upgrade quantkd, or get the set again."
        )
    return value


def is_whole(value: object, low: int, high: int) -> bool:
    """Whether `value` is an int (no bool) from `low` to `high`."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def is_sha256(value: object) -> bool:
    """Whether `value` is 64 lower-case hexadecimal digits."""
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


def _check_content(value: Any, name: str, level: int = 0) -> None:
    """Refuse deep nesting and strings that would harm a terminal."""
    if level > MAX_JSON_DEPTH:
        raise TransferSetError(f"{name} nests deeper than {MAX_JSON_DEPTH} levels. Get the set again.")
    if isinstance(value, str) and _UNSAFE.search(value):
        raise TransferSetError(f"{name} holds a control character in {value!a:.200}. Remove it.")
    parts = [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for part in parts:
        _check_content(part, name, level + 1)
