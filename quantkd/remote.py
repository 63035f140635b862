"""The Hub as every package may use it: files at a fixed commit, failures worth a retry, messages without secrets."""

from __future__ import annotations

import json
import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils import httpx  # type: ignore[attr-defined]  # the client's HTTP library, under the name that huggingface_hub gives it

from quantkd.errors import ConfigError, HubError

RepositoryType = Literal["model", "dataset"]
Result = TypeVar("Result")
logger = logging.getLogger(__name__)  # also says which commit is read; the command line prints it

# Files of tokenizers, in which "/root" is a token like any other.
VOCABULARIES = (
    "added_tokens.json", "merges.txt", "sentencepiece.bpe.model", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt",
)  # fmt: skip
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TOKEN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|(?:sk|ghp|gho|glpat|xox[abp])[-_][A-Za-z0-9_-]{16,})")
_SECRET_VARIABLE = re.compile(
    r"TOKEN(?!IZERS)|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY|_KEY$|_PAT$",
    re.IGNORECASE,
)
_LONGEST_WORD = 15  # such as "unauthenticated"; a longer value of letters alone is taken for a secret
# A later request may succeed; 412: somebody else has committed since.
_TRANSIENT = (408, 409, 412, 425, 429)
_READ_ATTEMPTS = 5


class TransientHubError(HubError):
    """A failure that may not come again: too many requests, a server's fault, a broken connection."""


def find_secrets(token: str | None = None) -> dict[str, str]:
    """The secrets that this process knows, each with a description of it."""
    secrets = {}
    for name, value in os.environ.items():
        # A switch, a number or a path is not a secret.
        is_word = len(value) < 8 or value.isdigit() or (value.isalpha() and len(value) <= _LONGEST_WORD)
        names_path = name.endswith(("FILE", "PATH", "DIR")) and value.startswith(("/", "~", "."))
        may_be = _SECRET_VARIABLE.search(name) and not (is_word or names_path)
        if may_be and not os.path.exists(os.path.expanduser(value)):
            secrets[value] = f"the value of {name}"
    tokens = ((huggingface_hub.get_token(), "the Hub's token"), (token, "the token that was passed"))
    secrets |= {secret: what for secret, what in tokens if secret}
    return secrets | {json.dumps(secret)[1:-1]: what for secret, what in secrets.items()}  # as it stands in JSON


def redact(text: str, secrets: Mapping[str, str]) -> str:
    """The text with every secret replaced, for messages."""
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, "[secret]")
    return _TOKEN.sub("[secret]", text)


def check_shareable(name: str, data: bytes, secrets: Mapping[str, str]) -> None:
    """Refuse a file that holds a secret or, but for a vocabulary, names the home folder. The message holds neither."""
    text = data.decode("utf-8", errors="replace")
    found = next((what for secret, what in secrets.items() if secret in text), None)
    if found is None and (match := _TOKEN.search(text)):
        found = f"what looks like an access token at character {match.start()}"
    if found is not None:
        raise ConfigError(f"{name} holds {found}; expected no secret in what is pushed. Remove it from the file.")
    homes = {str(Path.home()), os.path.expanduser("~")} - {"/"}
    homes |= {json.dumps(home)[1:-1] for home in homes}
    if name not in VOCABULARIES and any(re.search(re.escape(home) + r"(?![\w.-])", text) for home in homes):
        raise ConfigError(f"{name} names your home folder; expected no local path in what is pushed. Remove it there.")


