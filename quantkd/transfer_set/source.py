"""Where the files of a transfer set come from: a folder here, or, in `quantkd.hub`, a repository on the Hub."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from quantkd.errors import ConfigError, TransferSetError
from quantkd.transfer_set.index import (
    INDEX_NAME,
    PLAN_NAME,
    Index,
    ShardRecord,
    read_index,
    read_plan,
    read_record,
    record_name,
)
from quantkd.transfer_set.shard import shard_name

_DOWNLOAD_MARK = Path(".cache") / "huggingface"
_REPOSITORY_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def find_source(path: str | Path, revision: str | None, token: str | None) -> Path | ShardSource:
    """What a caller means by the place of a set."""
    repository, revision = split_revision(path, revision) if isinstance(path, str) else (None, revision)
    if repository is not None:
        from quantkd.hub.reading import HubSource  # the Hub's client is not needed for a folder

        return HubSource.open(repository, revision=revision, token=token)
    if revision is not None:
        raise ConfigError(f"revision is {revision!r}, and {path} is a folder; only a set on the Hub has revisions.")
    return Path(path)


def is_repository_name(name: str) -> bool:
    """Whether `name` has the form of a repository's name on the Hub."""
    return _REPOSITORY_NAME.fullmatch(name) is not None


def split_revision(place: str, revision: str | None = None) -> tuple[str | None, str | None]:
    """The repository on the Hub that a caller means, and its revision."""
    name, mark, behind = place.partition("@")
    if Path(place).exists() or not is_repository_name(name) or (mark and not behind):
        return None, revision
    if mark and revision not in (None, behind):
        raise ConfigError(f"{place} names one revision, and revision={revision!r} another. Leave one of them out.")
    return name, behind or revision


class ShardSource(Protocol):
    """What a `ShardStore` asks for its files. A source travels to other processes with the store."""

    is_remote: bool
    """Whether shards are fetched when they are first touched; each is then hashed before a row is read."""

    def read_index(self) -> Index:
        """The index of the finished set."""

    def locate(self, shard: int, num_bytes: int) -> Path:
        """A plain file that holds the shard, fetched if need be."""

    def __str__(self) -> str:
        """Where the set lies, as it is printed: a folder, or a repository and its commit."""


class FolderSource:
    """The files of a set in a folder.

    Args:
        path: the folder.
        allow_incomplete: take an unfinished set for its committed shards.
    """

    is_remote = False

    def __init__(self, path: Path, allow_incomplete: bool = False) -> None:
        self.path = path
        self.allow_incomplete = allow_incomplete

    @property
    def is_downloaded(self) -> bool:
        """Whether `snapshot_download(local_dir=...)` or `hf download` wrote the folder."""
        return (self.path / _DOWNLOAD_MARK).exists()

    def read_index(self) -> Index:
        """The index of a finished set, or one over the committed shards of an unfinished set."""
        return _find_index(self.path, self.allow_incomplete)

    def locate(self, shard: int, num_bytes: int) -> Path:
        """The shard's place in the folder; whether it is there, and how large, is checked by who opens it."""
        return self.path / shard_name(shard)

    def __str__(self) -> str:
        return str(self.path)


def _find_index(path: Path, allow_incomplete: bool) -> Index:
    """The index of a finished set, or one over the committed shards of an unfinished set."""
    if not path.is_dir():
        raise TransferSetError(f"There is no transfer set at {path}: it is no folder. Capture one, or mend the path.")
    if (path / INDEX_NAME).exists():
        return read_index(path)
    if not (path / PLAN_NAME).exists():
        raise TransferSetError(
            f"There is no transfer set at {path}: it has neither {INDEX_NAME} nor {PLAN_NAME}. "
            "Capture one, or mend the path."
        )
    try:
        plan = read_plan(path)
    except TransferSetError as error:
        raise TransferSetError(f"There is no transfer set at {path}: it has no {INDEX_NAME}. {error}") from error
    records: list[ShardRecord] = []
    while len(records) < plan.num_shards and (path / record_name(len(records))).exists():
        records.append(read_record(path, len(records)))
    if not allow_incomplete:
        raise TransferSetError(
            f"The transfer set at {path} is unfinished: it has the first {len(records)} of {plan.num_shards} shards. "
            "Run its capture again to finish it, or open it with allow_incomplete=True to read those."
        )
    return replace(Index.from_records(plan, records), complete=False)
