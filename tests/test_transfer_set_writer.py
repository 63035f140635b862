"""Writing: resuming, refusing, locking, and the processes of one launch."""

from __future__ import annotations

import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transfer_sets import hashes, make_plan, make_row, write_set

from quantkd.errors import TransferSetError
from quantkd.files import FileLock
from quantkd.transfer_set import ShardTask, TransferSet, TransferSetWriter, codec, writer


def rows_of(plan: Any, task: ShardTask) -> list[Any]:
    return [make_row(plan, prompt) for prompt in range(task.start, task.stop)]


def test_a_finished_set_is_left_alone(tmp_path: Path) -> None:
    digest = write_set(tmp_path / "set")
    before = hashes(tmp_path / "set")
    for process in ((0, 1), (0, 2), (1, 2)):
        with TransferSetWriter.open(tmp_path / "set", make_plan(), process=process) as again:
            assert again.is_complete
            assert list(again.claim()) == []
            assert again.finalize() == digest
    assert hashes(tmp_path / "set") == before


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


def test_other_plans_and_folders_are_refused(tmp_path: Path) -> None:
    with TransferSetWriter.open(tmp_path / "set", make_plan()):
        pass
    with pytest.raises(TransferSetError, match="another plan; it differs in teacher_dtype, batch_size"):
        TransferSetWriter.open(tmp_path / "set", make_plan(teacher_dtype="bfloat16", batch_size=4))
    write_set(tmp_path / "set")
    with pytest.raises(TransferSetError, match="differs in num_prompts"):
        TransferSetWriter.open(tmp_path / "set", make_plan(num_prompts=11))
    (tmp_path / "set" / "index.json").unlink()
    with pytest.raises(TransferSetError, match=r"shard-00000.safetensors but neither plan.json nor index.json"):
        TransferSetWriter.open(tmp_path / "set", make_plan())
    (tmp_path / "file").write_text("")
    with pytest.raises(TransferSetError, match="Could not write the transfer set"):
        TransferSetWriter.open(tmp_path / "file" / "set", make_plan())


def test_a_second_writer_fails_clearly(tmp_path: Path) -> None:
    """Processes of one launch share a folder; another launch is refused, whatever its number of processes."""
    with TransferSetWriter.open(tmp_path / "set", make_plan(), process=(0, 2)):
        with TransferSetWriter.open(tmp_path / "set", make_plan(), process=(1, 2)):
            pass
        for process in ((0, 2), (0, 1), (2, 3), (0, 3)):
            with pytest.raises(TransferSetError, match="Another writer is at work"):
                TransferSetWriter.open(tmp_path / "set", make_plan(), process=process)
    assert sorted(hashes(tmp_path / "set")) == ["plan.json"], "a lock that was given back is removed"
    TransferSetWriter.open(tmp_path / "set", make_plan(), process=(2, 3)).close()


def test_shards_are_dealt_to_processes_in_turn_and_process_0_finishes(tmp_path: Path) -> None:
    plan = make_plan()
    with (
        TransferSetWriter.open(tmp_path / "set", plan, process=(0, 2)) as first,
        TransferSetWriter.open(tmp_path / "set", plan, process=(1, 2)) as second,
    ):
        tasks = list(second.claim())
        assert [task.index for task in tasks] == [1]
        with pytest.raises(TransferSetError, match="lacks 3 of 3 shards, first 1"):
            second.finalize()
        for task in tasks:
            second.commit(task, rows_of(plan, task))
        waiting = threading.Thread(target=second.finalize)
        waiting.start()
        assert not second.is_complete
        for task in first.claim():
            first.commit(task, rows_of(plan, task))
        digest = first.finalize()
        waiting.join(10)
        assert second.is_complete and second.finalize() == digest and list(second.claim()) == []
    assert set(hashes(tmp_path / "set")) == {"index.json", *(f"shard-0000{i}.safetensors" for i in range(3))}


def test_other_processes_wait_for_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, opened = make_plan(), []

    def open_second() -> None:
        with TransferSetWriter.open(tmp_path / "set", plan, process=(1, 2)) as second:
            opened.append([task.index for task in second.claim()])

    waiting = threading.Thread(target=open_second)
    waiting.start()
    time.sleep(0.1)
    assert not opened and not (tmp_path / "set" / "plan.json").exists()
    with TransferSetWriter.open(tmp_path / "set", plan, process=(0, 2)):
        waiting.join(10)
    assert opened == [[1]]
    monkeypatch.setattr(writer, "PLAN_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(TransferSetError, match="Process 0 of 2 has not begun"):
        TransferSetWriter.open(tmp_path / "other", plan, process=(1, 2))


@pytest.mark.parametrize("has_plan", [True, False])
def test_a_set_that_is_finished_while_another_process_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_plan: bool
) -> None:
    """Before or between its look for the plan and its reading, process 0 finishes and removes the plan."""
    write_set(tmp_path / "done")
    with TransferSetWriter.open(tmp_path / "set", make_plan(), process=(0, 2)):
        pass
    acquire = FileLock.acquire

    def finish_meanwhile(lock: FileLock) -> bool:
        shutil.copytree(tmp_path / "done", tmp_path / "set", dirs_exist_ok=True)
        (tmp_path / "set" / "plan.json").write_bytes(b"") if has_plan else (tmp_path / "set" / "plan.json").unlink()
        return acquire(lock)

    monkeypatch.setattr(FileLock, "acquire", finish_meanwhile)
    with TransferSetWriter.open(tmp_path / "set", make_plan(), process=(1, 2)) as late:
        assert late.is_complete


def test_what_commit_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        with monkeypatch.context() as limits, pytest.raises(TransferSetError, match="Plan fewer rows per shard"):
            limits.setattr(codec, "MAX_SHARD_SPANS", 3)
            first.commit(task, rows_of(plan, task))
        first.commit(task, rows_of(plan, task)[:2])
        with pytest.raises(TransferSetError, match="lacks 2 of 3 shards, first 1"):
            first.finalize()
    assert len(TransferSet(tmp_path / "set", allow_incomplete=True)) == 2


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


def test_a_plan_decides_the_bytes_and_time_does_not(tmp_path: Path) -> None:
    assert write_set(tmp_path / "a") == write_set(tmp_path / "b")
    assert hashes(tmp_path / "a") == hashes(tmp_path / "b")
    assert write_set(tmp_path / "c", make_plan(extra={"run": 2})) != write_set(tmp_path / "a")


def test_leftovers_of_a_crash_in_the_cleanup_are_removed(tmp_path: Path) -> None:
    write_set(tmp_path / "set")
    for name in ("plan.json", "shard-00000.json", "shard-00001.safetensors.tmp", "writer-1-of-2.lock"):
        (tmp_path / "set" / name).write_text("{}")
    (tmp_path / "set" / "README.md").write_text("mine")
    with TransferSetWriter.open(tmp_path / "set", make_plan()):
        pass
    kept = {"README.md", "index.json", *(f"shard-0000{i}.safetensors" for i in range(3))}
    assert set(hashes(tmp_path / "set")) == kept