@contextmanager
def hub_errors(what: str, token: str | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises into a HubError without secrets. Errors of the disk or of a program pass."""
    try:
        yield
    except (
        ConnectionError, TimeoutError, RuntimeError, httpx.HTTPError, json.JSONDecodeError,
        errors.FileMetadataError, errors.HFValidationError, errors.LocalEntryNotFoundError,
    ) as error:  # fmt: skip
        if isinstance(error, HubError):
            raise
        # `create_commit` wraps the failure of an upload in RuntimeError; any other is not about the network.
        if isinstance(error, RuntimeError) and not isinstance(error.__cause__, (OSError, httpx.HTTPError)):
            raise
        chain: list[BaseException] = [error]
        while (cause := chain[-1].__cause__) is not None and cause not in chain:
            chain.append(cause)
        # Without a status the connection failed, which the client also reports as LocalEntryNotFoundError.
        status = next((link.response.status_code for link in chain if isinstance(link, errors.HfHubHTTPError)), 500)
        is_final = any(isinstance(link, (errors.FileMetadataError, ValueError)) for link in chain)
        kind, advice = HubError, "Check the name, the revision and the token's permissions (`hf auth whoami`)."
        if any(isinstance(link, errors.OfflineModeIsEnabled) for link in chain):
            advice = "Unset HF_HUB_OFFLINE to use the network."
        elif status in _TRANSIENT or (status >= 500 and not is_final):
            kind, advice = TransientHubError, "Check the network. The same call goes on where it stopped."
        secrets = find_secrets(token)
        reason = " ".join(redact(str(error) or type(error).__name__, secrets).split())
        message = f"Could not {what}: {reason.rstrip('.')}. {advice}"
        shown = "".join(traceback.format_exception(error))  # what --traceback shows of it may quote a secret
        raise kind(message) from (error if redact(shown, secrets) == shown else None)


def retry(call: Callable[[], Result], attempts: int) -> Result:
    """What `call` returns, called again after failures that may not come again, with longer and longer waits."""
    failures = 0
    while True:
        try:
            return call()
        except TransientHubError as error:
            failures += 1
            if failures >= attempts:
                if attempts == 1:
                    raise
                raise TransientHubError(f"After {failures} attempts: {error}") from error
        time.sleep(min(2.0 ** (failures - 1), 60.0))


class RemoteFiles:
    """The files of a repository at one commit, which the first fetch fixes. It travels without its token."""

    def __init__(self, repo_id: str, repo_type: RepositoryType, revision: str | None, token: str | None) -> None:
        self.repo_id, self.revision, self._token = repo_id, revision or "main", token
        self.repo_type: RepositoryType = repo_type

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_token": None}

    def __str__(self) -> str:
        return f"{self.repo_id} at {self.revision}"

    def fetch(self, name: str, max_bytes: int) -> Path | None:
        """A file in the Hub's cache, fetched if need be; None if the revision does not hold it."""
        cached = self._find_cached(name)
        is_fixed = _COMMIT.fullmatch(self.revision) is not None
        if cached is None or not (is_fixed or huggingface_hub.is_offline_mode()):
            try:
                if not retry(lambda: self._download(name, max_bytes), 1 if cached else _READ_ATTEMPTS):
                    return None
            except HubError as error:
                if cached is None or not isinstance(error, TransientHubError):
                    here = "" if is_fixed else f"There is no folder {self.repo_id!r} here. On the Hub: "
                    raise type(error)(f"{here}{error}") from error
                logger.warning("%s Taking %s of %s from the cache.", error, name, self)
            cached = self._find_cached(name)
        if cached is None:  # removed since, by another process
            raise HubError(f"{name} of {self} is not in the Hub's cache any more. Try again.")
        self.revision = cached.commit_hash
        return Path(cached.local_path)

    def holds(self, name: str) -> bool:
        """Whether the revision holds a file, which is not fetched."""
        with hub_errors(f"look for {name} in {self}", self._token):
            return huggingface_hub.file_exists(filename=name, token=self._token, **self._place())

    def _place(self) -> dict[str, Any]:
        return {"repo_id": self.repo_id, "repo_type": self.repo_type, "revision": self.revision}

    def _find_cached(self, name: str) -> huggingface_hub.DryRunFileInfo | None:
        try:
            how: Any = {**self._place(), "local_files_only": True, "dry_run": True}
            return huggingface_hub.hf_hub_download(filename=name, **how)  # type: ignore[no-any-return]
        except (errors.LocalEntryNotFoundError, errors.HFValidationError):
            return None

    def _download(self, name: str, max_bytes: int) -> bool:
        """Fetch a file into the cache, unless it is too large; returns whether the revision holds it."""
        with hub_errors(f"fetch {name} of {self}", self._token):
            url = huggingface_hub.hf_hub_url(filename=name, **self._place())
            try:
                size = huggingface_hub.get_hf_file_metadata(url, token=self._token).size
            except errors.RemoteEntryNotFoundError:
                return False
            if size is not None and size > max_bytes:
                raise HubError(
                    f"{name} of {self} has {size} bytes; expected at most {max_bytes}. It was not fetched: ask for "
                    "another revision."
                )
            huggingface_hub.hf_hub_download(filename=name, token=self._token, **self._place())
            return True
