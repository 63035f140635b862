"""Every form of a student in lm-eval's own `hf` model, loaded by lm-eval from disk: the figures of our report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install quantkd[eval]")

import lm_eval
import torch
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model

from quantkd.cli.main import main
from quantkd.models.student import load_student
from quantkd.report import build_report
from tests.test_harness import CHOICE, LIKELY

NAMES = ["sums_one", "likely"]


@pytest.fixture
def task_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    docs = [
        {"question": f"{a} and {b} make", "choices": [str(a + b), str(a * b), "no"], "label": a % 3}
        for a, b in [(1, 2), (3, 4), (5, 6), (7, 8), (9, 1), (2, 2), (6, 3)]
    ]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    (folder / "one.yaml").write_text(CHOICE.format(name="one", folder=folder))
    (folder / "likely.yaml").write_text(LIKELY.format(folder=folder))
    return folder


@pytest.fixture
def forms(tmp_path: Path, tiny_model_path: Path) -> dict[str, Path]:
    """An adapter that changes the model by much, so that another form would show, and what is exported of it."""
    student = load_student(str(tiny_model_path), dtype="float32")
    student.save_pretrained(tmp_path / "four-bit")  # the student as it was loaded: lm-eval quantizes nothing itself
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(student, config).save_pretrained(tmp_path / "student")
    found = {"four-bit": tmp_path / "four-bit"}
    for form in ("adapter", "merged", "requantized"):
        words = ["export", "--form", form, "--model_name_or_path", tiny_model_path, "--adapter", tmp_path / "student",
                 "--output_dir", tmp_path / form, "--dtype", "float32", "--save_dtype", "float32"]  # fmt: skip
        main([str(word) for word in words + ["--accept_loss"] * (form == "requantized")])
        found[form] = tmp_path / form
    return found


def run_harness(model_args: dict[str, Any], tokenizer: Path, task_dir: Path) -> dict[str, Any]:
    """As `lm-eval run --model hf --model_args ...` does."""
    found = lm_eval.simple_evaluate(
        "hf", model_args={**model_args, "tokenizer": str(tokenizer), "dtype": "float32"}, tasks=NAMES, batch_size=4,
        device="cpu", task_manager=TaskManager(include_path=str(task_dir), include_defaults=False), log_samples=True,
    )  # fmt: skip
    assert found is not None
    return found


def test_every_exported_form_has_the_figures_of_the_report_in_the_harness(
    tmp_path: Path, tiny_model_path: Path, task_dir: Path, forms: dict[str, Path]
) -> None:
    run_dir = tmp_path / "run"
    arms: dict[str, tuple[list[str], dict[str, Any]]] = {
        "before": ([], {"pretrained": str(forms["four-bit"])}),
        "after": (["--adapter", str(forms["adapter"])],
                  {"pretrained": str(forms["four-bit"]), "peft": str(forms["adapter"])}),
        "merged": (["--full_precision"], {"pretrained": str(forms["merged"])}),
        "requantized": ([], {"pretrained": str(forms["requantized"])}),
    }  # fmt: skip
    likelihoods = {}
    for arm, (words, model_args) in arms.items():
        model = forms[arm] if arm in ("merged", "requantized") else tiny_model_path
        shared = [
            "--model_name_or_path",
            str(model),
            "--run_dir",
            str(run_dir),
            "--dtype",
            "float32",
            "--batch_size",
            "4",
        ]
        main(["evaluate", "--arm", arm, *shared, "--tasks", ",".join(NAMES), "--include_path", str(task_dir), *words])
        theirs = run_harness(model_args, tiny_model_path, task_dir)
        ours = json.loads((run_dir / "evaluation" / f"{arm}.json").read_text())
        for name in NAMES:
            expected = {
                key: value for key, value in theirs["results"][name].items() if "," in key and "_std" not in key
            }
            assert {key: figure["value"] for key, figure in ours["tasks"][name]["figures"][name].items()} == expected, (
                arm
            )
            kept = (run_dir / "evaluation" / "lm-eval" / arm / f"{name}.jsonl").read_text().splitlines()
            samples = sorted(theirs["samples"][name], key=lambda sample: sample["doc_id"])
            for line, sample in zip(kept, samples, strict=True):
                assert json.loads(line)["resps"] == json.loads(json.dumps(sample["resps"])), arm
        likelihoods[arm] = ours["tasks"]["likely"]["figures"]["likely"]["word_perplexity,none"]["value"]
    assert len(set(likelihoods.values())) == 4  # each form is itself: none stands in for another
    build_report(run_dir)
    results = json.loads((run_dir / "results.json").read_text())
    for arm in arms:
        rows = json.loads((run_dir / "evaluation" / f"{arm}.json").read_text())["tasks"]["sums_one"]["figures"][
            "sums_one"
        ]["acc,none"]
        reported = results["arms"][arm]["metrics"]["accuracy_lm_eval_sums_one_0_shot_acc"]
        assert reported["value"] == pytest.approx(rows["value"], abs=1e-10)
