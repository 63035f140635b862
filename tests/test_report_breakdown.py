"""The report of calibration, both divergences, differences, and KL by bin: known answers, and the same bytes again."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap

from quantkd.errors import DataError
from quantkd.report import build_report, format_table

NUM_ROWS = 12
KL = {"teacher": 0.0, "before": 0.4, "after": 0.1, "control": 0.3}
POSITIONS, ENTROPIES, CONFIDENCES = [0, 8, 16], [0.0, 0.5], [0.0, 0.5]


def make_arm(name: str, dense: bool = True) -> dict[str, Any]:
    """KL grows with the row's number, with position and, threefold, with entropy; a third bin has no token."""
    level, rng = KL[name], np.random.default_rng(len(name))
    tokens = np.array([[8, 4 + row % 3, 0] for row in range(NUM_ROWS)])
    kl = tokens * level * (1 + 0.05 * np.arange(NUM_ROWS))[:, None] * [0.5, 2.0, 0.0]
    by_entropy = np.stack([tokens[:, 0] - 2, tokens.sum(1) - tokens[:, 0] + 2], axis=1)
    entropy_kl = np.stack([kl.sum(1) / 4, 3 * kl.sum(1) / 4], axis=1)
    sure = by_entropy[:, ::-1]
    correct = np.minimum(sure, np.stack([sure[:, 0] // 2, sure[:, 1] - (rng.random(NUM_ROWS) < level)], axis=1))
    position = {"edges": POSITIONS, "tokens": tokens.tolist(), "kl_sum": kl.tolist()}
    entropy = {"edges": ENTROPIES, "tokens": by_entropy.tolist(), "kl_sum": entropy_kl.tolist()}
    confidence = {
        "edges": CONFIDENCES,
        "tokens": sure.tolist(),
        "confidence_sum": (sure * [0.4, 0.9]).tolist(),
        "correct": correct.tolist(),
    }
    rows = []
    for row in range(NUM_ROWS):
        count, total = int(tokens[row].sum()), float(kl[row].sum())
        sums = {"tokens": count, "kl_sum": total, "ce_sum": count * (0.3 + level), "agree": count - row % 2}
        sums |= {"reverse_kl_sum": 1.5 * total}
        if dense:
            sums |= {"dense_kl_sum": 1.1 * total, "dense_reverse_kl_sum": 1.7 * total, "dense_agree": count}
        rows.append(sums)
    bins = {"position": position, "entropy": entropy, "confidence": confidence}
    if dense:
        bins |= {f"dense_{kind}": {**bins[kind], "kl_sum": (np.array(bins[kind]["kl_sum"]) * 1.1).tolist()}
                 for kind in ("position", "entropy")}  # fmt: skip
    solved = {"teacher": 90, "before": 84, "after": 88, "control": 85}[name]
    verdicts = [{"id": i, "correct_strict": i < solved, "correct_flexible": i < solved} for i in range(100)]
    return {
        "arm": name,
        "title": f"the {name}",
        "transfer_set_digest": "abc",
        "fidelity": {"rows": rows, "bins": bins},
        "accuracy": {"0-shot": verdicts},
    }


@pytest.fixture
def arms() -> dict[str, dict[str, Any]]:
    return {name: make_arm(name) for name in KL}


def build(run: Path, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (run / "evaluation").mkdir(parents=True, exist_ok=True)
    for name, arm in arms.items():
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(arm))
    build_report(run)
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    return results


def test_divergences_and_calibration(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    results = build(tmp_path, arms)
    for name, arm in arms.items():
        metrics, bins = results["arms"][name]["metrics"], arm["fidelity"]["bins"]["confidence"]
        tokens = sum(row["tokens"] for row in arm["fidelity"]["rows"])
        for key, factor in (("reverse_kl", 1.5), ("dense_kl", 1.1), ("dense_reverse_kl", 1.7)):
            assert metrics[key]["value"] == pytest.approx(factor * metrics["kl"]["value"])
        assert metrics["dense_top1_agreement"]["value"] == 1
        sums = [np.sum(bins[key], axis=0) for key in ("confidence_sum", "correct")]
        ece = sum(abs(a - b) for a, b in zip(*sums, strict=True)) / tokens  # Guo et al. 2017, equation 3
        assert metrics["ece"]["value"] == pytest.approx(ece)
        low, high = metrics["ece"]["interval"]
        assert 0 < low <= high < 1
    assert results["gap_recovered"]["reverse_kl"] == pytest.approx(0.75)
    assert results["metric_order"][-5:-3] == ["reverse_kl", "ece"] and "Calibration error (ECE)" in format_table(
        results
    )


def test_calibration_interval_is_a_bootstrap_over_rows(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    """Against scipy's own paired bootstrap, the bins handed over one by one."""
    bins = arms["before"]["fidelity"]["bins"]["confidence"]
    columns = [np.array(bins[key])[:, b] for key in ("confidence_sum", "correct", "tokens") for b in (0, 1)]

    def ece(*drawn: np.ndarray, axis: int = -1) -> np.ndarray:
        sums = [one.sum(axis) for one in drawn]
        return (abs(sums[0] - sums[2]) + abs(sums[1] - sums[3])) / (sums[4] + sums[5])

    expected = bootstrap(
        columns, ece, paired=True, vectorized=True, n_resamples=2000, batch=256, method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    found = build(tmp_path, arms)["arms"]["before"]["metrics"]["ece"]["interval"]
    assert found == pytest.approx([expected.low, expected.high], rel=1e-9)


def test_differences_are_paired(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    results = build(tmp_path, arms)
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
    assert "less the control" in (tmp_path / "report.md").read_text()


def test_kl_by_bin(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    results = build(tmp_path, arms)
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
    assert last == {"from": 16, "to": None, "tokens": 0, "value": None, "interval": None}
    page = (tmp_path / "report.md").read_text()
    assert "whole vocabulary: token | Tokens | the before | the after | the control |" in page
    assert "\n| 1 to 8 | 96 |" in page and "\n| 0.5 and above |" in page and "17 and on" not in page
    assert "](kl_bins.png)" in page and (tmp_path / "kl_bins.png").stat().st_size > 10_000


def test_sparse_bins_are_shown_where_an_arm_has_no_others(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    arms["control"] = make_arm("control", dense=False)
    build(tmp_path, arms)
    page = (tmp_path / "report.md").read_text()
    assert "KL by position in the answer: token |" in page
    for arm in arms.values():
        del arm["fidelity"]["bins"]
    results = build(tmp_path, arms)
    assert "Where the KL lies" not in (tmp_path / "report.md").read_text() and not (tmp_path / "kl_bins.png").exists()
    assert "ece" not in results["metric_order"] and "reverse_kl" in results["metric_order"]


def test_questions_needed(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    """6 of 100 questions are the teacher's alone: (1.95996 sqrt(.06) + .84162 sqrt(.06 - .0036))^2 / .0036 = 128.4."""
    results = build(tmp_path, arms)
    assert results["questions_needed"]["accuracy_0_shot"] == 129
    assert results["arms"]["after"]["mcnemar"]["accuracy_0_shot"]["teacher"]["questions_needed"] > 129
    page = (tmp_path / "report.md").read_text()
    assert "| 0 | 6 | 0.0312 | 129 |" in page
    arms["before"]["accuracy"] = arms["control"]["accuracy"]
    results = build(tmp_path, arms)
    # (1.95996 sqrt(.05) + .84162 sqrt(.05 - .0025))^2 / .0025 = (0.43826 + 0.18343)^2 / .0025 = 154.6
    assert "to see it takes about 155 questions" in results["not_measurable"]["accuracy_0_shot"]


def test_bytes_are_the_same_every_time(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    build(tmp_path / "a", arms)
    build(tmp_path / "b", {name: arms[name] for name in reversed(arms)})
    names = ("results.json", "report.md", "gap.png", "kl_bins.png")
    first = {name: (tmp_path / "a" / name).read_bytes() for name in names}
    assert first == {name: (tmp_path / "b" / name).read_bytes() for name in names}
    build_report(tmp_path / "a")
    assert first == {name: (tmp_path / "a" / name).read_bytes() for name in names}


def test_page_stays_well_formed(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    build(tmp_path, arms)
    page = (tmp_path / "report.md").read_text()
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in page.split("\n\n")]
    widths = [{line.count("|") for line in lines} for lines in blocks if lines]
    assert len(widths) == 6 and all(len(width) == 1 for width in widths)
    assert "\n\n\n" not in page


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda bins: bins["position"].pop("kl_sum"), "fidelity by position: expected edges"),
        (lambda bins: bins["entropy"]["kl_sum"].pop(), r"fidelity by entropy: expected finite sums of shape \(12, 2\)"),
        (lambda bins: bins["entropy"]["kl_sum"][3].__setitem__(0, math.nan), "expected finite sums"),
        (lambda bins: bins["confidence"]["tokens"][3].__setitem__(0, 99), "tokens are not those of the rows"),
        (
            lambda bins: bins["position"].__setitem__("edges", [0, 4, 16]),
            "Fidelity by position of 'after' has the bins",
        ),
    ],
)
def test_bad_bins(tmp_path: Path, arms: dict[str, dict[str, Any]], change: Any, message: str) -> None:
    change(arms["after"]["fidelity"]["bins"])
    with pytest.raises(DataError, match=message):
        build(tmp_path, arms)
