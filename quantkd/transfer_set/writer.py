"""Writing a transfer set so that no crash, full disk or second writer can spoil it."""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkd.errors import TransferSetError
from quantkd.files import DISK, FileLock, FileSystem, write_file
from quantkd.transfer_set.codec import Codec
from quantkd.transfer_set.documents import canonical_json
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

POLL_SECONDS = 0.05
START_TIMEOUT_SECONDS = 600.0
_LOCK_NAME = "writer-{}-of-{}.lock"
_LOCK = re.compile(r"writer-\d+-of-(\d+)\.lock")
_LEFTOVER = re.compile(r"(plan|index|shard-\d{5})\.json\.tmp|shard-\d{5}\.safetensors\.tmp|(plan|shard-\d{5})\.json")


@dataclass(frozen=True)
class ShardTask:
    """A shard that is to be written: the prompts `[start, stop)` of the plan."""

    index: int
    start: int
    stop: int


class TransferSetWriter:
    """Writes one transfer set, alone or as one of several processes. Made by `with TransferSetWriter.open(...)`."""

    # Shard i belongs to process i mod n. Its record, written after it, commits it. When all records exist, process 0
    # writes the index, and the set is complete. Any number of processes resume a pass that ended early.

    def __init__(self, path: Path, plan: Plan, process: tuple[int, int], filesystem: FileSystem) -> None:
        self.path = path
        self.plan = plan
        self._process, self._num_processes = process
        self._filesystem = filesystem
        self._codec = Codec(plan)
        self._lock = FileLock(path / _LOCK_NAME.format(*process))
        self._claimed: set[int] = set()
        self._digest: str | None = None

    @classmethod
    @contextmanager
    def open(
        cls, path: str | Path, plan: Plan, *, process: tuple[int, int] = (0, 1), filesystem: FileSystem = DISK
    ) -> Iterator[TransferSetWriter]:
        """Start a set at `path`, or resume the one that is there with the same plan, as `process` (index, number)."""
        folder = Path(path)
        writer = cls(folder, plan, process, filesystem)
        try:
            with _disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
                if not (folder / INDEX_NAME).exists():
                    writer._start()
                if (folder / INDEX_NAME).exists():
                    index = read_index(folder)
                    _require_same(folder, index.plan, plan)
                    writer._digest = index.digest()
                    writer._remove_leftovers()
            yield writer
        finally:  # an unfinished set stays resumable
            writer._lock.release()

    @property
    def is_complete(self) -> bool:
        """Whether the set has its index, so that nothing is left to do."""
        return self._digest is not None

    def claim(self) -> Iterator[ShardTask]:
        """The shards of this process that are not committed yet."""
        for shard in range(self._process, 0 if self.is_complete else self.plan.num_shards, self._num_processes):
            if not self._is_committed(shard):
                self._claimed.add(shard)
                yield ShardTask(shard, *self.plan.prompt_range(shard))

    def commit(self, task: ShardTask, rows: Sequence[TransferRow], counters: Mapping[str, int] | None = None) -> None:
        """Store a claimed shard; when this returns, it survives a power cut."""
        if task.index not in self._claimed:
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
        data = serialize_shard(size, tensors)
        record = ShardRecord(size, hashlib.sha256(data).hexdigest(), check_counters(dict(counters or {})))
        with _disk_errors(self.path):
            self._write(shard_name(task.index), data, "shard")
            self._write(record_name(task.index), record_to_bytes(record), "record")
        self._claimed.discard(task.index)

    def finalize(self) -> str:
        """Write the index once every shard is committed, or wait until process 0 did; returns the root digest."""
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while self._digest is None:
            with _disk_errors(self.path):
                missing = [shard for shard in range(self.plan.num_shards) if not self._is_committed(shard)]
                own = [shard for shard in missing if shard % self._num_processes == self._process]
                other = min((shard % self._num_processes for shard in missing), default=0)
                lock_name = _LOCK_NAME.format(other, self._num_processes)
                has_ended = time.monotonic() > deadline and not self._is_held(lock_name)  # by now all have started
                if (self.path / INDEX_NAME).exists():
                    self._digest = read_index(self.path).digest()
                elif own:
                    raise TransferSetError(
                        f"{self.path} lacks {len(missing)} of {self.plan.num_shards} shards, first {own[0]}. "
                        "Write them by the tasks of `claim`, then finalize."
                    )
                elif not missing and self._process == 0:
                    self._write_index()
                elif has_ended:
                    raise TransferSetError(
                        f"Process {other} of {self._num_processes} ended before the transfer set at {self.path} was "
                        "complete. Look for its error, then start all processes again; committed shards are kept."
                    )
                else:
                    time.sleep(POLL_SECONDS)
        return self._digest

    def _start(self) -> None:
        """Take this process's lock, and write the plan or find that it is there and the same."""
        self._refuse_others()
        plan_path, deadline = self.path / PLAN_NAME, time.monotonic() + START_TIMEOUT_SECONDS
        while self._process and not (plan_path.exists() or (self.path / INDEX_NAME).exists()):
            if time.monotonic() > deadline:
                raise TransferSetError(
                    f"Process 0 of {self._num_processes} has not begun the transfer set at {self.path} within "
                    f"{START_TIMEOUT_SECONDS:.0f} seconds. Start all processes together."
                )
            time.sleep(POLL_SECONDS)
        if plan_path.exists():
            try:
                _require_same(self.path, read_plan(self.path), self.plan)
            except TransferSetError:
                if not (self.path / INDEX_NAME).exists():  # else process 0 finished just now, and removed the plan
                    raise
        elif not self._process and not (self.path / INDEX_NAME).exists():
            strays = sorted(entry.name for entry in os.scandir(self.path) if entry.name.startswith("shard-"))
            if strays:
                raise TransferSetError(
                    f"{self.path} holds {strays[0]} but neither {PLAN_NAME} nor {INDEX_NAME}: its shards belong to "
                    "something else. Choose another folder, or remove them."
                )
            self._write(PLAN_NAME, plan_to_bytes(self.plan), "plan")

    def _refuse_others(self) -> None:
        """Every process holds a lock of its own; those of one launch agree on how many there are."""
        taken = not self._lock.acquire()
        for entry in os.scandir(self.path):
            named = _LOCK.fullmatch(entry.name)
            if named and int(named[1]) != self._num_processes:
                taken |= self._is_held(entry.name)
        if taken:
            raise TransferSetError(
                f"Another writer is at work on {self.path}. Wait for it, or choose another folder; to share the work, "
                "start all processes together with `accelerate launch`."
            )

    def _is_held(self, name: str) -> bool:
        """Whether a process is at work under this lock. Others who ask do not count; a leftover goes."""
        lock = FileLock(self.path / name)
        held = not lock.acquire(shared=True)
        lock.release()
        return held

    def _is_committed(self, shard: int) -> bool:
        return (self.path / record_name(shard)).exists()

    def _write(self, name: str, data: bytes, what: str) -> None:
        write_file(self.path / name, data, filesystem=self._filesystem, what=what)

    def _write_index(self) -> None:
        """Write the index, and remove what only an unfinished set needs."""
        records = [read_record(self.path, shard) for shard in range(self.plan.num_shards)]
        for shard, record in enumerate(records):
            found = os.stat(self.path / shard_name(shard)).st_size
            if found != shard_bytes(record.size):
                raise TransferSetError(
                    f"{self.path / shard_name(shard)} has {found} bytes; its record promises "
                    f"{shard_bytes(record.size)}. Remove {record_name(shard)} and resume to redo it."
                )
        index = Index.from_records(self.plan, records)
        self._write(INDEX_NAME, index.to_bytes(), "index")
        self._digest = index.digest()
        self._filesystem.reach("cleanup:started")
        self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Remove what only an unfinished set needs. A crash in here leaves files that every reader ignores."""
        for entry in os.scandir(self.path):
            if _LEFTOVER.fullmatch(entry.name) or _LOCK.fullmatch(entry.name):
                self._filesystem.unlink(self.path / entry.name)


def _require_same(folder: Path, found: Plan, wanted: Plan) -> None:
    old, new = found.to_json(), wanted.to_json()
    differing = [name for name in new if canonical_json(old[name]) != canonical_json(new[name])]
    if differing:
        raise TransferSetError(
            f"{folder} holds a transfer set of another plan; it differs in {', '.join(differing)}. "
            "Choose another folder, or ask for the same teacher, prompts and settings."
        )


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise TransferSetError(
            f"Could not write the transfer set at {path}: {error}. Committed shards are kept: fix the cause, such "
            "as a full disk, then run the same command again to resume."
        ) from error
