"""Writing: resuming, refusing, locking, and several processes on one plan."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transfer_sets import FaultyDisk, make_plan, make_row, write_set

from quantkd.errors import TransferSetError
from quantkd.files import FileLock
from quantkd.transfer_set import ShardTask, TransferSet, TransferSetWriter, writer


def rows_of(plan: Any, task: ShardTask) -> list[Any]:
    return [make_row(plan, prompt) for prompt in range(task.start, task.stop)]


def files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_a_finished_set_is_left_alone(tmp_path: Path) -> None:
    digest = write_set(tmp_path / "set")
    before = files(tmp_path / "set")
    for join in (False, True):
        with TransferSetWriter.open(tmp_path / "set", make_plan(), join=join) as again:
            assert again.is_complete
            assert list(again.claim()) == []
            assert again.finalize() == digest
    assert files(tmp_path / "set") == before


def test_committed_shards_are_not_written_again(tmp_path: Path) -> None:
    plan = make_plan()
    with TransferSetWriter.open(tmp_path / "set", plan) as first:
        assert not first.is_complete
        task = next(first.claim())
        assert task == ShardTask(0, 0, 4)
        first.commit(task, rows_of(plan, task))
    stamp = os.stat(tmp_path / "set" / "shard-00000.safetensors").st_mtime_ns
    with TransferSetWriter.open(tmp_path / "set", plan) as second:
        tasks = list(second.claim())
        assert [(task.index, task.start, task.stop) for task in tasks] == [(1, 4, 8), (2, 8, 10)]
        with pytest.raises(TransferSetError, match="Shard 0 is not claimed"):
            second.commit(task, rows_of(plan, task))
        for task in tasks:
            second.commit(task, rows_of(plan, task))
        second.finalize()
    assert os.stat(tmp_path / "set" / "shard-00000.safetensors").st_mtime_ns == stamp


def test_another_plan_is_refused(tmp_path: Path) -> None:
    with TransferSetWriter.open(tmp_path / "set", make_plan()):
        pass
    with pytest.raises(TransferSetError, match="another plan; it differs in teacher_dtype, batch_size"):
        TransferSetWriter.open(tmp_path / "set", make_plan(teacher_dtype="bfloat16", batch_size=4))
    write_set(tmp_path / "set")
    with pytest.raises(TransferSetError, match="differs in num_prompts"):
        TransferSetWriter.open(tmp_path / "set", make_plan(num_prompts=11))


def test_shards_without_a_plan_are_refused(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    (tmp_path / "set" / "index.json").unlink()
    with pytest.raises(TransferSetError, match=r"shard-00000.safetensors but neither plan.json nor index.json"):
        TransferSetWriter.open(tmp_path / "set", make_plan())


def test_a_second_writer_fails_clearly(tmp_path: Path) -> None:
    with TransferSetWriter.open(tmp_path / "set", make_plan()):
        for join in (False, True):
            with pytest.raises(TransferSetError, match="Another writer is at work"):
                TransferSetWriter.open(tmp_path / "set", make_plan(), join=join)
    with TransferSetWriter.open(tmp_path / "set", make_plan(), join=True):
        with pytest.raises(TransferSetError, match="Another writer is at work"):
            TransferSetWriter.open(tmp_path / "set", make_plan())
        with TransferSetWriter.open(tmp_path / "set", make_plan(), join=True):
            pass


def test_a_stuck_plan_lock_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "LOCK_TIMEOUT_SECONDS", 0.05)
    (tmp_path / "set").mkdir()
    with FileLock(tmp_path / "set" / "commit.lock") as lock:
        assert lock.acquire()
        with pytest.raises(TransferSetError, match=r"commit\.lock locked"):
            TransferSetWriter.open(tmp_path / "set", make_plan())
    assert not lock.held
    plan = make_plan()
    with TransferSetWriter.open(tmp_path / "set", plan) as first:
        for task in first.claim():
            first.commit(task, rows_of(plan, task))
        with FileLock(tmp_path / "set" / "commit.lock") as lock:
            assert lock.acquire()
            with pytest.raises(TransferSetError, match=r"commit\.lock locked"):
                first.finalize()
        first.finalize()


def test_a_joined_writer_finds_the_set_finished_by_another(tmp_path: Path) -> None:
    plan = make_plan()
    with (
        TransferSetWriter.open(tmp_path / "set", plan, join=True) as first,
        TransferSetWriter.open(tmp_path / "set", plan, join=True) as second,
        TransferSetWriter.open(tmp_path / "set", plan, join=True) as third,
    ):
        for task in first.claim():
            first.commit(task, rows_of(plan, task))
        digest = first.finalize()
        assert list(second.claim()) == []
        assert second.finalize() == digest
        third._write_index()  # it saw all records, and then waited for the lock
        assert third.finalize() == digest
    assert set(files(tmp_path / "set")) == {"index.json", *(f"shard-0000{i}.safetensors" for i in range(3))}


def test_finalize_waits_for_what_others_hold_and_not_for_what_it_holds(tmp_path: Path) -> None:
    plan = make_plan()
    with (
        TransferSetWriter.open(tmp_path / "set", plan, join=True) as first,
        TransferSetWriter.open(tmp_path / "set", plan, join=True) as second,
    ):
        assert len(list(first.claim())) == 3
        assert list(first.claim()) == [], "what is claimed is not handed out again"
        with pytest.raises(TransferSetError, match="lacks 3 of 3 shards"):
            first.finalize()
        timer = threading.Timer(0.15, first.close)
        timer.start()
        began = time.monotonic()
        with pytest.raises(TransferSetError, match="lacks 3 of 3 shards"):
            second.finalize()
        assert time.monotonic() - began > 0.1
        timer.join()


def test_what_commit_refuses(tmp_path: Path) -> None:
    plan = make_plan()
    with TransferSetWriter.open(tmp_path / "set", plan) as first:
        task = next(first.claim())
        rows = rows_of(plan, task)
        with pytest.raises(TransferSetError, match="holds the prompts 0 to 3; found 5 rows"):
            first.commit(task, [*rows, rows[0]])
        object.__setattr__(rows[2], "logprobs", rows[2].logprobs + 1)
        with pytest.raises(TransferSetError, match=r"Row 2 of shard 0: .*at most 0"):
            first.commit(task, rows)
        with pytest.raises(TransferSetError, match="counters"):
            first.commit(task, rows_of(plan, task), {"responses_cut": -1})
        first.commit(task, rows_of(plan, task)[:2])
        with pytest.raises(TransferSetError, match="lacks 2 of 3 shards, first 1"):
            first.finalize()
        with pytest.raises(TransferSetError, match="lacks 2 of 3 shards, first 1"):
            first.finalize(wait=False)
    assert len(TransferSet(tmp_path / "set", allow_incomplete=True)) == 2


def test_a_shard_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quantkd.transfer_set import encoded

    monkeypatch.setattr(encoded, "MAX_SHARD_SPANS", 3)
    plan = make_plan()
    with TransferSetWriter.open(tmp_path / "set", plan) as first:
        task = next(first.claim())
        with pytest.raises(TransferSetError, match="Plan fewer rows per shard"):
            first.commit(task, rows_of(plan, task))


def test_a_shard_that_vanished_is_noticed(tmp_path: Path) -> None:
    plan = make_plan()
    with TransferSetWriter.open(tmp_path / "set", plan) as first:
        for task in first.claim():
            first.commit(task, rows_of(plan, task))
        os.truncate(tmp_path / "set" / "shard-00001.safetensors", 100)
        with pytest.raises(TransferSetError, match=r"has 100 bytes; its record promises \d+"):
            first.finalize()
        (tmp_path / "set" / "shard-00001.safetensors").unlink()
        with pytest.raises(TransferSetError, match="No such file"):
            first.finalize()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TransferSetError, match="Could not write the transfer set"):
        TransferSetWriter.open(tmp_path / "file" / "set", make_plan())


def test_the_claims_of_a_writer_that_is_closed_fall_back(tmp_path: Path) -> None:
    plan = make_plan()
    with TransferSetWriter.open(tmp_path / "set", plan, join=True) as first:
        assert len(list(first.claim())) == 3
        with TransferSetWriter.open(tmp_path / "set", plan, join=True) as second:
            claims = second.claim()
            first.close()
            task = next(claims)
            second.commit(task, rows_of(plan, task))
            with pytest.raises(TransferSetError, match="lacks 2 of 3"):
                second.finalize()


def test_a_joined_writer_waits_for_the_last_shard(tmp_path: Path) -> None:
    plan = make_plan(rows_per_shard=5)

    def slow() -> None:
        with TransferSetWriter.open(tmp_path / "set", plan, join=True, filesystem=FaultyDisk()) as other:
            task = next(other.claim())
            (tmp_path / "claimed").write_text("")
            time.sleep(0.3)
            other.commit(task, rows_of(plan, task))
            other.finalize()

    process = multiprocessing.get_context("fork").Process(target=slow)
    process.start()
    while not (tmp_path / "claimed").exists():
        time.sleep(0.005)
    with TransferSetWriter.open(tmp_path / "set", plan, join=True) as first:
        for task in first.claim():
            first.commit(task, rows_of(plan, task))
        digest = first.finalize()
    process.join()
    assert process.exitcode == 0
    assert TransferSet(tmp_path / "set", verify="full").digest == digest


def test_a_plan_decides_the_bytes_and_time_does_not(tmp_path: Path) -> None:
    assert write_set(tmp_path / "a") == write_set(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert write_set(tmp_path / "c", make_plan(extra={"run": 2})) != write_set(tmp_path / "a")


def test_leftovers_of_a_crash_in_the_cleanup_are_removed(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    for name in ("plan.json", "shard-00000.json", "shard-00001.lock", "shard-00001.safetensors.tmp", "writer.lock"):
        (tmp_path / "set" / name).write_text("{}")
    (tmp_path / "set" / "README.md").write_text("mine")
    with TransferSetWriter.open(tmp_path / "set", make_plan()):
        pass
    kept = {"README.md", "index.json", *(f"shard-0000{i}.safetensors" for i in range(3))}
    assert set(files(tmp_path / "set")) == kept


def test_a_lock_file_that_was_removed_does_not_fool_two_holders(tmp_path: Path) -> None:
    first, second, third = (FileLock(tmp_path / "lock") for _ in range(3))
    assert first.acquire() and not second.acquire()
    first.release(remove=True)
    assert not (tmp_path / "lock").exists()
    assert second.acquire() and not third.acquire()
    assert third.wait(0.05) is False
    assert third.wait(10, done=lambda: True) is False
    second.release()
    assert third.wait(1) is True
    second.release()  # a second time does nothing


def test_a_lock_file_that_is_removed_between_open_and_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = fcntl.flock, []

    def flock(descriptor: int, operation: int) -> None:
        real(descriptor, operation)
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / "lock").unlink()
        if len(calls) == 2:
            (tmp_path / "lock").rename(tmp_path / "old")
            (tmp_path / "lock").touch()

    monkeypatch.setattr(files.fcntl, "flock", flock)
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire() and len(calls) == 3
    assert not FileLock(tmp_path / "lock").acquire()

    def broken(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(files.fcntl, "flock", broken)
    with pytest.raises(TransferSetError, match=os.strerror(errno.ENOLCK)):
        TransferSetWriter.open(tmp_path / "set", make_plan())


def test_empty_rows_and_missing_rows(tmp_path: Path) -> None:
    plan = make_plan(num_prompts=3, rows_per_shard=2)
    with TransferSetWriter.open(tmp_path / "set", plan) as first:
        for task in first.claim():
            first.commit(task, [])
        first.finalize()
    transfer_set = TransferSet(tmp_path / "set", verify="full")
    assert (len(transfer_set), transfer_set.info.num_prompts) == (0, 3)
    assert np.isnan(transfer_set.info.bytes_per_response_token)
