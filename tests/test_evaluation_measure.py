"""An arm's evaluation: what is kept for the same model, data and settings, and what is refused."""

from __future__ import annotations

import copy
import json
import time
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast

from quantkd import TransferSet
from quantkd.cli.main import main
from quantkd.data.arithmetic import generate_problems
from quantkd.errors import ConfigError, DataError, TransferSetError
from quantkd.evaluation.accuracy import Questions
from quantkd.evaluation.arms import Arm, EvaluationSettings, check_arm_name
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.evaluation.fingerprint import compute_model_fingerprint
from quantkd.evaluation.measure import evaluate_arm
from quantkd.models.student import load_student
from quantkd.report import build_report
from tests.conftest import build_tiny_model, capture_set

ROWS = generate_problems(3, seed=0)
QUESTIONS = Questions(ROWS)


@pytest.fixture(scope="module")
def held_out_path(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("held") / "set"
    capture_set(tiny_model_path, ["One?", "Two?", "Three?"], path, max_new_tokens=6)
    return path


@pytest.fixture(scope="module")
def held_out(held_out_path: Path) -> TransferSet:
    return TransferSet.open(held_out_path)


def evaluate(
    model: Any, tokenizer: Any, run_dir: Path, arm: str = "after", held_out: TransferSet | None = None,
    questions: Questions | None = None, **settings: Any,
) -> Arm:  # fmt: skip
    return evaluate_arm(
        model, tokenizer, run_dir, arm=arm, model_name="m", held_out=held_out, questions=questions,
        settings=EvaluationSettings(**{"max_new_tokens": 4, "progress": False, **settings}),
    )  # fmt: skip


def written(run_dir: Path) -> bytes:
    return (run_dir / "evaluation" / "after.json").read_bytes()


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []

    def count(model: Any, rows: TransferSet, **options: Any) -> Any:
        counts.append(len(rows))
        return evaluate_fidelity(model, rows, **options)

    monkeypatch.setattr("quantkd.evaluation.fidelity.evaluate_fidelity", count)
    return counts


def test_fidelity_is_measured_once_for_a_model_its_data_and_its_settings(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, held_out: TransferSet, measured: list[int]
) -> None:
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out)
    first = written(tmp_path)
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out)
    assert measured == [3] and written(tmp_path) == first
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out, batch_size=2)
    assert measured == [3, 3]
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out[:2], batch_size=2)
    assert measured == [3, 3, 2]
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out[:2], batch_size=2, force=True)
    assert measured == [3, 3, 2, 2]
    with torch.no_grad():
        tiny_model.lm_head.weight += 1e-3
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out[:2], batch_size=2)
    assert measured == [3, 3, 2, 2, 2]


def test_parts_of_one_model_add_up(tmp_path, tiny_model, tiny_tokenizer, held_out, measured):
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out)
    both = evaluate(tiny_model, tiny_tokenizer, tmp_path, questions=QUESTIONS)
    assert both.fidelity is not None and both.questions["0-shot"].count == 3
    first = written(tmp_path)
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out)
    assert measured == [3] and written(tmp_path) == first
    with torch.no_grad():
        tiny_model.lm_head.weight += 1e-3
    with pytest.raises(DataError, match="records of another evaluation"):
        evaluate(tiny_model, tiny_tokenizer, tmp_path, questions=QUESTIONS)
    assert evaluate(tiny_model, tiny_tokenizer, tmp_path, questions=QUESTIONS, force=True).fidelity is None


def test_a_stop_among_the_answers_keeps_the_fidelity(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, held_out: TransferSet, measured: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("quantkd.evaluation.accuracy.evaluate_gsm8k", stop)
        evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out, questions=QUESTIONS)
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out, questions=QUESTIONS)
    assert measured == [3]


def test_a_damaged_file_is_measured_anew(tmp_path, tiny_model, tiny_tokenizer, held_out, measured, caplog):
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out)
    first = written(tmp_path)
    for damaged in (first[:-20], b"[]", b"\xff"):
        (tmp_path / "evaluation" / "after.json").write_bytes(damaged)
        evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out)
        assert written(tmp_path) == first and "after.json" in caplog.messages[-1]
    assert measured == [3, 3, 3, 3]


