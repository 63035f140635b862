"""Conversations: which tokens are the assistant's, with and without generation blocks, and what is refused."""

import copy
import csv
import json
from datetime import datetime
from unittest.mock import Mock

import datasets
import pytest
import torch
from teacher_rows import assert_stored, dense_logprobs

from quantkd import TopK
from quantkd.data.encoding import at_date, encode_conversation, encode_examples, encode_prompts, find_turn_end
from quantkd.data.prompts import Example, load_examples, with_context
from quantkd.errors import DataError
from quantkd.models.generation import build_generation_config
from tests.conftest import CHAT_TEMPLATE, capture_set, refused


def turn(role, content):
    return {"role": role, "content": content}


CONVERSATION = [
    turn("system", "Be brief."), turn("user", "How many apples?"), turn("assistant", "She has 7."),
    turn("user", "How far in 5 hours?"), turn("assistant", "300 miles."),
]  # fmt: skip
# The turns of the tiny tokenizer's ChatML, the assistant's up to and with its end token marked.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}<|im_end|>{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Qwen3 does: what the assistant thought stays only after the last question.
FORGETFUL = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.index0 < ns.last %}{{ m['content'].split('</think>')[-1] }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SILENT = "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
NO_ROLES = "{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
# What it reads beside roles and texts; another template reads none of it.
READING = (
    "{% if tools or documents %}{{ (tools or documents) | tojson }}{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m.name or m.role }}{{ m.tool_call_id }}\n"
    "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}{% endif %}"
)
THOUGHT = {**turn("assistant", "two"), "reasoning_content": "one and one"}


@pytest.fixture
def with_template(tiny_tokenizer):
    def build(template):
        tokenizer = copy.deepcopy(tiny_tokenizer)
        tokenizer.chat_template = template
        return tokenizer

    return build


def encode(tokenizer, example, **kwargs):
    return encode_examples([example], tokenizer, **kwargs).row(0)


def by_hand(tokenizer):
    """ChatML written out, each part tokenised alone: special tokens and newlines keep parts apart."""
    ids, spans = [], []
    start, end, newline = tokenizer.encode("<|im_start|><|im_end|>\n")
    for message in CONVERSATION:
        ids += [start, *tokenizer.encode(message["role"] + "\n")]
        first = len(ids)
        ids += [*tokenizer.encode(message["content"]), end, newline]
        if message["role"] == "assistant":
            spans.append((first, len(ids) - 1))
    return ids[:-1], spans


@pytest.mark.parametrize("template", [
    CHAT_TEMPLATE, MARKED, MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>"),
])  # fmt: skip
def test_every_assistant_turn_is_supervised_with_its_end_token(with_template, template):
    tokenizer = with_template(template)
    ids, spans = encode_conversation(tokenizer, CONVERSATION)
    assert [tokenizer.decode(ids[slice(*span)]) for span in spans] == ["She has 7.<|im_end|>", "300 miles.<|im_end|>"]
    assert (ids, spans) == by_hand(tokenizer)


def test_one_turn_is_prompt_and_completion_and_the_last_user_turn_is_answered(tiny_tokenizer):
    one = encode(tiny_tokenizer, Example(CONVERSATION[1:3]), given=True)
    pair = encode(tiny_tokenizer, Example("How many apples?", "She has 7."), given=True)
    assert (one.prompt_ids, one.completion_ids) == (pair.prompt_ids, pair.completion_ids)
    assert one.spans == ((len(one.prompt_ids), len(one.prompt_ids) + len(one.completion_ids)),) and pair.spans is None
    made = encode(tiny_tokenizer, Example(CONVERSATION[:-1]), given=False)
    assert made.completion_ids is made.spans is None
    ids, turns = by_hand(tiny_tokenizer)
    assert made.prompt_ids == ids[: turns[-1][0]]


def test_a_template_that_forgets_thoughts_is_refused_and_named_by_turn(with_template):
    tokenizer = with_template(FORGETFUL)
    thinking = [dict(m) for m in CONVERSATION]
    thinking[2]["content"] = "<think>3 + 4</think>She has 7."
    with pytest.raises(DataError, match=r"assistant turn 1 differently once all turns are there \(from token \d+ on\)"):
        encode_conversation(tokenizer, thinking)
    # Without thoughts, or with thoughts in the last turn alone, nothing is forgotten.
    assert encode_conversation(tokenizer, CONVERSATION) == by_hand(tokenizer)
    ids, ((start, stop),) = encode_conversation(tokenizer, thinking[:3])
    assert tokenizer.decode(ids[start:stop]) == thinking[2]["content"] + "<|im_end|>"


@pytest.mark.parametrize(("template", "example", "message"), [
    (None, Example(CONVERSATION), r"Row 0: The tokenizer of .* has no chat template"),
    (None, Example("One?", "1"), r"Row 0: The tokenizer of .* has no chat template"),
    (MARKED, Example(CONVERSATION[:-1]), "Row 0 has no completion, and responses='given' was asked"),
    (MARKED, Example("1?", " "), "has no completion"),
    (MARKED.replace("== 'assistant'", "== 'model'"), Example(CONVERSATION), "mark no token of the conversation"),
    (
        FORGETFUL.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}"), Example(CONVERSATION),
        "assistant turn 1 differently",
    ),
    (NO_SYSTEM, Example(CONVERSATION), r"Row 0: .*refuses messages of the roles system, user, .*: no system here"),
    (NO_SYSTEM, Example(CONVERSATION[:2], "7"), r"Row 0: .*refuses messages of the roles system, user: no system"),
    (SILENT, Example(CONVERSATION), "adds nothing for assistant turn 1"),
    (NO_ROLES, Example([turn("assistant", "Hello")]), "first token belongs to an assistant turn"),
])  # fmt: skip
def test_given_answers_that_cannot_be_taken_are_refused_by_row(with_template, template, example, message):
    refused(DataError, message, encode, with_template(template), example, given=True)


