"""What must not leave this machine: tokens, and where its owner keeps things. Every file is searched for them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import get_token

from quantkd.errors import ConfigError

_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|(?:sk|ghp|gho|glpat|xox[abp])[-_][A-Za-z0-9_-]{16,})")
_SECRET_VARIABLE = re.compile(
    r"TOKEN(?!IZERS)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|_KEY$|_PAT$",
    re.IGNORECASE,
)
_MIN_SECRET_CHARACTERS = 8
_LONGEST_WORD = 15  # such as "unauthenticated"; what has more letters and nothing else is no setting
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)


def find_secrets(token: str | None = None) -> dict[str, str]:
    """The secrets that this process knows of."""
    secrets = {}
    for name, value in os.environ.items():
        # A switch, a number or a path is none.
        is_word = value.isdigit() or (value.isalpha() and len(value) <= _LONGEST_WORD)
        is_secret = len(value) >= _MIN_SECRET_CHARACTERS and not is_word
        if is_secret and _SECRET_VARIABLE.search(name) and not value.startswith(("/", "~", ".")):
            secrets[value] = f"the value of {name}"
    stored = get_token()
    if stored:
        secrets[stored] = "the Hub's token"
    if token:
        secrets[token] = "the token that was passed"
    return secrets


def redact(text: str, secrets: Mapping[str, str]) -> str:
    """The text with every secret replaced, for messages."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "[secret]")
    return _TOKEN.sub("[secret]", text)


def check_shareable(name: str, data: bytes, secrets: Mapping[str, str], *, paths: bool) -> None:
    """Refuse a file that holds a secret or says where its owner keeps things. The message holds neither."""
    text = data.decode("utf-8", errors="replace")
    for secret, what in secrets.items():
        if secret in text:
            raise ConfigError(f"{name} holds {what}; expected no secret in what is pushed. Remove it from the file.")
    found = _TOKEN.search(text)
    if found is not None:
        raise ConfigError(
            f"{name} holds what looks like an access token at character {found.start()}; expected no secret in what "
            "is pushed. Remove it from the file."
        )
    homes = {str(Path.home()), os.path.expanduser("~")} - {"/"}
    if paths and any(re.search(re.escape(home) + r"(?![\w.-])", text) for home in homes):
        raise ConfigError(
            f"{name} names your home folder; expected no local path in what is pushed. Name the model by its folder "
            "alone or by its name on the Hub."
        )


def public_name(name_or_path: str) -> str:
    """A model's name without the path, also of a folder that is gone or lies on another machine."""
    if _HUB_NAME.fullmatch(name_or_path) and not Path(name_or_path).is_dir():
        return name_or_path
    if Path(name_or_path).is_dir():
        return Path(name_or_path).resolve().name
    return re.split(r"[/\\]", name_or_path.rstrip("/\\"))[-1]
