"""Prompts: every kind of source, every kind of bad row, and both ways of becoming token ids."""

import csv
import json
from functools import partial
from unittest.mock import Mock

import datasets
import pandas
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from quantkd.data.encoding import encode_completion, encode_examples, encode_prompts
from quantkd.data.prompts import Example, load_examples
from quantkd.errors import DataError
from tests.conftest import refused

ROWS = [{"prompt": "one", "completion": "1"}, {"prompt": "two", "completion": "2"}]
EXPECTED = [Example("one", "1"), Example("two", "2")]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{{ 'assistant' if add_generation_prompt }}"


@pytest.fixture
def tokenizer():
    words = ["<unk>", "<s>", "</s>", "user", "assistant", "one", "two"]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def write(folder, suffix):
    path = folder / f"train{suffix}"
    if suffix == ".parquet":
        datasets.Dataset.from_list(ROWS).to_parquet(path)
    else:
        lines = "\n".join(json.dumps(row) for row in ROWS) + "\n\n"
        path.write_text({".jsonl": lines, ".json": json.dumps(ROWS)}.get(suffix, 'prompt,completion\none,1\n"two",2\n'))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_files_and_folders(tmp_path, suffix):
    path = write(tmp_path, suffix)
    assert load_examples(path) == load_examples(str(path)) == load_examples(tmp_path) == EXPECTED
    assert load_examples(path, limit=1) == EXPECTED[:1]
    if suffix != ".parquet":  # as Windows writes it
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
        assert load_examples(path) == EXPECTED


def test_values_in_memory_and_sources_that_can_be_read_once():
    messages = [{"role": "user", "content": "hi"}]
    assert load_examples(ROWS) == load_examples(datasets.Dataset.from_list(ROWS)) == EXPECTED
    assert load_examples({"train": ROWS, "test": ROWS[1:]}, split="test") == EXPECTED[1:]
    rows = iter(["one", messages, Example("x", "y")])
    assert load_examples(rows) == [Example("one"), Example(messages), Example("x", "y")]
    conversational = [{"prompt": messages, "completion": [{"role": "assistant", "content": "hello"}]}]
    assert load_examples(conversational) == [Example(messages, "hello")]
    read = []

    def rows():
        for index, row in enumerate(ROWS * 2):
            read.append(index)
            yield row

    assert load_examples(rows()) == EXPECTED * 2 and read == [0, 1, 2, 3]  # each once, in order
    assert load_examples(rows(), limit=2) == EXPECTED and read[4:] == [0, 1]  # and no further than asked for
    streamed = datasets.IterableDataset.from_generator(rows)
    assert load_examples(streamed) == EXPECTED * 2
    assert load_examples(streamed.filter(lambda row: row["completion"] == "2"), limit=1) == EXPECTED[1:]
    assert load_examples(datasets.IterableDatasetDict({"train": streamed}), limit=2) == EXPECTED
    assert load_examples(map(str, ["one", "two"])) == [Example("one"), Example("two")]
    assert load_examples(pandas.DataFrame(ROWS)) == EXPECTED
    uneven = [{"prompt": "a", "completion": "1", "tools": [{"name": "x"}]}, {"prompt": "b"}]
    assert load_examples(pandas.DataFrame(uneven)) == load_examples(uneven)
    for source in (None, 3):
        refused(DataError, "expected rows, a file, a folder or a Hub name", load_examples, source)


def test_a_name_is_split_into_path_and_configuration_and_loaded_by_the_library(tmp_path, monkeypatch):
    # What the Hub would give, from a folder that `datasets` itself reads; its own cache goes to tmp_path as well.
    (tmp_path / "data").mkdir()
    write(tmp_path / "data", ".parquet")
    library = partial(datasets.load_dataset, str(tmp_path / "data"), cache_dir=str(tmp_path))
    load = Mock(side_effect=lambda path, *rest, **options: library(None, **options))
    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_examples("openai/gsm8k:main", split="train", limit=1) == EXPECTED[:1]
    assert load_examples("squad") == EXPECTED
    refused(DataError, "could be loaded with split 'test'", load_examples, "squad", split="test")
    calls = [(*call.args, call.kwargs["split"]) for call in load.call_args_list]
    assert calls == [("openai/gsm8k", "main", "train"), ("squad", None, "train"), ("squad", None, "test")]
    load.side_effect = ConnectionError("offline")
    refused(DataError, r"'nobody/nothing' is neither a file .*offline", load_examples, "nobody/nothing")


