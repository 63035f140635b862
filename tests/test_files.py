"""Files and folders are written whole, plain files read, locks held once; test_transfer_set_processes kills writers."""

import errno
import fcntl
import os
from unittest.mock import Mock

import pytest
from transfer_sets import FaultyDisk

from quantkd.errors import ConfigError, DataError
from quantkd.files import COMMIT_STEPS, FileLock, FileSystem, new_folder, parse_json, read_regular, write_file
from tests.conftest import refused


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    steps, filesystem = [], FileSystem()
    filesystem.reach = steps.append
    path = tmp_path / "new" / "folder" / "file.json"
    write_file(path, b"bytes", filesystem=filesystem, what="index")
    assert path.read_bytes() == b"bytes" and steps == [f"index:{step}" for step in COMMIT_STEPS]
    write_file(path, "caf\u00e9\n")
    assert path.read_bytes() == b"caf\xc3\xa9\n" and [entry.name for entry in path.parent.iterdir()] == ["file.json"]
    mask = os.umask(0o027)
    try:
        write_file(path, "")
        assert path.stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(mask)
    path, counted = tmp_path / "disk" / "file", FaultyDisk()
    write_file(path, b"new", filesystem=counted)
    write_file(path, b"old")
    for number in range(1, counted.calls):  # the last one flushes the folder, when the new file is there
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            write_file(path, b"new", filesystem=FaultyDisk(number, errno.ENOSPC))
        assert {entry.name: entry.read_bytes() for entry in path.parent.iterdir()} == {"file": b"old"}
        write_file(path, b"old", filesystem=FaultyDisk(number, "short"))  # goes on with the rest
        assert path.read_bytes() == b"old"
    refused(OSError, "took 0 of 3 bytes", write_file, path, b"new", filesystem=FaultyDisk(2, "nothing"))


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "parent" / "set"
    with new_folder(path) as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "file").write_text("1")
        assert not path.exists() and folder.parent == path.parent
    assert (path / "inner" / "file").read_text() == "1"
    with pytest.raises(RuntimeError), new_folder(tmp_path / "parent" / "other") as folder:
        (folder / "file").touch()
        raise RuntimeError
    with pytest.raises(OSError, match=r"not empty|exists"), new_folder(path) as folder:
        (folder / "file").touch()
    assert [entry.name for entry in path.parent.iterdir()] == ["set"]
    assert [entry.name for entry in path.iterdir()] == ["inner"]
    (tmp_path / "empty").mkdir()
    with new_folder(tmp_path / "empty") as folder:
        (folder / "file").touch()
    assert (tmp_path / "empty" / "file").exists()
    # What a killed process left is removed, and what another writes is not.
    parent = tmp_path / "shared"
    left, other, kept = (parent / name for name in (".set-0123abcd", ".set-2-0123abcd", ".set-mine"))
    for folder in (left, other, kept):
        folder.mkdir(parents=True)
        (folder / "file").touch()
    with new_folder(parent / "set") as first:
        assert not left.exists()
        with new_folder(parent / "set") as second:
            assert first.exists() and second.exists()
    assert sorted(entry.name for entry in parent.iterdir()) == [".set-2-0123abcd", ".set-mine", "set"]


def test_only_plain_files_within_the_limit_are_read(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    assert read_regular(file, 5) == b"12345"
    (tmp_path / "link").symlink_to(file)
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        (file, "is larger than 4 bytes"), (tmp_path / "link", "is a symbolic link"),
        (tmp_path / "pipe", "not a plain file"), (tmp_path, "not a plain file"), (tmp_path / "no", "No such file"),
    ):  # fmt: skip
        refused(DataError, message, read_regular, path, 4)
        refused(ConfigError, message, read_regular, path, 4, error=ConfigError)


@pytest.mark.parametrize(("content", "said"), [
    (b"", "line 1 column 1"), (b"{", "line 1 column 2"), (b'"\xff"', "can't decode byte 0xff"),
    (b"[" * 10**5, "nested too deeply"), (b'{"a":' * 10**5, "nested too deeply"), (b"NaN", "NaN is not a JSON number"),
    (b"[-Infinity]", "-Infinity is not a JSON number"), (b"1e999", "1e999 is not a JSON number"),
    (b"1" + b"0" * 5000, "Exceeds the limit"), (b'"\\ud83d"', "surrogates not allowed"),
    (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice in one object"),
])  # fmt: skip
def test_what_could_not_be_written_again_is_no_json(content, said):
    refused(ValueError, said, parse_json, content)


def test_a_lock_is_held_once_and_its_file_goes_with_it(tmp_path, monkeypatch):
    first, second = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    for one, other in ((first, second), (second, first), (first, second)):
        assert one.acquire() and not other.acquire()
        one.release()
        one.release()  # a second time does nothing
        assert not (tmp_path / "lock").exists()
    real, calls = fcntl.flock, []

    def flock(descriptor, operation):
        real(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / "lock").unlink()
        if len(calls) == 2:
            (tmp_path / "lock").rename(tmp_path / "old")
            (tmp_path / "lock").touch()

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire() and len(calls) == 3 and not FileLock(tmp_path / "lock").acquire()
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))))
    refused(OSError, os.strerror(errno.ENOLCK), FileLock(tmp_path / "other").acquire)
