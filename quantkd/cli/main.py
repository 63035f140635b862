"""`quantkd`: finds the subcommand and runs it. It imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from quantkd.errors import QuantKDError

COMMANDS = {
    "capture": "store a teacher's answers to prompts, with its distributions, as a transfer set",
    "inspect": "show what a transfer set holds",
    "verify": "check every byte and row of a transfer set, and with --teacher what they say",
    "convert": "rewrite a transfer set smaller or trimmed, or import another toolkit's table",
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

# What to do after Ctrl-C.
_GO_ON = {
    "train": "Run the same command with --resume_from_checkpoint true to go on from the last checkpoint (every "
    "--save_steps), or without it to start again.",
    **dict.fromkeys(("inspect", "verify", "selftest"), "Nothing was changed."),
}


def run() -> None:
    """The program: `main` in a process of its own, which draws progress bars on a terminal only."""
    if not sys.stderr.isatty():  # tqdm and huggingface_hub read these when they are imported; what the user set stays
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    main()


def main(argv: Sequence[str] | None = None) -> None:
    """Run a subcommand."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in arguments[:1]
    arguments = arguments[show_traceback:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        raise SystemExit(0 if arguments else 2)
    if arguments[0] == "--version":
        from quantkd import __version__

        print(f"quantkd {__version__}")
        raise SystemExit(0)
    command = arguments[0]
    if command not in COMMANDS:
        print(f"quantkd: there is no command {command!r}; the commands are {', '.join(COMMANDS)}.", file=sys.stderr)
        raise SystemExit(2)
    try:
        with _stopped_by_sigterm(), _without_noise(), _progress_on_stderr():
            importlib.import_module(f"quantkd.cli.{command}").main(arguments[1:])
    except Exception as error:
        if show_traceback or not _is_expected(error):
            raise
        print(f"quantkd {command}: {_describe(error)}", file=sys.stderr)
        raise SystemExit(1) from None
    except KeyboardInterrupt:
        start = "\n" if sys.stderr.isatty() else ""  # below a bar
        print(
            f"{start}quantkd {command}: interrupted. {_GO_ON.get(command, 'Run the same command again to go on.')}",
            file=sys.stderr,
        )
        raise SystemExit(130) from None


@contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM, which schedulers and containers send, like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _without_noise() -> Iterator[None]:
    """Hide two messages of other libraries that a user cannot act on."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def is_shown(record: logging.LogRecord) -> bool:
        return "gemm_4bit_forward" not in record.getMessage()  # an optional, faster kernel

    logger.addFilter(is_shown)
    try:
        with warnings.catch_warnings():
            # PEFT uses the old name of an attribute of transformers.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            yield
    finally:
        logger.removeFilter(is_shown)


@contextmanager
def _progress_on_stderr() -> Iterator[None]:
    """Show the steps of an experiment, and what is read from the Hub with its commit."""
    handler = logging.StreamHandler()
    loggers = [logging.getLogger(name) for name in ("quantkd.experiment", "quantkd.remote")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def _is_expected(error: Exception) -> bool:
    """Whether the message is enough for a user, without a traceback."""
    # torch, transformers, peft and datasets raise the latter three for a bad argument, model, file or package.
    if isinstance(error, (QuantKDError, ImportError, OSError, ValueError)):
        return True
    # safetensors and torch raise these when the disk is full.
    return type(error).__name__ == "SafetensorError" or "PytorchStreamWriter failed" in str(error)


def _describe(error: Exception) -> str:
    """One line without secrets; for the errors of other libraries also what to do next."""
    from quantkd.remote import find_secrets, redact  # the Hub's client takes half a second to import

    # A message may quote a broken file of options, or a server, with a token in it.
    text = " ".join(redact(str(error), find_secrets()).split()) or type(error).__name__
    if isinstance(error, QuantKDError):
        return text
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}. Give an existing path that can be read or written."
    return f"{text.rstrip('.')}. (`quantkd --traceback COMMAND ...` shows where.)"


def _usage() -> str:
    """What `quantkd --help` prints."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: quantkd [--traceback] COMMAND [OPTIONS]",
            "",
            "Distill a language model into a 4-bit copy of itself.",
            "",
            *lines,
            "",
            "quantkd COMMAND --help shows a command's options and examples. --traceback shows where an error arose.",
        ]
    )
