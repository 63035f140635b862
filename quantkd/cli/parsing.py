"""Reading the options of a subcommand, whose faults are one line and not a traceback."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

from quantkd.errors import ConfigError, QuantKDError

__all__ = ["parse_options", "save_options", "whole_number"]

# Of options that hold a secret a file that is kept says nothing.
_SECRETS = ("token",)


def parse_options(kinds: Sequence[type], argv: Sequence[str], *, prog: str, examples: str) -> tuple[Any, ...]:
    """Options as dataclasses, from the command line and the YAML file that `--config` names.

    Args:
        kinds: the dataclasses whose fields are the options.
        argv: the arguments after the subcommand.
        prog: the command, as usage messages show it.
        examples: what `--help` ends with.

    Returns:
        One instance of each dataclass.

    Raises:
        ConfigError: a file that cannot be read as options, or values that a dataclass refuses.
        SystemExit: wrong usage, or help.
    """
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
        raise ConfigError(f"{error} `{prog} --help` lists the options.") from error
    if unknown:
        parser.error(f"there is no option {unknown[0]}; `{prog} --help` lists them all")
    return tuple(options)


def save_options(kinds: Sequence[type], argv: Sequence[str], path: Path, *, command: str) -> None:
    """Write every option of a run, given or not, as a YAML file that `--config` takes.

    Args:
        kinds: the dataclasses of `parse_options`, which has taken `argv` without an error.
        argv: the arguments after the subcommand.
        path: the file; its folder is made. Secrets are left out, and paths below the home folder are written as seen
            from the current one.
        command: what the file is for, such as "quantkd train".
    """
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
        name: _without_home(value.value if isinstance(value, Enum) else value)
        for name, value in sorted(options.items())
        if not any(secret in name for secret in _SECRETS) and name != "config"
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"# {command} --config {path.name}\n" + yaml.safe_dump(plain, sort_keys=True, allow_unicode=True)
    path.write_text(text, encoding="utf-8")


def _without_home(value: Any) -> Any:
    """A path below the home folder as seen from here; anything else as it is."""
    if isinstance(value, str) and value.startswith(f"{Path.home()}{os.sep}"):
        return os.path.relpath(value)
    return value


def _parser(kinds: Sequence[type], prog: str, examples: str) -> Any:
    from trl import TrlParser  # seconds to import, and the commands that need `whole_number` alone do not want it

    listed: Any = list(kinds)  # TrlParser's annotation leaves dataclass types out
    return TrlParser(listed, prog=prog, epilog=examples, formatter_class=RawDescriptionHelpFormatter)


def _words(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config=FILE` as two words, as TrlParser wants it."""
    words: list[str] = []
    for word in argv:
        words += word.split("=", 1) if word.startswith("--config=") else [word]
    return words


def whole_number(minimum: int) -> Callable[[str], int]:
    """A `type` for argparse: a whole number that is not too small.

    Args:
        minimum: the smallest that is taken.

    Returns:
        A function from text to the number, which raises ArgumentTypeError for argparse to report.
    """

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
        reason = " ".join(str(error).split())
        raise ConfigError(f"{name} is not YAML: {reason}. Expected `option: value` on each line.") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{name} holds a {type(value).__name__}; expected `option: value` on each line.")
