"""Re-encoding, trimming, and the estimate before a capture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transfer_sets import make_plan, make_row, write_rows, write_set

from quantkd.errors import ConfigError
from quantkd.transfer_set import TransferRow, TransferSet, convert, estimate_bytes, verify
from quantkd.transfer_set.conversion import expect_entries, trim
from quantkd.transfer_set.rules import Nucleus, Sampled, StorageRule, TopK, max_entries, narrow, storage_rule_to_dict

ANSWERS = Path(__file__).parent / "golden" / "answers"  # SmolLM2-135M's to 8 questions of GSM8K, nucleus 0.95


def test_convert_to_fewer_entries(tmp_path: Path) -> None:
    write_set(tmp_path / "set", make_plan(num_prompts=40, rows_per_shard=40, vocab_size=5000))
    digest = convert(tmp_path / "set", tmp_path / "small", Nucleus(0.7))
    source, small = TransferSet(tmp_path / "set"), TransferSet(tmp_path / "small")
    assert verify(tmp_path / "small").digest == digest == small.digest
    assert small.info.storage == {"kind": "nucleus", "p": 0.7, "max_k": 16}
    assert small.info.num_entries < source.info.num_entries
    assert small.plan.extra == {"converted_from": source.digest}
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


@pytest.mark.parametrize(
    ("stored", "wanted", "result"),
    [
        (TopK(50), TopK(8), TopK(8)),
        (TopK(5), TopK(8), TopK(5)),
        (TopK(50), Nucleus(0.9, 64), Nucleus(0.9, 50)),
        (Nucleus(0.8, 10), TopK(20), Nucleus(0.8, 10)),
        (Nucleus(0.8, 10), Nucleus(0.9, 5), Nucleus(0.8, 5)),
        (Sampled(9), Sampled(9), Sampled(9)),
        (Sampled(9), Sampled(8), None),
        (Sampled(9), TopK(3), None),
        (TopK(3), Sampled(9), None),
    ],
)
def test_narrow(stored: StorageRule, wanted: StorageRule, result: StorageRule | None) -> None:
    if result is None:
        with pytest.raises(ConfigError, match="draws would lose their balance"):
            narrow(stored, wanted)
    else:
        assert narrow(stored, wanted) == narrow(result, result) == result


def test_trim_keeps_the_fewest_entries_that_hold_the_mass() -> None:
    row = make_row(make_plan(), 3)
    for rule in (Nucleus(0.5, 64), Nucleus(0.9, 3), TopK(2), Sampled(5)):
        cut = trim(row, rule)
        start = at = 0
        for count, kept in zip(row.counts.tolist(), cut.counts.tolist(), strict=True):
            order = sorted(range(start, start + count), key=lambda i: -row.logprobs[i])
            wanted = order
            if isinstance(rule, TopK):
                wanted = order[: rule.k]
            if isinstance(rule, Nucleus):
                mass = [float(np.exp(np.float64(row.logprobs[order[:n]])).sum()) for n in range(count)]
                wanted = [i for n, i in enumerate(order[: rule.max_k]) if mass[n] < rule.p]
            assert cut.token_ids[at : at + kept].tolist() == row.token_ids[wanted].tolist()
            start, at = start + count, at + kept


@pytest.mark.parametrize("rule", [TopK(1), TopK(20), Nucleus(0.8), Nucleus(0.95)])
@pytest.mark.parametrize("vocab_size", [49_152, 128_256])  # ids in 16 bits, and in 32
def test_the_estimate_is_within_a_tenth_on_answers_of_a_real_model(
    tmp_path: Path, vocab_size: int, rule: StorageRule
) -> None:
    answers = TransferSet(ANSWERS)
    plan = replace(answers.plan, vocab_size=vocab_size, storage=storage_rule_to_dict(rule), rows_per_shard=5)
    spread = vocab_size / answers.plan.vocab_size

    def spread_out(number: int) -> TransferRow:
        row = trim(answers.row(number), rule)
        ids = {name: (getattr(row, name) * spread).astype(int) for name in ("input_ids", "token_ids")}
        return replace(row, **ids)

    write_rows(tmp_path / "set", plan, spread_out)
    info = TransferSet(tmp_path / "set").info
    prompt_tokens = info.num_tokens - info.num_response_tokens
    estimate = estimate_bytes(plan, prompt_tokens, info.num_response_tokens, info.mean_entries)
    assert abs(estimate / info.num_bytes - 1) < 0.1
    assert estimate_bytes(plan, prompt_tokens, info.num_response_tokens) > 0


def test_expected_entries() -> None:
    assert expect_entries(TopK(50)) == 50
    assert 5 < expect_entries(Sampled(50)) < 6.5
    for p, entries in ((0.9, 5.0), (0.95, 9.1), (0.99, 22.3)):  # measured, see DESIGN
        assert abs(expect_entries(Nucleus(p)) / entries - 1) < 0.25
    assert expect_entries(Nucleus(1.0, max_k=64)) == 64
    assert max_entries(Nucleus(0.9, max_k=64), 10) == 10
