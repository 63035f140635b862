"""Generated answers: greedy in any batch and on any number of processes, graded, recorded, resumable, not mixed up."""

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
from functools import partial

import processes
import pytest
import torch
from families import build
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from quantkd.data.arithmetic import generate_problems
from quantkd.data.encoding import encode_prompts
from quantkd.data.gsm8k import build_prompt, extract_strict
from quantkd.data.prompts import Example
from quantkd.errors import ConfigError, DataError
from quantkd.evaluation import accuracy, metric
from quantkd.evaluation.accuracy import Generated, Questions, evaluate_prompts, find_shared_prefix, generate_greedy
from quantkd.evaluation.arms import EvaluationSettings
from quantkd.evaluation.metric import GSM8KAccuracy
from quantkd.evaluation.sharing import deal_batches
from quantkd.evaluation.stats import wilson_interval
from quantkd.models.network import base_network
from tests.conftest import refused

ROWS = generate_problems(7, seed=0)
SHOTS = generate_problems(1, seed=1, exclude=ROWS)


@pytest.fixture
def evaluate(tiny_model, tiny_tokenizer):
    def evaluate(rows=ROWS, **options):
        given = {key: options.pop(key) for key in ("shots", "records_path") if key in options}
        settings = EvaluationSettings(**{"max_new_tokens": 8, "progress": False, **options})
        return accuracy.evaluate_gsm8k(tiny_model, tiny_tokenizer, rows, settings=settings, **given)

    return evaluate


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize("shots", [(), SHOTS])
def test_records_follow_the_rows(evaluate, chat_template, shots):
    records = evaluate(chat_template=chat_template, shots=shots, batch_size=3)
    for number, (record, row) in enumerate(zip(records, ROWS, strict=True)):
        text = build_prompt(row["question"], shots)
        plain = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" if chat_template else text
        assert (record.id, record.question, record.prompt) == (number, row["question"], plain)
        assert record.gold == extract_strict(row["answer"])
        assert record.output_tokens <= 8 and record.finished in (True, False)


def test_verdicts_are_those_of_the_graders(monkeypatch, evaluate):
    golds = [extract_strict(row["answer"]) for row in ROWS[:3]]
    outputs = [f"so #### {golds[0]}", f"so {golds[1]}.", "no idea"]
    answers = [Generated(i, outputs[i], i != 2, 3) for i in (2, 0, 1)]
    monkeypatch.setattr(accuracy, "generate_greedy", lambda *_: [answers])
    names = ("correct_strict", "correct_flexible", "finished", "prediction_strict", "prediction_flexible")
    found = [tuple(getattr(record, name) for name in names) for record in evaluate(ROWS[:3])]
    assert found[:2] == [(True, True, True, golds[0], golds[0]), (False, True, True, None, golds[1])]
    assert found[2:] == [(False, False, False, None, None)]


def test_a_stopped_evaluation_is_taken_up_and_ends_in_the_same_bytes(tmp_path, monkeypatch, evaluate):
    expected = evaluate(records_path=tmp_path / "whole.jsonl")
    path = tmp_path / "new" / "part.jsonl"

    def stop_after_two_batches(*args):
        yield from itertools.islice(generate_greedy(*args), 2)
        assert len(path.read_text().splitlines()) == 4  # so that they stay if the process is killed now
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(accuracy, "generate_greedy", stop_after_two_batches)
        evaluate(records_path=path, batch_size=2)
    with path.open("ab") as file:
        file.write('{"id": 6, "question": "é'.encode()[:-1])  # and the process died in the middle of a character

    asked = []

    def count(model, tokenizer, prompts, batches, *limits):
        assert path.read_bytes().endswith(b"}\n")  # or the next record would stand in the line that was cut
        asked.append(sum(map(len, batches)))
        return generate_greedy(model, tokenizer, prompts, batches, *limits)

    monkeypatch.setattr(accuracy, "generate_greedy", count)
    assert evaluate(records_path=path) == expected and path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert evaluate(records_path=str(path)) == expected and asked == [3, 0]


def test_records_of_another_evaluation_are_refused(tmp_path, tiny_model, evaluate):
    go = partial(evaluate, records_path=tmp_path / "records.jsonl")
    go(ROWS[:2])
    for rows, options, message in (
        (ROWS[:2], {"max_new_tokens": 9}, "max_new_tokens is 8, not 9"), (ROWS[1:3], {}, "prompts is"),
    ):  # fmt: skip
        refused(DataError, message, go, rows, **options)
    tiny_model.model.layers[1].mlp.down_proj.weight.data += 1e-4
    refused(DataError, "model is", go, ROWS[:2])
    (tmp_path / "records.jsonl.settings.json").unlink()
    refused(DataError, r"settings.json beside it is missing", go, ROWS[:2])


