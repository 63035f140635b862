"""`quantkd capture`: its options reach the pass, its refusals say what to do."""

import json

import pytest

from quantkd import TransferSet

ROWS = [{"prompt": f"What is {a} + 2?", "completion": f"It is {a + 2}.\n#### {a + 2}"} for a in range(6)]


def turn(role, text):
    return [{"role": role, "content": text}]


FILES = {
    "p.jsonl": ROWS,
    "shots.jsonl": [{"prompt": "One and one?", "completion": "Two"}],
    "twice.jsonl": [*ROWS, *ROWS[:2]],
}


@pytest.fixture
def files(tmp_path):
    for name, rows in FILES.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


@pytest.fixture
def run(cli, files, tiny_model_path):
    def run(*words, prompts="p.jsonl"):
        options = ["--model", tiny_model_path, "--prompts", files / prompts, "--output_dir", files / "s"]
        options += [] if "given" in words else ["--max_new_tokens", 6]
        code, out, err = cli("capture", *options, "--dtype", "float32", *words)
        assert "Traceback" not in err
        return code, out, err

    return run


def test_a_dry_run_prints_the_plan_and_writes_nothing(run, files, tiny_tokenizer):
    out = run("--dry_run", "--auto_find_batch_size")[1]
    expected = ("rows          6", "batches of", "at most 36 in responses", " free")
    assert [line for line in expected if line not in out] == []
    tokens = sum(len(tiny_tokenizer(row["completion"]).input_ids) + 1 for row in ROWS)
    code, out, _ = run("--dry_run", "--responses", "given")  # an exact plan
    assert code == 0 and f"in prompts, {tokens} in responses" in out and not (files / "s").exists()


def test_samples_filters_and_summary(run, files):
    words = ["--do_sample", "--num_samples", 3, "--generation_temperature", 2.0, "--drop_duplicates"]
    code, out, _ = run(*words, "--min_response_tokens", 2, prompts="twice.jsonl")
    assert code == 0
    info = TransferSet.open(files / "s").info
    counted = {name: count for name, count in info.counters.items() if name.startswith("filtered_")}
    assert counted["filtered_duplicate_prompts"] == 2
    assert info.num_rows == 18 - sum(counted.values()) + 2 and info.generation["num_samples"] == 3
    assert all(f"{count} {name.removeprefix('filtered_')}" in out for name, count in counted.items())
    code, out, _ = run("--correct_only", "--output_dir", files / "correct")
    assert code == 0 and "6 incorrect" in out  # a random model solves nothing
    assert TransferSet.open(files / "correct").info.counters["filtered_incorrect"] == 6


def test_system_prompt_and_few_shot_stand_before_every_prompt(run, files, tiny_tokenizer):
    words = ("--system_prompt", "Be brief.", "--few_shot", files / "shots.jsonl")
    assert run(*words)[0] == 0
    turns = [*turn("system", "Be brief."), *turn("user", "One and one?"), *turn("assistant", "Two")]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    for row, given in zip(TransferSet.open(files / "s"), ROWS, strict=True):
        expected = tiny_tokenizer.apply_chat_template([*turns, *turn("user", given["prompt"])], **options)
        assert row["input_ids"][row["labels"] == -100].tolist() == expected


@pytest.mark.parametrize(("words", "said"), [
    ("--num_samples 2", "num_samples has no effect without do_sample"), ("--num_samples 0", "found 6 and 0"),
    ("--num_samples 2 --do_sample --responses given", "a given answer is one row"),
    ("--batch_size 0", "at least 1, found 0"), ("--rows_per_shard 0", "at least 1, found 8 and 0"),
    ("--max_new_tokens 0", "at least 1, found 0 and 1"), ("--top_p 0", "0 < top_p <= 1"),
    ("--generation_temperature 0", "leave do_sample off"), ("--storage topk", "write topk:50, nucleus"),
    ("--storage topk:400", "exceeds the teacher's"), ("--top_p 0.5", "top_p has no effect without do_sample"),
    ("--storage sampled:50 --temperatures 2.0", "Sampled entries estimate"), ("--temperatures -1", "must be above 0"),
    ("--limit 0", "limit is 0"), ("--prompt_column question", "'question' was asked"),
    ("--responses given --completion_column answer", "'answer' was asked for"),
    ("--answer_column completion", "answer_column has no effect without correct_only"),
    ("--completion_column answer", "no effect without responses=given or correct_only or few_shot"),
    ("--do_sample --responses given", "is not sampled. Leave both out"),
    ("--engine vllm --attn_implementation sdpa", "no effect without engine=transformers"),
    ("--min_response_tokens 5 --max_response_tokens 2", "5 to 2 tokens"),
    ("--engine vllm --engine_kwargs {}x", "is not JSON"), ("--few_shot no.jsonl", "no.jsonl"),
    ("--few_shot P", "example 0 is the question of row 0 with its answer: 'What is 0"),
    ("--split test", "p.jsonl has no splits, and the split 'test' was asked for. Leave split out, or give"),
    ("--plain_prompts --system_prompt Brief.", "found 2 chat messages"), ("--max_new_tokens 600", "context of 512"),
    ("--engine server", "found None with engine='server'"), ("--base_url http://127.0.0.1:1/v1", "Give both engine"),
    ("--engine vllm --engine_kwargs [1]", "expected an object such as"),
    ('--engine server --base_url http://h/v1 --engine_kwargs {"a":1}', "keyword argument 'a'. docs/engines.md"),
    ('--engine_kwargs {"a":1}', "no effect without engine=vllm or engine=server"),
    ("--engine vllm --teacher_adapter x", "adapter has no effect without"),
    ("--engine vllm --storage sampled:50", "the whole distribution"),
    ("--engine vllm --temperatures 2.0", "at temperature 1.0 alone"),
])  # fmt: skip
def test_refusals_are_one_line(run, files, words, said):
    code, _, err = run(*(files / "p.jsonl" if word == "P" else word for word in words.split()))
    last = [line for line in err.splitlines() if "quantkd capture: " in line or "error: " in line][-1]
    assert code == 1 and said in last, last
    assert not list(files.glob("s/*.safetensors"))
