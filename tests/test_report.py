"""The report: figures against independent sums, any arms, bins, what it says when it cannot say, the same bytes."""

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image
from scipy.stats import binom
from transfer_sets import make_plan, write_set

from quantkd.errors import DataError
from quantkd.evaluation.stats import RowSums, bootstrap_interval, wilson_interval
from quantkd.files import DISK
from quantkd.report import build_report, format_table
from quantkd.report.figures import draw_bits, save_figure
from quantkd.report.histograms import compute_histograms
from quantkd.report.page import list_told_apart
from tests.conftest import refused
from tests.report_arms import (
    LEVELS,
    TOKENS,
    bootstrap_by_scipy,
    build,
    make_arm,
    make_arms,
    make_fidelity,
    make_verdicts,
    read_tables,
    spoil,
)

pytestmark = pytest.mark.usefixtures("no_pictures", "few_draws")
arms = pytest.fixture(make_arms)
binned = pytest.fixture(lambda: {name: make_binned_arm(name) for name in KL})


@pytest.fixture
def pictures(monkeypatch):
    monkeypatch.setattr("quantkd.report.figures.save_figure", save_figure)


all_draws = pytest.fixture(lambda monkeypatch: monkeypatch.setattr("quantkd.evaluation.stats.RESAMPLES", 2000))


def test_metrics_are_ratios_of_sums_and_shares_are_of_the_gap(tmp_path, arms):
    results, page = build(tmp_path, arms)
    for name, (level, solved) in LEVELS.items():
        metrics = results["arms"][name]["metrics"]
        kl = sum(n * level * (1 + 0.1 * i) for i, n in enumerate(TOKENS)) / 100
        assert metrics["kl"]["value"] == pytest.approx(kl)
        assert metrics["kl"]["interval"][0] <= kl + 1e-12 and kl <= metrics["kl"]["interval"][1] + 1e-12
        assert metrics["ce"]["value"] == pytest.approx(0.3 + level)
        assert metrics["perplexity"]["value"] == pytest.approx(math.exp(0.3 + level))
        agree = sum(round(n * (1 - level / 2)) for n in TOKENS)
        assert metrics["top1_agreement"]["value"] == pytest.approx(agree / 100)
        assert metrics["accuracy_8_shot"]["value"] == solved / 100
        assert metrics["accuracy_8_shot_strict"]["value"] == (solved - 5) / 100
        assert metrics["accuracy_0_shot"]["interval"] == pytest.approx(wilson_interval(solved, 100))
        assert metrics["accuracy_0_shot"]["n"] == 100 and metrics["kl"]["n"] == 4
        assert results["arms"][name]["num_tokens"] == 100
    shares = results["gap_recovered"]
    names = ("kl", "ce", "accuracy_0_shot", "accuracy_8_shot_strict")
    assert [shares[name] for name in names] == pytest.approx([0.75] * 4)
    expected = (math.exp(0.4) - math.exp(0.7)) / (math.exp(0.3) - math.exp(0.7))
    assert shares["perplexity"] == pytest.approx(expected)
    low, high = results["gap_recovered_interval"]["accuracy_0_shot"]
    assert 0.5 < low < 0.75 < high < 1 and list(results["not_measurable"]) == ["ece"] and results["missing"] == []
    assert "**75.0% [" in page


def test_noise_is_not_measurable(tmp_path, arms):
    arms["before"]["questions"]["0-shot"] = make_verdicts(88)
    arms["before"]["fidelity"] = arms["teacher"]["fidelity"]
    results, page = build(tmp_path, arms)
    assert results["gap_recovered"]["accuracy_0_shot"] is None and results["gap_recovered"]["accuracy_8_shot"] == 0.75
    assert "exact McNemar p = 0.5, n = 100" in results["not_measurable"]["accuracy_0_shot"]
    assert results["not_measurable"]["kl"] == "teacher and before score the same"
    assert "Accuracy, 0-shot: not measurable: the teacher's gap of +0.02 is inside noise" in page
    assert "not measurable" in format_table(results)


