"""Evaluation of generated answers: graded, recorded, resumable, and never mixed up with another model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from quantkd.data.arithmetic import generate_problems
from quantkd.data.gsm8k import build_prompt, extract_strict
from quantkd.data.prompts import Example
from quantkd.errors import DataError
from quantkd.evaluation.accuracy import AnswerRecord, evaluate_gsm8k, evaluate_prompts
from quantkd.evaluation.generation import Generated, generate_greedy

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ROWS = generate_problems(7, seed=0)
SHOTS = generate_problems(1, seed=1, exclude=ROWS)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def evaluate(model: Any, tokenizer: Any, rows: list[dict[str, str]] = ROWS, **options: Any) -> list[AnswerRecord]:
    return evaluate_gsm8k(model, tokenizer, rows, **{"max_new_tokens": 8, "progress": False, **options})


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize("shots", [(), SHOTS])
def test_records_follow_the_rows(
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
    chat_template: bool,
    shots: list[dict[str, str]],
) -> None:
    records = evaluate(tiny_model, tiny_tokenizer, chat_template=chat_template, shots=shots, batch_size=3)
    assert [record.id for record in records] == list(range(len(ROWS)))
    for record, row in zip(records, ROWS, strict=True):
        text = build_prompt(row["question"], shots)
        plain = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if chat_template else text
        assert record.prompt == plain
        assert (record.question, record.gold) == (row["question"], extract_strict(row["answer"]))
        assert record.output_tokens <= 8 and record.finished in (True, False)


def test_verdicts_are_those_of_the_graders(
    monkeypatch: pytest.MonkeyPatch, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    golds = [extract_strict(row["answer"]) for row in ROWS[:3]]
    outputs = [f"so #### {golds[0]}", f"so {golds[1]}.", "no idea"]

    def write(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        yield [Generated(i, outputs[i], i != 2, 3) for i in (2, 0, 1)]

    monkeypatch.setattr("quantkd.evaluation.accuracy.generate_greedy", write)
    records = evaluate(tiny_model, tiny_tokenizer, ROWS[:3])
    assert [(r.correct_strict, r.correct_flexible, r.finished) for r in records] == [
        (True, True, True), (False, True, True), (False, False, False),
    ]  # fmt: skip
    assert [(r.prediction_strict, r.prediction_flexible) for r in records] == [
        (golds[0], golds[0]), (None, golds[1]), (None, None),
    ]  # fmt: skip


def test_a_stopped_evaluation_is_taken_up_and_ends_in_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tiny_model: LlamaForCausalLM,
    tiny_tokenizer: PreTrainedTokenizerFast,
) -> None:
    expected = evaluate(tiny_model, tiny_tokenizer, records_path=tmp_path / "whole.jsonl")
    path = tmp_path / "new" / "part.jsonl"

    def stop_after_two_batches(*args: Any, **options: Any) -> Any:
        for count, batch in enumerate(generate_greedy(*args, **options)):
            if count == 2:
                raise KeyboardInterrupt
            yield batch

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("quantkd.evaluation.accuracy.generate_greedy", stop_after_two_batches)
        evaluate(tiny_model, tiny_tokenizer, records_path=path, batch_size=2)
    assert len(path.read_text().splitlines()) == 4
    path.write_text(path.read_text() + '{"id": 6, "quest')  # and the process died in the middle of a line

    asked: list[int] = []

    def count(model: Any, tokenizer: Any, prompts: Any, **options: Any) -> Any:
        asked.append(len(prompts))
        return generate_greedy(model, tokenizer, prompts, **options)

    monkeypatch.setattr("quantkd.evaluation.accuracy.generate_greedy", count)
    assert evaluate(tiny_model, tiny_tokenizer, records_path=path) == expected
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert evaluate(tiny_model, tiny_tokenizer, records_path=str(path)) == expected
    assert asked == [3, 0]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == list(range(7))


def test_records_of_another_evaluation_are_refused(
    tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "records.jsonl"
    evaluate(tiny_model, tiny_tokenizer, ROWS[:2], records_path=path)
    with pytest.raises(DataError, match="max_new_tokens is 8, not 9"):
        evaluate(tiny_model, tiny_tokenizer, ROWS[:2], records_path=path, max_new_tokens=9)
    with pytest.raises(DataError, match="prompts is"):
        evaluate(tiny_model, tiny_tokenizer, ROWS[1:3], records_path=path)
    with torch.no_grad():
        tiny_model.model.layers[1].mlp.down_proj.weight += 1e-4
    with pytest.raises(DataError, match="model is"):
        evaluate(tiny_model, tiny_tokenizer, ROWS[:2], records_path=path)
    (tmp_path / "records.jsonl.settings.json").unlink()
    with pytest.raises(DataError, match=r"settings.json beside it is missing"):
        evaluate(tiny_model, tiny_tokenizer, ROWS[:2], records_path=path)


def test_damaged_records_are_refused(
    tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    path = tmp_path / "records.jsonl"
    evaluate(tiny_model, tiny_tokenizer, ROWS[:2], records_path=path)
    lines = path.read_text().splitlines()
    path.write_text(lines[0][:-5] + "\n" + lines[1] + "\n")
    with pytest.raises(DataError, match="line 1 is damaged"):
        evaluate(tiny_model, tiny_tokenizer, ROWS[:2], records_path=path)
    path.write_text('{"id": 0}\n')
    with pytest.raises(DataError, match=r"keys \['id'\]"):
        evaluate(tiny_model, tiny_tokenizer, ROWS[:2], records_path=path)


def test_an_adapter_switched_off_is_another_model(tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    evaluate(model, tiny_tokenizer, ROWS[:1], records_path=tmp_path / "records.jsonl")
    with model.disable_adapter(), pytest.raises(DataError, match="model is"):
        evaluate(model, tiny_tokenizer, ROWS[:1], records_path=tmp_path / "records.jsonl")


def test_bad_rows(tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="0 rows were given"):
        evaluate(tiny_model, tiny_tokenizer, [])
    with pytest.raises(DataError, match="Row 1 has the answer 'six'"):
        evaluate(tiny_model, tiny_tokenizer, [ROWS[0], {"question": "?", "answer": "six"}])
    with pytest.raises(DataError, match="Row 0 has a prompt of"):
        evaluate(tiny_model, tiny_tokenizer, shots=generate_problems(8, seed=1))


def test_other_prompts(tmp_path: Path, tiny_model: LlamaForCausalLM, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "progress": False}
    output = evaluate_prompts(tiny_model, tiny_tokenizer, [Example("Say it")], **options)[0].output
    examples = [Example("Say it", f"  {output.upper()}\n"), Example("Say it", output + "!"), Example("Say it")]
    path = tmp_path / "records.jsonl"
    records = evaluate_prompts(tiny_model, tiny_tokenizer, examples, records_path=path, **options)
    assert [record.correct for record in records] == [True, False, None]
    assert evaluate_prompts(tiny_model, tiny_tokenizer, examples, records_path=path, **options) == records
