"""An arm's evaluation: what is kept for the same model, data and settings, and what is refused."""

import copy
import json
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast

from quantkd.data.arithmetic import generate_problems
from quantkd.errors import ConfigError, DataError, TransferSetError
from quantkd.evaluation.accuracy import Questions
from quantkd.evaluation.arms import EvaluationSettings, check_arm_name
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.evaluation.fingerprint import compute_model_fingerprint
from quantkd.evaluation.measure import evaluate_arm
from quantkd.evaluation.records import RecordFile, date_prompts
from quantkd.models.student import load_student
from quantkd.report import build_report
from tests.conftest import build_tiny_model, refused, save_adapter

pytestmark = pytest.mark.usefixtures("no_pictures", "few_draws")
ROWS = generate_problems(3, seed=0)
QUESTIONS = Questions(ROWS)
file = pytest.fixture(lambda tmp_path: tmp_path / "evaluation" / "after.json")


def evaluate_model(model, tokenizer, run_dir, arm="after", held_out=None, questions=None, **settings):
    return evaluate_arm(
        model, tokenizer, run_dir, arm=arm, model_name="m", held_out=held_out, questions=questions,
        settings=EvaluationSettings(**{"max_new_tokens": 4, "progress": False, **settings}),
    )  # fmt: skip


@pytest.fixture
def evaluate(tiny_model, tiny_tokenizer, tmp_path):
    return partial(evaluate_model, tiny_model, tiny_tokenizer, tmp_path)


@pytest.fixture
def change(tiny_model):
    return lambda: tiny_model.lm_head.weight.data.add_(1e-3)


@pytest.fixture
def measured(monkeypatch):
    counts = []

    def count(model, rows, **options):
        counts.append(len(rows))
        return evaluate_fidelity(model, rows, **options)

    monkeypatch.setattr("quantkd.evaluation.fidelity.evaluate_fidelity", count)
    return counts


def test_fidelity_is_measured_once_and_anew_if_damaged(evaluate, held_out, measured, file, change, caplog):
    """For a model, its data and its settings."""
    evaluate(held_out=held_out)
    first = file.read_bytes()
    evaluate(held_out=held_out)
    assert measured == [5] and file.read_bytes() == first
    for damaged in (first[:-20], b"[]", b"\xff"):
        file.write_bytes(damaged)
        evaluate(held_out=held_out)
        assert file.read_bytes() == first and "after.json" in caplog.messages[-1]
    two = {"held_out": held_out[:2], "batch_size": 2}
    for options in ({"held_out": held_out, "batch_size": 2}, two, {**two, "force": True}):
        evaluate(**options)
    change()
    evaluate(**two)
    assert measured == [5, 5, 5, 5, 5, 2, 2, 2]


