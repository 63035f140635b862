"""Reports over any set of arms, and over arms that are odd, damaged, or not comparable."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
from scipy.stats import binom

from quantkd.evaluation.stats import RowSums, bootstrap_interval
from quantkd.report import format_table
from tests.report_arms import LEVELS, build, make_arm, make_arms, make_verdicts

arms = pytest.fixture(make_arms)


@pytest.mark.parametrize(("names", "subject"), [
    (["teacher"], None), (["after"], "after"), (["teacher", "before"], None), (["before", "after"], "after"),
    (["teacher", "before", "mine"], "mine"),
    (["teacher", "before", "after", "control", "merged", "requantized", "x-1", "y", "z"], "after"),
])  # fmt: skip
def test_any_set_of_arms_makes_a_report(tmp_path, names, subject):
    arms = {name: make_arm(name, *LEVELS.get(name, (0.2, 70))) for name in names}
    results, page = build(tmp_path, arms)
    assert results["arm_order"] == names and results["subject"] == subject
    table = format_table(results)
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


def test_the_report_says_what_an_export_cost(tmp_path, arms):
    arms["requantized"] = make_arm("requantized", 0.35, 60)
    results, page = build(tmp_path, arms)
    cost = results["arms"]["requantized"]["differences"]["after"]
    rows, others = (arms[name]["fidelity"]["rows"] for name in ("after", "requantized"))
    tokens, sums = rows["tokens"], [b - a for a, b in zip(rows["kl_sum"], others["kl_sum"], strict=True)]
    assert cost["kl"]["value"] == pytest.approx(sum(sums) / sum(tokens))
    assert cost["kl"]["interval"] == pytest.approx(list(bootstrap_interval(RowSums(sums, tokens))))
    assert cost["accuracy_0_shot"]["value"] == pytest.approx(-0.2)
    assert "after" not in results["arms"]["before"]["differences"]
    assert "this is what the change of form cost" in page and f"| {cost['kl']['value']:+.4f} [" in page


def test_the_control_is_tested_against_on_the_same_questions(tmp_path, arms):
    arms["control"] = make_arm("control", 0.3, 68)
    arms["merged"] = make_arm("merged", 0.1, 79)
    results, page = build(tmp_path, arms)
    test = results["arms"]["after"]["mcnemar"]["accuracy_0_shot"]["control"]
    assert (test["only_this"], test["only_other"]) == (12, 0)
    assert test["p_value"] == pytest.approx(2 * binom.pmf(0, 12, 0.5))
    assert results["arms"]["merged"]["mcnemar"]["accuracy_0_shot"]["after"]["only_other"] == 1
    assert "| Accuracy, 0-shot | The after \\| arm | The control \\| arm | 12 | 0 | 0.0005 |" in page
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| Accuracy, 0-shot | The")]
    pairs = [tuple(sorted(line[1:3])) for line in lines]
    assert len(pairs) == len(set(pairs)) > 5  # none twice, the other way round


def test_a_row_without_an_answer_and_a_hopeless_model(tmp_path, arms):
    """Of four rows one is empty, and some draws hold that row alone: they have no figure. exp(1e5) is no number."""
    for arm in arms.values():
        for sums in (*arm["fidelity"]["rows"].values(), *(b[k] for b in arm["fidelity"]["bins"].values() for k in b)):
            sums[0] = [0] * len(sums[0]) if isinstance(sums[0], list) else 0
    expected = RowSums(arms["after"]["fidelity"]["rows"]["kl_sum"][1:], [20, 30, 40])
    arms["before"]["fidelity"]["rows"]["ce_sum"][1] = 1e7
    results, _ = build(tmp_path, arms)
    found = results["arms"]["after"]["metrics"]["kl"]
    low, high = bootstrap_interval(expected)
    assert found["value"] == pytest.approx(sum(expected.numerators) / 90)
    assert (found["interval"][0], found["interval"][1]) == pytest.approx((low, high), abs=0.006)
    assert results["arms"]["before"]["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(700))


def test_all_right_and_all_wrong_and_a_single_row_without_an_interval(tmp_path, arms):
    for arm in arms.values():
        arm["questions"]["0-shot"] = make_verdicts(100, 0)
        for sums in (arm["fidelity"]["rows"], *arm["fidelity"]["bins"].values()):
            sums.update({key: found[:1] for key, found in sums.items() if key != "edges"})
    results, page = build(tmp_path, arms)
    after = results["arms"]["after"]
    accuracy, strict = (after["metrics"][f"accuracy_0_shot{grader}"]["interval"] for grader in ("", "_strict"))
    assert (accuracy[1], strict[0]) == (1, 0)
    assert results["not_measurable"]["accuracy_0_shot"] == "teacher and before score the same"
    assert results["questions_needed"]["accuracy_0_shot"] is None
    assert after["metrics"]["kl"] == {"interval": None, "n": 1, "value": pytest.approx(0.1)}
    assert results["not_measurable"]["kl"] == "a single row gives no interval"
    assert after["differences"]["before"]["kl"]["interval"] is None
    assert "over 1 held-out row with 10" in page


def test_settings_that_differ_in_punctuation_alone_stay_apart(tmp_path, arms):
    for arm in arms.values():
        solved = LEVELS[arm["arm"]][1]
        verdicts = {f"lm-eval a{mark}b, acc": make_verdicts(solved - less)["correct_flexible"]
                    for mark, less in (("-", 0), ("_", 9))}  # fmt: skip
        arm["tasks"] = {"both": {"settings": {}, "figures": {}, "verdicts": verdicts}}
    results, _ = build(tmp_path, arms)
    metrics = results["arms"]["before"]["metrics"]
    titles = {results["metrics"][key]: found["value"] for key, found in metrics.items()}
    assert titles["Accuracy, lm-eval a-b, acc"] == 0.5 and titles["Accuracy, lm-eval a_b, acc"] == pytest.approx(0.41)
    assert len(set(results["metric_order"])) == len(results["metric_order"])
    assert [key for key in results["metric_order"] if "strict" not in key][:2] == ["accuracy_0_shot", "accuracy_8_shot"]


def test_a_chart_of_an_earlier_report_does_not_stay(tmp_path, arms):
    build(tmp_path, arms)
    shutil.rmtree(tmp_path / "evaluation")
    arms["teacher"]["questions"] = {}
    results, page = build(tmp_path, {"teacher": arms["teacher"]})
    assert not (tmp_path / "gap.png").exists() and "gap.png" not in page
    assert results["arms"]["teacher"]["metrics"]["kl"]["value"] == 0


def test_bytes_do_not_depend_on_place_hash_seed_locale_or_clock(tmp_path, arms):
    arms["x-control"] = {**make_arm("x-control", 0.3, 60), "title": "Größe"}
    build(tmp_path / "a", arms)
    moved = tmp_path / "moved ö" / "b"
    shutil.copytree(tmp_path / "a" / "evaluation", moved / "evaluation")
    odd = {"PYTHONHASHSEED": "7", "LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "TZ": "Asia/Kathmandu"}
    code = "import sys; from quantkd.report import build_report; build_report(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, moved], env={**os.environ, **odd}, check=True, timeout=120)
    for name in ("results.json", "report.md", "gap.png"):
        assert (moved / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert json.loads((moved / "results.json").read_bytes())["arm_order"][-1] == "x-control"
    build(tmp_path / "c", {name: arms[name] for name in reversed(arms)})
    assert (tmp_path / "c" / "results.json").read_bytes() == (moved / "results.json").read_bytes()
