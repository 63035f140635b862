"""Generated answers: greedy in any batch, graded, recorded, resumable, and never mixed up with another model's."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, MistralConfig, MistralForCausalLM

from quantkd.data.arithmetic import generate_problems
from quantkd.data.encoding import encode_prompts
from quantkd.data.gsm8k import build_prompt, extract_strict
from quantkd.data.prompts import Example
from quantkd.errors import ConfigError, DataError
from quantkd.evaluation.accuracy import (
    AnswerRecord,
    Generated,
    Questions,
    evaluate_gsm8k,
    evaluate_prompts,
    find_shared_prefix,
    generate_greedy,
)
from quantkd.evaluation.arms import EvaluationSettings
from quantkd.evaluation.sharing import deal_batches
from quantkd.models.network import base_network

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ROWS = generate_problems(7, seed=0)
SHOTS = generate_problems(1, seed=1, exclude=ROWS)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def evaluate(model: Any, tokenizer: Any, rows: list[dict[str, str]] = ROWS, **options: Any) -> list[AnswerRecord]:
    given = {key: options.pop(key) for key in ("shots", "records_path") if key in options}
    settings = EvaluationSettings(**{"max_new_tokens": 8, "progress": False, **options})
    return evaluate_gsm8k(model, tokenizer, rows, settings=settings, **given)


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize("shots", [(), SHOTS])
def test_records_follow_the_rows(tiny_model, tiny_tokenizer, chat_template, shots):
    records = evaluate(tiny_model, tiny_tokenizer, chat_template=chat_template, shots=shots, batch_size=3)
    assert [record.id for record in records] == list(range(len(ROWS)))
    for record, row in zip(records, ROWS, strict=True):
        text = build_prompt(row["question"], shots)
        plain = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if chat_template else text
        assert record.prompt == plain
        assert (record.question, record.gold) == (row["question"], extract_strict(row["answer"]))
        assert record.output_tokens <= 8 and record.finished in (True, False)


def test_verdicts_are_those_of_the_graders(monkeypatch, tiny_model, tiny_tokenizer):
    golds = [extract_strict(row["answer"]) for row in ROWS[:3]]
    outputs = [f"so #### {golds[0]}", f"so {golds[1]}.", "no idea"]

    def write(*_: Any) -> Any:
        yield [Generated(i, outputs[i], i != 2, 3) for i in (2, 0, 1)]

    monkeypatch.setattr("quantkd.evaluation.accuracy.generate_greedy", write)
    records = evaluate(tiny_model, tiny_tokenizer, ROWS[:3])
    assert [(r.correct_strict, r.correct_flexible, r.finished) for r in records] == [
        (True, True, True), (False, True, True), (False, False, False),
    ]  # fmt: skip
    assert [(r.prediction_strict, r.prediction_flexible) for r in records] == [
        (golds[0], golds[0]), (None, golds[1]), (None, None),
    ]  # fmt: skip


def test_a_stopped_evaluation_is_taken_up_and_ends_in_the_same_bytes(tmp_path, monkeypatch, tiny_model, tiny_tokenizer):
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
    with path.open("ab") as file:
        file.write('{"id": 6, "question": "é'.encode()[:-1])  # and the process died in the middle of a character

    asked: list[int] = []

    def count(model: Any, tokenizer: Any, prompts: Any, batches: Any, *limits: Any) -> Any:
        asked.append(sum(map(len, batches)))
        return generate_greedy(model, tokenizer, prompts, batches, *limits)

    monkeypatch.setattr("quantkd.evaluation.accuracy.generate_greedy", count)
    assert evaluate(tiny_model, tiny_tokenizer, records_path=path) == expected
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert evaluate(tiny_model, tiny_tokenizer, records_path=str(path)) == expected
    assert asked == [3, 0]
    assert [json.loads(line)["id"] for line in path.read_text().splitlines()] == list(range(7))


def test_records_of_another_evaluation_are_refused(tmp_path, tiny_model, tiny_tokenizer):
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


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"id": 0, "quest\n', "Unterminated string"),
        (b'{"id": 1}\n', "expected an object with the keys"),
        (b'{"question": "?"}\n', "expected an object with the keys"),
        (b"[0]\n", "expected an object"),
        (b"\n", "Expecting value"),
        (b"FIRST", "id is 0, expected each of 0 to 1 at most once"),
        (b'{"id": 1, "q": "\xc3"}\n', "can't decode byte 0xc3"),
        (b'{"id": 1, "q": NaN}\n', "NaN is not a JSON number"),
        (b"[" * 100_000 + b"\n", "nested too deeply"),
        (b'SECOND "id": 1 -> "id": 7', "id is 7, expected each of 0 to 1"),
        (b'SECOND "id": 1 -> "id": true', "id is True, expected int"),
        (b'SECOND "output": " -> "output": "\\ud83d', "surrogates not allowed"),
        (b'SECOND "correct_strict": false -> "correct_strict": 0', "correct_strict is 0, expected bool"),
        (b'SECOND "id": 1 -> "id": 1' + b"0" * 5000, "Exceeds the limit"),
    ],
)
def test_damaged_records_are_refused_by_file_and_line(tmp_path, tiny_model, tiny_tokenizer, line, message):
    path = tmp_path / "records.jsonl"
    evaluate(tiny_model, tiny_tokenizer, ROWS[:2], records_path=path)
    first, second = path.read_bytes().splitlines(keepends=True)
    if line == b"FIRST":
        line = first
    elif line.startswith(b"SECOND"):
        old, new = line.removeprefix(b"SECOND ").split(b" -> ")
        line = second.replace(old, new, 1)
        assert line != second
    path.write_bytes(first + line)
    with pytest.raises(DataError, match=rf"records\.jsonl, line 2 is damaged: .*{message}"):
        evaluate(tiny_model, tiny_tokenizer, ROWS[:2], records_path=path)
    assert path.read_bytes() == first + line


def test_bad_rows(tiny_model, tiny_tokenizer):
    with pytest.raises(DataError, match="0 rows were given"):
        evaluate(tiny_model, tiny_tokenizer, [])
    with pytest.raises(DataError, match="Row 1 has the answer 'six'"):
        evaluate(tiny_model, tiny_tokenizer, [ROWS[0], {"question": "?", "answer": "six"}])
    with pytest.raises(DataError, match=r"Row 0 has a prompt of \d+ tokens; with 8 .* context of 512"):
        evaluate(tiny_model, tiny_tokenizer, shots=generate_problems(8, seed=1))
    with pytest.raises(DataError, match=r"Few-shot example 0 is the question of row 2 with its answer"):
        evaluate(tiny_model, tiny_tokenizer, shots=ROWS[2:3])
    with pytest.raises(DataError, match="Few-shot example 1 is the question of row 0"):
        Questions(ROWS[:1], [*SHOTS, {**ROWS[0], "question": ROWS[0]["question"] + "\n"}], shots=(0, 2))
    assert Questions(ROWS[:1], [*SHOTS, ROWS[0]], shots=(0, 1)).shots == (0, 1)  # only what is shown counts
    with pytest.raises(DataError, match=r"Row 0: the text holds half of a surrogate pair, .*\\ud83d'"):
        evaluate(tiny_model, tiny_tokenizer, [{"question": "\ud83d", "answer": "#### 1"}])
    wider = copy.deepcopy(tiny_tokenizer)
    wider.add_tokens("<new>")
    with pytest.raises(DataError, match=r"Row 1 has the token id 320, '<new>'"):
        evaluate_prompts(tiny_model, wider, [Example("one"), Example("<new>")])
    with pytest.raises(DataError, match="Row 0: the chat template does not read tools"):
        evaluate_prompts(tiny_model, tiny_tokenizer, [Example("one", template_kwargs={"tools": [{"name": "add"}]})])
    with pytest.raises(ConfigError, match="batch_size is 0"):
        evaluate(tiny_model, tiny_tokenizer, batch_size=0)


def test_other_prompts(tmp_path, tiny_model, tiny_tokenizer):
    options: dict[str, Any] = {"settings": EvaluationSettings(max_new_tokens=8, progress=False)}
    output = evaluate_prompts(tiny_model, tiny_tokenizer, [Example("Say it")], **options)[0].output
    examples = [Example("Say it", f"  {output.upper()}\n"), Example("Say it", output + "!"), Example("Say it")]
    path = tmp_path / "records.jsonl"
    records = evaluate_prompts(tiny_model, tiny_tokenizer, examples, records_path=path, **options)
    assert [record.correct for record in records] == [True, False, None]
    assert evaluate_prompts(tiny_model, tiny_tokenizer, examples, records_path=path, **options) == records


@pytest.fixture
def prompts(tiny_tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    texts = ["What all begin with. " + row["question"][: 5 + 9 * i] for i, row in enumerate(ROWS)]
    return encode_prompts(tiny_tokenizer, texts)


def answer(
    model: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int = 8, max_new_tokens: int = 12,
    stop: str | None = None,
) -> list[Generated]:  # fmt: skip
    batches = deal_batches([len(prompt) for prompt in prompts], batch_size, share=False)
    found = generate_greedy(base_network(model), tokenizer, prompts, batches, max_new_tokens, stop)
    return sorted((one for batch in found for one in batch), key=lambda one: one.index)


def greedy_by_hand(model: Any, tokenizer: Any, prompt: list[int], max_new_tokens: int) -> tuple[str, bool, int]:
    """The reference: no cache, no batch, no padding, the whole sequence through the model for every token."""
    ids = list(prompt)
    for count in range(1, max_new_tokens + 1):
        token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
        ids.append(token)
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True), True, count
    return tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True), False, max_new_tokens


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("share_prefix", [False, True])
def test_equals_greedy_by_hand(tiny_model, tiny_tokenizer, prompts, batch_size, share_prefix):
    if not share_prefix:
        prompts[0] = prompts[0][5:]
    assert bool(find_shared_prefix(prompts)) == share_prefix
    model = tiny_model.double()
    found = answer(model, tiny_tokenizer, prompts, batch_size=batch_size)
    expected = [greedy_by_hand(model, tiny_tokenizer, prompt, 12) for prompt in prompts]
    assert [(one.text, one.finished, one.num_tokens) for one in found] == expected
    assert [one.index for one in found] == list(range(len(prompts)))


def test_end_token_finishes_and_the_limit_does_not(tiny_model, tiny_tokenizer, prompts):
    tiny_model.double()
    long = answer(tiny_model, tiny_tokenizer, prompts, max_new_tokens=40)
    for one, prompt in zip(long, prompts, strict=True):
        assert (one.text, one.finished, one.num_tokens) == greedy_by_hand(tiny_model, tiny_tokenizer, prompt, 40)
    # Let the third token of the first answer be an end token of the model: that answer is then three tokens long.
    ids = tiny_model.generate(torch.tensor([prompts[0]]), max_new_tokens=3, do_sample=False)[
        0, len(prompts[0]) :
    ].tolist()
    first = ids.index(ids[2]) + 1
    tiny_model.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, ids[2]]
    one = answer(tiny_model, tiny_tokenizer, prompts)[0]
    assert one.finished and one.num_tokens == first


def test_stop_text_ends_an_answer(tiny_model, tiny_tokenizer, prompts):
    free = answer(tiny_model, tiny_tokenizer, prompts, max_new_tokens=20)
    whole = next(one for one in free if len(one.text) > 8 and one.text[4:6] not in one.text[:5])
    stop = whole.text[4:6]
    found = answer(tiny_model, tiny_tokenizer, prompts, max_new_tokens=20, stop=stop)
    assert found[whole.index].text == whole.text[:4] and found[whole.index].finished
    assert found[whole.index].num_tokens < whole.num_tokens
    for before, after in zip(free, found, strict=True):
        assert after.text == before.text.split(stop)[0]


def test_the_models_own_generation_settings_are_set_aside_and_put_back(tiny_model, tiny_tokenizer, prompts):
    expected = answer(tiny_model, tiny_tokenizer, prompts)
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1,
                           suppress_tokens=list(range(60)), eos_token_id=tiny_tokenizer.eos_token_id)  # fmt: skip
    tiny_model.generation_config = own
    for layer in tiny_model.model.layers:
        layer.self_attn.attention_dropout = 0.9  # acts in training mode alone
    tiny_model.train()
    assert answer(tiny_model, tiny_tokenizer, prompts) == expected
    assert tiny_model.generation_config is own and tiny_model.training


def test_lora_model_answers_with_its_adapter(tiny_model, tiny_tokenizer, prompts):
    plain = answer(tiny_model, tiny_tokenizer, prompts)
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    adapted = answer(model, tiny_tokenizer, prompts)
    assert [one.text for one in adapted] != [one.text for one in plain]
    with model.disable_adapter():
        assert answer(model, tiny_tokenizer, prompts) == plain
    model.merge_and_unload()


def test_a_cache_that_cannot_be_shared_is_not(tiny_tokenizer, prompts):
    """A sliding window keeps fewer entries than the prefix has tokens."""
    torch.manual_seed(0)
    model = MistralForCausalLM(
        MistralConfig(vocab_size=len(tiny_tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                      num_attention_heads=2, num_key_value_heads=1, sliding_window=8)
    ).double().eval()  # fmt: skip
    assert find_shared_prefix(prompts[:2])
    expected = [greedy_by_hand(model, tiny_tokenizer, prompt, 6) for prompt in prompts[:2]]
    found = answer(model, tiny_tokenizer, prompts[:2], max_new_tokens=6)
    assert [(one.text, one.finished, one.num_tokens) for one in found] == expected
