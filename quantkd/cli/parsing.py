"""Reading the options of a subcommand, whose faults are one line and not a traceback."""

from __future__ import annotations

from argparse import ArgumentTypeError, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from quantkd.errors import ConfigError, QuantKDError

__all__ = ["parse_options", "whole_number"]


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
    from trl import TrlParser  # seconds to import, and the commands that need `whole_number` alone do not want it

    listed: Any = list(kinds)  # TrlParser's annotation leaves dataclass types out
    parser = TrlParser(listed, prog=prog, epilog=examples, formatter_class=RawDescriptionHelpFormatter)
    words: list[str] = []
    for word in argv:
        words += word.split("=", 1) if word.startswith("--config=") else [word]
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
