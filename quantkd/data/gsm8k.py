"""GSM8K: its rows, the prompt that asks for the answer in a fixed last line, and the graders of an answer.

A row (this one is made up) has the form
    question: Nadia picks 6 baskets of 15 plums and sells 70 of them. How many plums are left?
    answer:   She picks 6 * 15 = <<6*15=90>>90 plums.
              After selling, 90 - 70 = <<90-70=20>>20 plums are left.
              #### 20
The marks in `<<>>` were for a calculator, and the number after `####` is the answer (Cobbe et al. 2021,
arXiv:2110.14168).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from quantkd.data.prompts import load_examples
from quantkd.errors import ConfigError, DataError

INSTRUCTION = (
    "Solve the problem step by step. Write the final answer alone on the last line, "
    "in the form `#### <number>`, with nothing after it."
)

STOP = "\nQuestion:"  # what a model writes when it has answered and invents the next question

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")
# What lm-evaluation-harness takes for a number, so that a figure here is one that can be set beside published ones:
# also a dollar sign alone with a dot, the dots of an ellipsis, and in "10-2" the number -2.
_STRICT = re.compile(r"#### (-?[\d.,]+)", re.ASCII)
_FLEXIBLE = re.compile(r"-?[$\d.,]{2,}|-?\d+", re.ASCII)


def load_gsm8k(path: str | Path | None, split: str | None, limit: int | None = None) -> list[dict[str, str]]:
    """Read GSM8K rows, or rows of any set in its format.

    Args:
        path: a folder with `train.jsonl` and `test.jsonl`, or a file; the Hub's openai/gsm8k if None.
        split: "train" or "test"; None for a single file, which has none.
        limit: at most this many, from the front.

    Returns:
        A `question` and an `answer` each; the answer ends in `#### ` and the number.

    Raises:
        DataError: rows that are missing, or that do not end so.
    """
    source = "openai/gsm8k:main" if path is None else path
    examples = load_examples(source, prompt_column="question", completion_column="answer", split=split, limit=limit)
    rows = []
    for index, example in enumerate(examples):
        if not isinstance(example.prompt, str) or extract_strict(example.completion or "") is None:
            raise DataError(
                f"{source}{f', split {split}' if split else ''}, row {index} has the answer "
                f"{example.completion!r:.80}; expected text that ends in `#### <number>`. For other data use "
                "load_examples and evaluate_prompts."
            )
        rows.append({"question": example.prompt, "answer": example.completion or ""})
    return rows


def build_prompt(question: str, shots: Sequence[Mapping[str, str]] = ()) -> str:
    """The instruction, the solved examples and the question as one message; what all share comes first.

    Args:
        question: a row's.
        shots: rows of `load_gsm8k`, shown with their answers.
    """
    solved = [f"Question: {shot['question']}\nAnswer: {remove_calculator_marks(shot['answer'])}" for shot in shots]
    return "\n\n".join([INSTRUCTION, *solved, f"Question: {question}\nAnswer:"])


def remove_calculator_marks(answer: str) -> str:
    """The answer without GSM8K's `<<48/2=24>>` marks, which its authors added for a calculator and no person writes."""
    return _CALCULATOR_MARK.sub("", answer)


def extract_strict(text: str) -> str | None:
    """The number after the first `#### ` that a number follows, as the official grader takes it."""
    # `extract_answer` in openai/grade-school-math, and the `strict-match` filter of lm-evaluation-harness' gsm8k task.
    match = _STRICT.search(text)
    return normalize_number(match.group(1)) if match else None


def extract_flexible(text: str) -> str | None:
    """The last number in the text."""
    # The `flexible-extract` filter of lm-evaluation-harness' gsm8k, faults included: a final ellipsis counts.
    matches = _FLEXIBLE.findall(text)
    return normalize_number(matches[-1]) if matches else None


def normalize_number(text: str) -> str | None:
    """The spelling that is compared: without commas, dollar signs and one dot at the end."""
    return text.replace(",", "").replace("$", "").removesuffix(".") or None


def is_correct(prediction: str, gold_answer: str, mode: Literal["strict", "flexible"]) -> bool:
    """Whether an output gives the gold answer's number."""
    if mode not in ("strict", "flexible"):
        raise ConfigError(f"Found the mode {mode!r}; expected 'strict' or 'flexible'.")
    gold = extract_strict(gold_answer)
    if gold is None:
        raise DataError(f"The gold answer {gold_answer!r:.80} holds no `#### <number>`; expected GSM8K's format.")
    return gold == (extract_strict(prediction) if mode == "strict" else extract_flexible(prediction))
