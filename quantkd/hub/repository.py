"""One repository on the Hub: made if it is missing, listed, committed to. Its errors are in words, without secrets."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.hf_api import RepoFile

from quantkd import __version__
from quantkd.errors import ConfigError
from quantkd.hub.failures import hub_errors

__all__ = ["HubRepository", "Operation", "PushedRepository", "RepositoryType", "Snapshot"]

RepositoryType = Literal["model", "dataset"]
Operation = CommitOperationAdd | CommitOperationDelete


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
    """

    commit: str
    files: dict[str, RepoFile]


class HubRepository:
    """A repository that is pushed to.

    Args:
        repo_id: `user/name`, or `name` for one of the token's owner.
        repo_type: "model" or "dataset".
        token: with write permission; else that of `hf auth login` or HF_TOKEN.
        branch: where commits go; "main" if None.
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
        """Make the repository if it is missing, and see to it that nothing becomes public by mistake.

        Args:
            private: whether a new one is; an old one stays as it is.

        Raises:
            ConfigError: it is there and public, and `private` was asked for.
            HubError: the Hub could not be reached, or refused.
        """
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

    def read(self) -> Snapshot:
        """The files at the newest commit.

        Returns:
            The commit and its files.

        Raises:
            HubError: the Hub could not be reached, or refused.
        """
        with self._talking(f"list {self.repo_id}"):
            commit = self._api.repo_info(self.repo_id, repo_type=self.repo_type, revision=self.branch).sha
            assert commit is not None
            entries = self._api.list_repo_tree(self.repo_id, repo_type=self.repo_type, revision=commit)
            return Snapshot(commit, {entry.path: entry for entry in entries if isinstance(entry, RepoFile)})

    def commit(self, operations: Sequence[Operation], message: str, parent: str) -> str:
        """Commit on top of `parent`, or fail if the branch has moved on.

        Args:
            operations: files to add and to remove.
            message: the commit's title.
            parent: the commit that the branch must be at.

        Returns:
            The new commit.

        Raises:
            TransientHubError: it may have been done or not; list the files to know.
            HubError: the Hub refused.
        """
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
        """What a push gives back.

        Args:
            commit: the revision that holds it.

        Returns:
            Its place.
        """
        prefix = "datasets/" if self.repo_type == "dataset" else ""
        url = f"{self._api.endpoint}/{prefix}{self.repo_id}"
        return PushedRepository(self.repo_id, self.repo_type, commit, self.private, url)

    def _talking(self, what: str) -> AbstractContextManager[None]:
        return hub_errors(what, self._token)
