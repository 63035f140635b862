"""Rows, plans and documents: what is refused, and no false alarm on valid sets."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from transfer_sets import make_plan, row_of, storage_order, write_rows

from quantkd.errors import TransferSetError
from quantkd.transfer_set import Plan, TransferRow, TransferSet, row as row_module, verify
from quantkd.transfer_set.documents import canonical_json, parse_canonical_json, quote
from quantkd.transfer_set.rules import Nucleus


def change(**fields: Any) -> TransferRow:
    row = TransferRow(
        input_ids=np.array([5, 6, 7, 8]),
        spans=np.array([[1, 2], [3, 4]]),
        counts=np.array([2, 1]),
        token_ids=np.array([6, 9, 8]),
        logprobs=np.log(np.array([0.5, 0.25, 0.75], dtype=np.float32)),
        log_normalizers=np.array([[0.0, 1.5], [0.0, 1.0]], dtype=np.float32),
    )
    return dataclasses.replace(row, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"input_ids": np.array([5.0, 6, 7, 8])}, "`input_ids` must be an integer array"),
        ({"input_ids": [5, 6, 7, 8]}, "`input_ids` must be an integer array"),
        ({"spans": np.array([1, 2])}, "`spans` must be an integer array of 2"),
        ({"spans": np.array([[1, 2, 3]])}, r"shape \(S, 2\)"),
        ({"input_ids": np.zeros(0, int)}, "holds 1 to"),
        ({"spans": np.array([[0, 2]])}, "ascending, disjoint"),
        ({"spans": np.array([[1, 2], [4, 5]])}, "ascending, disjoint"),
        ({"spans": np.array([[2, 2], [3, 4]])}, "ascending, disjoint"),
        ({"spans": np.array([[1, 3], [2, 3]])}, "ascending, disjoint"),
        ({"spans": np.array([[1, 2]])}, "cover 1 targets, but `counts` has 2"),
        ({"counts": np.array([0, 3])}, "`counts` must be from 1"),
        ({"counts": np.array([2, 2])}, "sum to 4, but there are 3 ids"),
        ({"logprobs": np.zeros(3, int)}, "`logprobs` must be a float array"),
        ({"logprobs": np.zeros(2, np.float32)}, "`logprobs` must be a float array"),
        ({"log_normalizers": np.zeros((2, 1), np.float32)}, "`log_normalizers` must be a float array"),
        ({"input_ids": np.array([5, 6, 7, 10])}, "holds 10 at 3; the vocabulary ends at 10"),
        ({"input_ids": np.array([-1, 6, 7, 8])}, "`input_ids` holds -1 at 0"),
        ({"token_ids": np.array([6, 9, -1])}, "`token_ids` holds -1 at 2"),
        ({"token_ids": np.array([9, 9, 8])}, "Token 9 occurs twice among the entries of target 0"),
        ({"logprobs": np.array([0.0, math.nan, 0.0], np.float32)}, "must be finite"),
        ({"logprobs": np.array([0.0, -math.inf, 0.0], np.float32)}, "must be finite"),
        ({"logprobs": np.array([-1.0, -1.0, 0.1], np.float32)}, "at most 0"),
        ({"logprobs": np.array([-0.1, -0.1, 0.0], np.float32)}, "target 0 hold a mass of 1.8"),
        ({"log_normalizers": np.array([[0.1, 1.5], [0, 1]], np.float32)}, "temperature 1 must be 0"),
        ({"log_normalizers": np.array([[0, math.inf], [0, 1]], np.float32)}, "`log_normalizers` must be finite"),
        ({"log_normalizers": np.array([[0, 0.1], [0, 1]], np.float32)}, "at temperature 2.0; it cannot exceed 1"),
    ],
)
def test_rows_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TransferSetError, match=message):
        change(**fields).validate(10, (1.0, 2.0))


def test_limits_of_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    change(input_ids=np.array([5, 6, 7, 8], dtype=np.uint16)).validate(10, (1.0, 2.0), most=2)
    with pytest.raises(TransferSetError, match="from 1 to 1"):
        change().validate(10, (1.0, 2.0), most=1)
    monkeypatch.setattr(row_module, "MAX_ROW_ENTRIES", 2)
    with pytest.raises(TransferSetError, match="at most 2 entries, found 3"):
        change().validate(10, (1.0, 2.0))


def test_what_a_plan_refuses_and_says() -> None:
    plan = make_plan()
    assert Plan.from_json(plan.to_json()) == plan
    assert Plan.from_json(plan.to_json()).digest() == plan.digest()
    assert plan.num_shards == 3 and plan.prompt_range(2) == (8, 10)
    assert plan.differences(make_plan(extra={"a": 1})) == ["extra"]
    for fields, message in (
        ({"temperatures": [1.0]}, "ascending floats"),
        ({"num_prompts": 9000, "rows_per_shard": 1}, "at most 8192 shards, so at least 2 rows"),
        ({"generation": {1: {2}}}, "plain JSON"),
        ({"generation": {"x": math.nan}}, "plain JSON"),
        ({"extra": {"x": "y" * 2**18}}, "262144 in all"),
    ):
        with pytest.raises(TransferSetError, match=message):
            make_plan(**fields)


def test_documents_are_canonical() -> None:
    value = {"b": [1, 2.5, None, True], "a": "caf\u00e9 \\[{"}
    assert parse_canonical_json(canonical_json(value), "x.json") == value
    with pytest.raises(TransferSetError, match=r"x.json is not in canonical form at byte 1"):
        parse_canonical_json(b'{ "a":1}\n', "x.json")
    assert quote("\x1b" * 500) == "\\x1b" * 50 + "..."


ROW = st.tuples(st.integers(1, 12), st.integers(0, 11), st.integers(0, 2**20), st.booleans(), st.booleans())


@pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_valid_rows_come_back_within_the_stated_bounds(examples: int) -> None:
    @settings(
        max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    @given(
        st.lists(st.one_of(ROW, st.none()), min_size=1, max_size=6),
        st.sampled_from([1, 2, 100, 256, 257, 65_536, 66_000]),
        st.sampled_from([(1.0,), (1.0, 2.0), (0.5,), (0.5, 1.0, 4.0)]),
        st.integers(1, 4),
    )
    def run(rows: list[Any], vocab: int, temperatures: tuple[float, ...], per_shard: int) -> None:
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
            for name in ("input_ids", "spans", "counts", "finished"):
                np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name), err_msg=name)
            order = storage_order(wanted)
            np.testing.assert_array_equal(got.token_ids, wanted.token_ids[order])
            # To the nearest, or where that would lift the mass above 1, down.
            np.testing.assert_allclose(got.logprobs, wanted.logprobs[order], rtol=2**-10, atol=2**-24)

    run()


def _row(plan: Plan, length: int, start: int, seed: int, two_spans: bool, dense: bool) -> TransferRow:
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
