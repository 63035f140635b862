"""The format as docs/transfer-set-format.md says: golden sets, the page's own reader, rounding, what rows may hold."""

import dataclasses
import json
import math
import re
import shutil
import tempfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.numpy import load_file
from transfer_sets import assert_same_row, make_plan, make_row, row_of, storage_order, write_rows, write_set

from quantkd.errors import TransferSetError
from quantkd.transfer_set import FORMAT_VERSION, TransferRow, TransferSet, verify
from quantkd.transfer_set.codec import BLOCK_BYTES, BLOCK_ROWS, encode_logprobs, encode_normalizers
from quantkd.transfer_set.documents import canonical_json, parse_canonical_json
from quantkd.transfer_set.rules import Nucleus
from tests.conftest import refused

UNIT = 2.0**-11  # half a step of float16, relative

GOLDEN = Path(__file__).parent / "golden"
PAGE = Path(__file__).parent.parent / "docs" / "transfer-set-format.md"
READER = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[-1]
PLANS = {
    # 70,000 ids need 17 bits; temperatures below and above 1.
    "wide": make_plan(vocab_size=70_000, temperatures=(0.5, 1.0, 2.0), num_prompts=3, rows_per_shard=2),
    "narrow": make_plan(
        vocab_size=300, temperatures=(1.0,), num_prompts=3, rows_per_shard=2,
        storage={"kind": "topk", "k": 300}, responses="given", generation={}, extra={"note": "caf\u00e9"},
    ),
}  # fmt: skip
VALID = TransferRow(
    input_ids=np.array([5, 6, 7, 8]), spans=np.array([[1, 2], [3, 4]]), counts=np.array([2, 1]),
    token_ids=np.array([6, 9, 8]), logprobs=np.log(np.array([0.5, 0.25, 0.75], dtype=np.float32)),
    log_normalizers=np.array([[0.0, 1.5], [0.0, 1.0]], dtype=np.float32),
)  # fmt: skip
ROW = st.tuples(st.integers(1, 12), st.integers(0, 11), st.integers(0, 2**20), st.booleans(), st.booleans())


def golden_rows(plan):
    """Rows written out by hand: two spans, labels in and outside the entries, a sure target, and a row without any."""
    high = plan.vocab_size - 1
    probabilities = [[0.6, 0.25, 0.1], [1.0], [0.3, 0.3, 0.2, 0.1, 0.05], [0.97], [0.5, 0.5], [0.9, 0.06]]
    ids = [[high, 0, 17], [5], [9, 200, 7, high, 8], [299], [1, 0], [2, 250]]
    tables = {0.5: [-0.8, 0.0, -1.4, -0.06, -0.69, -0.2], 1.0: [0.0] * 6, 2.0: [1.5, 0.2, 2.5, 0.6, 0.9, 0.7]}
    normalizers = np.array([tables[t] for t in plan.temperatures], dtype=np.float32).T

    def row(input_ids, spans, targets, finished):
        chosen = probabilities[targets]
        return TransferRow(
            np.array(input_ids), spans=np.array(spans, np.int64).reshape(-1, 2),
            counts=np.array([len(part) for part in chosen], np.int64),
            token_ids=np.array([i for part in ids[targets] for i in part], np.int64),
            logprobs=np.array([math.log(p) for part in chosen for p in part], np.float32),
            log_normalizers=normalizers[targets], finished=finished,
        )  # fmt: skip

    return [
        row([10, high, 0, 5, 200, 3], [[1, 2], [3, 5]], slice(0, 3), True),
        row([high], [], slice(0, 0), False),
        row([7, 8, 299, 4, 2], [[2, 5]], slice(3, 6), True),
    ]


def compare_by_the_page(folder):
    namespace = {}
    exec(compile(READER, str(PAGE), "exec"), namespace)
    found, transfer_set = list(namespace["read_set"](folder)), TransferSet(folder)
    assert len(found) == len(transfer_set)
    for (input_ids, targets, finished), row in zip(found, transfer_set.rows(range(len(transfer_set))), strict=True):
        np.testing.assert_array_equal(input_ids, row.input_ids)
        assert [target[0] for target in targets] == [t for start, stop in row.spans for t in range(start, stop)]
        assert [i for target in targets for i in target[1]] == row.token_ids.tolist()
        assert [len(target[1]) for target in targets] == row.counts.tolist()
        np.testing.assert_allclose(np.concatenate([[], *(t[2] for t in targets)]), row.logprobs, rtol=1e-6)
        expected = np.array([t[3] for t in targets]).reshape(row.log_normalizers.shape)
        np.testing.assert_allclose(expected, row.log_normalizers, rtol=1e-6)
        assert finished == row.finished


