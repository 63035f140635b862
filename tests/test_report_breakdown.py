"""The report of calibration, both divergences, differences, and KL by bin: known answers, and the same bytes again."""

from typing import Any

import numpy as np
import pytest

from quantkd.report import format_table
from tests import report_arms
from tests.report_arms import bootstrap_by_scipy, build, make_fidelity, make_verdicts, read_tables

NUM_ROWS = 12
KL = {"teacher": 0.0, "before": 0.4, "after": 0.1, "control": 0.3}


def make_arm(name: str, dense: bool = True) -> dict[str, Any]:
    """KL grows with the row's number, with position and, threefold, with entropy; most bins have no token."""
    level, rng = KL[name], np.random.default_rng(len(name))
    tokens = np.array([[8, 4 + row % 3] for row in range(NUM_ROWS)])
    kl = tokens * level * (1 + 0.05 * np.arange(NUM_ROWS))[:, None] * [0.5, 2.0]
    by_entropy = np.stack([tokens[:, 0] - 2, tokens.sum(1) - tokens[:, 0] + 2], axis=1)
    entropy_kl = np.stack([kl.sum(1) / 4, 3 * kl.sum(1) / 4], axis=1)
    sure = by_entropy[:, ::-1]
    correct = np.minimum(sure, np.stack([sure[:, 0] // 2, sure[:, 1] - (rng.random(NUM_ROWS) < level)], axis=1))
    count = tokens.sum(1)
    fidelity = make_fidelity(
        count, kl.sum(1), count * (0.3 + level), count - np.arange(NUM_ROWS) % 2, dense,
        position_tokens=tokens, position_kl_sum=kl, entropy_tokens=by_entropy, entropy_kl_sum=entropy_kl,
        confidence_tokens=sure, confidence_confidence_sum=sure * [0.4, 0.9], confidence_correct=correct,
    )  # fmt: skip
    solved = {"teacher": 90, "before": 84, "after": 88, "control": 85}[name]
    questions = {"0-shot": make_verdicts(solved)}
    return {**report_arms.make_arm(name, 0, 0), "title": f"the {name}", "fidelity": fidelity, "questions": questions}


@pytest.fixture
def arms():
    return {name: make_arm(name) for name in KL}


def test_divergences_and_calibration(tmp_path, arms):
    results, _ = build(tmp_path, arms)
    for name, arm in arms.items():
        metrics, bins = results["arms"][name]["metrics"], arm["fidelity"]["bins"]["confidence"]
        tokens = sum(arm["fidelity"]["rows"]["tokens"])
        for key, factor in (("reverse_kl", 1.5), ("dense_kl", 1.1), ("dense_reverse_kl", 1.7)):
            assert metrics[key]["value"] == pytest.approx(factor * metrics["kl"]["value"])
        assert metrics["dense_top1_agreement"]["value"] == 1
        sums = [np.sum(bins[key], axis=0) for key in ("confidence_sum", "correct")]
        ece = sum(abs(a - b) for a, b in zip(*sums, strict=True)) / tokens  # Guo et al. 2017, equation 3
        assert metrics["ece"]["value"] == pytest.approx(ece)
        low, high = metrics["ece"]["interval"]
        assert 0 < low <= high < 1
    assert results["gap_recovered"]["reverse_kl"] == pytest.approx(0.75)
    assert results["metric_order"][-5:-3] == ["reverse_kl", "ece"]
    assert "Calibration error (ECE)" in format_table(results)


def test_the_calibration_interval_is_scipy_s_paired_bootstrap_over_rows(tmp_path, arms):
    bins = arms["before"]["fidelity"]["bins"]["confidence"]
    columns = [np.array(bins[key])[:, b] for key in ("confidence_sum", "correct", "tokens") for b in (0, 1)]

    def ece(*drawn, axis=-1):
        sums = [one.sum(axis) for one in drawn]
        return (abs(sums[0] - sums[2]) + abs(sums[1] - sums[3])) / (sums[4] + sums[5])

    found = build(tmp_path, arms)[0]["arms"]["before"]["metrics"]["ece"]["interval"]
    assert tuple(found) == pytest.approx(bootstrap_by_scipy(columns, ece), rel=1e-9)


def test_differences_are_paired(tmp_path, arms):
    results, page = build(tmp_path, arms)
    after = results["arms"]["after"]
    assert list(after["differences"]) == ["before", "control", "teacher"]
    for other, found in after["differences"].items():
        expected = after["metrics"]["kl"]["value"] - results["arms"][other]["metrics"]["kl"]["value"]
        assert found["kl"]["value"] == pytest.approx(expected)
        assert found["kl"]["interval"][0] <= expected <= found["kl"]["interval"][1]
    assert after["differences"]["before"]["accuracy_0_shot"]["value"] == pytest.approx(0.04)
    # Cross-entropy differs by the same in each row: no width, wide as each arm's own interval may be.
    assert after["differences"]["control"]["ce"]["interval"] == pytest.approx([-0.2, -0.2])
    assert list(results["arms"]["control"]["differences"]) == ["before", "teacher"]
    gap = results["arms"]["teacher"]["differences"]["before"]["kl"]["value"]
    assert gap == pytest.approx(-results["arms"]["before"]["differences"]["teacher"]["kl"]["value"]) and gap < 0
    assert "less the control" in page


def test_kl_by_bin(tmp_path, arms):
    results, page = build(tmp_path, arms)
    for name, arm in arms.items():
        for kind in ("position", "entropy"):
            bins, found = arm["fidelity"]["bins"][kind], results["arms"][name][f"kl_by_{kind}"]
            sums, tokens = np.sum(bins["kl_sum"], axis=0), np.sum(bins["tokens"], axis=0)
            assert [one["tokens"] for one in found] == tokens.tolist()
            total = sum(one["value"] * one["tokens"] for one in found if one["tokens"])
            assert total == pytest.approx(results["arms"][name]["metrics"]["kl"]["value"] * tokens.sum())
            for one, nats, count in zip(found, sums, tokens, strict=True):
                assert one["value"] == (pytest.approx(nats / count) if count else None)
            dense = results["arms"][name][f"dense_kl_by_{kind}"]
            assert dense[0]["value"] == pytest.approx(1.1 * found[0]["value"])
    first, last = results["arms"]["after"]["kl_by_position"][0], results["arms"]["after"]["kl_by_position"][-1]
    assert first["interval"][0] < first["value"] < first["interval"][1] and (first["from"], first["to"]) == (0, 8)
    assert last == {"from": 512, "to": None, "tokens": 0, "value": None, "interval": None}
    assert "whole vocabulary: token | Tokens | the before | the after | the control |" in page
    assert "\n| 1 to 8 | 96 |" in page and "\n| 0.01 to 0.1 |" in page and "513 and on" not in page
    assert len(read_tables(page)) == 6
    assert "](kl_bins.png)" in page and (tmp_path / "kl_bins.png").stat().st_size > 10_000


def test_sparse_bins_are_shown_where_an_arm_has_no_others(tmp_path, arms):
    arms["control"] = make_arm("control", dense=False)
    assert "KL by position in the answer: token |" in build(tmp_path, arms)[1]
    for arm in arms.values():
        arm["fidelity"] = None
    results, page = build(tmp_path, arms)
    assert "## KL by position" not in page and not (tmp_path / "kl_bins.png").exists()
    assert "ece" not in results["metric_order"]


def test_questions_needed(tmp_path, arms):
    """6 of 100 questions are the teacher's alone: (1.95996 sqrt(.06) + .84162 sqrt(.06 - .0036))^2 / .0036 = 128.4."""
    results, page = build(tmp_path, arms)
    assert results["questions_needed"]["accuracy_0_shot"] == 129
    assert results["arms"]["after"]["mcnemar"]["accuracy_0_shot"]["teacher"]["questions_needed"] > 129
    assert "| 0 | 6 | 0.0312 | 129 |" in page
    arms["before"]["questions"] = arms["control"]["questions"]
    results, _ = build(tmp_path, arms)
    # (1.95996 sqrt(.05) + .84162 sqrt(.05 - .0025))^2 / .0025 = (0.43826 + 0.18343)^2 / .0025 = 154.6
    assert "about 155 questions would show it" in results["not_measurable"]["accuracy_0_shot"]
