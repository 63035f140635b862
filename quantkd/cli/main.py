"""`quantkd`: finds the subcommand and runs it. It imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from quantkd.cli.format import say
from quantkd.errors import QuantKDError, printable
from quantkd.names import __version__

COMMANDS = {
    "capture": "store a teacher's answers to prompts, with its distributions, as a transfer set",
    "inspect": "show what a transfer set holds",
    "verify": "check every byte and row of a transfer set, and with --teacher what they say",
    "convert": "rewrite a transfer set smaller or trimmed, or import another toolkit's table",
    "quantize": "write a 4-bit checkpoint whose codes fit the inputs of each layer",
    "train": "train a quantized student on a transfer set",
    "sweep": "search for the training arguments with the lowest held-out KL",
    "evaluate": "measure one model: KL to the teacher, and accuracy on GSM8K and other tasks",
    "export": "write a student as a 16-bit checkpoint, a 4-bit one, or the adapter alone",
    "report": "compare evaluated models: table, JSON, chart",
    "view": "write a page that shows, token by token, where a student differs from its teacher",
    "push": "upload an adapter or a transfer set to the Hub, private by default",
    "selftest": "check loss, alignment and gradients on your own model",
    "demo": "capture, train, evaluate and report with a small real model",
}
_USAGE = f"""usage: quantkd [--traceback] COMMAND [OPTIONS]

Distill a language model into a 4-bit copy of itself.

{chr(10).join(f"  {name:<10} {text}" for name, text in COMMANDS.items())}

quantkd COMMAND --help shows a command's options and examples. --traceback shows where an error arose."""

# What to do after Ctrl-C.
_GO_ON = {
    "train": "Run the same command with --resume_from_checkpoint true to go on from the last checkpoint (every "
    "--save_steps), or without it to start again.",
    **dict.fromkeys(("inspect", "verify", "selftest"), "Nothing was changed."),
}


def run() -> None:
    """The program: `main` in a process of its own, whose bars, messages and signals are set for a terminal."""
    if not sys.stderr.isatty():  # tqdm and huggingface_hub read these when they are imported; what the user set stays
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable())
    logging.getLogger("quantkd").addHandler(handler)
    # The steps, what is read from the Hub with its commit, and how much of a student is quantized.
    for name in ("quantkd.experiment", "quantkd.remote", "quantkd.models.student", "quantkd.models.gguf_student"):
        logging.getLogger(name).setLevel(logging.INFO)
    # Two messages that a user cannot act on: an optional, faster kernel, and PEFT's use of an old name of transformers.
    kernels = logging.getLogger("bitsandbytes.backends.cpu.ops")
    kernels.addFilter(lambda record: "gemm_4bit_forward" not in record.getMessage())
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    signal.signal(signal.SIGTERM, _interrupt)
    sys.excepthook = lambda _, error, __: say("".join(traceback.format_exception(error)), file=sys.stderr)
    main()


class _Printable(logging.Formatter):
    """A record as text that a terminal shows as it is."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), lines=True)


def _interrupt(*_: object) -> NoReturn:
    """Treat SIGTERM, which schedulers and containers send, like Ctrl-C."""
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand. What it raises that a user can act on becomes one line and an exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments[:1]
    command, *words = arguments[show_traceback:] or [""]
    if command in ("", "-h", "--help", "--version"):
        say(f"quantkd {__version__}" if command == "--version" else _USAGE)
        raise SystemExit(0 if command else 2)
    if command not in COMMANDS:
        say(f"quantkd: there is no command {command!r}; the commands are {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    try:
        importlib.import_module(f"quantkd.cli.{command}").main(words)
    except Exception as error:
        if show_traceback or not _is_expected(error):
            raise
        say(f"quantkd {command}: {_describe(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        start = "\n" if sys.stderr.isatty() else ""  # below a bar
        go_on = _GO_ON.get(command, "Run the same command again to go on.")
        say(f"{start}quantkd {command}: interrupted. {go_on}", file=sys.stderr)
        raise SystemExit(130) from None


def _is_expected(error: Exception) -> bool:
    """Whether the message is enough for a user, without a traceback."""
    # torch, transformers, peft and datasets raise the latter three for a bad argument, model, file or package.
    if isinstance(error, (QuantKDError, ImportError, OSError, ValueError)):
        return True
    # safetensors and torch raise these when the disk is full.
    is_full = type(error).__name__ == "SafetensorError" or "PytorchStreamWriter failed" in str(error)
    return is_full or _is_lost(error)


def _is_lost(error: Exception) -> bool:
    """Whether another process of the launch has ended, of which torch and gloo have several errors."""
    return "gloo/" in str(error) or type(error).__name__.startswith("Dist")


def _describe(error: Exception) -> str:
    """One line without secrets; for the errors of other libraries also what to do next."""
    from quantkd.remote import find_secrets, redact  # the Hub's client takes half a second to import

    # A message may quote a broken file of options, or a server, with a token in it.
    text = " ".join(redact(str(error), find_secrets()).split()) or type(error).__name__
    if isinstance(error, QuantKDError):
        return text
    if _is_lost(error):
        return f"another process of this launch ended, and its own message says why. ({text.rstrip('.')})"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}. Give an existing path that can be read or written."
    return f"{text.rstrip('.')}. (`quantkd --traceback COMMAND ...` shows where.)"
