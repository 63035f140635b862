"""The built-in word problems: right answers, whole numbers, no repeats, and a train and test set that are disjoint."""

import hashlib
import json
import re

import pytest

from quantkd.data.arithmetic import generate_problems
from quantkd.data.gsm8k import extract_strict
from quantkd.errors import DataError

OFFICIAL = re.compile(r"#### (\-?[0-9\.\,]+)")  # grade_school_math/dataset.py of openai/grade-school-math
EQUATION = re.compile(r"(\d+(?: [-+*/] \d+)+) = \$?(\d+)")


def test_every_step_is_right_and_leads_to_the_answer_of_a_row_that_never_repeats():
    rows = generate_problems(5_000, seed=2)
    assert len({row["question"] for row in rows}) == 5_000
    assert len({re.sub(r"\d+", "0", row["answer"].split("\n")[0]) for row in rows[:2_000]}) > 100
    for row in rows:
        assert set(row) == {"question", "answer"}
        assert extract_strict(row["answer"]) == OFFICIAL.search(row["answer"])[1].replace(",", "")
        *steps, last = row["answer"].split("\n")
        assert 1 <= len(steps) <= 3, row
        known = set(re.findall(r"\d+", row["question"])) | {"2", "12", "100"}
        for step in steps:
            equation = EQUATION.search(step)
            assert equation is not None, row
            numbers = re.findall(r"\d+", equation[1])
            assert set(numbers) <= known, f"{step} uses a number from nowhere: {row}"
            assert eval(equation[1]) == int(equation[2]), row
            known.add(equation[2])
        assert last == f"#### {equation[2]}" and int(equation[2]) >= 0, row


def test_the_seed_decides_and_excluded_questions_do_not_appear_even_under_the_same_one():
    train = generate_problems(500, seed=6)
    assert train[:50] == generate_problems(50, seed=6) != generate_problems(50, seed=7)
    test = generate_problems(500, seed=6, exclude=train)
    assert not {row["question"] for row in train} & {row["question"] for row in test}


def test_too_many_are_refused(monkeypatch):
    monkeypatch.setattr("quantkd.data.arithmetic._TEMPLATES", (({"n": range(1, 6)}, "{n}?", ("[m = n + 1]",)),))
    assert len(generate_problems(5, seed=0)) == 5
    with pytest.raises(DataError, match="Only 4 new problems were found of 5"):
        generate_problems(5, seed=0, exclude=[{"question": "3?", "answer": ""}])
    with pytest.raises(DataError, match="0 problems"):
        generate_problems(0, seed=0)


def test_golden_digest():
    """The problems are data that results are quoted on: a change of them must be seen and meant."""
    text = json.dumps(generate_problems(1_000, seed=0)).encode()
    assert hashlib.sha256(text).hexdigest() == "8b44d7207c49d698b27584e51b46825bc3f4986da54cf7678c6b212756235c8e"