@pytest.mark.parametrize(("rows", "message"), [
    ([], "holds no rows"), ([{"question": "one"}], r"has the columns \['question'\]; 'prompt' was asked for"),
    ([{"prompt": 7}], "the prompt is 7; expected text"), ([{"prompt": None}], "the prompt is None"),
    (["one", "  "], "row 1: the prompt is '  '; expected text that is not empty"), ([[]], r"the prompt is \[\]"),
    ([[{"role": "user"}]], "expected text under 'role' and 'content'"),
    ([{"prompt": "one", "completion": 4}], "the completion is a int"), ([3], "is a int; expected text"),
    ([[{"role": "user", "content": "one"}, {"role": "user", "content": " "}]], r"message 1 \(user\) has no text"),
    ([{"prompt": "x", "completion": [{"role": "user", "content": "y"}]}], "is by 'user'; expected the assistant"),
])  # fmt: skip
def test_bad_rows(rows, message):
    refused(DataError, message, load_examples, rows)
    with pytest.raises(DataError, match=r"\['completion', 'prompt'\]; 'answer' was asked for"):
        load_examples(ROWS, completion_column="answer")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("missing.jsonl", None, "There is no file"), ("rows.txt", "one", r"ends in '\.txt'"),
    ("rows.json", '{"prompt": "one"}', "holds a JSON dict"), ("rows.json", "[", "cannot be parsed"),
    ("rows.jsonl", '{"prompt": "one"}\nnot json\n', "line 2 is not JSON"),
    ("rows.parquet", "PAR1", "is not a Parquet file"),
    ("rows.jsonl", '{"prompt": "x", "n": ' + "[" * 10**5 + "}", "line 1 is not JSON"),
    ("rows.jsonl", '{"prompt": "x", "n": ' + "1" * 5000 + "}", "line 1 is not JSON"), ("rows.csv", "", "holds no rows"),
    ("rows.json", "[" * 10**5, "cannot be parsed"), ("rows.jsonl", "", "holds no rows"),
    ("rows.jsonl", '{"prompt": "a", "prompt": "b"}', "line 1 is not JSON: the key 'prompt' is there twice"),
    ("rows.json", '[{"prompt": "a", "prompt": "b"}]', "the key 'prompt' is there twice"),
    ("rows.csv", "prompt;the answer, short\na;b;c\n", "row 0 .* has 3 cells, and the header names 2"),
    ("rows.csv", "prompt\nHow many, if there are 12?\n", "row 0 .*line 2.* has 2 cells, .*names 1: p"),
    ("rows.csv", "prompt,completion\na,1\n\nb\n", r"row 1 \(it ends at line 4\) has 1 cells, .*names 2"),
    ("rows.csv", 'prompt,completion\n"a\nb",1\nc,2,3\n', r"row 1 \(it ends at line 4\) has 3 cells"),
    ("rows.csv", "prompt;completion\na;b;c\n", "Put a cell that holds ';' into double quotes"),
    ("rows.csv", 'prompt\n"a\nb\n', "line 3: unexpected end of data"),
    ("rows.csv", 'prompt\n"a" b\n', "line 2: .*Write a quotation mark in a cell twice"),
    ("rows.csv", "prompt,prompt\na,b\n", r"the columns \['prompt', 'prompt'\]; expected each name once"),
    ("rows.csv", "prompt|completion\na|b\n", r"has the columns \['prompt\|completion'\]"),
])  # fmt: skip
def test_bad_files(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    refused(DataError, message, load_examples, tmp_path / name)
    if message.startswith("line 2 is"):
        assert load_examples(tmp_path / name, limit=1) == [Example("one")]  # it reads no further


def test_tables_are_read_whole(tmp_path):
    path, long = tmp_path / "rows.csv", "x" * 200_000
    before = csv.field_size_limit()
    for mark in ",;\t":
        lines = f'\ufeffprompt{mark}completion\r\n"a{mark} b"{mark}""\r\n\r\n{long}{mark}"say ""1"""\r\n'
        path.write_bytes(lines.encode())
        assert load_examples(path) == [Example(f"a{mark} b", ""), Example(long, 'say "1"')]
    for header in ("prompt, completion\na, b\n", 'prompt, completion\n"a", "b"\n', "prompt ;completion\na;b\n"):
        path.write_text(header)
        assert load_examples(path) == [Example("a", "b")]
    path.write_text('prompt;"completion, short";note, long\na, and b;c;d\n')
    assert load_examples(path, completion_column="completion, short") == [Example("a, and b", "c")]
    path.write_text("\n \nprompt;completion\na;b\n\nc\n")
    refused(DataError, r"row 1 \(it ends at line 6\) has 1 cells", load_examples, path)
    assert load_examples(path, limit=1) == [Example("a", "b")]
    path.write_text("prompt\nHow many; and why?\n")
    assert load_examples(path) == [Example("How many; and why?")] and csv.field_size_limit() == before
    path.write_text("prompt\na\nb, c\n")
    assert load_examples(path, limit=1) == [Example("a")]


def test_splits_and_limits_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, ".jsonl")
    for source in ("train.jsonl", ROWS, datasets.Dataset.from_list(ROWS)):
        assert load_examples(source) == EXPECTED
        with pytest.raises(DataError, match=r"has no splits, and the split 'train' was asked for. Leave split out"):
            load_examples(source, split="train")
    for source, options, message in (
        (tmp_path, {"split": "test"}, r"\['train\.jsonl'\]; expected test\.jsonl"),
        (str(tmp_path / "absent"), {}, "There is no"),
        (tmp_path, {"limit": 0}, "limit is 0"),
    ):
        refused(DataError, message, load_examples, source, **options)


