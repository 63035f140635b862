"""An arm's file: kept for the same model, data and settings, measured again for any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig

from quantkd import TransferSet
from quantkd.data.arithmetic import generate_problems
from quantkd.errors import DataError
from quantkd.evaluation import arms
from quantkd.evaluation.arms import evaluate_arm
from quantkd.evaluation.fidelity import evaluate_fidelity
from quantkd.evaluation.kept import compute_arm_fingerprint, discard_stale_arm
from quantkd.models.student import load_student
from tests.conftest import capture_set

ROWS = generate_problems(3, seed=0)


@pytest.fixture(scope="module")
def held_out(tiny_model_path: Path, tmp_path_factory: pytest.TempPathFactory) -> TransferSet:
    path = tmp_path_factory.mktemp("kept") / "set"
    capture_set(tiny_model_path, ["One?", "Two?", "Three?"], path, max_new_tokens=6)
    return TransferSet.open(path)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []

    def measure(model: Any, rows: TransferSet, **options: Any) -> Any:
        counts.append(len(rows))
        return evaluate_fidelity(model, rows, **options)

    monkeypatch.setattr(arms, "evaluate_fidelity", measure)
    return counts


def evaluate(model: Any, tokenizer: Any, run_dir: Path, **options: Any) -> dict[str, Any]:
    path = evaluate_arm(
        model, tokenizer, run_dir, arm="after", model_name="m", max_new_tokens=4, progress=False, **options
    )  # fmt: skip
    content: dict[str, Any] = json.loads(path.read_text())
    return content


def test_fidelity_is_measured_once_for_a_model_its_data_and_its_settings(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, held_out: TransferSet, measured: list[int]
) -> None:
    first = evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out)
    assert evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out) == first
    assert measured == [3]
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


def test_parts_of_one_model_add_up(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, held_out: TransferSet, measured: list[int]
) -> None:
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out)
    both = evaluate(tiny_model, tiny_tokenizer, tmp_path, questions=ROWS)
    assert both["fidelity"]["kl"] is not None and len(both["accuracy"]["0-shot"]) == 3
    assert evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out) == both
    assert measured == [3]
    with torch.no_grad():
        tiny_model.lm_head.weight += 1e-3
    with pytest.raises(DataError, match="records of another evaluation"):
        evaluate(tiny_model, tiny_tokenizer, tmp_path, questions=ROWS)
    assert "fidelity" not in evaluate(tiny_model, tiny_tokenizer, tmp_path, questions=ROWS, force=True)


def test_a_stop_among_the_answers_keeps_the_fidelity(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, held_out: TransferSet, measured: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stop(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(arms, "evaluate_gsm8k", stop)
        evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out, questions=ROWS)
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out, questions=ROWS)
    assert measured == [3]


def test_a_damaged_file_is_measured_anew(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, held_out: TransferSet, measured: list[int]
) -> None:
    first = evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out)
    path = tmp_path / "evaluation" / "after.json"
    path.write_text(path.read_text()[:-20])
    assert evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out) == first
    path.write_text("[]")
    assert evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out) == first
    assert measured == [3, 3, 3]


def test_only_another_models_arm_is_stale(
    tmp_path: Path, tiny_model: Any, tiny_tokenizer: Any, held_out: TransferSet
) -> None:
    evaluate(tiny_model, tiny_tokenizer, tmp_path, held_out=held_out, questions=ROWS)
    folder = tmp_path / "evaluation"
    (folder / "after-noon.json").write_text("{}")
    names = {path.name for path in folder.iterdir()}
    discard_stale_arm(folder, "after", tiny_model)
    assert {path.name for path in folder.iterdir()} == names
    with torch.no_grad():
        tiny_model.lm_head.weight += 1e-3
    discard_stale_arm(folder, "after", tiny_model)
    assert [path.name for path in folder.iterdir()] == ["after-noon.json"]


def test_a_fingerprint_names_format_and_adapter_and_outlives_an_evaluation(
    tiny_model_path: Path, held_out: TransferSet
) -> None:
    def load(**config: Any) -> Any:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **config)
        return load_student(str(tiny_model_path), quantization_config=quantization, dtype="float32")

    once, twice, nested = load(), load(), load(bnb_4bit_use_double_quant=True)
    fingerprint = compute_arm_fingerprint(once)
    assert compute_arm_fingerprint(twice) == fingerprint != compute_arm_fingerprint(nested)
    evaluate_fidelity(once, held_out, progress=False)  # on some processors bitsandbytes repacks the weights here
    assert compute_arm_fingerprint(once) == fingerprint
    adapted = get_peft_model(once, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    with_adapter = compute_arm_fingerprint(adapted)
    with adapted.disable_adapter():
        assert compute_arm_fingerprint(adapted) != with_adapter != fingerprint