@pytest.mark.parametrize(("part", "none", "key", "expected"), [
    ("fidelity", None, "kl", "fidelity to the teacher was not"),
    ("questions", {}, "accuracy_0_shot", "accuracy, 0-shot, was not evaluated"),
])  # fmt: skip
def test_a_missing_part_is_said(tmp_path, arms, part, none, key, expected):
    arms["after"][part] = none
    results, page = build(tmp_path, arms)
    assert results["gap_recovered"][key] is None and results["not_measurable"][key] == "not evaluated for after"
    assert f"The after \\| arm: {expected}" in page and "not evaluated" in format_table(results)
    for arm in arms.values():
        arm[part] = none
    assert "not evaluated" in build(tmp_path, arms)[1]


def test_page_table_and_chart_show_each_arm_in_order(pictures, tmp_path, arms):
    results, page = build(tmp_path, arms)
    assert "](gap.png)" in page and "The before \\| arm" in page and len(read_tables(page)) == 6
    lines = format_table(results).splitlines()
    narrow = format_table(results, width=80).split("\n\n")
    assert max(map(len, "\n".join(narrow[:-1]).splitlines())) <= 80
    heads = [part.splitlines()[0].strip() for part in narrow[:-1]]
    assert len(heads) > 1 and re.split(r" {2,}", "  ".join(heads)) == re.split(r" {2,}", lines[0].strip())
    assert all([line[:16] for line in part.splitlines()] == [line[:16] for line in lines[: len(part.splitlines())]]
               for part in narrow[:-1])  # fmt: skip
    assert lines[0].index("teacher") < lines[0].index("before") < lines[0].index("after") < lines[0].index("gap")
    assert [line[:16] for line in lines[2:4]] == ["Accuracy, 0-shot", "Accuracy, 0-shot"]
    sizes = {line[:25].strip(): re.split(r" {2,}", line)[1:] for line in lines if " MB" in line or "Bits" in line}
    assert sizes["Size"] == ["2.5 MB (100%)", "1.0 MB (40%)", "1.1 MB (44%)"]
    assert sizes["Bits per weight"] == ["16.13", "4.13", "4.80"] and sizes["Adapters"][2] == "0.1 MB"
    parts = {"codes": 500_000, "constants": 16_000, "adapters": 84_000, "rest": 500_000, "total": 1_100_000}
    assert (results["arms"]["after"]["bytes"], results["arms"]["after"]["bits_per_weight"]) == (parts, 4.8)
    with Image.open(tmp_path / "gap.png") as image:
        colors = {color for count, color in image.convert("RGB").getcolors(1 << 20) if count > 2_000}
        assert image.width > image.height > 500
    assert {(0x8C, 0x8C, 0x8C), (0xE6, 0x9F, 0x00), (0x00, 0x72, 0xB2)} <= colors


HUGE = int("9" * 400)
TASK: dict[str, Any] = {"settings": {}, "figures": {}, "verdicts": {}}
GRADERS = ("correct_flexible", "correct_strict")