def test_examples_that_do_not_fit_the_responses_or_the_template_are_refused_by_row(tiny_tokenizer, with_template):
    with pytest.raises(DataError, match=r"Row 1 ends in an assistant turn.*responses='given'"):
        encode_examples([Example("Hello"), Example(CONVERSATION)], tiny_tokenizer, given=False)
    with pytest.raises(DataError, match="Row 0 is a conversation, and plain prompts"):
        encode(tiny_tokenizer, Example(CONVERSATION), given=True, chat_template=False)
    deaf = with_template(MARKED.replace("{% for m in messages %}", "{% for m in messages if m.role != 'critic' %}"))
    with pytest.raises(DataError, match=r"Row 1: .*leaves out 'content' of message 1 \(critic\)"):
        encode_prompts(deaf, [ASKED, [*ASKED, turn("critic", "user"), *ASKED]])
    parts = "{% for m in messages %}{{ m.content[0].type }}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match=r"Row 0: .*leaves out 'content' of message 0 \(user\)"):
        encode_prompts(with_template(parts + "<|im_start|>"), [ASKED])  # of a model for images, which reads parts
    with pytest.raises(DataError, match=r"Row 0: a plain prompt must be text, found 1 chat messages, tools"):
        encode_prompts(deaf, load_examples([{"prompt": "?", "tools": [{"name": "add"}]}]), chat_template=False)
    with pytest.raises(DataError, match=r"Row 0: .*refuses messages of the roles user: .*concatenate"):
        encode_prompts(with_template("{{ 'a' + messages[0].name }}"), [[{**ASKED[0], "name": 7}]])