def opened(folder):
    """Every file of a set, with the blocks of shards decompressed: another build of zlib may pack them otherwise."""
    content = {}
    for file in folder.iterdir():
        content[file.name] = file.read_bytes()
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            length = int.from_bytes(content[file.name][:8], "little")
            header = json.loads(content[file.name][8 : 8 + length])
            for name, field in header.items():  # no metadata; aligned, so that a map can be read in place
                assert (8 + length + field["data_offsets"][0]) % tensors[name].itemsize == 0
            ends = np.cumsum(tensors["blocks"][:, 1])
            blocks = np.split(tensors["data"], ends[:-1])
            content[file.name] = tensors["rows"].tobytes() + b"".join(zlib.decompress(b.tobytes()) for b in blocks)
    index = json.loads(content.pop("index.json"))
    for shard in index["shards"]:
        del shard["bytes"], shard["sha256"]
    return {**content, "index.json": json.dumps([index["plan"], index["shards"], index["counters"]]).encode()}


@pytest.mark.parametrize("name", PLANS)
def test_golden_sets_are_what_was_written_by_hand_byte_for_byte(name, tmp_path):
    write_rows(tmp_path / "written", PLANS[name], golden_rows(PLANS[name]).__getitem__)
    assert opened(tmp_path / "written") == opened(GOLDEN / name)
    assert sum(file.stat().st_size for file in (GOLDEN / name).iterdir()) < 5000
    folder = Path(shutil.copytree(GOLDEN / name, tmp_path / "set"))
    for path in (*folder.iterdir(), folder):
        path.chmod(0o500)  # nothing is written to read a set
    assert verify(folder).rows == 3
    transfer_set = TransferSet(folder, verify="full")
    for wanted, found in zip(golden_rows(PLANS[name]), transfer_set.rows(range(3)), strict=True):
        assert_same_row(found, wanted)
        np.testing.assert_allclose(found.logprobs, wanted.logprobs[storage_order(wanted)], rtol=2**-11)
        np.testing.assert_allclose(found.log_normalizers, wanted.log_normalizers, rtol=2**-11)


@pytest.mark.parametrize("vocab_size", [200, 70_000])
def test_the_reader_in_the_docs_reads_what_quantkd_reads(tmp_path, vocab_size):
    plan = make_plan(vocab_size=vocab_size, num_prompts=11, rows_per_shard=11)  # two blocks
    write_set(tmp_path / "set", plan, label_rank=None)
    for folder in (tmp_path / "set", *(GOLDEN / name for name in PLANS)):
        compare_by_the_page(folder)
    assert len([line for line in READER.splitlines() if line.strip()]) <= 60
    assert f"version {FORMAT_VERSION}" in PAGE.read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("temperature", [0.25, 0.5, 2.0, 10.0])
@pytest.mark.parametrize("kept", [20, 300])  # 300 is the whole vocabulary: no tail hides a mass above 1
def test_normalizers_stay_within_the_stated_bounds_and_leave_a_tail(temperature, kept):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 300)) * rng.uniform(0, 9, size=(50, 1))
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    wanted = np.log(np.exp(logprobs / temperature).sum(-1))
    counts = np.full(50, kept)
    stored = encode_logprobs(np.sort(logprobs, -1)[:, ::-1][:, :kept].ravel(), counts)
    found = encode_normalizers(wanted, stored, counts, temperature).astype(np.float64)
    mass = np.exp(stored.astype(np.float64).reshape(50, kept) / temperature - found[:, None]).sum(-1)
    assert (mass <= 1 + 1e-12).all()
    # One step, and where all ids are stored what their own rounding moves.
    moved = np.abs(stored.astype(np.float64).reshape(50, kept)).max(-1) * 2 * UNIT / temperature
    assert (np.abs(found - wanted) <= 2 * UNIT * np.abs(wanted) + moved).all()


def test_blocks_hold_a_few_rows_and_a_long_row_alone(tmp_path):
    plan = make_plan(num_prompts=20, rows_per_shard=20, storage={"kind": "topk", "k": 1000}, temperatures=(1.0,))
    rows = [make_row(plan, number) for number in range(20)]
    flat = np.zeros((300, plan.vocab_size))
    rows[5] = row_of(plan, flat, plan.rule, np.zeros(301, np.int64), [[1, 301]], True)
    assert 4 * flat.size > BLOCK_BYTES
    write_rows(tmp_path / "set", plan, rows.__getitem__)
    transfer_set = TransferSet(tmp_path / "set", verify="full")
    assert transfer_set.whole_store.index.shards[0].size.blocks == 4  # 5, 1, then 8 and 6 of the rest
    assert BLOCK_ROWS == 8
    for number in (19, 5, 4, 6):
        assert_same_row(transfer_set.row(number), rows[number])


