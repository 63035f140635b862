"""Writers that are killed, that fail and that are many leave the same bytes; readers agree."""

import contextlib
import errno
import importlib
import multiprocessing
import os
import pickle
import resource
import signal
import time
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
from processes import end
from torch.utils.data import DataLoader
from transfer_sets import DyingDisk, FaultyDisk, capture_slowly, hashes, make_plan, write_set

from quantkd.errors import TransferSetError
from quantkd.files import COMMIT_STEPS
from quantkd.transfer_set import TransferSet, store
from tests.conftest import refused

fork = multiprocessing.get_context("fork")
STEPS = [f"{what}:{step}" for what in ("plan", "shard", "record", "index") for step in COMMIT_STEPS]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference")
    return capture_slowly(folder / "set")


def start(*args, processes=1, **kwargs):
    launch = []
    for index in range(processes):
        kwargs["process"] = (index, processes)
        each = fork.Process(target=capture_slowly, args=args, kwargs=kwargs, daemon=True)
        each.start()
        launch.append(each)
    return launch


@pytest.mark.parametrize("step", [*STEPS, "cleanup:started"])
def test_sigkill_at_every_named_step(tmp_path, reference, step):
    (process,) = start(tmp_path / "set", disk=DyingDisk(step, 2 if step[0] in "sr" else 1))
    assert end(process) == -signal.SIGKILL, "the step was never reached"
    if step not in ("index:renamed", "index:folder-synced", "cleanup:started"):
        refused(TransferSetError, r"unfinished|no transfer set", TransferSet, tmp_path / "set")
    assert capture_slowly(tmp_path / "set") == reference
    assert len(hashes(tmp_path / "set")) == 5, "leftovers of the killed run"


@pytest.mark.parametrize("for_good", [False, True])
@pytest.mark.parametrize("kind", [errno.ENOSPC, errno.EIO])
def test_the_nth_call_fails(tmp_path, reference, kind, for_good):
    counted = FaultyDisk()
    capture_slowly(tmp_path / "count", disk=counted)
    assert counted.calls > 50
    for number in range(1, counted.calls + 1):
        folder = tmp_path / str(number)
        began = time.monotonic()
        refused(TransferSetError, os.strerror(kind), capture_slowly, folder, disk=FaultyDisk(number, kind, for_good))
        assert time.monotonic() - began < 5
        try:
            # No false success: what opens is whole. It opens only if nothing but the cleaning up failed.
            assert TransferSet(folder, verify="full").digest == reference
        except TransferSetError:
            assert not (folder / "index.json").exists()
        assert capture_slowly(folder) == reference and len(hashes(folder)) == 5


@pytest.mark.parametrize(("killed", "processes"), [(0, 1), (0, 2), (0, 4), (3, 1), (1, 4), (4, 2)])
def test_any_number_of_processes_gives_the_same_bytes(tmp_path, killed, processes):
    """All at once, or after a launch of another number that was killed."""
    capture_slowly(tmp_path / "reference")
    first = start(tmp_path / "set", 0.01, processes=killed)
    time.sleep(0.06 if killed else 0)
    for process in first:
        process.kill()
        end(process)
    launch = start(tmp_path / "set", 0.002, processes=processes)
    rows, deadline = [0], time.monotonic() + 120
    while any(process.is_alive() for process in launch):  # a reader meanwhile finds whole rows, or none
        assert not any(process.exitcode for process in launch), "one failed, and the others wait for it"
        assert time.monotonic() < deadline, "the launch is stuck"
        with contextlib.suppress(TransferSetError):
            rows.append(len(list(TransferSet.open(tmp_path / "set", allow_incomplete=True, verify="full"))))
    assert rows == sorted(rows) and [end(process) for process in launch] == [0] * processes
    TransferSet(tmp_path / "set", verify="full")
    assert hashes(tmp_path / "set") == hashes(tmp_path / "reference")


def content_of(batches):
    names = ("counts", "token_ids", "logprobs", "log_normalizers")
    return [
        [batch.input_ids.tolist(), batch.labels.tolist(), *(getattr(batch.teacher, name).tolist() for name in names)]
        for batch in batches
    ]


def read_with_workers(data, workers):
    torch.set_num_threads(1)
    return content_of(DataLoader(pickle.loads(data), batch_size=3, num_workers=workers, collate_fn=lambda batch: batch))


def test_two_ranks_with_four_workers_each_read_the_same(tmp_path):
    """Each rank gets a view pickled, and its workers fork it, all while its maps are open here."""
    view = write_set(tmp_path / "set", make_plan(num_prompts=24))[2:20]
    expected = content_of([view.__getitems__(range(start, start + 3)) for start in range(0, 18, 3)])
    data = pickle.dumps(view)
    assert len(data) < 10_000 and read_with_workers(data, 0) == expected
    with ProcessPoolExecutor(2, mp_context=fork) as ranks:
        assert list(ranks.map(read_with_workers, [data, data], [4, 4], timeout=120)) == [expected, expected]


def read_with_few_files(folder):
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, 32))
    importlib.reload(store)  # as an import finds it where few files may be open
    sets = [TransferSet.open(folder / name) for name in ("one", "two")]
    assert len(list(TransferSet.concatenate(sets))) == 160


def test_few_files_may_be_open(tmp_path):
    for name in ("one", "two"):
        write_set(tmp_path / name, make_plan(num_prompts=80, rows_per_shard=2))
    reader = fork.Process(target=read_with_few_files, args=(tmp_path,), daemon=True)
    reader.start()
    assert end(reader) == 0