def test_another_models_arm_is_replaced_on_request(tmp_path, tiny_model, tiny_tokenizer, held_out):
    options = {"held_out": held_out, "questions": QUESTIONS, "replace_other": True}
    evaluate(tiny_model, tiny_tokenizer, tmp_path, **options)
    folder = tmp_path / "evaluation"
    (folder / "after-noon.json").write_text("{}")
    (folder / "after-8-shot.jsonl").write_text("{}")
    (folder / "after-2-8-shot.jsonl").write_text("{}")  # of the arm "after-2"
    names = {path.name for path in folder.iterdir()}
    evaluate(tiny_model, tiny_tokenizer, tmp_path, **options)
    assert {path.name for path in folder.iterdir()} == names
    with torch.no_grad():
        tiny_model.lm_head.weight += 1e-3
    evaluate(tiny_model, tiny_tokenizer, tmp_path, **options)
    assert {path.name for path in folder.iterdir()} == names - {"after-8-shot.jsonl"}


@pytest.mark.parametrize(
    ("arm", "form", "title"),
    [
        ("teacher", None, "teacher"),
        ("before", None, "32-bit, before"),
        ("before", "nf4", "4-bit, before"),
        ("after", "int8", "8-bit, distilled"),
        ("mine", "int8", "mine"),
    ],
)
def test_a_title_follows_the_models_own_format(tmp_path, tiny_model, tiny_model_path, tiny_tokenizer, arm, form, title):
    model = tiny_model if form is None else load_student(str(tiny_model_path), quantization_config=form)
    found = evaluate(model, tiny_tokenizer, tmp_path, arm=arm, questions=Questions(ROWS[:1]))
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
    def load(**config: Any) -> Any:
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
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), bos_token="<|bos|>", eos_token="<|im_end|>"
    )
    with pytest.raises(TransferSetError, match=r"held-out set of teacher .* the vocabulary differ"):
        evaluate(tiny_model, other, tmp_path, held_out=held_out)
    assert not (tmp_path / "evaluation").exists()
    templated = copy.deepcopy(tiny_tokenizer)
    templated.chat_template = "{{ messages[0]['content'] }}"
    assert evaluate(tiny_model, templated, tmp_path, held_out=held_out).fidelity.means["kl"] < 1e-3


def test_rows_that_the_model_cannot_read_and_no_rows_are_refused(tiny_model, tiny_tokenizer, held_out):
    small = build_tiny_model(tiny_tokenizer)
    small.resize_token_embeddings(300)
    with pytest.raises(ConfigError, match=r"head has 300 rows, .* up to 319"):
        evaluate_fidelity(small, held_out, progress=False)
    with pytest.raises(DataError, match="holds 0 rows; expected at least one"):
        evaluate_fidelity(tiny_model, held_out[:0], progress=False)


