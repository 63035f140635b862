"""Reading the options of a subcommand, whose faults are one line and not a traceback."""

from __future__ import annotations

import json
import os
import re
from argparse import ArgumentParser, ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

from quantkd.errors import ConfigError, QuantKDError

_FROM_A_FILE = (
    "--config FILE.yaml takes options from a file, their long names as keys; what the command line gives besides wins."
)
# Of options that hold a secret a file that is kept says nothing.
_SECRET = re.compile(r"(?:.*_)?token")
# How a run was started, which is no part of what it is.
_OF_THE_START = ("config", "resume_from_checkpoint")


class _OneLine(ArgumentParser):
    """A parser whose errors are one line, without the usage of up to two hundred options before it."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and exit with 2."""
        stop = "" if message.endswith((".", "?")) else "."
        self.exit(2, f"{self.prog}: error: {message}{stop} `{self.prog} --help` lists the options.\n")


def plain_parser(prog: str, examples: str) -> ArgumentParser:
    """The parser of a command whose options are few and in no file."""
    return _OneLine(prog, epilog=examples, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)


def parse_options(kinds: Sequence[type], argv: Sequence[str], *, prog: str, examples: str) -> tuple[Any, ...]:
    """Options as dataclasses, from the command line and the YAML file that `--config` names."""
    parser, words = _parser(kinds, prog, examples), _words(argv)
    if "--config" in words:
        place = words.index("--config") + 1
        if place == len(words):
            parser.error("argument --config: expected one argument")
        _check_config(words[place])
    try:
        *options, unknown = parser.parse_args_and_config(words, return_remaining_strings=True)
    except QuantKDError:
        raise
    except ValueError as error:
        raise ConfigError(f"{str(error).rstrip('.')}. `{prog} --help` lists the options.") from error
    if unknown:
        parser.error(f"there is no option {unknown[0]}{_near(unknown[0], parser)}")
    return tuple(options)


def save_options(kinds: Sequence[type], argv: Sequence[str], path: Path, *, command: str) -> None:
    """Write every option of a run, given or not, as a YAML file that `--config` takes."""
    import yaml

    parser, words = _parser(kinds, command, ""), _words(argv)
    if "--config" in words:
        place = words.index("--config")
        with open(words[place + 1], encoding="utf-8") as file:
            given = yaml.safe_load(file)
        given.pop("env", None)  # variables of the environment, which may be secrets
        parser.set_defaults_with_config(**given)
        del words[place : place + 2]
    options = vars(parser.parse_args(words))
    plain = {
        name: _without_home(_without_secrets(value.value if isinstance(value, Enum) else value))
        for name, value in sorted(options.items())
        if not _SECRET.fullmatch(name) and name not in _OF_THE_START
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"# {command} --config {path.name}\n" + yaml.safe_dump(plain, sort_keys=True, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _without_secrets(value: Any) -> Any:
    """Options of options, such as model_init_kwargs, without those that hold a secret; anything else as it is."""
    if isinstance(value, dict):
        return {key: _without_secrets(each) for key, each in value.items() if not _SECRET.fullmatch(str(key))}
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.dumps(_without_secrets(json.loads(value)))
        except json.JSONDecodeError:
            return value
    return value


def _without_home(value: Any) -> Any:
    """A path below the home folder as seen from here; anything else as it is."""
    if isinstance(value, str) and value.startswith(f"{Path.home()}{os.sep}"):
        return os.path.relpath(value)
    return value


def _parser(kinds: Sequence[type], prog: str, examples: str) -> Any:
    from trl import TrlParser  # seconds to import, and the commands that need `whole_number` alone do not want it

    class Parser(_OneLine, TrlParser):
        pass

    listed: Any = list(kinds)  # TrlParser's annotation leaves dataclass types out
    return Parser(
        listed,
        prog=prog,
        description=_FROM_A_FILE,
        epilog=examples,
        formatter_class=RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `--temperature` shall not be taken for capture's `--temperatures`
    )


def _near(word: str, parser: ArgumentParser) -> str:
    """The option that was probably meant, as the end of a message."""
    near = get_close_matches(word.split("=")[0], parser._option_string_actions, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _words(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config=FILE` as two words, as TrlParser wants it."""
    words: list[str] = []
    for word in argv:
        words += word.split("=", 1) if word.startswith("--config=") else [word]
    return words


def whole_number(minimum: int) -> Callable[[str], int]:
    """A `type` for argparse: a whole number that is not too small."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = minimum - 1
        if number < minimum:
            raise ArgumentTypeError(f"found {text!r}; expected a whole number of at least {minimum}")
        return number

    return parse


def _check_config(name: str) -> None:
    """Refuse a file of options that is none; TrlParser would fail with a traceback, or take it for one."""
    import yaml

    try:
        value = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The options in {name} cannot be read: {error}. Give a YAML file.") from error
    except yaml.YAMLError as error:
        # Not the line itself, which may hold a token.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        place = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(
            f"{name} is not YAML: {problem or type(error).__name__}{place}. Expected `option: value` on each line."
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"{name} holds a {type(value).__name__}; expected `option: value` on each line.")