@pytest.mark.parametrize(("path", "value", "message"), [
    ("arm", "before", "arm: expected 'after', the file's name, found 'before'"),
    ("title", " ", "title: expected a text"), ("extra", 1, ": expected the keys arm, .*'extra'"),
    ("title", 5, "title: expected a text of at most 1000 characters, found 5"),
    ("title", "x" * 1001, "title: expected a text of at most 1000"), ("model", "x" * 1001, "model: expected a text"),
    ("tasks", {"x" * 1001: {}}, "tasks: expected keys of at most 1000"),
    ("size/codes", 1e6, "size/codes: expected a number of bytes"),
    ("size/rest", -1, "size/rest: expected a number of bytes, found -1"), ("size", {}, "size: expected the keys codes"),
    ("size/bits_per_weight", "4", "size/bits_per_weight: expected numbers"), ("size/codes", True, "a number of bytes"),
    ("size/bits_per_weight", -3, "bits_per_weight.*: expected a number from 0 to"),
    ("size/bits_per_weight", True, "bits_per_weight: expected numbers"),
    ("fidelity/rows/kl_sum", [], r"fidelity/rows/kl_sum: expected numbers of shape \(4,\), found \[\]"),
    ("fidelity/rows/kl_sum", None, r"rows/kl_sum: expected numbers of shape \(4,\), found None"),
    ("fidelity/rows/tokens", None, "tokens: expected whole"), ("fidelity/rows/tokens", 4, "tokens: expected whole"),
    ("fidelity/rows/tokens", [0, 0, 0, 0], "rows/tokens: expected rows with answers"),
    ("fidelity/rows/kl_sum/2", "1", "kl_sum: expected num"), ("fidelity/rows/kl_sum/2", HUGE, "kl_sum: expected num"),
    ("fidelity/rows/kl_sum/2", 1e308, r"rows/kl_sum\[2\]: expected a number from -0.03 to 1e\+12, found 1e\+308"),
    ("fidelity/rows/kl_sum/2", -1.0, r"rows/kl_sum\[2\]: .*found -1.0"),
    ("fidelity/rows/agree/1", 1.5, r"rows/agree: expected whole numbers of shape \(4,\)"),
    ("fidelity/rows/tokens/1", 20.0, "rows/tokens: expected whole numbers"),
    ("fidelity/bins/confidence/correct/3/0", 1.5, r"correct: expected whole numbers of shape \(4, 15\)"),
    ("fidelity/rows/ce_sum/0", True, "rows/ce_sum: expected numbers"), ("fidelity/rows/agree/1", True, "whole numbers"),
    ("fidelity/rows/agree/1", 21, r"rows/agree\[1\]: expected a number from 0 to 20, found 21"),
    ("fidelity/rows/dense_kl_sum", [1, 2, 3], "fidelity/bins: expected the keys .*dense_position"),
    ("fidelity/bins/position/edges", [0, 4, 16], r"bins/position/edges: expected \[0, 8, .*found \[0, 4, 16\]"),
    ("fidelity/bins/entropy/kl_sum/3", [1.0], r"bins/entropy/kl_sum: expected numbers of shape \(4, 6\)"),
    ("fidelity/bins/confidence/tokens/3/0", 99, "bins/confidence/tokens: expected each row's tokens"),
    ("fidelity/bins/confidence/confidence_sum/3/0", 41, r"confidence_sum\[3, 0\]: .* from 0 to 40.04, found 41"),
    ("fidelity/bins/confidence/correct/3/0", 41, r"correct\[3, 0\]: expected a number from 0 to 40, found 41"),
    ("fidelity/settings", {}, "settings/transfer_set: expected a text of at most 1000 characters, found None"),
    ("questions", [], "questions: expected an object"),
    ("questions/0-shot/correct_flexible/3", 1, "0-shot/correct_flexible: expected a list of true and false"),
    ("questions/0-shot/correct_strict", [True], "expected two verdicts and an answer a question, found '100 and 1 "),
    ("questions/0-shot/answers/3", None, "0-shot/answers/3: expected an answer, for it is correct, found None"),
    ("questions/0-shot/answers/3", 5, "0-shot/answers: expected a list of texts and null"),
    ("tasks", {"t": {}}, "tasks/t: expected the keys settings, figures, verdicts"),
    ("tasks", {"t": {**TASK, "figures": {"t": {"acc": {"value": "x", "stderr": 1, "n": 2}}}}},
     "tasks/t/figures/t/acc/value: expected numbers"),
    ("tasks", {"t": {**TASK, "figures": {"t": {"acc": {"value": -1, "stderr": 1, "n": -2}}}}},
     "acc/n.*: expected a number from 0 to"),
    ("tasks", {"t": {**TASK, "verdicts": {"t, acc": [0, 1]}}}, "verdicts/t, acc: expected a list of true"),
])  # fmt: skip
def test_bad_arms_are_refused_by_file_field_and_value(tmp_path, arms, path, value, message):
    spoil(arms["after"], path, value)
    refused(DataError, rf"after\.json.*{message}", build, tmp_path, arms)