def test_a_scaling_and_a_config_are_part_of_the_model(tmp_path, tiny_model, tiny_tokenizer, held_out):
    """No weight differs: an adapter whose lora_alpha was edited, and a model with other positional frequencies."""
    adapted = get_peft_model(
        build_tiny_model(tiny_tokenizer), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    kls = []
    for alpha in (8, 32):
        file = tmp_path / "adapter" / "adapter_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": alpha}))
        model = PeftModel.from_pretrained(build_tiny_model(tiny_tokenizer), tmp_path / "adapter")
        kls.append(evaluate(model, tiny_tokenizer, tmp_path / "run", held_out=held_out).fidelity.means["kl"])
        assert kls[-1] == evaluate_fidelity(model, held_out, progress=False).means["kl"]
    assert abs(kls[0] - kls[1]) > 0.01
    evaluate(tiny_model, tiny_tokenizer, tmp_path / "run", arm="before", held_out=held_out)
    config = copy.deepcopy(tiny_model.config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": 100.0}
    moved = type(tiny_model)(config).eval()
    moved.load_state_dict(tiny_model.state_dict())
    moved.config.dtype = tiny_model.config.dtype
    found = evaluate(moved, tiny_tokenizer, tmp_path / "run", arm="before", held_out=held_out).fidelity.means["kl"]
    assert found > 0.01  # the model as it was is at zero


def test_damaged_settings_are_reported_and_force_mends_them(tmp_path, tiny_model, tiny_tokenizer):
    evaluate(tiny_model, tiny_tokenizer, tmp_path, questions=QUESTIONS)
    first = written(tmp_path)
    settings = tmp_path / "evaluation" / "after-0-shot.jsonl.settings.json"
    for text in (settings.read_text()[:30], "[]", "\x00"):
        settings.write_text(text)
        with pytest.raises(DataError, match=r"settings\.json is damaged: .*--force"):
            evaluate(tiny_model, tiny_tokenizer, tmp_path, questions=QUESTIONS)
    evaluate(tiny_model, tiny_tokenizer, tmp_path, questions=QUESTIONS, force=True)
    assert written(tmp_path) == first


@pytest.mark.parametrize("other", [{"questions": Questions(generate_problems(3, seed=5))}, {"chat_template": False}])
def test_arms_over_other_questions_or_prompts_are_not_compared(tmp_path, tiny_model, tiny_tokenizer, other):
    """As many questions, numbered alike."""
    for arm in ("teacher", "before", "after"):
        options = {"questions": QUESTIONS, **(other if arm == "before" else {})}
        evaluate(tiny_model, tiny_tokenizer, tmp_path, arm=arm, **options)
    with pytest.raises(DataError, match=r"'before' and of 'teacher' are not over the same questions: .*prompts differ"):
        build_report(tmp_path)
    evaluate(tiny_model, tiny_tokenizer, tmp_path, arm="before", questions=QUESTIONS, force=True)
    assert build_report(tmp_path).is_file()


def test_arms_are_measured_on_both_sides_of_midnight(clock, tmp_path, tiny_model, tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }} " + tokenizer.chat_template
    for arm, day in (("teacher", "2025-12-31"), ("before", "2026-01-01"), ("before", "2026-01-02")):
        clock.day = day
        evaluate(tiny_model, tokenizer, tmp_path, arm=arm, questions=QUESTIONS)
        records = tmp_path / "evaluation" / f"{arm}-0-shot.jsonl"
        assert json.loads(records.read_text().splitlines()[0])["prompt"].startswith("31 Dec 2025 ")
        records.write_text(records.read_text().splitlines(keepends=True)[0])  # the rest is asked again
    assert build_report(tmp_path).is_file()
    evaluate(tiny_model, tokenizer, tmp_path / "other", arm="after", questions=QUESTIONS)
    (tmp_path / "other" / "evaluation" / "after.json").rename(tmp_path / "evaluation" / "after.json")
    with pytest.raises(
        DataError, match="'after' and of 'teacher' are not over the same questions: date, prompts differ"
    ):
        build_report(tmp_path)


@pytest.fixture(scope="module")
def stored_in_nf4(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nf4")
    load_student(str(tiny_model_path), dtype="float32").save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(tiny_model_path).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gsm8k", "test.jsonl", "--shots", "2"], "test.jsonl is one file, and 2 shots would be its own questions"),
        (["--gsm8k", "same", "--shots", "2"], "Few-shot example 0 is the question of row 0 with its answer"),
        (["--gsm8k", "test.jsonl", "--shots", "0", "--split", "train"], "--split train is of --prompts, and none are"),
        (["--prompts", "p.jsonl", "--split", "train"], "p.jsonl has no splits, and the split 'train' was asked for"),
        (["--prompts", "p.jsonl", "--full_precision"], "is stored in nf4, and full precision was asked for. Name the"),
        (["--held_out", "HELD", "--teacher", "NF4"], "is stored in nf4, and full precision was asked for. Name the"),
    ],
)
def test_evaluations_that_would_mean_something_else_are_refused(
    tmp_path, monkeypatch, capsys, stored_in_nf4, held_out_path, words, said
):
    monkeypatch.chdir(tmp_path)
    Path("same").mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in ROWS)
    for name in ("test.jsonl", "same/test.jsonl", "same/train.jsonl"):
        Path(name).write_text(rows)
    Path("p.jsonl").write_text('{"prompt": "One?"}\n')
    stands_for = {"HELD": held_out_path, "NF4": stored_in_nf4}
    with pytest.raises(SystemExit):
        main(["evaluate", "--arm", "x", "--model_name_or_path", str(stored_in_nf4), "--dtype", "float32", "--run_dir",
              "r", *(str(stands_for.get(word, word)) for word in words)])  # fmt: skip
    assert said in capsys.readouterr().err and not list(Path("r").rglob("*.jsonl"))


