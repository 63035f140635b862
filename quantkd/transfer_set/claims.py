"""Which shards are committed, which are ours, and which another process is at work on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from quantkd.files import FileLock
from quantkd.transfer_set.index import INDEX_NAME, record_name


def lock_name(shard: int) -> str:
    """The name of the lock file of a shard."""
    return f"shard-{shard:05d}.lock"


class ShardClaims:
    """Claims on the shards of an unfinished set: one locked file each, so the claims of a dead process fall back.

    Args:
        folder: the set's folder.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._committed: set[int] = set()
        self._locks: dict[int, FileLock] = {}

    def holds(self, shard: int) -> bool:
        """Whether the shard is claimed by this object."""
        return shard in self._locks

    def is_committed(self, shard: int) -> bool:
        """Whether the shard's record is there."""
        if shard not in self._committed and (self._folder / record_name(shard)).exists():
            self._committed.add(shard)
        return shard in self._committed

    def try_claim(self, shard: int) -> Literal["ours", "taken", "committed", "finished"]:
        """Claim a shard, unless it is committed, the whole set is finished, or another process holds it."""
        if self.is_committed(shard):
            return "committed"
        lock = FileLock(self._folder / lock_name(shard))
        if not lock.acquire():
            return "taken"
        # Asked again under the lock. The index is asked last: records are removed only once it is there.
        if self.is_committed(shard) or (self._folder / INDEX_NAME).exists():
            lock.release(remove=True)
            return "committed" if shard in self._committed else "finished"
        self._locks[shard] = lock
        return "ours"

    def is_abandoned(self, shard: int) -> bool:
        """Whether a shard that is not committed is held by no other process."""
        if shard in self._locks:
            return True
        lock = FileLock(self._folder / lock_name(shard))
        if not lock.acquire():
            return False
        finished = self.is_committed(shard) or (self._folder / INDEX_NAME).exists()
        lock.release(remove=True)
        return not finished

    def release(self, shard: int, *, committed: bool) -> None:
        """Give a claim back."""
        if committed:
            self._committed.add(shard)
        self._locks.pop(shard).release(remove=True)

    def release_all(self) -> None:
        """Give every claim back."""
        for shard in list(self._locks):
            self.release(shard, committed=False)