@pytest.mark.parametrize(("line", "message"), [
    (b'{"id": 0, "quest\n', "Unterminated string"), (b'{"id": 1}\n', "an object with the keys"),
    (b'{"question": "?"}\n', "an object with the keys"), (b"[0]\n", "expected an object"), (b"\n", "Expecting value"),
    (b"FIRST", "id is 0, .* 0 to 1 at most once"), (b'{"id": 1, "q": "\xc3"}\n', "can't decode byte 0xc3"),
    (b'SECOND "id": 1 -> "id": 7', "id is 7, expected each"), (b'SECOND "id": 1 -> "id": true', "id is True, .* int"),
    (b'SECOND "correct_strict": false -> "correct_strict": 0', "correct_strict is 0, expected bool"),
    (b'SECOND "id": 1 -> "id": 1, "id": 1', "the key 'id' is there twice"),
    (b'SECOND "output_tokens": 8 -> "output_tokens": -8', "output_tokens is -8, expected 8"),
    (b'SECOND "output_tokens": 8 -> "output_tokens": 800', "output_tokens is 800, expected 8"),
    (b'SECOND "correct_strict": false -> "correct_strict": true', "correct_strict is True, expected False"),
    (b'SECOND "prediction_flexible": null -> "prediction_flexible": "7"', "prediction_flexible is '7', expected None"),
    (b'SECOND "question": " -> "question": "x', "question is 'x.*, expected '"),
    (b'SECOND "prompt": " -> "prompt": "x', "prompt is 'x.*, expected '"),
])  # fmt: skip
def test_damaged_records_are_refused_by_file_and_line(tmp_path, evaluate, line, message):
    path = tmp_path / "records.jsonl"
    evaluate(ROWS[:2], records_path=path)
    first, second = path.read_bytes().splitlines(keepends=True)
    if line == b"FIRST":
        line = first
    elif line.startswith(b"SECOND"):
        old, new = line.removeprefix(b"SECOND ").split(b" -> ")
        line = second.replace(old, new, 1)
        assert line != second
    path.write_bytes(first + line)
    refused(DataError, rf"records\.jsonl, line 2 is damaged: .*{message}", evaluate, ROWS[:2], records_path=path)
    assert path.read_bytes() == first + line


def test_bad_rows(evaluate, tiny_model, tiny_tokenizer):
    for rows, shots, message in (
        ([], (), "0 rows were given"),
        ([ROWS[0], {"question": "?", "answer": "six"}], (), "Row 1 has the answer 'six'"),
        (ROWS, generate_problems(8, seed=1), r"Row 0 has a prompt of \d+ tokens; with 8 .* context of 512"),
        (ROWS, ROWS[2:3], "Few-shot example 0 is the question of row 2 with its answer"),
        ([{**ROWS[0], "question": "\ud83d"}], (), r"Row 0: the text holds half of a surrogate pair, .*\\ud83d'"),
    ):
        refused(DataError, message, evaluate, rows, shots=shots)
    with pytest.raises(DataError, match="Few-shot example 1 is the question of row 0"):
        Questions(ROWS[:1], [*SHOTS, {**ROWS[0], "question": ROWS[0]["question"] + "\n"}], shots=(0, 2))
    alike = {"question": "Two cafés,\u200b 2\u00a0or 3?"}
    texts = "Two cafe\u0301s, 2 or 3?", "TWO  cafés,\n\uff12 or\ufeff 3?", "Two caf\xad\xe9s, 2 or 3?"
    for text in (*texts, "TWO CAF\xc9S 2 OR “3” ."):
        with pytest.raises(DataError, match="Few-shot example 0 is the question of row 0"):
            Questions([alike], [{"question": text, "answer": "#### 2"}], shots=(1,))
    refused(ConfigError, r"shots are \[0, -3\]; expected numbers from 0", Questions, ROWS, SHOTS, shots=(0, -3))
    assert Questions(ROWS[:1], [*SHOTS, ROWS[0]], shots=(0, 1)).shots == (0, 1)  # only what is shown counts
    sums = [{"question": f"Is 6 {sign} 2 = C#?", "answer": "#### 2"} for sign in "*/-+"]
    assert Questions(sums[:1], sums[1:], shots=(3,)).shots == (3,)
    wider = copy.deepcopy(tiny_tokenizer)
    wider.add_tokens("<new>")
    for tokenizer, last, message in (
        (wider, Example("<new>"), "Row 1 has the token id 320, '<new>'"),
        (tiny_tokenizer, Example("1", template_kwargs={"tools": [{}]}), "Row 1: the chat template does not read tools"),
    ):
        refused(DataError, message, evaluate_prompts, tiny_model, tokenizer, [Example("one"), last])
    refused(ConfigError, "batch_size is 0", evaluate, batch_size=0)


