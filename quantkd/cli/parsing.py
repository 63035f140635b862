"""The parsers of the subcommands, whose errors are one line and not a traceback."""

from __future__ import annotations

import json
import re
from argparse import SUPPRESS, ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from quantkd.errors import ConfigError, QuantKDError, printable
from quantkd.files import write_file
from quantkd.names import hide_home

_FROM_A_FILE = "--config FILE.yaml takes options from a file, by their long names; the command line overrides it."
_SECRET = re.compile(r"(?:.*_)?token")


class _OneLine(ArgumentParser):
    """A parser whose errors are one line, without the usage of up to two hundred options before it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with 2."""
        stop = "" if message.endswith((".", "?")) else "."
        said = f"{self.prog}: error: {message}{stop} `{self.prog} --help` lists the options."
        self.exit(2, printable(said) + "\n")


def plain_parser(prog: str, examples: str) -> ArgumentParser:
    """The parser of a command with few options."""
    return _OneLine(prog, epilog=examples, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)


def whole_number(minimum: int) -> Callable[[str], int]:
    """A `type` for argparse: a whole number that is not too small."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < minimum:
            raise ArgumentTypeError(f"found {text!r}; expected a whole number of at least {minimum}")
        return int(text)

    return parse


def option(help: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A field of a dataclass for `parse_options`; without a default the option must be given."""
    kind: Any = {"default_factory": default.copy} if isinstance(default, list) else {"default": default}
    return field(**kind, metadata={"help": help, **metadata})


def parse_options(kinds: Sequence[type], argv: Sequence[str], *, prog: str, examples: str) -> tuple[Any, ...]:
    """Options as dataclasses, from the command line and the YAML file that `--config` names."""
    parser, words = _dataclass_parser(kinds, prog, examples), _with_config(argv, prog)
    try:
        *options, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except QuantKDError:
        raise
    except ValueError as error:
        raise ConfigError(f"{str(error).rstrip('.')}. `{prog} --help` lists the options.") from error
    if unknown:
        name = unknown[0].split("=")[0]
        near = get_close_matches(name, re.findall(r"--\w+", parser.format_help()), n=1)
        parser.error(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return tuple(options)


def save_options(kinds: Sequence[type], argv: Sequence[str], path: Path, *, prog: str) -> None:
    """Write every option of a run, given or not, as a YAML file that `--config` takes; secrets are left out."""
    import yaml

    options = vars(_dataclass_parser(kinds, prog, "").parse_args(_with_config(argv, prog)))
    del options["resume_from_checkpoint"]
    write_file(path, f"# {prog} --config {path.name}\n" + yaml.safe_dump(_plain(options), allow_unicode=True))


def _dataclass_parser(kinds: Sequence[type], prog: str, examples: str) -> Any:
    from transformers import HfArgumentParser  # seconds to import, which commands of few options do not need

    class Parser(_OneLine, HfArgumentParser):
        def add_argument(self, *names: Any, **given: Any) -> Any:
            says, default = given.get("help") or "", given.get("default")
            if type(default) in (str, int, float) and default not in ("", SUPPRESS) and "default" not in says.lower():
                given["help"] = f"{says} (default: %(default)s)"
            return super().add_argument(*names, **given)

    dataclasses: Any = kinds
    layout = {"formatter_class": RawDescriptionHelpFormatter, "description": _FROM_A_FILE, "epilog": examples}
    # No abbreviations: `--temperature` must not be taken for capture's `--temperatures`.
    return Parser(dataclasses, prog=prog, allow_abbrev=False, **layout)


def _with_config(argv: Sequence[str], prog: str) -> list[str]:
    """The words of the command line, those of the file that `--config` names before them, so that later ones win."""
    finder = _OneLine(prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config")
    found, words = finder.parse_known_args(list(argv))
    return words if found.config is None else [*_read_config(found.config), *words]


def _read_config(name: str) -> list[str]:
    """The options in a YAML file, spelled as on a command line."""
    import yaml

    try:
        content = Path(name).read_bytes()
        options, node = yaml.safe_load(content), yaml.compose(content, yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}" if mark else "it"  # not the line itself, which may hold a token
        raise ConfigError(f"{name} is not YAML: see {place}. Expected `option: value` on each line.") from None
    if not isinstance(options, dict):
        raise ConfigError(f"{name} holds a {type(options).__name__}; expected `option: value` on each line.")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if (first := lines.setdefault(key.value, key.start_mark.line + 1)) != key.start_mark.line + 1:
            raise ConfigError(f"{name} has {key.value} in lines {first} and {key.start_mark.line + 1}. Remove one.")
    words: list[str] = []
    for key, value in options.items():
        if isinstance(value, list) and value:
            words += [f"--{key}", *map(str, value)]
        elif value not in (None, []):
            words.append(f"--{key}={json.dumps(value) if isinstance(value, dict) else value}")
    return words


def _plain(value: Any) -> Any:
    """An option without the home folder and, in nested options such as model_init_kwargs, without secrets."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if not _SECRET.fullmatch(str(key))}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.dumps(_plain(json.loads(value)))
        except json.JSONDecodeError:
            return value
    return hide_home(value) if isinstance(value, str) else value
