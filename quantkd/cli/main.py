"""`quantkd`: finds the subcommand and runs it. Imports nothing heavy, so that help is instant."""

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
    "capture": "let a teacher answer prompts and store its distributions as a transfer set",
    "inspect": "show what a transfer set holds",
    "verify": "check every byte and row of a transfer set",
    "audit": "compute a sample of a transfer set's rows again with its teacher",
    "convert": "write a transfer set again, smaller or trimmed, or one from another toolkit's table",
    "train": "distil a transfer set into a quantized student",
    "sweep": "search training arguments for the least held-out KL",
    "evaluate": "measure one model: fidelity to the teacher and GSM8K accuracy",
    "export": "write a student as a 16-bit checkpoint, a 4-bit one, or the adapter alone",
    "report": "put evaluated models side by side: table, JSON, chart",
    "view": "write a page that shows, token by token, where a student differs from its teacher",
    "push": "upload an adapter or a transfer set to the Hub, private unless told otherwise",
    "selftest": "check on your own model that the loss, the alignment and the gradients are right",
    "demo": "the whole way on a real small model: capture, train, evaluate, report",
}

# What to do after Ctrl-C.
_GO_ON = {
    "train": "Run the same command with --resume_from_checkpoint true to go on from the last checkpoint (every "
    "--save_steps), or without it to start anew.",
    **dict.fromkeys(("inspect", "verify", "audit", "selftest"), "Nothing was changed."),
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
    """SIGTERM, which schedulers and containers send, ends a command as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
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
    """Leave out two lines of other libraries about each other, which a user can do nothing about."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

    def is_news(record: logging.LogRecord) -> bool:
        return "gemm_4bit_forward" not in record.getMessage()  # a faster kernel that is optional

    logger.addFilter(is_news)
    try:
        with warnings.catch_warnings():
            # PEFT asks transformers by the old name.
            warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
            yield
    finally:
        logger.removeFilter(is_news)


@contextmanager
def _progress_on_stderr() -> Iterator[None]:
    """Say which step of an experiment runs, and what was read from the Hub at which commit."""
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
    """Whether the message says it all, so that where it arose is of no use to who reads it."""
    # The latter three are how torch, transformers, peft and datasets say that an argument, a model, a file or a package
    # is not as it must be; the others how safetensors and torch say that the disk is full.
    if isinstance(error, (QuantKDError, ImportError, OSError, ValueError)):
        return True
    return type(error).__name__ == "SafetensorError" or "PytorchStreamWriter failed" in str(error)


def _describe(error: Exception) -> str:
    """One line without secrets; of errors that are not quantkd's own also what to do next."""
    from quantkd.remote import find_secrets, redact  # the Hub's client takes half a second to import

    # A file of options that is broken, or a server, may be quoted with the token in it.
    text = " ".join(redact(str(error), find_secrets()).split()) or type(error).__name__
    if isinstance(error, QuantKDError):
        return text
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}. Give a path that is there and may be read or written."
    return f"{text.rstrip('.')}. (`quantkd --traceback COMMAND ...` shows where.)"


def _usage() -> str:
    """What `quantkd --help` prints."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: quantkd [--traceback] COMMAND [OPTIONS]",
            "",
            "Distil a language model into a 4-bit instance of itself.",
            "",
            *lines,
            "",
            "quantkd COMMAND --help shows a command's options and examples. --traceback shows where an error arose.",
        ]
    )
