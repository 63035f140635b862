"""Writing: resuming, refusing, locking, and the processes of one launch; converting, and the estimate of a size."""

import math
import os
import shutil
import threading
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transfer_sets import commit, hashes, make_plan, make_row, write_rows, write_set

from quantkd.errors import ConfigError, TransferSetError
from quantkd.files import FileLock
from quantkd.transfer_set import ShardTask, TransferSet, TransferSetWriter, convert, estimate_bytes, verify
from quantkd.transfer_set.conversion import expect_entries, trim
from quantkd.transfer_set.rules import Nucleus, Sampled, TopK, max_entries, narrow, storage_rule_to_dict
from tests.conftest import refused

ANSWERS = Path(__file__).parent / "golden" / "answers"  # SmolLM2-135M's to 8 questions of GSM8K, nucleus 0.95


@pytest.fixture
def open_writer(tmp_path):
    def build(path="set", process=(0, 1), **changes):
        return TransferSetWriter.open(tmp_path / path, make_plan(**changes), process=process)

    return build


def begin(open_writer, *args, **options):
    with open_writer(*args, **options):
        pass


def test_what_is_committed_is_not_written_again(open_writer, tmp_path):
    with open_writer() as first:
        assert not first.is_complete
        task = next(first.claim())
        assert task == ShardTask(0, 0, 4)
        assert commit(first, task) == [0]
        refused(TransferSetError, "Shard 0 is not claimed", commit, first, task)
    stamp = os.stat(tmp_path / "set" / "shard-00000.safetensors").st_mtime_ns
    with open_writer() as second:
        assert commit(second, *second.claim()) == [1, 2]
        digest = second.finalize()
    kept = {*hashes(tmp_path / "set"), "README.md"}
    for name in ("plan.json", "shard-00000.json", "shard-00001.safetensors.tmp", "writer-1-of-2.lock", "README.md"):
        (tmp_path / "set" / name).write_text("{}")  # leftovers of a crash in the cleanup, and a file that is not ours
    for process in ((0, 1), (0, 2), (1, 2)):
        with open_writer(process=process) as again:
            assert again.is_complete and list(again.claim()) == [] and again.finalize() == digest
        assert set(hashes(tmp_path / "set")) == kept
    assert os.stat(tmp_path / "set" / "shard-00000.safetensors").st_mtime_ns == stamp


def test_other_plans_and_folders_are_refused(open_writer, tmp_path):
    begin(open_writer)
    other = {"teacher_dtype": "bfloat16", "batch_size": 4}
    refused(TransferSetError, "another plan; it differs in teacher_dtype, batch_size", begin, open_writer, **other)
    write_set(tmp_path / "set")
    refused(TransferSetError, "differs in num_prompts", begin, open_writer, num_prompts=11)
    (tmp_path / "set" / "index.json").unlink()
    refused(TransferSetError, r"shard-00000.safetensors but neither plan.json nor index.json", begin, open_writer)
    (tmp_path / "file").write_text("")
    refused(TransferSetError, "Could not write the transfer set", begin, open_writer, "file/set")


def test_one_writer_at_a_time_and_nobody_waits_for_one_that_has_ended(open_writer, tmp_path, monkeypatch):
    with open_writer(process=(0, 2)):
        begin(open_writer, process=(1, 2))
        for process in ((0, 2), (0, 1), (2, 3), (0, 3)):
            refused(TransferSetError, "Another writer is at work", begin, open_writer, process=process)
    assert sorted(hashes(tmp_path / "set")) == ["plan.json"], "a lock that was given back is removed"
    begin(open_writer, process=(2, 3))
    monkeypatch.setattr("quantkd.transfer_set.writer.START_TIMEOUT_SECONDS", 0.0)
    with open_writer(process=(0, 2)) as first:
        commit(first, *first.claim())
        refused(TransferSetError, "Process 1 of 2 ended before the transfer set", first.finalize)
        with open_writer(process=(1, 2)) as second:
            monkeypatch.setattr(
                "quantkd.transfer_set.writer.time.sleep", lambda seconds: commit(second, *second.claim())
            )
            digest = first.finalize()
            assert second.finalize() == digest


