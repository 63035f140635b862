"""Push a transfer set so that every commit on the way is a whole set, or says that it is incomplete."""

from __future__ import annotations

import hashlib
import itertools

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoSibling

from quantkd.errors import ConfigError, HubError, TransferSetError
from quantkd.hub.cards import CARD_NAME, check_license, render_set_card
from quantkd.hub.repository import PUSH_ATTEMPTS, HubRepository, Operation, PushedRepository, refuse_secrets
from quantkd.remote import retry
from quantkd.transfer_set.index import INDEX_NAME
from quantkd.transfer_set.reader import TransferSet
from quantkd.transfer_set.shard import shard_name

_MAX_COMMIT_FILES = 64


def push_transfer_set(
    transfer_set: TransferSet,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    max_commit_bytes: int = 2**31,
) -> PushedRepository:
    """Upload a whole set as a dataset repository, or replace the one that is there.

    `repo_id` without an owner is one of the token's. `private=False` makes a new repository public, and is needed to
    push to one that is. After a HubError, the same call goes on where it stopped.
    """
    wanted = _wanted_files(transfer_set, repo_id, license, token)
    repository = HubRepository(repo_id, "dataset", private, token, revision)
    retry(repository.ensure, PUSH_ATTEMPTS)
    if repository.repo_id != repo_id:  # the owner's name was left out, and the card names it
        wanted[CARD_NAME] = CommitOperationAdd(CARD_NAME, _card(transfer_set, repository.repo_id, license))
    while (pushed := retry(lambda: _advance(repository, wanted, max_commit_bytes), PUSH_ATTEMPTS)) is None:
        pass  # another step is taken
    return pushed


def list_set_files(transfer_set: TransferSet) -> list[tuple[str, int]]:
    """The names and sizes of what a push would upload."""
    wanted = _wanted_files(transfer_set, "user/name", None, None)
    return [(name, file.upload_info.size) for name, file in wanted.items()]


def _wanted_files(
    transfer_set: TransferSet, repo_id: str, license: str | None, token: str | None
) -> dict[str, CommitOperationAdd]:
    """The card, the index and the shards by name, of a set that is whole."""
    check_license(license)
    store = transfer_set.whole_store
    if store is None:
        raise ConfigError("A view or joined sets cannot be pushed: a repository holds one whole set. Push one by one.")
    if not store.index.complete:
        raise TransferSetError(f"The transfer set at {store.source} is unfinished. Finish its capture first.")
    texts = {CARD_NAME: _card(transfer_set, repo_id, license), INDEX_NAME: store.index.to_bytes()}
    refuse_secrets(texts, token)
    wanted = {name: CommitOperationAdd(name, text) for name, text in texts.items()}
    for number, record in enumerate(store.index.shards):
        path = store.locate(number).resolve()
        file = CommitOperationAdd(shard_name(number), path)
        if (found := file.upload_info.sha256.hex()) != record.sha256:
            raise TransferSetError(
                f"{path} has the sha256 {found}; the index says {record.sha256}. The set is damaged: get it anew."
            )
        wanted[file.path_in_repo] = file
    return wanted


def _card(transfer_set: TransferSet, repo_id: str, license: str | None) -> bytes:
    return render_set_card(transfer_set.info, transfer_set.plan.num_shards, repo_id=repo_id, license=license).encode()


def _advance(target: HubRepository, wanted: dict[str, CommitOperationAdd], max_bytes: int) -> PushedRepository | None:
    """Commit the next step; the repository as it is pushed, if it holds the set already."""
    # Files are listed anew each time: what the Hub holds decides, so a push that was cut off goes on where it stopped.
    commit, there = target.read(lambda names: any(map(_is_shard, names)), "transfer set")
    message, operations = _next_step(there, wanted, max_bytes)
    if not operations:
        return target.pushed(commit)
    if target.commit(operations, message, commit).commit == commit:
        names = ", ".join(operation.path_in_repo for operation in operations[:3])
        raise HubError(f"{target.repo_id} did not take {names}; a .gitignore there may name them. Remove it.")
    return None


def _next_step(
    there: dict[str, RepoSibling], wanted: dict[str, CommitOperationAdd], max_bytes: int
) -> tuple[str, list[Operation]]:
    """The message and the operations of the next commit; no operations if the repository holds the set."""
    missing = [name for name, file in wanted.items() if not _is_at(file, there.get(name))]
    shards = [name for name in missing if _is_shard(name)]
    strays = [name for name in there if name not in wanted and _is_shard(name)]
    has_index, is_indexed = INDEX_NAME in there, INDEX_NAME not in missing

    def add(*names: str) -> list[Operation]:  # an operation that was committed once cannot be used again
        return [CommitOperationAdd(name, wanted[name].path_or_fileobj) for name in names if name in missing]

    # With an index in place, its shards may neither change nor go. If it is ours, shards that are missing were lost.
    if has_index and (strays or any(name in there for name in shards) or (is_indexed and shards)):
        return "Begin to replace the transfer set", [CommitOperationDelete(INDEX_NAME), *add(CARD_NAME)]
    if shards or strays:
        chosen = _first_batch({name: wanted[name].upload_info.size for name in shards}, max_bytes)
        removals = [CommitOperationDelete(name) for name in strays[:_MAX_COMMIT_FILES]]
        # While the old index stands, so does the old card.
        return f"Upload {len(chosen)} shards", [*([] if has_index else add(CARD_NAME)), *removals, *add(*chosen)]
    if CARD_NAME in missing:
        return "Describe the transfer set", add(CARD_NAME)
    return "Finish the transfer set", add(INDEX_NAME)


def _is_at(file: CommitOperationAdd, remote: RepoSibling | None) -> bool:
    """Whether the repository holds just this: large files are listed by sha256, small ones by git's own hash."""
    if remote is None or remote.size != file.upload_info.size:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == file.upload_info.sha256.hex())
    with file.as_file() as content:
        data = content.read()
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _first_batch(sizes: dict[str, int], max_bytes: int) -> list[str]:
    """As many shards as fit into one commit, and at least one."""
    totals = itertools.accumulate(sizes.values())
    fitting = [name for name, total in zip(sizes, totals, strict=True) if total <= max_bytes]
    return fitting[:_MAX_COMMIT_FILES] or list(sizes)[:1]


def _is_shard(name: str) -> bool:
    return name.startswith("shard-") and name.endswith(".safetensors")
