"""Reading from the Hub: a revision is fixed to its commit first, and files come one by one into the Hub's cache."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from quantkd.errors import HubError, TransferSetError
from quantkd.files import read_regular
from quantkd.hub.failures import OfflineHubError, TransientHubError, hub_errors, wait_to_retry
from quantkd.hub.repository import RepositoryType
from quantkd.transfer_set.documents import MAX_DOCUMENT_BYTES
from quantkd.transfer_set.index import INDEX_NAME, Index, parse_index
from quantkd.transfer_set.shard import shard_name

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_ATTEMPTS = 5


class HubFiles:
    """The files of a repository at one commit. It travels to other processes, without its token.

    Args:
        repo_id: `user/name`.
        repo_type: "model" or "dataset".
        revision: a branch, tag or commit; the branch "main" if None.
        token: for a private repository.
    """

    def __init__(self, repo_id: str, repo_type: RepositoryType, revision: str | None, token: str | None) -> None:
        self.repo_id = repo_id
        self.repo_type: RepositoryType = repo_type
        self.revision = revision or "main"  # a commit, once a file was fetched
        self.folder = Path()  # of the commit in the Hub's cache, once a file was fetched
        self._token = token

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_token": None}

    def __str__(self) -> str:
        return f"{self.repo_id} at {self.revision}"

    def fetch(self, name: str, *, max_bytes: int, exact: bool = False) -> Path | None:
        """A file, from the cache or the Hub. The first one fixes the revision to a commit."""
        cached = self._find_cached(name)
        if cached is not None and _COMMIT.fullmatch(self.revision):
            self.folder = cached.parent
            return cached.resolve()
        for failures in range(1, _ATTEMPTS + 1):
            try:
                path = self._download(name, max_bytes, exact)
                break
            except OfflineHubError:
                if cached is None:
                    raise
                path = cached
                break
            except TransientHubError as error:
                if cached is not None:
                    logger.warning("%s Taking %s of %s from the cache.", error, name, self)
                    path = cached
                    break
                if failures == _ATTEMPTS:
                    raise
                wait_to_retry(failures)
        if path is None:
            return None
        self.folder = path.parent
        self.revision = self.folder.name  # the cache's layout: snapshots/<commit>/<file>
        return path.resolve()

    def holds(self, name: str) -> bool:
        """Whether the revision holds a file, which is not fetched."""
        try:
            with hub_errors(f"look for {name} in {self}", self._token):
                url = hf_hub_url(self.repo_id, name, revision=self.revision, repo_type=self.repo_type)
                get_hf_file_metadata(url, token=self._token)
        except HubError:
            return False
        return True

    def _find_cached(self, name: str) -> Path | None:
        found = try_to_load_from_cache(self.repo_id, name, revision=self.revision, repo_type=self.repo_type)
        return Path(found) if isinstance(found, str) else None

    def _download(self, name: str, max_bytes: int, exact: bool) -> Path | None:
        with hub_errors(f"fetch {name} of {self}", self._token, (EntryNotFoundError,)):
            try:
                url = hf_hub_url(self.repo_id, name, revision=self.revision, repo_type=self.repo_type)
                size = get_hf_file_metadata(url, token=self._token).size
                if size is not None and (size > max_bytes or (exact and size != max_bytes)):
                    raise HubError(
                        f"{name} of {self} has {size} bytes; expected {'' if exact else 'at most '}{max_bytes}. It was "
                        "not fetched: ask for another revision."
                    )
                return Path(
                    hf_hub_download(
                        self.repo_id, name, revision=self.revision, repo_type=self.repo_type, token=self._token
                    )
                )
            except LocalEntryNotFoundError as error:  # how the client says that the connection broke
                raise TransientHubError(f"Could not fetch {name} of {self}. Check the network.") from error
            except EntryNotFoundError:
                return None


class HubSource:
    """The files of a transfer set in a dataset repository.

    Args:
        files: of the repository, at the commit that holds `index`.
        index: the set's index.
    """

    is_remote = True

    def __init__(self, files: HubFiles, index: Index) -> None:
        self._files = files
        self._index = index

    @classmethod
    def open(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> HubSource:
        """The set at a revision, which is fixed to its commit now."""
        files = HubFiles(repo_id, "dataset", revision, token)
        try:
            path = files.fetch(INDEX_NAME, max_bytes=MAX_DOCUMENT_BYTES)
        except HubError as error:
            raise type(error)(f"There is no folder {repo_id!r} here. On the Hub: {error}") from error
        if path is None:
            raise TransferSetError(
                f"The transfer set {files} is incomplete: it has no {INDEX_NAME}, which is uploaded last. Ask for an "
                "earlier revision, or wait for the upload to end."
            )
        index = parse_index(read_regular(path, MAX_DOCUMENT_BYTES, error=TransferSetError))
        logger.info("Transfer set %s, digest %s", files, index.digest())
        return cls(files, index)

    def read_index(self) -> Index:
        """The index that was read when the source was opened."""
        return self._index

    def locate(self, shard: int, num_bytes: int) -> Path:
        """The shard's file in the Hub's cache, fetched if it is not there."""
        name = shard_name(shard)
        path = self._files.fetch(name, max_bytes=num_bytes, exact=True)
        if path is None:
            raise TransferSetError(f"{self._files} holds no {name}, which its index lists. Ask for another revision.")
        return path

    def __str__(self) -> str:
        return str(self._files)
