"""GSM8K: rows, the prompt, and the graders, against the official pattern; and the built-in word problems."""

import hashlib
import json
import re

import pytest
from hypothesis import given, strategies as st

from quantkd.data import gsm8k
from quantkd.data.arithmetic import generate_problems
from quantkd.data.gsm8k import extract_strict
from quantkd.errors import ConfigError, DataError
from tests.conftest import refused

ROW = {"question": "How many?", "answer": "It is 2*3=<<2*3=6>>6.\nThen 6+1,000=<<6+1000=1006>>1,006\n#### 1,006"}


def test_prompt_and_verdict():
    assert gsm8k.build_prompt("Why?") == f"{gsm8k.INSTRUCTION}\n\nQuestion: Why?\nAnswer:"
    prompt = gsm8k.build_prompt("Why?", [ROW, {"question": "Other?", "answer": "#### 2"}])
    assert prompt == (
        f"{gsm8k.INSTRUCTION}\n\nQuestion: How many?\nAnswer: It is 2*3=6.\nThen 6+1,000=1,006\n#### 1,006"
        "\n\nQuestion: Other?\nAnswer: #### 2\n\nQuestion: Why?\nAnswer:"
    )
    cases = ("#### 1006", "strict"), ("so $1,006.", "flexible"), ("so 1,006.", "strict"), ("", "flexible")
    assert [gsm8k.is_correct(text, ROW["answer"], mode) for text, mode in cases] == [True, True, False, False]
    refused(DataError, "holds no `#### <number>`", gsm8k.is_correct, "1", "one", "strict")
    refused(ConfigError, "'loose'", gsm8k.is_correct, "1", "#### 1", "loose")  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "strict", "flexible"), [
    ("She makes 9 * 2 = $18.\n#### 18", "18", "18"), ("#### 1,250.", "1250", "1250"),
    ("#### $1,250.00", None, "1250.00"), ("####18", None, "18"), ("#### -3", "-3", "-3"), ("#### 25%", "25", "25"),
    ("#### 18\nThe end, 2024.", "18", "2024"), ("#### 5\n\n#### 7", "5", "7"), ("####\n18", None, "18"),
    ("#### Step one\nso\n#### 4", "4", "4"), ("The answer is 18.", None, "18"), ("That is 10-2", None, "-2"),
    ("Change of -$2.50 for you", None, "-2.50"), ("costs $.75", None, ".75"), ("in 3,4 and 5.", None, "5"),
    ("It is 18, I guess...", None, ".."), ("#### ,", None, None), ("I do not know.", None, None), ("", None, None),
])  # fmt: skip
def test_extraction(text, strict, flexible):
    assert (gsm8k.extract_strict(text), gsm8k.extract_flexible(text)) == (strict, flexible)


@given(st.integers(min_value=-(10**60), max_value=10**60))
def test_spellings_of_a_whole_number_are_one(value):
    for text in (f"{value}", f"{value:,}", f"{value:,}.", f"{value:,}".replace("-", "-$")):
        assert gsm8k.normalize_number(text) == str(value)


def test_rows_from_a_folder_a_file_and_the_hub(tmp_path, monkeypatch):
    path = tmp_path / "test.jsonl"
    path.write_text(json.dumps(ROW) + "\n" + json.dumps({"question": "?", "answer": "six"}) + "\n")
    assert gsm8k.load_gsm8k(tmp_path, "test", limit=1) == gsm8k.load_gsm8k(path, None, limit=1) == [ROW]
    with pytest.raises(DataError, match=r"test\.jsonl has no splits, and the split 'train' was asked for"):
        gsm8k.load_gsm8k(path, "train")
    refused(DataError, "row 1 has the answer 'six'", gsm8k.load_gsm8k, str(tmp_path), "test")
    path.write_text(json.dumps({"question": "?"}) + "\n")
    refused(DataError, "'answer' was asked for", gsm8k.load_gsm8k, tmp_path, "test")
    seen = []
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: seen.append((a, k)) or [ROW])
    assert gsm8k.load_gsm8k(None, "train") == [ROW] and seen == [(("openai/gsm8k", "main"), {"split": "train"})]


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


def test_the_seed_decides_excluded_questions_do_not_appear_and_too_many_are_refused(monkeypatch):
    text = json.dumps(generate_problems(1_000, seed=0)).encode()  # results are quoted on them: a change must be meant
    assert hashlib.sha256(text).hexdigest() == "8b44d7207c49d698b27584e51b46825bc3f4986da54cf7678c6b212756235c8e"
    train = generate_problems(500, seed=6)
    assert train[:50] == generate_problems(50, seed=6) != generate_problems(50, seed=7)
    test = generate_problems(500, seed=6, exclude=train)
    assert not {row["question"] for row in train} & {row["question"] for row in test}
    monkeypatch.setattr("quantkd.data.arithmetic._TEMPLATES", (({"n": range(1, 6)}, "{n}?", ("[m = n + 1]",)),))
    assert len(generate_problems(5, seed=0)) == 5
    with pytest.raises(DataError, match="Only 4 new problems were found of 5"):
        generate_problems(5, seed=0, exclude=[{"question": "3?", "answer": ""}])
    refused(DataError, "0 problems", generate_problems, 0, seed=0)
