"""Many processes write one set, and many read it: the same bytes and content everywhere, and memory that stays flat."""

from __future__ import annotations

import gc
import hashlib
import multiprocessing
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from transfer_sets import capture_slowly, make_plan, make_row, write_rows, write_set

from quantkd.transfer_set import RowBatch, TransferSet

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


def read_with_workers(data: bytes, workers: int) -> str:
    torch.set_num_threads(1)
    return digest_of(DataLoader(pickle.loads(data), batch_size=3, num_workers=workers, collate_fn=same))


def test_two_ranks_with_four_workers_each_read_the_same(tmp_path: Path) -> None:
    """Each rank gets a view pickled, and its workers fork it, all while its maps are open here."""
    write_set(tmp_path / "set", make_plan(num_prompts=24))
    view = TransferSet(tmp_path / "set")[2:20]
    expected = digest_of([view.__getitems__(range(start, start + 3)) for start in range(0, 18, 3)])
    data = pickle.dumps(view)
    assert len(data) < 10_000
    assert read_with_workers(data, 0) == expected
    ranks = [in_child(read_with_workers, data, 4) for _ in range(2)]
    assert [rank() for rank in ranks] == [expected, expected]


def private_bytes() -> int:
    """Memory of this process that is its own; pages of mapped files are the kernel's cache and are left out."""
    gc.collect()
    fields = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(fields["Anonymous"].split()[0]) * 1024


def write_long_rows(path: Path, rows: int) -> str:
    plan = make_plan(num_prompts=rows, rows_per_shard=16)
    made = [make_row(plan, prompt, tokens=200) for prompt in range(8)]
    return write_rows(path, plan, lambda prompt: made[prompt % 8])


def read_epochs(path: Path, epochs: int) -> list[int]:
    """The memory that a set took after each epoch of reading it."""
    before, taken = private_bytes(), []
    transfer_set = TransferSet(path)
    for epoch in range(epochs):
        shuffled = transfer_set.select(np.random.default_rng(epoch).permutation(len(transfer_set)))
        for start in range(0, len(shuffled), 8):
            shuffled.__getitems__(range(start, start + 8))
        taken.append(private_bytes() - before)
    return taken


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads the memory of a process from /proc")
def test_memory_is_flat_and_does_not_follow_the_size(tmp_path: Path) -> None:
    sizes = {}
    for name, rows in (("small", 48), ("large", 480)):
        in_child(write_long_rows, tmp_path / name, rows)()  # in a child, whose freed memory a reader cannot reuse
        sizes[name] = sum(file.stat().st_size for file in (tmp_path / name).iterdir())
    small = in_child(read_epochs, tmp_path / "small", 6)()
    (large,) = in_child(read_epochs, tmp_path / "large", 1)()
    assert small[-1] - small[1] < 2**18
    assert sizes["large"] > 9 * sizes["small"]
    assert large - small[0] < sizes["large"] / 4


def start(*args: Any, number: int) -> list[Any]:
    """A launch of `number` processes."""
    launch = []
    for index in range(number):
        launch.append(fork.Process(target=capture_slowly, args=args, kwargs={"process": (index, number)}))
        launch[-1].start()
    return launch


@pytest.mark.parametrize(("killed", "processes"), [(0, 1), (0, 2), (0, 4), (3, 1), (1, 4), (4, 2)])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path: Path, killed: int, processes: int) -> None:
    """All at once, or after a launch of another number that was killed."""
    reference = capture_slowly(tmp_path / "reference", tmp_path / "log")
    first = start(tmp_path / "set", tmp_path / "a", 0.01, number=killed)
    time.sleep(0.06 if killed else 0)
    for worker in first:
        worker.kill()
        worker.join()
    workers = start(tmp_path / "set", tmp_path / "b", 0.002, number=processes)
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * processes
    assert TransferSet(tmp_path / "set", verify="full").digest == reference
    found, wanted = (
        {file.name: file.read_bytes() for file in (tmp_path / each).iterdir()} for each in ("set", "reference")
    )
    assert found == wanted
