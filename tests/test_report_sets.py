"""Reports over any set of arms, and over arms that are odd, damaged, or not comparable."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from scipy.stats import binom

from quantkd.errors import DataError
from quantkd.evaluation.bootstrap import bootstrap_interval
from quantkd.evaluation.row_statistics import RowSums
from quantkd.report import build_report, format_table
from tests.test_report import LEVELS, build, make_arm, spoil


@pytest.fixture
def arms() -> dict[str, dict[str, Any]]:
    made = {name: make_arm(name, *level) for name, level in LEVELS.items()}
    for arm in made.values():
        arm["items"] = {"0-shot": {"prompts": "aa", "golds": "bb", "max_new_tokens": 256}}
    return made


@pytest.mark.parametrize(
    ("names", "subject"),
    [
        (["teacher"], None),
        (["after"], "after"),
        (["teacher", "before"], None),
        (["before", "after"], "after"),
        (["teacher", "before", "mine"], "mine"),
        (["teacher", "before", "after", "control", "merged", "requantized", "x-1", "y", "z"], "after"),
    ],
)
def test_any_set_of_arms_makes_a_report(tmp_path: Path, names: list[str], subject: str | None) -> None:
    arms = {name: make_arm(name, *LEVELS.get(name, (0.2, 70))) for name in names}
    results = build(tmp_path, arms)
    assert results["arm_order"] == names and results["subject"] == subject
    page, table = (tmp_path / "report.md").read_text(), format_table(results)
    for name in names:
        assert f"The {name} | arm" in table and f"The {name} \\| arm" in page
    absent = {f"There is no arm {name}, so no share of the gap." for name in ("teacher", "before") if name not in names}
    assert {line for line in results["missing"] if "no share" in line} == absent
    assert ("gap recovered" in table) == (subject is not None) == ("## Gap recovered" in page)
    if subject and absent:
        assert results["gap_recovered"]["kl"] is None and "not evaluated for" in results["not_measurable"]["kl"]
    elif subject:
        share = (0.4 - LEVELS.get(subject, (0.2, 70))[0]) / 0.4
        assert results["gap_recovered"]["kl"] == pytest.approx(share)
    if names == ["teacher", "before"]:  # the gap itself
        assert results["arms"]["before"]["differences"]["teacher"]["kl"]["value"] == pytest.approx(0.48)
        assert "less The teacher" in page
    assert "\n\n\n" not in page and not page.startswith("\n")


def test_the_report_says_what_an_export_cost(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    arms["requantized"] = make_arm("requantized", 0.35, 60)
    results = build(tmp_path, arms)
    cost = results["arms"]["requantized"]["differences"]["after"]
    tokens = [row["tokens"] for row in arms["after"]["fidelity"]["rows"]]
    sums = [
        b["kl_sum"] - a["kl_sum"]
        for a, b in zip(arms["after"]["fidelity"]["rows"], arms["requantized"]["fidelity"]["rows"], strict=True)
    ]
    assert cost["kl"]["value"] == pytest.approx(sum(sums) / sum(tokens))
    assert cost["kl"]["interval"] == pytest.approx(list(bootstrap_interval(RowSums(sums, tokens))))
    assert cost["accuracy_0_shot"]["value"] == pytest.approx(-0.2)
    assert "after" not in results["arms"]["before"]["differences"]
    page = (tmp_path / "report.md").read_text()
    assert "this is what the change of form cost" in page and f"| {cost['kl']['value']:+.4f} [" in page


def test_the_control_is_tested_against_on_the_same_questions(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    arms["control"] = make_arm("control", 0.3, 68)
    arms["merged"] = make_arm("merged", 0.1, 79)
    results = build(tmp_path, arms)
    test = results["arms"]["after"]["mcnemar"]["accuracy_0_shot"]["control"]
    assert (test["only_this"], test["only_other"]) == (12, 0)
    assert test["p_value"] == pytest.approx(2 * binom.pmf(0, 12, 0.5))
    assert results["arms"]["merged"]["mcnemar"]["accuracy_0_shot"]["after"]["only_other"] == 1
    page = (tmp_path / "report.md").read_text()
    assert "| Accuracy, 0-shot | The after \\| arm | The control \\| arm | 12 | 0 | 0.0005 |" in page
    pairs = [
        tuple(sorted(line.split(" | ")[1:3]))
        for line in page.splitlines()
        if line.startswith("| Accuracy, 0-shot | The")
    ]
    assert len(pairs) == len(set(pairs)) > 5  # none twice, the other way round


@pytest.mark.parametrize("key", ["prompts", "golds", "max_new_tokens"])
def test_other_questions_with_the_same_numbers_are_refused(
    tmp_path: Path, arms: dict[str, dict[str, Any]], key: str
) -> None:
    arms["before"]["items"]["0-shot"][key] = "other"
    with pytest.raises(DataError, match=f"0-shot accuracy of 'before' and of 'teacher' are not over the same: {key}"):
        build(tmp_path, arms)
    del arms["before"]["items"]  # an arm of an earlier version does not say
    build(tmp_path, arms)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("fidelity", [1], r"expected fidelity as an object, found \[1\]"),
        ("accuracy", [1], r"expected accuracy as an object, found \[1\]"),
        ("items", "x", "expected items as an object, found 'x'"),
        ("memory_bytes", "1 GB", "expected memory_bytes as a whole number, found '1 GB'"),
        ("fidelity/rows/0/tokens", -10, "hold 80 target tokens"),
        ("accuracy/0-shot/3/correct_flexible", 7, "verdicts that are true or false"),
        ("accuracy/0-shot/3/id", 0, "two rows have the same id"),
    ],
)
def test_odd_files_are_refused_in_words(
    tmp_path: Path, arms: dict[str, dict[str, Any]], path: str, value: Any, message: str
) -> None:
    spoil(arms["after"], path, value)
    with pytest.raises(DataError, match=rf"after\.json.*{message}"):
        build(tmp_path, arms)


def test_a_row_without_an_answer_and_a_hopeless_model(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    """Of four rows one is empty, and some draws hold that row alone: they have no figure. exp(1e5) is no number."""
    for arm in arms.values():
        arm["fidelity"]["rows"][0].update(tokens=0, kl_sum=0, ce_sum=0, agree=0)
    expected = RowSums([row["kl_sum"] for row in arms["after"]["fidelity"]["rows"][1:]], [20, 30, 40])
    arms["before"]["fidelity"]["rows"][1]["ce_sum"] = 1e7
    results = build(tmp_path, arms)
    found = results["arms"]["after"]["metrics"]["kl"]
    low, high = bootstrap_interval(expected)
    assert found["value"] == pytest.approx(sum(expected.numerators) / 90)
    assert (found["interval"][0], found["interval"][1]) == pytest.approx((low, high), abs=0.006)
    assert results["arms"]["before"]["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(700))


def test_all_right_and_all_wrong(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    for arm in arms.values():
        for row in arm["accuracy"]["0-shot"]:
            row.update(correct_flexible=True, correct_strict=False)
    results = build(tmp_path, arms)
    metrics = results["arms"]["after"]["metrics"]
    # Wilson's bounds at the ends: n / (n + z^2), and z^2 / (n + z^2).
    z2 = 1.959963984540054**2
    assert metrics["accuracy_0_shot"]["interval"] == pytest.approx([100 / (100 + z2), 1])
    assert metrics["accuracy_0_shot_strict"]["interval"] == pytest.approx([0, z2 / (100 + z2)])
    assert results["not_measurable"]["accuracy_0_shot"] == "teacher and before score the same"
    assert results["questions_needed"]["accuracy_0_shot"] is None


def test_a_single_row_has_no_interval(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    for arm in arms.values():
        arm["fidelity"]["rows"] = arm["fidelity"]["rows"][:1]
    results = build(tmp_path, arms)
    assert results["arms"]["after"]["metrics"]["kl"] == {"interval": None, "n": 1, "value": pytest.approx(0.1)}
    assert results["not_measurable"]["kl"] == "a single row gives no interval"
    assert results["arms"]["after"]["differences"]["before"]["kl"]["interval"] is None
    assert "over 1 held-out row with 10" in (tmp_path / "report.md").read_text()


def test_settings_that_differ_in_punctuation_alone_stay_apart(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    for arm in arms.values():
        solved = LEVELS[arm["arm"]][1]
        for name, less in (("lm-eval a-b, acc", 0), ("lm-eval a_b, acc", 9)):
            arm["accuracy"][name] = [{"id": i, "correct_flexible": i < solved - less} for i in range(100)]
    results = build(tmp_path, arms)
    metrics = results["arms"]["before"]["metrics"]
    titles = {results["metrics"][key]: found["value"] for key, found in metrics.items()}
    assert titles["Accuracy, lm-eval a-b, acc"] == 0.5 and titles["Accuracy, lm-eval a_b, acc"] == pytest.approx(0.41)
    assert len(set(results["metric_order"])) == len(results["metric_order"])
    assert [key for key in results["metric_order"] if "strict" not in key][:2] == ["accuracy_0_shot", "accuracy_8_shot"]


def test_results_of_an_earlier_version_make_the_same_table(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    results = build(tmp_path, arms)
    table = format_table(results)
    del results["subject"]
    assert format_table(results) == table and "75.0%" in table


def test_titles_of_any_text(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    """Matplotlib reads $...$ as mathematics and hides what begins with an underscore; a table ends at a line's end."""
    for name, title in (("before", "costs $5 \\frac{ $"), ("after", "_hidden"), ("teacher", "two\nlines | <b>")):
        arms[name]["title"] = title
    results = build(tmp_path, arms)
    assert "two lines | <b>" in format_table(results).splitlines()[0]
    with Image.open(tmp_path / "gap.png") as image:
        with_titles = image.size
    assert with_titles[0] > with_titles[1]


