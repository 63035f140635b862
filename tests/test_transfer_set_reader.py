"""Reading a transfer set: rows, batches, views, joined sets, and what `info` says of them."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transfer_sets import commit, make_plan, make_row, storage_order, write_set

from quantkd.errors import ConfigError, TransferSetError
from quantkd.transfer_set import TransferSet, TransferSetWriter, store, verify
from quantkd.transfer_set.index import read_plan, read_record
from quantkd.transfer_set.rules import Sampled, parse_storage_rule, select_entries
from quantkd.transfer_set.topk import TopKLogprobs
from tests.conftest import refused

transfer_set = pytest.fixture(lambda path: TransferSet(path))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader") / "set"
    write_set(folder, make_plan(num_prompts=23))
    return folder


def numbers(transfer_set):
    return [tuple(row["input_ids"].tolist()) for row in transfer_set]


def test_rows_and_a_batch_which_is_its_rows_end_to_end(transfer_set):
    for number in (0, 5, 22, -1):
        wanted, row = make_row(transfer_set.plan, number % 23), transfer_set[number]
        teacher, start = row["teacher"], int(wanted.spans[0, 0])
        assert set(row) == {"input_ids", "labels", "teacher", "finished"} and row["finished"] is wanted.finished
        assert isinstance(teacher, TopKLogprobs) and (teacher.temperatures, teacher.vocab_size) == ((1.0, 2.0), 1000)
        labels = np.append(np.full(start, -100), wanted.input_ids[start:])
        for found, expected in (
            (row["input_ids"], wanted.input_ids), (row["labels"], labels), (teacher.counts, wanted.counts),
            (teacher.token_ids, wanted.token_ids[storage_order(wanted)]),
        ):  # fmt: skip
            np.testing.assert_array_equal(found, expected)
        for temperature in (1.0, 2.0):
            logprobs, tail = teacher.at_temperature(temperature)
            assert (tail >= 0).all() and torch.isfinite(logprobs).all()
    chosen = [7, 8, 9, 3, 22, 3, 4, -1, 0, 1]
    batch = transfer_set.__getitems__(chosen)
    rows = [transfer_set[number] for number in chosen]
    assert len(batch) == len(chosen) and torch.equal(batch.input_ids, torch.cat([row["input_ids"] for row in rows]))
    assert torch.equal(batch.labels, torch.cat([row["labels"] for row in rows]))
    assert batch.lengths.tolist() == [len(row["input_ids"]) for row in rows]
    assert batch.target_counts.tolist() == [int((row["labels"] != -100).sum()) for row in rows]
    assert batch.finished.tolist() == [row["finished"] for row in rows]
    teacher = TopKLogprobs.concatenate([row["teacher"] for row in rows])
    for name in ("offsets", "token_ids", "logprobs", "log_normalizers"):
        assert torch.equal(getattr(batch.teacher, name), getattr(teacher, name))
    empty = transfer_set.__getitems__([])
    assert len(empty) == empty.input_ids.numel() == len(empty.teacher) == 0
    for number in (23, -24, 10**9):
        refused(IndexError, "23 rows", transfer_set.select, [number])


def test_views_and_splits(transfer_set, path):
    every = numbers(transfer_set)
    assert numbers(transfer_set[3:11:2]) == every[3:11:2] and numbers(transfer_set[10:][2:5]) == every[12:15]
    assert numbers(transfer_set[::-1]) == every[::-1]
    assert numbers(transfer_set.select([4, -1, 4])) == [every[4], every[-1], every[4]]
    assert numbers(transfer_set.select(np.arange(23) % 5 == 0)) == every[::5]
    assert len(transfer_set[5:5]) == 0 and transfer_set[5:5].info.num_tokens == 0
    assert transfer_set[2:4].lengths.tolist() == [len(row) for row in every[2:4]]
    refused(ConfigError, "mask has 3 values for 23 rows", transfer_set.select, np.array([True, False, True]))
    state = (random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist())
    rest, held_out = transfer_set.split(0.25, seed=0)
    every = numbers(transfer_set)
    assert [every.index(row) for row in numbers(held_out)] == [2, 3, 11, 13, 20, 21]  # in every release
    assert sorted(numbers(rest) + numbers(held_out)) == sorted(every)
    assert TransferSet(path).split(0.25, seed=0)[0].digest == rest.digest != transfer_set.split(0.25, seed=1)[0].digest
    assert state == (random.getstate(), str(np.random.get_state()), torch.random.get_rng_state().tolist())
    for fraction in (0.0, 1.0, 0.01, 0.99, -1.0, float("nan")):
        refused(ConfigError, "leaves one part empty", transfer_set.split, fraction, seed=0)
    refused(ConfigError, "seed is -1; expected a number of at least 0", transfer_set.split, 0.5, seed=-1)


def test_joined_sets_and_what_cannot_be_joined(transfer_set, tmp_path):
    first, second = transfer_set, write_set(tmp_path / "other", make_plan(num_prompts=5, teacher_name="second"))
    joined = TransferSet.concatenate([first, second[1:4], first[:1]])
    assert numbers(joined) == numbers(first) + numbers(second[1:4]) + numbers(first[:1])
    assert joined.info.teacher_name == "tiny-teacher, second"
    assert joined.info.num_rows == 27 and joined.info.num_prompts == 23 + 5 + 23
    mixed = joined.__getitems__([22, 23, 26, 0])
    assert torch.equal(mixed.input_ids, torch.cat([joined[number]["input_ids"] for number in (22, 23, 26, 0)]))
    assert torch.equal(mixed.labels, torch.cat([joined[number]["labels"] for number in (22, 23, 26, 0)]))
    assert mixed.weights is None and "weight" not in joined[0]
    assert len({joined.digest, first.digest, second.digest, TransferSet.concatenate([first]).digest}) == 3
    weighted = TransferSet.concatenate([TransferSet.concatenate([first, second], [2.0, 1.0]), second], [1.0, 0.5])
    batch = weighted.__getitems__([0, 23, 28])
    assert batch.weights is not None and batch.weights.tolist() == [2.0, 1.0, 0.5] and weighted[0]["weight"] == 2.0
    assert weighted.digest != TransferSet.concatenate([first, second, second]).digest
    mixed = TransferSet.concatenate([first, second, weighted]).__getitems__([0, 28])
    assert mixed.weights is not None and mixed.weights.tolist() == [1.0, 2.0]
    sets = [first, write_set(tmp_path / "third", make_plan(tokenizer_fingerprint="f" * 64, num_prompts=2))]
    bad_weights = ([1.0], [1.0, 0.0], [1.0, float("inf")], [1.0, float("nan")])
    for message, *arguments in (
        ("differ in tokenizer_fingerprint", sets),
        ("at least one", []),
        *(("finite number above 0", sets, weights) for weights in bad_weights),
    ):
        refused(ConfigError, message, TransferSet.concatenate, *arguments)
    with pytest.raises(ConfigError, match="one vocabulary size"):
        TopKLogprobs.concatenate([TopKLogprobs.from_dense(torch.zeros(1, size)) for size in (3, 4)])


def test_entries_that_are_picked():
    assert TopKLogprobs.from_dense(torch.zeros(2, 3)).select(torch.tensor([False, True])).counts.tolist() == [3]
    refused(ConfigError, r"needs uniforms of shape \(N, 2\)", select_entries, torch.zeros(1, 3), Sampled(2), (1.0,))
    for text, message in (("topk", "Cannot read"), ("evil:3", "Cannot read"), ("topk:0", "to 16777216, found 0")):
        refused(ConfigError, message, parse_storage_rule, text)


def test_info(path, transfer_set):
    rows = [make_row(transfer_set.plan, number) for number in range(23)]
    info = transfer_set.info
    assert (info.num_rows, info.num_prompts, info.complete, info.vocab_size) == (23, 23, True, 1000)
    for figure, part in (("tokens", "input_ids"), ("response_tokens", "counts"), ("entries", "token_ids")):
        assert getattr(info, f"num_{figure}") == sum(len(getattr(row, part)) for row in rows)
    assert info.num_bytes == sum(file.stat().st_size for file in path.iterdir())
    assert info.bytes_per_response_token == info.num_bytes / info.num_response_tokens
    assert info.counters == {"responses_cut": sum(not row.finished for row in rows)}
    assert info.storage == {"kind": "nucleus", "p": 0.95, "max_k": 16}
    assert [str(source) for source in transfer_set.sources] == [str(path)]
    view = transfer_set[:2].info
    assert (view.num_rows, view.num_entries) == (2, sum(len(row.token_ids) for row in rows[:2]))
    assert view.bytes_per_response_token == info.bytes_per_response_token
    assert np.isnan(transfer_set[:0].info.mean_entries)


def test_open_maps_are_limited(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "MAX_OPEN_MAPS", 2)
    transfer_set = write_set(tmp_path / "set", make_plan(num_prompts=23))
    order = np.random.default_rng(0).permutation(23)
    assert numbers(transfer_set.select(order)) == [numbers(transfer_set)[n] for n in order]
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert len(mapped) == 2


def test_wrong_arguments_and_missing_sets(path, tmp_path):
    digest = TransferSet.open(path).digest
    assert TransferSet.open(path, digest=digest).digest == digest
    for source, options, message in (
        (path, {"digest": "00"}, f"has the digest {digest}; expected 00"),
        (path, {"verify": "never"}, "expected 'auto', 'full' or 'off'"),
        (tmp_path / "nowhere", {}, "is not a folder"),
        (tmp_path, {}, r"it has neither index\.json nor plan\.json"),
    ):
        refused((ConfigError, TransferSetError), message, TransferSet.open, source, **options)


def test_an_unfinished_set_is_read_only_if_asked_for(tmp_path):
    with TransferSetWriter.open(tmp_path / "set", make_plan()) as writer:
        first, second, third = writer.claim()
        commit(writer, first, third)
        refused(TransferSetError, "the first 1 of 3 shards", TransferSet, tmp_path / "set")
        prefix = TransferSet(tmp_path / "set", allow_incomplete=True)
        assert (len(prefix), prefix.info.complete) == (4, False)
        refused(TransferSetError, "unfinished: it has the first 1 of 3 shards", verify, tmp_path / "set")
        assert verify(tmp_path / "set", allow_incomplete=True).rows == 4
        commit(writer, second)
        whole = TransferSet(tmp_path / "set", allow_incomplete=True)
        assert whole.info.num_bytes == sum(f.stat().st_size for f in (tmp_path / "set").glob("shard-*[s0-9]*.*s*"))
    assert prefix.digest != whole.digest


@pytest.mark.parametrize("read", [read_plan, read_record])
def test_a_set_that_is_finished_while_it_is_opened_is_read_whole(tmp_path, monkeypatch, read):
    ended = []
    with TransferSetWriter.open(tmp_path / "set", make_plan()) as writer:
        commit(writer, *writer.claim())

        def end(*args):  # the plan goes at the end, so it cannot be read after it, and a record before it can
            found = read(*args) if read is read_record else None
            ended.append(writer.finalize())
            return found or read(*args)

        monkeypatch.setattr(f"quantkd.transfer_set.source.{read.__name__}", end)
        assert len(TransferSet(tmp_path / "set", allow_incomplete=True)) == 10
    assert ended == [TransferSet(tmp_path / "set").digest]