def test_a_file_of_more_rows_than_are_asked_says_so(tmp_path, tiny_model_path, caplog):
    path, rows = tmp_path / "p.jsonl", "".join(json.dumps({"prompt": f"{n}?"}) + "\n" for n in range(101))
    words = ["evaluate", "--arm", "x", "--model_name_or_path", str(tiny_model_path), "--full_precision", "--dtype",
             "float32", "--prompts", str(path), "--max_new_tokens", "1", "--batch_size", "50"]  # fmt: skip
    for name, lines, options, count in (
        ("a", 101, [], 100), ("b", 100, [], 100), ("c", 101, ["--limit", "101"], 101), ("d", 101, ["--limit", "3"], 3)
    ):  # fmt: skip
        caplog.clear()
        path.write_text("".join(rows.splitlines(keepends=True)[:lines]))
        main([*words, "--run_dir", str(tmp_path / name), *options])
        assert len((tmp_path / name / "evaluation" / "x-prompts.jsonl").read_text().splitlines()) == count
        said = [record.getMessage() for record in caplog.records if "--limit" in record.getMessage()]
        assert said == [f"{path} has more than 100 rows; the first 100 are asked. --limit asks more."] * (name == "a")


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "a.json", "é", "²", "x" * 101])
def test_an_arms_name_is_a_plain_file_name(name):
    with pytest.raises(ConfigError, match="An arm's name is a file name"):
        check_arm_name(name)


def test_force_asks_other_prompts_again(tmp_path, tiny_model_path):
    (tmp_path / "mine.jsonl").write_text('{"prompt": "One?"}\n{"prompt": "Two?"}\n')
    words = ["evaluate", "--arm", "x", "--model_name_or_path", str(tiny_model_path), "--full_precision", "--dtype"]
    words += ["float32", "--prompts", str(tmp_path / "mine.jsonl"), "--run_dir", str(tmp_path), "--max_new_tokens", "4"]
    main(words)
    records = tmp_path / "evaluation" / "x-prompts.jsonl"
    first = records.read_text()
    spoilt = first.replace('"output": "', '"output": "old ', 1)
    records.write_text(spoilt)
    main(words)
    assert records.read_text() == spoilt  # kept
    main([*words, "--force"])
    assert records.read_text() == first != spoilt


def test_a_killed_evaluation_is_taken_up_and_ends_in_the_same_bytes(tmp_path, tiny_model_path, held_out_path):
    """SIGKILL after some answers; every record that was written stays, and the files end as without it."""
    (tmp_path / "data").mkdir()
    rows = "".join(json.dumps(row) + "\n" for row in generate_problems(24, seed=3))
    (tmp_path / "data" / "test.jsonl").write_text(rows)
    words = ["evaluate", "--arm", "before", "--model_name_or_path", str(tiny_model_path), "--full_precision", "--dtype",
             "float32", "--held_out", str(held_out_path), "--gsm8k", str(tmp_path / "data"), "--shots", "0",
             "--batch_size", "1", "--max_new_tokens", "100", "--run_dir"]  # fmt: skip
    folder = tmp_path / "killed" / "evaluation"
    (process,) = processes.start(["-m", "quantkd", *words, tmp_path / "killed"], tmp_path / "out.txt")
    records, deadline = folder / "before-0-shot.jsonl", time.monotonic() + 120
    while not (records.exists() and records.read_text().count("\n") >= 3):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    written = [line for line in records.read_text().splitlines(keepends=True) if line.endswith("\n")]
    assert 3 <= len(written) < 24
    # Marked, for were they asked again, they would be the same.
    records.write_text("".join(written).replace('"output_tokens": ', '"output_tokens": 1000'))
    main([*words, str(tmp_path / "killed")])
    ends = [json.loads(line)["output_tokens"] for line in records.read_text().splitlines()]
    assert sum(count >= 1000 for count in ends) == len(written) and len(ends) == 24
    records.write_text(records.read_text().replace('"output_tokens": 1000', '"output_tokens": '))
    main([*words, str(tmp_path / "whole")])
    whole = tmp_path / "whole" / "evaluation"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in whole.iterdir()
    }