@pytest.mark.parametrize(
    "row", [{"prompt": "a\ud83d"}, {"prompt": "a", "completion": "\udcff"},
            {"messages": [{"role": "user", "content": "\ud83d"}, {"role": "assistant", "content": "b"}]},
            {"prompt": "a", "tools": [{"name": "\ud83d"}]}],
)  # fmt: skip
def test_half_a_character_is_refused_by_row(tokenizer, row):
    tokenizer.chat_template = TEMPLATE
    (example,) = load_examples([row])
    with pytest.raises(DataError, match=r"Row 1: the text holds half of a surrogate pair, .*\\ud[0-9a-f]{3}'"):
        encode_examples([Example("one", "two"), example], tokenizer, given="messages" in row)


def test_chat_prompts_use_the_template(tokenizer):
    tokenizer.chat_template = TEMPLATE
    turns = [{"role": "assistant", "content": "one"}]
    assert encode_prompts(tokenizer, ["one two", turns]) == [[3, 5, 6, 4], [4, 5, 4]]
    assert encode_prompts(tokenizer, []) == []
    tokenizer.chat_template = None
    refused(DataError, r"Row 0: .* no chat template.*chat_template=False", encode_prompts, tokenizer, ["one"])


def test_plain_prompts_never_end_in_the_end_token_and_completions_do(tokenizer):
    assert encode_completion(tokenizer, "one two") == [5, 6, 2] and encode_completion(tokenizer, "") == [2]
    plain = partial(encode_prompts, tokenizer, chat_template=False)
    assert plain(["one two"]) == [[1, 5, 6]]
    ended = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    tokenizer.backend_tokenizer.post_processor = ended
    assert plain(["one two", "two one"]) == [[5, 6], [6, 5]]
    turns = [{"role": "user", "content": "one"}]
    for wrong, message in (("", "the prompt '' gives no tokens"), (turns, "a plain prompt must be text, found 1 chat")):
        refused(DataError, f"Row 1: {message}", plain, ["one", wrong])
    tokenizer.eos_token = None
    refused(DataError, "no end-of-sequence token", encode_completion, tokenizer, "one")
