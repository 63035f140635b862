"""Answer agreement and flips: against sums by hand, in odd cases, in the report, its chart, and on the command line."""

import json

import numpy as np
import pytest

from quantkd.data.arithmetic import generate_problems
from quantkd.errors import DataError
from quantkd.evaluation.accuracy import AnswerRecord
from quantkd.evaluation.agreement import compare_answers
from quantkd.evaluation.stats import mcnemar_exact, wilson_interval
from quantkd.report import compute_results, format_table, load_arms
from quantkd.report.figures import draw_bars
from tests.report_arms import build, make_arm, make_verdicts

pytestmark = pytest.mark.usefixtures("no_pictures", "few_draws")


def answer(place, number, gold="4", prompt="{place}?"):
    prompt = prompt.format(place=place)
    right = number == gold
    return AnswerRecord(place, f"{place}?", prompt, f"So {number}", gold, None, number, False, right, True, 3)


def answers(*numbers, **options):
    return [answer(place, number, **options) for place, number in enumerate(numbers)]


@pytest.mark.parametrize(("teacher", "student", "agreeing", "flips"), [
    (["4", "4", "5", "6"], ["4", "5", "5", "4"], [1, 0, 1, 0], (1, 1)),
    ([None, None, "4"], [None, "4", None], [0, 0, 0], (1, 1)),  # without a number nothing agrees
    ([".."], [".."], [0], (0, 0)),  # an ellipsis at the end, which the extractor takes
    (["4"], ["4"], [1], (0, 0)), (["4"], ["4.0"], [0], (1, 0)),  # spellings are compared, as for the accuracy
    (["-7"] * 40, ["-7"] * 40, [1] * 40, (0, 0)), (["4"] * 40, [None] * 40, [0] * 40, (40, 0)),
])  # fmt: skip
def test_counts_and_intervals(teacher, student, agreeing, flips):
    found = compare_answers(answers(*student), answers(*teacher))
    assert found.agrees.tolist() == [bool(one) for one in agreeing]
    n, shares = len(agreeing), [found.agreement, *found.flips.values()]
    assert list(found.flips) == ["right_to_wrong", "wrong_to_right"]
    for share, count in zip(shares, (sum(agreeing), *flips), strict=True):
        assert share == (count / n, wilson_interval(count, n), n)


@pytest.mark.parametrize(("given", "message"), [
    ([], "Found 0 answers and 2 of the teacher's"), (answers("4"), "Found 1 answers and 2 of the teacher's"),
    (answers("4", "4", gold="5"), "gold answers differ"), (answers("4", "4")[::-1], r"Answer 0 is to '1\?'"),
    (answers("4", "4", prompt="Shot. {place}?"), "with the same shots"),
])  # fmt: skip
def test_other_questions_are_refused(given, message):
    with pytest.raises(DataError, match=message):
        compare_answers(given, answers("4", "4"))


ARMS = {"before": 0.5, "start": 0.7, "after": 0.9, "control": 0.6}  # how often each has the teacher's number


def make_answers(share, teacher, golds, rng):
    """Verdicts and answers of an arm, as its file has them."""
    given = [t if rng.random() < share else rng.choice(["1", "2", None]) for t in teacher]
    right = [bool(a == gold) for a, gold in zip(given, golds, strict=True)]
    return {**make_verdicts(0), "answers": given, "correct_flexible": right, "correct_strict": right}


@pytest.fixture
def arms():
    """120 questions, of which the teacher solves about half and leaves some without a number."""
    rng = np.random.default_rng(3)
    golds = [str(one) for one in rng.integers(1, 4, 120)]
    teacher = [rng.choice(["1", "2", "3", None], p=[0.4, 0.3, 0.25, 0.05]) for _ in golds]
    made = {name: make_arm(name, 0.2, 50) for name in ("teacher", *ARMS)}
    for name, arm in made.items():
        arm["questions"] = {"0-shot": make_answers(ARMS.get(name, 1), teacher, golds, rng)}
    return made


