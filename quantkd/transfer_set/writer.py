"""Writing a transfer set so that no crash, full disk or second writer can spoil it.

The plan fixes which prompts belong to which shard before the first token. A shard is committed in this order: temporary
file, fsync, rename, fsync of the folder, and the same for its record, which is what marks it as committed. When every
record is there, one process writes index.json the same way; from then on the set is complete and is not written again.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from quantkd.errors import TransferSetError
from quantkd.files import FileLock, FileSystem, write_file
from quantkd.transfer_set.claims import ShardClaims, lock_name
from quantkd.transfer_set.codec import Codec
from quantkd.transfer_set.index import (
    INDEX_NAME,
    PLAN_NAME,
    Index,
    ShardRecord,
    plan_to_bytes,
    read_index,
    read_plan,
    read_record,
    record_name,
    record_to_bytes,
)
from quantkd.transfer_set.plan import Plan, check_counters
from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.shard import serialize_shard, shard_bytes, shard_name

WRITER_LOCK = "writer.lock"
COMMIT_LOCK = "commit.lock"
POLL_SECONDS = 0.05
_TEMPORARY = re.compile(r"(plan\.json|index\.json|shard-\d{5}\.(json|safetensors))\.tmp")
LOCK_TIMEOUT_SECONDS = 30.0


@dataclass(frozen=True)
class ShardTask:
    """A shard that this writer has claimed: the prompts `[start, stop)` of the plan."""

    index: int
    start: int
    stop: int


class TransferSetWriter:
    """Writes one transfer set, alone or together with other processes. Use `open`, and close it or use `with`.

    Example:
        with TransferSetWriter.open("runs/gsm8k", plan) as writer:
            for task in writer.claim():
                writer.commit(task, rows_of(prompts[task.start : task.stop]), {"responses_cut": 0})
            digest = writer.finalize()
    """

    def __init__(self, path: Path, plan: Plan, filesystem: FileSystem, lock: FileLock, digest: str | None) -> None:
        self.path = path
        self.plan = plan
        self._filesystem = filesystem
        self._codec = Codec(plan)
        self._lock = lock
        self._digest = digest
        self._claims = ShardClaims(path)

    @classmethod
    def open(
        cls, path: str | Path, plan: Plan, *, join: bool = False, filesystem: FileSystem | None = None
    ) -> TransferSetWriter:
        """Start a set at `path`, or resume the one that lies there with the same plan."""
        folder = Path(path)
        disk = filesystem or FileSystem()
        lock = FileLock(folder / WRITER_LOCK)
        with _disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / INDEX_NAME).exists() and not lock.acquire(shared=join):
                raise TransferSetError(
                    f"Another writer is at work on {folder}. Wait for it, or, to share the work, start every process "
                    "with the same plan and join=True (--join; `accelerate launch` does so by itself)."
                )
            try:
                digest = None
                if not (folder / INDEX_NAME).exists():
                    _establish_plan(disk, folder, plan)
                if (folder / INDEX_NAME).exists():
                    index = read_index(folder)
                    _require_same(folder, index.plan, plan)
                    digest = index.digest()
                writer = cls(folder, plan, disk, lock, digest)
                if digest is not None:
                    writer._remove_leftovers()
            except BaseException:
                lock.release()
                raise
        return writer

    @property
    def is_complete(self) -> bool:
        """Whether the set has its index, so that nothing is left to do."""
        return self._digest is not None

    def claim(self) -> Iterator[ShardTask]:
        """The shards that are left, each claimed for this writer alone. Ends when nobody has one left.

        While other writers hold the last shards, this waits: if one of them dies, its shard is handed out here.
        """
        while self._digest is None:
            others = False
            for shard in range(self.plan.num_shards):
                if self._claims.holds(shard):
                    continue
                with _disk_errors(self.path):
                    state = self._claims.try_claim(shard)
                if state == "finished":
                    return
                others |= state == "taken"
                if state == "ours":
                    yield ShardTask(shard, *self.plan.prompt_range(shard))
            if not others:
                return
            time.sleep(POLL_SECONDS)

    def commit(self, task: ShardTask, rows: Sequence[TransferRow], counters: Mapping[str, int] | None = None) -> None:
        """Store a claimed shard; when this returns, it survives a power cut."""
        if not self._claims.holds(task.index):
            raise TransferSetError(f"Shard {task.index} is not claimed by this writer; commit what `claim` handed out.")
        if len(rows) > task.stop - task.start:
            raise TransferSetError(
                f"Shard {task.index} holds the prompts {task.start} to {task.stop - 1}; found {len(rows)} rows."
            )
        for number, row in enumerate(rows):
            try:
                row.validate(self.plan.vocab_size, self.plan.temperatures, self._codec.max_entries)
            except TransferSetError as error:
                raise TransferSetError(f"Row {number} of shard {task.index}: {error}") from error
        size, tensors = self._codec.encode(rows)
        if not size.is_possible():
            raise TransferSetError(f"Shard {task.index} would be too large: {size}. Plan fewer rows per shard.")
        data = serialize_shard(self._codec, size, tensors)
        record = ShardRecord(size, hashlib.sha256(data).hexdigest(), check_counters(dict(counters or {})))
        with _disk_errors(self.path):
            write_file(self.path / shard_name(task.index), data, filesystem=self._filesystem, what="shard")
            write_file(
                self.path / record_name(task.index), record_to_bytes(record), filesystem=self._filesystem, what="record"
            )
            self._claims.release(task.index, committed=True)

    def finalize(self, wait: bool = True) -> str:
        """Write the index once every shard is committed; the set is then complete."""
        while self._digest is None:
            with _disk_errors(self.path):
                missing = [shard for shard in range(self.plan.num_shards) if not self._claims.is_committed(shard)]
                if (self.path / INDEX_NAME).exists():
                    self._digest = read_index(self.path).digest()
                elif not missing:
                    self._write_index()
                else:
                    orphan = next((s for s in missing if not wait or self._claims.is_abandoned(s)), None)
                    if orphan is not None:
                        raise TransferSetError(
                            f"{self.path} lacks {len(missing)} of {self.plan.num_shards} shards, first {orphan}. "
                            "Write them by the tasks of `claim`, then finalize."
                        )
                    time.sleep(POLL_SECONDS)
        return self._digest

    def close(self) -> None:
        """Release all locks. An unfinished set stays resumable."""
        self._claims.release_all()
        self._lock.release()

    def __enter__(self) -> TransferSetWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_index(self) -> None:
        """Write the index, unless another writer was faster, and remove what only an unfinished set needs."""
        with FileLock(self.path / COMMIT_LOCK) as lock:
            finished = (self.path / INDEX_NAME).exists
            if not lock.wait(LOCK_TIMEOUT_SECONDS, finished) and not finished():
                raise _stuck(lock)
            if finished():  # by another writer, which has cleaned up: a lock file made since then is ours to remove
                lock.release(remove=True)
                return
            records = [read_record(self.path, shard) for shard in range(self.plan.num_shards)]
            for shard, record in enumerate(records):
                found = os.stat(self.path / shard_name(shard)).st_size
                if found != shard_bytes(self._codec, record.size):
                    raise TransferSetError(
                        f"{self.path / shard_name(shard)} has {found} bytes; its record promises "
                        f"{shard_bytes(self._codec, record.size)}. Remove {record_name(shard)} and resume to redo it."
                    )
            index = Index.from_records(self.plan, records)
            write_file(self.path / INDEX_NAME, index.to_bytes(), filesystem=self._filesystem, what="index")
            self._digest = index.digest()
            self._filesystem.reach("cleanup:started")
            self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove what only an unfinished set needs. A crash in here leaves files that every reader ignores."""
        names = {PLAN_NAME, COMMIT_LOCK, WRITER_LOCK}
        for shard in range(self.plan.num_shards):
            names |= {record_name(shard), lock_name(shard)}
        for entry in os.scandir(self.path):
            if entry.name in names or _TEMPORARY.fullmatch(entry.name):
                self._filesystem.unlink(self.path / entry.name)