@pytest.mark.parametrize(("path", "value", "message"), [
    ("fidelity/rows/tokens/1", 21, "same held-out rows"),
    ("fidelity/settings/transfer_set", "xyz", "over 4 rows of the transfer set xyz, .* same held-out rows"),
    ("questions/0-shot/settings/prompts", "other", "not over the same questions: prompts differ"),
    ("questions/0-shot/settings/golds", "other", "not over the same questions: golds differ"),
    ("questions/0-shot/settings/max_new_tokens", 8, "not over the same questions: max_new_tokens differ"),
    ("questions/0-shot", {**make_verdicts(3), **{key: [True] for key in GRADERS}, "answers": ["3"]},
     "their number differ"),
])  # fmt: skip
def test_arms_over_other_items_are_not_compared(tmp_path, arms, path, value, message):
    spoil(arms["after"], path, value)
    if path.startswith("fidelity/rows"):
        for kind in ("position", "entropy", "confidence"):
            spoil(arms["after"], f"fidelity/bins/{kind}/tokens/1/0", 21)
    refused(DataError, message, build, tmp_path, arms)


def test_damaged_files_and_a_full_disk_leave_the_report_that_is_there(tmp_path, arms, monkeypatch):
    build(tmp_path, arms)
    written = {name: (tmp_path / name).read_bytes() for name in ("results.json", "report.md", "gap.png")}
    for content, message in (
        (b"{", "after.json is not JSON: .*line 1 column 2"), (b"[]", "after.json holds a list; expected an object"),
        (b'{"title": "a", "title": "b"}', "after.json is not JSON: the key 'title' is there twice in one object"),
    ):  # fmt: skip
        (tmp_path / "evaluation" / "after.json").write_bytes(content)
        refused(DataError, message, build_report, tmp_path)
        assert written == {name: (tmp_path / name).read_bytes() for name in written}
    (tmp_path / "evaluation" / "after.json").write_text(json.dumps(make_arm("after", 0.2, 70)))
    monkeypatch.setattr(DISK, "rename", Mock(side_effect=[OSError("full"), None, OSError("full")]))
    for _ in ("results.json", "report.md"):
        refused(OSError, "full", build_report, tmp_path)
        assert written == {name: (tmp_path / name).read_bytes() for name in written}


def test_missing_arms_and_parts_and_a_chart_of_an_earlier_report(tmp_path, arms):
    refused(DataError, r"holds no arms; expected files such as teacher\.json", build, tmp_path / "empty", {})
    with pytest.raises(DataError, match="neither fidelity nor accuracy"):
        build(tmp_path / "none", {"after": {**arms["after"], "fidelity": None, "questions": {}}})
    build(tmp_path, arms)
    shutil.rmtree(tmp_path / "evaluation")
    results, page = build(tmp_path, {"teacher": {**arms["teacher"], "questions": {}}})
    for chart in ("gap.png", "kl_bits.png"):
        assert not (tmp_path / chart).exists() and chart not in page
    assert results["arms"]["teacher"]["metrics"]["kl"]["value"] == 0