def test_the_report_compares_answers_in_pairs(tmp_path, arms):
    results, page = build(tmp_path, arms)
    teacher, n = arms["teacher"]["questions"]["0-shot"], 120
    agree = {}
    for name, arm in arms.items():
        own = arm["questions"]["0-shot"]
        pairs = list(zip(own["answers"], teacher["answers"], strict=True))
        agree[name] = [mine is not None and mine == theirs for mine, theirs in pairs]
        found = results["arms"][name]["metrics"]["agreement_0_shot"]
        assert (found["value"], found["n"]) == (pytest.approx(sum(agree[name]) / n), n)
        expected = None if name == "teacher" else pytest.approx(wilson_interval(sum(agree[name]), n), abs=1e-8)
        assert found["interval"] == expected
        verdicts = list(zip(teacher["correct_flexible"], own["correct_flexible"], strict=True))
        for direction, flip in (("right_to_wrong", (True, False)), ("wrong_to_right", (False, True))):
            if name != "teacher":
                flips = results["arms"][name]["flips"]["agreement_0_shot"][direction]
                assert flips["value"] == pytest.approx(verdicts.count(flip) / n)
                assert flips["interval"] == pytest.approx(wilson_interval(verdicts.count(flip), n), abs=1e-8)
    assert sum(agree["teacher"]) == n - teacher["answers"].count(None) < n
    for one, other in (("after", "before"), ("after", "control"), ("start", "after")):
        test = results["arms"][one]["mcnemar"]["agreement_0_shot"][other]
        expected = mcnemar_exact(agree[one], agree[other])
        assert (test["only_this"], test["only_other"], test["p_value"]) == pytest.approx(expected, rel=1e-8)
    # The teacher agrees with itself: no test says anything about that.
    assert all("teacher" not in arm["mcnemar"]["agreement_0_shot"] for arm in results["arms"].values())
    share = (sum(agree["after"]) - sum(agree["before"])) / (sum(agree["teacher"]) - sum(agree["before"]))
    assert results["gap_recovered"]["agreement_0_shot"] == pytest.approx(share)
    rows = [line for line in format_table(results).splitlines() if line.startswith(("Answer agreement", "Flips"))]
    assert [row.split("  ")[0] for row in rows] == [
        "Answer agreement, 0-shot", "Flips, 0-shot, right to wrong", "Flips, 0-shot, wrong to right"
    ]  # fmt: skip
    assert f"{sum(agree['after']) / n:.1%} [" in rows[0] and rows[0].rstrip().endswith("]")
    assert "- Answer agreement, 0-shot: **" in page and "Flips are questions" in page
    assert "| Answer agreement, 0-shot | The start \\| arm | The after \\| arm |" in page


def test_without_a_teacher_that_answered_the_same_there_is_none(tmp_path, arms):
    asked = arms["teacher"]["questions"]
    arms["teacher"]["questions"] = {"8-shot": asked["0-shot"]}
    results, page = build(tmp_path / "other", arms)
    assert results["arms"]["after"]["metrics"].keys().isdisjoint({"agreement_0_shot", "agreement_8_shot"})
    assert "Answer agreement, 8-shot" in results["metrics"].values() and "Answer agreement, 0-shot" not in page
    del arms["teacher"]
    results, page = build(tmp_path / "none", arms)
    assert "There is no arm teacher, so no share of the gap and no answer agreement." in results["missing"]
    assert not any("agreement_0" in key for key in results["metrics"]) and "Flips" not in page
    (tmp_path / "old" / "evaluation").mkdir(parents=True)
    del arms["after"]["questions"]["0-shot"]["answers"]
    (tmp_path / "old" / "evaluation" / "after.json").write_text(json.dumps(arms["after"]))
    with pytest.raises(DataError, match=r"0-shot: expected the keys .*answers, found .* Evaluate this arm again"):
        load_arms(tmp_path / "old" / "evaluation")


