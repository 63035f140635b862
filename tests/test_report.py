"""The report: figures against independent sums, what it says when it cannot say, and the same bytes every time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from quantkd.errors import DataError
from quantkd.evaluation.stats import mcnemar_exact, wilson_interval
from quantkd.report import build_report, format_table

TOKENS = [10, 20, 30, 40]
LEVELS = {"teacher": (0.0, 90), "before": (0.4, 50), "after": (0.1, 80)}  # KL a token, questions solved of 100


def make_arm(name: str, level: float, solved: int) -> dict[str, Any]:
    rows = [
        {
            "tokens": n,
            "kl_sum": n * level * (1 + 0.1 * i),
            "ce_sum": n * (0.3 + level),
            "agree": round(n * (1 - level / 2)),
        }
        for i, n in enumerate(TOKENS)
    ]
    verdicts = [{"id": i, "correct_strict": i < solved - 5, "correct_flexible": i < solved} for i in range(100)]
    return {
        "arm": name,
        "title": f"The {name} | arm",
        "model": "tiny",
        "memory_bytes": 4_000_000 if name == "teacher" else 1_000_000,
        "transfer_set_digest": "abc",
        "fidelity": {"rows": rows},
        "accuracy": {"8-shot": verdicts, "0-shot": [{**one, "id": 99 - one["id"]} for one in verdicts]},
    }


@pytest.fixture
def arms() -> dict[str, dict[str, Any]]:
    return {name: make_arm(name, *level) for name, level in LEVELS.items()}


def build(run: Path, arms: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (run / "evaluation").mkdir(parents=True, exist_ok=True)
    for name, arm in arms.items():
        (run / "evaluation" / f"{name}.json").write_text(json.dumps(arm))
    assert build_report(run) == run / "report.md"
    results: dict[str, Any] = json.loads((run / "results.json").read_text())
    return results


def test_metrics_are_ratios_of_sums(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    results = build(tmp_path, arms)
    for name, (level, solved) in LEVELS.items():
        metrics = results["arms"][name]["metrics"]
        kl = sum(n * level * (1 + 0.1 * i) for i, n in enumerate(TOKENS)) / 100
        assert metrics["kl"]["value"] == pytest.approx(kl)
        assert metrics["kl"]["interval"][0] <= kl + 1e-12 and kl <= metrics["kl"]["interval"][1] + 1e-12
        assert metrics["ce"]["value"] == pytest.approx(0.3 + level)
        assert metrics["perplexity"]["value"] == pytest.approx(math.exp(0.3 + level))
        assert metrics["top1_agreement"]["value"] == pytest.approx(
            sum(round(n * (1 - level / 2)) for n in TOKENS) / 100
        )
        assert metrics["accuracy_8_shot"]["value"] == solved / 100
        assert metrics["accuracy_8_shot_strict"]["value"] == (solved - 5) / 100
        assert metrics["accuracy_0_shot"]["interval"] == pytest.approx(list(wilson_interval(solved, 100)))
        assert metrics["accuracy_0_shot"]["n"] == 100 and metrics["kl"]["n"] == 4
        assert results["arms"][name]["num_tokens"] == 100


def test_gap_recovered(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    results = build(tmp_path, arms)
    shares = results["gap_recovered"]
    assert shares["kl"] == pytest.approx(0.75) and shares["ce"] == pytest.approx(0.75)
    assert shares["accuracy_0_shot"] == shares["accuracy_8_shot_strict"] == pytest.approx(0.75)
    expected = (math.exp(0.4) - math.exp(0.7)) / (math.exp(0.3) - math.exp(0.7))
    assert shares["perplexity"] == pytest.approx(expected)
    low, high = results["gap_recovered_interval"]["accuracy_0_shot"]
    assert 0.5 < low < 0.75 < high < 1
    assert results["not_measurable"] == {} and results["missing"] == []
    assert "**75.0% [" in (tmp_path / "report.md").read_text()


def test_paired_tests(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    results = build(tmp_path, arms)
    test = results["arms"]["after"]["mcnemar"]["accuracy_0_shot"]["before"]
    expected = mcnemar_exact(np.arange(100) < 80, np.arange(100) < 50).p_value
    assert (test["only_this"], test["only_other"]) == (30, 0) and test["p_value"] == pytest.approx(expected)
    assert results["arms"]["before"]["mcnemar"]["accuracy_8_shot"]["teacher"]["only_other"] == 40


def test_questions_are_paired_by_id_not_by_place(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    expected = build(tmp_path / "a", arms)
    arms["after"]["accuracy"]["0-shot"].reverse()
    assert build(tmp_path / "b", arms) == expected


def test_noise_is_not_measurable(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    arms["before"]["accuracy"]["0-shot"] = make_arm("before", 0, 88)["accuracy"]["0-shot"]
    arms["before"]["fidelity"] = arms["teacher"]["fidelity"]
    results = build(tmp_path, arms)
    assert results["gap_recovered"]["accuracy_0_shot"] is None and results["gap_recovered"]["accuracy_8_shot"] == 0.75
    assert "exact McNemar p = 0.5, n = 100" in results["not_measurable"]["accuracy_0_shot"]
    assert results["not_measurable"]["kl"] == "teacher and before score the same"
    page = (tmp_path / "report.md").read_text()
    assert "Accuracy, 0-shot: not measurable: the teacher's gap of +0.02 is inside noise" in page
    assert "not measurable" in format_table(results)


def test_bytes_are_the_same_every_time(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    build(tmp_path / "a", arms)
    build(tmp_path / "b", {name: arms[name] for name in reversed(arms)})
    for name in ("results.json", "report.md", "gap.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    before = (tmp_path / "a" / "results.json").read_bytes()
    build_report(tmp_path / "a")
    assert (tmp_path / "a" / "results.json").read_bytes() == before


@pytest.mark.parametrize("part", ["fidelity", "accuracy"])
def test_a_missing_part_is_said(tmp_path: Path, arms: dict[str, dict[str, Any]], part: str) -> None:
    del arms["after"][part], arms["after"]["memory_bytes"]
    results = build(tmp_path, arms)
    key = "kl" if part == "fidelity" else "accuracy_0_shot"
    assert results["gap_recovered"][key] is None
    assert results["not_measurable"][key] == "not evaluated for after"
    page = (tmp_path / "report.md").read_text()
    expected = "fidelity to the teacher was not" if part == "fidelity" else "accuracy, 0-shot, was not evaluated"
    assert f"The after | arm: {expected}" in page and "the memory footprint was not measured" in page
    assert "not evaluated" in format_table(results)
    for arm in arms.values():
        arm.pop(part, None)
    build(tmp_path, arms)
    assert "not evaluated" in (tmp_path / "report.md").read_text()


def test_further_arms_are_listed_with_their_share(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    arms["control"] = make_arm("control", 0.3, 60)
    results = build(tmp_path, arms)
    assert results["arm_order"] == ["teacher", "before", "after", "control"]
    assert results["arms"]["control"]["gap_recovered"]["kl"]["value"] == pytest.approx(0.25)
    assert results["gap_recovered"]["kl"] == pytest.approx(0.75)


def test_page_is_a_well_formed_table_and_names_the_chart(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    build(tmp_path, arms)
    page = (tmp_path / "report.md").read_text()
    assert "](gap.png)" in page and "The before \\| arm" in page
    blocks = [[line for line in block.splitlines() if line.startswith("|")] for block in page.split("\n\n")]
    widths = [{line.replace("\\|", "").count("|") for line in lines} for lines in blocks if lines]
    assert len(widths) == 4 and all(len(width) == 1 for width in widths)
    assert "\n\n\n" not in page


def test_table_keeps_the_order_of_the_report(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    lines = format_table(build(tmp_path, arms)).splitlines()
    assert lines[0].index("teacher") < lines[0].index("before") < lines[0].index("after") < lines[0].index("gap")
    assert [line[:16] for line in lines[2:4]] == ["Accuracy, 0-shot", "Accuracy, 0-shot"]
    assert "1.0 MB (25%)" in lines[10]


def test_chart_shows_each_arm(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    build(tmp_path, arms)
    with Image.open(tmp_path / "gap.png") as image:
        colors = {color for count, color in image.convert("RGB").getcolors(1 << 20) if count > 2_000}
        assert image.width > image.height > 500
    assert {(0x8C, 0x8C, 0x8C), (0xE6, 0x9F, 0x00), (0x00, 0x72, 0xB2)} <= colors


def spoil(arm: dict[str, Any], path: str, value: Any) -> None:
    *keys, last = [int(key) if key.isdigit() else key for key in path.split("/")]
    target: Any = arm
    for key in keys:
        target = target[key]
    target[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("arm", "before", "says it is the arm 'before'; expected 'after'"),
        ("fidelity/rows", [], "fidelity: expected a list of rows"),
        ("fidelity/rows/2/kl_sum", math.nan, "fidelity, row 2"),
        ("fidelity/rows/1/agree", None, "fidelity, row 1"),
        ("fidelity/rows/1/tokens", 21, "same held-out rows"),
        ("transfer_set_digest", "xyz", "same held-out rows"),
        ("accuracy/0-shot/3", {"id": 3}, "accuracy 0-shot, row 3"),
        ("accuracy/0-shot/3/id", 777, "same questions"),
    ],
)
def test_bad_arms(tmp_path: Path, arms: dict[str, dict[str, Any]], path: str, value: Any, message: str) -> None:
    spoil(arms["after"], path, value)
    with pytest.raises(DataError, match=message):
        build(tmp_path, arms)


def test_missing_and_broken_files(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    after = arms.pop("after")
    with pytest.raises(DataError, match=r"holds no arms; expected files such as teacher\.json"):
        build(tmp_path / "empty", {})
    with pytest.raises(DataError, match="neither fidelity nor accuracy"):
        build(tmp_path, {**arms, "after": {**after, "fidelity": None, "accuracy": {}}})
    (tmp_path / "evaluation" / "after.json").write_text("{")
    with pytest.raises(DataError, match=r"after\.json is not JSON"):
        build_report(tmp_path)
