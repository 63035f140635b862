"""The errors that quantkd raises, and text from elsewhere (models, data, servers) made safe for where it is shown."""

from __future__ import annotations

import html
import re
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

# Letters, marks and signs that show nothing, among them the variation selectors.
_SELECTORS = map(chr, [*range(0x180B, 0x1810), *range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0)])
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0").union(_SELECTORS)
_LONGEST = 3000  # characters of a message, which may quote a token, a name or a line of any length
# What Markdown, GitHub's too, reads as more than text, by its last character; a link needs `](`, `][`, `]:` or `://`.
_MARKUP = re.compile(
    r"[\\`*|~]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])|:(?=//)|\b[wW]{3}\.|"
    r"^(?:[-+]|#{1,6}|\d{1,9}[.)])(?= |$)|^[-=](?=[-=]*$)"
)


def printable(text: Any, *, lines: bool = False) -> str:
    """Text for a terminal, a log or a page: control, invisible and reordering characters are spelled as escapes."""
    shown = (c if (c.isprintable() and c not in _BLANK) or (lines and c == "\n") else _spell(c) for c in str(text))
    return "".join(shown)


def _spell(character: str) -> str:
    """As Python spells it, and JSON what fits into 16 bits."""
    return f"\\u{ord(character):04x}" if ord(character) < 2**16 else f"\\U{ord(character):08x}"


def markdown(text: Any) -> str:
    """Text on one line of Markdown, also in a table's cell: no HTML, no link, no other markup."""
    escaped = html.escape(printable(" ".join(str(text).split())), quote=False)
    escaped = _MARKUP.sub(lambda found: f"{found[0][:-1]}\\{found[0][-1]}", escaped)
    return re.sub(r"@(?=\w)", "@<!-- -->", escaped)  # no mention and no address, which GitHub looks for in the text


def code_span(text: Any) -> str:
    """Text between backticks, also in a table's cell."""
    return printable(" ".join(str(text).split())).replace("`", "'").replace("|", "¦")


class QuantKDError(Exception):
    """Base of all errors that quantkd raises."""

    def __str__(self) -> str:
        text = super().__str__()
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]} ... {text[-_LONGEST // 2 :]}"
        return printable(text, lines=True)  # a message quotes files, servers and models


class ConfigError(QuantKDError, ValueError):
    """An argument, or a combination of arguments, that cannot work."""


class DataError(QuantKDError, ValueError):
    """Prompts or rows that cannot be used: missing, empty, malformed, too long."""


class TransferSetError(QuantKDError, ValueError):
    """A transfer set that is damaged, unfinished, or does not fit the student."""


class TeacherError(QuantKDError, RuntimeError):
    """A teacher whose output cannot be stored, such as logits that are not finite."""


class HubError(QuantKDError, ConnectionError):
    """The Hub could not be reached, or refused a request."""


class MissingDependencyError(QuantKDError, ImportError):
    """An optional package is missing that the requested feature needs."""


def refuse_unused(options: Any, needs: Mapping[str, str], defaults: Mapping[str, Any] | None = None) -> None:
    """Refuse named options that are given without any of those that they need, each as "name" or "name=value"."""
    defaults = defaults or {
        each.name: each.default if each.default_factory is MISSING else each.default_factory()
        for each in fields(options)
    }
    for needed, names in needs.items():
        wanted = [name.partition("=") for name in needed.split()]
        is_met = any(
            str(getattr(options, name)) == value if value else getattr(options, name) for name, _, value in wanted
        )
        for name in names.split():
            if not is_met and getattr(options, name) != defaults[name]:
                without = f"without {' or '.join(needed.split())}" if needed else "here"
                raise ConfigError(f"{name} has no effect {without}. Leave it out, or change that.")