@pytest.mark.parametrize(("names", "subject"), [
    (["teacher"], None), (["after"], "after"), (["teacher", "before"], None), (["before", "after"], "after"),
    (["teacher", "before", "mine"], "mine"), (["teacher", "before", "start"], "start"),
    (["teacher", "before", "start", "control"], "control"),
    (["teacher", "before", "after", "control", "merged", "requantized", "x-1", "y", "z"], "after"),
])  # fmt: skip
def test_any_set_of_arms_makes_a_report(tmp_path, names, subject):
    arms = {name: make_arm(name, *LEVELS.get(name, (0.2, 70))) for name in names}
    results, page = build(tmp_path, arms)
    assert results["arm_order"] == names and results["subject"] == subject
    table = format_table(results)
    for name in names:
        assert f"The {name} | arm" in table and f"The {name} \\| arm" in page
    lost = {"teacher": "no share of the gap and no answer agreement.", "before": "no share of the gap."}
    absent = {f"There is no arm {name}, so {what}" for name, what in lost.items() if name not in names}
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


@pytest.mark.parametrize(("name", "level", "solved", "said"), [
    ("requantized", 0.35, 60, ["this is what the change of form cost"]),
    ("start", 0.2, 70, ['before the first step: 50.0% [50.0, 50.0] of the gap. Less "The after',
                        "of the start, this is what training gave"]),
])  # fmt: skip
def test_the_report_says_what_an_export_cost_and_training_gave(tmp_path, arms, name, level, solved, said):
    arms[name] = make_arm(name, level, solved)
    results, page = build(tmp_path, arms)
    found = results["arms"][name]["differences"]["after"]
    sums = [b - a for a, b in zip(*(arms[each]["fidelity"]["rows"]["kl_sum"] for each in ("after", name)), strict=True)]
    assert found["kl"]["value"] == pytest.approx(sum(sums) / sum(TOKENS))
    assert found["kl"]["interval"] == pytest.approx(list(bootstrap_interval(RowSums(sums, TOKENS))))
    assert found["accuracy_0_shot"]["value"] == pytest.approx((solved - 80) / 100)
    assert "after" not in results["arms"]["before"]["differences"] and results["subject"] == "after"
    assert [text for text in (*said, f"{found['kl']['value']:+.4f} [") if text not in page] == []


def test_every_arm_is_a_labelled_point_over_its_bits(arms):
    arms |= {name: make_arm(name, level, 60) for name, level in (("start", 0.101), ("merged", 0.1), ("free", 0.0))}
    compared = {}
    for name, arm in arms.items():
        kl = {"value": sum(arm["fidelity"]["rows"]["kl_sum"]) / sum(TOKENS), "interval": None}
        compared[name] = {"title": name, "bits_per_weight": arm["size"]["bits_per_weight"], "metrics": {"kl": kl}}
    figure = draw_bits({"arms": compared, "confidence": 0.95})
    figure.draw_without_rendering()
    (panel,) = figure.axes
    assert (panel.get_xscale(), panel.get_yscale()) == ("log", "log")
    points = {text.get_text(): text.xy for text in panel.texts}
    shown = {name: arm for name, arm in compared.items() if name not in ("teacher", "free")}  # a logarithm has no zero
    assert points == {name: (arm["bits_per_weight"], arm["metrics"]["kl"]["value"]) for name, arm in shown.items()}
    boxes = [Text.get_window_extent(text) for text in panel.texts]  # an annotation's own has its line too
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


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
    assert after["differences"]["before"]["kl"]["interval"] is None and "over 1 held-out row with 10" in page