def test_columns_of_conversations(tmp_path):
    rows = [{"messages": CONVERSATION}, {"messages": CONVERSATION[:-1]}]
    found = load_examples(rows)
    assert [example.messages for example in found] == [CONVERSATION, None]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "train.parquet")
    assert load_examples(tmp_path) == found == load_examples([row["messages"] for row in rows])
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], *([json.dumps(row["messages"])] for row in rows)])
    assert load_examples(tmp_path / "rows.csv") == found
    refused(DataError, r"messages is '\[1, '; expected a list, or one as JSON", load_examples, [{"messages": "[1, "}])
    tools = [{"name": "add", "parameters": {"a": "number"}}, {"name": "weather", "parameters": {"city": "text"}}]
    # Arrow fills up with nulls.
    asked = datasets.Dataset.from_list([{"prompt": "?", "tools": [tool]} for tool in tools])
    assert [example.template_kwargs["tools"] for example in load_examples(asked)] == [[tool] for tool in tools]
    renamed = [{"chat": row["messages"], "system": None, "id": 7} for row in rows]
    assert load_examples(renamed, prompt_column="chat") == found
    both = {"prompt": CONVERSATION[:2], "completion": CONVERSATION[2:3]}
    (example,) = load_examples([both])
    assert example.completion == "She has 7." and example.messages is None
    thought = {**turn("assistant", "2"), "reasoning_content": "1 and 1"}
    for row, message in (
        ({"messages": [turn("user", [{"text": "hi"}])]}, r"row 0: found .*'content'. Join the text of a list of parts"),
        ({"prompt": "?", "completion": [thought]}, "row 0: the completion has reasoning_content beside its content"),
        ({"prompt": "?", "tools": "add"}, "row 0: tools is 'add'; expected a list, or one as JSON"),
        ({"prompt": "?", "enable_thinking": False}, "row 0 .*enable_thinking, False, .*into chat_template_kwargs, or"),
        ({"messages": CONVERSATION, "system": "Think."}, r"row 0 .*system, Think\., .*message, or give --system"),
        ({"prompt": "?", "images": [b"1"], "chat_template": ""}, "row 0 .*images.*A text model does not see it"),
        ({"messages": [{**CONVERSATION[1], "tool_calls": [{"name": "f"}]}]}, "calls tools"),
        ({"messages": [*CONVERSATION[:4], turn("assistant", " ")]}, r"row 0: message 4 \(assistant\) has no text"),
    ):
        refused(DataError, message, load_examples, [row])
    refused(DataError, r"\['messages'\]; 'question' was asked for", load_examples, rows, prompt_column="question")


def test_system_prompt_and_few_shot_are_turns_before_the_prompt():
    shots = [Example("1 + 1?", "2"), Example("2 + 2?", "4")]
    solved = [turn("user", "1 + 1?"), turn("assistant", "2"), turn("user", "2 + 2?"), turn("assistant", "4")]
    plain, own = Example("3 + 3?", "6"), Example(CONVERSATION[:2])
    system = turn("system", "Think.")
    made = with_context([plain, own], system_prompt="Think.", few_shot=shots)
    asked = Example([system, *solved, turn("user", "3 + 3?")], "6")
    assert made == [asked, Example([CONVERSATION[0], *solved, CONVERSATION[1]])]
    assert with_context([plain, own]) == [plain, own]
    (whole,) = with_context([Example(CONVERSATION[1:])], system_prompt="Think.")
    assert whole.messages == [system, *CONVERSATION[1:]]
    with pytest.raises(DataError, match=r"Row 0 is a whole conversation.* of 2 few-shot"):
        with_context([Example(CONVERSATION)], few_shot=shots)
    with pytest.raises(DataError, match=r"Few-shot example 1 is .*expected a prompt in text and its completion"):
        with_context([plain], few_shot=[shots[0], Example("no answer")])


@pytest.mark.parametrize(("template", "tokens"), [(CHAT_TEMPLATE, 1), (MARKED, 3)])
def test_stored_entries_are_those_of_a_plain_pass(with_template, tiny_model, tmp_path, monkeypatch, template, tokens):
    # Pieces of so many tokens.
    monkeypatch.setattr("quantkd.teacher.transformers.chunk_bytes", lambda device: 4 * 320 * 2 * tokens)
    tokenizer = with_template(template)
    long = Example("A longer question with many words in it?", "a longer answer, which goes on and on")
    found = capture_set(
        tiny_model, [CONVERSATION, Example("Why?", "The sea."), long], tmp_path / "set", responses="given",
        tokenizer=tokenizer, storage=TopK(5), batch_size=2, temperatures=(1.0, 2.0),
    )  # fmt: skip
    ids, spans = by_hand(tokenizer)
    targets = [place for start, stop in spans for place in range(start, stop)]
    assert found[0]["input_ids"].tolist() == ids
    assert (found[0]["labels"] != -100).nonzero().squeeze(1).tolist() == targets
    answers = [tokenizer.decode(row["input_ids"][row["labels"] != -100]) for row in found]
    assert answers[1:] == ["The sea.<|im_end|>", f"{long.completion}<|im_end|>"]
    for row in found:
        exact, teacher = dense_logprobs(tiny_model, row), row["teacher"]
        assert row["finished"] and torch.equal(teacher.top_ids, exact.argmax(-1))
        ids = teacher.token_ids.view(-1, 5)
        assert ids.sort(-1).values.tolist() == exact.topk(5).indices.sort(-1).values.tolist()
        assert_stored(teacher.logprobs.view(-1, 5), exact.gather(1, ids))
        normalizers = (exact / 2).logsumexp(-1)
        torch.testing.assert_close(teacher.log_normalizers[:, 1].double(), normalizers, atol=2e-3, rtol=0)


