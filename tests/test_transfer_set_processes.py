"""Many processes write one set, and many read it: the same bytes and content everywhere, and memory that stays flat."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transfer_sets import capture_slowly, make_plan, make_row

from quantkd.transfer_set import RowBatch, TransferSet, TransferSetWriter

fork = multiprocessing.get_context("fork")


def in_child(function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """Start `function` in a fork; the result is a function that waits for what it returns."""
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=lambda: sender.send(function(*args)))
    process.start()
    sender.close()  # so that a child that dies ends the wait

    def wait() -> Any:
        value = receiver.recv()
        process.join()
        return value

    return wait


def digest_of(batches: Any) -> str:
    """sha256 over all that a row holds."""
    digest = hashlib.sha256()
    for batch in batches:
        teacher = batch.teacher
        for part in (batch.input_ids, batch.labels, teacher.counts, teacher.token_ids, teacher.logprobs,
                     teacher.log_normalizers):  # fmt: skip
            digest.update(part.numpy().tobytes())
    return digest.hexdigest()


def same(batch: RowBatch) -> RowBatch:
    return batch


def read_with_workers(transfer_set: TransferSet, workers: int) -> str:
    torch.set_num_threads(1)
    return digest_of(DataLoader(transfer_set, batch_size=3, num_workers=workers, collate_fn=same))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "set"
    write(folder, 24)
    return folder


def write(folder: Path, rows: int, tokens: int | None = None) -> None:
    plan = make_plan(num_prompts=rows, rows_per_shard=max(rows // 8, 4))
    made = [make_row(plan, prompt, tokens=tokens) for prompt in range(24)]
    with TransferSetWriter.open(folder, plan) as writer:
        for task in writer.claim():
            writer.commit(task, [made[prompt % 24] for prompt in range(task.start, task.stop)])
        writer.finalize()


def test_two_ranks_with_four_workers_each_read_the_same(path: Path) -> None:
    transfer_set = TransferSet(path)
    expected = read_with_workers(transfer_set, 0)
    ranks = [in_child(read_with_workers, transfer_set, 4) for _ in range(2)]
    assert [rank() for rank in ranks] == [expected, expected]


def private_bytes() -> int:
    """Memory of this process that is its own; pages of mapped files are the kernel's cache and are left out."""
    gc.collect()
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) * 1024


def read_epochs(path: Path, epochs: int) -> tuple[int, int, int]:
    """Memory after two epochs, after `epochs` more, and the bytes of the set."""
    torch.set_num_threads(1)
    transfer_set = TransferSet(path)
    sizes = []
    for epoch in range(2 + epochs):
        shuffled = transfer_set.select(np.random.default_rng(epoch).permutation(len(transfer_set)))
        for start in range(0, len(shuffled), 8):
            shuffled.__getitems__(range(start, min(start + 8, len(shuffled))))
        del shuffled
        if epoch in (1, 1 + epochs):
            sizes.append(private_bytes())
    return sizes[0], sizes[-1], transfer_set.info.num_bytes


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads the memory of a process from /proc")
def test_memory_is_flat_and_does_not_follow_the_size(tmp_path: Path) -> None:
    write(tmp_path / "small", 100, tokens=300)
    write(tmp_path / "large", 800, tokens=300)
    before, after, size = in_child(read_epochs, tmp_path / "small", 10)()
    assert (after - before) / 10 < 2**20
    _, large, large_size = in_child(read_epochs, tmp_path / "large", 0)()
    assert large_size > 7.5 * size
    assert large < 1.1 * before


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def start(*args: Any, number: int) -> list[Any]:
    """A launch of `number` processes."""
    launch = []
    for index in range(number):
        launch.append(fork.Process(target=capture_slowly, args=args, kwargs={"process": (index, number)}))
        launch[-1].start()
    return launch


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_any_number_of_processes_gives_the_same_digest(tmp_path: Path, processes: int) -> None:
    reference = capture_slowly(tmp_path / "reference", tmp_path / "log")
    workers = start(tmp_path / "set", tmp_path / "log", 0.002, number=processes)
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * processes
    assert files(tmp_path / "set") == files(tmp_path / "reference")
    assert TransferSet(tmp_path / "set").digest == reference


@pytest.mark.parametrize(("first", "then"), [(3, 1), (1, 4), (4, 2)])
def test_resumed_on_another_number_of_processes(tmp_path: Path, first: int, then: int) -> None:
    reference = capture_slowly(tmp_path / "reference", tmp_path / "log")
    workers = start(tmp_path / "set", tmp_path / "a", 0.01, number=first)
    time.sleep(0.06)
    for worker in workers:
        worker.kill()
        worker.join()
    workers = start(tmp_path / "set", tmp_path / "b", 0.0, number=then)
    for worker in workers:
        worker.join(60)
    assert TransferSet(tmp_path / "set", verify="full").digest == reference
