"""A transfer set survives kills at any moment, full disks and failing calls, and ends in the same bytes."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from transfer_sets import DyingDisk, FaultyDisk, capture_slowly, make_plan, write_set

from quantkd.errors import TransferSetError
from quantkd.files import COMMIT_STEPS, FileSystem
from quantkd.transfer_set import TransferSet, verify

fork = multiprocessing.get_context("fork")
STEPS = [f"{what}:{step}" for what in ("plan", "shard", "record", "index") for step in COMMIT_STEPS]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("reference")
    return capture_slowly(folder / "set", folder / "log")


def content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def start(*args: Any, **kwargs: Any) -> Any:
    process = fork.Process(target=capture_slowly, args=args, kwargs=kwargs)
    process.start()
    return process


def kill_and_resume(folder: Path, seconds: float, reference: str) -> bool:
    """Whether the kill came before the end; the set must be the reference's either way."""
    process = start(folder / "set", folder / "first", 0.002)
    time.sleep(seconds)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    killed = process.exitcode == -signal.SIGKILL
    assert capture_slowly(folder / "set", folder / "second") == reference
    first, second = (
        [int(line) for line in (folder / name).read_text().split()] if (folder / name).exists() else []
        for name in ("first", "second")
    )
    assert len(set(first) & set(second)) <= 1, "more than one shard was done again"
    assert verify(folder / "set").digest == reference
    assert sorted(content(folder / "set")) == ["index.json", *(f"shard-{i:05d}.safetensors" for i in range(4))]
    return killed


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_sigkill_at_random_moments(tmp_path: Path, reference: str, kills: int) -> None:
    rng = random.Random(kills)
    landed = 0
    for number in range(kills):
        folder = tmp_path / str(number)
        folder.mkdir()
        landed += kill_and_resume(folder, rng.uniform(0.0, 0.09), reference)
    assert landed >= kills // 2, "most kills must hit a capture that is still at work"


@pytest.mark.parametrize("step", [*STEPS, "cleanup:started"])
def test_sigkill_at_every_named_step(tmp_path: Path, reference: str, step: str) -> None:
    process = start(tmp_path / "set", tmp_path / "first", disk=DyingDisk(step, 2 if step[0] in "sr" else 1))
    process.join()
    assert process.exitcode == -signal.SIGKILL, "the step was never reached"
    if step not in ("index:renamed", "index:folder-synced", "cleanup:started"):
        with pytest.raises(TransferSetError, match=r"unfinished|no transfer set"):
            TransferSet(tmp_path / "set")
    assert capture_slowly(tmp_path / "set", tmp_path / "second") == reference
    assert "index.json" in content(tmp_path / "set")
    assert len(content(tmp_path / "set")) == 5, "leftovers of the killed run"


def count_calls(tmp_path: Path) -> int:
    disk = FaultyDisk()
    capture_slowly(tmp_path / "count", tmp_path / "log", disk=disk)
    return disk.calls


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO])
def test_the_nth_call_fails(tmp_path: Path, reference: str, kind: int, for_good: bool) -> None:
    calls = count_calls(tmp_path)
    assert calls > 50
    for number in range(1, calls + 1):
        folder = tmp_path / str(number)
        began = time.monotonic()
        with pytest.raises(TransferSetError, match=os.strerror(kind)):
            capture_slowly(folder, tmp_path / "log", disk=FaultyDisk(number, kind, for_good))
        assert time.monotonic() - began < 5
        try:
            # No false success: what opens is whole. It opens only if nothing but the cleaning up failed.
            assert TransferSet(folder, verify="full").digest == reference
        except TransferSetError:
            assert not (folder / "index.json").exists()
        assert capture_slowly(folder, tmp_path / "log") == reference
        assert len(content(folder)) == 5


def test_short_writes_are_continued(tmp_path: Path, reference: str) -> None:
    for number in range(1, count_calls(tmp_path) + 1):
        assert capture_slowly(tmp_path / str(number), tmp_path / "log", disk=FaultyDisk(number, "short")) == reference


def test_a_disk_that_takes_nothing_is_an_error(tmp_path: Path) -> None:
    class Full(FileSystem):
        def write(self, descriptor: int, data: memoryview) -> int:
            return 0

    with pytest.raises(TransferSetError, match=r"took 0 of \d+ bytes"):
        capture_slowly(tmp_path / "set", tmp_path / "log", disk=Full())


def test_a_full_tmpfs(tmp_path: Path) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(mount)], capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a tmpfs needs root")
    try:
        (mount / "ballast").write_bytes(bytes(8 * 2**20 - 12 * 4096))
        plan = make_plan(num_prompts=64, rows_per_shard=16)
        began = time.monotonic()
        with pytest.raises(TransferSetError, match=os.strerror(errno.ENOSPC)):
            write_set(mount / "set", plan)
        assert time.monotonic() - began < 5
        (mount / "ballast").unlink()
        assert write_set(mount / "set", plan) == write_set(tmp_path / "other", plan)
        verify(mount / "set")
    finally:
        ctypes.CDLL(None).umount(str(mount).encode())