def test_shards_are_dealt_in_turn_and_process_0_begins_and_finishes(open_writer, tmp_path, monkeypatch):
    done = []

    def run_second():
        with open_writer(process=(1, 2)) as second:
            done.extend([commit(second, *second.claim()), second.finalize(), list(second.claim())])

    waiting = threading.Thread(target=run_second, daemon=True)
    waiting.start()
    time.sleep(0.1)
    assert not (tmp_path / "set" / "plan.json").exists()
    with open_writer(process=(0, 2)) as first:
        assert commit(first, *first.claim()) == [0, 2] and not done
        digest = first.finalize()
        waiting.join(10)
    assert done == [[1], digest, []]
    assert set(hashes(tmp_path / "set")) == {"index.json", *(f"shard-0000{i}.safetensors" for i in range(3))}
    monkeypatch.setattr("quantkd.transfer_set.writer.START_TIMEOUT_SECONDS", 0.1)
    refused(TransferSetError, "Process 0 of 2 has not begun", begin, open_writer, "other", process=(1, 2))


def test_a_lock_that_a_killed_launch_left_stops_no_two_who_look_at_it_at_once(open_writer, tmp_path, monkeypatch):
    begin(open_writer)
    (tmp_path / "set" / "writer-0-of-1.lock").touch()
    release, late = FileLock.release, []

    def start_another(lock):
        if not late:
            late.append(lock)
            stack.enter_context(open_writer(process=(1, 2)))
        release(lock)

    monkeypatch.setattr(FileLock, "release", start_another)
    with ExitStack() as stack:
        begin(open_writer, process=(0, 2))
    assert sorted(hashes(tmp_path / "set")) == ["plan.json"]


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("has_plan", [True, False])
def test_a_set_that_is_finished_while_another_process_starts(open_writer, tmp_path, monkeypatch, has_plan, process):
    """Before or between its look for the plan and its reading, another process 0 finishes and removes the plan."""
    write_set(tmp_path / "done")
    begin(open_writer, process=(0, 2))
    acquire = FileLock.acquire

    def finish_meanwhile(lock):
        shutil.copytree(tmp_path / "done", tmp_path / "set", dirs_exist_ok=True)
        (tmp_path / "set" / "plan.json").write_bytes(b"") if has_plan else (tmp_path / "set" / "plan.json").unlink()
        return acquire(lock)

    monkeypatch.setattr(FileLock, "acquire", finish_meanwhile)
    with open_writer(process=(process, 2)) as late:
        assert late.is_complete


def test_what_commit_and_finalize_refuse(open_writer, tmp_path, monkeypatch):
    with open_writer() as first:
        task = next(first.claim())
        rows = [make_row(first.plan, prompt) for prompt in range(4)]
        likelier = [*rows[:2], replace(rows[2], logprobs=rows[2].logprobs + 1), rows[3]]
        for message, *arguments in (
            ("holds the prompts 0 to 3; found 5 rows", [*rows, rows[0]]),
            (r"Row 2 of shard 0: .*at most 0", likelier),
            ("counters", rows, {"responses_cut": -1}),
        ):
            refused(TransferSetError, message, first.commit, task, *arguments)
        for limit, most, message in (
            ("codec.MAX_SHARD_SPANS", 3, "Plan fewer rows per shard"),
            ("row.MAX_ROW_ENTRIES", 2, "at most 2 entries, found"),
        ):
            with monkeypatch.context() as limits, pytest.raises(TransferSetError, match=message):
                limits.setattr(f"quantkd.transfer_set.{limit}", most)
                first.commit(task, rows)
        first.commit(task, rows[:2])
        refused(TransferSetError, "lacks 2 of 3 shards, first 1", first.finalize)
        assert len(TransferSet(tmp_path / "set", allow_incomplete=True)) == 2
        commit(first, *first.claim())
        file = tmp_path / "set" / "shard-00001.safetensors"
        for harm, message in (
            (lambda: os.truncate(file, 100), r"has 100 bytes; its record promises \d+"), (file.unlink, "No such file"),
        ):  # fmt: skip
            harm()
            refused(TransferSetError, message, first.finalize)


def test_counters_that_a_reader_would_refuse_are_not_finished(open_writer, tmp_path):
    with open_writer() as writer:
        for task in writer.claim():
            writer.commit(task, [], {f"{task.index}-{number}": 1 for number in range(100)})
        refused(TransferSetError, "at most 256 names", writer.finalize)
    assert not (tmp_path / "set" / "index.json").exists()