def test_settings_that_differ_in_punctuation_and_filters_called_strict_stay_apart(tmp_path, arms):
    for arm in arms.values():
        solved = LEVELS[arm["arm"]][1]
        verdicts = {f"lm-eval {name}": make_verdicts(solved - less)["correct_flexible"]
                    for name, less in (("a-b, acc", 0), ("a_b, acc", 9), ("t, acc, strict", 0))}  # fmt: skip
        arm["tasks"] = {"all": {"settings": {}, "figures": {}, "verdicts": verdicts}}
    results, page = build(tmp_path, arms)
    metrics = results["arms"]["before"]["metrics"]
    titles = {results["metrics"][key]: found["value"] for key, found in metrics.items()}
    assert titles["Accuracy, lm-eval a-b, acc"] == 0.5 and titles["Accuracy, lm-eval a_b, acc"] == pytest.approx(0.41)
    assert len(set(results["metric_order"])) == len(results["metric_order"])
    assert [key for key in results["metric_order"] if "strict" not in key][:2] == ["accuracy_0_shot", "accuracy_8_shot"]
    told = list_told_apart(results)  # a task's filter called strict is no grader of ours
    assert told["accuracy_lm_eval_t_acc_strict_2"] and "accuracy_8_shot_strict" not in told
    assert "Accuracy, lm-eval t, acc, strict" in page.partition("\n|")[0]


def test_bytes_do_not_depend_on_place_hash_seed_locale_or_clock(pictures, all_draws, tmp_path, arms):
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


KL = {"teacher": 0.0, "before": 0.4, "after": 0.1, "control": 0.3}


