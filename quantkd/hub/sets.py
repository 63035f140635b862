"""A transfer set into a dataset repository, so that every commit on the way is a whole set or says that it is none.

The index goes last, in a commit of its own. A push looks at the newest commit, does the next step towards the wanted
files, and looks again after any failure; so a push that was cut off goes on where it stopped:

1. If shards that are there must change or go, the index goes first: the repository then says that it is incomplete.
   Shards that are only added leave the index alone, which does not name them.
2. Shards are uploaded, in commits of bounded size. Those that are there with the same content are not sent again.
3. With all shards in place, the index follows.

Each commit names its parent, so a step decided on an old listing is refused by the Hub when somebody else was faster.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile

from quantkd.errors import ConfigError, HubError, TransferSetError
from quantkd.hub.card import check_licence, render_set_card
from quantkd.hub.failures import TransientHubError, wait_to_retry
from quantkd.hub.repository import HubRepository, Operation, PushedRepository, Snapshot
from quantkd.hub.secrets import check_shareable, find_secrets
from quantkd.transfer_set.index import INDEX_NAME, Index
from quantkd.transfer_set.plan import MAX_SHARDS
from quantkd.transfer_set.reader import TransferSet
from quantkd.transfer_set.shard import shard_name
from quantkd.transfer_set.store import ShardStore

CARD_NAME = "README.md"
_SHARD_PREFIX, _SHARD_SUFFIX = "shard-", ".safetensors"
_ATTEMPTS = 8
_MAX_STEPS = 4 * MAX_SHARDS
MAX_COMMIT_BYTES = 2**31
MAX_COMMIT_FILES = 64
_CHUNK_BYTES = 2**20


@dataclass(frozen=True)
class _File:
    """A file as the repository must hold it; `content` is a path or the bytes themselves."""

    name: str
    content: Path | bytes
    size: int
    sha256: str

    def is_at(self, remote: RepoFile | None) -> bool:
        """Whether the repository holds just this: large files are listed by sha256, small ones by git's own hash."""
        if remote is None or remote.size != self.size:
            return False
        if remote.lfs is not None:
            return bool(remote.lfs.sha256 == self.sha256)
        data = self.content if isinstance(self.content, bytes) else self.content.read_bytes()
        return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())

    def addition(self) -> CommitOperationAdd:
        return CommitOperationAdd(self.name, self.content)


@dataclass(frozen=True)
class _Step:
    message: str
    operations: Sequence[Operation]
    files: list[str]


def push_transfer_set(
    transfer_set: TransferSet,
    repo_id: str,
    *,
    private: bool = True,
    licence: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    max_commit_bytes: int = MAX_COMMIT_BYTES,
) -> PushedRepository:
    """Upload a set as a dataset repository, or replace the one that is there.

    Args:
        transfer_set: a whole set, not a view.
        repo_id: `user/name`, or `name` for one of the token's owner; made if it is not there.
        private: False makes a new repository public, and is needed to push to one that is.
        licence: of the rows, as the Hub names it, such as "mit"; the card says that none was stated if None.
        token: with write permission; else that of `hf auth login` or HF_TOKEN.
        revision: the branch; "main" if None.
        max_commit_bytes: shards of one commit, which holds at least one.

    Returns:
        The repository and the commit that holds the set.

    Raises:
        ConfigError: a view, joined sets, a public repository without `private=False`, one that holds something else, or
            a set that names a secret.
        TransferSetError: a set that is unfinished or damaged.
        HubError: the Hub could not be reached, or refused. The same call goes on where it stopped.
    """
    store = _whole_store(transfer_set)
    check_licence(licence)
    repository = HubRepository(repo_id, "dataset", token=token, branch=revision)
    wanted = _wanted_files(store, transfer_set, repo_id, licence, token)
    _check_content(wanted)
    failures, ensured = 0, False
    for _ in range(_MAX_STEPS):
        try:
            if not ensured:
                repository.ensure(private)
                ensured = True
                if repository.repo_id != repo_id:  # the owner's name was left out, and the card names it
                    wanted = _wanted_files(store, transfer_set, repository.repo_id, licence, token)
            # After each commit the files are listed anew: what the Hub holds decides, not what this process sent.
            snapshot = repository.read()
            snapshot.check_purpose(repository.repo_id, _is_shard, "transfer set")
            step = _next_step(snapshot, wanted, max_commit_bytes)
            if step is None:
                return repository.pushed(snapshot.commit)
            if repository.commit(step.operations, step.message, snapshot.commit) == snapshot.commit:
                raise HubError(
                    f"{repo_id} did not take {', '.join(step.files[:3])}; a .gitignore there may name them. Remove it, "
                    "or choose another repository."
                )
            failures = 0
        except TransientHubError as error:
            failures += 1
            if failures == _ATTEMPTS:
                raise HubError(
                    f"The push to {repo_id} stopped after {failures} failures in a row: {error} Push again to go on "
                    "where it stopped."
                ) from error
            wait_to_retry(failures)
    raise HubError(
        f"{repo_id} still is not as it should be after {_MAX_STEPS} steps: somebody else seems to push to it, too. "
        "Push again when they are done."
    )