def test_parts_of_one_model_add_up_also_after_a_stop(evaluate, held_out, measured, file, change, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("quantkd.evaluation.accuracy.evaluate_gsm8k", Mock(side_effect=KeyboardInterrupt))
        evaluate(held_out=held_out, questions=QUESTIONS)  # the fidelity is kept
    both = evaluate(questions=QUESTIONS)
    assert both.fidelity is not None and both.questions["0-shot"].count == 3
    first = file.read_bytes()
    evaluate(held_out=held_out)
    assert measured == [5] and file.read_bytes() == first
    change()
    refused(DataError, "records of another evaluation", evaluate, questions=QUESTIONS)
    assert evaluate(questions=QUESTIONS, force=True).fidelity is None


def test_another_models_arm_is_replaced_on_request(evaluate, held_out, file, change):
    options = {"held_out": held_out, "questions": QUESTIONS, "replace_other": True}
    evaluate(**options)
    for name in ("after-noon.json", "after-8-shot.jsonl", "after-2-8-shot.jsonl"):  # the last of the arm "after-2"
        (file.parent / name).write_text("{}")
    names = {path.name for path in file.parent.iterdir()}
    evaluate(**options)
    assert {path.name for path in file.parent.iterdir()} == names
    change()
    evaluate(**options)
    assert {path.name for path in file.parent.iterdir()} == names - {"after-8-shot.jsonl"}


@pytest.mark.parametrize(("arm", "form", "title"), [
    ("teacher", None, "teacher"), ("before", None, "32-bit, before"), ("before", "nf4", "4-bit, before"),
    ("after", "int8", "8-bit, distilled"), ("mine", "int8", "mine"),
])  # fmt: skip
def test_a_title_follows_the_models_own_format(tmp_path, tiny_model, tiny_model_path, tiny_tokenizer, arm, form, title):
    model = tiny_model if form is None else load_student(str(tiny_model_path), quantization_config=form)
    found = evaluate_model(model, tiny_tokenizer, tmp_path, arm=arm, questions=Questions(ROWS[:1]))
    assert found.title == title == json.loads((tmp_path / "evaluation" / f"{arm}.json").read_text())["title"]


def test_a_fingerprint_sees_every_trained_value_and_changes_nothing(tiny_model):
    """One value between the samples, of an adapter that was loaded for inference."""
    config = LoraConfig(r=8, target_modules="all-linear", modules_to_save=["norm"], init_lora_weights=False)
    model = get_peft_model(tiny_model, config).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = compute_model_fingerprint(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    seen = {first}
    for name, parameter in model.named_parameters():
        if ("lora_" in name and "layers.1.mlp" in name) or ("modules_to_save" in name):
            flat = parameter.data.view(-1)
            flat[flat.numel() // 2 + 1] += 1e-6
            seen.add(compute_model_fingerprint(model))
    assert len(seen) == 1 + 6 + 5


def test_a_fingerprint_names_format_and_adapter_and_outlives_an_evaluation(tiny_model_path, held_out):
    def load(**config):
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **config)
        return load_student(str(tiny_model_path), quantization_config=quantization, dtype="float32")

    once, twice, nested = load(), load(), load(bnb_4bit_use_double_quant=True)
    fingerprint = compute_model_fingerprint(once)
    assert compute_model_fingerprint(twice) == fingerprint != compute_model_fingerprint(nested)
    evaluate_fidelity(once, held_out, progress=False)  # on some processors bitsandbytes repacks the weights here
    assert compute_model_fingerprint(once) == fingerprint
    adapted = get_peft_model(once, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with_adapter = compute_model_fingerprint(adapted)
    with adapted.disable_adapter():
        assert compute_model_fingerprint(adapted) != with_adapter != fingerprint


def test_rows_of_another_tokenizer_are_refused(tmp_path, tiny_model, tiny_tokenizer, held_out):
    """Of the same size, so that nothing else tells; another chat template is no matter, for the rows are token ids."""
    described = json.loads(tiny_tokenizer.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    special = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(described)), **special)
    with pytest.raises(TransferSetError, match=r"held-out set of teacher .* the vocabulary differ"):
        evaluate_model(tiny_model, other, tmp_path, held_out=held_out)
    assert not (tmp_path / "evaluation").exists()
    templated = copy.deepcopy(tiny_tokenizer)
    templated.chat_template = "{{ messages[0]['content'] }}"
    assert evaluate_model(tiny_model, templated, tmp_path, held_out=held_out).fidelity.means["kl"] < 1e-3


def test_a_scaling_and_a_config_are_part_of_the_model(tmp_path, tiny_model, tiny_tokenizer, held_out):
    """No weight differs: an adapter whose lora_alpha was edited, and a model with other positional frequencies."""
    save_adapter(build_tiny_model(tiny_tokenizer), tmp_path / "adapter")
    kls, file = [], tmp_path / "adapter" / "adapter_config.json"
    for alpha in (8, 32):
        file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": alpha}))
        model = PeftModel.from_pretrained(build_tiny_model(tiny_tokenizer), tmp_path / "adapter")
        kls.append(evaluate_model(model, tiny_tokenizer, tmp_path / "run", held_out=held_out).fidelity.means["kl"])
        assert kls[-1] == evaluate_fidelity(model, held_out, progress=False).means["kl"]
    assert abs(kls[0] - kls[1]) > 0.01
    evaluate_model(tiny_model, tiny_tokenizer, tmp_path / "run", arm="before", held_out=held_out)
    config = copy.deepcopy(tiny_model.config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 100.0}
    moved = type(tiny_model)(config).eval()
    moved.load_state_dict(tiny_model.state_dict())
    moved.config.dtype = tiny_model.config.dtype
    found = evaluate_model(moved, tiny_tokenizer, tmp_path / "run", arm="before", held_out=held_out)
    assert found.fidelity.means["kl"] > 0.01  # the model as it was is at zero


def test_damaged_settings_are_reported_and_force_mends_them(evaluate, file):
    evaluate(questions=QUESTIONS)
    first, settings = file.read_bytes(), file.parent / "after-0-shot.jsonl.settings.json"
    for text in (settings.read_text()[:30], "[]", "\x00"):
        settings.write_text(text)
        refused(DataError, r"settings\.json is damaged: .*--force", evaluate, questions=QUESTIONS)
    evaluate(questions=QUESTIONS, force=True)
    assert file.read_bytes() == first


@pytest.mark.parametrize("other", [{"questions": Questions(generate_problems(3, seed=5))}, {"chat_template": False}])
def test_arms_over_other_questions_or_prompts_are_not_compared(tmp_path, evaluate, other):
    for arm in ("teacher", "before", "after"):
        evaluate(arm=arm, **{"questions": QUESTIONS, **(other if arm == "before" else {})})
    with pytest.raises(DataError, match=r"'before' and of 'teacher' are not over the same questions: .*prompts differ"):
        build_report(tmp_path)
    evaluate(arm="before", questions=QUESTIONS, force=True)
    assert build_report(tmp_path).is_file()


def test_arms_are_measured_on_both_sides_of_midnight(clock, tmp_path, tiny_model, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    for arm, day in (("teacher", "2025-12-31"), ("before", "2026-01-01"), ("before", "2026-01-02")):
        clock.day = day
        evaluate_model(tiny_model, tokenizer, tmp_path, arm=arm, questions=QUESTIONS)
        records = tmp_path / "evaluation" / f"{arm}-0-shot.jsonl"
        assert json.loads(records.read_text().splitlines()[0])["prompt"].startswith("31 Dec 2025 ")
        records.write_text(records.read_text().splitlines(keepends=True)[0])  # the rest is asked again
    assert build_report(tmp_path).is_file()
    evaluate_model(tiny_model, tokenizer, tmp_path / "other", arm="after", questions=QUESTIONS)
    (tmp_path / "other" / "evaluation" / "after.json").rename(tmp_path / "evaluation" / "after.json")
    with pytest.raises(DataError, match=r"'after' and of 'teacher' are not over the same .*: date, prompts differ"):
        build_report(tmp_path)


def test_tasks_of_all_arms_have_one_date(clock, tmp_path, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    for arm, name, clock.day in (("teacher", "sums", "2025-12-31"), ("before", "arc", "2026-01-01")):
        path = tmp_path / "lm-eval" / arm / f"{name}.jsonl"
        dating, dated = date_prompts(tokenizer, path, chat=True, share=False, depth=1)
        RecordFile(path, dated, share=False)
        text = dating.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
        assert dated == {"date": "2025-12-31"} and text.startswith("31 Dec 2025 ")


@pytest.fixture(scope="module")
def stored_in_nf4(tiny_model_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("nf4")
    load_student(str(tiny_model_path), dtype="float32").save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_model_path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("words", "said"), [
    ("--gsm8k test.jsonl --shots 2", "test.jsonl is one file, and 2 shots would be its own questions"),
    ("--gsm8k same --shots 2", "Few-shot example 0 is the question of row 0 with its answer"),
    ("--gsm8k test.jsonl --shots 0 --split train", "split has no effect without prompts"),
    ("--prompts p.jsonl --split train", "p.jsonl has no splits, and the split 'train' was asked for"),
    ("--prompts p.jsonl --full_precision", "is stored in nf4, and full precision was asked for. Name the"),
    ("--held_out HELD --teacher NF4", "is stored in nf4, and full precision was asked for. Name the"),
])  # fmt: skip
def test_what_would_mean_something_else_is_refused(tmp_path, monkeypatch, cli, stored_in_nf4, held_out, words, said):
    monkeypatch.chdir(tmp_path)
    Path("same").mkdir()
    for name in ("test.jsonl", "same/test.jsonl", "same/train.jsonl"):
        Path(name).write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    Path("p.jsonl").write_text('{"prompt": "One?"}\n')
    words = words.replace("HELD", str(held_out.sources[0])).replace("NF4", str(stored_in_nf4))
    options = f"--arm x --model_name_or_path {stored_in_nf4} --dtype float32 --run_dir r {words}"
    code, _, err = cli("evaluate", *options.split())
    assert code and said in err and not list(Path("r").rglob("*.jsonl"))


def test_a_file_of_more_rows_than_are_asked_says_so_and_force_asks_again(tmp_path, tiny_model_path, cli, caplog):
    def ask(name, rows, *options):  # the file of answers
        (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(rows)))
        words = ["evaluate", "--arm", "x", "--model_name_or_path", tiny_model_path, "--full_precision", "--dtype"]
        words += ["float32", "--prompts", tmp_path / "p.jsonl", "--batch_size", 50, "--run_dir", tmp_path / name]
        cli.ok(*words, *options)
        return tmp_path / name / "evaluation" / "x-prompts.jsonl"

    for name, rows, options, count in (
        ("a", 101, [], 100), ("b", 100, [], 100), ("c", 101, ["--limit", "101"], 101), ("d", 101, ["--limit", "3"], 3)
    ):  # fmt: skip
        caplog.clear()
        assert ask(name, rows, "--max_new_tokens", 1, *options).read_text().count("\n") == count
        said = [record.getMessage() for record in caplog.records if "--limit" in record.getMessage()]
        told = f"{tmp_path}/p.jsonl has more than 100 rows; the first 100 are asked. --limit asks more."
        assert said == [told] * (name == "a")
    options = ("e", 2, "--max_new_tokens", 4)
    first = ask(*options).read_text()
    spoilt = first.replace('"output": "', '"output": "old ', 1)
    ask(*options).write_text(spoilt)
    assert ask(*options).read_text() == spoilt  # kept
    assert ask(*options, "--force").read_text() == first != spoilt


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "a.json", "é", "²", "x" * 101])
def test_an_arms_name_is_a_plain_file_name(name):
    refused(ConfigError, "An arm's name is a file name", check_arm_name, name)
