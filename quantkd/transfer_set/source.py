"""Where the files of a transfer set come from: a folder here, or a repository on the Hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from quantkd.errors import TransferSetError
from quantkd.files import read_regular
from quantkd.names import split_revision
from quantkd.remote import RemoteFiles, logger as revisions
from quantkd.transfer_set.documents import MAX_DOCUMENT_BYTES
from quantkd.transfer_set.index import (
    INDEX_NAME,
    PLAN_NAME,
    Index,
    ShardRecord,
    parse_index,
    read_index,
    read_plan,
    read_record,
    record_name,
)
from quantkd.transfer_set.shard import shard_name

_DOWNLOAD_MARK = Path(".cache") / "huggingface"


def find_source(
    path: str | Path, *, revision: str | None = None, token: str | None = None, allow_incomplete: bool = False
) -> ShardSource:
    """What a caller means by the place of a set: a folder, or as text also a repository on the Hub."""
    repository, revision = split_revision(path if isinstance(path, str) else str(path.absolute()), revision)
    if repository is None:
        return FolderSource(Path(path), allow_incomplete)
    return HubSource(repository, revision, token)


class FolderSource:
    """The files of a set in a folder; with `allow_incomplete`, an unfinished set counts for its committed shards."""

    is_remote = False

    def __init__(self, path: Path, allow_incomplete: bool = False) -> None:
        self.path = path
        self.allow_incomplete = allow_incomplete
        self.is_downloaded = (path / _DOWNLOAD_MARK).exists()  # by snapshot_download(local_dir=...) or `hf download`

    def read_index(self) -> Index:
        """The index of a finished set, or one over the committed shards of an unfinished set."""
        path = self.path
        if not path.is_dir():
            raise TransferSetError(
                f"There is no transfer set at {path}: it is not a folder. Capture one, or fix the path."
            )
        index, found = path / INDEX_NAME, None
        if not index.exists():
            try:
                found = self._read_unfinished()
            except TransferSetError:
                if not index.exists():
                    raise
        # A capture that has ended meanwhile has removed some of its records.
        return read_index(path) if found is None or index.exists() else found

    def _read_unfinished(self) -> Index:
        path = self.path
        if not (path / PLAN_NAME).exists():
            raise TransferSetError(
                f"There is no transfer set at {path}: it has neither {INDEX_NAME} nor {PLAN_NAME}. "
                "Capture one, or fix the path."
            )
        try:
            plan = read_plan(path)
        except TransferSetError as error:
            raise TransferSetError(f"There is no transfer set at {path}: it has no {INDEX_NAME}. {error}") from error
        records: list[ShardRecord] = []
        while len(records) < plan.num_shards and (path / record_name(len(records))).exists():
            records.append(read_record(path, len(records)))
        if not self.allow_incomplete:
            raise TransferSetError(
                f"The transfer set at {path} is unfinished: it has the first {len(records)} of {plan.num_shards} "
                "shards. Run its capture again to finish it, or open it with allow_incomplete=True to read those."
            )
        return replace(Index.from_records(plan, records), complete=False)

    def locate(self, shard: int, num_bytes: int) -> Path:
        """The shard's place in the folder; whether it is there, and how large, is checked by who opens it."""
        return self.path / shard_name(shard)

    def __str__(self) -> str:
        return str(self.path)


class HubSource:
    """The files of a set in a dataset repository, at one commit."""

    is_remote = True  # each shard is fetched and hashed when it is first touched
    is_downloaded = False

    def __init__(self, repo_id: str, revision: str | None, token: str | None) -> None:
        self._files = RemoteFiles(repo_id, "dataset", revision, token)

    def read_index(self) -> Index:
        """The index at the revision, which is fixed to its commit."""
        path = self._files.fetch(INDEX_NAME, MAX_DOCUMENT_BYTES)
        if path is None:
            raise TransferSetError(
                f"The transfer set {self._files} is incomplete: it has no {INDEX_NAME}, which is uploaded last. Ask "
                "for an earlier revision, or wait for the upload to end."
            )
        # Resolved, for the cache links to its blobs.
        index = parse_index(read_regular(path.resolve(), MAX_DOCUMENT_BYTES, error=TransferSetError))
        revisions.info("Transfer set %s, digest %s", self._files, index.digest())
        return index

    def locate(self, shard: int, num_bytes: int) -> Path:
        """The shard's file in the Hub's cache, fetched if it is not there."""
        name = shard_name(shard)
        path = self._files.fetch(name, num_bytes)
        if path is None:
            raise TransferSetError(f"{self._files} holds no {name}, which its index lists. Ask for another revision.")
        return path.resolve()

    def __str__(self) -> str:
        return str(self._files)


ShardSource: TypeAlias = FolderSource | HubSource
