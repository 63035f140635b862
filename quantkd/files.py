"""Every call by which a transfer set touches the disk. Tests pass a subclass that fails or dies at a chosen call."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from quantkd.errors import TransferSetError

# What `write_atomically` reaches, in order; `FileSystem.reach` hears each as "<what>:<step>".
COMMIT_STEPS = ("created", "written", "synced", "renamed", "folder-synced")


class FileSystem:
    """The disk as the operating system gives it."""

    def reach(self, step: str) -> None:
        """Called at every named step of a commit; does nothing here."""

    def create(self, path: Path) -> int:
        """Open a new or emptied file for writing; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)

    def write(self, descriptor: int, data: memoryview) -> int:
        """Write some of `data`; returns how many bytes were taken."""
        return os.write(descriptor, data)

    def fsync(self, descriptor: int) -> None:
        """Flush a file or folder to the disk."""
        os.fsync(descriptor)

    def rename(self, source: Path, destination: Path) -> None:
        """Move `source` over `destination` in one step."""
        os.replace(source, destination)

    def unlink(self, path: Path) -> None:
        """Remove a file that may be gone already."""
        path.unlink(missing_ok=True)

    def mkdir(self, path: Path) -> None:
        """Create a folder and its parents; it may exist."""
        path.mkdir(parents=True, exist_ok=True)

    def sync_folder(self, path: Path) -> None:
        """Flush a folder's entries, so that a rename in it survives a power cut."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(filesystem: FileSystem, path: Path, data: bytes, what: str) -> None:
    """Put `data` at `path` so that a reader, or the next start after a crash, finds all of it or none."""
    temporary = path.with_name(path.name + ".tmp")
    descriptor = filesystem.create(temporary)
    try:
        filesystem.reach(f"{what}:created")
        rest = memoryview(data)
        while rest:
            written = filesystem.write(descriptor, rest)
            if written <= 0:
                raise OSError(f"the disk took {written} of {len(rest)} bytes of {temporary}")
            rest = rest[written:]
        filesystem.reach(f"{what}:written")
        filesystem.fsync(descriptor)
        filesystem.reach(f"{what}:synced")
    finally:
        os.close(descriptor)
    filesystem.rename(temporary, path)
    filesystem.reach(f"{what}:renamed")
    filesystem.sync_folder(path.parent)
    filesystem.reach(f"{what}:folder-synced")


def open_regular(path: Path) -> int:
    """A descriptor for reading `path`, which must be a plain file: no link leads out of the folder, no pipe blocks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        reason = "it is a symbolic link" if path.is_symlink() else error.strerror
        raise TransferSetError(
            f"Cannot open {path}: {reason}. A transfer set consists of plain files in one folder; "
            "copy or download it with its files, not with links to them."
        ) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TransferSetError(f"Cannot open {path}: it is not a plain file. Get the set anew.")
    return descriptor


def read_regular(path: Path, max_bytes: int) -> bytes:
    """The content of the plain file `path`, of at most `max_bytes`."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise TransferSetError(f"{path} is larger than {max_bytes} bytes, more than a transfer set needs. Get it anew.")
    return data


class FileLock:
    """An advisory lock on a file of its own. The kernel releases it when the process dies, however it dies.

    Args:
        path: the lock file; created if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def held(self) -> bool:
        """Whether this object holds the lock."""
        return self._descriptor is not None

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the lock if nobody is in the way; returns whether it was taken."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError:
                os.close(descriptor)
                raise
            # Between open and flock another process may have removed the file: then the lock would exclude nobody.
            try:
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    self._descriptor = descriptor
                    return True
            except FileNotFoundError:
                pass  # removed just now: the next round creates it
            os.close(descriptor)

    def wait(self, timeout_seconds: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Take the lock, polling, until `done()` or the timeout; returns whether it was taken."""
        deadline = time.monotonic() + timeout_seconds
        while not self.acquire():
            if done() or time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def release(self, *, remove: bool = False) -> None:
        """Give the lock back; with `remove`, the file goes first, while it is still held."""
        if self._descriptor is not None:
            if remove:
                self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> FileLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