def test_convert_to_fewer_entries(tmp_path):
    write_set(tmp_path / "set", make_plan(num_prompts=40, rows_per_shard=40, vocab_size=5000))
    digest = convert(tmp_path / "set", tmp_path / "small", Nucleus(0.7))
    source, small = TransferSet(tmp_path / "set"), TransferSet(tmp_path / "small")
    assert verify(tmp_path / "small").digest == digest == small.digest
    assert small.info.storage == {"kind": "nucleus", "p": 0.7, "max_k": 16}
    assert small.info.num_entries < source.info.num_entries and small.plan.extra == {"converted_from": source.digest}
    for number in range(40):
        before, after = source.row(number), small.row(number)
        np.testing.assert_array_equal(after.input_ids, before.input_ids)
        kept = trim(before, Nucleus(0.7, 16))
        assert after.counts.tolist() == kept.counts.tolist()
        # What is stored already is not rounded again, and the tail is what the entries leave.
        np.testing.assert_array_equal(np.sort(after.logprobs), np.sort(kept.logprobs))
    assert convert(tmp_path / "set", tmp_path / "small", Nucleus(0.7)) == digest, "a second time is nothing to do"
    convert(source[2:7], tmp_path / "view")
    view = TransferSet(tmp_path / "view")
    assert view.plan.storage == source.plan.storage and view.info.num_entries == source[2:7].info.num_entries
    np.testing.assert_array_equal(view.row(0).input_ids, source.row(2).input_ids)


@pytest.mark.parametrize(("stored", "wanted", "result"), [
    (TopK(50), TopK(8), TopK(8)), (TopK(5), TopK(8), TopK(5)), (TopK(50), Nucleus(0.9, 64), Nucleus(0.9, 50)),
    (Nucleus(0.8, 10), TopK(20), Nucleus(0.8, 10)), (Nucleus(0.8, 10), Nucleus(0.9, 5), Nucleus(0.8, 5)),
    (Sampled(9), Sampled(9), Sampled(9)), (Sampled(9), Sampled(8), None), (Sampled(9), TopK(3), None),
    (TopK(3), Sampled(9), None),
])  # fmt: skip
def test_narrow(stored, wanted, result):
    if result is None:
        refused(ConfigError, "draws would lose their balance", narrow, stored, wanted)
    else:
        assert narrow(stored, wanted) == narrow(result, result) == result


@pytest.mark.parametrize("rule", [Nucleus(0.5, 64), Nucleus(0.9, 3), TopK(2), Sampled(5)])
def test_trim_keeps_the_fewest_entries_that_hold_the_mass(rule):
    row = make_row(make_plan(), 3)
    wanted, start = [], 0
    for count in row.counts.tolist():
        order = sorted(range(start, start + count), key=lambda i: -row.logprobs[i])
        start, mass = start + count, 0.0
        most = {TopK: 2, Nucleus: getattr(rule, "max_k", 0), Sampled: count}[type(rule)]
        for i in order[:most]:
            if isinstance(rule, Nucleus) and mass >= rule.p:
                break
            wanted.append(i)
            mass += math.exp(row.logprobs[i])
    assert trim(row, rule).token_ids.tolist() == row.token_ids[wanted].tolist()


@pytest.mark.parametrize("rule", [TopK(1), TopK(20), Nucleus(0.8), Nucleus(0.95)])
@pytest.mark.parametrize("vocab_size", [49_152, 128_256])  # ids in 16 bits, and in 32
def test_the_estimate_is_within_a_tenth_on_answers_of_a_real_model(tmp_path, vocab_size, rule):
    answers = TransferSet(ANSWERS)
    plan = replace(answers.plan, vocab_size=vocab_size, storage=storage_rule_to_dict(rule), rows_per_shard=5)
    spread = vocab_size / answers.plan.vocab_size

    def spread_out(number):
        row = trim(answers.row(number), rule)
        ids = {name: (getattr(row, name) * spread).astype(int) for name in ("input_ids", "token_ids")}
        return replace(row, **ids)

    write_rows(tmp_path / "set", plan, spread_out)
    info = TransferSet(tmp_path / "set").info
    prompt_tokens = info.num_tokens - info.num_response_tokens
    estimate = estimate_bytes(plan, prompt_tokens, info.num_response_tokens, info.mean_entries)
    assert abs(estimate / info.num_bytes - 1) < 0.1
    assert estimate_bytes(plan, prompt_tokens, info.num_response_tokens) > 0


def test_expected_entries():
    found = [expect_entries(rule) for rule in (TopK(50), Nucleus(1.0, max_k=64))]
    assert found == [50, 64] and max_entries(Nucleus(0.9, max_k=64), 10) == 10 and 5 < expect_entries(Sampled(50)) < 6.5
    for p, entries in ((0.9, 5.0), (0.95, 9.1), (0.99, 22.3)):  # measured, see DESIGN
        assert abs(expect_entries(Nucleus(p)) / entries - 1) < 0.25