def _establish_plan(disk: FileSystem, folder: Path, plan: Plan) -> None:
    """Write the plan, or find that it is there and the same."""
    with FileLock(folder / COMMIT_LOCK) as lock:
        if not lock.wait(LOCK_TIMEOUT_SECONDS):
            raise _stuck(lock)
        if (folder / INDEX_NAME).exists():
            return  # finished by others while this process waited; they removed the plan
        if (folder / PLAN_NAME).exists():
            _require_same(folder, read_plan(folder), plan)
            return
        strays = sorted(entry.name for entry in os.scandir(folder) if entry.name.startswith("shard-"))
        if strays:
            raise TransferSetError(
                f"{folder} holds {strays[0]} but neither {PLAN_NAME} nor {INDEX_NAME}: its shards belong to something "
                "else. Choose another folder, or remove them."
            )
        write_file(folder / PLAN_NAME, plan_to_bytes(plan), filesystem=disk, what="plan")


def _stuck(lock: FileLock) -> TransferSetError:
    return TransferSetError(f"Another writer keeps {lock.path} locked. Stop it, then run the same command again.")


def _require_same(folder: Path, found: Plan, wanted: Plan) -> None:
    if found.digest() != wanted.digest():
        raise TransferSetError(
            f"{folder} holds a transfer set of another plan; it differs in {', '.join(found.differences(wanted))}. "
            "Choose another folder, or ask for the same teacher, prompts and settings."
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransferSetError(
            f"Could not write the transfer set at {path}: {error}. Committed shards are kept: mend the cause, such "
            "as a full disk, then run the same command again to resume."
        ) from error