@pytest.mark.parametrize(("name", "value", "message"), [
    ("input_ids", [5.0, 6, 7, 8], "`input_ids` must be an integer array"), ("spans", [[1, 2, 3]], r"shape \(S, 2\)"),
    ("spans", [1, 2], "`spans` must be an integer array of 2"), ("input_ids", np.zeros(0, int), "holds 1 to"),
    ("spans", [[0, 2]], "ascending, disjoint"), ("spans", [[1, 2], [4, 5]], "ascending, disjoint"),
    ("spans", [[1, 2]], "cover 1 targets, but `counts` has 2"), ("logprobs", [-1.0, -1.0, 0.1], "at most 0"),
    ("logprobs", [0, 0, 0], "`logprobs` must be a float array"), ("token_ids", [6, 9, -1], "`token_ids` holds -1 at 2"),
    ("logprobs", [0.0, 0.0], "`logprobs` must be a float array"), ("logprobs", [0.0, -math.inf, 0.0], "must be finite"),
    ("log_normalizers", [[0.0], [0.0]], "`log_normalizers` must be a float array"),
    ("input_ids", [5, 6, 7, 10], "holds 10 at 3; the vocabulary ends at 10"),
    ("input_ids", [-1, 6, 7, 8], "`input_ids` holds -1 at 0"),
    ("token_ids", [9, 9, 8], "Token 9 occurs twice among the entries of target 0"),
    ("logprobs", [-0.1, -0.1, 0.0], "target 0 hold a mass of 1.8"),
    ("log_normalizers", [[0.1, 1.5], [0, 1]], "temperature 1 must be 0"),
    ("log_normalizers", [[0, math.inf], [0, 1]], "`log_normalizers` must be finite"),
])  # fmt: skip
def test_rows_that_are_refused(name, value, message):
    array = np.array(value)
    array = array.astype(np.float32) if array.dtype == np.float64 else array
    refused(TransferSetError, message, dataclasses.replace(VALID, **{name: array}).validate, 10, (1.0, 2.0))


def test_sure_and_hopeless_entries_have_a_value_and_documents_are_canonical():
    stored = encode_logprobs(np.array([1e-6, 0.0, -1e9], np.float32), np.array([1, 2]))
    assert stored.tolist() == [0.0, 0.0, -65504.0]
    value = {"b": [1, 2.5, None, True, "ok\n\t"], "a": "caf\u00e9 \\[{"}
    assert parse_canonical_json(canonical_json(value), "x.json") == value
    refused(TransferSetError, "plain JSON", canonical_json, {"x": math.nan})
    with pytest.raises(TransferSetError, match=r"x.json is not in canonical form at byte 1"):
        parse_canonical_json(b'{ "a":1}\n', "x.json")


@pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_valid_rows_come_back_within_the_stated_bounds(examples):
    checks = list(HealthCheck)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=checks)
    @given(st.lists(st.one_of(ROW, st.none()), min_size=1, max_size=6),
           st.sampled_from([1, 2, 100, 256, 257, 65_536, 66_000]),
           st.sampled_from([(1.0,), (1.0, 2.0), (0.5,), (0.5, 1.0, 4.0)]), st.integers(1, 4))  # fmt: skip
    def run(rows, vocab, temperatures, per_shard):
        plan = make_plan(
            vocab_size=vocab, temperatures=temperatures, num_prompts=len(rows),
            rows_per_shard=per_shard, storage={"kind": "topk", "k": min(vocab, 300)},
        )  # fmt: skip
        made = [None if row is None else _row(plan, *row) for row in rows]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "set"
            digest = write_rows(path, plan, made.__getitem__)
            assert verify(path).digest == digest
            transfer_set = TransferSet(path)
            found = transfer_set.rows(range(len(transfer_set)))
            info = transfer_set.info
        assert (info.num_rows, info.num_prompts) == (len(rows) - rows.count(None), len(rows))
        assert math.isnan(info.bytes_per_response_token) == (info.num_response_tokens == 0)
        for wanted, got in zip([row for row in made if row is not None], found, strict=True):
            assert_same_row(got, wanted)

    run()


def _row(plan, length, start, seed, two_spans, dense):
    """A valid row: none or all positions targets, one entry or the whole vocabulary, huge or flat logits."""
    rng = np.random.default_rng(seed)
    start = min(1 + start, length)
    spans = [[start, length]] if start < length else []
    if two_spans and length - start >= 3:
        spans = [[start, start + 1], [start + 2, length]]
    targets = sum(stop - begin for begin, stop in spans)
    logits = rng.normal(size=(targets, plan.vocab_size)) * rng.choice([0.0, 1e-6, 1.0, 5.0, 50.0])
    rule = plan.rule if dense else Nucleus(0.9, min(plan.vocab_size, 20))
    row = row_of(plan, logits, rule, rng.integers(0, plan.vocab_size, size=length), spans, bool(seed % 2))
    backwards = np.lexsort((row.logprobs, np.repeat(np.arange(targets), row.counts)))  # a writer takes any order
    return dataclasses.replace(row, token_ids=row.token_ids[backwards], logprobs=row.logprobs[backwards])