def test_a_chart_of_an_earlier_report_does_not_stay(tmp_path: Path, arms: dict[str, dict[str, Any]]) -> None:
    build(tmp_path, arms)
    shutil.rmtree(tmp_path / "evaluation")
    del arms["teacher"]["accuracy"]
    results = build(tmp_path, {"teacher": arms["teacher"]})
    assert not (tmp_path / "gap.png").exists() and "gap.png" not in (tmp_path / "report.md").read_text()
    assert results["arms"]["teacher"]["metrics"]["kl"]["value"] == 0


def test_bytes_do_not_depend_on_place_hash_seed_locale_or_clock(
    tmp_path: Path, arms: dict[str, dict[str, Any]]
) -> None:
    arms["x-control"] = make_arm("x-control", 0.3, 60)
    arms["x-control"]["title"] = "Größe"
    build(tmp_path / "a", arms)
    moved = tmp_path / "moved ö" / "b"
    (moved / "evaluation").mkdir(parents=True)
    for file in (tmp_path / "a" / "evaluation").iterdir():
        shutil.copyfile(file, moved / "evaluation" / file.name)
    odd = {"PYTHONHASHSEED": "7", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "TZ": "Asia/Kathmandu"}
    code = "import sys; from quantkd.report import build_report; build_report(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(moved)], env={**os.environ, **odd}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name in ("results.json", "report.md"):
        assert (moved / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert json.loads((moved / "results.json").read_bytes())["arm_order"][-1] == "x-control"
    assert build_report(moved) == moved / "report.md"