def test_other_prompts(tmp_path, tiny_model, tiny_tokenizer):
    settings = EvaluationSettings(max_new_tokens=8, progress=False)
    go = partial(evaluate_prompts, tiny_model, tiny_tokenizer, settings=settings)
    output = go([Example("Say it")])[0].output
    examples = [Example("Say it", f"  {output.upper()}\n"), Example("Say it", output + "!"), Example("Say it")]
    records = go(examples, records_path=tmp_path / "records.jsonl")
    assert [record.correct for record in records] == [True, False, None]
    assert go(examples, records_path=tmp_path / "records.jsonl") == records


@pytest.fixture
def prompts(tiny_tokenizer):
    texts = ["What all begin with. " + row["question"][: 5 + 9 * i] for i, row in enumerate(ROWS)]
    return encode_prompts(tiny_tokenizer, texts)


def answer(model, tokenizer, prompts, batch_size=8, max_new_tokens=12, stop=None):
    batches = deal_batches([len(prompt) for prompt in prompts], batch_size, share=False)
    found = generate_greedy(base_network(model), tokenizer, prompts, batches, max_new_tokens, stop)
    return sorted((one for batch in found for one in batch), key=lambda one: one.index)


def test_batches_are_of_like_lengths_the_longest_first():
    assert deal_batches([5, 9, 1, 9, 7], 2, share=False) == [[1, 3], [4, 0], [2]]


def assert_greedy(found, model, tokenizer, prompts, max_new_tokens, ends=()):
    """As the reference: no cache, no batch, no padding, the whole sequence through the model for every token."""
    ends = {tokenizer.eos_token_id, *ends}
    for index, (one, prompt) in enumerate(zip(found, prompts, strict=True)):
        ids = list(prompt)
        while len(ids) < len(prompt) + max_new_tokens and (ids == prompt or ids[-1] not in ends):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)
        assert one == Generated(index, text, ids[-1] in ends, len(ids) - len(prompt))


@pytest.mark.parametrize(("batch_size", "share_prefix", "window"), [
    *itertools.product((1, 3, 8), (False, True), (None,)),
    (8, True, 8),  # a sliding window keeps fewer entries than the prefix has tokens: that cache cannot be shared
])  # fmt: skip
def test_equals_greedy_by_hand(tiny_model, tiny_tokenizer, prompts, batch_size, share_prefix, window):
    if not share_prefix:
        prompts[0] = prompts[0][5:]
    assert bool(find_shared_prefix(prompts)) == share_prefix
    other = window and build("Mistral", len(tiny_tokenizer), attention="sdpa", sliding_window=window)
    model = (other or tiny_model).double()
    assert_greedy(answer(model, tiny_tokenizer, prompts, batch_size), model, tiny_tokenizer, prompts, 12)


def test_end_tokens_and_stop_text_finish_an_answer_and_the_limit_does_not(tiny_model, tiny_tokenizer, prompts):
    # Let the third token of the first answer be an end token of the model: that answer is then three tokens long.
    ids = tiny_model.double().generate(torch.tensor([prompts[0]]), max_new_tokens=3, do_sample=False)[0, -3:].tolist()
    tiny_model.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, ids[2]]
    found = answer(tiny_model, tiny_tokenizer, prompts, max_new_tokens=40)
    assert found[0].num_tokens == ids.index(ids[2]) + 1 and not all(one.finished for one in found)
    assert_greedy(found, tiny_model, tiny_tokenizer, prompts, 40, ids[2:])
    free = answer(tiny_model, tiny_tokenizer, prompts, max_new_tokens=20)
    whole = next(one for one in free if len(one.text) > 8 and one.text[4:6] not in one.text[:5])
    stop = whole.text[4:6]
    found = answer(tiny_model, tiny_tokenizer, prompts, max_new_tokens=20, stop=stop)
    assert found[whole.index].text == whole.text[:4] and found[whole.index].finished
    assert found[whole.index].num_tokens < whole.num_tokens
    for before, after in zip(free, found, strict=True):
        assert after.text == before.text.split(stop)[0]


