"""Push a transfer set so that every commit on the way is a whole set, or says that it is incomplete.

The index goes last, in a commit of its own. A push looks at the newest commit, does the next step towards the wanted
files, and looks again, also after a failure; so a push that was cut off goes on where it stopped:

1. If shards in the repository must change or go, the index goes first: the repository then says that it is incomplete.
   Shards that are only added leave the index alone, which does not name them.
2. Shards are uploaded, in commits of bounded size. Those with the same content are not sent again.
3. When all shards are in place, the index follows.

Each commit names its parent, so the Hub refuses a step that was decided before somebody else's commit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.hf_api import RepoFile

from quantkd.errors import ConfigError, HubError, TransferSetError
from quantkd.hub.cards import CARD_NAME, check_license, render_set_card
from quantkd.hub.repository import HubRepository, Operation, PushedRepository, check_shareable, persevere
from quantkd.remote import find_secrets
from quantkd.transfer_set.index import INDEX_NAME
from quantkd.transfer_set.plan import MAX_SHARDS
from quantkd.transfer_set.reader import TransferSet
from quantkd.transfer_set.shard import shard_name

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


def push_transfer_set(
    transfer_set: TransferSet,
    repo_id: str,
    *,
    private: bool = True,
    license: str | None = None,
    token: str | None = None,
    revision: str | None = None,
    max_commit_bytes: int = MAX_COMMIT_BYTES,
) -> PushedRepository:
    """Upload a set as a dataset repository, or replace the one that is there.

    Args:
        transfer_set: a whole set, not a view.
        repo_id: `user/name`, or `name` for one of the token's owner; created if it is missing.
        private: False makes a new repository public, and is needed to push to one that is.
        license: of the rows, as the Hub names it, such as "mit"; the card says that none was stated if None.
        token: with write permission; else that of `hf auth login` or HF_TOKEN.
        revision: the branch; "main" if None.
        max_commit_bytes: size of the shards of one commit, which holds at least one shard.

    Returns:
        The repository and the commit that holds the set.

    Raises:
        ConfigError: a view, joined sets, a public repository without `private=False`, one that holds something else, or
            a set that names a secret.
        TransferSetError: a set that is unfinished or damaged.
        HubError: the Hub could not be reached, or refused. The same call goes on where it stopped.
    """
    wanted = _wanted_files(transfer_set, repo_id, license, token)
    for file in wanted.values():
        _check_content(file)
    repository = HubRepository(repo_id, "dataset", token=token, branch=revision)
    persevere(lambda: repository.ensure(private), repo_id)
    if repository.repo_id != repo_id:  # the owner's name was left out, and the card names it
        wanted = _wanted_files(transfer_set, repository.repo_id, license, token)
    for _ in range(_MAX_STEPS):
        pushed = persevere(lambda: _advance(repository, wanted, max_commit_bytes), repo_id)
        if pushed is not None:
            return pushed
    raise HubError(
        f"{repo_id} still does not hold the set after {_MAX_STEPS} steps: somebody else seems to push to it, too. Push "
        "again when they are done."
    )


def list_set_files(transfer_set: TransferSet) -> list[tuple[str, int]]:
    """The names and sizes of what a push would upload."""
    return [(file.name, file.size) for file in _wanted_files(transfer_set, "user/name", None, None).values()]


def _wanted_files(transfer_set: TransferSet, repo_id: str, license: str | None, token: str | None) -> dict[str, _File]:
    """The card, the shards and the index, by name."""
    check_license(license)
    store = transfer_set.whole_store
    if store is None:
        raise ConfigError(
            "A view or several joined sets cannot be pushed: a repository holds one whole set. Push the sets one by "
            "one, or write what you want with `quantkd convert`."
        )
    if not store.index.complete:
        raise TransferSetError(f"The transfer set at {store.source} is unfinished. Finish its capture first.")
    card = render_set_card(transfer_set.info, len(store.index.shards), repo_id=repo_id, license=license)
    wanted = {}
    for name, data in ((CARD_NAME, card.encode()), (INDEX_NAME, store.index.to_bytes())):
        check_shareable(name, data, find_secrets(token))
        wanted[name] = _File(name, data, len(data), hashlib.sha256(data).hexdigest())
    for number, record in enumerate(store.index.shards):
        path = store.locate(number).resolve()
        wanted[shard_name(number)] = _File(shard_name(number), path, path.stat().st_size, record.sha256)
    return wanted


def _check_content(file: _File) -> None:
    """Refuse a damaged set before anything is sent."""
    if isinstance(file.content, bytes):
        return
    digest = hashlib.sha256()
    with file.content.open("rb") as data:
        while chunk := data.read(_CHUNK_BYTES):
            digest.update(chunk)
    if digest.hexdigest() != file.sha256:
        raise TransferSetError(
            f"{file.content} has the sha256 {digest.hexdigest()}; the index says {file.sha256}. The set is damaged: "
            "get it anew."
        )


def _advance(repository: HubRepository, wanted: dict[str, _File], max_bytes: int) -> PushedRepository | None:
    """Commit the next step; the repository as it is pushed, if it holds the set already."""
    # The files are listed anew each time: what the Hub holds decides, not what this process has sent.
    commit, there = repository.read(_is_shard, "transfer set")
    message, operations = _next_step(there, wanted, max_bytes)
    if not operations:
        return repository.pushed(commit)
    if repository.commit(operations, message, commit).commit == commit:
        names = ", ".join(operation.path_in_repo for operation in operations[:3])
        raise HubError(
            f"{repository.repo_id} did not take {names}; a .gitignore there may name them. Remove it, or choose "
            "another repository."
        )
    return None


def _next_step(there: dict[str, RepoFile], wanted: dict[str, _File], max_bytes: int) -> tuple[str, list[Operation]]:
    """The message and the operations of the next commit; no operations if the repository holds the set."""
    missing = [file for name, file in wanted.items() if not file.is_at(there.get(name))]
    shards = [file for file in missing if _is_shard(file.name)]
    strays = [name for name in there if name not in wanted and _is_shard(name)]
    card: list[Operation] = [file.addition() for file in missing if file.name == CARD_NAME]
    has_index = INDEX_NAME in there
    is_indexed = wanted[INDEX_NAME] not in missing
    # With an index in place, its shards may neither change nor go. If it is ours, shards that are missing were lost.
    if has_index and (strays or any(file.name in there for file in shards) or (is_indexed and shards)):
        return "Begin to replace the transfer set", [CommitOperationDelete(INDEX_NAME), *card]
    if shards or strays:
        chosen = _first_batch(shards, max_bytes)
        removals = [CommitOperationDelete(name) for name in strays[:MAX_COMMIT_FILES]]
        additions = [file.addition() for file in chosen]
        # While the old index stands, so does the old card.
        return f"Upload {len(chosen)} shards", [*([] if has_index else card), *removals, *additions]
    if card:
        return "Describe the transfer set", card
    return "Finish the transfer set", [] if is_indexed else [wanted[INDEX_NAME].addition()]


def _first_batch(shards: list[_File], max_bytes: int) -> list[_File]:
    """As many shards as fit into one commit, and at least one."""
    chosen: list[_File] = []
    for file in shards[:MAX_COMMIT_FILES]:
        if chosen and sum(other.size for other in chosen) + file.size > max_bytes:
            break
        chosen.append(file)
    return chosen


def _is_shard(name: str) -> bool:
    return name.startswith("shard-") and name.endswith(".safetensors")
