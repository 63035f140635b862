"""Files and folders that are written whole or not at all, plain files that are read within a limit, and file locks."""

from __future__ import annotations

import fcntl
import glob
import json
import math
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from quantkd.errors import ConfigError, DataError, QuantKDError

# What `write_file` reaches, in order; `FileSystem.reach` hears each as "<what>:<step>".
COMMIT_STEPS = ("created", "written", "synced", "renamed", "folder-synced")


class FileSystem:
    """The calls by which `write_file` touches the disk. Tests pass a subclass that fails or dies at a chosen call."""

    def reach(self, step: str) -> None:
        """Called at every named step of a commit; does nothing here."""

    def create(self, path: Path) -> int:
        """Open a new or emptied file for writing; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

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

    def sync(self, path: Path) -> None:
        """Flush a file, or a folder's entries, so that a rename in it survives a power cut."""
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self.fsync(descriptor)
        finally:
            os.close(descriptor)


DISK = FileSystem()


def write_file(
    path: Path, data: bytes | str | memoryview, *, filesystem: FileSystem = DISK, what: str = "file"
) -> None:
    """Write `path` whole, text as UTF-8; after an error the old file is still there, and the temporary one is gone."""
    rest = memoryview(data.encode() if isinstance(data, str) else data)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        descriptor = filesystem.create(temporary)
        try:
            filesystem.reach(f"{what}:created")
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
    except OSError:
        with suppress(OSError):
            filesystem.unlink(temporary)
        raise
    filesystem.reach(f"{what}:renamed")
    filesystem.sync(path.parent)
    filesystem.reach(f"{what}:folder-synced")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder that takes the name `path` when all in it is on the disk; after an error it is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for old in path.parent.glob(f".{glob.escape(path.name)}-{'[0-9a-f]' * 8}"):
        with suppress(OSError), _held(old):  # of a process that was killed, or no one could hold it
            shutil.rmtree(old)
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    temporary.mkdir()
    try:
        with _held(temporary):
            yield temporary
            for entry in (*temporary.rglob("*"), temporary):
                DISK.sync(entry)
            os.rename(temporary, path)  # over an empty folder; the system refuses to replace any other
        DISK.sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes as long as this one lives; an OSError where one of them does."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def open_regular(path: Path, *, error: type[QuantKDError] = DataError) -> int:
    """A descriptor for reading `path`, which must be a plain file: no link leads elsewhere, no pipe blocks."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as cause:
        reason = "it is a symbolic link" if path.is_symlink() else cause.strerror
        raise error(f"Cannot open {path}: {reason}. Expected a plain file; copy or download it again.") from cause
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"Cannot open {path}: it is not a plain file. Copy or download it again.")
    return descriptor


def read_regular(path: Path, max_bytes: int, *, error: type[QuantKDError] = DataError) -> bytes:
    """The content of the plain file `path`, which must have at most `max_bytes`."""
    with os.fdopen(open_regular(path, error=error), "rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise error(f"{path} is larger than {max_bytes} bytes, the most that such a file may have. Get another one.")
    return data


def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON, for `object_pairs_hook`; of a key that is there twice one value would be lost."""
    names = [name for name, _ in pairs]
    if len(found := dict(pairs)) < len(names):
        raise ValueError(f"the key {max(names, key=names.count)!r:.80} is there twice in one object")
    return found


def parse_json(content: bytes) -> Any:
    """JSON that can be written again: without NaN, infinity, lone surrogates, and nesting beyond the stack."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    def finite(digits: str) -> float:
        return value if math.isfinite(value := float(digits)) else refuse(digits)

    try:
        text = content.decode()
        value = json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=object_of)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if b"\\ud" in content.lower():
        json.dumps(value, ensure_ascii=False).encode()
    return value


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file that stands beside a model or an adapter."""
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}. Remove it, or write it anew.") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds a {type(value).__name__}; expected an object. Remove it, or write it anew.")
    return value


def parse_object(name: str, value: dict[str, Any] | str | None) -> dict[str, Any]:
    """The dict of an argument that may also be given as JSON, or not at all."""
    try:
        parsed = json.loads(value, object_pairs_hook=object_of) if isinstance(value, str) else value or {}
    except ValueError as error:
        raise ConfigError(f'{name} is {value!r:.80}, which is not JSON: {error}. Expected {{"name": 1}}.') from error
    if not isinstance(parsed, dict):
        raise ConfigError(f'{name} is {value!r:.80}; expected an object such as {{"name": 1}}.')
    return dict(parsed)


class FileLock:
    """An exclusive advisory lock on a file of its own, which the kernel releases however the process ends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, *, shared: bool = False) -> bool:
        """Take the lock if no one else holds it, or all who do share it; returns whether it was taken."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                return False
            except OSError:
                os.close(descriptor)
                raise
            # Between open and flock another process may have removed the file: then the lock would exclude no one.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    self._descriptor = descriptor
                    return True
            os.close(descriptor)

    def release(self) -> None:
        """Give the lock back. The file is removed first, while it is still held."""
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None