def list_set_files(transfer_set: TransferSet) -> list[tuple[str, int]]:
    """What a push would upload."""
    store = _whole_store(transfer_set)
    shards = [(file.name, file.size) for file in _shard_files(store)]
    card = render_set_card(transfer_set.info, store.index, repo_id="user/name", licence=None)
    return [(CARD_NAME, len(card.encode())), *shards, (INDEX_NAME, len(store.index.to_bytes()))]


def _whole_store(transfer_set: TransferSet) -> ShardStore:
    stores = [store for store, _ in transfer_set._sources]
    if len(stores) != 1 or transfer_set.digest != stores[0].index.digest():
        raise ConfigError(
            "A view or several joined sets cannot be pushed: a repository holds one whole set. Push the sets one by "
            "one, or write what you want with `quantkd convert`."
        )
    if not stores[0].index.complete:
        raise TransferSetError(f"The transfer set at {stores[0].source} is unfinished. Finish its capture first.")
    return stores[0]


def _shard_files(store: ShardStore) -> Iterator[_File]:
    for number, record in enumerate(store.index.shards):
        path = store.locate(number).resolve()
        yield _File(shard_name(number), path, path.stat().st_size, record.sha256)


def _wanted_files(
    store: ShardStore, transfer_set: TransferSet, repo_id: str, licence: str | None, token: str | None
) -> dict[str, _File]:
    """The card, the shards and the index, by name."""
    index: Index = store.index
    documents = {
        CARD_NAME: render_set_card(transfer_set.info, index, repo_id=repo_id, licence=licence).encode(),
        INDEX_NAME: index.to_bytes(),
    }
    secrets = find_secrets(token)
    for name, data in documents.items():
        check_shareable(name, data, secrets, paths=True)
    files = [
        _File(name, data, len(data), hashlib.sha256(data).hexdigest()) for name, data in documents.items()
    ]  # fmt: skip
    return {file.name: file for file in (*_shard_files(store), *files)}


def _check_content(wanted: dict[str, _File]) -> None:
    """Refuse a damaged set before anything is sent."""
    for file in wanted.values():
        if isinstance(file.content, Path):
            digest = hashlib.sha256()
            with file.content.open("rb") as data:
                while chunk := data.read(_CHUNK_BYTES):
                    digest.update(chunk)
            if digest.hexdigest() != file.sha256:
                raise TransferSetError(
                    f"{file.content} has the sha256 {digest.hexdigest()}; the index says {file.sha256}. The set is "
                    "damaged: get it anew."
                )


def _next_step(snapshot: Snapshot, wanted: dict[str, _File], max_bytes: int) -> _Step | None:
    """What to commit next; None if the repository holds the set."""
    there = snapshot.files
    missing = [file for name, file in wanted.items() if not file.is_at(there.get(name))]
    shards = [file for file in missing if file.name not in (CARD_NAME, INDEX_NAME)]
    strays = [name for name in there if name not in wanted and _is_shard(name)]
    card = [file.addition() for file in missing if file.name == CARD_NAME]
    has_index = INDEX_NAME in there
    is_indexed = wanted[INDEX_NAME] not in missing
    # With an index in place, its shards may neither change nor go. If it is ours, shards that are missing were lost.
    if has_index and (strays or any(file.name in there for file in shards) or (is_indexed and shards)):
        return _Step("Begin to replace the transfer set", [CommitOperationDelete(INDEX_NAME), *card], [INDEX_NAME])
    if shards or strays:
        chosen = _first_batch(shards, max_bytes)
        removals = [CommitOperationDelete(name) for name in strays[:MAX_COMMIT_FILES]]
        # While the old index stands, so does the old card.
        operations: list[Operation] = [*([] if has_index else card), *removals, *(file.addition() for file in chosen)]
        return _Step(f"Upload {len(chosen)} shards", operations, [file.name for file in chosen])
    if card:
        return _Step("Describe the transfer set", card, [CARD_NAME])
    if not is_indexed:
        return _Step("Finish the transfer set", [wanted[INDEX_NAME].addition()], [INDEX_NAME])
    return None


def _first_batch(shards: list[_File], max_bytes: int) -> list[_File]:
    chosen: list[_File] = []
    for file in shards[:MAX_COMMIT_FILES]:
        if chosen and sum(other.size for other in chosen) + file.size > max_bytes:
            break
        chosen.append(file)
    return chosen


def _is_shard(name: str) -> bool:
    return name.startswith(_SHARD_PREFIX) and name.endswith(_SHARD_SUFFIX)