def test_own_generation_settings_are_set_aside_and_an_adapter_answers(tiny_model, tiny_tokenizer, prompts):
    expected = answer(tiny_model, tiny_tokenizer, prompts)
    own = GenerationConfig(do_sample=True, temperature=5.0, repetition_penalty=9.0, no_repeat_ngram_size=1,
                           suppress_tokens=list(range(60)), eos_token_id=tiny_tokenizer.eos_token_id)  # fmt: skip
    tiny_model.generation_config = own
    for layer in tiny_model.model.layers:
        layer.self_attn.attention_dropout = 0.9  # acts in training mode alone
    tiny_model.train()
    assert answer(tiny_model, tiny_tokenizer, prompts) == expected
    assert tiny_model.generation_config is own and tiny_model.training
    model = get_peft_model(tiny_model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    assert [one.text for one in answer(model, tiny_tokenizer, prompts)] != [one.text for one in expected]
    with model.disable_adapter():
        assert answer(model, tiny_tokenizer, prompts) == expected


def test_the_metric_also_from_its_file_without_network(tmp_path):
    answers = {"predictions": ["so\n#### 3", "it is 4.", "#### 9", "none"]}
    answers["references"] = [f"#### {gold}" for gold in (3, 4, 5, 6)]
    scores = GSM8KAccuracy().compute(**answers)
    assert (scores["accuracy"], scores["accuracy_strict"], scores["num_answers"]) == (0.5, 0.25, 4)
    for correct, suffix in ((2, ""), (1, "_strict")):
        assert (scores[f"ci95_low{suffix}"], scores[f"ci95_high{suffix}"]) == wilson_interval(correct, 4)
    refused(DataError, "no predictions", GSM8KAccuracy().compute, predictions=[], references=[])
    (tmp_path / "script.py").write_text(
        "import json, os, socket\n"
        "def refuse(*args): raise AssertionError('network')\n"
        "socket.socket.connect = socket.getaddrinfo = refuse\n"
        f"os.environ['HF_HOME'] = {str(tmp_path)!r}\n"
        "import evaluate\n"
        f"print(json.dumps(evaluate.load({metric.__file__!r}).compute(**{answers!r})))"
    )
    assert json.loads(processes.run([tmp_path / "script.py"], tmp_path / "out").splitlines()[-1]) == scores


LEAVE = """
import atexit, os, sys, time
from pathlib import Path

import torch
from quantkd.hardware import process_state

atexit.register(lambda: print("in a group:", torch.distributed.is_initialized(), flush=True))  # runs last
state = process_state()
assert state.num_processes == 2 and torch.distributed.is_initialized()
# The first to end closes what the other may still connect to.
Path(sys.argv[1], os.environ["RANK"]).touch()
while len(os.listdir(sys.argv[1])) < 2:
    time.sleep(0.01)
raise [ValueError, KeyboardInterrupt][state.process_index]("the end")
"""


def test_two_processes_give_what_one_gives(tiny_model_path, held_out, tmp_path):
    """Of 3 and of 5 batches, so that one process joins the last round with nothing."""
    rows = generate_problems(9, seed=0)
    assert len({len(row["question"]) for row in rows}) > 3  # or changed places would not show
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = f"-m quantkd evaluate --arm before --model_name_or_path {tiny_model_path} --full_precision --dtype float32"
    words = f"{words} --held_out {held_out.sources[0]} --gsm8k {tmp_path}/test.jsonl --shots 0 --batch_size 2"
    words = [*words.split(), "--max_new_tokens", 6, "--run_dir"]
    for count in (1, 2):  # of the two, only the first says what it wrote
        said = processes.run([*words, tmp_path / str(count)], tmp_path / f"{count}.txt", count)
        assert said.count("before.json: KL ") == 1
    arms = [json.loads((tmp_path / name / "evaluation" / "before.json").read_text()) for name in ("1", "2")]
    sizes = len(arms[0]["fidelity"]["rows"]["tokens"]), len(arms[0]["questions"]["0-shot"]["correct_strict"])
    assert arms[0] == arms[1] and sizes == (5, 9)
    answers = [(tmp_path / name / "evaluation" / "before-0-shot.jsonl") for name in ("1", "2")]
    assert answers[0].read_text() == answers[1].read_text()
    # What one process left behind, two go on from: the answers that are there are not made again.
    lines = answers[1].read_text().splitlines()
    changed = json.loads(lines[3])
    changed["output"] += " kept"  # without another number, so the verdict stays
    answers[1].write_text("\n".join([*lines[:3], json.dumps(changed)]) + "\n")
    processes.run([*words, tmp_path / "2"], tmp_path / "again.txt", 2)
    after = [json.loads(line) for line in answers[1].read_text().splitlines()]
    outputs = [json.loads(line)["output"] for line in lines]
    assert [record["output"] for record in after] == [*outputs[:3], f"{outputs[3]} kept", *outputs[4:]]


def test_processes_leave_their_group_after_an_error_and_after_ctrl_c(tmp_path):
    """In interpreters of their own: a fork ends without what an exit runs."""
    group = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    group["MASTER_PORT"] = processes.free_port()
    family = [
        subprocess.Popen([sys.executable, "-c", LEAVE, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                         text=True, env={**os.environ, **group, "RANK": rank, "LOCAL_RANK": rank})
        for rank in "01"
    ]  # fmt: skip
    for process, code in zip(family, (1, -signal.SIGINT), strict=True):
        out, err = process.communicate(timeout=120)
        assert process.returncode == code and "the end" in err and out == "in a group: False\n", err