def chat(role: str, end: str, close: str = "") -> str:
    """A template that trims, with the text before and after each turn, and what it writes where no answer follows."""
    turns = "{% for m in messages %}" + role + "{{ m['content'] | trim }}" + end + "{% endfor %}"
    header = role.replace("{{ m['role'] }}", "assistant")
    return turns + "{% if add_generation_prompt %}" + header + "{% else %}" + close + "{% endif %}"


BETWEEN = "{% if not loop.last or add_generation_prompt %}<|im_end|>\n{% endif %}"


@pytest.mark.parametrize(("template", "eos", "end"), [
    (chat("<start>{{ m['role'] }}\n", "<end_of_turn>\n"), "<eos>", "<end_of_turn>"),  # Gemma
    (chat("<|im_start|>{{ m['role'] }}\n", "<|im_end|>\n"), "<|endoftext|>", "<|im_end|>"),  # Qwen's base models
    (chat("<start>{{ m['role'] }}\n\n", "<|eot_id|>"), "<|end_of_text|>", "<|eot_id|>"),  # Llama 3
    (chat("<start>{{ m['role'] }}\n", "<|end|>\n", "{{ eos_token }}"), "<|endoftext|>", "<|end|>"),  # Phi 3
    (chat("<start>{{ m['role'] }}\n", "<|im_end|>\n{{ eos_token }}"), "</s>", "<|im_end|>"),
    (chat("<start>{{ m['role'] }}\n", "{{ eos_token }}\n"), "</s>", "</s>"),
    (MARKED.replace("{% endgen", "\n{{ eos_token }}{% endgen"), "</s>", "<|im_end|>"),
    (chat("<start>{{ m['role'] }}\n", BETWEEN), "</s>", "<|im_end|>"),
    (chat("<start>{{ m['role'] }}\n", "<|im_end|>\n").replace("trim", "replace('q', 'Q')"), "</s>", "<|im_end|>"),
    (chat("<start>{{ m['role'] }}\n", ""), "</s>", "</s>"),  # GLM
    (chat("<start>{{ m['role'] }}\n", "\n\n### End\n"), "</s>", "</s>"),
    (MARKED.replace("<|im_end|>{% endgen", "{% endgen").replace("<|im_end|>", "\n"), "</s>", "</s>"),
])  # fmt: skip
def test_every_answer_has_one_end_and_generation_stops_at_it(tiny_tokenizer, tiny_model, template, eos, end):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_special_tokens({"eos_token": eos, "additional_special_tokens": ["<start>", end]})
    tokenizer.chat_template = template
    last = tokenizer.convert_tokens_to_ids(end)
    ids, spans = encode_conversation(tokenizer, CONVERSATION)
    own = end if end in tokenizer.decode(ids[slice(*spans[0])]) else ""  # of a turn amid others, where one is written
    assert [tokenizer.decode(ids[start:stop]) for start, stop in spans] == ["She has 7." + own, "300 miles." + end]
    assert len(ids) == spans[-1][1] and own == end * (end != eos or "{{ eos_token }}" in template)
    one, _ = encode_conversation(tokenizer, CONVERSATION[:3])
    for text in ("She has 7.", "She has 7." + end, f"She has 7.{end}\n{eos}", "She has 7." + eos):
        given = encode(tokenizer, Example(CONVERSATION[:2], text), given=True)
        assert given.completion_ids == [*tokenizer("She has 7.", add_special_tokens=False)["input_ids"], last]
        assert given.prompt_ids + given.completion_ids == one
    plain = encode(tokenizer, Example("1 + 1?", "2"), given=True, chat_template=False)
    assert plain.completion_ids[-1] == tokenizer.eos_token_id
    config = build_generation_config(tiny_model, tokenizer, 4)
    assert {find_turn_end(tokenizer), tokenizer.eos_token_id} <= set(config.eos_token_id)
    assert find_turn_end(tokenizer) == last


