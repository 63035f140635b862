"""Made-up transfer sets for the tests: plans, rows and finished folders, all from a seed."""

import errno
import functools
import hashlib
import os
import signal
import time
from dataclasses import replace

import numpy as np
import torch

from quantkd import TransferSet
from quantkd.files import FileSystem
from quantkd.transfer_set.plan import Plan
from quantkd.transfer_set.row import TransferRow
from quantkd.transfer_set.rules import Nucleus, select_entries
from quantkd.transfer_set.writer import TransferSetWriter

PLAN = Plan(
    teacher_name="tiny-teacher", teacher_revision="", teacher_dtype="float32", tokenizer_fingerprint="0" * 64,
    vocab_size=1000, storage={"kind": "nucleus", "p": 0.95, "max_k": 16}, temperatures=(1.0, 2.0),
    responses="generate", generation={"max_new_tokens": 32}, prompts_digest="1" * 64,
    num_prompts=10, rows_per_shard=4, batch_size=2,
)  # fmt: skip


def make_plan(**changes):
    return replace(PLAN, **changes)


def row_of(plan, logits, rule, input_ids, spans, finished):
    """The row whose targets have `logits` (R, V)."""
    entries = select_entries(torch.from_numpy(logits), rule, plan.temperatures)
    parts = (entries.counts, entries.token_ids, entries.logprobs, entries.log_normalizers)
    edges = np.array(spans, dtype=np.int64).reshape(-1, 2)
    return TransferRow(input_ids, edges, *(part.numpy() for part in parts), finished=finished)


def make_row(plan, prompt, *, tokens=None, label_rank=0):
    """A row that depends on the prompt's number alone; its labels are the teacher's choice of a rank, or any."""
    rng = np.random.default_rng([prompt, plan.vocab_size])
    length = tokens or int(rng.integers(3, 20))
    prompt_length = int(rng.integers(1, length))
    targets = length - prompt_length
    logits = rng.normal(size=(targets, plan.vocab_size)) * rng.uniform(1, 6, size=(targets, 1))
    input_ids = rng.integers(0, plan.vocab_size, size=length)
    if label_rank is not None:
        input_ids[prompt_length:] = np.argsort(-logits, axis=-1)[:, label_rank]
    rule = Nucleus(0.95, max_k=min(16, plan.vocab_size))
    return row_of(plan, logits, rule, input_ids, [[prompt_length, length]], bool(prompt % 3))


def storage_order(row):
    """The order in which a set gives entries back: of each target the most probable first, then by ascending id."""
    order, start = [], 0
    for count in row.counts.tolist():
        first, *rest = sorted(range(start, start + count), key=lambda i: -row.logprobs[i])
        order += [first, *sorted(rest, key=lambda i: row.token_ids[i])]
        start += count
    return order


def assert_same_row(found, wanted):
    """What was read is what was written: to the nearest float16, or where that would lift the mass above 1, down."""
    order = storage_order(wanted)
    for name in ("input_ids", "spans", "counts", "finished"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name)
    np.testing.assert_array_equal(found.token_ids, wanted.token_ids[order])
    np.testing.assert_allclose(found.logprobs, wanted.logprobs[order], rtol=2**-10, atol=2**-24)


def commit(writer, *tasks):
    """Commit the made-up rows of shards; their numbers."""
    for task in tasks:
        writer.commit(task, [make_row(writer.plan, prompt) for prompt in range(task.start, task.stop)])
    return [task.index for task in tasks]


def hashes(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def write_rows(path, plan, make, process=(0, 1), disk=None):
    """A finished set of the row of each prompt, if it has one, without waiting for a real disk; its root digest."""
    with TransferSetWriter.open(path, plan, process=process, filesystem=disk or FaultyDisk()) as writer:
        for task in writer.claim():
            rows = [row for prompt in range(task.start, task.stop) if (row := make(prompt)) is not None]
            writer.commit(task, rows, {"responses_cut": sum(not row.finished for row in rows)})
        return writer.finalize()


def write_set(path, plan=None, **row):
    plan = plan or make_plan()
    write_rows(path, plan, lambda prompt: make_row(plan, prompt, **row))
    return TransferSet(path)


def capture_slowly(path, seconds=0.0, **options):
    """A small fake teacher's capture."""

    def make(prompt):
        time.sleep(seconds)
        return _slow_row(prompt)

    return write_rows(path, SLOW_PLAN, make, **options)


SLOW_PLAN = make_plan(num_prompts=16, vocab_size=50)
_slow_row = functools.cache(functools.partial(make_row, SLOW_PLAN))


class FaultyDisk(FileSystem):
    """Fails its call `fail_at`, or from there on; `kind` is an errno, or what a write takes: "short" or "nothing"."""

    def __init__(self, fail_at=0, kind=errno.EIO, for_good=False):
        self.calls, self.fail_at, self.kind, self.for_good = 0, fail_at, kind, for_good

    def _fails(self):
        self.calls += 1
        due = self.fail_at > 0 and (self.calls == self.fail_at or (self.for_good and self.calls > self.fail_at))
        if due and isinstance(self.kind, int):
            raise OSError(self.kind, os.strerror(self.kind))
        return due

    def create(self, path):
        self._fails()
        return super().create(path)

    def write(self, descriptor, data):
        taken = {"short": data[:1], "nothing": data[:0]}
        return super().write(descriptor, taken[str(self.kind)] if self._fails() else data)

    def fsync(self, descriptor):  # counted, but not carried out
        self._fails()

    def rename(self, source, destination):
        self._fails()
        super().rename(source, destination)

    def unlink(self, path):
        self._fails()
        super().unlink(path)


class DyingDisk(FaultyDisk):
    """Kills its own process when a step is reached for the n-th time."""

    def __init__(self, step, times=1):
        super().__init__()
        self.step, self.left = step, times

    def reach(self, step):
        self.left -= step == self.step
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