def make_binned_arm(name: str, dense: bool = True) -> dict[str, Any]:
    """KL grows with the row's number, with position and, threefold, with entropy; most bins have no token."""
    level, rng, number = KL[name], np.random.default_rng(len(name)), np.arange(12)
    tokens = np.stack([np.full(12, 8), 4 + number % 3], axis=1)
    kl = tokens * level * (1 + 0.05 * number)[:, None] * [0.5, 2.0]
    by_entropy = np.stack([tokens[:, 0] - 2, tokens.sum(1) - tokens[:, 0] + 2], axis=1)
    entropy_kl = np.stack([kl.sum(1) / 4, 3 * kl.sum(1) / 4], axis=1)
    sure = by_entropy[:, ::-1]
    correct = np.minimum(sure, np.stack([sure[:, 0] // 2, sure[:, 1] - (rng.random(12) < level)], axis=1))
    count = tokens.sum(1)
    fidelity = make_fidelity(
        count, kl.sum(1), count * (0.3 + level), count - number % 2, dense,
        position_tokens=tokens, position_kl_sum=kl, entropy_tokens=by_entropy, entropy_kl_sum=entropy_kl,
        confidence_tokens=sure, confidence_confidence_sum=sure * [0.4, 0.9], confidence_correct=correct,
    )  # fmt: skip
    verdicts = make_verdicts({"teacher": 90, "before": 84, "after": 88, "control": 85}[name])
    return {**make_arm(name, 0, 0), "title": f"the {name}", "fidelity": fidelity, "questions": {"0-shot": verdicts}}


def test_divergences_calibration_and_paired_differences(all_draws, tmp_path, binned):
    """The interval of the calibration error is scipy's paired bootstrap over rows."""
    results, page = build(tmp_path, binned)

    def ece(*drawn, axis=-1):  # Guo et al. 2017, equation 3
        sums = [one.sum(axis) for one in drawn]
        return (abs(sums[0] - sums[2]) + abs(sums[1] - sums[3])) / (sums[4] + sums[5])

    for name, arm in binned.items():
        metrics, bins = results["arms"][name]["metrics"], arm["fidelity"]["bins"]["confidence"]
        for key, factor in (("reverse_kl", 1.5), ("dense_kl", 1.1), ("dense_reverse_kl", 1.7)):
            assert metrics[key]["value"] == pytest.approx(factor * metrics["kl"]["value"])
        assert metrics["dense_top1_agreement"]["value"] == 1
        columns = [np.array(bins[key])[:, b] for key in ("confidence_sum", "correct", "tokens") for b in (0, 1)]
        assert metrics["ece"]["value"] == pytest.approx(ece(*columns))
        assert metrics["ece"]["interval"] == pytest.approx(list(bootstrap_by_scipy(columns, ece)), rel=1e-9)
        assert not np.any(np.array(bins["tokens"])[:, 2:]) and metrics["ece"]["interval"][0] > 0
    assert results["gap_recovered"]["reverse_kl"] == pytest.approx(0.75)
    assert results["metric_order"][-5:-3] == ["reverse_kl", "ece"]
    assert "Calibration error (ECE)" in format_table(results)
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


def test_kl_by_bin(pictures, tmp_path, binned):
    results, page = build(tmp_path, binned)
    for name, kind in itertools.product(binned, ("position", "entropy")):
        bins, found = binned[name]["fidelity"]["bins"][kind], results["arms"][name][f"kl_by_{kind}"]
        sums, tokens = np.sum(bins["kl_sum"], axis=0), np.sum(bins["tokens"], axis=0)
        assert [one["tokens"] for one in found] == tokens.tolist()
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


def test_sparse_bins_are_shown_where_an_arm_has_no_others(tmp_path, binned):
    binned["control"] = make_binned_arm("control", dense=False)
    assert "KL by position in the answer: token |" in build(tmp_path, binned)[1]
    for arm in binned.values():
        arm["fidelity"] = None
    results, page = build(tmp_path, binned)
    assert "## KL by position" not in page and not (tmp_path / "kl_bins.png").exists()
    assert "ece" not in results["metric_order"]


def test_a_bin_of_one_arm_alone_is_a_gap_for_the_others(pictures, tmp_path, binned):
    """Each arm's run of the teacher bins by its own entropy, so a token near an edge can change places."""
    for kind in ("entropy", "dense_entropy"):
        bins = binned["after"]["fidelity"]["bins"][kind]
        for key in ("tokens", "kl_sum"):
            bins[key] = [[sum(row), *[0] * (len(row) - 1)] for row in bins[key]]
    for arms in (binned, dict(reversed(binned.items()))):
        page = build(tmp_path, arms)[1]
        assert re.search(r"\n\| 0.01 to 0.1 \|.*\| no token \|", page) and (tmp_path / "kl_bins.png").is_file()


def test_questions_needed(tmp_path, binned):
    """6 of 100 questions are the teacher's alone: (1.95996 sqrt(.06) + .84162 sqrt(.06 - .0036))^2 / .0036 = 128.4."""
    results, page = build(tmp_path, binned)
    assert results["questions_needed"]["accuracy_0_shot"] == 129
    assert results["arms"]["after"]["mcnemar"]["accuracy_0_shot"]["teacher"]["questions_needed"] > 129
    assert "| 0 | 6 | 0.0312 | 129 |" in page
    binned["before"]["questions"] = binned["control"]["questions"]
    results, _ = build(tmp_path, binned)
    # (1.95996 sqrt(.05) + .84162 sqrt(.05 - .0025))^2 / .0025 = (0.43826 + 0.18343)^2 / .0025 = 154.6
    assert "about 155 questions would show it" in results["not_measurable"]["accuracy_0_shot"]


@pytest.mark.parametrize("temperatures", [(1.0, 2.0), (2.0,)])
def test_histograms(tmp_path, temperatures):
    transfer_set = write_set(tmp_path / "set", make_plan(num_prompts=12, temperatures=temperatures))
    found = compute_histograms(transfer_set)
    sizes, entropies = [], []
    for row in transfer_set.rows(range(12)):
        sizes += row.counts.tolist()
        for logprobs in np.split(row.logprobs.astype(np.float64), np.cumsum(row.counts)[:-1]):
            p = np.append(np.exp(logprobs), max(1 - np.exp(logprobs).sum(), 0))
            entropies.append(float(-(p[p > 0] * np.log(p[p > 0])).sum()))
    assert found.entries.tolist() == np.bincount(sizes).tolist()
    wanted = np.histogram(entropies, bins=np.append(found.entropy_edges[:-1], 1e9))[0]
    assert found.entropy.tolist() == wanted.tolist() and compute_histograms(transfer_set[:0]).entropy.sum() == 0