def test_of_several_templates_the_default_is_used_and_dated(with_template, tiny_tokenizer):
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b') }} {% endif %}" + tiny_tokenizer.chat_template
    tokenizer = at_date(with_template({"default": dated, "tool_use": "none"}), "2025-12-31")
    (prompt,) = encode_prompts(tokenizer, ["Why?"])
    assert tokenizer.decode(prompt).startswith("31 Dec <|im_start|>user\nWhy?<|im_end|>")
    ids, spans = encode_conversation(tokenizer, CONVERSATION)
    assert tokenizer.decode(ids[slice(*spans[0])]) == "She has 7.<|im_end|>"


@pytest.mark.parametrize("text", [
    "\n\n{{ strftime_now('%d %b %Y') }}", "\n{{ strftime_now('') }}",
    "  {% if true %}a\n{% endif %}\n{{ strftime_now('%-d%%%-m, %%d %c %H:%M %') }}\n",
])  # fmt: skip
def test_a_dated_template_renders_as_transformers_does_on_that_day_at_midnight(with_template, monkeypatch, text):
    tokenizer, library = with_template(text), "transformers.utils.chat_template_utils"
    found = at_date(tokenizer, "2025-12-31").apply_chat_template(ASKED, tokenize=False)
    monkeypatch.setattr(f"{library}.datetime", Mock(now=lambda: datetime(2025, 12, 31)))
    assert found == tokenizer.apply_chat_template(ASKED, tokenize=False)


@pytest.mark.parametrize("template", [None, "{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"])
def test_without_an_end_in_the_template_it_is_the_end_of_the_sequence(with_template, template):
    assert find_turn_end(with_template(template)) == with_template(template).eos_token_id


ASKED = [turn("user", "one and one?")]


@pytest.mark.parametrize(("row", "seen", "key"), [
    ({"messages": [*ASKED, THOUGHT]}, "<think>one and one</think>two", r"'reasoning_content' of message 1 \(assis"),
    ({"messages": [*ASKED, THOUGHT, *ASKED]}, "<think>one and one</think>two", "'reasoning_content' of message 1"),
    ({"messages": [{**ASKED[0], "name": "Ann"}]}, "<|im_start|>Ann", r"'name' of message 0 \(user\)"),
    ({"messages": [{**ASKED[0], "name": "user"}]}, "<|im_start|>user", "'name' of message 0"),
    ({"messages": [*ASKED, {**turn("tool", "2"), "tool_call_id": "c7"}, *ASKED]}, "toolc7", "'tool_call_id' of"),
    ({"prompt": "one?", "tools": [{"name": "add"}]}, '[{"name": "add"}]', "does not read tools"),
    ({"prompt": "one?", "documents": [{"text": "Two."}]}, '[{"text": "Two."}]', "does not read documents"),
    ({"prompt": "?", "chat_template_kwargs": {"documents": [{"a": "b"}]}}, '[{"a": "b"}]', "does not read documents"),
    ({"prompt": "one?", "tools": '[{"name": "add"}]'}, '[{"name": "add"}]', "does not read tools"),
    ({"prompt": "?", "chat_template_kwargs": {"enable_thinking": False}}, "<think></think>", "enable_thinking"),
    ({"prompt": "?", "chat_template_kwargs": {"enable_thinking": True}}, "?<|im_end|>", "enable_thinking"),
    ({"messages": [{**ASKED[0], "weight": 3}]}, None, "'weight' of message 0"),
    ({"prompt": "?", "chat_template_kwargs": {"tokenize": False}}, None, "holds tokenize, which no template reads"),
    ({"messages": [*ASKED, {**THOUGHT, "reasoning_content": None, "name": "", "tool_calls": []}]}, "two", None),
])  # fmt: skip
def test_what_a_row_hands_to_the_template_is_rendered_or_refused(with_template, row, seen, key):
    (example,) = load_examples([row])
    given = example.messages is not None
    reading = with_template(READING)
    if seen is not None:
        made = encode(reading, example, given=given)
        assert seen in reading.decode(made.prompt_ids + (made.completion_ids or []))
        bare = [{name: each[name] for name in ("role", "content")} for each in example.turns]
        used, unused = (encode_examples([each], reading, given=given) for each in (example, Example(bare)))
        assert (used.digest() == unused.digest()) == (used.row(0) == unused.row(0))
    if key is not None:
        refused(DataError, f"Row 0: .*{key}", encode, with_template(MARKED), example, given=given)