def draw_panels(run, arms):
    """By title the labels below the axis and the heights of the bars, the arms of the legend, and the report's page."""
    _, page = build(run, arms)
    figure = draw_bars(compute_results(load_arms(run / "evaluation")))
    panels = {
        panel.get_title().split(" (")[0]: (
            [tick.get_text() for tick in panel.get_xticklabels()], {round(bar.get_height(), 3) for bar in panel.patches}
        )
        for panel in figure.axes
    }  # fmt: skip
    assert figure.get_supxlabel().startswith("Whiskers: 95% intervals (")
    return panels, [text.get_text() for text in figure.legends[0].get_texts()], page


def test_shares_are_drawn_only_where_a_paired_test_tells_arms_apart(tmp_path):
    """5 of 100 questions that only one arm solves have p = 0.06, and 6 have 0.03."""
    solved = {"teacher": 55, "before": 50, "after": 54}
    arms = {name: make_arm(name, 0.1, count) for name, count in solved.items()}
    arms["teacher"]["questions"]["8-shot"] = make_verdicts(56)
    panels, legend, page = draw_panels(tmp_path, arms)
    assert list(panels) == ["Accuracy", "KL to the teacher"] and len(legend) == 3
    assert panels["Accuracy"] == (["8-shot"], {50, 54, 56})
    left_out = "Accuracy, 0-shot; Answer agreement, 0-shot; Answer agreement, 8-shot"
    assert f"Not drawn: {left_out}. On these questions no paired test" in page
    for arm in arms.values():  # the teacher solves no more than the others, but has the numbers of one alone
        arm["questions"] = {"0-shot": make_verdicts(50)}
    arms["before"]["questions"]["0-shot"]["answers"][:20] = ["1.5"] * 20
    panels, legend, page = draw_panels(tmp_path, arms)
    assert list(panels) == ["Answer agreement", "KL to the teacher"]
    assert panels["Answer agreement"] == (["0-shot"], {80, 100})  # the teacher has no bar
    assert legend == ["The before | arm", "The after | arm"] and "Not drawn: Accuracy, 0-shot." in page
    arms["before"]["questions"] = {"0-shot": make_verdicts(50)}
    panels, _, page = draw_panels(tmp_path, arms)
    assert list(panels) == ["KL to the teacher"] and "Not drawn: Accuracy, 0-shot; Answer agreement, 0-shot." in page


def test_the_command_says_how_an_arm_agrees_and_the_report_has_it_by_itself(tmp_path, tiny_model_path, cli):
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in generate_problems(4, seed=0)))
    words = f"--model_name_or_path {tiny_model_path} --dtype float32 --gsm8k {tmp_path}/q.jsonl --shots 0"
    words += f" --run_dir {tmp_path}/run --max_new_tokens 12"

    def evaluate(arm, *more):
        return cli.ok("evaluate", "--arm", arm, *words.split(), *more).splitlines()[-1]

    assert evaluate("before").endswith(
        "of 4 solved; no answer agreement: the arm teacher did not answer the same questions"
    )
    assert evaluate("teacher", "--full_precision").endswith("of 4 solved")
    told = evaluate("before")
    assert "answer agreement with the teacher" in told and "right to wrong" in told
    records = {
        arm: [json.loads(line) for line in (tmp_path / "run" / "evaluation" / f"{arm}-0-shot.jsonl").open()]
        for arm in ("teacher", "before")
    }
    found = compare_answers(*([AnswerRecord(**each) for each in records[arm]] for arm in ("before", "teacher")))
    assert f"teacher {found.agreement.value:.1%} [" in told
    assert f"{found.right_to_wrong.sum()} right to wrong, {found.wrong_to_right.sum()} wrong to right" in told
    out = cli.ok("report", tmp_path / "run")
    assert "Answer agreement, 0-shot" in out and f"{found.agreement.value:.1%} [" in out
    assert evaluate("after", "--limit", "2").endswith("did not answer the same questions")
    (tmp_path / "run" / "evaluation" / "teacher.json").write_text("{}")
    assert "no answer agreement: " in (told := evaluate("before")) and "teacher.json" in told
    assert mcnemar_exact(found.agrees, found.agrees).p_value == 1
