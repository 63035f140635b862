"""One repository on the Hub: made if it is missing, listed, committed to. Its errors are in words, without secrets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import RepoFile

from quantkd import __version__
from quantkd.errors import ConfigError, HubError
from quantkd.hub.failures import hub_errors

RepositoryType = Literal["model", "dataset"]
Operation = CommitOperationAdd | CommitOperationDelete
# What the Hub's own form for a new repository puts there.
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


@dataclass(frozen=True)
class Snapshot:
    """The files of a repository at one commit.

    Args:
        commit: the revision.
        files: by their paths.
        names: of all files and folders at the top.
    """

    commit: str
    files: dict[str, RepoFile]
    names: tuple[str, ...]

    def check_purpose(self, repo_id: str, is_ours: Callable[[str], bool], what: str) -> None:
        """Refuse a repository that was made for something else: its page would be replaced."""
        others = [name for name in self.names if name not in _BLANK]
        if others and not any(is_ours(name) for name in others):
            raise ConfigError(
                f"{repo_id} holds {', '.join(others[:4])}{' and others' if len(others) > 4 else ''}, and no {what}; "
                "this push would put its page over the one there. Choose another name, or empty that repository first."
            )


class HubRepository:
    """A repository that is pushed to.

    Args:
        repo_id: `user/name`, or `name` for one of the token's owner.
        repo_type: "model" or "dataset".
        token: with write permission; else that of `hf auth login` or HF_TOKEN.
        branch: where commits go; "main" if None. One that is not there is made.
    """

    def __init__(
        self, repo_id: str, repo_type: RepositoryType, *, token: str | None = None, branch: str | None = None
    ) -> None:
        self.repo_id = repo_id
        self.repo_type = repo_type
        self.branch = branch or "main"
        self.private = True
        self._token = token
        self._api = HfApi(token=token, library_name="quantkd", library_version=__version__)

    def ensure(self, private: bool) -> None:
        """Make the repository if it is missing, and see to it that nothing becomes public by mistake."""
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
                found = self._api.repo_info(self.repo_id, repo_type=self.repo_type)
            except RepositoryNotFoundError:
                self._api.create_repo(self.repo_id, repo_type=self.repo_type, private=private, exist_ok=True)
                found = self._api.repo_info(self.repo_id, repo_type=self.repo_type)
        self.private = bool(found.private)
        if private and not self.private:
            raise ConfigError(
                f"{self.repo_id} is public, and this push asks for a private repository. Pass private=False "
                "(--public) if everybody may read it, or choose another name."
            )
        with self._talking(f"look at the branch {self.branch} of {self.repo_id}"):
            try:
                self._api.repo_info(self.repo_id, repo_type=self.repo_type, revision=self.branch)
            except RevisionNotFoundError:
                self._api.create_branch(self.repo_id, branch=self.branch, repo_type=self.repo_type, exist_ok=True)

    def read(self) -> Snapshot:
        """The files at the newest commit."""
        with self._talking(f"list {self.repo_id}"):
            commit = self._api.repo_info(self.repo_id, repo_type=self.repo_type, revision=self.branch).sha
            assert commit is not None
            entries = list(self._api.list_repo_tree(self.repo_id, repo_type=self.repo_type, revision=commit))
            files = {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}
            return Snapshot(commit, files, tuple(entry.path for entry in entries))

    def commit(self, operations: Sequence[Operation], message: str, parent: str) -> str:
        """Commit on top of `parent`, or fail if the branch has moved on."""
        with self._talking(f"commit to {self.repo_id}"):
            done = self._api.create_commit(
                self.repo_id,
                operations=list(operations),
                commit_message=message,
                repo_type=self.repo_type,
                revision=self.branch,
                parent_commit=parent,
                num_threads=2,
            )
        return done.oid

    def pushed(self, commit: str) -> PushedRepository:
        """What a push gives back."""
        prefix = "datasets/" if self.repo_type == "dataset" else ""
        url = f"{self._api.endpoint}/{prefix}{self.repo_id}"
        return PushedRepository(self.repo_id, self.repo_type, commit, self.private, url)

    def _talking(self, what: str) -> AbstractContextManager[None]:
        return hub_errors(what, self._token)
