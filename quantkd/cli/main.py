"""`quantkd`: finds the subcommand and runs it. Imports nothing heavy, so that help is instant."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from quantkd.errors import QuantKDError

__all__ = ["main"]

_COMMANDS = {
    "capture": "let a teacher answer prompts and store its distributions as a transfer set",
    "inspect": "show what a transfer set holds",
    "verify": "check every byte and row of a transfer set",
    "convert": "write a transfer set again, smaller or trimmed",
    "train": "distil a transfer set into a quantized student",
    "evaluate": "measure one model: fidelity to the teacher and GSM8K accuracy",
    "report": "put evaluated models side by side: table, JSON, chart",
    "selftest": "check on your own model that the loss, the alignment and the gradients are right",
    "demo": "the whole way on a real small model: capture, train, evaluate, report",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand.

    Args:
        argv: the arguments after the program's name; those of the process if None.

    Raises:
        SystemExit: 0 after help, 2 for wrong usage, 1 for an error of quantkd's own, 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        from quantkd import __version__

        print(f"quantkd {__version__}")
        raise SystemExit(0)
    command = arguments[0]
    if command not in _COMMANDS:
        print(f"quantkd: there is no command {command!r}; the commands are {', '.join(_COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    try:
        importlib.import_module(f"quantkd.cli.{command}").main(arguments[1:])
    # The latter two are how transformers and datasets say that a model, file or package is not there.
    except (QuantKDError, ImportError, OSError) as error:
        print(f"quantkd {command}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        print(f"quantkd {command}: interrupted. Run the same command again to go on.", file=sys.stderr)
        raise SystemExit(130) from None


def _usage() -> str:
    lines = [f"  {name:<10} {text}" for name, text in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: quantkd COMMAND [OPTIONS]",
            "",
            "Distil a language model into a 4-bit instance of itself.",
            "",
            *lines,
            "",
            "quantkd COMMAND --help shows a command's options and examples.",
        ]
    )
