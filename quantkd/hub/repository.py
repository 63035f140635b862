"""A repository that is pushed to: created if it is missing, listed, committed to; and what no file of it may hold."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from quantkd import __version__
from quantkd.errors import ConfigError, HubError
from quantkd.remote import RepositoryType, Result, TransientHubError, find_token, hub_errors, retry

Operation = CommitOperationAdd | CommitOperationDelete
PUSH_ATTEMPTS = 8
# What the Hub's form for a new repository creates.
_BLANK = (".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "README.md")


@dataclass(frozen=True)
class PushedRepository:
    """Where something was pushed to.

    Args:
        repo_id: `user/name`.
        repo_type: "model" or "dataset".
        commit: the revision that holds all of it, 40 hexadecimal digits.
        private: whether only its owner can read it.
        url: its page.
    """

    repo_id: str
    repo_type: RepositoryType
    commit: str
    private: bool
    url: str

    def __str__(self) -> str:
        return f"{self.url} at {self.commit} ({'private' if self.private else 'public'})"


class Snapshot(NamedTuple):
    """The files of a repository at one commit."""

    commit: str
    files: dict[str, RepoFile]


class HubRepository:
    """A repository that is pushed to.

    Args:
        repo_id: `user/name`, or `name` for one of the token's owner.
        repo_type: "model" or "dataset".
        token: with write permission; else that of `hf auth login` or HF_TOKEN.
        branch: where commits go; "main" if None. Created if it is missing.
    """

    def __init__(
        self, repo_id: str, repo_type: RepositoryType, *, token: str | None = None, branch: str | None = None
    ) -> None:
        self.repo_id = repo_id
        self.private = True
        self._branch = branch or "main"
        self._token = token
        self._api = HfApi(token=token, library_name="quantkd", library_version=__version__)
        self._kind: Any = {"repo_type": repo_type}

    def ensure(self, private: bool) -> None:
        """Create the repository and its branch if they are missing; refuse to make anything public by mistake."""
        if not (self._token or get_token()):
            raise HubError(
                f"There is no token to push to {self.repo_id} with. Log in with `hf auth login`, or set HF_TOKEN; the "
                "token needs write permission."
            )
        if "/" not in self.repo_id:
            with self._talking("ask who owns the token"):
                self.repo_id = f"{self._api.whoami()['name']}/{self.repo_id}"
        with self._talking(f"look at {self.repo_id}"):
            try:
                found = self._api.repo_info(self.repo_id, **self._kind)
            except RepositoryNotFoundError:
                self._api.create_repo(self.repo_id, private=private, exist_ok=True, **self._kind)
                found = self._api.repo_info(self.repo_id, **self._kind)
        self.private = bool(found.private)
        if private and not self.private:
            raise ConfigError(
                f"{self.repo_id} is public, and this push asks for a private repository. Pass private=False "
                "(--public) if everybody may read it, or choose another name."
            )
        with self._talking(f"look at the branch {self._branch} of {self.repo_id}"):
            try:
                self._api.repo_info(self.repo_id, revision=self._branch, **self._kind)
            except RevisionNotFoundError:
                self._api.create_branch(self.repo_id, branch=self._branch, exist_ok=True, **self._kind)

    def read(self, is_ours: Callable[[str], bool], what: str) -> Snapshot:
        """The newest commit; a repository that was made for something else is refused: its page would be replaced."""
        with self._talking(f"list {self.repo_id}"):
            commit = str(self._api.repo_info(self.repo_id, revision=self._branch, **self._kind).sha)
            entries = list(self._api.list_repo_tree(self.repo_id, revision=commit, **self._kind))
        others = [entry.path for entry in entries if entry.path not in _BLANK]
        if others and not any(is_ours(name) for name in others):
            raise ConfigError(
                f"{self.repo_id} holds {', '.join(others[:4])}{' and others' if len(others) > 4 else ''}, and no "
                f"{what}; this push would replace its page. Choose another name, or empty that repository first."
            )
        return Snapshot(commit, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)})

    def commit(self, operations: Sequence[Operation], message: str, parent: str) -> PushedRepository:
        """Commit on top of `parent`, or fail if the branch has moved on."""
        with self._talking(f"commit to {self.repo_id}"):
            done = self._api.create_commit(
                self.repo_id,
                operations=list(operations),
                commit_message=message,
                revision=self._branch,
                parent_commit=parent,
                num_threads=2,
                **self._kind,
            )
        return self.pushed(done.oid)

    def pushed(self, commit: str) -> PushedRepository:
        """What a push returns."""
        kind = self._kind["repo_type"]
        url = f"{self._api.endpoint}/{'datasets/' if kind == 'dataset' else ''}{self.repo_id}"
        return PushedRepository(self.repo_id, kind, commit, self.private, url)

    def _talking(self, what: str) -> AbstractContextManager[None]:
        return hub_errors(what, self._token)


def create_repository(name: str, *, private: bool, token: str | None) -> str:
    """Create a model repository, or find it; returns its name with the owner's."""
    repository = HubRepository(name, "model", token=token)
    persevere(lambda: repository.ensure(private), name)
    return repository.repo_id


def persevere(step: Callable[[], Result], repo_id: str, attempts: int = PUSH_ATTEMPTS) -> Result:
    """What `step` of a push returns, tried again after failures that may not come again."""
    try:
        return retry(step, attempts)
    except TransientHubError as error:
        raise HubError(
            f"The push to {repo_id} stopped after {attempts} failures in a row: {error} Push again to go on where it "
            "stopped; files that arrived are not sent again."
        ) from error


def check_shareable(name: str, data: bytes, secrets: Mapping[str, str], *, paths: bool = True) -> None:
    """Refuse a file that holds a secret or, with `paths`, names the home folder. The message holds neither."""
    text = data.decode("utf-8", errors="replace")
    found = next((what for secret, what in secrets.items() if secret in text), None)
    if found is None and (place := find_token(text)) is not None:
        found = f"what looks like an access token at character {place}"
    if found is not None:
        raise ConfigError(f"{name} holds {found}; expected no secret in what is pushed. Remove it from the file.")
    homes = {str(Path.home()), os.path.expanduser("~")} - {"/"}
    if paths and any(re.search(re.escape(home) + r"(?![\w.-])", text) for home in homes):
        raise ConfigError(
            f"{name} names your home folder; expected no local path in what is pushed. Name the model by its folder "
            "alone or by its name on the Hub."
        )
