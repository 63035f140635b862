"""A repository that is pushed to: created if it is missing, listed, committed to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import starmap
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.hf_api import RepoSibling
from safetensors import SafetensorError, safe_open

from quantkd.errors import ConfigError, DataError, HubError
from quantkd.names import __version__
from quantkd.remote import RepositoryType, check_shareable, find_secrets, hub_errors, retry

Operation = CommitOperationAdd | CommitOperationDelete
Files = Mapping[str, bytes | Path]
IsOurs = Callable[[Collection[str]], bool]  # whether these are the names of a repository that may be pushed to
PUSH_ATTEMPTS = 8
# What the Hub's form for a new repository creates.
_BLANK = (".gitattributes", ".gitignore", "LICENSE", "LICENSE.md", "README.md")


@dataclass(frozen=True)
class PushedRepository:
    """Where something was pushed to."""

    repo_id: str
    commit: str  # the revision that holds all of it
    private: bool
    url: str

    def __str__(self) -> str:
        return f"{self.url} at {self.commit} ({'private' if self.private else 'public'})"


class HubRepository:
    """A branch of a repository that is pushed to; `repo_id` gets the owner's name once the repository is created."""

    def __init__(
        self, repo_id: str, repo_type: RepositoryType, private: bool, token: str | None, branch: str | None = None
    ) -> None:
        self.repo_id, self._url, self._private = repo_id, "", private
        self._branch = branch or "main"
        self._token = token
        self._api = HfApi(token=token, library_name="quantkd", library_version=__version__)
        self._kind: Any = {"repo_type": repo_type}

    def ensure(self) -> None:
        """Create the repository and its branch if they are missing; refuse to make anything public by mistake."""
        if not (self._token or get_token()):
            raise HubError(f"There is no token to push to {self.repo_id} with. Use `hf auth login`, or set HF_TOKEN.")
        with hub_errors(f"find or create {self.repo_id}", self._token):
            url = self._api.create_repo(self.repo_id, private=self._private, exist_ok=True, **self._kind)
            self.repo_id, self._url = url.repo_id, str(url)
            is_private = bool(self._api.repo_info(self.repo_id, **self._kind).private)
        if self._private and not is_private:
            raise ConfigError(
                f"{self.repo_id} is public, and this push asks for a private repository. Pass private=False "
                "(--public) if everybody may read it, or choose another name."
            )
        self._private = is_private
        with hub_errors(f"create the branch {self._branch} of {self.repo_id}", self._token):
            self._api.create_branch(self.repo_id, branch=self._branch, exist_ok=True, **self._kind)

    def read(self, is_ours: IsOurs, what: str) -> tuple[str, dict[str, RepoSibling]]:
        """The newest commit and its files. A repository made for something else is refused: its page would go."""
        with hub_errors(f"list {self.repo_id}", self._token):
            found: Any = self._api.repo_info(self.repo_id, revision=self._branch, files_metadata=True, **self._kind)
        files = {file.rfilename: file for file in found.siblings or ()}
        others = [name for name in files if name not in _BLANK]
        if others and not is_ours(others):
            raise ConfigError(
                f"{self.repo_id} holds {', '.join(others[:4])}{' and others' if len(others) > 4 else ''}, and no "
                f"{what}; this push would replace its page. Choose another name, or empty that repository first."
            )
        return str(found.sha), files

    def commit(self, operations: Sequence[Operation], message: str, parent: str) -> PushedRepository:
        """Commit on top of `parent`, or fail if the branch has moved on."""
        with hub_errors(f"commit to {self.repo_id}", self._token):
            where = {**self._kind, "revision": self._branch, "parent_commit": parent, "num_threads": 2}
            done = self._api.create_commit(self.repo_id, list(operations), commit_message=message, **where)
        return self.pushed(done.oid)

    def replace(
        self, make: Callable[[str], Files], is_ours: IsOurs, what: str, owned: Sequence[str], title: str, attempts: int
    ) -> PushedRepository:
        """Push the files that `make` gives for the full name, in one commit, in place of what is there of `owned`."""

        def attempt() -> PushedRepository:
            self.ensure()
            commit, there = self.read(is_ours, what)
            files = make(self.repo_id)
            # What an earlier push left and this one does not bring would describe other weights, or be loaded as such.
            stale = [name for name in there if name not in files and any(fnmatch(name, each) for each in owned)]
            added = starmap(CommitOperationAdd, files.items())
            operations: list[Operation] = [*added, *map(CommitOperationDelete, stale)]
            return self.commit(operations, title, commit)

        return retry(attempt, attempts)

    def pushed(self, commit: str) -> PushedRepository:
        """What a push returns."""
        return PushedRepository(self.repo_id, commit, self._private, self._url)


def refuse_secrets(files: Files, token: str | None) -> None:
    """Refuse to push a secret or, but in a vocabulary, a local path; of weights, their header can hold text."""
    for name, content in files.items():
        if isinstance(content, Path) and content.suffix == ".safetensors":
            try:
                with safe_open(content, framework="pt") as weights:
                    data = f"{weights.metadata()} {list(weights.keys())}".encode()
            except SafetensorError as error:
                raise DataError(f"{content} is not a safetensors file: {error}. Write it again.") from error
        else:
            data = content if isinstance(content, bytes) else content.read_bytes()
        check_shareable(name, data, find_secrets(token))
